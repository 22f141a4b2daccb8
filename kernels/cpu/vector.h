// Vectors of float32 of the width of one instruction set, and what the kernels need of them.
//
// Each instruction set compiles its own copy: everything here is local to a file (anonymous namespace). Were it shared, the
// linker could keep the copy with the widest instructions for all.
//
// `V` holds `W` float32. A panel of 16 outputs is `PANEL / W` vectors. Rounding is always to nearest even.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#if defined(EMULATED)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

constexpr int PANEL = 16;  // outputs of a packed matrix that lie together

#if defined(WIDE)  // AVX-512, or its emulation
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint16_t VH __attribute__((vector_size(W * 2)));
typedef uint16_t bf16;  // the upper half of a float32

template <class T>
INLINE T load(const void* from) {
    T value;
    __builtin_memcpy(&value, from, sizeof(T));
    return value;
}

template <class T>
INLINE void store(void* to, T value) {
    __builtin_memcpy(to, &value, sizeof(T));
}

// Keeps a vector in a register. Without it gcc may read it from memory again in each instruction, and loads limit a product.
template <class T>
INLINE void hold(T& x) {
#if defined(__x86_64__) && !defined(EMULATED)
    asm("" : "+v"(x));
#else
    (void)x;
#endif
}

INLINE V broadcast(float x) { return x - (V){}; }

// a * b + c: rounded once where the instruction set has it, else twice. Never left to the compiler (-ffp-contract=off).
INLINE V fma(V a, V b, V c) {
#if defined(EMULATED)
    for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#elif defined(WIDE)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// The larger of two; of a NaN and a number, `b`.
INLINE V max(V a, V b) { return a > b ? a : b; }
INLINE V min(V a, V b) { return a < b ? a : b; }

INLINE float lane_sum(V x) {  // a tree, in one order
    float lanes[W];
    store(lanes, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float lane_max(V x) {
    float best = x[0];
    for (int i = 1; i < W; i++) best = x[i] > best ? x[i] : best;
    return best;
}

INLINE float widen(bf16 x) { return load<float>(&(const uint32_t&)((uint32_t)x << 16)); }

INLINE bf16 narrow(float x) {
    uint32_t bits = load<uint32_t>(&x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Integers of 16 bits as such of 32, and back when they fit. What gcc makes of __builtin_convertvector takes several times as long.
INLINE VU extend(VH x) {
#if defined(EMULATED) || !defined(__AVX2__)
    return __builtin_convertvector(x, VU);
#elif defined(WIDE)
    return (VU)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return (VU)_mm256_cvtepu16_epi32((__m128i)x);
#endif
}
INLINE VH shorten(VU x) {
#if defined(EMULATED) || !defined(__AVX2__)
    return __builtin_convertvector(x, VH);
#elif defined(WIDE)
    return (VH)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return (VH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x, (__m256i)x), 0xd8));
#endif
}

// Numbers of the model's dtype: read W of them as float32, write W of them rounded.
INLINE V read(const float* from) { return load<V>(from); }
INLINE V read(const bf16* from) { return (V)(extend(load<VH>(from)) << 16); }
INLINE float read1(const float* from) { return *from; }
INLINE float read1(const bf16* from) { return widen(*from); }
INLINE void write(float* to, V x) { store(to, x); }
INLINE VU narrowed(V x) {
    VU bits = (VU)x, is_nan = (VU)(x != x);
    VU rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (is_nan & 0x7fc0) | (~is_nan & rounded);
}
INLINE void write(bf16* to, V x) { store(to, shorten(narrowed(x))); }
INLINE void write1(float* to, float x) { *to = x; }
INLINE void write1(bf16* to, float x) { *to = narrow(x); }

// `x` as it is after it has been stored in the dtype of the pointer.
INLINE V rounded(V x, const float*) { return x; }
INLINE V rounded(V x, const bf16*) { return (V)(narrowed(x) << 16); }

// exp(x), within two units in the last place; 0 below -87.3, inf above 88.7, NaN for NaN. One form for every caller, so that an
// exponential does not depend on which of them computes it. Source: reduction by ln 2 in two parts (Cody and Waite 1980) and a
// polynomial of degree 6 (Cephes, expf).
INLINE V exp(V x) {
    V clamped = min(max(x, broadcast(-87.33654f)), broadcast(88.72283f));
    V scaled = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
    VI n = (VI)scaled - 0x4b400000;
    V whole = scaled - 12582912.0f;
    V r = fma(whole, broadcast(-0.693359375f), clamped);
    r = fma(whole, broadcast(2.12194440e-4f), r);
    V p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    V y = fma(p, r * r, r) + 1.0f;
    VI half = n >> 1;  // 2^n in two factors: n may be 128
    y = y * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
    VI below = x < -87.33654f, above = x > 88.72283f, nan = x != x;
    y = (V)((VI)y & ~below);
    y = (V)(((VI)y & ~above) | (above & 0x7f800000));
    return (V)(((VI)y & ~nan) | ((VI)x & nan));
}

}  // namespace
