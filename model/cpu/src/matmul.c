/* Rows of activations times weight matrices.
 *
 * A task is a run of panels of 16 outputs: its weights are read once and stay in the core's cache
 * while all rows pass, a few at a time. A row's own sums are taken over columns in rising order,
 * group after group, whatever rows it is computed with: the tile functions differ in the number
 * of rows only.
 */
#include "dot.h"

#define TASK_BYTES 131072 /* of weights: those of the first panels are not fetched ahead */
#define MIN_TASKS 8       /* of a large matrix, so that threads end together */
#define MAX_PARTS 3

#if LANES == 16
#define TILE_ROWS MAX_TILE_ROWS
#else
#define TILE_ROWS 4
#endif

typedef struct {
    const Rows *rows;
    int32_t num_rows, stride;
    const Matrix *const *parts;
    int32_t panels_per_task[MAX_PARTS], first_task[MAX_PARTS + 1], first_column[MAX_PARTS];
    float *out;
} Product;

/* Write sums [PANEL] of a row, scaled and biased; the last panel may be cut short. */
INLINE void finish(const Matrix *m, int32_t panel, const vf *sum, float factor, float *out) {
    int32_t first = panel * PANEL, width = m->rows - first < PANEL ? m->rows - first : PANEL;
    if (width == PANEL && !m->bias) {
        for (int v = 0; v < VECTORS; v++) store(out + v * LANES, sum[v] * broadcast(factor));
        return;
    }
    float row[PANEL];
    for (int v = 0; v < VECTORS; v++) store(row + v * LANES, sum[v] * broadcast(factor));
    if (m->bias)
        for (int n = 0; n < width; n++) row[n] += m->bias[first + n];
    memcpy(out, row, (size_t)width * sizeof(float));
}

INLINE void integer_tile(const Matrix *m, const Rows *rows, int32_t first, const int R,
                         int32_t panel, const int P, float *out, int32_t stride,
                         int32_t fetched, int32_t num_fetched, const int is_int4) {
    int32_t groups = m->padded_cols / m->group;
    size_t group_bytes = (size_t)m->group * PANEL / (is_int4 ? 2 : 1);
    size_t panel_bytes = groups * group_bytes, panel_scales = (size_t)groups * PANEL;
    const uint8_t *weights = (const uint8_t *)m->weights + panel * panel_bytes;
    const uint8_t *next = (const uint8_t *)m->weights + fetched * panel_bytes;
    Ahead ahead = {num_fetched > 0 ? next : NULL, num_fetched > 1 ? next + panel_bytes : NULL};
    const uint16_t *scales = m->scales + panel * panel_scales;
    const uint16_t *minima = m->minima + (is_int4 ? panel * panel_scales : 0);
    const int8_t *codes = rows->codes + (size_t)first * m->padded_cols;
    const float *row_scales = rows->scales + (size_t)first * groups;
    const int32_t *row_sums = rows->sums + (size_t)first * groups;
    vf sum[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) sum[r][v] = (vf){0};
    for (int32_t g = 0; g < groups; g++) {
        vi dot[TILE_ROWS][TILE_VECTORS];
        const uint8_t *w = weights + g * group_bytes;
        const int8_t *a = codes + (size_t)g * m->group;
        if (is_int4) dot_int4(R, P, w, panel_bytes, a, m->padded_cols, ahead, dot);
        else dot_int8(R, P, w, panel_bytes, a, m->padded_cols, row_sums + g, groups, m->group / 4,
                      ahead, dot);
        if (ahead.first) ahead.first += group_bytes;
        if (ahead.second) ahead.second += group_bytes;
        for (int v = 0; v < P * VECTORS; v++) {
            size_t at = v / VECTORS * panel_scales + (size_t)g * PANEL + v % VECTORS * LANES;
            vf scale = load_half(scales + at);
            vf minimum = is_int4 ? load_half(minima + at) : (vf){0};
            for (int r = 0; r < R; r++) {
                float row_scale = row_scales[(size_t)r * groups + g];
                vf value = __builtin_convertvector(dot[r][v], vf);
                sum[r][v] = fma_(value, scale * broadcast(row_scale), sum[r][v]);
                if (is_int4) {
                    float total = row_scale * (float)row_sums[(size_t)r * groups + g];
                    sum[r][v] = fma_(minimum, broadcast(total), sum[r][v]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            finish(m, panel + p, sum[r] + p * VECTORS, m->factor,
                   out + (size_t)r * stride + p * PANEL);
}

INLINE void float_tile(const Matrix *m, const Rows *rows, int32_t first, const int R,
                       int32_t panel, const int P, float *out, int32_t stride) {
    size_t panel_floats = (size_t)m->cols * PANEL;
    const float *weights = (const float *)m->weights + panel * panel_floats;
    const float *x = rows->floats + (size_t)first * rows->stride;
    vf sum[TILE_ROWS][TILE_VECTORS];
    memset(sum, 0, sizeof sum);
    for (int32_t k = 0; k < m->cols; k++) {
        vf w[TILE_VECTORS];
        for (int v = 0; v < P * VECTORS; v++)
            w[v] = load(weights + v / VECTORS * panel_floats + (size_t)k * PANEL +
                        v % VECTORS * LANES);
        for (int r = 0; r < R; r++) {
            vf a = broadcast(x[(size_t)r * rows->stride + k]);
            for (int v = 0; v < P * VECTORS; v++) sum[r][v] = fma_(a, w[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            finish(m, panel + p, sum[r] + p * VECTORS, 1.0f, out + (size_t)r * stride + p * PANEL);
}

INLINE void tile(const Matrix *m, const Rows *rows, int32_t first, const int R, int32_t panel,
                 const int P, float *out, int32_t stride, int32_t fetched, int32_t num_fetched) {
    if (m->kind == WEIGHTS_INT8)
        integer_tile(m, rows, first, R, panel, P, out, stride, fetched, num_fetched, 0);
    else if (m->kind == WEIGHTS_INT4)
        integer_tile(m, rows, first, R, panel, P, out, stride, fetched, num_fetched, 1);
    else float_tile(m, rows, first, R, panel, P, out, stride);
}

/* Take the rows some at a time, as evenly as it goes: a tile of two rows is no faster than of four.
 * The next panels' weights are on their way meanwhile: all of them, or one while each of the first
 * P tiles is computed. */
INLINE void multiply_panels(const Matrix *m, const Rows *rows, int32_t num_rows, int32_t panel,
                            const int P, float *out, int32_t stride, int32_t end) {
    int32_t first = 0, num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int32_t index = 0; index < num_tiles; index++) {
        int32_t left = num_tiles - index, count = (num_rows - first + left - 1) / left;
        int32_t next = panel + P + index, ahead = num_tiles == 1 ? P : index < P;
        if (ahead > end - next) ahead = end > next ? end - next : 0;
        float *to = out + (size_t)first * stride;
        switch (count) {
            case 1: tile(m, rows, first, 1, panel, P, to, stride, next, ahead); break;
            case 2: tile(m, rows, first, 2, panel, P, to, stride, next, ahead); break;
            case 3: tile(m, rows, first, 3, panel, P, to, stride, next, ahead); break;
            case 4: tile(m, rows, first, 4, panel, P, to, stride, next, ahead); break;
#if TILE_ROWS == 6
            case 5: tile(m, rows, first, 5, panel, P, to, stride, next, ahead); break;
            case 6: tile(m, rows, first, 6, panel, P, to, stride, next, ahead); break;
#endif
        }
        first += count;
    }
}

static void run_task(void *context, int32_t task) {
    const Product *job = context;
    int32_t part = 0;
    while (task >= job->first_task[part + 1]) part++;
    const Matrix *m = job->parts[part];
    int32_t panels = (m->rows + PANEL - 1) / PANEL, width = job->panels_per_task[part];
    int32_t panel = (task - job->first_task[part]) * width;
    int32_t end = panel + width < panels ? panel + width : panels;
    float *out = job->out + job->first_column[part];
    for (; panel + TILE_PANELS <= end; panel += TILE_PANELS)
        multiply_panels(m, job->rows, job->num_rows, panel, TILE_PANELS,
                        out + (size_t)panel * PANEL, job->stride, end);
    if (panel < end)
        multiply_panels(m, job->rows, job->num_rows, panel, 1, out + (size_t)panel * PANEL,
                        job->stride, end);
}

void matmul(Pool *pool, const Rows *rows, int32_t num_rows, const Matrix *const *parts,
            int32_t num_parts, float *out, int32_t stride) {
    static const int32_t bits[] = {32, 8, 4};
    Product job = {.rows = rows, .num_rows = num_rows, .stride = stride, .parts = parts,
                   .out = out};
    int32_t column = 0;
    for (int32_t p = 0; p < num_parts; p++) {
        const Matrix *m = parts[p];
        int64_t panel_bytes = (int64_t)m->padded_cols * PANEL * bits[m->kind] / 8;
        int32_t panels = (m->rows + PANEL - 1) / PANEL;
        int32_t width = (int32_t)((TASK_BYTES + panel_bytes - 1) / panel_bytes);
        if (width > (panels + MIN_TASKS - 1) / MIN_TASKS) width = (panels + MIN_TASKS - 1) / MIN_TASKS;
        if (pool_size(pool) == 1) width = panels; /* who is alone can fetch all of it ahead */
        width = (width + TILE_PANELS - 1) / TILE_PANELS * TILE_PANELS;
        job.panels_per_task[p] = width;
        job.first_task[p + 1] = job.first_task[p] + (panels + width - 1) / width;
        job.first_column[p] = column;
        column += m->rows;
    }
    parallel_for(pool, run_task, &job, job.first_task[num_parts]);
}
