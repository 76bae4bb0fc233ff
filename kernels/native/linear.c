/* y = x W^T + b with bfloat16 weights, packed once, for any number of rows.
 *
 * Packed weights are panels of 16 outputs, [outputs / 16][inputs / 2][16][2], outputs padded to a
 * multiple of 32 with zeros: one vector holds a pair of inputs of 16 outputs, and a row's pair is
 * broadcast against it. Each output is one chain of float32 additions in input order whatever the
 * tile, so a row's result depends neither on the other rows nor on the number of threads.
 */
#include "ops.h"

#define PANEL 16
#define PER_PANEL (PANEL / VL)
#ifdef __AVX512F__
#define MAX_ROWS 12 /* 12 rows x 2 panels: 24 of 32 registers accumulate */
#else
#define MAX_ROWS 3
#endif

#define FEW_ROWS 48 /* up to here an item is two panels, and the next item's are fetched ahead */

struct linear {
    const bf16 *x;
    long x_stride;
    const bf16 *w;
    const float *bias;
    bf16 *y;
    long rows, inputs, outputs;
    long panels_per_item;
    long ahead; /* panels from one item to the one its thread will take next; 0: fetch nothing */
};

/* `rows` rows against two panels. `ahead`: weights to bring into the cache meanwhile, or null. */
INLINE void tile(const int rows, const struct linear *a, long row, long panel, const bf16 *ahead) {
    enum { vecs = 2 * PER_PANEL };
    vf acc[MAX_ROWS][vecs];
    const long pairs = a->inputs / 2;
    const bf16 *x = a->x + row * a->x_stride;
    const bf16 *w = a->w + panel * PANEL * a->inputs;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) acc[r][v] = (vf){0};
    for (long k = 0; k < pairs; k++) {
        vu weights[vecs];
        if (ahead) {
            __builtin_prefetch(ahead + k * 4 * PANEL, 0, 2);
            __builtin_prefetch(ahead + k * 4 * PANEL + 2 * PANEL, 0, 2);
        }
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            weights[v] = load_bits(w + (v / PER_PANEL) * PANEL * a->inputs + k * 2 * PANEL +
                                   (v % PER_PANEL) * 2 * VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vu pair = splat_bits(load_pair(x + r * a->x_stride + 2 * k));
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) acc[r][v] = dot_pairs(acc[r][v], weights[v], pair);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        bf16 *y = a->y + (row + r) * a->outputs;
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            long first = panel * PANEL + v * VL;
            vf out = acc[r][v];
            if (a->bias) out += load(a->bias + first);
            if (first + VL <= a->outputs) {
                store_bf16(y + first, out);
            } else if (first < a->outputs) {
                bf16 tail[VL];
                store_bf16(tail, out);
                memcpy(y + first, tail, (size_t)(a->outputs - first) * sizeof(bf16));
            }
        }
    }
}

static void tile_of(long rows, const struct linear *a, long row, long panel, const bf16 *ahead) {
    switch (rows) {
#define CASE(R) case R: if (R <= MAX_ROWS) tile(R, a, row, panel, ahead); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

/* Some panels, all rows: row tiles outside, so that a tile of x serves every panel of the item. */
static void linear_item(const void *args, long item) {
    const struct linear *a = args;
    long first = item * a->panels_per_item;
    long last = (a->outputs + 2 * PANEL - 1) / (2 * PANEL) * 2;
    if (first + a->panels_per_item < last) last = first + a->panels_per_item;
    long tiles = (a->rows + MAX_ROWS - 1) / MAX_ROWS;
    for (long t = 0; t < tiles; t++) {
        long row = a->rows * t / tiles, rows = a->rows * (t + 1) / tiles - row;
        for (long panel = first; panel < last; panel += 2) {
            int fetch = a->ahead && t + 1 == tiles;
            tile_of(rows, a, row, panel,
                    fetch ? a->w + (panel + a->ahead) * PANEL * a->inputs : 0);
        }
    }
}

void convserve_linear(const bf16 *x, long x_stride, const bf16 *w, const float *bias, bf16 *y,
                      long rows, long inputs, long outputs, long threads) {
    /* With many rows an item's weights stay in the second-level cache while its row tiles pass over them. */
    long pairs = (outputs + 2 * PANEL - 1) / (2 * PANEL);
    long most = rows <= FEW_ROWS ? 1 : (256 << 10) / (2 * PANEL * 2 * inputs);
    if (most < 1) most = 1;
    long rounds = (pairs + threads * most - 1) / (threads * most);
    long each = (pairs + threads * rounds - 1) / (threads * rounds);
    struct linear a = {x, x_stride, w, bias, y, rows, inputs, outputs, 2 * each,
                       rows <= FEW_ROWS ? 2 * each * threads : 0};
    run_items(linear_item, &a, (pairs + each - 1) / each, (int)threads);
}

struct pack {
    const bf16 *w;
    long w_stride;
    bf16 *packed;
    long inputs, outputs;
};

static void pack_item(const void *args, long panel) {
    const struct pack *a = args;
    bf16 *to = a->packed + panel * PANEL * a->inputs;
    for (long k = 0; k < a->inputs; k += 2)
        for (long n = 0; n < PANEL; n++, to += 2) {
            long row = panel * PANEL + n;
            const bf16 *from = a->w + row * a->w_stride + k;
            to[0] = row < a->outputs ? from[0] : 0;
            to[1] = row < a->outputs ? from[1] : 0;
        }
}

void convserve_pack(const bf16 *w, long w_stride, bf16 *packed, long inputs, long outputs,
                    long threads) {
    struct pack a = {w, w_stride, packed, inputs, outputs};
    run_items(pack_item, &a, (outputs + 2 * PANEL - 1) / (2 * PANEL) * 2, (int)threads);
}

/* Rows of a packed matrix as they were: y[i] = w[ids[i]]. */
void convserve_embed(const bf16 *packed, const int64_t *ids, bf16 *y, long rows, long inputs) {
    for (long r = 0; r < rows; r++, y += inputs) {
        const bf16 *from = packed + ids[r] / PANEL * PANEL * inputs + ids[r] % PANEL * 2;
        for (long k = 0; k < inputs; k += 2, from += 2 * PANEL) memcpy(y + k, from, 2 * sizeof *y);
    }
}
