// Products with packed matrices. Every output is one chain of sums in the order of K, whatever the number of rows, so the bits of
// a row never depend on its company.
//
// Forms, by dtype and instruction set:
//   float32                 multiply and add, 16 outputs at a time
//   bfloat16                the same on widened numbers; no product of two bfloat16 needs rounding
//   bfloat16, AVX512-BF16   pairs of K (VDPBF16PS)
//   bfloat16, AMX           tiles of 16 rows, 16 outputs and 32 of K (TDPBF16PS)
#pragma once

#include "api.h"
#include "share.h"
#include "scratch.h"
#include "tiles.h"
#include "vector.h"

namespace {

constexpr int VECTORS = PANEL / W;

#if defined(WIDE)
constexpr int MOST_ROWS = 12;
#else
constexpr int MOST_ROWS = 6;
#endif

INLINE const char* panel_of(const PackedHead* weight, int64_t panel) {
    return (const char*)(weight + 1) + panel * weight->panel_bytes;
}

// How the widened form reads two neighbours of K: `step` numbers of K at a time.
struct Float32 {
    typedef float number;
    static constexpr int STEP = 1;
    static INLINE V load_at(const char* panel, int64_t k, int vector, int) { return load<V>(panel + (k * PANEL + vector * W) * 4); }
};
struct Bfloat16 {
    typedef bf16 number;
    static constexpr int STEP = 2;
    static INLINE V load_at(const char* panel, int64_t k, int vector, int odd) {
        VU pairs = load<VU>(panel + (k / 2 * PANEL + vector * W) * 4);
        return (V)(odd ? pairs & 0xffff0000u : pairs << 16);
    }
};

// R rows by P panels, summed over all of K; `x` holds float32 rows of `stride`. `sums`: [R][P * PANEL].
template <class T, int R, int P>
static inline void widened_block(const char* panel, int64_t panel_bytes, const float* x, int64_t stride, int64_t inner, float* sums) {
    V acc[R][P * VECTORS] = {};
    for (int64_t k = 0; k < inner; k += T::STEP) {
        if (R < 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(panel + p * panel_bytes + k * PANEL * (4 / T::STEP) + 1024);
        UNROLL for (int odd = 0; odd < T::STEP; odd++) {
            V w[P * VECTORS];
            UNROLL for (int j = 0; j < P * VECTORS; j++) w[j] = T::load_at(panel + j / VECTORS * panel_bytes, k, j % VECTORS, odd);
            UNROLL for (int r = 0; r < R; r++) {
                V value = broadcast(x[r * stride + k + odd]);
                UNROLL for (int j = 0; j < P * VECTORS; j++) acc[r][j] = fma(w[j], value, acc[r][j]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < P * VECTORS; j++) store(sums + r * P * PANEL + j * W, acc[r][j]);
}

#if defined(BF16_PAIRS)
// The same on pairs of bfloat16: `x` holds rows of pairs, `stride` and `inner` count pairs.
template <int R, int P>
static inline void pairs_block(const char* panel, int64_t panel_bytes, const uint32_t* x, int64_t stride, int64_t inner, float* sums) {
    V acc[R][P] = {};
    for (int64_t k = 0; k < inner; k++) {
        if (R < 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(panel + p * panel_bytes + k * PANEL * 4 + 1024);
        VU w[P];
        UNROLL for (int p = 0; p < P; p++) w[p] = load<VU>(panel + p * panel_bytes + k * PANEL * 4);
        UNROLL for (int r = 0; r < R; r++) {
            VU value = x[r * stride + k] - (VU){};
            UNROLL for (int p = 0; p < P; p++) acc[r][p] = dot_pairs(acc[r][p], value, w[p]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) store(sums + (r * P + p) * PANEL, acc[r][p]);
}
#endif

// Writes the sums of some rows and panels to the output: adds the bias, rounds, leaves out what fills the last panel.
struct Finish {
    const Product& product;

    template <class Out>
    INLINE void row(Out* to, const float* sums, int64_t first, int64_t count) const {
        int64_t at = 0;
        for (; at + W <= count; at += W) {
            V value = load<V>(sums + at);
            if (product.bias) value = value + load<V>(product.bias + first + at);
            write(to + first + at, value);
        }
        for (; at < count; at++) write1(to + first + at, product.bias ? sums[at] + product.bias[first + at] : sums[at]);
    }

    // `sums`: [rows][panels * PANEL], of rows from `row0` and panels from `panel0` on.
    void operator()(const float* sums, int64_t row0, int rows, int64_t panel0, int panels) const {
        int64_t first = panel0 * PANEL, count = panels * PANEL;
        if (first + count > product.weight->outputs) count = product.weight->outputs - first;
        for (int r = 0; r < rows; r++) {
            if (product.out_dtype == FLOAT32)
                row((float*)product.out + (row0 + r) * product.out_stride, sums + r * panels * PANEL, first, count);
            else
                row((bf16*)product.out + (row0 + r) * product.out_stride, sums + r * panels * PANEL, first, count);
        }
    }
};

// Walks over rows [0, rows) and panels [begin, end) of one chunk of rows. `Block::run<R, P>(panel, row, sums)` computes one block.
template <class Sum = float, class Block, class Done>
static inline void walk(const Block& block, int64_t rows, int64_t row0, int64_t begin, int64_t end, const Done& done) {
    alignas(64) Sum sums[MOST_ROWS * 8 * PANEL];
#define BLOCKS(R, P)                                      \
    for (; panel + (P) <= end; panel += (P)) {            \
        block.template run<R, P>(panel, row, sums);       \
        done(sums, row0 + row, R, panel, P);              \
    }
    if (rows <= 3) {  // many panels at once, to have enough loads on the way
        for (int64_t row = 0; row < rows;) {
            int64_t panel = begin;
            if (rows - row >= 2) {
#if defined(WIDE)
                BLOCKS(2, 4)
#endif
                BLOCKS(2, 2)
                BLOCKS(2, 1)
                row += 2;
            } else {
#if defined(WIDE)
                BLOCKS(1, 8)
#endif
                BLOCKS(1, 4)
                BLOCKS(1, 1)
                row += 1;
            }
        }
        return;
    }
#if defined(WIDE)
    constexpr int P = 2;
#else
    constexpr int P = 1;
#endif
    for (int64_t first = begin; first < end;) {
        int64_t count = end - first >= P ? P : 1, panel = first;
        for (int64_t row = 0; row < rows; panel = first) {
            int64_t left = rows - row;
#define ROWS(R)                                                                 \
    {                                                                           \
        if (count == P) block.template run<R, P>(panel, row, sums);             \
        else block.template run<R, 1>(panel, row, sums);                        \
        done(sums, row0 + row, R, panel, count);                                \
        row += R;                                                               \
    }
            if (left >= MOST_ROWS) ROWS(MOST_ROWS)
            else if (left >= 4) ROWS(4)
            else if (left >= 2) ROWS(2)
            else ROWS(1)
#undef ROWS
        }
        first += count;
    }
#undef BLOCKS
}

template <class T>
struct WidenedBlock {
    const PackedHead* weight;
    const float* x;
    int64_t stride;

    template <int R, int P>
    void run(int64_t panel, int64_t row, float* sums) const {
        widened_block<T, R, P>(panel_of(weight, panel), weight->panel_bytes, x + row * stride, stride, stride, sums);
    }
};

#if defined(BF16_PAIRS)
struct PairsBlock {
    const PackedHead* weight;
    const uint32_t* x;
    int64_t stride;

    template <int R, int P>
    void run(int64_t panel, int64_t row, float* sums) const {
        pairs_block<R, P>(panel_of(weight, panel), weight->panel_bytes, x + row * stride, stride, stride, sums);
    }
};
#endif

// The numbers of K that a product runs over: those of the packed matrix, zeros included.
INLINE int64_t filled_inner(const PackedHead* weight) {
    return weight->dtype == BFLOAT16 ? (weight->inner + 31) / 32 * 32 : weight->inner;
}

// Rows that fit half of a core's cache together, so that a panel serves them all before the next one comes.
INLINE int64_t chunk_rows(int64_t row_bytes) {
    int64_t rows = CHUNK_BYTES / row_bytes / MOST_ROWS * MOST_ROWS;
    return rows < MOST_ROWS ? MOST_ROWS : rows;
}

// Copies rows of x as To, filled up with zeros to `filled` numbers.
template <class To, class From>
static void gather_rows(To* to, const From* from, int64_t rows, int64_t stride, int64_t inner, int64_t filled) {
    for (int64_t r = 0; r < rows; r++, from += stride, to += filled) {
        if (sizeof(To) == sizeof(From)) {
            memcpy(to, from, inner * sizeof(To));
        } else {
            int64_t k = 0;
            for (; k + W <= inner; k += W) store(to + k, read(from + k));
            for (; k < inner; k++) write1((float*)to + k, read1(from + k));
        }
        if (filled > inner) memset(to + inner, 0, (filled - inner) * sizeof(To));
    }
}

template <class T, class Done>
static void widened(const PackedHead* weight, const void* x, int64_t rows, int64_t stride, int64_t begin, int64_t end, const Done& done) {
    int64_t filled = filled_inner(weight), step = chunk_rows(filled * 4);
    float* copy = (float*)scratch(step * filled * 4);
    for (int64_t row = 0; row < rows; row += step) {
        int64_t count = rows - row < step ? rows - row : step;
        gather_rows(copy, (const typename T::number*)x + row * stride, count, stride, weight->inner, filled);
        walk(WidenedBlock<T>{weight, copy, filled}, count, row, begin, end, done);
    }
}

// The product of rows with panels [begin, end), each block of sums handed to `done`.
template <class Done>
static void product_panels(const PackedHead* weight, const void* x, int64_t rows, int64_t stride, int64_t begin, int64_t end, const Done& done) {
    if (rows == 0 || begin >= end) return;
    if (weight->dtype == FLOAT32) return widened<Float32>(weight, x, rows, stride, begin, end, done);
#if defined(TILES)
    return tiled(weight, (const bf16*)x, rows, stride, begin, end, done);
#elif defined(BF16_PAIRS)
    int64_t filled = filled_inner(weight), step = chunk_rows(filled * 2);
    bf16* copy = (bf16*)scratch(step * filled * 2);
    for (int64_t row = 0; row < rows; row += step) {
        int64_t count = rows - row < step ? rows - row : step;
        gather_rows(copy, (const bf16*)x + row * stride, count, stride, weight->inner, filled);
        walk(PairsBlock{weight, (const uint32_t*)copy, filled / 2}, count, row, begin, end, done);
    }
#else
    return widened<Bfloat16>(weight, x, rows, stride, begin, end, done);
#endif
}

INLINE int64_t panels_of(const PackedHead* weight) { return (weight->outputs + PANEL - 1) / PANEL; }

static void product(const Product& product, const Team& team) {
    Share share(panels_of(product.weight), 2, team);
    product_panels(product.weight, product.x, product.rows, product.x_stride, share.begin, share.end, Finish{product});
}

// The product of group g.
INLINE Product product_of(const GroupedProduct& all, int64_t g) {
    const PackedHead* weight = (const PackedHead*)(all.weights + g * all.weight_bytes);
    int64_t first = all.ends ? (g ? all.ends[g - 1] : 0) : 0, last = all.ends ? all.ends[g] : all.rows;
    int64_t x = all.ends ? first * all.x_stride : g * all.x_group, out = all.ends ? first * all.out_stride : g * all.out_group;
    int64_t x_size = weight->dtype == BFLOAT16 ? 2 : 4, out_size = all.out_dtype == BFLOAT16 ? 2 : 4;
    return {weight, (const char*)all.x + x * x_size, all.bias ? all.bias + g * weight->outputs : nullptr,
            (char*)all.out + out * out_size, last - first, all.x_stride, all.out_stride, all.out_dtype};
}

// A panel of few rows costs its bytes, of many its rows.
template <class One>
INLINE int64_t cost_of(const One& product) { return product.rows ? panels_of(product.weight) * (product.rows + 8) : 0; }

// Divides the products product_at(0), ... among the threads by their costs: this thread runs `run(product, begin, end)` on its panels.
template <class At, class Run>
static void divide_products(int64_t groups, const Team& team, const At& product_at, const Run& run) {
    int64_t total = 0, before = 0;
    for (int64_t g = 0; g < groups; g++) total += cost_of(product_at(g));
    int64_t begin = total * team.thread / team.threads, end = total * (team.thread + 1) / team.threads;
    for (int64_t g = 0; g < groups; g++) {
        auto product = product_at(g);
        int64_t cost = cost_of(product), panels = panels_of(product.weight);
        if (!cost) continue;
        // A panel belongs to the thread in whose part of all costs it begins; borders are rounded alike on both sides.
        auto panel_at = [&](int64_t at) {
            int64_t panel = at <= before ? 0 : at >= before + cost ? panels : (at - before) * panels / cost;
            return panel == panels ? panel : panel / 2 * 2;
        };
        run(product, panel_at(begin), panel_at(end));
        before += cost;
    }
}

static void grouped_product(const GroupedProduct& all, const Team& team) {
    auto run = [](const Product& product, int64_t begin, int64_t end) {
        product_panels(product.weight, product.x, product.rows, product.x_stride, begin, end, Finish{product});
    };
    divide_products(all.groups, team, [&](int64_t g) { return product_of(all, g); }, run);
}

}  // namespace
