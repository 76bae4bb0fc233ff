/* Operators on single rows: RMSNorm with and without residual, SiLU times up, and QK-norm with
 * RoPE and the store into KV pages. Weights of norms are bfloat16, or float32 if `wide`.
 */
#include <math.h>

#include "ops.h"

#define ITEM_CHANNELS 8192 /* about 1 us of work: less is not worth a second thread */
#define MAX_HEAD 512

static long rows_per_item(long width) { return width < ITEM_CHANNELS ? ITEM_CHANNELS / width : 1; }

struct norm {
    const bf16 *x;
    long x_stride;
    const bf16 *residual;
    bf16 *sum, *y;
    const void *w;
    long rows, width, wide, per_item;
    float eps;
};

static void norm_row(const struct norm *a, long row) {
    const bf16 *x = a->x + row * a->x_stride;
    bf16 *y = a->y + row * a->width;
    vf squares = {0};
    float tail = 0;
    long i;
    if (a->residual) {
        const bf16 *residual = a->residual + row * a->width;
        bf16 *sum = a->sum + row * a->width;
        for (i = 0; i + VL <= a->width; i += VL)
            store_bf16(sum + i, load_bf16(x + i) + load_bf16(residual + i));
        for (; i < a->width; i++) sum[i] = narrow(widen(x[i]) + widen(residual[i]));
        x = sum;
    }
    for (i = 0; i + VL <= a->width; i += VL) {
        vf v = load_bf16(x + i);
        squares += v * v;
    }
    for (; i < a->width; i++) tail += widen(x[i]) * widen(x[i]);
    float scale = 1.0f / sqrtf((sum_lanes(squares) + tail) / (float)a->width + a->eps);
    for (i = 0; i + VL <= a->width; i += VL)
        store_bf16(y + i, load_bf16(x + i) * scale * load_weight(a->w, i, (int)a->wide));
    for (; i < a->width; i++)
        y[i] = narrow(widen(x[i]) * scale * weight_at(a->w, i, (int)a->wide));
}

static void norm_item(const void *args, long item) {
    const struct norm *a = args;
    long end = (item + 1) * a->per_item;
    for (long row = item * a->per_item; row < end && row < a->rows; row++) norm_row(a, row);
}

void convserve_rms_norm(const bf16 *x, long x_stride, const bf16 *residual, bf16 *sum,
                        const void *w, long wide, float eps, bf16 *y, long rows, long width,
                        long threads) {
    long per_item = rows_per_item(width);
    struct norm a = {x, x_stride, residual, sum, y, w, rows, width, wide, per_item, eps};
    run_items(norm_item, &a, (rows + per_item - 1) / per_item, (int)threads);
}

struct silu {
    const bf16 *x;
    long x_stride;
    bf16 *y;
    long rows, width, per_item;
};

static void silu_item(const void *args, long item) {
    const struct silu *a = args;
    long end = (item + 1) * a->per_item;
    for (long row = item * a->per_item; row < end && row < a->rows; row++) {
        const bf16 *gate = a->x + row * a->x_stride, *up = gate + a->width;
        bf16 *y = a->y + row * a->width;
        for (long i = 0; i < a->width; i += VL) {
            bf16 g[VL], u[VL], out[VL];
            long n = a->width - i < VL ? a->width - i : VL;
            const bf16 *from = gate + i, *times = up + i;
            if (n < VL) {
                memset(g, 0, sizeof g);
                memset(u, 0, sizeof u);
                from = memcpy(g, from, (size_t)n * sizeof *g);
                times = memcpy(u, times, (size_t)n * sizeof *u);
            }
            vf v = load_bf16(from);
            v = v / (1.0f + exp_lanes(-v)) * load_bf16(times);
            if (n == VL) {
                store_bf16(y + i, v);
            } else {
                store_bf16(out, v);
                memcpy(y + i, out, (size_t)n * sizeof *out);
            }
        }
    }
}

void convserve_silu_mul(const bf16 *x, long x_stride, bf16 *y, long rows, long width,
                        long threads) {
    long per_item = rows_per_item(width);
    struct silu a = {x, x_stride, y, rows, width, per_item};
    run_items(silu_item, &a, (rows + per_item - 1) / per_item, (int)threads);
}

struct rope {
    const bf16 *qkv;
    long qkv_stride, q_heads, kv_heads, head;
    const float *rope;
    long rope_stride, rot;
    long norm; /* 0 none, 1 over each head, 2 over the whole of q and of k */
    const void *q_weight, *k_weight;
    long wide;
    bf16 *q, *k_pages, *v_pages;
    long page_size, page_stride, head_stride, slot_stride;
    const int64_t *kv_rows;
    long rows, per_item;
    float eps;
};

static float rms_scale(const bf16 *x, long width, float eps) {
    vf squares = {0};
    float tail = 0;
    long i = 0;
    for (; i + VL <= width; i += VL) {
        vf v = load_bf16(x + i);
        squares += v * v;
    }
    for (; i < width; i++) tail += widen(x[i]) * widen(x[i]);
    return 1.0f / sqrtf((sum_lanes(squares) + tail) / (float)width + eps);
}

static void rotate_head(const struct rope *a, const float *x, const float *cos, bf16 *out) {
    long half = a->rot / 2, i = 0;
    const float *sin = cos + half;
    for (; i + VL <= half; i += VL) {
        vf first = load(x + i), second = load(x + half + i);
        store_bf16(out + i, first * load(cos + i) - second * load(sin + i));
        store_bf16(out + half + i, second * load(cos + i) + first * load(sin + i));
    }
    for (; i < half; i++) {
        out[i] = narrow(x[i] * cos[i] - x[half + i] * sin[i]);
        out[half + i] = narrow(x[half + i] * cos[i] + x[i] * sin[i]);
    }
    for (i = 2 * half; i < a->head; i++) out[i] = narrow(x[i]);
}

static void rope_row(const struct rope *a, long row) {
    const bf16 *x = a->qkv + row * a->qkv_stride;
    const float *cos = a->rope + row * a->rope_stride;
    long d = a->head, kv_row = a->kv_rows[row];
    long at = kv_row / a->page_size * a->page_stride + kv_row % a->page_size * a->slot_stride;
    float q_scale = 1, k_scale = 1;
    if (a->norm == 2) {
        q_scale = rms_scale(x, a->q_heads * d, a->eps);
        k_scale = rms_scale(x + a->q_heads * d, a->kv_heads * d, a->eps);
    }
    for (long h = 0; h < a->q_heads + a->kv_heads; h++, x += d) {
        int is_q = h < a->q_heads;
        long kv_head = h - a->q_heads;
        if (!is_q && kv_row < 0) continue;
        float wide[MAX_HEAD];
        float scale = is_q ? q_scale : k_scale;
        if (a->norm == 1) scale = rms_scale(x, d, a->eps);
        for (long i = 0; i < d; i++) wide[i] = widen(x[i]) * scale;
        if (a->norm) {
            const void *w = is_q ? a->q_weight : a->k_weight;
            long first = a->norm == 1 ? 0 : (is_q ? h : kv_head) * d;
            for (long i = 0; i < d; i++) wide[i] *= weight_at(w, first + i, (int)a->wide);
        }
        bf16 *out = is_q ? a->q + (row * a->q_heads + h) * d
                         : a->k_pages + at + kv_head * a->head_stride;
        rotate_head(a, wide, cos, out);
    }
    if (kv_row < 0) return;
    for (long h = 0; h < a->kv_heads; h++, x += d)
        memcpy(a->v_pages + at + h * a->head_stride, x, (size_t)d * sizeof(bf16));
}

static void rope_item(const void *args, long item) {
    const struct rope *a = args;
    long end = (item + 1) * a->per_item;
    for (long row = item * a->per_item; row < end && row < a->rows; row++) rope_row(a, row);
}

void convserve_rope_write(const bf16 *qkv, long qkv_stride, long q_heads, long kv_heads,
                          long head, const float *rope, long rope_stride, long rot, long norm,
                          const void *q_weight, const void *k_weight, long wide, float eps,
                          bf16 *q, bf16 *k_pages, bf16 *v_pages, long page_size,
                          long page_stride, long head_stride, long slot_stride,
                          const int64_t *kv_rows, long rows, long threads) {
    long per_item = rows_per_item((q_heads + 2 * kv_heads) * head);
    struct rope a = {qkv,      qkv_stride,  q_heads,  kv_heads,    head,        rope,
                     rope_stride, rot,      norm,     q_weight,    k_weight,    wide,
                     q,        k_pages,     v_pages,  page_size,   page_stride, head_stride,
                     slot_stride, kv_rows,  rows,     per_item,    eps};
    run_items(rope_item, &a, (rows + per_item - 1) / per_item, (int)threads);
}
