/* Token ids to rows of the embedding, which is packed like any other matrix. */
#include "native.h"

typedef struct {
    const Model *model;
    const int64_t *token_ids;
    float *to;
} Embed;

static void embed_token(void *context, int32_t token) {
    const Embed *job = context;
    unpack_row(&job->model->embedding, (int32_t)job->token_ids[token],
               job->to + (size_t)token * job->model->hidden_size);
}

void embed(Pool *pool, const Model *model, const int64_t *token_ids, int32_t num_tokens,
           float *to) {
    Embed job = {model, token_ids, to};
    parallel_for(pool, embed_token, &job, num_tokens);
}
