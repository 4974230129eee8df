/* Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467), and the residual sum. */
#include <math.h>

#include "native.h"

typedef struct {
    const float *from, *weight;
    float *to;
    float eps;
    int32_t size;
} Norm;

static void norm_row(void *context, int32_t row) {
    const Norm *job = context;
    const float *x = job->from + (size_t)row * job->size;
    float *y = job->to + (size_t)row * job->size;
    float part[16] = {0}, total = 0;
    int32_t i = 0;
    for (; i + 16 <= job->size; i += 16)
        for (int j = 0; j < 16; j++) part[j] += x[i + j] * x[i + j];
    for (; i < job->size; i++) total += x[i] * x[i];
    for (int j = 0; j < 16; j++) total += part[j];
    float inverse = 1.0f / sqrtf(total / (float)job->size + job->eps);
    if (job->weight)
        for (i = 0; i < job->size; i++) y[i] = x[i] * inverse * job->weight[i];
    else
        for (i = 0; i < job->size; i++) y[i] = x[i] * inverse;
}

void rms_norm(Pool *pool, const float *from, const float *weight, float eps, float *to,
              int32_t size, int32_t num_rows) {
    Norm job = {from, weight, to, eps, size};
    parallel_for(pool, norm_row, &job, num_rows);
}

typedef struct {
    float *to;
    const float *from;
    int64_t size;
} Sum;

#define SUM_CHUNK 16384

static void add_chunk(void *context, int32_t chunk) {
    const Sum *job = context;
    int64_t begin = (int64_t)chunk * SUM_CHUNK;
    int64_t end = begin + SUM_CHUNK < job->size ? begin + SUM_CHUNK : job->size;
    float *restrict to = job->to;
    const float *restrict from = job->from;
    for (int64_t i = begin; i < end; i++) to[i] += from[i];
}

void add_rows(Pool *pool, float *to, const float *from, int64_t size) {
    Sum job = {to, from, size};
    parallel_for(pool, add_chunk, &job, (int32_t)((size + SUM_CHUNK - 1) / SUM_CHUNK));
}
