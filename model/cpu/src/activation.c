/* SwiGLU (Shazeer, arXiv 2002.05202): silu(gate) * up. */
#include "native.h"
#include "simd.h"

typedef struct {
    float *gate_up;
    int32_t size;
} Activation;

/* x / (1 + e^-x), by e^-|x| so that nothing overflows. */
INLINE vf silu(vf x) {
    vi is_negative = x < (vf){0};
    vf magnitude = larger(x, -x);
    vf e = exp_negative(-magnitude);
    vf one = broadcast(1.0f);
    vf numerator = (vf)(((vi)e & is_negative) | ((vi)one & ~is_negative));
    return x * (numerator / (one + e));
}

static void activate_row(void *context, int32_t row) {
    const Activation *job = context;
    float *gate = job->gate_up + (size_t)row * 2 * job->size, *up = gate + job->size;
    int32_t i = 0;
    for (; i + LANES <= job->size; i += LANES)
        store(gate + i, silu(load(gate + i)) * load(up + i));
    for (; i < job->size; i++) gate[i] = silu(broadcast(gate[i]))[0] * up[i];
}

void swiglu(Pool *pool, float *gate_up, int32_t size, int32_t num_rows) {
    Activation job = {gate_up, size};
    parallel_for(pool, activate_row, &job, num_rows);
}
