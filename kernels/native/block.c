/* The two blocks of a decoder layer as one call each: what lies between their linear layers is too
 * short for a call from Python. Nothing is computed here; intermediate rows live in scratch memory
 * of the calling thread.
 */
#include <stdlib.h>

#include "ops.h"

struct linear_weights {
    const bf16 *w;
    const float *bias;
    long inputs, outputs;
};

struct convolved {
    const struct conv *conv; /* the filter's constant part; null: no convolution */
    long width;              /* channels of the convolved tensor */
    long z;                  /* first column of z in its row */
    bf16 *ring;
    long ring_stride;
};

/* What a step's rows are and where their state lives. */
struct step {
    const int32_t *starts, *offsets, *slots, *pages;
    const int64_t *kv_rows, *ring_rows;
    long seqs, rows, pages_stride, ring_len;
    const float *rope;
    long rope_stride, rot, threads;
};

struct attention_block {
    struct linear_weights qkv, o;
    struct convolved qkv_conv, o_conv;
    long o_code_from_input;
    long q_heads, kv_heads, head, window;
    long page_size, page_stride, head_stride, slot_stride;
    long norm, norm_wide;
    const void *q_norm, *k_norm;
    bf16 *k_pages, *v_pages;
    const void *next_norm;
    long next_norm_wide;
    float scale, norm_eps, next_norm_eps;
};

struct mlp_block {
    struct linear_weights gate_up, down;
    struct convolved gate_up_conv, down_conv;
    long down_code_from_input;
    long width;
    const void *next_norm;
    long next_norm_wide;
    float next_norm_eps;
};

static _Thread_local bf16 *scratch;
static _Thread_local size_t scratch_size;

static bf16 *reserve(size_t values) {
    if (values <= scratch_size) return scratch;
    free(scratch);
    scratch = aligned_alloc(64, (values * sizeof(bf16) + 63) / 64 * 64);
    scratch_size = scratch ? values : 0;
    return scratch;
}

static void multiply(const struct linear_weights *a, const struct step *s, const bf16 *x,
                     bf16 *y) {
    convserve_linear(x, a->inputs, a->w, a->bias, y, s->rows, a->inputs, a->outputs, s->threads);
}

/* Convolves the first channels of x's rows into `to`; returns the rows to go on with. */
static const bf16 *convolve(const struct convolved *c, const struct step *s, const bf16 *x,
                            long *stride, const bf16 *z, long z_stride, bf16 *to) {
    if (!c->conv) return x;
    struct conv a = *c->conv;
    a.x = x;
    a.x_stride = *stride;
    a.z = z + c->z;
    a.z_stride = z_stride;
    a.y = to;
    a.y_stride = c->width;
    a.ring = c->ring;
    a.ring_stride = c->ring_stride;
    a.starts = s->starts;
    a.offsets = s->offsets;
    a.slots = s->slots;
    a.ring_rows = s->ring_rows;
    a.seqs = s->seqs;
    a.rows = s->rows;
    a.ring_len = s->ring_len;
    if (a.channels != c->width)
        for (long r = 0; r < s->rows; r++)
            memcpy(to + r * c->width, x + r * *stride, (size_t)c->width * sizeof *to);
    convserve_conv(&a, s->threads);
    *stride = c->width;
    return to;
}

/* Both return 0, or -1 if memory ran out. y, sum: [rows][hidden]. */
long convserve_attention_block(const struct attention_block *a, const struct step *s,
                               const bf16 *x, const bf16 *residual, bf16 *y, bf16 *sum) {
    long q_width = a->q_heads * a->head, width = q_width + 2 * a->kv_heads * a->head;
    long hidden = a->qkv.inputs;
    long values = a->qkv.outputs + width + 2 * q_width + a->o.outputs + hidden;
    bf16 *out = reserve((size_t)(s->rows * values));
    if (!out) return -1;
    bf16 *convolved = out + s->rows * a->qkv.outputs;
    bf16 *q = convolved + s->rows * width, *attended = q + s->rows * q_width;
    bf16 *projected = attended + s->rows * q_width, *last = projected + s->rows * a->o.outputs;

    multiply(&a->qkv, s, x, out);
    long stride = a->qkv.outputs;
    const bf16 *qkv = convolve(&a->qkv_conv, s, out, &stride, out, a->qkv.outputs,
                               convolved);
    convserve_rope_write(qkv, stride, a->q_heads, a->kv_heads, a->head, s->rope, s->rope_stride,
                         s->rot, a->norm, a->q_norm, a->k_norm, a->norm_wide, a->norm_eps, q,
                         a->k_pages, a->v_pages, a->page_size, a->page_stride, a->head_stride,
                         a->slot_stride, s->kv_rows, s->rows, s->threads);
    if (convserve_attention(q, a->k_pages, a->v_pages, attended, s->starts, s->offsets,
                            s->seqs, s->pages, s->pages_stride, a->page_size, a->page_stride,
                            a->head_stride, a->slot_stride, a->q_heads, a->kv_heads, a->head,
                            a->scale, a->window, s->rows, s->threads))
        return -1;
    multiply(&a->o, s, attended, projected);
    stride = a->o.outputs;
    const bf16 *code = a->o_code_from_input ? out : projected;
    long code_stride = a->o_code_from_input ? a->qkv.outputs : a->o.outputs;
    const bf16 *added = convolve(&a->o_conv, s, projected, &stride, code, code_stride, last);
    convserve_rms_norm(added, stride, residual, sum, a->next_norm, a->next_norm_wide,
                       a->next_norm_eps, y, s->rows, hidden, s->threads);
    return 0;
}

long convserve_mlp_block(const struct mlp_block *a, const struct step *s, const bf16 *x,
                         const bf16 *residual, bf16 *y, bf16 *sum) {
    long hidden = a->gate_up.inputs;
    long values = a->gate_up.outputs + 3 * a->width + a->down.outputs + hidden;
    bf16 *out = reserve((size_t)(s->rows * values));
    if (!out) return -1;
    bf16 *convolved = out + s->rows * a->gate_up.outputs;
    bf16 *product = convolved + s->rows * 2 * a->width;
    bf16 *projected = product + s->rows * a->width, *last = projected + s->rows * a->down.outputs;

    multiply(&a->gate_up, s, x, out);
    long stride = a->gate_up.outputs;
    const bf16 *gate_up = convolve(&a->gate_up_conv, s, out, &stride, out, a->gate_up.outputs,
                                   convolved);
    convserve_silu_mul(gate_up, stride, product, s->rows, a->width, s->threads);
    multiply(&a->down, s, product, projected);
    stride = a->down.outputs;
    const bf16 *code = a->down_code_from_input ? out : projected;
    long code_stride = a->down_code_from_input ? a->gate_up.outputs : a->down.outputs;
    const bf16 *added = convolve(&a->down_conv, s, projected, &stride, code, code_stride, last);
    convserve_rms_norm(added, stride, residual, sum, a->next_norm, a->next_norm_wide,
                       a->next_norm_eps, y, s->rows, hidden, s->threads);
    return 0;
}
