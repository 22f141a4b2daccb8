// What a step does to rows between its products: norms, heads with their rotation and cache, activations.
//
// A row's last vector is filled up with zeros and computed as the others are, so a number never depends on where a vector begins.
#pragma once

#include "api.h"
#include "kv_int8.h"
#include "quantize.h"
#include "scratch.h"
#include "share.h"
#include "vector.h"

namespace {

// W numbers of a row of `width`, from `at` on; zeros past its end, and nothing written there.
template <class T>
INLINE V read_at(const T* row, int64_t at, int64_t width) {
    if (at + W <= width) return read(row + at);
    T lanes[W] = {};
    memcpy(lanes, row + at, (width - at) * sizeof(T));
    return read(lanes);
}

template <class T>
INLINE void write_at(T* row, int64_t at, int64_t width, V x) {
    if (at + W <= width) return write(row + at, x);
    T lanes[W];
    write(lanes, x);
    memcpy(row + at, lanes, (width - at) * sizeof(T));
}

// `x` with zeros in the lanes from `count` on.
INLINE V first_lanes(V x, int64_t count) {
    if (count >= W) return x;
    for (int64_t i = count; i < W; i++) x[i] = 0;
    return x;
}

// The numbers of a row that are in `values`, filled up with zeros to whole vectors: the sum of (value - mean)^2, in one order.
INLINE float sum_of_squares(const float* values, int64_t width, float mean) {
    V acc[4] = {};
    for (int64_t at = 0; at < width; at += 4 * W)
        UNROLL for (int i = 0; i < 4; i++) {
            int64_t here = at + i * W;
            if (here >= width) break;
            V x = load<V>(values + here);
            if (mean != 0) x = first_lanes(x - mean, width - here);
            acc[i] = fma(x, x, acc[i]);
        }
    return lane_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

INLINE float mean_of(const float* values, int64_t width) {
    V acc[4] = {};
    for (int64_t at = 0; at < width; at += 4 * W)
        UNROLL for (int i = 0; i < 4; i++)
            if (at + i * W < width) acc[i] += load<V>(values + at + i * W);
    return lane_sum((acc[0] + acc[1]) + (acc[2] + acc[3])) / width;
}

INLINE float* padded_floats(int64_t width) { return (float*)scratch((width + W) * sizeof(float)); }

// One row of a norm.
template <class T>
static void norm_row(const Norm& norm, int64_t row) {
    const T *x = (const T*)norm.x + row * norm.x_stride, *weight = (const T*)norm.weight, *bias = (const T*)norm.bias;
    T* out = (T*)norm.out + row * norm.out_stride;
    int64_t width = norm.width;
    float* values = padded_floats(width);
    if (norm.residual) {
        const T* residual = (const T*)norm.residual + row * norm.residual_stride;
        T* sum = (T*)norm.sum + row * norm.sum_stride;
        for (int64_t at = 0; at < width; at += W) {
            V total = rounded(read_at(x, at, width) + read_at(residual, at, width), x);
            write_at(sum, at, width, total);
            store(values + at, total);
        }
    } else {
        for (int64_t at = 0; at < width; at += W) store(values + at, read_at(x, at, width));
    }
    bool centred = norm.kind == LAYER_NORM;
    float mean = centred ? mean_of(values, width) : 0.0f, offset = centred ? 0.0f : norm.offset;
    float scale = 1.0f / __builtin_sqrtf(sum_of_squares(values, width, mean) / width + norm.eps);
    for (int64_t at = 0; at < width; at += W) {
        V y = (load<V>(values + at) - mean) * scale;
        if (weight) y = y * (read_at(weight, at, width) + offset);
        if (bias) y = y + read_at(bias, at, width);
        write_at(out, at, width, y);
    }
}

static void norm_rows(const Norm& norm, const Share& share) {
    for (int64_t row = share.begin; row < share.end; row++) {
        norm.dtype == FLOAT32 ? norm_row<float>(norm, row) : norm_row<bf16>(norm, row);
        if (norm.quantize) quantize_row(*norm.quantize, row);
    }
}

static void norm(const Norm& norm, const Team& team) { norm_rows(norm, Share(norm.rows, 1, team)); }

// One head of one row: `from` through norm and rotation to `to`. `position` < 0: no rotation. `values`: room for padded numbers.
template <class T>
static void head(const Qkv& qkv, const Heads& heads, const T* from, T* to, int64_t position, float* values) {
    int64_t dim = heads.dim;
    const T* weight = (const T*)heads.norm;
    if (!weight && position < 0) {
        if (to != from) memcpy(to, from, dim * sizeof(T));
        return;
    }
    for (int64_t at = 0; at < dim; at += W) store(values + at, read_at(from, at, dim));
    if (weight) {
        float scale = 1.0f / __builtin_sqrtf(sum_of_squares(values, dim, 0) / dim + qkv.eps);
        for (int64_t at = 0; at < dim; at += W)
            store(values + at, rounded(load<V>(values + at) * scale * (read_at(weight, at, dim) + qkv.offset), from));
    }
    int64_t half = position < 0 ? 0 : qkv.frequencies, at = 0;
    const float *cos = qkv.cos + position * half, *sin = qkv.sin + position * half;
    if (!qkv.interleaved)
        for (; at + W <= half; at += W) {
            V low = load<V>(values + at), high = load<V>(values + half + at), c = load<V>(cos + at), s = load<V>(sin + at);
            write(to + at, low * c + high * -s);
            write(to + half + at, high * c + low * s);
        }
    for (; at < half; at++) {  // products and a sum, each rounded: the same bits as in vectors
        float low = values[qkv.interleaved ? 2 * at : at], high = values[qkv.interleaved ? 2 * at + 1 : half + at];
        write1(to + at, low * cos[at] + high * -sin[at]);
        write1(to + half + at, high * cos[at] + low * sin[at]);
    }
    for (int64_t rest = 2 * half; rest < dim; rest += W) write_at(to, rest, dim, load<V>(values + rest));
}

template <class T>
static void qkv_heads(const Qkv& qkv, int64_t begin, int64_t end) {
    int64_t all = qkv.q.count + qkv.k.count + qkv.v.count, widest = qkv.q.dim;
    if (qkv.k.dim > widest) widest = qkv.k.dim;
    if (qkv.v.dim > widest) widest = qkv.v.dim;
    float* values = (float*)scratch((widest + W) * (sizeof(float) + sizeof(T)));
    T* whole = (T*)(values + widest + W);  // a head before it becomes int8
    for (int64_t item = begin; item < end; item++) {
        int64_t row = item / all, index = item % all, to_row = row;
        const Heads* heads = &qkv.q;
        if (index >= qkv.q.count) {
            index -= qkv.q.count;
            heads = index < qkv.k.count ? &qkv.k : &qkv.v;
            if (heads == &qkv.v) index -= qkv.k.count;
            if (qkv.slots) to_row = row < qkv.written ? qkv.slots[row] : -1;
            if (to_row < 0) continue;
        }
        int64_t position = qkv.positions && heads != &qkv.v ? qkv.positions[row] : -1;
        int64_t at = to_row * heads->to_stride + index * heads->to_head_stride;
        const T* from = (const T*)heads->from + row * heads->from_stride + index * heads->from_head_stride;
        if (heads == &qkv.q || qkv.cache_dtype != INT8) {
            head(qkv, *heads, from, (T*)heads->to + at, position, values);
        } else {
            head(qkv, *heads, from, whole, position, values);
            quantize_head(whole, heads->dim, (int8_t*)heads->to + at);
        }
    }
}

static void qkv(const Qkv& qkv, const Team& team) {
    Share share(qkv.rows * (qkv.q.count + qkv.k.count + qkv.v.count), 1, team);
    qkv.dtype == FLOAT32 ? qkv_heads<float>(qkv, share.begin, share.end) : qkv_heads<bf16>(qkv, share.begin, share.end);
}

// x / (1 + exp(exponent)), which is x times the logistic function of -exponent.
INLINE V logistic(V x, V exponent) { return x / (exp(exponent) + 1.0f); }

// -2 u of GELU's tanh form, since (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)).
INLINE V gelu_exponent(V x) { return (x * x * 0.044715f + 1.0f) * x * -1.5957691216057308f; }

// x times the normal distribution function of x, whose error is below 2e-7. Source: Abramowitz and Stegun 1964, 7.1.26.
INLINE V gelu(V x) {
    V size = (V)((VI)x & 0x7fffffff) * 0.70710678118654752f;
    V t = 1.0f / (size * 0.3275911f + 1.0f);
    V p = broadcast(1.061405429f);
    p = fma(p, t, broadcast(-1.453152027f));
    p = fma(p, t, broadcast(1.421413741f));
    p = fma(p, t, broadcast(-0.284496736f));
    p = fma(p, t, broadcast(0.254829592f));
    V beyond = p * t * exp(-(size * size)) * 0.5f;  // the probability of more than |x|
    return x * (x < 0.0f ? beyond : 1.0f - beyond);
}

INLINE V at_most(V x, float limit) { return x > limit ? broadcast(limit) : x; }  // NaN stays

template <class T, int KIND>
static void activate(const Activation& arguments, const T* x, T* out, int64_t begin, int64_t end) {
    int64_t width = arguments.width;
    for (int64_t at = begin; at < end; at += W) {
        V gate = read_at(x, at, width), y = gate;
        if (KIND == CLAMPED_SWIGLU) y = at_most(gate, arguments.limit), y = logistic(y, y * -arguments.alpha);
        if (KIND == SILU_MUL || KIND == SILU) y = logistic(gate, -gate);
        if (KIND == GELU_TANH_MUL || KIND == GELU_TANH) y = logistic(gate, gelu_exponent(gate));
        if (KIND == GELU) y = gelu(gate);
        if (KIND == RELU) y = gate < 0.0f ? (V){} : gate;
        if (KIND <= CLAMPED_SWIGLU) {
            V up = read_at(x + width, at, width);
            if (KIND == CLAMPED_SWIGLU) up = at_most(up, arguments.limit), up = (up < -arguments.limit ? broadcast(-arguments.limit) : up) + 1.0f;
            y = y * up;
        }
        write_at(out, at, width, y);
    }
}

template <class T>
static void activate_kind(const Activation& arguments, const T* x, T* out, int64_t begin, int64_t end) {
    switch (arguments.kind) {
#define KIND(NAME) \
    case NAME: return activate<T, NAME>(arguments, x, out, begin, end)
        KIND(SILU_MUL);
        KIND(GELU_TANH_MUL);
        KIND(CLAMPED_SWIGLU);
        KIND(SILU);
        KIND(GELU);
        KIND(GELU_TANH);
        KIND(RELU);
#undef KIND
    }
}

constexpr int64_t STEP = 512;  // numbers of a row that a thread takes at a time

// Pieces [begin, end) of all rows, `pieces` of each row.
static void activate_pieces(const Activation& arguments, int64_t pieces, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
        int64_t row = piece / pieces, at = piece % pieces * STEP, to = at + STEP < arguments.width ? at + STEP : arguments.width;
        int64_t x = row * arguments.x_stride, out = row * arguments.out_stride;
        if (arguments.dtype == FLOAT32) activate_kind(arguments, (const float*)arguments.x + x, (float*)arguments.out + out, at, to);
        else activate_kind(arguments, (const bf16*)arguments.x + x, (bf16*)arguments.out + out, at, to);
    }
}

static void activation(const Activation& arguments, const Team& team) {
    int64_t pieces = (arguments.width + STEP - 1) / STEP;
    Share rows(arguments.rows, 1, team), share(arguments.rows * pieces, 1, team);
    if (!arguments.quantize) return activate_pieces(arguments, pieces, share.begin, share.end);
    if (arguments.rows < team.threads) {  // threads share a row
        activate_pieces(arguments, pieces, share.begin, share.end);
        team.barrier();
        return quantize_rows(*arguments.quantize, rows);
    }
    for (int64_t row = rows.begin; row < rows.end; row++) {
        activate_pieces(arguments, pieces, row * pieces, (row + 1) * pieces);
        quantize_row(*arguments.quantize, row);
    }
}

}  // namespace
