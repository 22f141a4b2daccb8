// The LM head without rows of logits: the vocabulary is taken in blocks of 128 ids, and of each block only what a draw needs is kept.
//
// `block_sum` is the one place where an exponential of the draw is computed, for logits that are written and for those that are not.
// So whether a request asks for log probabilities changes no draw. Source: tpserve/sampler/draw.py.
#pragma once

#include "product.h"

namespace {

constexpr int BLOCK = 128;
constexpr int BLOCK_PANELS = BLOCK / PANEL;

// The sum over a block of exp((z - top) / temperature), exact in any order: each term is rounded to a multiple of 2^-44.
INLINE double block_sum(const float* logits, float top, float temperature) {
    double sum = 0;
    V peak = broadcast(top), scale = broadcast(temperature);
    for (int i = 0; i < BLOCK; i += W) {
        float terms[W];
        store(terms, exp((load<V>(logits + i) - peak) / scale));
        for (int j = 0; j < W; j++) sum += ((double)terms[j] + 256.0) - 256.0;
    }
    return sum;
}

INLINE float block_top(const float* logits) {
    V top = load<V>(logits);
    for (int i = W; i < BLOCK; i += W) top = max(load<V>(logits + i), top);
    return lane_max(top);
}

// What is kept of one block of one row.
INLINE void keep_block(const Head& head, int64_t row, int64_t block, const float* logits, float& best, int64_t& best_id) {
    float top = block_top(logits);
    if (top > best) {
        int at = 0;
        while (logits[at] != top) at++;
        best = top, best_id = block * BLOCK + at;
    }
    if (!head.sums) return;
    const float lowest = -3.40282347e38f;  // for a block of -inf
    float peak = top > lowest ? top : lowest, temperature = head.temperature[row];
    head.tops[row * head.blocks + block] = peak;
    head.sums[row * head.blocks + block] = temperature == 0 ? 0 : block_sum(logits, peak, temperature);
}

// The logits of one block for the rows of a chunk, [row, row + rows), scaled and filled up with -inf: [rows][BLOCK].
template <class Chunk>
static void block_logits(const Head& head, const Chunk& chunk, int64_t row, int64_t rows, int64_t block, float* logits) {
    int64_t begin = block * BLOCK_PANELS, end = begin + BLOCK_PANELS, last = panels_of(head.weight);
    if (end > last) end = last;
    chunk(begin, end, [&](const float* sums, int64_t panel_sums, int64_t row0, int64_t count, int64_t panel, int64_t panels) {
        for (int64_t r = 0; r < count; r++)
            for (int64_t p = 0; p < panels; p++)
                for (int i = 0; i < PANEL; i += W)
                    store(logits + (row0 - row + r) * BLOCK + (panel + p - begin) * PANEL + i,
                          load<V>(sums + p * panel_sums + r * PANEL + i) * head.scale);
    });
    int64_t filled = head.weight->outputs - block * BLOCK;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = filled; i < BLOCK; i++) logits[r * BLOCK + i] = -__builtin_inff();
}

static void head(const Head& head, const Team& team) {
    Share share(head.blocks, 1, team);
    float* logits = head.workspace + team.thread * head.rows * BLOCK;
    float* best = head.best + team.thread * head.rows;
    int64_t* best_id = head.best_id + team.thread * head.rows;
    for (int64_t row = 0; row < head.rows; row++) best[row] = -__builtin_inff(), best_id[row] = 0;
    auto each = [&](int64_t row, int64_t rows, const auto& chunk) {
        for (int64_t block = share.begin; block < share.end; block++) {
            block_logits(head, chunk, row, rows, block, logits);
            for (int64_t r = 0; r < rows; r++) keep_block(head, row + r, block, logits + r * BLOCK, best[row + r], best_id[row + r]);
        }
    };
    if (!head.logits) in_chunks(head.weight, head.x, head.rows, head.x_stride, each);
    for (int64_t block = share.begin; head.logits && block < share.end; block++) {
        int64_t filled = head.outputs - block * BLOCK;
        for (int64_t row = 0; row < head.rows; row++) {
            for (int64_t i = 0; i < BLOCK; i++)
                logits[i] = i < filled ? head.logits[row * head.logits_stride + block * BLOCK + i] : -__builtin_inff();
            keep_block(head, row, block, logits, best[row], best_id[row]);
        }
    }
    team.barrier();
    if (team.thread) return;
    for (int other = 1; other < team.threads; other++)  // later threads have higher ids: only a larger logit wins
        for (int64_t row = 0; row < head.rows; row++)
            if (head.best[other * head.rows + row] > best[row])
                best[row] = head.best[other * head.rows + row], best_id[row] = head.best_id[other * head.rows + row];
}

// The logits of one block for each row, that block being another for each: workspace[row][BLOCK].
static void head_block(const Head& head, const Team& team) {
    Share share(head.rows, 1, team);
    int64_t item = head.weight->dtype == BFLOAT16 ? 2 : 4;
    for (int64_t row = share.begin; row < share.end; row++)
        in_chunks(head.weight, (const char*)head.x + row * head.x_stride * item, 1, head.x_stride, [&](int64_t, int64_t, const auto& chunk) {
            block_logits(head, chunk, 0, 1, head.best_id[row], head.workspace + row * BLOCK);
        });
}

}  // namespace
