// One tile of attention: `TILE` positions of one key head against the query rows of a block, in float32.
//
// Keys and values of the tile are brought into the packed form of a product's weights, so that both products of attention are those
// of walk.h: scores over the channels of a key, values over the positions of the tile.
#pragma once

#include "api.h"
#include "product.h"
#include "scratch.h"
#include "vector.h"

namespace {

constexpr int TILE = 64;          // positions of a tile, which starts at a multiple of it
constexpr float LOWEST = -1e30f;  // the peak of a row that has seen nothing: below every score, yet finite
constexpr float LOG2_E = 1.44269504088896341f;

// 2^x for x <= 0: 1 for 0, 0 below -126, NaN for NaN. Source: polynomial of degree 6 (Cephes, exp2f).
INLINE V exp2_negative(V x) {
    V least = broadcast(-126.0f), clamped = max(least, x);  // in this order a NaN stays
    V shifted = clamped + 12582912.0f;                      // 1.5 * 2^23: the integer part lands in the low bits
    VI n = (VI)shifted - 0x4b400000;
    V r = clamped - (shifted - 12582912.0f);
    V p = broadcast(1.535336188319500e-4f);
    p = fma(p, r, broadcast(1.339887440266574e-3f));
    p = fma(p, r, broadcast(9.618437357674640e-3f));
    p = fma(p, r, broadcast(5.550332471162809e-2f));
    p = fma(p, r, broadcast(2.402264791363012e-1f));
    p = fma(p, r, broadcast(6.931472028550421e-1f));
    p = fma(p, r, broadcast(1.0f));
    V y = p * (V)((n + 127) << 23);
    return (V)((VI)y & ~(VI)(x < least));
}
INLINE float exp2_negative1(float x) { return x == 0 ? 1.0f : exp2_negative(broadcast(x))[0]; }

INLINE float highest_lane(V x) {  // as lane_max: the order of a maximum does not show
#if defined(__AVX2__) && !defined(WIDE)
    __m256 v = (__m256)x;
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
    return lane_max(x);
#endif
}

#if defined(__AVX2__)
// Eight rows of eight 32-bit units each, transposed: unit u of row r comes to to[u * PANEL + r].
INLINE void transpose8(const char* const* rows, int64_t at, char* to) {
    __m256 a[8], b[8];
    for (int r = 0; r < 8; r++) a[r] = _mm256_loadu_ps((const float*)(rows[r] + at));
    for (int r = 0; r < 8; r += 2) b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]), b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    for (int r = 0; r < 8; r += 4)
        for (int i = 0; i < 2; i++) {
            a[r + 2 * i] = _mm256_shuffle_ps(b[r + i], b[r + i + 2], 0x44);
            a[r + 2 * i + 1] = _mm256_shuffle_ps(b[r + i], b[r + i + 2], 0xee);
        }
    for (int u = 0; u < 4; u++) {
        _mm256_storeu_ps((float*)(to + u * PANEL * 4), _mm256_permute2f128_ps(a[u], a[u + 4], 0x20));
        _mm256_storeu_ps((float*)(to + (u + 4) * PANEL * 4), _mm256_permute2f128_ps(a[u], a[u + 4], 0x31));
    }
}
#endif

// The keys of `PANEL` positions as a panel: `bytes` of each row, in units of 32 bits (a float32 or two bfloat16), the last one
// filled up with zeros.
static void pack_keys(const char* const* rows, int64_t bytes, char* to) {
    int64_t at = 0;
#if defined(__AVX2__)
    for (; at + 32 <= bytes; at += 32) {
        transpose8(rows, at, to + at * PANEL);
        transpose8(rows + 8, at, to + at * PANEL + 32);
    }
#endif
    for (; at < bytes; at += 4)
        for (int r = 0; r < PANEL; r++) {
            uint32_t unit = 0;
            if (bytes - at >= 4) memcpy(&unit, rows[r] + at, 4);
            else memcpy(&unit, rows[r] + at, bytes - at);
            store(to + at * PANEL + r * 4, unit);
        }
}

// The values of `PANEL` positions as a part of panels: panels of a tile lie `panel_bytes` apart, the last one is filled up with zeros.
//   float32   [TILE][PANEL]
//   bfloat16  [TILE / 2][PANEL][2]
static void pack_values(const float* const* rows, int64_t dim, char* to, int64_t panel_bytes) {
    for (int64_t e = 0; e < dim; e += PANEL, to += panel_bytes)
        for (int r = 0; r < PANEL; r++) {
            float* out = (float*)to + r * PANEL;
            if (e + PANEL <= dim) memcpy(out, rows[r] + e, PANEL * sizeof(float));
            else for (int i = 0; i < PANEL; i++) out[i] = e + i < dim ? rows[r][e + i] : 0.0f;
        }
}
static void pack_values(const bf16* const* rows, int64_t dim, char* to, int64_t panel_bytes) {
    int64_t e = 0;
#if defined(__AVX2__)
    for (; e + PANEL <= dim; e += PANEL, to += panel_bytes)
        for (int r = 0; r < PANEL; r += 2) {
            __m256i even = _mm256_loadu_si256((const __m256i*)(rows[r] + e)), odd = _mm256_loadu_si256((const __m256i*)(rows[r + 1] + e));
            __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
            _mm256_storeu_si256((__m256i*)(to + r * PANEL * 2), _mm256_permute2x128_si256(low, high, 0x20));
            _mm256_storeu_si256((__m256i*)(to + r * PANEL * 2 + 32), _mm256_permute2x128_si256(low, high, 0x31));
        }
#endif
    for (; e < dim; e += PANEL, to += panel_bytes)
        for (int r = 0; r < PANEL; r++)
            for (int i = 0; i < PANEL; i++) ((bf16*)to)[(r / 2 * PANEL + i) * 2 + r % 2] = e + i < dim ? rows[r][e + i] : 0;
}

// How scores become logits of base 2.
struct Scoring {
    float scale, cap;  // cap 0: none

    INLINE V operator()(V dot) const {
        if (cap == 0) return dot * (scale * LOG2_E);
        V e = exp(dot * (scale * 2 / cap));  // tanh(u) = 1 - 2 / (exp(2 u) + 1)
        return broadcast(cap * LOG2_E) - (2 * cap * LOG2_E) / (e + 1.0f);
    }
};

// The softmax of one row so far: sum of exponentials (a lane each, added up at the end) below a peak.
struct RowState {
    V weight;
    float peak;
};

// Turns scores [begin, end) into logits, minus infinity outside of [low, high), and `best` into the largest of each lane.
INLINE void logits_of(const Scoring& scoring, float* scores, const float* scales, int begin, int end, int low, int high, V& best) {
    VI lanes = {};
    UNROLL for (int i = 0; i < W; i++) lanes[i] = i;
    for (int x = begin; x < end; x += W) {
        V dot = load<V>(scores + x), logit = scoring(scales ? dot * load<V>(scales + x) : dot);
        if (x < low || x + W > high) {
            VI at = lanes + x, seen = (VI)(at >= low) & (VI)(at < high);
            logit = (V)(((VI)logit & seen) | (~seen & (VI)broadcast(-__builtin_inff())));
        }
        best = max(logit, best);
        store(scores + x, logit);
    }
}

// Takes a tile's scores, of which the row sees [low, high), into the softmax: `scores` [begin, end) become weights, those of hidden
// positions zero. `begin` and `end`: multiples of PANEL. The result is the factor of what was summed before. `scales`: null, or
// what each score is multiplied by and then, at [TILE], what each weight is.
INLINE float softmax_row(
    const Scoring& scoring, RowState& state, float* scores, const float* scales, int begin, int end, int low, int high
) {
    if (low >= high) {
        for (int x = begin; x < end; x += W) store(scores + x, (V){});
        return 1.0f;
    }
    V best = broadcast(state.peak);
    float slope = scoring.scale * LOG2_E;
    bool plain = scoring.cap == 0 && !scales && slope > 0 && low <= begin && end <= high;
    if (plain) {  // the logits are computed once, below: the largest is that of the largest score, since rounding keeps the order
        V most = broadcast(-__builtin_inff());
        for (int x = begin; x < end; x += W) most = max(load<V>(scores + x), most);
        best = max(most * slope, best);
    } else {
        slope = 1;
        logits_of(scoring, scores, scales, begin, end, low, high, best);
    }
    float peak = highest_lane(best), factor = exp2_negative1(state.peak - peak);
    V sum = {};
    for (int x = begin; x < end; x += W) {
        V weight = exp2_negative(load<V>(scores + x) * slope - peak);
        sum = sum + weight;
        store(scores + x, scales ? weight * load<V>(scales + TILE + x) : weight);
    }
    state.weight = fma(state.weight, broadcast(factor), sum);
    state.peak = peak;
    return factor;
}

// Rows of a tile by its panels of keys or of values.
template <class Form>
struct TileProduct {
    const char* panels;
    int64_t panel_bytes;
    const float* x;  // the block from row r on is at x + r * row_begin
    int64_t row_begin, row_step, unit_step, units;  // as of Task; a unit_step of 0: the number of rows of a block
    float* sums;                                    // [rows][row_sums]
    int64_t row_sums;
    const float* start;
    int64_t rows;

    template <int P>
    struct OfPanels {
        const TileProduct& all;
        int64_t panel;
        template <int R>
        INLINE void run(int64_t row) const {
            int64_t unit_step = all.unit_step ? all.unit_step : R;
            add_units<Form, R, P>({all.panels + panel * all.panel_bytes, all.panel_bytes, (const uint32_t*)all.x + row * all.row_begin, all.row_step,
                                   unit_step, all.units, all.sums + row * all.row_sums + panel * PANEL, all.row_sums, PANEL, all.start});
        }
    };
    template <int P>
    INLINE void run(int64_t panel) const { in_blocks(rows, OfPanels<P>{*this, panel}); }
};

}  // namespace
