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
constexpr int64_t CHUNK = 96;  // rows that share one reading of a panel from memory
constexpr int64_t GROUP = 4;   // panels that share one reading of the rows
constexpr int64_t SPAN = 512;  // numbers of K that are summed before the next rows or panels have their turn

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

// Sums of R rows by P panels, [R][P * PANEL] float32 or int32, to which a span of K is added. `Vector`: W of them.
template <class Vector, int R, int P>
struct Sums {
    Vector acc[R][P * VECTORS];

    template <class Sum>
    INLINE Sums(const Sum* from, bool fresh) {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < P * VECTORS; j++) acc[r][j] = fresh ? Vector{} : load<Vector>(from + r * P * PANEL + j * W);
    }
    template <class Sum>
    INLINE void keep(Sum* to) const {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < P * VECTORS; j++) store(to + r * P * PANEL + j * W, acc[r][j]);
    }
};

// A span [begin, end) of K, a multiple of 2 but for the last of float32.
struct Span {
    int64_t begin, end;
};

// Adds a span to R rows by P panels; `x` holds float32 rows of `stride`.
template <class T, int R, int P>
static void widened_block(const char* panel, int64_t panel_bytes, const float* x, int64_t stride, Span span, float* sums) {
    Sums<V, R, P> block(sums, span.begin == 0);
    for (int64_t k = span.begin; k < span.end; k += T::STEP) {
        if (R < 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(panel + p * panel_bytes + k * PANEL * (4 / T::STEP) + 1024);
        UNROLL for (int odd = 0; odd < T::STEP; odd++) {
            V w[P * VECTORS];
            UNROLL for (int j = 0; j < P * VECTORS; j++) w[j] = T::load_at(panel + j / VECTORS * panel_bytes, k, j % VECTORS, odd);
            UNROLL for (int r = 0; r < R; r++) {
                V value = broadcast(x[r * stride + k + odd]);
                UNROLL for (int j = 0; j < P * VECTORS; j++) block.acc[r][j] = fma(w[j], value, block.acc[r][j]);
            }
        }
    }
    block.keep(sums);
}

#if defined(BF16_PAIRS)
// The same on pairs of bfloat16: `x` holds rows of pairs, `stride` counts pairs.
template <int R, int P>
static void pairs_block(const char* panel, int64_t panel_bytes, const uint32_t* x, int64_t stride, Span span, float* sums) {
    Sums<V, R, P> block(sums, span.begin == 0);
    for (int64_t k = span.begin / 2; k < span.end / 2; k++) {
        if (R < 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(panel + p * panel_bytes + k * PANEL * 4 + 1024);
        VU w[P];
        UNROLL for (int p = 0; p < P; p++) w[p] = load<VU>(panel + p * panel_bytes + k * PANEL * 4);
        UNROLL for (int r = 0; r < R; r++) {
            VU value = x[r * stride + k] - (VU){};
            UNROLL for (int p = 0; p < P; p++) block.acc[r][p] = dot_pairs(block.acc[r][p], value, w[p]);
        }
    }
    block.keep(sums);
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
    void operator()(const float* sums, int64_t row0, int64_t rows, int64_t panel0, int panels) const {
        int64_t first = panel0 * PANEL, count = panels * PANEL;
        if (first + count > product.weight->outputs) count = product.weight->outputs - first;
        for (int64_t r = 0; r < rows; r++) {
            if (product.out_dtype == FLOAT32)
                row((float*)product.out + (row0 + r) * product.out_stride, sums + r * panels * PANEL, first, count);
            else
                row((bf16*)product.out + (row0 + r) * product.out_stride, sums + r * panels * PANEL, first, count);
        }
    }
};

// Few rows: many panels at once, to have enough loads on the way.
template <class Sum, class Block, class Done>
static void walk_few(const Block& block, int64_t rows, int64_t row0, int64_t begin, int64_t end, const Done& done) {
    alignas(64) Sum sums[2 * 8 * PANEL];
    Span all = {0, block.inner};
#define BLOCKS(R, P)                                      \
    for (; panel + (P) <= end; panel += (P)) {            \
        block.template run<R, P>(panel, row, all, sums);  \
        done(sums, row0 + row, R, panel, P);              \
    }
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
#undef BLOCKS
}

// Calls `each.template operator()<R>(row)` for blocks of up to MOST_ROWS rows.
template <class Each>
INLINE void in_blocks(int64_t rows, const Each& each) {
    for (int64_t row = 0; row < rows;) {
        int64_t left = rows - row;
        if (left >= MOST_ROWS) each.template run<MOST_ROWS>(row), row += MOST_ROWS;
        else if (left >= 4) each.template run<4>(row), row += 4;
        else if (left >= 2) each.template run<2>(row), row += 2;
        else each.template run<1>(row), row += 1;
    }
}

template <class Block, class Sum, int P>
struct AddSpan {
    const Block& block;
    int64_t panel;
    Span span;
    Sum* sums;
    template <int R>
    INLINE void run(int64_t row) const {
        block.template run<R, P>(panel, row, span, sums + row * P * PANEL);
    }
};

// Calls `each.template run<P>(panel)` for panels [begin, end), two at a time where registers are wide.
template <class Each>
INLINE void in_panels(int64_t begin, int64_t end, const Each& each) {
#if defined(WIDE)
    for (; begin + 2 <= end; begin += 2) each.template run<2>(begin);
#endif
    for (; begin < end; begin++) each.template run<1>(begin);
}

template <class Block, class Sum>
struct AddSpans {
    const Block& block;
    int64_t rows, first;
    Span span;
    Sum* sums;
    template <int P>
    INLINE void run(int64_t panel) const {
        in_blocks(rows, AddSpan<Block, Sum, P>{block, panel, span, sums + (panel - first) * rows * PANEL});
    }
};

template <class Done, class Sum>
struct EachDone {
    const Done& done;
    int64_t rows, row0, first;
    const Sum* sums;
    template <int P>
    INLINE void run(int64_t panel) const {
        done(sums + (panel - first) * rows * PANEL, row0, rows, panel, P);
    }
};

// Walks over `rows` rows and panels [begin, end); `sums` holds rows * GROUP * PANEL numbers. Of many rows a span of K stays in the
// second cache while a group of panels goes past it, and a span of each panel in the first while the rows do.
template <class Sum, class Block, class Done>
static void walk(const Block& block, int64_t rows, int64_t row0, int64_t begin, int64_t end, Sum* sums, const Done& done) {
    if (rows <= 3) return walk_few<Sum>(block, rows, row0, begin, end, done);
    for (int64_t first = begin; first < end; first += GROUP) {
        int64_t last = first + GROUP < end ? first + GROUP : end;
        for (int64_t k = 0; k < block.inner; k += SPAN) {
            Span span = {k, k + SPAN < block.inner ? k + SPAN : block.inner};
            in_panels(first, last, AddSpans<Block, Sum>{block, rows, first, span, sums});
        }
        in_panels(first, last, EachDone<Done, Sum>{done, rows, row0, first, sums});
    }
}

template <class T>
struct WidenedBlock {
    const PackedHead* weight;
    const float* x;
    int64_t stride, inner;

    template <int R, int P>
    void run(int64_t panel, int64_t row, Span span, float* sums) const {
        widened_block<T, R, P>(panel_of(weight, panel), weight->panel_bytes, x + row * stride, stride, span, sums);
    }
};

#if defined(BF16_PAIRS)
struct PairsBlock {
    const PackedHead* weight;
    const uint32_t* x;
    int64_t stride, inner;  // in pairs, in numbers

    template <int R, int P>
    void run(int64_t panel, int64_t row, Span span, float* sums) const {
        pairs_block<R, P>(panel_of(weight, panel), weight->panel_bytes, x + row * stride, stride, span, sums);
    }
};
#endif

// The numbers of K that a product runs over: those of the packed matrix, zeros included.
INLINE int64_t filled_inner(const PackedHead* weight) {
    return weight->dtype == BFLOAT16 ? (weight->inner + 31) / 32 * 32 : weight->inner;
}

// Copies rows of x as To, `to_stride` apart, filled up with zeros to `filled` numbers.
template <class To, class From>
static void gather_rows(To* to, int64_t to_stride, const From* from, int64_t rows, int64_t stride, int64_t inner, int64_t filled) {
    for (int64_t r = 0; r < rows; r++, from += stride, to += to_stride) {
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
    int64_t filled = filled_inner(weight), step = rows < CHUNK ? rows : CHUNK, copied = filled + LINE / 4;
    float* sums = (float*)scratch(step * (GROUP * PANEL + copied) * 4);
    float* copy = sums + step * GROUP * PANEL;
    for (int64_t row = 0; row < rows; row += step) {
        int64_t count = rows - row < step ? rows - row : step;
        gather_rows(copy, copied, (const typename T::number*)x + row * stride, count, stride, weight->inner, filled);
        walk(WidenedBlock<T>{weight, copy, copied, filled}, count, row, begin, end, sums, done);
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
    int64_t filled = filled_inner(weight), step = rows < CHUNK ? rows : CHUNK, copied = filled + LINE / 2;
    float* sums = (float*)scratch(step * (GROUP * PANEL * 4 + copied * 2));
    bf16* copy = (bf16*)(sums + step * GROUP * PANEL);
    for (int64_t row = 0; row < rows; row += step) {
        int64_t count = rows - row < step ? rows - row : step;
        gather_rows(copy, copied, (const bf16*)x + row * stride, count, stride, weight->inner, filled);
        walk(PairsBlock{weight, (const uint32_t*)copy, copied / 2, filled}, count, row, begin, end, sums, done);
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
