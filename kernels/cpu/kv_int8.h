// Keys and values in int8: `dim` numbers of a position and head, and after them their float32 scale, not aligned. The specification
// in torch is tpserve_kernels/cpu/kv_int8.py.
#pragma once

#include "quantize.h"
#include "vector.h"

namespace {

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

// A head of the model's dtype to int8. One that is not finite gets a scale of NaN, one whose magnitudes are below 1e-30 zeros.
template <class T>
static void quantize_head(const T* from, int64_t dim, int8_t* to) {
    float most = largest_magnitude(from, dim), scale = most / 127, inverse = 127 / most;
    if (!(most < __builtin_inff())) scale = __builtin_nanf(""), inverse = 0;
    if (most < 1e-30f) scale = inverse = 0;
    if (inverse == 0) {
        memset(to, 0, dim);
    } else {
        int64_t d = 0;
        for (; d + W <= dim; d += W) store(to + d, to_int8(read(from + d) * inverse));
        if (d < dim) {
            T tail[W] = {};
            memcpy(tail, from + d, (dim - d) * sizeof(T));
            VB integers = to_int8(read(tail) * inverse);
            memcpy(to + d, &integers, dim - d);
        }
    }
    store(to + dim, scale);
}

}  // namespace
