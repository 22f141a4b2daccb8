// Rows of numbers to int8, each with a scale of its own. Exact: the bits are those of any instruction set.
#pragma once

#include "api.h"
#include "share.h"
#include "vector.h"

namespace {

typedef int8_t VB __attribute__((vector_size(W)));

// The largest magnitude of a row; NaN if there is one, for its bits are above those of infinity.
template <class Number>
static float largest_magnitude(const Number* x, int64_t inner) {
    VI best = {};
    int64_t k = 0;
    for (; k + W <= inner; k += W) {
        VI bits = (VI)read(x + k) & 0x7fffffff;
        best = bits > best ? bits : best;
    }
    int32_t most = 0;
    for (; k < inner; k++) {
        float value = read1(x + k);
        int32_t bits = load<int32_t>(&value) & 0x7fffffff;
        if (bits > most) most = bits;
    }
    for (int i = 0; i < W; i++)
        if (best[i] > most) most = best[i];
    return load<float>(&most);
}

// Integers of 32 bits as such of 8, which they fit.
INLINE VB shortest(VI x) {
#if defined(EMULATED) || !defined(__AVX2__)
    return __builtin_convertvector(x, VB);
#elif defined(WIDE)
    return (VB)_mm512_cvtepi32_epi8((__m512i)x);
#else
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    __m128i bytes = _mm_packs_epi16(halves, halves);
    return load<VB>(&bytes);
#endif
}

// rint(x) of magnitudes below 127.5; the sum with 1.5 * 2^23 rounds to nearest even.
INLINE VB to_int8(V x) { return shortest((VI)(x + 12582912.0f) - 0x4b400000); }

// rint(x / scale) in [-127, 127]; whatever a NaN gives is in it, too, and its row's scale is NaN.
INLINE VB quantized(V x, V scale) { return to_int8(min(max(x / scale, broadcast(-127.0f)), broadcast(127.0f))); }

template <class Number>
static void quantize_numbers(const Number* x, int64_t inner, float scale, int8_t* out) {
    int64_t filled = (inner + 63) / 64 * 64, k = 0;
    V scales = broadcast(scale);
    if (scale != 0) {
        for (; k + W <= inner; k += W) store(out + k, quantized(read(x + k), scales));
        if (k < inner) {
            Number tail[W] = {};
            memcpy(tail, x + k, (inner - k) * sizeof(Number));
            store(out + k, quantized(read(tail), scales));
            k += W;
        }
    }
    memset(out + k, 0, filled - k);
}

template <class Number>
static void quantize_numbers_of(const Quantize& call, int64_t row) {
    const Number* x = (const Number*)call.x + row * call.x_stride;
    if (!call.given_scale) {
        float most = largest_magnitude(x, call.inner);
        call.scale[row] = most < 1e-30f ? 0 : most / 127;
    }
    if (call.out) quantize_numbers(x, call.inner, call.scale[row], call.out + row * call.out_stride);
}

static void quantize_row(const Quantize& call, int64_t row) {
    call.x_dtype == FLOAT32 ? quantize_numbers_of<float>(call, row) : quantize_numbers_of<bf16>(call, row);
}

static void quantize_rows(const Quantize& call, const Share& share) {
    for (int64_t row = share.begin; row < share.end; row++) quantize_row(call, row);
}

static void quantize(const Quantize& call, const Team& team) { quantize_rows(call, Share(call.rows, 1, team)); }

}  // namespace
