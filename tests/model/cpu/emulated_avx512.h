/* The AVX-512 instructions that the native step uses, in plain C: for machines that lack them.
 *
 * Included before everything else, it has the sources compile their AVX-512 VNNI level: layouts,
 * offsets and vectors of 16 are then tested; the instructions themselves are not.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AVX512VNNI__ 1 /* after immintrin.h, which would otherwise want the real ones */
#define EMULATED static inline __attribute__((always_inline, unused))

EMULATED __m512i emulated_load(const void *from) {
    __m512i v;
    memcpy(&v, from, sizeof v);
    return v;
}

EMULATED __m512i emulated_set1_32(int32_t x) {
    int32_t lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = x;
    return emulated_load(lanes);
}

EMULATED __m512i emulated_dpbusd(__m512i sum, __m512i a, __m512i b) {
    int32_t s[16];
    uint8_t u[64];
    int8_t v[64];
    memcpy(s, &sum, 64), memcpy(u, &a, 64), memcpy(v, &b, 64);
    for (int i = 0; i < 64; i++) s[i / 4] += u[i] * v[i];
    return emulated_load(s);
}

EMULATED __m512i emulated_shift_right_16(__m512i a, int count) {
    uint16_t u[32];
    memcpy(u, &a, 64);
    for (int i = 0; i < 32; i++) u[i] = (uint16_t)(u[i] >> count);
    return emulated_load(u);
}

EMULATED __m512i emulated_and(__m512i a, __m512i b) {
    uint64_t u[8], v[8];
    memcpy(u, &a, 64), memcpy(v, &b, 64);
    for (int i = 0; i < 8; i++) u[i] &= v[i];
    return emulated_load(u);
}

EMULATED __m512 emulated_fma(__m512 a, __m512 b, __m512 c) {
    float x[16], y[16], z[16];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 16; i++) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return (__m512)emulated_load(z);
}

EMULATED __m512 emulated_from_half(__m256i halves) {
    uint16_t h[16];
    float x[16];
    memcpy(h, &halves, 32);
    for (int i = 0; i < 16; i++) x[i] = _cvtsh_ss(h[i]);
    return (__m512)emulated_load(x);
}

EMULATED __m512 emulated_from_codes(__m128i codes) {
    int8_t c[16];
    float x[16];
    memcpy(c, &codes, 16);
    for (int i = 0; i < 16; i++) x[i] = c[i];
    return (__m512)emulated_load(x);
}

EMULATED __m512 emulated_extreme(__m512 a, __m512 b, int sign) {
    float x[16], y[16];
    memcpy(x, &a, 64), memcpy(y, &b, 64);
    for (int i = 0; i < 16; i++) y[i] = sign * x[i] > sign * y[i] ? x[i] : y[i];
    return (__m512)emulated_load(y);
}

EMULATED float emulated_largest(__m512 a) {
    float x[16];
    memcpy(x, &a, 64);
    for (int i = 1; i < 16; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

EMULATED int32_t emulated_total(__m512i a) {
    int32_t x[16];
    memcpy(x, &a, 64);
    for (int i = 1; i < 16; i++) x[0] += x[i];
    return x[0];
}

#define _mm512_max_ps(a, b) emulated_extreme(a, b, 1)
#define _mm512_min_ps(a, b) emulated_extreme(a, b, -1)
#define _mm512_reduce_max_ps(a) emulated_largest(a)
#define _mm512_reduce_add_epi32(a) emulated_total(a)
#define _mm512_loadu_si512(from) emulated_load(from)
#define _mm512_set1_epi32(x) emulated_set1_32(x)
#define _mm512_set1_epi8(x) emulated_set1_32((x) * 0x01010101)
#define _mm512_setzero_si512() emulated_set1_32(0)
#define _mm512_and_si512(a, b) emulated_and(a, b)
#define _mm512_srli_epi16(a, count) emulated_shift_right_16(a, count)
#define _mm512_dpbusd_epi32(sum, a, b) emulated_dpbusd(sum, a, b)
#define _mm512_fmadd_ps(a, b, c) emulated_fma(a, b, c)
#define _mm512_cvtph_ps(halves) emulated_from_half(halves)
#define _mm512_cvtepi8_epi32(codes) (codes) /* the next one widens and converts */
#define _mm512_cvtepi32_ps(codes) emulated_from_codes(codes)
