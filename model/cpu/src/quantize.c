/* Activations to int8, each row by itself: code = round(x / scale), scale = max |x| / 127 a group. */
#include <math.h>

#include "native.h"
#include "simd.h"

typedef struct {
    Rows *rows;
    const float *from;
    int32_t stride, cols;
} Quantize;

/* A group of a row; a group that is not finite gets a scale that is not, and stays the row's own. */
INLINE void quantize_group(const float *x, int32_t size, int32_t padded, int8_t *codes,
                           float *scale, int32_t *sum) {
    vf magnitudes = {0}, zero = {0}; /* times 0 is NaN if anything is not finite; a maximum is not */
    for (int32_t i = 0; i < size; i += LANES) {
        vf a = load_some(x + i, size - i);
        magnitudes = larger(magnitude(a), magnitudes);
        zero += a * 0.0f;
    }
    vi is_finite = zero == (vf){0};
    float most = largest(magnitudes);
    int all_finite = total_of(is_finite) == -LANES;
    *scale = all_finite ? most / 127.0f : NAN;
    *sum = 0;
    memset(codes + size, 0, (size_t)(padded - size));
    if (!all_finite || most <= 1e-30f) {
        memset(codes, 0, (size_t)size);
        return;
    }
    vf inverse = broadcast(127.0f / most);
    vi total = {0};
    for (int32_t i = 0; i < size; i += LANES) {
        vi code = nearest(load_some(x + i, size - i) * inverse);
        store_bytes(codes + i, code, size - i);
        total += code;
    }
    *sum = total_of(total);
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
    int32_t groups = rows->padded_cols / rows->group, sum;
    const float *x = job->from + (size_t)row * job->stride;
    int8_t *codes = rows->codes + (size_t)row * rows->padded_cols;
    for (int32_t g = 0; g < groups; g++) {
        int32_t first = g * rows->group, left = job->cols - first;
        int32_t size = left < rows->group ? (left > 0 ? left : 0) : rows->group;
        size_t place = (size_t)row * groups + g;
        quantize_group(x + first, size, rows->group, codes + first, &rows->scales[place], &sum);
        rows->offsets[place] = -128 * sum;
        rows->totals[place] = rows->scales[place] * (float)sum;
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
