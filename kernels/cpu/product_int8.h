// Products of int8 rows with int8 matrices. Integer sums are exact in any order, so every instruction set, number of threads and number
// of rows gives the same bits: what follows them is one formula.
//
// Forms, by instruction set:
//   portable        products of neighbours in int16, which hold two of them (2 * 127 * 127 = 32,258)
//   AVX2            the same in one instruction (VPMADDUBSW) on the magnitude of the weight and the row with the weight's sign
//   AVX-512 (VNNI)  VPDPBUSD on the row plus 128; 128 times the sum of an output's weights is taken off before
//   AMX             tiles of 16 rows, 16 outputs and 64 of K (TDPBSSD)
#pragma once

#include "product.h"
#include "quantize.h"

namespace {

typedef int16_t VS __attribute__((vector_size(W * 4)));  // 2 * W lanes

// The form of walk.h: a unit is four neighbours of K.
struct Quads : FormOf<Quads, int8_t, int32_t> {
    typedef VI Vector;
    static constexpr int UNIT = 4;

    explicit Quads(const PackedHead* weight) : FormOf(weight, (weight->inner + 63) / 64 * 16) {}
#if defined(WIDE)
    typedef VI Weights;
    typedef VI Row;

    // Rows are taken plus 128, for which sums start with minus 128 times the sum of an output's weights.
    static INLINE uint32_t unit(const int8_t* x) { return load<uint32_t>(x) ^ 0x80808080u; }
    static INLINE VI row(uint32_t unit) { return (VI)(unit - (VU){}); }
    static INLINE VI weights(const char* at, int, int) { return load<VI>(at); }
    template <int P>
    INLINE Span<Quads> span(int64_t panel, int64_t begin, int64_t count) const {
        for (int p = 0; p < P && begin == 0; p++) store(start + p * PANEL, load<VU>(panel_of(weight, panel + p + 1) - 64) * -128u);
        return {begin, count, panel_of(weight, panel) + begin * UNIT_BYTES, weight->panel_bytes, start};
    }
    alignas(64) mutable int32_t start[8 * PANEL];
#if defined(EMULATED)
    static INLINE VI dot(VI acc, VI x, VI w) {
        for (int i = 0; i < W; i++)
            for (int shift = 0; shift < 32; shift += 8)
                acc[i] = (uint32_t)acc[i] + (uint32_t)((uint8_t)(x[i] >> shift) * (int8_t)(w[i] >> shift));
        return acc;
    }
#else
    static INLINE VI dot(VI acc, VI x, VI w) {
        asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));  // on itself: gcc spills a converted copy
        return acc;
    }
#endif
#elif defined(__AVX2__)
    struct Weights {
        VI bytes, magnitude;
        friend INLINE void hold(Weights&) {}  // there are not enough registers
    };
    typedef VI Row;

    static INLINE uint32_t unit(const int8_t* x) { return load<uint32_t>(x); }
    static INLINE VI row(uint32_t unit) { return (VI)(unit - (VU){}); }
    static INLINE Weights weights(const char* at, int vector, int) {
        VI bytes = load<VI>(at + vector * W * 4);
        return {bytes, (VI)_mm256_abs_epi8((__m256i)bytes)};
    }
    static INLINE VI dot(VI acc, VI x, const Weights& w) {
        __m256i pairs = _mm256_maddubs_epi16((__m256i)w.magnitude, _mm256_sign_epi8((__m256i)x, (__m256i)w.bytes));
        return acc + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#else
    struct Weights {
        VS low, high;  // the even neighbours and the odd
        friend INLINE void hold(Weights&) {}
    };
    typedef Weights Row;

    static INLINE uint32_t unit(const int8_t* x) { return load<uint32_t>(x); }
    static INLINE Weights split(VU bytes) { return {(VS)(bytes << 8 & 0xff00ff00u) >> 8, (VS)bytes >> 8}; }
    static INLINE Row row(uint32_t unit) { return split(unit - (VU){}); }
    static INLINE Weights weights(const char* at, int vector, int) { return split(load<VU>(at + vector * W * 4)); }
    static INLINE VI dot(VI acc, const Row& x, const Weights& w) {
        VI pairs = (VI)(x.low * w.low + x.high * w.high);
        return acc + (pairs >> 16) + ((VI)((VU)pairs << 16) >> 16);
    }
#endif
};

// Writes sums, or the numbers that they stand for.
struct FinishInt8 {
    const ProductInt8& product;

    template <class Out>
    INLINE void numbers(Out* to, const int32_t* sums, float scale, const float* scales, const float* bias, int64_t count) const {
        int64_t n = 0;
        for (; n + W <= count; n += W) {
            V value = __builtin_convertvector(load<VI>(sums + n), V) * (load<V>(scales + n) * scale);
            write(to + n, bias ? value + load<V>(bias + n) : value);
        }
        for (; n < count; n++) {
            float value = (float)sums[n] * (scales[n] * scale);
            write1(to + n, bias ? value + bias[n] : value);
        }
    }

    void panel(const int32_t* sums, int64_t row, int64_t panel) const {
        const PackedHead* weight = product.weight;
        int64_t first = panel * PANEL, count = weight->outputs - first < PANEL ? weight->outputs - first : PANEL;
        int64_t at = row * product.out_stride + first;
        if (product.out_dtype == INT32) {
            memcpy((int32_t*)product.out + at, sums, count * 4);
            return;
        }
        const float* scales = (const float*)(panel_of(weight, panel + 1) - 128);
        const float* bias = product.bias ? product.bias + first : nullptr;
        if (product.out_dtype == FLOAT32) numbers((float*)product.out + at, sums, product.scale[row], scales, bias, count);
        else numbers((bf16*)product.out + at, sums, product.scale[row], scales, bias, count);
    }

    // Of rows from `row0` and panels from `panel0` on: `sums` [rows][PANEL], those of the next panel `panel_sums` further.
    void operator()(const int32_t* sums, int64_t panel_sums, int64_t row0, int64_t rows, int64_t panel0, int64_t panels) const {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t p = 0; p < panels; p++) panel(sums + p * panel_sums + r * PANEL, row0 + r, panel0 + p);
    }
};

static void product_int8_panels(const ProductInt8& product, int64_t begin, int64_t end) {
    if (product.rows == 0 || begin >= end) return;
    FinishInt8 done{product};
#if defined(TILES)
    int64_t filled = (product.weight->inner + 63) / 64 * 64;
    tiled_rows<TilesOfInt8>(product.weight, (const int8_t*)product.x, product.rows, product.x_stride, filled, begin, end, done);
#else
    auto each = [&](int64_t, int64_t, const auto& chunk) { chunk(begin, end, done); };
    in_chunks(Quads(product.weight), product.x, product.rows, product.x_stride, each);
#endif
}

static void product_int8(const ProductInt8& all, const Team& team) {
    Division mine(all.rows, panels_of(all.weight), team);
    ProductInt8 part = all;
    int64_t item = all.out_dtype == BFLOAT16 ? 2 : 4;
    part.x = (const int8_t*)all.x + mine.rows.begin * all.x_stride;
    part.scale = all.scale ? all.scale + mine.rows.begin : nullptr;
    part.out = (char*)all.out + mine.rows.begin * all.out_stride * item;
    part.rows = mine.rows.end - mine.rows.begin;
    product_int8_panels(part, mine.panels.begin, mine.panels.end);
}

static void rescale_int8(const ProductInt8& product, const Team& team) {
    Share share(panels_of(product.weight), 1, team);
    FinishInt8 done{product};
    for (int64_t row = 0; row < product.rows; row++)
        for (int64_t panel = share.begin; panel < share.end; panel++)
            done.panel((const int32_t*)product.x + row * product.x_stride + panel * PANEL, row, panel);
}

// The product of group g.
INLINE ProductInt8 product_of(const GroupedProductInt8& all, int64_t g) {
    int64_t first = g ? all.ends[g - 1] : 0, size = all.out_dtype == BFLOAT16 ? 2 : 4;
    const PackedHead* weight = (const PackedHead*)(all.weights + g * all.weight_bytes);
    return {weight, all.x + first * all.x_stride, all.scale + first, all.bias ? all.bias + g * weight->outputs : nullptr,
            (char*)all.out + first * all.out_stride * size, all.ends[g] - first, all.x_stride, all.out_stride, all.out_dtype};
}

static void grouped_product_int8(const GroupedProductInt8& all, const Team& team) {
    divide_products(all.groups, team, [&](int64_t g) { return product_of(all, g); }, product_int8_panels);
}

}  // namespace
