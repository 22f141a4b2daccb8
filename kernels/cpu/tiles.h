// AMX: products of tiles, in own inline assembly. gcc 12 drops stores to the 64 bytes of a tile configuration when they are read
// by its intrinsics only.
//
// A tile has up to 16 rows of 64 bytes. `TDPBF16PS c, a, b` sums the products of even elements of K, a[m][2k] b[k][2n], in one chain
// from zero, k rising, those of odd elements a[m][2k + 1] b[k][2n + 1] in another, then adds both, and that sum to c[m][n]. Sources:
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: TDPBF16PS, VDPBF16PS, TDPBSSD, and volume 1, chapter 18.
#pragma once

#include "api.h"
#include "scratch.h"
#include "vector.h"

namespace {

#if defined(BF16_PAIRS)
#if defined(EMULATED)
// The arithmetic of both instructions: rounded to nearest even, denormals are zeros of their sign, MXCSR does not matter.
INLINE float flush(float x) {
    uint32_t bits = load<uint32_t>(&x);
    if (!(bits & 0x7f800000)) bits &= 0x80000000;
    return load<float>(&bits);
}
INLINE float flushed_add(float a, float b) { return flush(flush(a) + flush(b)); }
INLINE float flushed_fma(bf16 a, bf16 b, float c) { return flush(__builtin_fmaf(flush(widen(a)), flush(widen(b)), flush(c))); }

// VDPBF16PS by the manual: the odd element first.
INLINE V dot_pairs(V acc, VU a, VU b) {
    for (int i = 0; i < W; i++)
        acc[i] = flushed_fma((bf16)a[i], (bf16)b[i], flushed_fma(a[i] >> 16, b[i] >> 16, acc[i]));
    return acc;
}
#else
INLINE V dot_pairs(V acc, VU a, VU b) {
    __m512 sum = (__m512)acc;
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"((__m512i)a), "v"((__m512i)b));
    return (V)sum;
}
#endif
#endif

#if defined(TILES)
// Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights.
struct TileConfig {
    uint8_t palette, start_row, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

#if defined(EMULATED)
static __thread struct {
    TileConfig config;
    uint8_t data[8][16][64];
} unit;
static void must(bool legal) {  // else the processor raises a fault
    if (!legal) __builtin_trap();
}
static void tile_configure(const TileConfig& config) {
    must(config.palette == 1 && config.start_row == 0);
    for (int t = 0; t < 8; t++) must(config.bytes[t] <= 64 && config.rows[t] <= 16 && !config.bytes[t] == !config.rows[t]);
    unit = {};
    unit.config = config;
}
static void tile_release() { unit.config = {}; }
template <int T> INLINE void tile_zero() {
    must(unit.config.rows[T]);
    memset(unit.data[T], 0, sizeof unit.data[T]);
}
template <int T> static void tile_load(const void* from, int64_t stride) {
    must(unit.config.rows[T]);
    for (int r = 0; r < unit.config.rows[T]; r++) memcpy(unit.data[T][r], (const char*)from + r * stride, unit.config.bytes[T]);
}
template <int T> static void tile_store(void* to, int64_t stride) {
    must(unit.config.rows[T]);
    for (int r = 0; r < unit.config.rows[T]; r++) memcpy((char*)to + r * stride, unit.data[T][r], unit.config.bytes[T]);
}
template <int C, int A, int B> static void must_fit() {
    const TileConfig& config = unit.config;
    must(config.rows[C] && config.rows[C] == config.rows[A] && config.bytes[C] == config.bytes[B] && config.bytes[A] == 4 * config.rows[B]);
}
template <int C, int A, int B> static void tile_dot_bf16() {
    must_fit<C, A, B>();
    for (int m = 0; m < unit.config.rows[C]; m++)
        for (int n = 0; n < unit.config.bytes[C]; n += 4) {
            float even = 0, odd = 0;
            for (int k = 0; k < unit.config.bytes[A] / 4; k++) {
                const uint8_t *a = &unit.data[A][m][4 * k], *b = &unit.data[B][k][n];
                even = flushed_fma(load<bf16>(a), load<bf16>(b), even);
                odd = flushed_fma(load<bf16>(a + 2), load<bf16>(b + 2), odd);
            }
            store(&unit.data[C][m][n], flushed_add(load<float>(&unit.data[C][m][n]), flushed_add(even, odd)));
        }
}
template <int C, int A, int B> static void tile_dot_int8() {
    must_fit<C, A, B>();
    for (int m = 0; m < unit.config.rows[C]; m++)
        for (int k = 0; k < unit.config.bytes[A] / 4; k++)
            for (int n = 0; n < unit.config.bytes[C] / 4; n++) {
                int32_t sum = load<int32_t>(&unit.data[C][m][4 * n]);
                for (int i = 0; i < 4; i++) sum += (int8_t)unit.data[A][m][4 * k + i] * (int8_t)unit.data[B][k][4 * n + i];
                store(&unit.data[C][m][4 * n], sum);
            }
}
#else
INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INLINE void tile_release() { asm volatile("tilerelease" ::); }
template <int T> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T> INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
template <int C, int A, int B> INLINE void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> INLINE void tile_dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

// The dot product of two tiles of a dtype, and what its sums are.
struct TilesOfBfloat16 {
    typedef bf16 number;
    typedef float sum;
    template <int C, int A, int B> static INLINE void dot() { tile_dot_bf16<C, A, B>(); }
};
struct TilesOfInt8 {
    typedef int8_t number;
    typedef int32_t sum;
    template <int C, int A, int B> static INLINE void dot() { tile_dot_int8<C, A, B>(); }
};

INLINE TileConfig config_of(int upper, int lower) {  // rows of the two tiles of x; `lower` may be 0
    TileConfig config = {};
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        int rows = tile >= 6 ? 16 : tile == 4 || tile < 2 ? upper : lower;
        if (rows) config.rows[tile] = rows, config.bytes[tile] = 64;
    }
    return config;
}

// 16 + `lower` rows (or `upper` alone) by one or two panels, over all of K. `stride`, `row_bytes`: bytes of a row of x, and those of
// its numbers. `sums`: [panels][32][PANEL].
template <class Tiles, bool LOWER, bool SECOND>
static void tile_block(const char* panel, int64_t panel_bytes, const char* x, int64_t stride, int64_t row_bytes, int upper, void* sums) {
    tile_zero<0>();
    if (SECOND) tile_zero<1>();
    if (LOWER) tile_zero<2>();
    if (LOWER && SECOND) tile_zero<3>();
    for (int64_t at = 0; at < row_bytes; at += 64, panel += 1024) {
        tile_load<6>(panel, 64);
        tile_load<4>(x + at, stride);
        Tiles::template dot<0, 4, 6>();
        if (SECOND) {
            tile_load<7>(panel + panel_bytes, 64);
            Tiles::template dot<1, 4, 7>();
        }
        if (LOWER) {
            tile_load<5>(x + 16 * stride + at, stride);
            Tiles::template dot<2, 5, 6>();
        }
        if (LOWER && SECOND) Tiles::template dot<3, 5, 7>();
    }
    char* to = (char*)sums;
    tile_store<0>(to, 64);
    if (SECOND) tile_store<1>(to + 32 * 64, 64);
    if (LOWER) tile_store<2>(to + upper * 64, 64);
    if (LOWER && SECOND) tile_store<3>(to + (32 + upper) * 64, 64);
}

// Rows of x, of `filled` numbers (whole lines of 64 bytes), by panels [begin, end).
template <class Tiles, class Done>
static void tiled_rows(const PackedHead* weight, const typename Tiles::number* x, int64_t rows, int64_t stride, int64_t filled, int64_t begin, int64_t end, const Done& done) {
    alignas(64) typename Tiles::sum sums[2 * 32 * PANEL];
    int64_t row_bytes = filled * sizeof *x, stride_bytes = stride * sizeof *x, step = CHUNK_BYTES / row_bytes / 32 * 32;
    if (step < 32) step = 32;
    int configured = 0;
    for (int64_t chunk = 0; chunk < rows; chunk += step) {
        int64_t last = rows - chunk < step ? rows : chunk + step;
        for (int64_t panel = begin; panel < end; panel += 2) {
            bool second = panel + 1 < end;
            const char* at = (const char*)(weight + 1) + panel * weight->panel_bytes;
            for (int64_t row = chunk; row < last; row += 32) {
                int count = last - row < 32 ? last - row : 32, upper = count < 16 ? count : 16;
                if (configured != count) tile_configure(config_of(upper, count - upper)), configured = count;
                const char* from = (const char*)(x + row * stride);
#define BLOCK(LOWER, SECOND) tile_block<Tiles, LOWER, SECOND>(at, weight->panel_bytes, from, stride_bytes, row_bytes, upper, sums)
                if (count > 16) second ? BLOCK(true, true) : BLOCK(true, false);
                else second ? BLOCK(false, true) : BLOCK(false, false);
#undef BLOCK
                done(sums, 32 * PANEL, row, count, panel, second ? 2 : 1);
            }
        }
    }
    tile_release();
}

// As `in_chunks` of product.h; all rows are one chunk.
template <class Each>
static void tiled(const PackedHead* weight, const bf16* x, int64_t rows, int64_t stride, const Each& each) {
    int64_t filled = (weight->inner + 31) / 32 * 32;
    if (filled != weight->inner) {  // a tile reads whole lines of 64 bytes
        bf16* copy = (bf16*)scratch(rows * filled * 2);
        for (int64_t r = 0; r < rows; r++) {
            memcpy(copy + r * filled, x + r * stride, weight->inner * 2);
            memset(copy + r * filled + weight->inner, 0, (filled - weight->inner) * 2);
        }
        x = copy, stride = filled;
    }
    each(0, rows, [=](int64_t begin, int64_t end, const auto& done) {
        tiled_rows<TilesOfBfloat16>(weight, x, rows, stride, filled, begin, end, done);
    });
}
#endif

}  // namespace
