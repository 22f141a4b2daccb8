// The C interface of the library: plain structs, called by kernels/tpserve_kernels/cpu.py.
//
// Sizes are in elements unless a name says bytes. A struct here and its ctypes twin in cpu.py have the same fields in the same order.
#pragma once

#include <stdint.h>

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

// The instruction sets, in rising order. On an x86-64 processor each includes those before it.
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };

// What `Call` can ask for; each has a struct of arguments below.
enum Operation : int32_t { PRODUCT = 0, ATTENTION, NUM_OPERATIONS };

// One operation with its arguments. A list of calls runs in order, all of it in one parallel region.
struct Call {
    int32_t operation;
    const void* arguments;
};

// The head of a packed matrix [N, K]. It is followed by panels of 16 outputs, the last one filled up with zeros:
//   float32   [K][16]
//   bfloat16  [K / 2][16][2], K filled up with zeros to a multiple of 32
// A packed matrix is position-independent and the same for every instruction set.
struct PackedHead {
    uint32_t magic, version;
    int32_t dtype, reserved;
    int64_t outputs, inner;
    int64_t panel_bytes;
    int64_t padding[3];
};
constexpr uint32_t PACKED_MAGIC = 0x57535054, PACKED_VERSION = 1;

// out[t] = x[t] @ weight.T + bias, summed in float32 in the order of K and rounded once.
struct Product {
    const PackedHead* weight;
    const void* x;      // [rows, K] of the weight's dtype
    const float* bias;  // [N] or null
    void* out;          // [rows, N]
    int64_t rows, x_stride, out_stride;
    int32_t out_dtype;
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
