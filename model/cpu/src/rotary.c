/* Rotary positions (Su et al., arXiv 2104.09864) on queries and keys, and K/V into their slots.
 *
 * A pair is dimensions i and i + D / 2 of a head, as in Hugging Face's layout.
 */
#include "native.h"
#include "simd.h"

typedef struct {
    const Model *model;
    const Layer *layer;
    const Step *step;
    int32_t first;
    float *qkv;
} Turn;

static void rotate_head(float *restrict head, const float *restrict cos, const float *restrict sin,
                        int32_t half) {
    for (int32_t i = 0; i < half; i++) {
        float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i] + low * sin[i];
    }
}

/* A head's key and value in 8 bits, each with a scale of its own behind the tile's codes. */
static void store_codes(int8_t *key_tile, int8_t *value_tile, int64_t offset, int32_t dim,
                        const float *key, const float *value) {
    int8_t codes[MAX_HEAD_DIM];
    size_t scale_at = (size_t)dim * TILE + (size_t)offset * SCALE_BYTES;
    float scale = quantize_vector(key, dim, codes);
    for (int32_t i = 0; i < dim; i++) key_tile[i * TILE + offset] = codes[i];
    memcpy(key_tile + scale_at, &scale, SCALE_BYTES);
    scale = quantize_vector(value, dim, value_tile + offset * dim);
    memcpy(value_tile + scale_at, &scale, SCALE_BYTES);
}

static void store_key_value(const Model *m, const Layer *layer, int64_t slot, const float *keys,
                            const float *values) {
    int64_t tile = slot / TILE, offset = slot % TILE;
    for (int32_t head = 0; head < m->num_kv_heads; head++) {
        size_t first = (size_t)(tile * m->kv_stride + head * m->kv_head_stride);
        const float *key = keys + head * m->head_dim, *value = values + head * m->head_dim;
        if (m->kv_kind == KV_INT8) {
            store_codes((int8_t *)layer->keys + first, (int8_t *)layer->values + first, offset,
                        m->head_dim, key, value);
            continue;
        }
        size_t key_at = first + offset, value_at = first + (size_t)offset * m->head_dim;
        if (m->kv_kind == KV_FLOAT16) {
            uint16_t halves[MAX_HEAD_DIM], *to = (uint16_t *)layer->keys + key_at;
            floats_to_halves(key, m->head_dim, halves);
            for (int32_t i = 0; i < m->head_dim; i++) to[i * TILE] = halves[i];
            floats_to_halves(value, m->head_dim, (uint16_t *)layer->values + value_at);
        } else {
            float *to = (float *)layer->keys + key_at;
            for (int32_t i = 0; i < m->head_dim; i++) to[i * TILE] = key[i];
            memcpy((float *)layer->values + value_at, value, (size_t)m->head_dim * sizeof(float));
        }
    }
}

static void rotate_token(void *context, int32_t index) {
    const Turn *job = context;
    int32_t token = job->first + index;
    const Model *m = job->model;
    int32_t half = m->head_dim / 2, num_rotated = m->num_heads + m->num_kv_heads;
    size_t width = (size_t)(num_rotated + m->num_kv_heads) * m->head_dim;
    float *row = job->qkv + token * width;
    int64_t position = job->step->positions[token], slot = job->step->slots[token];
    const float *cos = m->cos + position * half, *sin = m->sin + position * half;
    for (int32_t head = 0; head < num_rotated; head++)
        rotate_head(row + head * m->head_dim, cos, sin, half);
    if (slot >= 0)
        store_key_value(m, job->layer, slot, row + m->num_heads * m->head_dim,
                        row + num_rotated * m->head_dim);
}

void rotate_and_store(Pool *pool, const Model *model, const Layer *layer, const Step *step,
                      Slice slice, float *qkv) {
    Turn job = {model, layer, step, slice.first, qkv};
    parallel_for(pool, rotate_token, &job, slice.count);
}
