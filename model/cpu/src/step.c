/* The whole network over a step's tokens: what model/llama.py does, in one call. */
#include <stdlib.h>
#include <string.h>

#include "native.h"

typedef struct {
    Model model;
    Pool *pool;
    float *stream, *normed, *qkv, *gate_up;
    Rows rows;
} Engine;

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

void engine_destroy(Engine *engine) {
    void *all[] = {engine->stream, engine->normed, engine->qkv, engine->gate_up,
                   engine->rows.codes, engine->rows.scales, engine->rows.sums};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(engine);
}

/* Return work space for steps of model->max_tokens; NULL if there is no memory. */
Engine *engine_create(const Model *model, Pool *pool) {
    Engine *engine = calloc(1, sizeof(Engine));
    if (!engine) return NULL;
    engine->model = *model;
    engine->pool = pool;
    size_t T = (size_t)model->max_tokens, wide = (size_t)widest(model);
    size_t q_size = (size_t)model->num_heads * model->head_dim;
    size_t kv_size = (size_t)model->num_kv_heads * model->head_dim;
    size_t row = (size_t)model->hidden_size > q_size ? (size_t)model->hidden_size : q_size;
    size_t groups = wide / INT4_GROUP + 1;
    engine->stream = buffer(T * (size_t)model->hidden_size, sizeof(float));
    engine->normed = buffer(T * row, sizeof(float));
    engine->qkv = buffer(T * (row + 2 * kv_size), sizeof(float)); /* o_proj's output as well */
    engine->gate_up = buffer(T * 2 * (size_t)model->intermediate_size, sizeof(float));
    engine->rows.codes = buffer(T * wide, 1);
    engine->rows.scales = buffer(T * groups, sizeof(float));
    engine->rows.sums = buffer(T * groups, sizeof(int32_t));
    if (engine->stream && engine->normed && engine->qkv && engine->gate_up &&
        engine->rows.codes && engine->rows.scales && engine->rows.sums)
        return engine;
    engine_destroy(engine);
    return NULL;
}

/* out [num_rows, outputs of all parts] = from [num_rows, cols] * parts */
static void project(Engine *e, const float *from, int32_t from_stride, int32_t num_rows,
                    const Matrix *const *parts, int32_t num_parts, float *out) {
    int32_t stride = 0;
    for (int32_t p = 0; p < num_parts; p++) stride += parts[p]->rows;
    quantize_rows(e->pool, &e->rows, from, from_stride, parts[0]->cols, num_rows, parts[0]);
    matmul(e->pool, &e->rows, num_rows, parts, num_parts, out, stride);
}

static void attention_block(Engine *e, const Layer *layer, const Step *step) {
    const Model *m = &e->model;
    int32_t T = step->num_tokens;
    rms_norm(e->pool, e->stream, layer->attention_norm, m->norm_eps, e->normed, m->hidden_size, T);
    const Matrix *inputs[] = {&layer->query, &layer->key, &layer->value};
    project(e, e->normed, m->hidden_size, T, inputs, 3, e->qkv);
    rotate_and_store(e->pool, m, layer, step, e->qkv);
    attention(e->pool, m, layer, step, e->qkv, e->normed);
    const Matrix *output[] = {&layer->output};
    project(e, e->normed, m->num_heads * m->head_dim, T, output, 1, e->qkv);
    add_rows(e->pool, e->stream, e->qkv, (int64_t)T * m->hidden_size);
}

static void mlp_block(Engine *e, const Layer *layer, const Step *step) {
    const Model *m = &e->model;
    int32_t T = step->num_tokens;
    rms_norm(e->pool, e->stream, layer->mlp_norm, m->norm_eps, e->normed, m->hidden_size, T);
    const Matrix *inputs[] = {&layer->gate, &layer->up};
    project(e, e->normed, m->hidden_size, T, inputs, 2, e->gate_up);
    swiglu(e->pool, e->gate_up, m->intermediate_size, T);
    const Matrix *down[] = {&layer->down};
    project(e, e->gate_up, 2 * m->intermediate_size, T, down, 1, e->normed);
    add_rows(e->pool, e->stream, e->normed, (int64_t)T * m->hidden_size);
}

/* Write the step's K/V and the last hidden states [T, hidden], normalised, not rotated. */
void engine_forward(Engine *e, const Step *step, float *hidden) {
    const Model *m = &e->model;
    embed(e->pool, m, step, e->stream);
    for (int32_t i = 0; i < m->num_layers; i++) {
        attention_block(e, &m->layers[i], step);
        mlp_block(e, &m->layers[i], step);
    }
    if (m->rotation.size) unrotate_rows(e->pool, &m->rotation, e->stream, step->num_tokens);
    rms_norm(e->pool, e->stream, m->final_norm, m->norm_eps, hidden, m->hidden_size,
             step->num_tokens);
}

/* Write the logits [num_rows, vocab] of hidden states [num_rows <= max_tokens, hidden]. */
void engine_logits(Engine *e, const float *hidden, int32_t num_rows, float *logits) {
    const Model *m = &e->model;
    memcpy(e->normed, hidden, (size_t)num_rows * m->hidden_size * sizeof(float));
    if (m->rotation.size) rotate_rows(e->pool, &m->rotation, e->normed, num_rows);
    const Matrix *head[] = {&m->head};
    project(e, e->normed, m->hidden_size, num_rows, head, 1, logits);
}
