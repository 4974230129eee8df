/* The whole network over a step's tokens: what model/llama.py does, in one call.
 *
 * In a step of few tokens the threads share out each operation, so that the weights are read once.
 * In one of many, each thread takes a slice of the tokens through a layer by itself: what it has
 * written lies in its own cache when it is read again. Which of the two, and who takes which
 * slice, changes no bit.
 */
#include <stdlib.h>
#include <string.h>

#include "native.h"

#define MOST_TOKENS 64   /* of a slice: what lies between a layer's operations fits a core's cache */
#define FEWEST_TOKENS 32 /* that make it worth a thread's while to read all weights */

/* Room for a slice's tokens on their way through a layer. */
typedef struct {
    float *normed; /* [tokens, hidden or H * D] */
    float *wide;   /* [tokens, 2 * intermediate or hidden] */
    Rows rows;
} Work;

typedef struct {
    Model model;
    Pool *pool, *alone; /* a pool of one thread: whoever uses it */
    float *stream;      /* [T, hidden] */
    float *qkv;         /* [T, (H + 2 K) * D] */
    int32_t num_threads, work_rows; /* of the first work; the others have MOST_TOKENS */
    Work *work;         /* one a thread */
} Engine;

/* A step on its way from the keys and values of one layer to those of the next. */
typedef struct {
    Engine *engine;
    const Step *step;
    float *hidden;
    int32_t number, slice_tokens;
} Stage;

static int32_t widest(const Model *m) {
    int32_t most = m->head.padded_cols;
    for (int32_t i = 0; i < m->num_layers; i++) {
        const Layer *layer = &m->layers[i];
        const Matrix *all[] = {&layer->query, &layer->output, &layer->gate, &layer->down};
        for (int32_t k = 0; k < 4; k++)
            if (all[k]->padded_cols > most) most = all[k]->padded_cols;
    }
    return most;
}

static void *buffer(size_t count, size_t size) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (count * size + 63) / 64 * 64) ? NULL : memory;
}

static int32_t larger_of(int32_t a, int32_t b) { return a > b ? a : b; }

static int create_work(const Model *m, Work *work, size_t rows) {
    size_t wide = (size_t)widest(m), groups = wide / INT4_GROUP + 1;
    int32_t q_size = m->num_heads * m->head_dim;
    work->normed = buffer(rows * (size_t)larger_of(m->hidden_size, q_size), sizeof(float));
    work->wide = buffer(rows * (size_t)larger_of(2 * m->intermediate_size, m->hidden_size),
                        sizeof(float));
    work->rows.codes = buffer(rows * wide, 1);
    work->rows.scales = buffer(rows * groups, sizeof(float));
    work->rows.totals = buffer(rows * groups, sizeof(float));
    work->rows.offsets = buffer(rows * groups, sizeof(int32_t));
    return work->normed && work->wide && work->rows.codes && work->rows.scales &&
           work->rows.totals && work->rows.offsets;
}

void engine_destroy(Engine *engine) {
    for (int32_t i = 0; engine->work && i < engine->num_threads; i++) {
        Work *work = &engine->work[i];
        void *all[] = {work->normed, work->wide, work->rows.codes, work->rows.scales,
                       work->rows.totals, work->rows.offsets};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    }
    if (engine->alone) pool_destroy(engine->alone);
    free(engine->work);
    free(engine->stream);
    free(engine->qkv);
    free(engine);
}

/* Return work space for steps of model->max_tokens; NULL if there is no memory. */
Engine *engine_create(const Model *model, Pool *pool) {
    Engine *engine = calloc(1, sizeof(Engine));
    if (!engine) return NULL;
    engine->model = *model;
    engine->pool = pool;
    engine->num_threads = pool_size(pool);
    engine->work_rows = larger_of(MOST_TOKENS, engine->num_threads * FEWEST_TOKENS);
    size_t T = (size_t)model->max_tokens;
    size_t heads = (size_t)(model->num_heads + 2 * model->num_kv_heads);
    engine->alone = pool_create(1);
    engine->stream = buffer(T * (size_t)model->hidden_size, sizeof(float));
    engine->qkv = buffer(T * heads * (size_t)model->head_dim, sizeof(float));
    engine->work = calloc((size_t)engine->num_threads, sizeof(Work));
    int is_whole = engine->alone && engine->stream && engine->qkv && engine->work;
    for (int32_t i = 0; is_whole && i < engine->num_threads; i++)
        is_whole = create_work(model, &engine->work[i], (size_t)(i ? MOST_TOKENS : engine->work_rows));
    if (is_whole) return engine;
    engine_destroy(engine);
    return NULL;
}

/* out [num_rows, outputs of all parts] = from [num_rows, cols] * parts */
static void project(Pool *pool, Rows *rows, const float *from, int32_t from_stride,
                    int32_t num_rows, const Matrix *const *parts, int32_t num_parts, float *out) {
    int32_t stride = 0;
    for (int32_t p = 0; p < num_parts; p++) stride += parts[p]->rows;
    quantize_rows(pool, rows, from, from_stride, parts[0]->cols, num_rows, parts[0]);
    matmul(pool, rows, num_rows, parts, num_parts, out, stride);
}

/* A layer up to the point where its keys and values are stored. */
static void begin_layer(Engine *e, Pool *pool, Work *work, const Step *step, Slice slice,
                        int32_t index) {
    const Model *m = &e->model;
    const Layer *layer = &m->layers[index];
    const Matrix *inputs[] = {&layer->query, &layer->key, &layer->value};
    size_t width = (size_t)(m->num_heads + 2 * m->num_kv_heads) * m->head_dim;
    float *stream = e->stream + (size_t)slice.first * m->hidden_size;
    rms_norm(pool, stream, layer->attention_norm, m->norm_eps, work->normed, m->hidden_size,
             slice.count);
    project(pool, &work->rows, work->normed, m->hidden_size, slice.count, inputs, 3,
            e->qkv + (size_t)slice.first * width);
    rotate_and_store(pool, m, layer, step, slice, e->qkv);
}

/* The rest of it, once those of all slices are. */
static void end_layer(Engine *e, Pool *pool, Work *work, const Step *step, Slice slice,
                      int32_t index) {
    const Model *m = &e->model;
    const Layer *layer = &m->layers[index];
    const Matrix *output[] = {&layer->output}, *inputs[] = {&layer->gate, &layer->up},
                 *down[] = {&layer->down};
    int32_t hidden = m->hidden_size, inner = m->intermediate_size, count = slice.count;
    float *stream = e->stream + (size_t)slice.first * hidden;
    attention(pool, m, layer, step, slice, e->qkv, work->normed);
    project(pool, &work->rows, work->normed, m->num_heads * m->head_dim, count, output, 1,
            work->wide);
    add_rows(pool, stream, work->wide, (int64_t)count * hidden);
    rms_norm(pool, stream, layer->mlp_norm, m->norm_eps, work->normed, hidden, count);
    project(pool, &work->rows, work->normed, hidden, count, inputs, 2, work->wide);
    swiglu(pool, work->wide, inner, count);
    project(pool, &work->rows, work->wide, 2 * inner, count, down, 1, work->normed);
    add_rows(pool, stream, work->normed, (int64_t)count * hidden);
}

/* Take a slice from the keys and values of one layer, which all slices have stored, to the next's. */
static void run_stage(const Stage *stage, Pool *pool, Work *work, Slice slice) {
    Engine *e = stage->engine;
    const Model *m = &e->model;
    const Step *step = stage->step;
    size_t first = (size_t)slice.first * m->hidden_size;
    float *stream = e->stream + first;
    if (stage->number == 0) embed(pool, m, step->token_ids + slice.first, slice.count, stream);
    else end_layer(e, pool, work, step, slice, stage->number - 1);
    if (stage->number < m->num_layers) {
        begin_layer(e, pool, work, step, slice, stage->number);
        return;
    }
    if (m->rotation.size) unrotate_rows(pool, &m->rotation, stream, slice.count);
    rms_norm(pool, stream, m->final_norm, m->norm_eps, stage->hidden + first, m->hidden_size,
             slice.count);
}

static void run_slice(void *context, int32_t index) {
    const Stage *stage = context;
    Engine *e = stage->engine;
    Slice slice = {index * stage->slice_tokens, stage->slice_tokens};
    int32_t left = stage->step->num_tokens - slice.first;
    if (slice.count > left) slice.count = left;
    if (slice.count > 0) run_stage(stage, e->alone, &e->work[thread_index()], slice);
}

/* Write the step's K/V and the last hidden states [T, hidden], normalised, not rotated. */
void engine_forward(Engine *e, const Step *step, float *hidden) {
    int32_t T = step->num_tokens, threads = e->num_threads;
    int32_t num_slices = (T + threads * MOST_TOKENS - 1) / (threads * MOST_TOKENS) * threads;
    Stage stage = {e, step, hidden, 0, (T + num_slices - 1) / num_slices};
    for (; stage.number <= e->model.num_layers; stage.number++)
        if (T < threads * FEWEST_TOKENS) run_stage(&stage, e->pool, &e->work[0], (Slice){0, T});
        else parallel_for(e->pool, run_slice, &stage, num_slices);
}

/* Write the logits [num_rows, vocab] of hidden states [num_rows, hidden]. */
void engine_logits(Engine *e, const float *hidden, int32_t num_rows, float *logits) {
    const Model *m = &e->model;
    const Matrix *head[] = {&m->head};
    Work *work = &e->work[0];
    for (int32_t first = 0; first < num_rows; first += e->work_rows) {
        int32_t count = num_rows - first < e->work_rows ? num_rows - first : e->work_rows;
        memcpy(work->normed, hidden + (size_t)first * m->hidden_size,
               (size_t)count * m->hidden_size * sizeof(float));
        if (m->rotation.size) rotate_rows(e->pool, &m->rotation, work->normed, count);
        project(e->pool, &work->rows, work->normed, m->hidden_size, count, head, 1,
                logits + (size_t)first * m->vocab_size);
    }
}
