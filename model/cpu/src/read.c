/* Weights of a file into float32, scaled and rotated on the way: what pack.c quantises.
 *
 * They lie in blocks of 16 rows by 16 columns. What rotates works on 16 rows or columns at once,
 * and what quantises on 16 rows: nothing goes from lane to lane of a vector but in the turning of a
 * block. A task is a panel of 16 rows, or, where columns are rotated, a tile of 16 columns; the
 * blocks of a task lie one behind the other, so that it rotates in place and in the cache.
 */
#include <stdatomic.h>

#include "native.h"
#include "simd.h"

typedef struct {
    const Source *source;
    Blocks *blocks;
    atomic_int most; /* bits of the largest magnitude, which order as integers: NaN above all */
} Read;

INLINE vf load_weights(const Source *s, int32_t row, int32_t column, int32_t count) {
    size_t size = s->kind == SOURCE_FLOAT32 ? 4 : 2;
    const uint8_t *from = (const uint8_t *)s->values + ((size_t)row * s->cols + column) * size;
    uint8_t padded[LANES * 4];
    if (count < LANES) {
        memset(padded, 0, sizeof padded);
        from = memcpy(padded, from, (size_t)count * size);
    }
    if (s->kind == SOURCE_BFLOAT16) return load_bfloat((const uint16_t *)from);
    if (s->kind == SOURCE_FLOAT16) return load_half((const uint16_t *)from);
    return load((const float *)from);
}

/* One block as it lies in the file: [16 rows][16 columns], what the matrix lacks is 0. */
static void read_block(const Source *s, int32_t panel, int32_t tile, float *to) {
    int32_t num_rows = s->rows - panel * PANEL, num_columns = s->cols - tile * PANEL;
    for (int32_t row = 0; row < PANEL; row++)
        for (int32_t first = 0; first < PANEL; first += LANES) {
            int32_t column = tile * PANEL + first, count = num_columns - first;
            vf x = {0};
            if (row < num_rows && count > 0) {
                x = load_weights(s, panel * PANEL + row, column, count);
                if (s->columns) x *= load_some(s->columns + column, count);
            }
            store(to + row * PANEL + first, x);
        }
}

static void transpose_block(float *x) {
    for (int32_t i = 1; i < PANEL; i++)
        for (int32_t j = 0; j < i; j++) {
            float kept = x[i * PANEL + j];
            x[i * PANEL + j] = x[j * PANEL + i];
            x[j * PANEL + i] = kept;
        }
}

static void note_largest(Read *job, const float *x, int32_t num_blocks) {
    vi most = {0};
    for (size_t i = 0; i < (size_t)num_blocks * BLOCK; i += LANES) {
        vi bits = (vi)load(x + i) & 0x7fffffff, is_more = bits > most;
        most = (bits & is_more) | (most & ~is_more);
    }
    int32_t seen = atomic_load(&job->most);
    for (int32_t i = 0; i < LANES; i++)
        while (most[i] > seen && !atomic_compare_exchange_weak(&job->most, &seen, most[i])) continue;
}

static void read_panel(void *context, int32_t panel) {
    Read *job = context;
    float *x = job->blocks->values + (size_t)panel * job->blocks->panel_stride;
    for (int32_t tile = 0; tile < job->blocks->num_tiles; tile++) {
        read_block(job->source, panel, tile, x + (size_t)tile * BLOCK);
        transpose_block(x + (size_t)tile * BLOCK);
    }
    if (job->source->inputs) rotate_columns(job->source->inputs, x);
    note_largest(job, x, job->blocks->num_tiles);
}

static void read_tile(void *context, int32_t tile) {
    Read *job = context;
    float *x = job->blocks->values + (size_t)tile * job->blocks->tile_stride;
    for (int32_t panel = 0; panel < job->blocks->num_panels; panel++)
        read_block(job->source, panel, tile, x + (size_t)panel * BLOCK);
    rotate_columns(job->source->outputs, x);
    for (int32_t panel = 0; panel < job->blocks->num_panels; panel++)
        transpose_block(x + (size_t)panel * BLOCK);
    note_largest(job, x, job->blocks->num_panels);
}

/* Fill blocks, of which only the memory is given; return the largest magnitude, NaN if one is. */
float read_weights(Pool *pool, const Source *source, Blocks *blocks) {
    Read job = {.source = source, .blocks = blocks};
    int32_t panels = (source->rows + PANEL - 1) / PANEL, tiles = (source->cols + PANEL - 1) / PANEL;
    blocks->num_panels = panels, blocks->num_tiles = tiles;
    blocks->panel_stride = (size_t)BLOCK * (source->outputs ? 1 : tiles);
    blocks->tile_stride = (size_t)BLOCK * (source->outputs ? panels : 1);
    if (source->outputs) parallel_for(pool, read_tile, &job, tiles);
    else parallel_for(pool, read_panel, &job, panels);
    int32_t most = atomic_load(&job.most);
    float largest;
    memcpy(&largest, &most, sizeof largest);
    return largest;
}
