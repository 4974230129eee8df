/* Vectors of the level that the file is compiled for: LANES floats or 32-bit integers.
 *
 * GCC's vector types carry the arithmetic; what they cannot say (a fused multiply-add, float16) is
 * an intrinsic here and nowhere else but in dot.h. The compiler may not fuse on its own
 * (-ffp-contract=off): a row's bits must not depend on the function that it was inlined into.
 */
#ifndef ARRIERO_SIMD_H
#define ARRIERO_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef int8_t vb __attribute__((vector_size(LANES)));

INLINE vf load(const float *from) { vf v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vf v) { memcpy(to, &v, sizeof v); }
INLINE vf broadcast(float x) { return x - (vf){0}; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

/* a > b ? a : b, and with < the smaller: if either is NaN, b. */
#if LANES == 16
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif LANES == 8
INLINE vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf smaller(vf a, vf b) { return choose(a < b, a, b); }
#endif
INLINE float larger_of(float a, float b) { return a > b ? a : b; }
INLINE vf magnitude(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* The first `count` of a vector, as far as it has them; the others are 0. */
INLINE vf load_some(const float *from, int32_t count) {
    if (count >= LANES) return load(from);
    vf v = {0};
    memcpy(&v, from, (size_t)count * sizeof(float));
    return v;
}

INLINE void store_some(float *to, vf v, int32_t count) {
    if (count >= LANES) store(to, v);
    else memcpy(to, &v, (size_t)count * sizeof(float));
}

INLINE vf fma_(vf a, vf b, vf c) {
#if LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* The largest, and the sum, of a vector's. */
INLINE float largest(vf a) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)a);
#else
    float most = a[0];
    for (int j = 1; j < LANES; j++) most = larger_of(a[j], most);
    return most;
#endif
}

INLINE int32_t total_of(vi a) {
#if LANES == 16
    return _mm512_reduce_add_epi32((__m512i)a);
#else
    int32_t total = 0;
    for (int j = 0; j < LANES; j++) total += a[j];
    return total;
#endif
}

/* IEEE 754 binary16, in C alone where the machine has no instruction for it. */
INLINE float half_to_float(uint16_t half) {
#if LANES >= 8
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = half & 0x7fff;
    float value;
    if (bits >= 0x7c00) bits = 0x7f800000 | (bits & 0x3ff) << 13;
    else if (bits >= 0x0400) bits = (bits << 13) + (112u << 23);
    else {
        value = (float)bits * 0x1p-24f;
        memcpy(&bits, &value, 4);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

INLINE uint16_t float_to_half(float value) {
#if LANES >= 8
    return _cvtss_sh(value, 0);
#else
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* subnormal: adding 0.5 leaves the rounded bits lowest */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - (112u << 23)) >> 13);
#endif
}

INLINE void floats_to_halves(const float *from, int32_t count, uint16_t *to) {
    int32_t i = 0;
#if LANES >= 8
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < count; i++) to[i] = float_to_half(from[i]);
}

INLINE vf load_half(const uint16_t *from) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    vf v = {0};
    for (int i = 0; i < LANES; i++) v[i] = half_to_float(from[i]);
    return v;
#endif
}

INLINE vf load_bfloat(const uint16_t *from) {
    vh v;
    memcpy(&v, from, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
}

INLINE vf load_codes(const int8_t *from) {
#if LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif LANES == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vf v = {0};
    for (int i = 0; i < LANES; i++) v[i] = from[i];
    return v;
#endif
}

/* The first `count` of integers in the range of bytes. */
INLINE void store_bytes(int8_t *to, vi codes, int32_t count) {
    vb bytes = __builtin_convertvector(codes, vb);
    if (count >= LANES) memcpy(to, &bytes, sizeof bytes);
    else memcpy(to, &bytes, (size_t)count);
}

/* The nearest integers, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves them in the low bits. */
INLINE vi nearest(vf x) { return (vi)(x + broadcast(12582912.0f)) - 0x4b400000; }

/* e^x for x <= 0, within 2 ulp; 0 below -87. 2^n times a polynomial in the fraction (Cephes' expf). */
INLINE vf exp_negative(vf x) {
    vi is_zero = x < broadcast(-87.0f);
    x = larger(broadcast(-87.0f), x); /* in this order NaN stays NaN */
    const vf magic = broadcast(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = fma_(x, broadcast(1.44269504088896341f), magic) - magic;
    vf r = fma_(n, broadcast(-0.693359375f), x);
    r = fma_(n, broadcast(2.12194440e-4f), r);
    vf p = broadcast(1.9875691500e-4f);
    p = fma_(p, r, broadcast(1.3981999507e-3f));
    p = fma_(p, r, broadcast(8.3334519073e-3f));
    p = fma_(p, r, broadcast(4.1665795894e-2f));
    p = fma_(p, r, broadcast(1.6666665459e-1f));
    p = fma_(p, r, broadcast(5.0000001201e-1f));
    p = fma_(p, r * r, r) + broadcast(1.0f);
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)power) & ~is_zero);
}

#endif
