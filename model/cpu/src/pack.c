/* Weight matrices into the layouts that matmul.c reads, quantised on the way.
 *
 *   float32  [panels][cols][16 rows]
 *   int8     [panels][padded cols / 4][16 rows][4 cols]   one signed byte each (see STORED)
 *   int4     [panels][groups][4][16 rows][4 cols]         two codes a byte: column c low, c + 16 high
 *   steps    as int4; an int8 code is step * nibble + first - 128, with a step and a first for each
 *            row's 32 columns. Scales are those of int8, and so are products then: progressive
 *            groups (QServe, arXiv 2405.04532).
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
    const Blocks *values;
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

/* Columns of a group that the matrix has; the others pad it. */
INLINE int32_t group_size(const Matrix *m, int32_t group) {
    int32_t left = m->cols - group * m->group;
    return left < m->group ? left : m->group;
}

INLINE size_t scale_place(const Matrix *m, int32_t row, int32_t group) {
    size_t groups = (size_t)m->padded_cols / m->group;
    return ((size_t)(row / PANEL) * groups + group) * PANEL + row % PANEL;
}

/* Round to float16: write the halves, and leave in x what they stand for. */
INLINE void halve(vf *x, uint16_t *halves) {
    for (int32_t i = 0; i < LANES; i++) {
        halves[i] = float_to_half((*x)[i]);
        (*x)[i] = half_to_float(halves[i]);
    }
}

INLINE vf column_of(const Blocks *b, int32_t panel, int32_t lane, int32_t column) {
    size_t at = (size_t)panel * b->panel_stride + (size_t)(column / PANEL) * b->tile_stride;
    return load(b->values + at + (size_t)(column % PANEL) * PANEL + lane);
}

/* Codes of LANES rows in one column; 0 in a row whose step is 0. */
INLINE vi codes_of(vf x, vf low, vf step, float least, float most) {
    vf code = (x - low) / choose(step > 0, step, broadcast(INFINITY));
    return nearest(larger(broadcast(least), smaller(code, broadcast(most))));
}

/* The scale of a group of int8 codes in LANES rows of a panel, from row `lane` on. */
static vf int8_scale(const Matrix *m, const Blocks *b, int32_t panel, int32_t lane,
                     int32_t group) {
    vf most = {0};
    for (int32_t i = 0; i < group_size(m, group); i++)
        most = larger(magnitude(column_of(b, panel, lane, group * m->group + i)), most);
    vf scale = most / 127.0f / m->factor;
    halve(&scale, (uint16_t *)m->scales + scale_place(m, panel * PANEL + lane, group));
    return scale * m->factor;
}

static void group_to_int8(const Matrix *m, const Blocks *b, int32_t panel, int32_t lane,
                          int32_t group) {
    int32_t first = group * m->group, size = group_size(m, group);
    vf scale = int8_scale(m, b, panel, lane, group);
    uint8_t *to = (uint8_t *)m->weights + (size_t)panel * m->padded_cols * PANEL +
                  (size_t)first * PANEL + lane * 4;
    for (int32_t i = 0; i < m->group; i += 4) {
        vi word = {0};
        for (int32_t k = 0; k < 4 && i + k < size; k++) {
            vf x = column_of(b, panel, lane, first + i + k);
            word |= (codes_of(x, broadcast(0), scale, -127, 127) & 255) << 8 * k;
        }
        word ^= (int32_t)(STORED(0) * 0x01010101u);
        memcpy(to + (size_t)i * PANEL, &word, sizeof word);
    }
}

/* 32 columns in LANES rows, x in units of the int8 code, to nibbles: of the widest step that is needed
 * and some narrower ones, which cut off the ends, the one with the least squared error. */
static void columns_to_steps(const Matrix *m, const vf *x, int32_t size, int32_t panel,
                             int32_t lane, int32_t column) {
    vf low = broadcast(INFINITY), high = broadcast(-INFINITY);
    for (int32_t i = 0; i < size; i++) low = smaller(x[i], low), high = larger(x[i], high);
    vf widest = __builtin_convertvector(nearest((high - low) / 15.0f + 0.49f), vf);
    vf best_step = {0}, best_first = {0}, least = broadcast(INFINITY);
    for (int32_t trial = 0; trial < 4; trial++) {
        vf step = smaller(larger(widest - (float)trial, broadcast(1)), broadcast(17)), error = {0};
        vf first = 128.0f + 0.5f * (low + high) - 7.5f * step;
        first = smaller(larger(first, broadcast(0)), 255.0f - 15.0f * step);
        first = __builtin_convertvector(nearest(first), vf);
        for (int32_t i = 0; i < size; i++) {
            vi code = codes_of(x[i], first - 128.0f, step, 0, 15);
            vf off = x[i] - (first - 128.0f + step * __builtin_convertvector(code, vf));
            error += off * off;
        }
        vi is_better = error < least;
        least = choose(is_better, error, least);
        best_step = choose(is_better, step, best_step);
        best_first = choose(is_better, first, best_first);
    }
    size_t place = (size_t)panel * (m->padded_cols / INT4_GROUP) + column / INT4_GROUP;
    uint8_t *to = (uint8_t *)m->weights + place * 256 + lane * 4;
    uint16_t *steps = (uint16_t *)m->steps + place * PANEL + lane;
    for (int32_t j = 0; j < LANES; j++)
        steps[j] = (uint16_t)((int32_t)best_step[j] | (int32_t)best_first[j] << 8);
    for (int32_t quad = 0; quad < 4; quad++) {
        vi word = {0};
        for (int32_t k = 0; k < 8; k++) { /* nibble k of a word: column k / 2, + 16 where odd */
            int32_t i = quad * 4 + k / 2 + k % 2 * 16;
            if (i < size) word |= codes_of(x[i], best_first - 128.0f, best_step, 0, 15) << 4 * k;
        }
        memcpy(to + quad * 64, &word, sizeof word);
    }
}

static void group_to_steps(const Matrix *m, const Blocks *b, int32_t panel, int32_t lane,
                           int32_t group) {
    int32_t first = group * m->group, size = group_size(m, group);
    vf scale = int8_scale(m, b, panel, lane, group), x[INT4_GROUP];
    for (int32_t at = 0; at < m->group; at += INT4_GROUP) {
        int32_t count = size - at < INT4_GROUP ? size - at : INT4_GROUP;
        for (int32_t i = 0; i < count; i++) {
            vf value = column_of(b, panel, lane, first + at + i);
            x[i] = value / choose(scale > 0, scale, broadcast(INFINITY));
        }
        if (count > 0) columns_to_steps(m, x, count, panel, lane, first + at);
    }
}

static void pack_panel(void *context, int32_t panel) {
    const Pack *job = context;
    const Matrix *m = job->matrix;
    const Blocks *b = job->values;
    for (int32_t lane = 0; lane < PANEL; lane += LANES) {
        if (m->kind == WEIGHTS_FLOAT32) {
            float *to = (float *)m->weights + (size_t)panel * m->cols * PANEL + lane;
            for (int32_t i = 0; i < m->cols; i++)
                store(to + (size_t)i * PANEL, column_of(b, panel, lane, i));
            continue;
        }
        for (int32_t group = 0; group < m->padded_cols / m->group; group++)
            if (m->kind == WEIGHTS_INT8) group_to_int8(m, b, panel, lane, group);
            else group_to_steps(m, b, panel, lane, group);
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

/* The power of two in whose units the largest scale is near the top of float16.
 *
 * Rows of one matrix may differ by much; what is left below is for the small ones. */
static float choose_factor(int32_t kind, float largest) {
    int32_t exponent;
    if (kind == WEIGHTS_FLOAT32 || largest == 0) return 1;
    frexpf(largest, &exponent);
    exponent -= 22; /* the largest scale is that of 127 */
    return ldexpf(1, exponent < -126 ? -126 : exponent);
}

/* Fill a matrix and choose its factor; its buffers come zeroed. `work` has room for the values as
 * float32, rows and columns up to multiples of 16. Return 0 if it cannot be quantised, as some
 * weights are not finite. */
int32_t pack_weights(Pool *pool, Matrix *matrix, const Source *source, float *work) {
    Blocks blocks = {.values = work};
    float largest = read_weights(pool, source, &blocks);
    if (matrix->kind != WEIGHTS_FLOAT32 && !isfinite(largest)) return 0;
    matrix->factor = choose_factor(matrix->kind, largest);
    Pack job = {.matrix = matrix, .values = &blocks};
    parallel_for(pool, pack_panel, &job, blocks.num_panels);
    return 1;
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
        int32_t group = column / m->group;
        float scale = half_to_float(m->scales[scale_place(m, row, group)]) * m->factor;
        const uint8_t *weights = m->weights;
        if (m->kind == WEIGHTS_INT8) {
            size_t at = panel * m->padded_cols * PANEL + (size_t)(column / 4) * 64 + lane * 4;
            to[column] = scale * (float)(int8_t)STORED(weights[at + column % 4]);
            continue;
        }
        size_t place = panel * (m->padded_cols / INT4_GROUP) + column / INT4_GROUP;
        int32_t within = column % INT4_GROUP;
        uint8_t both = weights[place * 256 + within % 16 / 4 * 64 + lane * 4 + within % 4];
        int32_t code = within < 16 ? both & 15 : both >> 4;
        if (m->kind == WEIGHTS_INT4) {
            float minimum = half_to_float(m->minima[scale_place(m, row, group)]) * m->factor;
            to[column] = minimum + scale * (float)code;
        } else {
            uint16_t step = m->steps[place * PANEL + lane];
            to[column] = scale * (float)((step & 255) * code + (step >> 8) - 128);
        }
    }
}
