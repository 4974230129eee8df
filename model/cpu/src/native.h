/* What the native step is made of. The structs are mirrored field by field in library.py.
 *
 * T tokens in a step, S sequences, H heads, K key/value heads, D head size, P = 16 tokens in a
 * tile of the K/V pool. All sizes count elements. Pointers belong to the caller.
 */
#ifndef ARRIERO_NATIVE_H
#define ARRIERO_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define PANEL 16 /* rows of a weight matrix that lie side by side */
#define TILE 16  /* tokens of a K/V tile */
#define BLOCK (PANEL * PANEL)
#define MAX_HEAD_DIM 256
#define INT4_GROUP 32 /* columns; the smallest group that there is */

enum { WEIGHTS_FLOAT32, WEIGHTS_INT8, WEIGHTS_INT4, WEIGHTS_STEPS };
enum { SOURCE_FLOAT32, SOURCE_FLOAT16, SOURCE_BFLOAT16 };
enum { KV_FLOAT32, KV_FLOAT16, KV_INT8 };
#define SCALE_BYTES 4 /* behind a head's codes in a tile, where K/V are int8: a scale a token */

/* A matrix [rows, cols] in panels of 16 rows, the last one padded; see pack.c for the layouts. */
typedef struct {
    int32_t kind;
    int32_t rows, cols;
    int32_t group;       /* columns that share a scale, of weights and activations alike */
    int32_t padded_cols; /* cols up to a multiple of group */
    float factor;        /* on all scales, so that they fit float16 */
    const void *weights;
    const uint16_t *scales; /* float16 [panels, groups, 16]; none for float32 */
    const uint16_t *minima; /* float16 [panels, groups, 16], int4 only: value = scale * code + minimum */
    const uint16_t *steps;  /* [panels, padded_cols / 32, 16], steps only: the step, and 256 times the
                               code that a nibble of 0 stands for, plus 128 */
    const float *bias;      /* [rows] or none */
} Matrix;

typedef struct {
    const float *attention_norm, *mlp_norm; /* [hidden], or none where folded into the matrices */
    Matrix query, key, value, output, gate, up, down;
    void *keys;   /* [tiles][K][D, 16], a tile every kv_stride elements, a head every kv_head_stride */
    void *values; /* [tiles][K][16, D], likewise */
} Layer;

/* x -> (O (x) H) (signs * x): H the Hadamard matrix of size 2^n, O orthogonal; see rotate.c. */
typedef struct {
    int32_t size, block;  /* size = odd * block, block = 2^n; size 0: no rotation */
    const float *mixing;  /* O [odd, odd] */
    const float *signs;   /* [size], +1 or -1 */
} Rotation;

/* A matrix W of a file, and what is done to it before it is packed. */
typedef struct {
    int32_t kind; /* SOURCE_... */
    int32_t rows, cols;
    const void *values;       /* [rows, cols] */
    const float *columns;     /* [cols] factors, or none */
    const Rotation *inputs;   /* W becomes W Q^T: a product that takes rotated rows; or none */
    const Rotation *outputs;  /* W becomes Q W: a product that gives them; at most one of the two */
} Source;

/* Float32 values in blocks [16 columns][16 rows] at panel * panel_stride + tile * tile_stride,
 * a panel 16 rows and a tile 16 columns of the matrix; zero where it has no such row or column. */
typedef struct {
    float *values;
    int32_t num_panels, num_tiles;
    size_t panel_stride, tile_stride;
} Blocks;

typedef struct {
    int32_t num_layers, hidden_size, intermediate_size, vocab_size;
    int32_t num_heads, num_kv_heads, head_dim;
    int32_t block_size, kv_kind;
    int32_t max_tokens; /* of a step */
    int64_t kv_stride;  /* from a tile to the next: all layers of a tile lie together */
    int64_t kv_head_stride; /* D * 16 codes, and with int8 16 scales */
    float norm_eps;
    const float *final_norm;         /* [hidden] or none */
    const float *cos, *sin;          /* [max_model_len, D / 2] */
    const Layer *layers;
    Matrix embedding, head; /* the same memory where they are tied */
    Rotation rotation;      /* of the residual stream */
} Model;

typedef struct {
    int32_t num_tokens, num_sequences, blocks_per_sequence;
    const int64_t *token_ids, *positions, *slots; /* [T]; slot -1 writes nothing */
    const int64_t *block_tables;                  /* [S, blocks_per_sequence] */
    const int32_t *query_starts;                  /* [S + 1] */
} Step;

/* Rows of activations, quantised as one matrix wants them. */
typedef struct {
    int32_t group, padded_cols;
    int8_t *codes;  /* [T, padded_cols] */
    float *scales;  /* [T, groups] */
    float *totals;  /* [T, groups] sums of codes times their scale: what minima are multiplied by */
    int32_t *offsets; /* [T, groups] -128 times the sums of codes; see dot.h */
    const float *floats; /* [T, cols]: the rows themselves, for float32 matrices */
    int32_t stride;      /* of floats */
} Rows;

/* threads.c */
typedef struct Pool Pool;
typedef void (*Task)(void *context, int32_t index);
Pool *pool_create(int32_t num_threads);
int32_t pool_size(const Pool *pool);
int32_t thread_index(void); /* of the thread that asks, in its pool: 0 is the caller */
void pool_destroy(Pool *pool);
void parallel_for(Pool *pool, Task task, void *context, int32_t count);

/* quantize.c */
float quantize_vector(const float *from, int32_t size, int8_t *codes);
void quantize_rows(Pool *pool, Rows *rows, const float *from, int32_t stride, int32_t cols,
                   int32_t num_rows, const Matrix *matrix);

/* matmul.c: out[t, columns of part p] = rows[t] * parts[p]^T + bias, parts side by side */
void matmul(Pool *pool, const Rows *rows, int32_t num_rows, const Matrix *const *parts,
            int32_t num_parts, float *out, int32_t stride);

/* norm.c */
void rms_norm(Pool *pool, const float *from, const float *weight, float eps, float *to,
              int32_t size, int32_t num_rows);
void add_rows(Pool *pool, float *to, const float *from, int64_t size);

/* Some tokens of a step that follow each other. */
typedef struct {
    int32_t first, count;
} Slice;

/* rotary.c: turns a slice's queries and keys of qkv [T, (H + 2 K) * D] in place, stores its keys
 * and values */
void rotate_and_store(Pool *pool, const Model *model, const Layer *layer, const Step *step,
                      Slice slice, float *qkv);

/* attention.c: out [slice, H * D], from qkv [T, (H + 2 K) * D] and the K/V that are stored */
void attention(Pool *pool, const Model *model, const Layer *layer, const Step *step, Slice slice,
               const float *qkv, float *out);

/* activation.c: gate[t] = silu(gate[t]) * up[t], in gate_up [T, 2 * size] */
void swiglu(Pool *pool, float *gate_up, int32_t size, int32_t num_rows);

/* rotate.c */
void rotate_rows(Pool *pool, const Rotation *rotation, float *rows, int32_t num_rows);
void unrotate_rows(Pool *pool, const Rotation *rotation, float *rows, int32_t num_rows);
void rotate_columns(const Rotation *rotation, float *columns);

/* read.c */
float read_weights(Pool *pool, const Source *source, Blocks *blocks);

/* pack.c */
int32_t pack_weights(Pool *pool, Matrix *matrix, const Source *source, float *work);
void pack_blocks(Pool *pool, const Matrix *matrix, int32_t block_type, const uint8_t *blocks,
                 int32_t row_bytes, const int32_t *source_rows);
void unpack_row(const Matrix *matrix, int32_t row, float *to);

/* embedding.c */
void embed(Pool *pool, const Model *model, const int64_t *token_ids, int32_t num_tokens,
           float *to);

#endif
