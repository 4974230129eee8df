/* An orthogonal rotation that spreads outliers over all channels (QuaRot, arXiv 2404.00456).
 *
 * Q = (O (x) H) diag(signs): H is the normalised Hadamard matrix of the largest power of two that
 * divides the size, applied by butterflies; O mixes the odd number of its blocks. What is rotated
 * are vectors [size, width], `width` of them side by side: 1 for activations, 16 for weights.
 */
#include <math.h>

#include "native.h"
#include "simd.h"

#define NEAR 4096 /* floats that fit the nearest cache well */

typedef struct {
    const Rotation *rotation;
    float *rows;
} Rotate;

INLINE void butterflies(float *x, int32_t half) {
    for (int32_t i = 0; i < half; i += LANES) {
        vf low = load(x + i), high = load(x + i + half);
        store(x + i, low + high);
        store(x + i + half, low - high);
    }
}

/* The same of all pairs of parts that are smaller than a vector. */
INLINE void small_butterflies(float *x, int32_t count, int32_t half) {
    for (int32_t first = 0; first < count; first += 2 * half)
        for (int32_t i = first; i < first + half; i++) {
            float low = x[i], high = x[i + half];
            x[i] = low + high;
            x[i + half] = low - high;
        }
}

/* Not normalised. Halves that are too large for the cache are finished one after the other. */
static void hadamard(float *x, int32_t count, int32_t width) {
    if (count > NEAR && count > width) {
        hadamard(x, count / 2, width);
        hadamard(x + count / 2, count / 2, width);
        butterflies(x, count / 2);
        return;
    }
    int32_t half = width;
    for (; half < LANES && half < count; half *= 2) small_butterflies(x, count, half);
    for (; half < count; half *= 2)
        for (int32_t first = 0; first < count; first += 2 * half) butterflies(x + first, half);
}

/* Block j becomes the sum over i of O[j, i] (or O[i, j]) * block i, then H of that. */
static void mix(const Rotation *r, float *x, int32_t width, int is_inverse) {
    int32_t odd = r->size / r->block, stride = r->block * width;
    int32_t step = stride < LANES ? stride : LANES;
    float norm = 1.0f / sqrtf((float)r->block);
    vf parts[odd];
    for (int32_t at = 0; at < stride; at += step) {
        for (int32_t i = 0; i < odd; i++)
            parts[i] = load_some(x + (size_t)i * stride + at, step) * norm;
        for (int32_t j = 0; j < odd; j++) {
            vf sum = {0};
            for (int32_t i = 0; i < odd; i++) {
                float weight = r->mixing[is_inverse ? i * odd + j : j * odd + i];
                sum = fma_(broadcast(weight), parts[i], sum);
            }
            store_some(x + (size_t)j * stride + at, sum, step);
        }
    }
    for (int32_t j = 0; j < odd; j++) hadamard(x + (size_t)j * stride, stride, width);
}

static void rotate_row(void *context, int32_t row) {
    const Rotate *job = context;
    const Rotation *r = job->rotation;
    float *x = job->rows + (size_t)row * r->size;
    for (int32_t i = 0; i < r->size; i++) x[i] *= r->signs[i];
    mix(r, x, 1, 0);
}

static void unrotate_row(void *context, int32_t row) {
    const Rotate *job = context;
    const Rotation *r = job->rotation;
    float *x = job->rows + (size_t)row * r->size;
    mix(r, x, 1, 1);
    for (int32_t i = 0; i < r->size; i++) x[i] *= r->signs[i];
}

void rotate_rows(Pool *pool, const Rotation *rotation, float *rows, int32_t num_rows) {
    Rotate job = {rotation, rows};
    parallel_for(pool, rotate_row, &job, num_rows);
}

void unrotate_rows(Pool *pool, const Rotation *rotation, float *rows, int32_t num_rows) {
    Rotate job = {rotation, rows};
    parallel_for(pool, unrotate_row, &job, num_rows);
}

/* Rotate each column of x [size, 16]. */
void rotate_columns(const Rotation *r, float *x) {
    for (int32_t i = 0; i < r->size; i++)
        for (int32_t k = 0; k < PANEL; k++) x[(size_t)i * PANEL + k] *= r->signs[i];
    mix(r, x, PANEL, 0);
}
