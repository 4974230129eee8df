/* Weight matrices into the layouts that matmul.c reads, quantised on the way.
 *
 *   float32  [panels][cols][16 rows]
 *   int8     [panels][padded cols / 4][16 rows][4 cols]   one signed byte each (see STORED)
 *   int4     [panels][groups][4][16 rows][4 cols]         two codes a byte: column c low, c + 16 high
 *
 * Rows that pad the last panel and columns that pad the last group are zero. Scales are float16,
 * [panels][groups][16], in units of `factor`. A group is quantised by the scale as it is stored.
 */
#include <math.h>
#include <string.h>

#include "native.h"
#include "simd.h"

#if LANES == 16
#define STORED(code) ((uint8_t)((code) + 128)) /* VNNI multiplies unsigned by signed */
#else
#define STORED(code) ((uint8_t)(code))
#endif

typedef struct {
    const Matrix *matrix; /* its buffers are written */
    const float *values;  /* [rows, cols] */
    const uint8_t *blocks;
    const int32_t *source_rows; /* where in the file a row lies, or none */
    int32_t block_type, row_bytes;
} Pack;

INLINE void put_int8(const Matrix *m, int32_t row, int32_t group, const int8_t *codes) {
    uint8_t *to = (uint8_t *)m->weights + (size_t)(row / PANEL) * m->padded_cols * PANEL;
    for (int32_t i = 0; i < m->group; i++) {
        int32_t column = group * m->group + i;
        to[(size_t)(column / 4) * 64 + row % PANEL * 4 + column % 4] = STORED(codes[i]);
    }
}

INLINE void put_int4(const Matrix *m, int32_t row, int32_t group, const uint8_t *codes) {
    size_t groups = (size_t)m->padded_cols / INT4_GROUP;
    uint8_t *to = (uint8_t *)m->weights + ((size_t)(row / PANEL) * groups + group) * 256;
    for (int32_t i = 0; i < 16; i++)
        to[i / 4 * 64 + row % PANEL * 4 + i % 4] = (uint8_t)(codes[i] | codes[i + 16] << 4);
}

INLINE size_t scale_place(const Matrix *m, int32_t row, int32_t group) {
    size_t groups = (size_t)m->padded_cols / m->group;
    return ((size_t)(row / PANEL) * groups + group) * PANEL + row % PANEL;
}

INLINE int32_t rounded(float x, int32_t least, int32_t most) {
    int32_t code = (int32_t)lrintf(x);
    return code < least ? least : code > most ? most : code;
}

static void group_to_int8(const Matrix *m, int32_t row, int32_t group, const float *x,
                          int32_t size) {
    int8_t codes[m->group];
    float most = 0;
    for (int32_t i = 0; i < size; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    uint16_t half = float_to_half(most / 127.0f / m->factor);
    float scale = half_to_float(half) * m->factor;
    memset(codes, 0, sizeof codes);
    for (int32_t i = 0; i < size && scale > 0; i++)
        codes[i] = (int8_t)rounded(x[i] / scale, -127, 127);
    ((uint16_t *)m->scales)[scale_place(m, row, group)] = half;
    put_int8(m, row, group, codes);
}

/* Squared error of a group with codes over low ... low + 15 * step; writes the codes. */
static float try_int4(const float *x, int32_t size, float low, float step, uint8_t *codes) {
    float error = 0;
    for (int32_t i = 0; i < size; i++) {
        int32_t code = step > 0 ? rounded((x[i] - low) / step, 0, 15) : 0;
        float off = x[i] - (low + step * (float)code);
        codes[i] = (uint8_t)code;
        error += off * off;
    }
    return error;
}

/* A group's range is drawn in a little where that brings the many nearer than it moves the few. */
static void group_to_int4(const Matrix *m, int32_t row, int32_t group, const float *x,
                          int32_t size) {
    uint8_t codes[INT4_GROUP] = {0}, best[INT4_GROUP] = {0};
    float low = 0, high = 0, least_error = INFINITY;
    uint16_t best_scale = 0, best_minimum = 0;
    for (int32_t i = 0; i < size; i++) {
        low = i == 0 || x[i] < low ? x[i] : low;
        high = i == 0 || x[i] > high ? x[i] : high;
    }
    float middle = 0.5f * (low + high), reach = 0.5f * (high - low);
    for (int32_t trial = 0; trial < 8; trial++) {
        float half_width = reach * (1.0f - 0.04f * (float)trial);
        uint16_t scale = float_to_half(half_width * 2.0f / 15.0f / m->factor);
        uint16_t minimum = float_to_half((middle - half_width) / m->factor);
        float error = try_int4(x, size, half_to_float(minimum) * m->factor,
                               half_to_float(scale) * m->factor, codes);
        if (error < least_error) {
            least_error = error;
            best_scale = scale, best_minimum = minimum;
            memcpy(best, codes, sizeof best);
        }
    }
    ((uint16_t *)m->scales)[scale_place(m, row, group)] = best_scale;
    ((uint16_t *)m->minima)[scale_place(m, row, group)] = best_minimum;
    put_int4(m, row, group, best);
}

static void pack_values_row(void *context, int32_t row) {
    const Pack *job = context;
    const Matrix *m = job->matrix;
    const float *x = job->values + (size_t)row * m->cols;
    if (m->kind == WEIGHTS_FLOAT32) {
        float *to = (float *)m->weights + (size_t)(row / PANEL) * m->cols * PANEL + row % PANEL;
        for (int32_t i = 0; i < m->cols; i++) to[(size_t)i * PANEL] = x[i];
        return;
    }
    for (int32_t first = 0; first < m->padded_cols; first += m->group) {
        int32_t left = m->cols - first, size = left < m->group ? (left > 0 ? left : 0) : m->group;
        if (m->kind == WEIGHTS_INT8) group_to_int8(m, row, first / m->group, x + first, size);
        else group_to_int4(m, row, first / m->group, x + first, size);
    }
}

/* GGUF's blocks. The layouts are described in model/weights/dequantize.py, the reference. */

enum { BLOCKS_Q8_0, BLOCKS_Q4_0, BLOCKS_Q4_1, BLOCKS_Q4_K };

INLINE uint16_t half_at(const uint8_t *bytes) { uint16_t h; memcpy(&h, bytes, 2); return h; }

/* Codes of a group of 32 from 16 bytes: element i low, element i + 16 high. */
INLINE void split_nibbles(const uint8_t *bytes, uint8_t *codes) {
    for (int32_t i = 0; i < 16; i++) codes[i] = bytes[i] & 15, codes[i + 16] = bytes[i] >> 4;
}

static void q4_k_group(const uint8_t *block, int32_t part, uint8_t *codes, uint16_t *scale,
                       uint16_t *minimum) {
    const uint8_t *packed = block + 4, *bytes = block + 16 + part / 2 * 32;
    int32_t s, m;
    if (part < 4) s = packed[part] & 63, m = packed[part + 4] & 63;
    else {
        s = (packed[part + 4] & 15) | packed[part - 4] >> 6 << 4;
        m = packed[part + 4] >> 4 | packed[part] >> 6 << 4;
    }
    *scale = float_to_half(half_to_float(half_at(block)) * (float)s);
    *minimum = float_to_half(-half_to_float(half_at(block + 2)) * (float)m);
    for (int32_t i = 0; i < 32; i++) codes[i] = part % 2 ? bytes[i] >> 4 : bytes[i] & 15;
}

static void pack_blocks_row(void *context, int32_t row) {
    const Pack *job = context;
    const Matrix *m = job->matrix;
    int32_t source = job->source_rows ? job->source_rows[row] : row;
    const uint8_t *from = job->blocks + (size_t)source * job->row_bytes;
    for (int32_t group = 0; group < m->cols / 32; group++) {
        uint8_t codes[32];
        uint16_t *scale = (uint16_t *)m->scales + scale_place(m, row, group);
        uint16_t *minimum = (uint16_t *)m->minima + scale_place(m, row, group);
        switch (job->block_type) {
            case BLOCKS_Q8_0:
                *scale = half_at(from + group * 34);
                put_int8(m, row, group, (const int8_t *)from + group * 34 + 2);
                continue;
            case BLOCKS_Q4_0:
                *scale = half_at(from + group * 18);
                *minimum = float_to_half(-8.0f * half_to_float(*scale));
                split_nibbles(from + group * 18 + 2, codes);
                break;
            case BLOCKS_Q4_1:
                *scale = half_at(from + group * 20);
                *minimum = half_at(from + group * 20 + 2);
                split_nibbles(from + group * 20 + 4, codes);
                break;
            default:
                q4_k_group(from + (size_t)(group / 8) * 144, group % 8, codes, scale, minimum);
        }
        put_int4(m, row, group, codes);
    }
}

/* Fill a matrix from float32 values [rows, cols]; its buffers come zeroed. */
void pack_values(Pool *pool, const Matrix *matrix, const float *values) {
    Pack job = {.matrix = matrix, .values = values};
    parallel_for(pool, pack_values_row, &job, matrix->rows);
}

/* Fill a matrix from GGUF blocks, bit for bit but for the scales of Q4_K, which are products. */
void pack_blocks(Pool *pool, const Matrix *matrix, int32_t block_type, const uint8_t *blocks,
                 int32_t row_bytes, const int32_t *source_rows) {
    Pack job = {.matrix = matrix, .blocks = blocks, .source_rows = source_rows,
                .block_type = block_type, .row_bytes = row_bytes};
    parallel_for(pool, pack_blocks_row, &job, matrix->rows);
}

/* Write row `row` of a matrix as float32 values [cols]. */
void unpack_row(const Matrix *m, int32_t row, float *to) {
    size_t panel = (size_t)(row / PANEL), lane = (size_t)row % PANEL;
    for (int32_t column = 0; column < m->cols; column++) {
        if (m->kind == WEIGHTS_FLOAT32) {
            to[column] = ((const float *)m->weights)[(panel * m->cols + column) * PANEL + lane];
            continue;
        }
        int32_t group = column / m->group, within = column % m->group;
        float scale = half_to_float(m->scales[scale_place(m, row, group)]) * m->factor;
        const uint8_t *weights = m->weights;
        if (m->kind == WEIGHTS_INT8) {
            size_t at = panel * m->padded_cols * PANEL + (size_t)(column / 4) * 64 + lane * 4;
            to[column] = scale * (float)(int8_t)STORED(weights[at + column % 4]);
        } else {
            size_t at = (panel * (m->padded_cols / INT4_GROUP) + group) * 256;
            uint8_t both = weights[at + within % 16 / 4 * 64 + lane * 4 + within % 4];
            float minimum = half_to_float(m->minima[scale_place(m, row, group)]) * m->factor;
            to[column] = minimum + scale * (float)(within < 16 ? both & 15 : both >> 4);
        }
    }
}
