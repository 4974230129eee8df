/* An orthogonal rotation that spreads outliers over all channels (QuaRot, arXiv 2404.00456).
 *
 * Q = (O (x) H) diag(signs): H is the normalised Hadamard matrix of the largest power of two that
 * divides the size, applied by butterflies; O mixes the odd number of its blocks.
 */
#include <math.h>
#include <string.h>

#include "native.h"

typedef struct {
    const Rotation *rotation;
    float *rows;
} Rotate;

static void hadamard(float *x, int32_t size) {
    for (int32_t half = 1; half < size; half *= 2)
        for (int32_t first = 0; first < size; first += 2 * half)
            for (int32_t i = first; i < first + half; i++) {
                float low = x[i], high = x[i + half];
                x[i] = low + high;
                x[i + half] = low - high;
            }
    float scale = 1.0f / sqrtf((float)size);
    for (int32_t i = 0; i < size; i++) x[i] *= scale;
}

/* y block j = sum over i of O[j, i] (or O[i, j]) * x block i, then H. */
static void mix(const Rotation *r, const float *x, float *y, int is_inverse) {
    int32_t odd = r->size / r->block;
    memset(y, 0, (size_t)r->size * sizeof(float));
    for (int32_t j = 0; j < odd; j++) {
        float *to = y + (size_t)j * r->block;
        for (int32_t i = 0; i < odd; i++) {
            float weight = r->mixing[is_inverse ? i * odd + j : j * odd + i];
            const float *from = x + (size_t)i * r->block;
            for (int32_t k = 0; k < r->block; k++) to[k] += weight * from[k];
        }
        hadamard(to, r->block);
    }
}

static void rotate_row(void *context, int32_t row) {
    const Rotate *job = context;
    const Rotation *r = job->rotation;
    float *x = job->rows + (size_t)row * r->size, signed_x[r->size];
    for (int32_t i = 0; i < r->size; i++) signed_x[i] = x[i] * r->signs[i];
    mix(r, signed_x, x, 0);
}

static void unrotate_row(void *context, int32_t row) {
    const Rotate *job = context;
    const Rotation *r = job->rotation;
    float *x = job->rows + (size_t)row * r->size, mixed[r->size];
    mix(r, x, mixed, 1);
    for (int32_t i = 0; i < r->size; i++) x[i] = mixed[i] * r->signs[i];
}

void rotate_rows(Pool *pool, const Rotation *rotation, float *rows, int32_t num_rows) {
    Rotate job = {rotation, rows};
    parallel_for(pool, rotate_row, &job, num_rows);
}

void unrotate_rows(Pool *pool, const Rotation *rotation, float *rows, int32_t num_rows) {
    Rotate job = {rotation, rows};
    parallel_for(pool, unrotate_row, &job, num_rows);
}
