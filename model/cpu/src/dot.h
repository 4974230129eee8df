/* Integer products of some rows of activations with panels of weights: exact, so that order,
 * company and instruction change nothing. A step covers 4 columns: 64 bytes hold 16 rows by 4.
 *
 * AVX-512 VNNI multiplies unsigned by signed bytes. int8 weights are stored with 128 added there,
 * and sums begin at -128 times the sum of the codes.
 * AVX2 has the same only with saturation to 16 bits, which these sums never reach: |w| * (a with the
 * sign of w) is at most 2 * 128 * 127 = 32512 a pair, as no activation's code is -128; a nibble times
 * a code is at most 2 * 15 * 127 = 3810, so that eight such pairs can be summed in 16 bits.
 */
#ifndef ARRIERO_DOT_H
#define ARRIERO_DOT_H

#include "native.h"
#include "simd.h"

#define VECTORS (PANEL / LANES)
#define MAX_TILE_ROWS 6 /* R and P are constants where these are inlined, and at most these */
#if LANES == 16
#define TILE_PANELS 3 /* 18 sums hide the latency of adding, which 12 do not on every machine */
#else
#define TILE_PANELS 1
#endif
#define TILE_VECTORS (TILE_PANELS * VECTORS)

/* Weights that will be wanted soon: P places are fetched at each step, `spacing` bytes apart, so that
 * the tiles of a run bring in the next run's panels among them. */
typedef struct {
    const uint8_t *next;
    size_t spacing;
} Ahead;

INLINE void fetch(Ahead *ahead, const int P) {
    for (int p = 0; p < P; p++) __builtin_prefetch(ahead->next + p * ahead->spacing);
    ahead->next += P * ahead->spacing;
}

/* Of any level. */
typedef uint16_t words16 __attribute__((vector_size(32)));
typedef uint16_t words32 __attribute__((vector_size(64)));
typedef uint32_t longs16 __attribute__((vector_size(64)));

/* What the 16 rows of a panel multiply 32 columns by and add to them, in both bytes of a word: no
 * product or sum exceeds a byte. */
typedef struct {
    words32 step, first;
} Steps;

INLINE void load_steps(const uint16_t *from, Steps *to) {
    words16 both;
    memcpy(&both, from, sizeof both);
    longs16 wide = __builtin_convertvector(both, longs16), step = wide & 255, first = wide >> 8;
    step |= step << 16;
    first |= first << 8;
    first |= first << 16;
    to->step = (words32)step, to->first = (words32)first;
}

/* int8 codes as they are stored, of 16 rows by 4 columns each: of the low nibbles and the high. */
INLINE void unpack_bytes(const uint8_t *weights, const Steps *by, words32 *low, words32 *high) {
    words32 both;
    memcpy(&both, weights, sizeof both);
    *low = (both & 0x0f0f) * by->step + by->first;
    *high = (both >> 4 & 0x0f0f) * by->step + by->first;
    if (LANES != 16) *low ^= 0x8080, *high ^= 0x8080; /* signed: see STORED in pack.c */
}

INLINE void unpack_steps(const uint8_t *weights, const uint16_t *steps, uint8_t *to) {
    Steps by;
    load_steps(steps, &by);
    for (int32_t k = 0; k < 4; k++) {
        words32 low, high;
        unpack_bytes(weights + k * 64, &by, &low, &high);
        memcpy(to + k * 64, &low, sizeof low);
        memcpy(to + 256 + k * 64, &high, sizeof high);
    }
}

INLINE int32_t four_codes(const int8_t *codes) { int32_t v; memcpy(&v, codes, 4); return v; }

#if LANES == 16 /* ------------------------------------------------------------- AVX-512 VNNI */

/* Sums and the dot products of unsigned with signed bytes. The intrinsic has GCC 12 copy each sum to
 * another register and back in every step of a loop, which costs a third of the speed. */
INLINE __m512i add_dots(__m512i sums, __m512i bytes, __m512i codes) {
#ifdef EMULATED
    return _mm512_dpbusd_epi32(sums, bytes, codes);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(codes));
    return sums;
#endif
}

INLINE void dot_bytes(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                      const int8_t *codes, size_t stride, const int32_t *offsets,
                      size_t offsets_stride, int32_t steps, Ahead *ahead, vi sum[][TILE_VECTORS]) {
    __m512i s[MAX_TILE_ROWS][TILE_PANELS], w[TILE_PANELS];
    for (int r = 0; r < R; r++) {
        __m512i first = _mm512_set1_epi32(offsets ? offsets[r * offsets_stride] : 0);
        for (int p = 0; p < P; p++) s[r][p] = first;
    }
    for (int32_t k = 0; k < steps; k++) {
        fetch(ahead, P);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) w[p] = _mm512_loadu_si512(weights + p * panel_bytes + k * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512i a = _mm512_set1_epi32(four_codes(codes + r * stride + k * 4));
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) s[r][p] = add_dots(s[r][p], w[p], a);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) sum[r][p] = (vi)s[r][p];
}

/* A group of 32 columns as bytes in the order of the columns: what several tiles of rows share. */
INLINE void unpack_int4(const uint8_t *weights, uint8_t *to) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int32_t k = 0; k < 4; k++) {
        __m512i both = _mm512_loadu_si512(weights + k * 64);
        __m512i first = _mm512_and_si512(both, low);
        __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        memcpy(to + k * 64, &first, sizeof first);
        memcpy(to + 256 + k * 64, &second, sizeof second);
    }
}

INLINE void dot_int4(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                     const int8_t *codes, size_t stride, Ahead *ahead,
                     vi sum[][TILE_VECTORS]) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i s[MAX_TILE_ROWS][TILE_PANELS], w0[TILE_PANELS], w1[TILE_PANELS];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) s[r][p] = _mm512_setzero_si512();
    for (int32_t k = 0; k < 4; k++) {
        fetch(ahead, P);
        for (int p = 0; p < P; p++) {
            __m512i both = _mm512_loadu_si512(weights + p * panel_bytes + k * 64);
            w0[p] = _mm512_and_si512(both, low);
            w1[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int8_t *a = codes + r * stride + k * 4;
            __m512i a0 = _mm512_set1_epi32(four_codes(a));
            __m512i a1 = _mm512_set1_epi32(four_codes(a + 16));
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                s[r][p] = add_dots(s[r][p], w0[p], a0);
                s[r][p] = add_dots(s[r][p], w1[p], a1);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) sum[r][p] = (vi)s[r][p];
}

/* `count` groups of 32 columns whose kind is WEIGHTS_STEPS, unpacked on the way. */
INLINE void dot_steps(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                      const uint16_t *steps, size_t panel_steps, const int8_t *codes, size_t stride,
                      const int32_t *offsets, size_t offsets_stride, int32_t count, Ahead *ahead,
                      vi sum[][TILE_VECTORS]) {
    __m512i s[MAX_TILE_ROWS][TILE_PANELS];
    for (int r = 0; r < R; r++) {
        __m512i first = _mm512_set1_epi32(offsets[r * offsets_stride]);
        for (int p = 0; p < P; p++) s[r][p] = first;
    }
    for (int32_t g = 0; g < count; g++) {
        Steps by[TILE_PANELS];
        for (int p = 0; p < P; p++) load_steps(steps + p * panel_steps + g * PANEL, &by[p]);
        for (int32_t k = 0; k < 4; k++) {
            fetch(ahead, P);
            words32 low[TILE_PANELS], high[TILE_PANELS];
            for (int p = 0; p < P; p++)
                unpack_bytes(weights + p * panel_bytes + g * 256 + k * 64, &by[p], &low[p], &high[p]);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const int8_t *a = codes + r * stride + g * 32 + k * 4;
                __m512i a0 = _mm512_set1_epi32(four_codes(a));
                __m512i a1 = _mm512_set1_epi32(four_codes(a + 16));
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) {
                    s[r][p] = add_dots(s[r][p], (__m512i)low[p], a0);
                    s[r][p] = add_dots(s[r][p], (__m512i)high[p], a1);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) sum[r][p] = (vi)s[r][p];
}

#elif LANES == 8 /* -------------------------------------------------------------------- AVX2 */

INLINE void dot_bytes(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                      const int8_t *codes, size_t stride, const int32_t *offsets,
                      size_t offsets_stride, int32_t steps, Ahead *ahead,
                      vi sum[][TILE_VECTORS]) {
    (void)P, (void)ahead, (void)panel_bytes, (void)offsets, (void)offsets_stride;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i s[MAX_TILE_ROWS][2];
    for (int r = 0; r < R; r++) s[r][0] = s[r][1] = _mm256_setzero_si256();
    for (int32_t k = 0; k < steps; k++) {
        const __m256i *from = (const __m256i *)(weights + k * 64);
        __m256i w[2] = {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
        __m256i magnitude[2] = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
        for (int r = 0; r < R; r++) {
            __m256i a = _mm256_set1_epi32(four_codes(codes + r * stride + k * 4));
            for (int v = 0; v < 2; v++) {
                __m256i pairs = _mm256_maddubs_epi16(magnitude[v], _mm256_sign_epi8(a, w[v]));
                s[r][v] = _mm256_add_epi32(s[r][v], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = (vi)s[r][v];
}

INLINE void dot_int4(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                     const int8_t *codes, size_t stride, Ahead *ahead,
                     vi sum[][TILE_VECTORS]) {
    (void)P, (void)ahead, (void)panel_bytes;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i s[MAX_TILE_ROWS][2];
    for (int r = 0; r < R; r++) s[r][0] = s[r][1] = _mm256_setzero_si256();
    for (int32_t k = 0; k < 4; k++) {
        for (int v = 0; v < 2; v++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(weights + k * 64) + v);
            __m256i w0 = _mm256_and_si256(both, low);
            __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            for (int r = 0; r < R; r++) {
                const int8_t *a = codes + r * stride + k * 4;
                __m256i p0 = _mm256_maddubs_epi16(w0, _mm256_set1_epi32(four_codes(a)));
                __m256i p1 = _mm256_maddubs_epi16(w1, _mm256_set1_epi32(four_codes(a + 16)));
                s[r][v] = _mm256_add_epi16(s[r][v], _mm256_add_epi16(p0, p1));
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = (vi)_mm256_madd_epi16(s[r][v], ones);
}

#else /* -------------------------------------------------------------------------- portable */

INLINE void dot_bytes(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                      const int8_t *codes, size_t stride, const int32_t *offsets,
                      size_t offsets_stride, int32_t steps, Ahead *ahead,
                      vi sum[][TILE_VECTORS]) {
    (void)P, (void)ahead, (void)panel_bytes, (void)offsets, (void)offsets_stride;
    int32_t s[MAX_TILE_ROWS][PANEL];
    memset(s, 0, sizeof s);
    for (int32_t k = 0; k < steps; k++)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < PANEL; n++)
                for (int j = 0; j < 4; j++)
                    s[r][n] += (int8_t)weights[k * 64 + n * 4 + j] * codes[r * stride + k * 4 + j];
    memcpy(sum, s, (size_t)R * sizeof s[0]);
}

INLINE void dot_int4(const int R, const int P, const uint8_t *weights, size_t panel_bytes,
                     const int8_t *codes, size_t stride, Ahead *ahead,
                     vi sum[][TILE_VECTORS]) {
    (void)P, (void)ahead, (void)panel_bytes;
    int32_t s[MAX_TILE_ROWS][PANEL];
    memset(s, 0, sizeof s);
    for (int32_t k = 0; k < 4; k++)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < PANEL; n++)
                for (int j = 0; j < 4; j++) {
                    uint8_t both = weights[k * 64 + n * 4 + j];
                    const int8_t *a = codes + r * stride + k * 4 + j;
                    s[r][n] += (both & 15) * a[0] + (both >> 4) * a[16];
                }
    memcpy(sum, s, (size_t)R * sizeof s[0]);
}

#endif
#endif
