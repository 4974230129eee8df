/* Paged attention with an online softmax (Milakov and Gimelshein, arXiv 1805.02867).
 *
 * A task is one key/value head and a few neighbouring tokens of one sequence: all their query
 * heads that share it read each K/V tile once. Where a sequence has one token, a task is several
 * K/V heads, which lie side by side in a tile. A row (one query head of one token) takes its keys
 * in blocks of 64 from position 0 on, and its sums over them in one order; rows never mix, so that
 * chunk borders, company and threads change no bit. Keys beyond a row's position weigh exactly 0,
 * and what lies beyond the last of the task's positions is not read at all.
 */
#include <math.h>

#include "native.h"
#include "simd.h"

#define KEY_BLOCK 64 /* keys between two updates of the running maximum */
#define BLOCK_TILES (KEY_BLOCK / TILE)
#define TILE_VECTORS (TILE / LANES)
#define MAX_ROWS 32  /* of a task */
#define TOGETHER 4   /* rows that share a load of a key or value */
#define MANY_ROWS 8  /* of a head: it pays to turn its keys and values into floats first */
#define MIN_TASKS 16 /* that a step is cut into, if it has as many heads */

typedef struct {
    const Model *model;
    const Layer *layer;
    const Step *step;
    const float *qkv;
    float *out;
    Slice slice;
    int32_t tokens_per_task; /* of a sequence that has several, one head each */
    int32_t heads_per_task;  /* of one that has one */
    int32_t *first_task;     /* [S + 1] */
} Attention;

/* Where a sequence's tokens in the slice begin and end. */
static void part_of(const Attention *job, int32_t sequence, int32_t *begin, int32_t *end) {
    int32_t first = job->slice.first, last = first + job->slice.count;
    *begin = job->step->query_starts[sequence];
    *end = job->step->query_starts[sequence + 1];
    if (*begin < first) *begin = first;
    if (*end > last) *end = last;
}

/* The rows of a task, K/V head by K/V head, and where they have got to. */
typedef struct {
    int32_t num_rows, rows_each, last_position;
    size_t ahead; /* from a head's keys or values to the next head's, if there is one */
    float *out[MAX_ROWS];
    int32_t position[MAX_ROWS];
    float maximum[MAX_ROWS];
    _Alignas(64) float total[MAX_ROWS][LANES]; /* of weights, every LANES-th key */
    _Alignas(64) float query[MAX_ROWS][MAX_HEAD_DIM];
    _Alignas(64) float weights[MAX_ROWS][KEY_BLOCK];
    _Alignas(64) float sums[MAX_ROWS][MAX_HEAD_DIM];
    _Alignas(64) float block[KEY_BLOCK * MAX_HEAD_DIM]; /* keys [D, 64] or values [64, D] */
} State;

INLINE vf load_kv(const void *from, size_t at, const int kind) {
    if (kind == KV_INT8) return load_codes((const int8_t *)from + at);
    return kind == KV_FLOAT16 ? load_half((const uint16_t *)from + at) : load((const float *)from + at);
}

INLINE size_t size_of(const int kind) { return kind == KV_INT8 ? 1 : kind == KV_FLOAT16 ? 2 : 4; }

/* Have what the next head wants fetched while this one is computed, line by line: all at once would
 * have the core wait. `place`, counted from any line's beginning, says whether one begins. Floats are
 * not fetched, as a block of them is mostly one that has been widened. */
INLINE void fetch_kv(const State *s, const void *from, size_t at, size_t place, const int kind) {
    if (kind != KV_FLOAT32 && place * size_of(kind) % 64 == 0)
        __builtin_prefetch((const char *)from + (at + s->ahead) * size_of(kind));
}

/* The scales of LANES tokens, from token j on, of the tile whose codes begin at `at`. */
INLINE vf load_kv_scales(const void *from, size_t at, int32_t dim, int j) {
    vf scales;
    memcpy(&scales, (const int8_t *)from + at + (size_t)dim * TILE + j * SCALE_BYTES, sizeof scales);
    return scales;
}

/* weights[r][...] = query[r] * keys, for N tiles that follow each other in the block */
INLINE void score(State *s, int32_t row, const int R, const void *keys, const size_t *at,
                  const int N, int32_t dim, int32_t offset, float scale, const int kind) {
    vf sum[TOGETHER][BLOCK_TILES][TILE_VECTORS];
    memset(sum, 0, sizeof sum);
    for (int32_t i = 0; i < dim; i++)
        for (int n = 0; n < N; n++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                size_t place = (size_t)i * TILE + v * LANES;
                fetch_kv(s, keys, at[n] + place, place, kind);
                vf key = load_kv(keys, at[n] + place, kind);
                for (int r = 0; r < R; r++)
                    sum[r][n][v] = fma_(broadcast(s->query[row + r][i]), key, sum[r][n][v]);
            }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                float *to = &s->weights[row + r][offset + n * TILE + v * LANES];
                store(to, sum[r][n][v] * broadcast(scale));
            }
}

/* The same with a whole block of keys that are floats already. */
INLINE void score_floats(State *s, int32_t row, const int R, int32_t dim, float scale) {
    enum { N = KEY_BLOCK / LANES };
    const int width = LANES == 16 ? N : 2; /* of sums: no more than there are registers for */
    for (int first = 0; first < N; first += width) {
        vf sum[TOGETHER][N];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < width; v++) sum[r][v] = (vf){0};
        for (int32_t i = 0; i < dim; i++)
            for (int v = 0; v < width; v++) {
                vf key = load(s->block + (size_t)i * KEY_BLOCK + (first + v) * LANES);
                for (int r = 0; r < R; r++)
                    sum[r][v] = fma_(broadcast(s->query[row + r][i]), key, sum[r][v]);
            }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < width; v++)
                store(&s->weights[row + r][(first + v) * LANES], sum[r][v] * broadcast(scale));
    }
}

/* sums[r][i ...] += weights[r] * values of a block, for V vectors of dimensions from i on */
INLINE void add_values(State *s, int32_t row, const int R, const void *values, const size_t *at,
                       int32_t dim, int32_t i, const int V, int32_t num_keys, const int kind) {
    vf sum[TOGETHER][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = load(&s->sums[row + r][i + v * LANES]);
    for (int32_t first = 0; first < num_keys; first += TILE) {
        int32_t count = num_keys - first < TILE ? num_keys - first : TILE;
        size_t from = at[first / TILE] + i;
        for (int32_t k = 0; k < count; k++)
            for (int v = 0; v < V; v++) {
                size_t place = from + (size_t)k * dim + v * LANES;
                fetch_kv(s, values, place, v * LANES, kind);
                vf value = load_kv(values, place, kind);
                for (int r = 0; r < R; r++)
                    sum[r][v] = fma_(broadcast(s->weights[row + r][first + k]), value, sum[r][v]);
            }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(&s->sums[row + r][i + v * LANES], sum[r][v]);
}

/* The same for the dimensions left over where the head size is no multiple of a vector. */
static void add_last_values(State *s, int32_t row, const void *values, const size_t *at,
                            int32_t dim, int32_t i, int32_t num_keys, int kind) {
    for (; i < dim; i++)
        for (int32_t k = 0; k < num_keys; k++) {
            size_t place = at[k / TILE] + (size_t)(k % TILE) * dim + i;
            float value = kind == KV_INT8    ? ((const int8_t *)values)[place]
                          : kind == KV_FLOAT16 ? half_to_float(((const uint16_t *)values)[place])
                                               : ((const float *)values)[place];
            s->sums[row][i] += s->weights[row][k] * value;
        }
}

INLINE void accumulate(State *s, int32_t row, const int R, const void *values, const size_t *at,
                       int32_t dim, int32_t num_keys, const int kind) {
    /* Enough sums at once to hide the latency of adding, and no more than there are registers. */
    const int V = R == 1 || LANES == 16 ? 4 : 2;
    int32_t i = 0;
    for (; i + V * LANES <= dim; i += V * LANES)
        add_values(s, row, R, values, at, dim, i, V, num_keys, kind);
    for (; i + LANES <= dim; i += LANES)
        add_values(s, row, R, values, at, dim, i, 1, num_keys, kind);
    for (int r = 0; r < R; r++)
        add_last_values(s, row + r, values, at, dim, i, num_keys, kind);
}

/* Turn a block's scores into weights against the running maximum; rescale what was summed. */
static void soften(State *s, int32_t row, int32_t first_key, int32_t dim) {
    float *w = s->weights[row];
    int32_t allowed = s->position[row] + 1 - first_key;
    for (int32_t k = allowed > 0 ? allowed : 0; k < KEY_BLOCK; k++) w[k] = -INFINITY;
    if (allowed <= 0) { /* the whole block lies beyond this row: it changes nothing */
        memset(w, 0, sizeof s->weights[row]);
        return;
    }
    vf most = load(w);
    for (int k = LANES; k < KEY_BLOCK; k += LANES) most = larger(load(w + k), most);
    float maximum = larger_of(s->maximum[row], largest(most));
    vf total = load(s->total[row]);
    if (maximum > s->maximum[row]) {
        vf scale = exp_negative(broadcast(s->maximum[row] - maximum));
        total *= scale;
        for (int32_t i = 0; i < dim; i += LANES)
            store(&s->sums[row][i], load(&s->sums[row][i]) * scale);
        s->maximum[row] = maximum;
    }
    for (int k = 0; k < KEY_BLOCK; k += LANES) {
        vf e = exp_negative(load(w + k) - broadcast(maximum));
        store(w + k, e);
        total += e;
    }
    store(s->total[row], total);
}

/* weights[r] *= scales of a block's keys or values. Those beyond the last key are not read. */
static void weigh_by_scales(State *s, int32_t begin, const void *from, const size_t *at,
                            int32_t num_tiles, int32_t dim) {
    for (int32_t k = 0; k < num_tiles * TILE; k += LANES) {
        vf scales = load_kv_scales(from, at[k / TILE], dim, k % TILE);
        fetch_kv(s, from, at[k / TILE] + (size_t)dim * TILE, 0, KV_INT8);
        for (int32_t row = begin; row < begin + s->rows_each; row++)
            store(&s->weights[row][k], load(&s->weights[row][k]) * scales);
    }
}

/* The scores of one head's rows, from `row` on, with a block of keys. */
INLINE void score_block(State *s, int32_t row, const void *keys, const size_t *at,
                        int32_t num_tiles, int32_t dim, float scale, const int kind) {
    int32_t last = row + s->rows_each;
    for (; row + TOGETHER <= last; row += TOGETHER)
        if (LANES == 16 && num_tiles == BLOCK_TILES)
            score(s, row, TOGETHER, keys, at, BLOCK_TILES, dim, 0, scale, kind);
        else
            for (int32_t t = 0; t < num_tiles; t++)
                score(s, row, TOGETHER, keys, at + t, 1, dim, t * TILE, scale, kind);
    for (; row < last; row++)
        if (num_tiles == BLOCK_TILES)
            score(s, row, 1, keys, at, BLOCK_TILES, dim, 0, scale, kind);
        else
            for (int32_t t = 0; t < num_tiles; t++)
                score(s, row, 1, keys, at + t, 1, dim, t * TILE, scale, kind);
}

/* The values of a block, weighted, to the sums of one head's rows, from `row` on. */
INLINE void add_block(State *s, int32_t row, const void *values, const size_t *at,
                      int32_t num_keys, int32_t dim, const int kind) {
    int32_t last = row + s->rows_each;
    for (; row + TOGETHER <= last; row += TOGETHER)
        accumulate(s, row, TOGETHER, values, at, dim, num_keys, kind);
    for (; row < last; row++) accumulate(s, row, 1, values, at, dim, num_keys, kind);
}

/* Tiles of keys as floats, [D, 64], and zeros beyond them: to multiply whatever the stack has there
 * would do no harm but, where it is subnormal, take much longer. */
INLINE void widen_keys(State *s, const void *keys, const size_t *at, int32_t num_tiles,
                       int32_t dim, const int kind) {
    if (num_tiles < BLOCK_TILES) memset(s->block, 0, (size_t)dim * KEY_BLOCK * sizeof(float));
    for (int32_t t = 0; t < num_tiles; t++)
        for (int32_t i = 0; i < dim; i++)
            for (int32_t k = 0; k < TILE; k += LANES) {
                size_t place = (size_t)i * TILE + k;
                fetch_kv(s, keys, at[t] + place, place, kind);
                store(s->block + (size_t)i * KEY_BLOCK + t * TILE + k,
                      load_kv(keys, at[t] + place, kind));
            }
}

/* Tiles of values as floats, [64, D]; `to` says where each tile begins. */
INLINE void widen_values(State *s, const void *values, const size_t *at, int32_t num_tiles,
                         int32_t dim, size_t *to, const int kind) {
    int32_t size = dim * TILE;
    for (int32_t t = 0; t < num_tiles; t++) {
        to[t] = (size_t)t * size;
        for (int32_t i = 0; i < size; i += LANES) {
            fetch_kv(s, values, at[t] + i, (size_t)i, kind);
            store(s->block + to[t] + i, load_kv(values, at[t] + i, kind));
        }
    }
}

/* One block of keys and values for one head's rows, from `row` on. */
INLINE void attend_block(State *s, int32_t row, const Layer *layer, const size_t *at,
                         int32_t first_key, int32_t num_keys, int32_t dim, const int kind) {
    const float scale = 1.0f / sqrtf((float)dim);
    const int is_widened = kind != KV_FLOAT32 && s->rows_each >= MANY_ROWS;
    int32_t num_tiles = (num_keys + TILE - 1) / TILE;
    size_t widened[BLOCK_TILES];
    if (is_widened) {
        widen_keys(s, layer->keys, at, num_tiles, dim, kind);
        int32_t last = row + s->rows_each, r = row;
        for (; r + TOGETHER <= last; r += TOGETHER) score_floats(s, r, TOGETHER, dim, scale);
        for (; r < last; r++) score_floats(s, r, 1, dim, scale);
    } else score_block(s, row, layer->keys, at, num_tiles, dim, scale, kind);
    if (kind == KV_INT8) weigh_by_scales(s, row, layer->keys, at, num_tiles, dim);
    for (int32_t r = row; r < row + s->rows_each; r++) soften(s, r, first_key, dim);
    if (kind == KV_INT8) weigh_by_scales(s, row, layer->values, at, num_tiles, dim);
    if (is_widened) {
        widen_values(s, layer->values, at, num_tiles, dim, widened, kind);
        add_block(s, row, s->block, widened, num_keys, dim, KV_FLOAT32);
    } else add_block(s, row, layer->values, at, num_keys, dim, kind);
}

INLINE void attend(const Attention *job, State *s, const int64_t *table, int32_t kv_head,
                   const int kind) {
    const Model *m = job->model;
    const int32_t num_keys = s->last_position + 1;
    s->ahead = s->num_rows > s->rows_each ? m->kv_head_stride : 0;
    for (int32_t first = 0; first < num_keys; first += KEY_BLOCK) {
        int32_t count = num_keys - first < KEY_BLOCK ? num_keys - first : KEY_BLOCK;
        size_t at[BLOCK_TILES];
        for (int32_t t = 0; t * TILE < count; t++) {
            int32_t key = first + t * TILE;
            int64_t slot = table[key / m->block_size] * m->block_size + key % m->block_size;
            at[t] = (size_t)(slot / TILE * m->kv_stride + kv_head * m->kv_head_stride);
        }
        for (int32_t row = 0; row < s->num_rows; row += s->rows_each) {
            attend_block(s, row, job->layer, at, first, count, m->head_dim, kind);
            for (int32_t t = 0; t * TILE < count; t++) at[t] += m->kv_head_stride;
        }
    }
}

/* Take up the query heads [head, head + heads_each) of some tokens. */
static void prepare(const Attention *job, State *s, int32_t begin, int32_t end, int32_t head,
                    int32_t heads_each) {
    const Model *m = job->model;
    size_t width = (size_t)(m->num_heads + 2 * m->num_kv_heads) * m->head_dim;
    s->num_rows = 0;
    for (int32_t token = begin; token < end; token++)
        for (int32_t h = head; h < head + heads_each; h++) {
            int32_t row = s->num_rows++;
            memcpy(s->query[row], job->qkv + token * width + (size_t)h * m->head_dim,
                   (size_t)m->head_dim * sizeof(float));
            size_t place = (size_t)(token - job->slice.first) * m->num_heads + h;
            s->out[row] = job->out + place * m->head_dim;
            s->position[row] = (int32_t)job->step->positions[token];
            s->maximum[row] = -INFINITY;
            memset(s->total[row], 0, sizeof s->total[row]);
        }
    memset(s->sums, 0, sizeof s->sums[0] * (size_t)s->num_rows);
    s->last_position = s->position[s->num_rows - 1];
}

/* Query heads of some K/V heads, at most MAX_ROWS rows at a time. */
static void attend_heads(const Attention *job, int32_t sequence, int32_t begin, int32_t end,
                         int32_t kv_head, int32_t num_kv_heads) {
    const Model *m = job->model;
    const int64_t *table = job->step->block_tables + (size_t)sequence * job->step->blocks_per_sequence;
    int32_t group = m->num_heads / m->num_kv_heads;
    State s;
    for (int32_t h = 0; h < group; h += MAX_ROWS) {
        int32_t heads = group - h < MAX_ROWS ? group - h : MAX_ROWS;
        prepare(job, &s, begin, end, kv_head * group + h, heads * num_kv_heads);
        s.rows_each = s.num_rows / num_kv_heads;
        if (m->kv_kind == KV_INT8) attend(job, &s, table, kv_head, KV_INT8);
        else if (m->kv_kind == KV_FLOAT16) attend(job, &s, table, kv_head, KV_FLOAT16);
        else attend(job, &s, table, kv_head, KV_FLOAT32);
        for (int32_t row = 0; row < s.num_rows; row++) {
            float total = 0;
            for (int j = 0; j < LANES; j++) total += s.total[row][j];
            for (int32_t i = 0; i < m->head_dim; i++) s.out[row][i] = s.sums[row][i] / total;
        }
    }
}

static void run_task(void *context, int32_t task) {
    const Attention *job = context;
    int32_t num_heads = job->model->num_kv_heads, sequence = 0, begin, end;
    while (task >= job->first_task[sequence + 1]) sequence++;
    task -= job->first_task[sequence];
    part_of(job, sequence, &begin, &end);
    int32_t width = end - begin == 1 ? job->heads_per_task : 1;
    int32_t parts = (num_heads + width - 1) / width, kv_head = task % parts * width;
    begin += task / parts * job->tokens_per_task;
    if (end > begin + job->tokens_per_task) end = begin + job->tokens_per_task;
    int32_t heads = num_heads - kv_head < width ? num_heads - kv_head : width;
    attend_heads(job, sequence, begin, end, kv_head, heads);
}

void attention(Pool *pool, const Model *model, const Layer *layer, const Step *step, Slice slice,
               const float *qkv, float *out) {
    int32_t num_heads = model->num_kv_heads, group = model->num_heads / num_heads;
    int32_t most = group < MAX_ROWS ? MAX_ROWS / group : 1; /* tokens, or heads, of a task */
    int32_t first_task[step->num_sequences + 1];
    Attention job = {model, layer, step, qkv, out, slice, most, 1, first_task};
    /* Of single tokens as many heads a task as leaves enough tasks. */
    int32_t width = pool_size(pool) == 1 ? most : step->num_sequences * num_heads / MIN_TASKS;
    if (width > most) width = most;
    if (width > num_heads) width = num_heads;
    if (width > 1) job.heads_per_task = width;
    first_task[0] = 0;
    for (int32_t i = 0; i < step->num_sequences; i++) {
        int32_t begin, end, tasks = 0;
        part_of(&job, i, &begin, &end);
        if (end - begin == 1) tasks = (num_heads + job.heads_per_task - 1) / job.heads_per_task;
        else if (end > begin) tasks = (end - begin + most - 1) / most * num_heads;
        first_task[i + 1] = first_task[i] + tasks;
    }
    parallel_for(pool, run_task, &job, first_task[step->num_sequences]);
}
