/* Short convolution with generated filters and carried state.
 *
 * An item is a block of 32 channels of one stream, for every row of the step: its filter weights
 * are read once, and its ring rows are stored after all rows of their sequence have been computed,
 * so a chunk longer than the ring reads only what earlier steps left there.
 */
#include "ops.h"

#define BLOCK 32
#define MAX_WIDTH 8
#define MAX_RANK 64

enum kind { STATIC, LOWRANK, HEADWISE };

struct block {
    long channel, covered, count, z, stream_start; /* channel of x; its index among the covered */
    float taps[MAX_WIDTH][BLOCK], bias[BLOCK];
    float up[MAX_RANK][MAX_WIDTH][BLOCK];
};

INLINE void read_channels(const bf16 *from, long count, float *to) {
    if (count == BLOCK) {
        for (int c = 0; c < BLOCK; c += VL) store(to + c, load_bf16(from + c));
    } else {
        for (long c = 0; c < BLOCK; c++) to[c] = c < count ? widen(from[c]) : 0;
    }
}

static int find_block(const struct conv *a, long item, struct block *b) {
    long covered = 0;
    for (long s = 0; s < a->stream_count; s++) {
        long start = a->streams[3 * s], width = a->streams[3 * s + 1] - start;
        long blocks = (width + BLOCK - 1) / BLOCK;
        if (item < blocks) {
            b->stream_start = start;
            b->channel = start + item * BLOCK;
            b->covered = covered + item * BLOCK;
            b->count = width - item * BLOCK < BLOCK ? width - item * BLOCK : BLOCK;
            b->z = a->streams[3 * s + 2];
            return 1;
        }
        item -= blocks;
        covered += width;
    }
    return 0;
}

static void load_filters(const struct conv *a, struct block *b) {
    for (long c = 0; c < BLOCK; c++) b->bias[c] = a->bias && c < b->count ? a->bias[b->covered + c] : 0;
    for (long w = 0; w < a->width; w++)
        for (long c = 0; c < BLOCK; c++)
            b->taps[w][c] = c < b->count ? a->taps[w * a->channels + b->covered + c] : 0;
    if (a->kind == LOWRANK)
        for (long r = 0; r < a->rank; r++)
            for (long w = 0; w < a->width; w++)
                read_channels(a->up + (r * a->width + w) * a->channels + b->covered, b->count,
                              b->up[r][w]);
}

static void filter_of(const struct conv *a, const struct block *b, const bf16 *z,
                      float filter[MAX_WIDTH][BLOCK]) {
    for (long w = 0; w < a->width; w++) {
        vf f[BLOCK / VL];
        for (int v = 0; v < BLOCK / VL; v++) f[v] = load(b->taps[w] + v * VL);
        if (a->kind == LOWRANK)
            for (long r = 0; r < a->rank; r++) {
                float code = widen(z[b->z + r]);
                for (int v = 0; v < BLOCK / VL; v++) f[v] += code * load(b->up[r][w] + v * VL);
            }
        for (int v = 0; v < BLOCK / VL; v++) store(filter[w] + v * VL, f[v]);
        if (a->kind == HEADWISE)
            for (long c = 0; c < b->count; c++) {
                long head = (b->channel - b->stream_start + c) / a->head_size;
                filter[w][c] += widen(z[b->z + head * a->width + w]);
            }
    }
}

static void conv_row(const struct conv *a, const struct block *b, long seq, long row) {
    float filter[MAX_WIDTH][BLOCK], input[BLOCK];
    vf sum[BLOCK / VL];
    bf16 out[BLOCK];
    long local = row - a->offsets[seq];
    filter_of(a, b, a->z ? a->z + row * a->z_stride : 0, filter);
    for (int v = 0; v < BLOCK / VL; v++) sum[v] = (vf){0};
    for (long w = 0; w < a->width; w++) {
        long position = a->starts[seq] + local - w;
        if (position < 0) break;
        if (w <= local) {
            read_channels(a->x + (row - w) * a->x_stride + b->channel, b->count, input);
        } else {
            long ring_row = a->slots[seq] * a->ring_len + position % a->ring_len;
            read_channels(a->ring + ring_row * a->ring_stride + b->covered, b->count, input);
        }
        for (int v = 0; v < BLOCK / VL; v++) sum[v] += load(filter[w] + v * VL) * load(input + v * VL);
    }
    for (int v = 0; v < BLOCK / VL; v++) {
        vf y = (sum[v] + load(b->bias + v * VL)) * a->scale;
        if (a->silu) y = y / (1.0f + exp_lanes(-y));
        store_bf16(out + v * VL, y);
    }
    memcpy(a->y + row * a->y_stride + b->channel, out, (size_t)b->count * sizeof *out);
}

static void conv_item(const void *args, long item) {
    const struct conv *a = args;
    struct block b;
    if (!find_block(a, item, &b)) return;
    load_filters(a, &b);
    for (long seq = 0; seq < a->seqs; seq++) {
        for (long row = a->offsets[seq]; row < a->offsets[seq + 1]; row++) conv_row(a, &b, seq, row);
        for (long row = a->offsets[seq]; row < a->offsets[seq + 1]; row++)
            if (a->ring_rows[row] >= 0)
                memcpy(a->ring + a->ring_rows[row] * a->ring_stride + b.covered,
                       a->x + row * a->x_stride + b.channel, (size_t)b.count * sizeof(bf16));
    }
    for (long row = a->offsets[a->seqs]; row < a->rows; row++)
        memset(a->y + row * a->y_stride + b.channel, 0, (size_t)b.count * sizeof(bf16));
}

void convserve_conv(const struct conv *args, long threads) {
    long blocks = 0;
    for (long s = 0; s < args->stream_count; s++)
        blocks += (args->streams[3 * s + 1] - args->streams[3 * s] + BLOCK - 1) / BLOCK;
    run_items(conv_item, args, blocks, (int)threads);
}
