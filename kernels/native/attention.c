/* Causal attention over the paged cache, one pass of online softmax in float32.
 *
 * An item is one sequence, one kv head and a run of its rows: every (row, query head of the group)
 * shares the keys. Blocks of 64 keys are transposed once into panels of 16 keys, so scores come
 * from the same broadcast-a-pair product as the linears. Key blocks start at multiples of 64
 * positions and masked blocks leave a row alone, so a row's result does not depend on how its
 * sequence was cut into chunks or on the other sequences.
 */
#include <math.h>
#include <stdlib.h>

#include "ops.h"

#define KEYS 64
#define VECS (KEYS / VL)
#define MAX_QUERIES 48
#define MAX_HEAD 256
#ifdef __AVX512F__
#define TILE 6 /* queries a register tile: 6 x 4 accumulators */
#else
#define TILE 2
#endif
#define TILE_VECS 4

static const bf16 zeros[MAX_HEAD];

struct run {
    long seq, token, rows, start;
};

struct attention {
    const bf16 *q, *k_pages, *v_pages;
    bf16 *out;
    const int32_t *pages;
    long pages_stride, page_size, page_stride, head_stride, slot_stride;
    long q_heads, kv_heads, head, window;
    const struct run *runs;
    float scale;
};

struct scratch {
    bf16 q[MAX_QUERIES * MAX_HEAD];
    uint32_t keys[KEYS * MAX_HEAD / 2];
    float scores[MAX_QUERIES * KEYS];
    float out[MAX_QUERIES * MAX_HEAD];
    float max[MAX_QUERIES], sum[MAX_QUERIES], rescale[MAX_QUERIES];
    const bf16 *k_rows[KEYS], *v_rows[KEYS];
};

#ifdef __AVX512F__
/* 16 rows of 16 pairs -> 16 pairs of 16 rows. */
INLINE void transpose(const bf16 *const *rows, long at, uint32_t *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + at);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + 16 * i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + 16 * (i + 8), _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + 16 * (i + 4), _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + 16 * (i + 12), _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

/* keys[pair][KEYS]: pair p of every key of the block. */
INLINE void pack_keys(const struct attention *a, struct scratch *s, long keys) {
    long padded = (keys + 15) / 16 * 16;
    for (long j = keys; j < padded; j++) s->k_rows[j] = zeros;
    for (long j = 0; j < padded; j += 16)
        for (long p = 0; p < a->head / 2; p += 16) {
            uint32_t *to = s->keys + j / 16 * 16 * (a->head / 2) + p * 16;
#ifdef __AVX512F__
            if (p + 16 <= a->head / 2) {
                transpose(s->k_rows + j, 2 * p, to);
                continue;
            }
#endif
            long n = a->head / 2 - p < 16 ? a->head / 2 - p : 16;
            for (long i = 0; i < n; i++)
                for (long r = 0; r < 16; r++) to[i * 16 + r] = load_pair(s->k_rows[j + r] + 2 * (p + i));
        }
}

/* scores of `rows` queries against 16 keys (VL a vector). */
INLINE void score_tile(const int rows, const struct attention *a, struct scratch *s, long query,
                       long panel) {
    enum { V = 16 / VL };
    vf acc[2 * TILE][V];
    const bf16 *q = s->q + query * a->head;
    const uint32_t *keys = s->keys + panel * 16 * (a->head / 2);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < V; v++) acc[r][v] = (vf){0};
    for (long p = 0; p < a->head / 2; p++) {
        vu k[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) k[v] = load_bits(keys + p * 16 + v * VL);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vu pair = splat_bits(load_pair(q + r * a->head + 2 * p));
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], k[v], pair);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++)
            store(s->scores + (query + r) * KEYS + panel * 16 + v * VL, acc[r][v] * a->scale);
}

/* out = out * rescale + weights V for `rows` queries and `vecs` vectors of channels. */
INLINE void value_tile(const int rows, const int vecs, const struct attention *a,
                       struct scratch *s, long query, long channel, long keys) {
    vf acc[TILE][TILE_VECS];
    float *out = s->out + query * a->head + channel;
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++)
            acc[r][v] = load(out + r * a->head + v * VL) * s->rescale[query + r];
    for (long j = 0; j < keys; j++) {
        vf values[TILE_VECS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) values[v] = load_bf16(s->v_rows[j] + channel + v * VL);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vf weight = splat(s->scores[(query + r) * KEYS + j]);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) acc[r][v] += weight * values[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(out + r * a->head + v * VL, acc[r][v]);
}

static void scores_of(const struct attention *a, struct scratch *s, long queries, long keys) {
    for (long panel = 0; panel * 16 < keys; panel++)
        for (long i = 0; i < queries;) {
            long n = queries - i < 2 * TILE ? queries - i : 2 * TILE;
            switch (n) {
#define CASE(R) case R: if (R <= 2 * TILE) score_tile(R, a, s, i, panel); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
            }
            i += n;
        }
}

static void values_of(const struct attention *a, struct scratch *s, long queries, long keys) {
    for (long c = 0; c < a->head;) {
        int wide = c + TILE_VECS * VL <= a->head;
        for (long i = 0; i < queries;) {
            long n = queries - i < TILE ? queries - i : TILE;
            switch (n) {
#define CASE(R)                                                     \
    case R:                                                         \
        if (R > TILE) break;                                        \
        if (wide) value_tile(R, TILE_VECS, a, s, i, c, keys);       \
        else value_tile(R, 1, a, s, i, c, keys);                    \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
            i += n;
        }
        c += wide ? TILE_VECS * VL : VL;
    }
}

/* Scores -> weights for keys [from, to) of the block; the others weigh nothing. */
static void softmax_row(struct scratch *s, long query, long from, long to) {
    float *scores = s->scores + query * KEYS;
    vf row[VECS], top = splat(-INFINITY), total = {0};
    vi lane, seen[VECS];
    if (from >= to) {
        memset(scores, 0, KEYS * sizeof *scores);
        s->rescale[query] = 1;
        return;
    }
    for (int i = 0; i < VL; i++) lane[i] = i;
    for (int v = 0; v < VECS; v++) {
        vi key = lane + v * VL;
        seen[v] = (key >= (int)from) & (key < (int)to);
        row[v] = choose(seen[v], load(scores + v * VL), splat(-INFINITY));
        top = choose(row[v] > top, row[v], top);
    }
    float max = max_lanes(top);
    if (max < s->max[query]) max = s->max[query];
    for (int v = 0; v < VECS; v++) {
        row[v] = choose(seen[v], exp_lanes(row[v] - max), (vf){0});
        total += row[v];
        store(scores + v * VL, row[v]);
    }
    float rescale = s->max[query] == -INFINITY ? 0 : expf(s->max[query] - max);
    s->sum[query] = s->sum[query] * rescale + sum_lanes(total);
    s->rescale[query] = rescale;
    s->max[query] = max;
}

/* Offsets into the pages of positions [from, to) of the run's sequence. */
static void addresses_of(const struct attention *a, const struct run *run, long kv_head, long from,
                         long to, long *at) {
    const int32_t *page = a->pages + run->seq * a->pages_stride + from / a->page_size;
    long slot = from % a->page_size;
    while (from < to) {
        long first = *page++ * a->page_stride + kv_head * a->head_stride;
        for (; slot < a->page_size && from < to; slot++, from++)
            *at++ = first + slot * a->slot_stride;
        slot = 0;
    }
}

static void attention_item(const void *args, long item) {
    const struct attention *a = args;
    const struct run *run = a->runs + item / a->kv_heads;
    long kv_head = item % a->kv_heads, group = a->q_heads / a->kv_heads;
    long queries = run->rows * group, end = run->start + run->rows;
    struct scratch s;
    for (long i = 0; i < queries; i++) {
        const bf16 *q = a->q + ((run->token + i / group) * a->q_heads + kv_head * group + i % group) * a->head;
        memcpy(s.q + i * a->head, q, (size_t)a->head * sizeof *q);
        s.max[i] = -INFINITY;
        s.sum[i] = 0;
    }
    memset(s.out, 0, (size_t)(queries * a->head) * sizeof *s.out);
    long first = a->window && run->start + 1 > a->window ? run->start + 1 - a->window : 0;
    for (long base = first / KEYS * KEYS; base < end; base += KEYS) {
        long keys = end - base < KEYS ? end - base : KEYS;
        long hidden = first > base ? first - base : 0, at[KEYS];
        addresses_of(a, run, kv_head, base + hidden, base + keys, at + hidden);
        for (long j = 0; j < keys; j++) {
            s.k_rows[j] = j < hidden ? zeros : a->k_pages + at[j];
            s.v_rows[j] = j < hidden ? zeros : a->v_pages + at[j];
        }
        /* Pages lie anywhere: the hardware does not guess the next one. */
        long next = base + KEYS, ahead = end - next < KEYS ? end - next : KEYS;
        addresses_of(a, run, kv_head, next, next + ahead, at);
        for (long j = 0; j < ahead; j++)
            for (long c = 0; c < a->head; c += 32) {
                __builtin_prefetch(a->k_pages + at[j] + c, 0, 2);
                __builtin_prefetch(a->v_pages + at[j] + c, 0, 2);
            }
        pack_keys(a, &s, keys);
        scores_of(a, &s, queries, keys);
        for (long i = 0; i < queries; i++) {
            long position = run->start + i / group;
            long from = a->window && position + 1 > a->window ? position + 1 - a->window - base : 0;
            long to = position + 1 - base;
            softmax_row(&s, i, from > 0 ? from : 0, to < keys ? to : keys);
        }
        values_of(a, &s, queries, keys);
    }
    for (long i = 0; i < queries; i++) {
        bf16 *out = a->out + ((run->token + i / group) * a->q_heads + kv_head * group + i % group) * a->head;
        float scale = 1 / s.sum[i];
        for (long c = 0; c < a->head; c += VL) store_bf16(out + c, load(s.out + i * a->head + c) * scale);
    }
}

long convserve_attention(const bf16 *q, const bf16 *k_pages, const bf16 *v_pages, bf16 *out,
                         const int32_t *starts, const int32_t *offsets, long seqs,
                         const int32_t *pages, long pages_stride, long page_size,
                         long page_stride, long head_stride, long slot_stride, long q_heads,
                         long kv_heads, long head, float scale, long window, long tokens,
                         long threads) {
    long per_run = MAX_QUERIES / (q_heads / kv_heads), count = 0;
    struct run *runs = malloc((size_t)(seqs + tokens / per_run + 1) * sizeof *runs);
    if (!runs) return -1;
    for (long i = 0; i < seqs; i++)
        for (long at = offsets[i]; at < offsets[i + 1]; at += per_run) {
            long rows = offsets[i + 1] - at < per_run ? offsets[i + 1] - at : per_run;
            runs[count++] = (struct run){i, at, rows, starts[i] + at - offsets[i]};
        }
    struct attention a = {q, k_pages, v_pages, out, pages, pages_stride, page_size, page_stride,
                          head_stride, slot_stride, q_heads, kv_heads, head, window, runs, scale};
    run_items(attention_item, &a, count * kv_heads, (int)threads);
    for (long t = seqs ? offsets[seqs] : 0; t < tokens; t++)
        memset(out + t * q_heads * head, 0, (size_t)(q_heads * head) * sizeof *out);
    free(runs);
    return 0;
}
