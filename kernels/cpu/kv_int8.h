// Keys and values in int8: `dim` numbers of a position and head, and after them their float32 scale, not aligned.
#pragma once

#include "vector.h"

namespace {

// Symmetric, the largest magnitude becomes 127; rounded to nearest even. A head with a NaN or an infinity reads back as NaN, one
// below 1e-30 as zeros.
template <class T>
INLINE void quantize_head(const T* x, int64_t dim, int8_t* to) {
    float most = 0;
    bool numbers = true;
    for (int64_t d = 0; d < dim; d++) {
        float size = __builtin_fabsf(read1(x + d));
        most = size > most ? size : most;
        numbers = numbers && size - size == 0;
    }
    float scale = most / 127, inverse = most < 1e-30f ? 0 : 127 / most;
    if (most < 1e-30f) scale = 0;
    if (!numbers) scale = __builtin_nanf(""), inverse = 0;
    for (int64_t d = 0; d < dim; d++) {
        float rounded = numbers ? read1(x + d) * inverse + 12582912.0f : 12582912.0f;  // 1.5 * 2^23: an integer in the low bits
        to[d] = (int8_t)(load<int32_t>(&rounded) - 0x4b400000);
    }
    store(to + dim, scale);
}

// The integers of a head as numbers of the model's dtype, which holds them exactly.
INLINE void widen_head(const int8_t* from, int64_t dim, bf16* to) {
    int64_t d = 0;
#if defined(__AVX2__)
    for (; d + 8 <= dim; d += 8) {
        __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + d)))));
        __m256i upper = _mm256_srli_epi32(bits, 16);
        __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
        _mm_storeu_si128((__m128i*)(to + d), packed);
    }
#endif
    for (; d < dim; d++) to[d] = narrow(from[d]);
}
INLINE void widen_head(const int8_t* from, int64_t dim, float* to) {
    int64_t d = 0;
#if defined(__AVX2__)
    for (; d + 8 <= dim; d += 8)
        _mm256_storeu_ps(to + d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(from + d)))));
#endif
    for (; d < dim; d++) to[d] = from[d];
}

}  // namespace
