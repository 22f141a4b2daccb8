// Products with packed matrices. Every output is one chain of sums in the order of K, whatever the number of rows, so the bits of
// a row never depend on its company.
//
// Forms, by dtype and instruction set:
//   float32                 multiply and add, 16 outputs at a time
//   bfloat16                the same on widened numbers; no product of two bfloat16 needs rounding
//   bfloat16, AVX512-BF16   pairs of K (VDPBF16PS), the odd one first
//   bfloat16, AMX           tiles of 16 rows, 16 outputs and 32 of K (TDPBF16PS): a chain of their even and one of their odd numbers
#pragma once

#include "api.h"
#include "tiles.h"
#include "vector.h"
#include "walk.h"

namespace {

// The numbers of K that a product runs over: those of the packed matrix, zeros included.
INLINE int64_t filled_inner(const PackedHead* weight) {
    return weight->dtype == BFLOAT16 ? (weight->inner + 31) / 32 * 32 : weight->inner;
}

// What the forms below have in common: rows of `inner` numbers as `units` units of 32 bits.
template <class Form, class Number_, class Sum_>
struct FormOf {
    typedef Number_ Number;
    typedef Sum_ Sum;
    static constexpr int STEP = 1;        // units that are read at once
    static constexpr int UNIT = 1;        // numbers of a unit
    static constexpr int UNIT_BYTES = 64;  // of a unit of a panel

    const PackedHead* weight;
    int64_t inner, units;

    FormOf(const PackedHead* weight, int64_t units) : weight(weight), inner(weight->inner), units(units) {}

    template <int P>
    INLINE Span<Form> span(int64_t panel, int64_t begin, int64_t count) const {
        return {begin, count, panel_of(weight, panel) + begin * Form::UNIT_BYTES, weight->panel_bytes, (const Sum*)NOTHING};
    }
};

// Sums in float32 by multiply and add.
template <class Form, class Number>
struct MultiplyAdd : FormOf<Form, Number, float> {
    typedef V Vector;
    typedef V Weights;
    typedef V Row;
    using FormOf<Form, Number, float>::FormOf;

    static INLINE V row(uint32_t unit) { return (V)(unit - (VU){}); }
    static INLINE V dot(V acc, V x, V w) { return fma(w, x, acc); }
};

struct Float32 : MultiplyAdd<Float32, float> {
    explicit Float32(const PackedHead* weight) : MultiplyAdd(weight, weight->inner) {}
    static INLINE uint32_t unit(const float* x) { return load<uint32_t>(x); }
    static INLINE V weights(const char* at, int vector, int) { return load<V>(at + vector * W * 4); }
};

// Weights are widened as they are multiplied, two neighbours of K after each other.
struct Bfloat16 : MultiplyAdd<Bfloat16, bf16> {
    static constexpr int STEP = 2, UNIT_BYTES = 32;

    explicit Bfloat16(const PackedHead* weight) : MultiplyAdd(weight, filled_inner(weight)) {}
    static INLINE uint32_t unit(const bf16* x) { return (uint32_t)*x << 16; }
    static INLINE V weights(const char* at, int vector, int odd) {
        VU pairs = load<VU>(at + vector * W * 4);
        return (V)(odd ? pairs & 0xffff0000u : pairs << 16);
    }
};

#if defined(BF16_PAIRS)
// A unit is a pair of neighbours.
struct Pairs : FormOf<Pairs, bf16, float> {
    typedef V Vector;
    typedef VU Weights;
    typedef VU Row;
    static constexpr int UNIT = 2;

    explicit Pairs(const PackedHead* weight) : FormOf(weight, filled_inner(weight) / 2) {}
    static INLINE uint32_t unit(const bf16* x) { return load<uint32_t>(x); }
    static INLINE VU row(uint32_t unit) { return unit - (VU){}; }
    static INLINE VU weights(const char* at, int, int) { return load<VU>(at); }
    static INLINE V dot(V acc, VU x, VU w) { return dot_pairs(acc, x, w); }
};
#endif

// Writes the sums of some rows and panels to the output: adds the bias, rounds, leaves out what fills the last panel.
struct Finish {
    const Product& product;

    template <class Out>
    INLINE void panel(Out* to, const float* sums, int64_t first) const {
        int64_t at = 0, count = product.weight->outputs - first < PANEL ? product.weight->outputs - first : PANEL;
        for (; at + W <= count; at += W) {
            V value = load<V>(sums + at);
            if (product.bias) value = value + load<V>(product.bias + first + at);
            write(to + first + at, value);
        }
        for (; at < count; at++) write1(to + first + at, product.bias ? sums[at] + product.bias[first + at] : sums[at]);
    }

    // Of rows from `row0` and panels from `panel0` on: `sums` [rows][PANEL], those of the next panel `panel_sums` further.
    void operator()(const float* sums, int64_t panel_sums, int64_t row0, int64_t rows, int64_t panel0, int64_t panels) const {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t p = 0; p < panels; p++) {
                const float* from = sums + p * panel_sums + r * PANEL;
                int64_t row = (row0 + r) * product.out_stride;
                if (product.out_dtype == FLOAT32) panel((float*)product.out + row, from, (panel0 + p) * PANEL);
                else panel((bf16*)product.out + row, from, (panel0 + p) * PANEL);
            }
    }
};

// Calls `each(row, count, chunk)` for chunks [row, row + count) of the rows; chunk(begin, end, done) computes their product with panels
// [begin, end) and hands blocks of sums to `done`, as `Finish` takes them.
template <class Each>
static void in_chunks(const PackedHead* weight, const void* x, int64_t rows, int64_t stride, const Each& each) {
    if (rows == 0) return;
    if (weight->dtype == FLOAT32) return in_chunks(Float32(weight), x, rows, stride, each);
#if defined(TILES)
    tiled(weight, (const bf16*)x, rows, stride, each);
#elif defined(BF16_PAIRS)
    in_chunks(Pairs(weight), x, rows, stride, each);
#else
    in_chunks(Bfloat16(weight), x, rows, stride, each);
#endif
}

// The product of rows with panels [begin, end).
static void product_panels(const Product& product, int64_t begin, int64_t end) {
    if (begin >= end) return;
    auto each = [&](int64_t, int64_t, const auto& chunk) { chunk(begin, end, Finish{product}); };
    in_chunks(product.weight, product.x, product.rows, product.x_stride, each);
}

static void product(const Product& all, const Team& team) {
    Division mine(all.rows, panels_of(all.weight), team);
    Product part = all;
    int64_t item = all.weight->dtype == BFLOAT16 ? 2 : 4, out_item = all.out_dtype == BFLOAT16 ? 2 : 4;
    part.x = (const char*)all.x + mine.rows.begin * all.x_stride * item;
    part.out = (char*)all.out + mine.rows.begin * all.out_stride * out_item;
    part.rows = mine.rows.end - mine.rows.begin;
    product_panels(part, mine.panels.begin, mine.panels.end);
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
    divide_products(all.groups, team, [&](int64_t g) { return product_of(all, g); }, product_panels);
}

}  // namespace
