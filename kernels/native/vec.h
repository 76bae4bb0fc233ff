/* Vectors, bfloat16 and the thread team: what every native kernel is written with.
 *
 * Vectors are the compiler's own (GCC, Clang): 16 floats with AVX-512, 8 with AVX2. Knows nothing
 * of any operator.
 */
#ifndef CONVSERVE_VEC_H
#define CONVSERVE_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define VL 16
#else
#define VL 8
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vu splat_bits(uint32_t x) { return x - (vu){0}; }
INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vu load_bits(const void *p) { vu v; memcpy(&v, p, sizeof v); return v; }
INLINE uint32_t load_pair(const bf16 *p) { uint32_t v; memcpy(&v, p, sizeof v); return v; }

INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (bf16)(bits >> 16 | 0x40);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* VL bfloat16 values <-> floats; rounds to nearest even. */
INLINE vf load_bf16(const bf16 *p) {
#ifdef __AVX512F__
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#endif
}

INLINE void store_bf16(bf16 *p, vf v) {
#ifdef __AVX512BF16__
    __m256bh narrowed = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &narrowed, sizeof narrowed);
#else
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vi nan = v != v;
    rounded = (rounded & ~(vu)nan) | (((bits >> 16) | 0x40) & (vu)nan);
    typedef uint16_t half __attribute__((vector_size(2 * VL)));
    half out = __builtin_convertvector(rounded, half);
    memcpy(p, &out, sizeof out);
#endif
}

/* acc + a0 b0 + a1 b1 in each lane, a and b pairs of bfloat16. */
INLINE vf dot_pairs(vf acc, vu a, vu b) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (vf)(a << 16) * (vf)(b << 16);
    return acc + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

/* Lanes of a where mask is all ones, of b where it is zero. */
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE float sum_lanes(vf v) {
    float s = 0;
    for (int i = VL / 2; i; i /= 2)
        for (int j = 0; j < i; j++) v[j] += v[j + i];
    s += v[0];
    return s;
}

INLINE float max_lanes(vf v) {
    for (int i = VL / 2; i; i /= 2)
        for (int j = 0; j < i; j++) v[j] = v[j] > v[j + i] ? v[j] : v[j + i];
    return v[0];
}

INLINE vf load_weight(const void *p, long i, int wide) {
    return wide ? load((const float *)p + i) : load_bf16((const bf16 *)p + i);
}

INLINE float weight_at(const void *p, long i, int wide) {
    return wide ? ((const float *)p)[i] : widen(((const bf16 *)p)[i]);
}

/* e^x for x up to 88, to about 1 unit in the last place; below -87 it stays at e^-87. */
INLINE vf exp_lanes(vf x) {
    x = choose(x < -87.0f, splat(-87.0f), x);
    x = choose(x > 88.0f, splat(88.0f), x);
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = (x * 1.44269504f + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi exponent = __builtin_convertvector(n, vi) + 127;
    return p * (vf)(exponent << 23);
}

/* Runs item(args, i) for i in 0 .. count-1 on `threads` threads; any thread takes any item. */
void run_items(void (*item)(const void *args, long i), const void *args, long count, int threads);

#endif
