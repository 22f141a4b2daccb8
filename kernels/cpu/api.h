// The C interface of the library: plain structs, called by kernels/tpserve_kernels/cpu/.
//
// Sizes are in elements unless a name says bytes. A struct here and its ctypes twin there have the same fields in the same order.
#pragma once

#include <stdint.h>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT32 = 3 };

// The instruction sets, in rising order. On an x86-64 processor each includes those before it.
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };

// What `Call` can ask for; each has a struct of arguments below.
enum Operation : int32_t {
    PRODUCT = 0,
    GROUPED_PRODUCT,
    HEAD,
    HEAD_BLOCK,
    NORM,
    QKV,
    ACTIVATION,
    ATTENTION,
    ALL_REDUCE,
    GUMBEL_MAX,
    QUANTIZE,      // quant/int8.py: rows of activations and of weights, to int8
    PRODUCT_INT8,  // quant/int8.py: every product with an int8 matrix
    RESCALE_INT8,  // quant/int8.py: sums of PRODUCT_INT8 that were added up over ranks
    GROUPED_PRODUCT_INT8,  // quant/int8.py: the products of experts
    MASK_BITS,             // sampler/filters.py, as the two below
    PENALIZE,
    TRUNCATE,
    NUM_OPERATIONS
};

// One operation with its arguments. A list of calls runs in order, all of it in one parallel region.
struct Call {
    int32_t operation;
    const void* arguments;
};

// The head of a packed matrix [N, K]. It is followed by panels of 16 outputs, the last one filled up with zeros:
//   float32   [K][16]
//   bfloat16  [K / 2][16][2], K filled up with zeros to a multiple of 32
//   int8      [K / 4][16][4], K filled up with zeros to a multiple of 64; then 16 float32 scales and 16 int32 sums, those of each
//             output's numbers
// A packed matrix is position-independent and the same for every instruction set.
struct PackedHead {
    uint32_t magic, version;
    int32_t dtype, reserved;
    int64_t outputs, inner;
    int64_t panel_bytes;
    int64_t padding[3];
};
constexpr uint32_t PACKED_MAGIC = 0x57535054, PACKED_VERSION = 1;

static inline int64_t packed_panel_bytes(int32_t dtype, int64_t inner) {
    if (dtype == INT8) return (inner + 63) / 64 * 64 * 16 + 128;
    return dtype == BFLOAT16 ? (inner + 31) / 32 * 32 * 16 * 2 : inner * 16 * 4;
}

// out[t] = x[t] @ weight.T + bias, summed in float32 in the order of K and rounded once.
struct Product {
    const PackedHead* weight;
    const void* x;      // [rows, K] of the weight's dtype
    const float* bias;  // [N] or null
    void* out;          // [rows, N]
    int64_t rows, x_stride, out_stride;
    int32_t out_dtype;
};

// Products of several matrices [N, K] of one shape, the packed ones `weight_bytes` apart: experts, or the matrices of heads.
//
// With `ends`: rows [ends[g - 1], ends[g]) of x and out belong to group g. Without: each group has all `rows`, those of group g
// begin at x + g * x_group and out + g * out_group (in numbers).
struct GroupedProduct {
    const char* weights;
    const int32_t* ends;
    const void* x;
    const float* bias;  // [groups, N] or null
    void* out;
    int64_t groups, weight_bytes, rows, x_stride, out_stride, x_group, out_group;
    int32_t out_dtype;
};

// The LM head [N, K] for some rows, without writing logits = scale * x @ weight.T. N is taken in `blocks` of 128 ids.
//
// HEAD writes the largest logit of each row with its lowest id and, if `sums` is given, of each block the largest logit (at least
// the lowest finite number) and the sum of exp((logit - top) / temperature), 0 for a temperature of 0. With `logits` it reads them
// from there and computes none. HEAD_BLOCK writes the logits of block best_id[row] of each row to `workspace`.
struct Head {
    const PackedHead* weight;
    const void* x;             // [rows, K] of the weight's dtype
    const float* logits;       // [rows, outputs] or null
    const float* temperature;  // [rows]
    float* best;               // [threads, rows], the first `rows` are the result
    int64_t* best_id;          // [threads, rows]
    float* tops;               // [rows, blocks]
    double* sums;              // [rows, blocks] or null
    float* workspace;          // [threads, rows, 128]
    int64_t rows, x_stride, logits_stride, outputs, blocks;
    float scale;
};

// out[t] = rint(x[t] / scale[t]) as int8 in [-127, 127], filled up with zeros to the next multiple of 64. A row of zeros, or of numbers
// below 1e-30, has scale 0 and zeros.
struct Quantize {
    const void* x;    // [rows, inner]
    float* scale;     // [rows]: written, the largest magnitude of the row / 127; or read, if given_scale
    int8_t* out;      // [rows, out_stride], or null: only the scales are written
    int64_t rows, inner, x_stride, out_stride;
    int32_t x_dtype, given_scale;
};

enum NormKind : int32_t { RMS_NORM = 0, LAYER_NORM = 1 };

// out = norm(x), or with a residual stream sum = x + residual, rounded, and out = norm(sum). `out` may be `x`, `sum` may be
// `residual`. Called by layers/norm.py; with `quantize` by models/native_stage.py.
struct Norm {
    const void* x;         // [rows, width]
    const void* residual;  // [rows, width] or null
    void* sum;             // [rows, width] where there is a residual
    void* out;             // [rows, width]
    const void* weight;    // [width] or null, of `dtype`
    const void* bias;      // [width] or null, of `dtype`; layer norm only
    int64_t rows, width, x_stride, residual_stride, sum_stride, out_stride;
    const Quantize* quantize;  // null, or what becomes of each row of `out`, which is its `x`
    float eps, offset;     // `offset` is added to the weight of an RMS norm, in float32
    int32_t dtype, kind;
};

// The query, key or value heads of the rows of a step: where they are, where they go, and the weight of the norm of each head.
struct Heads {
    const void* from;   // [rows, count, dim]
    void* to;           // [rows, count, dim] or [slots, count, dim]; may be `from`
    const void* norm;   // [dim] or null, of the step's dtype
    int64_t count, dim, from_stride, from_head_stride, to_stride, to_head_stride;
};

// Per head of queries and keys: RMS norm, rounded, and rotation, rounded; values are copied. With `slots` row r of keys and
// values goes to row slots[r] of the cache, rows from `written` on and negative slots nowhere. Without, to row r. A cache of int8
// has the form of kv_int8.h. Called by layers/attention.py (all of it), layers/rope.py (rotation) and attention/paged.py (writes).
struct Qkv {
    Heads q, k, v;                // a count of 0: none
    const int64_t* positions;     // [rows]; null: no rotation
    const float *cos, *sin;       // [positions, frequencies]
    const int64_t* slots;         // [written] or null
    int64_t rows, written, frequencies;
    float eps, offset;
    int32_t dtype, interleaved;   // `interleaved`: channels 2 c and 2 c + 1 rotate; they come out as c and c + frequencies
    int32_t cache_dtype;          // of where keys and values go: `dtype` or INT8
};

enum ActivationKind : int32_t { SILU_MUL = 0, GELU_TANH_MUL, CLAMPED_SWIGLU, SILU, GELU, GELU_TANH, RELU };

// out = activation(x). The gated kinds (up to CLAMPED_SWIGLU) have rows of x with the gate first, then as many numbers to multiply
// by. `out` may be `x`. Called by layers/activation.py; with `quantize` by models/native_stage.py.
struct Activation {
    const void* x;  // [rows, width], gated [rows, 2 width]
    void* out;      // [rows, width]
    int64_t rows, width, x_stride, out_stride;
    const Quantize* quantize;  // null, or what becomes of each row of `out`, which is its `x`
    float alpha, limit;  // of CLAMPED_SWIGLU
    int32_t dtype, kind;
};

// Attention of `rows` rows over the paged keys and values of their own requests. Request r owns rows [query_starts[r],
// query_starts[r + 1]), the last of them at position context_lens[r] - 1; position p is entry p % block_size of block
// tables[r][p / block_size]; a row at position p sees (p - window, p]. Rows past the last request's become zero.
struct Attention {
    const void *q, *k, *v;  // [rows, heads, k_dim], [blocks, block_size, kv_heads, k_dim], [.., v_dim]; v may be a view of k
    void* out;              // [rows, heads, v_dim]
    const float* sinks;     // [heads] or null
    const int32_t *query_starts, *context_lens, *tables;
    void* workspace;  // for the parts of a context that is divided among threads; null: none is
    int64_t workspace_bytes;
    int64_t rows, requests, table_stride;
    int64_t heads, kv_heads, k_dim, v_dim, block_size;
    int64_t window;  // 0: a row sees all positions up to its own
    int64_t q_strides[2], out_strides[2];  // of a row, of a head
    int64_t k_strides[3], v_strides[3];    // of a block, of an entry, of a head
    float scale, cap;                      // cap 0: none
    int32_t dtype, kv_dtype;               // of q and out; of k and v: the same, or INT8, see kv_int8.h
    int64_t k_scale, v_scale;              // with INT8, where the scale lies in a head of a position, in bytes
};

// The page of parallel/shm.py as one rank sees it; its layout and its rules are there. Both sides use this one `round`, so that
// collectives of either may follow each other.
struct Page {
    char* counters;      // [ranks], a cache line each: the last round that the rank has published
    char* slots;         // [2][ranks][slot_bytes]
    int64_t slot_bytes;
    int64_t round;       // the last round that this rank has begun
    int64_t done;        // numbers of a tensor that are summed when its call has stopped
    int32_t waiting;     // 1: the call has stopped after publishing `round`, before all others had
    int32_t ranks, index;
};

enum Reduction : int32_t { SUM = 0, MAX };

// x = the sum of the ranks' x in rank order, each step rounded; then the norm of the sum, if any. Or the maximum, of INT32 only. When a peer does not come within
// some milliseconds the list of calls stops here, to be called again from here: the caller looks meanwhile who is still alive.
// Called by parallel/shm.py and models/native_stage.py.
struct AllReduce {
    Page* page;
    void* x;           // [rows, width], contiguous
    const Norm* norm;  // null, or a norm of as many rows whose `x` is this one's
    int64_t rows, width;
    int32_t dtype, reduction;
};

// The largest x[t][n] / temperature[t] + log(sums[t][n]) + noise and its lowest n; a temperature of 0 counts as 1. The noise is
// Gumbel's, -log(-log(u)), u in (0, 1) from Philox with the row's seed as key and (id, position, choice, level) as counter, where
// id = first + first_of_row[t] + n is below 2^32. Called by sampler/draw.py.
struct GumbelMax {
    const float* x;                           // [rows, count]
    const double* sums;                       // [rows, count], each 0 or normal; or null: no logarithm is added
    const float* temperature;                 // [rows]
    const int64_t *seed, *position, *choice;  // [rows]
    const int64_t* first_of_row;              // [rows], or null for zeros
    double* value;                            // [rows]
    int64_t* index;                           // [rows]
    int64_t rows, count, x_stride, first;
    int32_t level;
};

// out[t] = sums[t] * (scale[t] * weight scales) + bias, in float32 and rounded once, where sums[t] = x[t] @ weight.T as integers.
// PRODUCT_INT8 takes `x` as int8 rows of QUANTIZE, RESCALE_INT8 as the int32 sums themselves [rows, N].
struct ProductInt8 {
    const PackedHead* weight;
    const void* x;
    const float* scale;  // [rows]
    const float* bias;   // [N] or null
    void* out;           // [rows, N]; of INT32: the sums, and scale and bias are not read
    int64_t rows, x_stride, out_stride;
    int32_t out_dtype;
};

// Products of several int8 matrices of one shape, `weight_bytes` apart: rows [ends[g - 1], ends[g]) belong to group g.
struct GroupedProductInt8 {
    const char* weights;
    const int32_t* ends;
    const int8_t* x;     // of QUANTIZE
    const float* scale;  // [rows]
    const float* bias;   // [groups, N] or null
    void* out;           // [rows, N]
    int64_t groups, weight_bytes, x_stride, out_stride;
    int32_t out_dtype;
};

// The ids of some rows whose bits are not set become -inf: bit i % 32 of word i / 32 is of id i.
struct MaskBits {
    float* logits;        // [..., vocab]
    const int64_t* row;   // [rows]: which rows of `logits`
    const int32_t* bits;  // [rows, at least vocab / 32 words]
    int64_t rows, vocab, stride, bits_stride;
};

// Lowers the logits of tokens that a sequence has: by repetition the tokens [0, position), by frequency and presence those of them
// from `prompt` on.
struct Penalize {
    float* logits;               // [..., vocab]
    const int64_t* row;          // [rows]: which rows of `logits` and `tokens`
    const int32_t* tokens;       // [..., history]
    const int64_t *position, *prompt;                    // [rows]
    const float *presence, *frequency, *repetition;      // [rows]
    int64_t rows, vocab, stride, history, tokens_stride;
};

// Ids become -inf by min-p, then by top-k, then by top-p, of the distribution with temperature. Ties go to the lowest id.
struct Truncate {
    float* logits;              // [..., vocab]
    const int64_t* row;         // [rows]: which rows of `logits`
    const float* temperature;   // [rows], positive for rows with min-p or top-p
    const double* log_min_p;    // [rows], -inf: off
    const int64_t* top_k;       // [rows], 0: off
    const double* top_p;        // [rows], 1: off
    int64_t rows, vocab, stride;
};
