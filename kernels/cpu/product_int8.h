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

// Four neighbours of K at a time: `Quads` are those of W outputs, or of a row W times.

#if defined(WIDE)
typedef VI Quads;
INLINE Quads quads(VI bytes) { return bytes; }
#if defined(EMULATED)
INLINE VI dot_quads(VI acc, const Quads& x, const Quads& w) {
    for (int i = 0; i < W; i++)
        for (int shift = 0; shift < 32; shift += 8)
            acc[i] = (uint32_t)acc[i] + (uint32_t)((uint8_t)(x[i] >> shift) * (int8_t)(w[i] >> shift));
    return acc;
}
#else
INLINE VI dot_quads(VI acc, const Quads& x, const Quads& w) {
    __m512i sum = (__m512i)acc;
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"((__m512i)x), "v"((__m512i)w));
    return (VI)sum;
}
#endif
#elif defined(__AVX2__)
struct Quads {
    VI bytes, magnitude;
};
INLINE Quads quads(VI bytes) { return {bytes, (VI)_mm256_abs_epi8((__m256i)bytes)}; }
INLINE VI dot_quads(VI acc, const Quads& x, const Quads& w) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)w.magnitude, _mm256_sign_epi8((__m256i)x.bytes, (__m256i)w.bytes));
    return acc + (VI)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
struct Quads {
    VS low, high;  // the even neighbours and the odd
};
INLINE Quads quads(VI bytes) { return {(VS)((VU)bytes << 8 & 0xff00ff00u) >> 8, (VS)bytes >> 8}; }
INLINE VI dot_quads(VI acc, const Quads& x, const Quads& w) {
    VI pairs = (VI)(x.low * w.low + x.high * w.high);
    return acc + (pairs >> 16) + ((VI)((VU)pairs << 16) >> 16);
}
#endif

struct Int8Block {
    const PackedHead* weight;
    const int8_t* x;  // rows of `inner` numbers, `stride` apart; plus 128 where WIDE
    int64_t stride, inner;  // `inner`: zeros included

    template <int R, int P>
    void run(int64_t first, int64_t row, Span span, int32_t* sums) const {
        const char* panel = panel_of(weight, first);
        const int8_t* from = x + row * stride;
        int64_t panel_bytes = weight->panel_bytes;
        Sums<VI, R, P> block(sums, span.begin == 0);
        for (int64_t k = span.begin; k < span.end; k += 4) {
            if (R < 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(panel + p * panel_bytes + k * PANEL + 1024);
            Quads w[P * VECTORS];
            UNROLL for (int j = 0; j < P * VECTORS; j++) w[j] = quads(load<VI>(panel + j / VECTORS * panel_bytes + k * PANEL + j % VECTORS * W * 4));
            UNROLL for (int r = 0; r < R; r++) {
                Quads value = quads(load<int32_t>(from + r * stride + k) - (VI){});
                UNROLL for (int j = 0; j < P * VECTORS; j++) block.acc[r][j] = dot_quads(block.acc[r][j], value, w[j]);
            }
        }
#if defined(WIDE)
        if (span.end == inner)
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int j = 0; j < P * VECTORS; j++)
                    block.acc[r][j] = (VI)((VU)block.acc[r][j] - load<VU>(panel + (j + 1) * panel_bytes - 64) * 128);
#endif
        block.keep(sums);
    }
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

    // `sums`: [rows][panels * PANEL], of rows from `row0` and panels from `panel0` on.
    void operator()(const int32_t* sums, int64_t row0, int64_t rows, int64_t panel0, int panels) const {
        for (int64_t r = 0; r < rows; r++)
            for (int p = 0; p < panels; p++) panel(sums + (r * panels + p) * PANEL, row0 + r, panel0 + p);
    }
};

static void product_int8_panels(const ProductInt8& product, int64_t begin, int64_t end) {
    const PackedHead* weight = product.weight;
    int64_t rows = product.rows, stride = product.x_stride, filled = (weight->inner + 63) / 64 * 64;
    FinishInt8 done{product};
    const int8_t* x = (const int8_t*)product.x;
    if (rows == 0 || begin >= end) return;
#if defined(TILES)
    tiled_rows<TilesOfInt8>(weight, x, rows, stride, filled, begin, end, done);
#else
    int64_t step = rows < CHUNK ? rows : CHUNK, copied = filled + LINE;
    int32_t* sums = (int32_t*)scratch(step * (GROUP * PANEL * 4 + copied));
#if defined(WIDE)
    int8_t* copy = (int8_t*)(sums + step * GROUP * PANEL);
#endif
    for (int64_t row = 0; row < rows; row += step) {
        int64_t count = rows - row < step ? rows - row : step;
#if defined(WIDE)
        for (int64_t r = 0; r < count; r++)
            for (int64_t k = 0; k < filled; k += 64) store(copy + r * copied + k, load<VU>(x + (row + r) * stride + k) ^ 0x80808080u);
        walk(Int8Block{weight, copy, copied, filled}, count, row, begin, end, sums, done);
#else
        walk(Int8Block{weight, x + row * stride, stride, filled}, count, row, begin, end, sums, done);
#endif
    }
#endif
}

static void product_int8(const ProductInt8& product, const Team& team) {
    Share share(panels_of(product.weight), 2, team);
    product_int8_panels(product, share.begin, share.end);
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
