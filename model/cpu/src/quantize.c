/* Activations to int8, each row by itself: code = round(x / scale), scale = max |x| / 127 a group. */
#include <math.h>
#include <string.h>

#include "native.h"

typedef struct {
    Rows *rows;
    const float *from;
    int32_t stride, cols;
} Quantize;

/* Largest magnitude of a group; `check` becomes 0, or NaN if anything is not finite (a maximum would
 * pass NaN over, a sum of products with 0 does not). */
static float largest_magnitude(const float *x, int32_t size, float *check) {
    float part[16] = {0}, zero[16] = {0};
    int32_t i = 0;
    for (; i + 16 <= size; i += 16)
        for (int j = 0; j < 16; j++) {
            float a = fabsf(x[i + j]);
            part[j] = a > part[j] ? a : part[j];
            zero[j] += x[i + j] * 0.0f;
        }
    float most = 0, total = 0;
    for (; i < size; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        total += x[i] * 0.0f;
    }
    for (int j = 0; j < 16; j++) {
        most = part[j] > most ? part[j] : most;
        total += zero[j];
    }
    *check = total;
    return most;
}

/* A group of a row; a group that is not finite gets a scale that is not, and stays the row's own. */
static void quantize_group(const float *x, int32_t size, int32_t padded, int8_t *codes,
                           float *scale, int32_t *sum) {
    float check, most = largest_magnitude(x, size, &check);
    *scale = most / 127.0f + check;
    float inverse = most > 1e-30f && check == 0 ? 127.0f / most : 0.0f;
    int32_t total = 0;
    const float magic = 12582912.0f; /* adding 1.5 * 2^23 rounds to the nearest, ties to even */
    for (int32_t i = 0; i < size; i++) {
        float shifted = x[i] * inverse + magic;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        int32_t code = inverse == 0 ? 0 : bits - 0x4b400000;
        codes[i] = (int8_t)code;
        total += code;
    }
    memset(codes + size, 0, (size_t)(padded - size));
    *sum = total;
}

/* Codes of one vector; returns their scale. */
float quantize_vector(const float *from, int32_t size, int8_t *codes) {
    float scale;
    int32_t sum;
    quantize_group(from, size, size, codes, &scale, &sum);
    return scale;
}

static void quantize_row(void *context, int32_t row) {
    const Quantize *job = context;
    Rows *rows = job->rows;
    int32_t groups = rows->padded_cols / rows->group;
    const float *x = job->from + (size_t)row * job->stride;
    int8_t *codes = rows->codes + (size_t)row * rows->padded_cols;
    for (int32_t g = 0; g < groups; g++) {
        int32_t first = g * rows->group, left = job->cols - first;
        int32_t size = left < rows->group ? (left > 0 ? left : 0) : rows->group;
        quantize_group(x + first, size, rows->group, codes + first,
                       &rows->scales[(size_t)row * groups + g],
                       &rows->sums[(size_t)row * groups + g]);
    }
}

/* Fill rows [num_rows] in the form that `matrix` multiplies; its buffers are large enough. */
void quantize_rows(Pool *pool, Rows *rows, const float *from, int32_t stride, int32_t cols,
                   int32_t num_rows, const Matrix *matrix) {
    rows->floats = from;
    rows->stride = stride;
    rows->group = matrix->group;
    rows->padded_cols = matrix->padded_cols;
    if (matrix->kind == WEIGHTS_FLOAT32) return;
    Quantize job = {rows, from, stride, cols};
    parallel_for(pool, quantize_row, &job, num_rows);
}
