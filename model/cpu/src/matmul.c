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
#define SHORT_GROUP 64

#if LANES == 16
#define TILE_ROWS MAX_TILE_ROWS
#else
#define TILE_ROWS 4
#endif
#define DIRECT_ROWS (2 * TILE_ROWS) /* for which steps are unpacked on the way */
#define UNPACKED_TILES 4    /* of rows, for which it pays to unpack int4 first */
#define UNPACKED_COLS 16384 /* for which there is room on the stack */

enum { FLOATS, BYTES, NIBBLES, UNPACKED, STEPS }; /* what a tile reads */

typedef struct {
    const Rows *rows;
    int32_t num_rows, stride;
    const Matrix *const *parts;
    int32_t panels_per_task[MAX_PARTS], first_task[MAX_PARTS + 1], first_column[MAX_PARTS];
    float *out;
} Product;

/* What the tiles of a run of panels have in common. */
typedef struct {
    const Matrix *matrix;
    const Rows *rows;
    int32_t panel, num_tiles, num_ahead; /* panels behind the run that are wanted next */
    int32_t stride;
    const uint8_t *unpacked; /* two weights a byte as bytes, or none */
    float *out;
} Panels;

/* The bytes of a panel's weights as they lie in memory. */
static size_t panel_size(const Matrix *m) {
    static const size_t bits[] = {32, 8, 4, 4};
    return (size_t)m->padded_cols * PANEL * bits[m->kind] / 8;
}

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

/* A tile's share of the weights behind the run, over `steps` steps. */
INLINE Ahead share_of(const Panels *panels, int32_t index, const int P, int32_t steps) {
    size_t panel_bytes = panel_size(panels->matrix), next = (panels->panel + P) * panel_bytes;
    size_t share = panels->num_ahead * panel_bytes / panels->num_tiles, fetches = (size_t)steps * P;
    const uint8_t *weights = panels->matrix->weights;
    if (!share) return (Ahead){weights, 0};
    return (Ahead){weights + next + index * share, (share + fetches - 1) / fetches};
}

/* Dot products of R rows, from `first` on, with P panels over group g. */
INLINE void dot_group(const Panels *panels, int32_t first, const int R, const int P, int32_t g,
                      const int form, Ahead *ahead, vi dot[][TILE_VECTORS]) {
    const Matrix *m = panels->matrix;
    int32_t cols = m->padded_cols, groups = cols / m->group;
    size_t panel_bytes = (size_t)cols * PANEL, group_bytes = (size_t)m->group * PANEL;
    const uint8_t *packed = (const uint8_t *)m->weights + panels->panel * panel_size(m);
    const uint8_t *bytes = panels->unpacked ? panels->unpacked : packed;
    const int8_t *codes = panels->rows->codes + (size_t)first * cols + (size_t)g * m->group;
    const int32_t *offsets = panels->rows->offsets + (size_t)first * groups + g;
    if (form == NIBBLES)
        dot_int4(R, P, packed + g * (group_bytes / 2), panel_bytes / 2, codes, cols, ahead, dot);
    else if (form == UNPACKED)
        dot_bytes(R, P, bytes + g * group_bytes, panel_bytes, codes, cols, NULL, 0, 8, ahead, dot);
#if TILE_PANELS > 1
    else if (form == STEPS) {
        size_t group_steps = (size_t)m->group / INT4_GROUP * PANEL, panel_steps = groups * group_steps;
        dot_steps(R, P, packed + g * (group_bytes / 2), panel_bytes / 2,
                  m->steps + panels->panel * panel_steps + g * group_steps, panel_steps, codes, cols,
                  offsets, groups, m->group / INT4_GROUP, ahead, dot);
    }
#endif
    else
        dot_bytes(R, P, bytes + g * group_bytes, panel_bytes, codes, cols, offsets, groups,
                  m->group / 4, ahead, dot);
}

INLINE void integer_tile(const Panels *panels, int32_t index, int32_t first, const int R,
                         const int P, const int form) {
    const int is_int4 = form == NIBBLES || form == UNPACKED;
    const int columns_a_step = form == NIBBLES || form == STEPS ? 8 : 4;
    const Matrix *m = panels->matrix;
    const Rows *rows = panels->rows;
    int32_t groups = m->padded_cols / m->group;
    size_t panel_scales = (size_t)groups * PANEL;
    Ahead ahead = share_of(panels, index, P, m->padded_cols / columns_a_step);
    const uint16_t *scales = m->scales + panels->panel * panel_scales;
    const uint16_t *minima = m->minima + (is_int4 ? panels->panel * panel_scales : 0);
    const float *row_scales = rows->scales + (size_t)first * groups;
    const float *row_totals = rows->totals + (size_t)first * groups;
    vf sum[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < P * VECTORS; v++) sum[r][v] = (vf){0};
    for (int32_t g = 0; g < groups; g++) {
        vi dot[TILE_ROWS][TILE_VECTORS];
        dot_group(panels, first, R, P, g, form, &ahead, dot);
        for (int v = 0; v < P * VECTORS; v++) {
            size_t at = v / VECTORS * panel_scales + (size_t)g * PANEL + v % VECTORS * LANES;
            vf scale = load_half(scales + at);
            vf minimum = is_int4 ? load_half(minima + at) : (vf){0};
            for (int r = 0; r < R; r++) {
                size_t place = (size_t)r * groups + g;
                vf value = __builtin_convertvector(dot[r][v], vf);
                sum[r][v] = fma_(value, scale * broadcast(row_scales[place]), sum[r][v]);
                if (is_int4) sum[r][v] = fma_(minimum, broadcast(row_totals[place]), sum[r][v]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            finish(m, panels->panel + p, sum[r] + p * VECTORS, m->factor,
                   panels->out + (size_t)(first + r) * panels->stride + p * PANEL);
}

INLINE void float_tile(const Panels *panels, int32_t first, const int R, const int P) {
    const Matrix *m = panels->matrix;
    const Rows *rows = panels->rows;
    size_t panel_floats = (size_t)m->cols * PANEL;
    const float *weights = (const float *)m->weights + panels->panel * panel_floats;
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
            finish(m, panels->panel + p, sum[r] + p * VECTORS, 1.0f,
                   panels->out + (size_t)(first + r) * panels->stride + p * PANEL);
}

INLINE void tile(const Panels *panels, int32_t index, int32_t first, const int R, const int P,
                 const int form) {
    if (form == UNPACKED && R < 4) return; /* there are none: see UNPACKED_TILES */
    if (form == FLOATS) float_tile(panels, first, R, P);
    else integer_tile(panels, index, first, R, P, form);
}

/* Take the rows some at a time, as evenly as it goes: a tile of two rows is no faster than of four. */
INLINE void multiply_rows(const Panels *panels, int32_t num_rows, const int P, const int form) {
    int32_t first = 0;
    for (int32_t index = 0; index < panels->num_tiles; index++) {
        int32_t left = panels->num_tiles - index, count = (num_rows - first + left - 1) / left;
        switch (count) {
            case 1: tile(panels, index, first, 1, P, form); break;
            case 2: tile(panels, index, first, 2, P, form); break;
            case 3: tile(panels, index, first, 3, P, form); break;
            case 4: tile(panels, index, first, 4, P, form); break;
#if TILE_ROWS == 6
            case 5: tile(panels, index, first, 5, P, form); break;
            case 6: tile(panels, index, first, 6, P, form); break;
#endif
        }
        first += count;
    }
}

/* Each combination that there is, once: they are much code. */
static void multiply_one(const Panels *panels, int32_t num_rows) {
    switch (panels->matrix->kind) {
        case WEIGHTS_FLOAT32: multiply_rows(panels, num_rows, 1, FLOATS); break;
        case WEIGHTS_INT4: multiply_rows(panels, num_rows, 1, NIBBLES); break;
        default: multiply_rows(panels, num_rows, 1, BYTES);
    }
}

#if TILE_PANELS > 1
static void multiply_two(const Panels *panels, int32_t num_rows) {
    switch (panels->matrix->kind) {
        case WEIGHTS_FLOAT32: multiply_rows(panels, num_rows, 2, FLOATS); break;
        case WEIGHTS_INT4: multiply_rows(panels, num_rows, 2, NIBBLES); break;
        default: multiply_rows(panels, num_rows, 2, BYTES);
    }
}

/* So few rows that steps are unpacked on the way. */
static void multiply_tile(const Panels *panels, int32_t num_rows) {
    multiply_rows(panels, num_rows, 2, STEPS);
}

static void multiply_three(const Panels *panels, int32_t num_rows) {
    multiply_rows(panels, num_rows, 3, BYTES);
}

/* Two panels of int4, unpacked once for all tiles of rows. */
static void multiply_unpacked(Panels *panels, int32_t num_rows) {
    const Matrix *m = panels->matrix;
    int32_t groups = m->padded_cols / INT4_GROUP;
    _Alignas(64) uint8_t bytes[(size_t)2 * m->padded_cols * PANEL];
    const uint8_t *from = (const uint8_t *)m->weights + panels->panel * panel_size(m);
    for (int32_t g = 0; g < 2 * groups; g++)
        unpack_int4(from + (size_t)g * 256, bytes + (size_t)g * 512);
    panels->unpacked = bytes;
    multiply_rows(panels, num_rows, 2, UNPACKED);
}
#endif

static void multiply_panels(const Panels *panels, int32_t num_rows, int32_t count) {
    (void)count;
#if TILE_PANELS > 1
    if (count == 3) multiply_three(panels, num_rows);
    else if (count == 2) multiply_two(panels, num_rows);
    else
#endif
        multiply_one(panels, num_rows);
}

/* Panels of steps, as bytes first. Where few tiles follow, what comes next is fetched meanwhile. */
static void multiply_steps(Panels *panels, int32_t num_rows, int32_t count) {
    const Matrix *m = panels->matrix;
    int32_t groups = m->padded_cols / INT4_GROUP, is_fetched = panels->num_tiles < UNPACKED_TILES;
    _Alignas(64) uint8_t bytes[(size_t)count * m->padded_cols * PANEL];
    const uint8_t *from = (const uint8_t *)m->weights + panels->panel * panel_size(m);
    const uint16_t *steps = m->steps + (size_t)panels->panel * groups * PANEL;
    size_t ahead = is_fetched ? panels->num_ahead * panel_size(m) : 0;
    for (int32_t g = 0; g < count * groups; g++) {
        const uint8_t *weights = from + (size_t)g * 256;
        for (int32_t line = 0; line < 256; line += 64) __builtin_prefetch(weights + ahead + line);
        unpack_steps(weights, steps + (size_t)g * PANEL, bytes + (size_t)g * 512);
    }
    panels->unpacked = bytes;
    if (is_fetched) panels->num_ahead = 0;
    multiply_panels(panels, num_rows, count);
}

/* Panels that are computed at once: three, or two where a group is so short that what has been
 * summed up before it had better stay in registers. */
static int32_t panels_of_run(const Matrix *m, int32_t num_rows) {
    if (TILE_PANELS == 1) return 1;
    if (m->kind == WEIGHTS_STEPS && num_rows <= DIRECT_ROWS) return 2;
    if (m->kind == WEIGHTS_STEPS && m->padded_cols > UNPACKED_COLS) return 1;
    int is_integer = m->kind == WEIGHTS_INT8 || m->kind == WEIGHTS_STEPS;
    return is_integer && m->group > SHORT_GROUP ? TILE_PANELS : 2;
}

static void multiply_run(const Product *job, const Matrix *m, int32_t panel, int32_t count,
                         int32_t end, float *out) {
    int32_t num_rows = job->num_rows, behind = end - panel - count;
    Panels panels = {m, job->rows, panel, (num_rows + TILE_ROWS - 1) / TILE_ROWS,
                     behind < count ? behind : count, job->stride, NULL,
                     out + (size_t)panel * PANEL};
#if TILE_PANELS > 1
    int is_many = panels.num_tiles >= UNPACKED_TILES && m->padded_cols <= UNPACKED_COLS;
    if (m->kind == WEIGHTS_INT4 && count == 2 && is_many) {
        multiply_unpacked(&panels, num_rows);
        return;
    }
    if (m->kind == WEIGHTS_STEPS && count == 2 && num_rows <= DIRECT_ROWS) {
        multiply_tile(&panels, num_rows);
        return;
    }
#endif
    if (m->kind == WEIGHTS_STEPS) multiply_steps(&panels, num_rows, count);
    else multiply_panels(&panels, num_rows, count);
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
    for (int32_t count = panels_of_run(m, job->num_rows); panel < end; panel += count) {
        if (count > end - panel) count = 1;
        multiply_run(job, m, panel, count, end, out);
    }
}

void matmul(Pool *pool, const Rows *rows, int32_t num_rows, const Matrix *const *parts,
            int32_t num_parts, float *out, int32_t stride) {
    Product job = {.rows = rows, .num_rows = num_rows, .stride = stride, .parts = parts,
                   .out = out};
    int32_t column = 0;
    for (int32_t p = 0; p < num_parts; p++) {
        const Matrix *m = parts[p];
        int64_t panel_bytes = (int64_t)panel_size(m);
        int32_t panels = (m->rows + PANEL - 1) / PANEL;
        int32_t width = (int32_t)((TASK_BYTES + panel_bytes - 1) / panel_bytes);
        if (width > (panels + MIN_TASKS - 1) / MIN_TASKS) width = (panels + MIN_TASKS - 1) / MIN_TASKS;
        if (pool_size(pool) == 1) width = panels; /* who is alone can fetch all of it ahead */
        int32_t run = panels_of_run(m, num_rows);
        width = (width + run - 1) / run * run;
        job.panels_per_task[p] = width;
        job.first_task[p + 1] = job.first_task[p] + (panels + width - 1) / width;
        job.first_column[p] = column;
        column += m->rows;
    }
    parallel_for(pool, run_task, &job, job.first_task[num_parts]);
}
