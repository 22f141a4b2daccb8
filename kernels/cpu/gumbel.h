// The best of numbers with Gumbel noise from Philox: a draw.
//
// Elementwise, without fused multiply-add, so the bits are the same for every instruction set.
#pragma once

#include "api.h"
#include "share.h"
#include "vector.h"

namespace {

constexpr int HALF = W / 2;
typedef double D __attribute__((vector_size(W * 4)));
typedef uint64_t DU __attribute__((vector_size(W * 4)));

// The 64-bit products of the lower halves, whose upper halves are zero.
INLINE DU multiply32(DU a, uint32_t b) {
#if defined(EMULATED) || !defined(__x86_64__)
    return a * b;
#elif defined(WIDE)
    return (DU)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (DU)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (DU)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#endif
}

// The first word of Philox4x32-10 for counters (c0, c1, c2, c3) and one key. Source: Salmon et al. 2011,
// doi:10.1145/2063384.2063405.
INLINE DU philox(DU c0, uint32_t counter1, uint32_t counter2, uint32_t counter3, uint64_t key) {
    DU c1 = counter1 - (DU){}, c2 = counter2 - (DU){}, c3 = counter3 - (DU){};
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9, k1 += 0xbb67ae85) {
        DU product0 = multiply32(c0, 0xd2511f53), product1 = multiply32(c2, 0xcd9e8d57);
        c0 = (product1 >> 32) ^ c1 ^ (uint64_t)k0;
        c1 = product1 & 0xffffffffu;
        c2 = (product0 >> 32) ^ c3 ^ (uint64_t)k1;
        c3 = product0 & 0xffffffffu;
    }
    return c0;
}

// An integer below 2^52 as a double.
INLINE D to_double(DU x) { return (D)(x | 0x4330000000000000u) - 4503599627370496.0; }

// log(x) of a positive normal number, within one unit in the last place. Source: fdlibm, e_log.c (Sun Microsystems 1993).
INLINE D log(D x) {
    DU bits = (DU)x;
    DU biased = (bits - 0x3fe6a09e667f3bcdu + (1023ull << 52)) >> 52;  // 1023 + the exponent of x / sqrt(1/2)
    D power = to_double(biased) - 1023.0;
    D f = (D)(bits - ((biased - 1023) << 52)) - 1.0;
    D s = f / (f + 2.0), z = s * s, w = z * z, square = f * f * 0.5;
    D even = w * (w * (w * 1.531383769920937332e-1 + 2.222219843214978396e-1) + 3.999999999940941908e-1);
    D odd = z * (w * (w * (w * 1.479819860511658591e-1 + 1.818357216161805012e-1) + 2.857142874366239149e-1) + 6.666666666666735130e-1);
    return power * 6.93147180369123816490e-1 - ((square - (s * (square + (odd + even)) + power * 1.90821492927058770002e-10)) - f);
}

// The noise of HALF ids of one row.
INLINE D noise(DU id, const GumbelMax& draw, int64_t row) {
    DU word = philox(id, draw.position[row], draw.choice[row], draw.level, draw.seed[row]);
    D uniform = (to_double(word >> 9) + 0.5) * (1.0 / (1 << 23));
    return -log(-log(uniform));
}

static void gumbel_max(const GumbelMax& draw, const Team& team) {
    Share share(draw.rows, 1, team);
    DU lane;
    for (int i = 0; i < HALF; i++) lane[i] = i;
    for (int64_t row = share.begin; row < share.end; row++) {
        int64_t first = draw.first + (draw.first_of_row ? draw.first_of_row[row] : 0), index = 0;
        double best = -__builtin_inf(), scale = draw.temperature[row] == 0 ? 1 : draw.temperature[row];
        for (int64_t at = 0; at < draw.count; at += HALF) {
            int64_t end = draw.count - at < HALF ? draw.count - at : HALF;
            D number = noise((uint64_t)(first + at) + lane, draw, row), sum = {}, weight;
            if (draw.sums) {
                memcpy(&sum, draw.sums + row * draw.count + at, end * 8);
                weight = log(sum);
            }
            for (int64_t i = 0; i < end; i++) {
                double value = draw.x[row * draw.x_stride + at + i] / scale;
                if (draw.sums) value += sum[i] == 0 ? -__builtin_inf() : weight[i];
                value += number[i];
                if (value > best) best = value, index = at + i;
            }
        }
        draw.value[row] = best, draw.index[row] = index;
    }
}

}  // namespace
