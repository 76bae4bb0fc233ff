/* The operators, as Python and `block.c` call them. Strides are in elements; last axes are dense. */
#ifndef CONVSERVE_OPS_H
#define CONVSERVE_OPS_H

#include "vec.h"

struct conv {
    const bf16 *x, *z;
    bf16 *y, *ring;
    long x_stride, z_stride, y_stride, ring_stride; /* ring: one row to the next */
    long kind, width, rank, head_size, silu, channels;
    const float *taps; /* [width][channels] */
    const float *bias;
    const bf16 *up;         /* [rank][width][channels] */
    const int64_t *streams; /* start, stop, z_start of each */
    long stream_count;
    const int32_t *starts, *offsets, *slots;
    const int64_t *ring_rows;
    long seqs, rows, ring_len;
    float scale;
};

void convserve_conv(const struct conv *args, long threads);

void convserve_linear(const bf16 *x, long x_stride, const bf16 *w, const float *bias, bf16 *y,
                      long rows, long inputs, long outputs, long threads);

/* y = norm(x) w, or with a residual: sum = x + residual, y = norm(sum) w. */
void convserve_rms_norm(const bf16 *x, long x_stride, const bf16 *residual, bf16 *sum,
                        const void *w, long wide, float eps, bf16 *y, long rows, long width,
                        long threads);

void convserve_silu_mul(const bf16 *x, long x_stride, bf16 *y, long rows, long width,
                        long threads);

/* norm: 0 none, 1 over each head, 2 over the whole of q and of k. */
void convserve_rope_write(const bf16 *qkv, long qkv_stride, long q_heads, long kv_heads,
                          long head, const float *rope, long rope_stride, long rot, long norm,
                          const void *q_weight, const void *k_weight, long wide, float eps,
                          bf16 *q, bf16 *k_pages, bf16 *v_pages, long page_size,
                          long page_stride, long head_stride, long slot_stride,
                          const int64_t *kv_rows, long rows, long threads);

/* window 0: none. Returns 0, or -1 if memory for the work list ran out. */
long convserve_attention(const bf16 *q, const bf16 *k_pages, const bf16 *v_pages, bf16 *out,
                         const int32_t *starts, const int32_t *offsets, long seqs,
                         const int32_t *pages, long pages_stride, long page_size,
                         long page_stride, long head_stride, long slot_stride, long q_heads,
                         long kv_heads, long head, float scale, long window, long tokens,
                         long threads);

#endif
