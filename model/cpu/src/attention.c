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
#define MIN_TASKS 16 /* that a step is cut into, if it has as many heads */

typedef struct {
    const Model *model;
    const Layer *layer;
    const Step *step;
    const float *qkv;
    float *out;
    int32_t tokens_per_task, heads_per_task; /* more than one of either is never both */
    int32_t *first_task; /* [S + 1], counted in runs of tokens */
} Attention;

/* The rows of a task, K/V head by K/V head, and where they have got to. */
typedef struct {
    int32_t num_rows, rows_each, last_position;
    const float *query[MAX_ROWS];
    float *out[MAX_ROWS];
    int32_t position[MAX_ROWS];
    float maximum[MAX_ROWS], total[MAX_ROWS];
    _Alignas(64) float weights[MAX_ROWS][KEY_BLOCK];
    _Alignas(64) float sums[MAX_ROWS][MAX_HEAD_DIM];
} State;

INLINE vf load_kv(const void *from, size_t at, const int kind) {
    if (kind == KV_INT8) return load_codes((const int8_t *)from + at);
    return kind == KV_FLOAT16 ? load_half((const uint16_t *)from + at) : load((const float *)from + at);
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
                vf key = load_kv(keys, at[n] + (size_t)i * TILE + v * LANES, kind);
                for (int r = 0; r < R; r++)
                    sum[r][n][v] = fma_(broadcast(s->query[row + r][i]), key, sum[r][n][v]);
            }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                vf result = sum[r][n][v] * broadcast(scale);
                if (kind == KV_INT8) result *= load_kv_scales(keys, at[n], dim, v * LANES);
                store(&s->weights[row + r][offset + n * TILE + v * LANES], result);
            }
}

/* sums[r][i ...] += weights[r] * values of one tile, for V vectors of dimensions from i on */
INLINE void add_values(State *s, int32_t row, const int R, const void *values, size_t at,
                       int32_t dim, int32_t i, const int V, int32_t offset, int32_t count,
                       const int kind) {
    vf sum[TOGETHER][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = load(&s->sums[row + r][i + v * LANES]);
    for (int32_t k = 0; k < count; k++)
        for (int v = 0; v < V; v++) {
            vf value = load_kv(values, at + (size_t)k * dim + i + v * LANES, kind);
            for (int r = 0; r < R; r++)
                sum[r][v] = fma_(broadcast(s->weights[row + r][offset + k]), value, sum[r][v]);
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(&s->sums[row + r][i + v * LANES], sum[r][v]);
}

/* The same for the dimensions left over where the head size is no multiple of a vector. */
static void add_last_values(State *s, int32_t row, const void *values, size_t at, int32_t dim,
                            int32_t i, int32_t offset, int32_t count, int kind) {
    for (; i < dim; i++)
        for (int32_t k = 0; k < count; k++) {
            size_t place = at + (size_t)k * dim + i;
            float value = kind == KV_INT8    ? ((const int8_t *)values)[place]
                          : kind == KV_FLOAT16 ? half_to_float(((const uint16_t *)values)[place])
                                               : ((const float *)values)[place];
            s->sums[row][i] += s->weights[row][offset + k] * value;
        }
}

INLINE void accumulate(State *s, int32_t row, const int R, const void *values, size_t at,
                       int32_t dim, int32_t offset, int32_t count, const int kind) {
    /* Enough sums at once to hide the latency of adding, and no more than there are registers. */
    const int V = R == 1 || LANES == 16 ? 4 : 2;
    int32_t i = 0;
    for (; i + V * LANES <= dim; i += V * LANES)
        add_values(s, row, R, values, at, dim, i, V, offset, count, kind);
    for (; i + LANES <= dim; i += LANES)
        add_values(s, row, R, values, at, dim, i, 1, offset, count, kind);
    for (int r = 0; r < R; r++)
        add_last_values(s, row + r, values, at, dim, i, offset, count, kind);
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
    float maximum = s->maximum[row];
    for (int j = 0; j < LANES; j++) maximum = most[j] > maximum ? most[j] : maximum;
    vf total = {0};
    for (int k = 0; k < KEY_BLOCK; k += LANES) {
        vf e = exp_negative(load(w + k) - broadcast(maximum));
        store(w + k, e);
        total += e;
    }
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += total[j];
    if (maximum > s->maximum[row]) {
        vf scale = exp_negative(broadcast(s->maximum[row] - maximum));
        s->total[row] *= scale[0];
        for (int32_t i = 0; i < dim; i += LANES)
            store(&s->sums[row][i], load(&s->sums[row][i]) * scale);
        s->maximum[row] = maximum;
    }
    s->total[row] += sum;
}

/* weights[r][tile] *= scales of the tile's values. Garbage beyond the last position is not read. */
static void weigh_by_scales(State *s, int32_t begin, int32_t end, const void *values, size_t at,
                            int32_t dim, int32_t offset) {
    for (int v = 0; v < TILE_VECTORS; v++) {
        vf scales = load_kv_scales(values, at, dim, v * LANES);
        for (int32_t row = begin; row < end; row++) {
            float *weights = &s->weights[row][offset + v * LANES];
            store(weights, load(weights) * scales);
        }
    }
}

/* The scores of one head's rows, from `row` on, with a block of keys. */
INLINE void score_block(State *s, int32_t row, const void *keys, const size_t *tiles, size_t head,
                        int32_t num_tiles, int32_t dim, float scale, const int kind) {
    int32_t last = row + s->rows_each;
    size_t at[BLOCK_TILES];
    for (int32_t t = 0; t < num_tiles; t++) at[t] = tiles[t] + head;
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

/* The values of a block, weighted, to the sums of one head's rows, from `begin` on. */
INLINE void add_block(State *s, int32_t begin, const void *values, const size_t *tiles,
                      size_t head, int32_t num_keys, int32_t dim, const int kind) {
    int32_t last = begin + s->rows_each;
    for (int32_t key = 0; key < num_keys; key += TILE) {
        size_t at = tiles[key / TILE] + head;
        int32_t row = begin, count = num_keys - key < TILE ? num_keys - key : TILE;
        if (kind == KV_INT8) weigh_by_scales(s, begin, last, values, at, dim, key);
        for (; row + TOGETHER <= last; row += TOGETHER)
            accumulate(s, row, TOGETHER, values, at, dim, key, count, kind);
        for (; row < last; row++)
            accumulate(s, row, 1, values, at, dim, key, count, kind);
    }
}

INLINE void attend(const Attention *job, State *s, const int64_t *table, int32_t kv_head,
                   const int kind) {
    const Model *m = job->model;
    const void *keys = job->layer->keys, *values = job->layer->values;
    const int32_t dim = m->head_dim, num_keys = s->last_position + 1;
    const float scale = 1.0f / sqrtf((float)dim);
    for (int32_t first = 0; first < num_keys; first += KEY_BLOCK) {
        int32_t end = first + KEY_BLOCK < num_keys ? first + KEY_BLOCK : num_keys, row = 0;
        int32_t num_tiles = (end - first + TILE - 1) / TILE;
        size_t at[BLOCK_TILES];
        for (int32_t t = 0; t < num_tiles; t++) {
            int32_t key = first + t * TILE;
            int64_t slot = table[key / m->block_size] * m->block_size + key % m->block_size;
            at[t] = (size_t)(slot / TILE * m->kv_stride + kv_head * m->kv_head_stride);
        }
        for (int32_t begin = 0; begin < s->num_rows; begin += s->rows_each)
            score_block(s, begin, keys, at, begin / s->rows_each * m->kv_head_stride, num_tiles,
                        dim, scale, kind);
        for (row = 0; row < s->num_rows; row++) soften(s, row, first, dim);
        for (int32_t begin = 0; begin < s->num_rows; begin += s->rows_each)
            add_block(s, begin, values, at, begin / s->rows_each * m->kv_head_stride, end - first,
                      dim, kind);
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
            s->query[row] = job->qkv + token * width + (size_t)h * m->head_dim;
            s->out[row] = job->out + ((size_t)token * m->num_heads + h) * m->head_dim;
            s->position[row] = (int32_t)job->step->positions[token];
            s->maximum[row] = -INFINITY;
            s->total[row] = 0;
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
        for (int32_t row = 0; row < s.num_rows; row++)
            for (int32_t i = 0; i < m->head_dim; i++)
                s.out[row][i] = s.sums[row][i] / s.total[row];
    }
}

static void run_task(void *context, int32_t task) {
    const Attention *job = context;
    const int32_t num_heads = job->model->num_kv_heads, width = job->heads_per_task;
    int32_t parts = (num_heads + width - 1) / width;
    int32_t run = task / parts, kv_head = task % parts * width;
    int32_t sequence = 0;
    while (run >= job->first_task[sequence + 1]) sequence++;
    int32_t first = job->step->query_starts[sequence], last = job->step->query_starts[sequence + 1];
    int32_t begin = first + (run - job->first_task[sequence]) * job->tokens_per_task;
    int32_t end = begin + job->tokens_per_task < last ? begin + job->tokens_per_task : last;
    int32_t heads = num_heads - kv_head < width ? num_heads - kv_head : width;
    attend_heads(job, sequence, begin, end, kv_head, heads);
}

/* out [T, H * D] = attention of the step's queries to all K/V of their sequences. */
void attention(Pool *pool, const Model *model, const Layer *layer, const Step *step,
               const float *qkv, float *out) {
    int32_t num_heads = model->num_kv_heads, group = model->num_heads / num_heads;
    int32_t most = group < MAX_ROWS ? MAX_ROWS / group : 1; /* tokens, or heads, of a task */
    int32_t first_task[step->num_sequences + 1];
    Attention job = {model, layer, step, qkv, out, most, 1, first_task};
    if (step->num_tokens == step->num_sequences) {
        /* Everybody has one token: as many heads a task as leaves enough tasks. */
        int32_t width = step->num_sequences * num_heads / MIN_TASKS;
        if (most > num_heads) most = num_heads;
        job.heads_per_task = width < 1 ? 1 : width < most ? width : most;
        job.tokens_per_task = 1;
    }
    first_task[0] = 0;
    for (int32_t i = 0; i < step->num_sequences; i++) {
        int32_t tokens = step->query_starts[i + 1] - step->query_starts[i];
        first_task[i + 1] = first_task[i] + (tokens + job.tokens_per_task - 1) / job.tokens_per_task;
    }
    int32_t parts = (num_heads + job.heads_per_task - 1) / job.heads_per_task;
    parallel_for(pool, run_task, &job, first_task[step->num_sequences] * parts);
}
