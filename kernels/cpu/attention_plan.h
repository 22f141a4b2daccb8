// How the threads of a team divide the rows, heads and positions of a step's attention. Only speed depends on it.
//
// A block is what a thread computes against one tile after the other: some rows of one request with some query heads. Query heads
// that share a key head form a group; a wide group is cut into shares. A block has rows of one share, or of several if it has few
// rows. The context of a block that is most of the work is cut into splits of `SPLIT` positions, which are merged afterwards.
#pragma once

#include "api.h"
#include "attention_tile.h"

namespace {

constexpr int64_t SPLIT = 512;  // positions of a split, which starts at a multiple of it
constexpr int64_t QUERY_BYTES = 128 << 10;  // of a block's queries, results and weights

struct Block {
    int64_t request, row, rows;     // rows [row, row + rows) of the step
    int64_t position;               // of the first row
    int64_t share, shares;          // [share, share + shares) of all shares of query heads
    int64_t begin, end;             // positions to compute
    float* part;                    // where the state of a split goes, null when the whole context is computed
};

// What attention's arguments mean for every block.
struct Shape {
    int64_t group, shares_a_group, share;  // query heads of a key head; its shares; query heads of a share
    int64_t units;                         // of 32 bits in a key
    int64_t key_dim, value_dim;            // channels of a key and of a value, filled up
    int64_t most;                          // query rows (of a head each) of a block

    explicit Shape(const Attention& a) {
        group = a.heads / a.kv_heads;
        int64_t unit = a.dtype == FLOAT32 ? 1 : 2;
        units = (a.k_dim + unit - 1) / unit, key_dim = units * unit;
        value_dim = (a.v_dim + PANEL - 1) / PANEL * PANEL;
        most = QUERY_BYTES / (4 * (key_dim + value_dim + TILE)) / MOST_ROWS * MOST_ROWS;
        if (most < 2 * MOST_ROWS) most = 2 * MOST_ROWS;
        shares_a_group = (group + most - 1) / most;
        share = (group + shares_a_group - 1) / shares_a_group;
    }
    int64_t state_floats() const { return value_dim + W + 1; }  // of a row of a head: sums, weight, peak
    int64_t shares(const Attention& a) const { return a.kv_heads * shares_a_group; }
    // The query heads [first, first + count) of a share.
    int64_t heads_of(int64_t number, int64_t* first) const {
        int64_t inside = number % shares_a_group * share;
        *first = number / shares_a_group * group + inside;
        return group - inside < share ? group - inside : share;
    }
};

// What a block costs: products, and bringing keys and values into panels.
INLINE double cost_of(const Shape& shape, int64_t rows, int64_t shares, int64_t positions) {
    return (double)(positions + 16) * shares * (rows * shape.share + 4);
}

INLINE int64_t first_seen(const Attention& a, int64_t position) {
    return a.window && position + 1 > a.window ? position + 1 - a.window : 0;
}

// Calls `each(block, cost)` for the blocks of whole contexts of one request, each of at most `shares` shares.
template <class Each>
static void blocks_of(const Attention& a, const Shape& shape, int64_t request, int64_t shares, const Each& each) {
    int64_t start = a.query_starts[request], count = a.query_starts[request + 1] - start, all = shape.shares(a);
    int64_t step = shape.most / shape.share;
    if (count < step) step = count;
    for (int64_t row = 0; row < count; row += step) {
        int64_t rows = count - row < step ? count - row : step, position = a.context_lens[request] - count + row;
        int64_t begin = first_seen(a, position), end = position + rows;
        for (int64_t share = 0; share < all; share += shares) {
            int64_t some = all - share < shares ? all - share : shares;
            each(Block{request, start + row, rows, position, share, some, begin, end, nullptr},
                 cost_of(shape, rows, some, end - begin));
        }
    }
}

// How many shares a block of a request has: as many as fit, fewer where it would be too much of a thread's fair part.
INLINE int64_t widest(const Attention& a, const Shape& shape, int64_t request, double fair, int threads) {
    int64_t count = a.query_starts[request + 1] - a.query_starts[request], step = shape.most / shape.share, all = shape.shares(a);
    if (count == 0) return all;
    int64_t shares = shape.most / (shape.share * (count < step ? count : step));
    if (shares > all) shares = all;
    double largest = 0;
    blocks_of(a, shape, request, all, [&](const Block&, double cost) { largest = cost > largest ? cost : largest; });
    while (threads > 1 && shares > 1 && largest * shares / all > fair / 4) shares = (shares + 1) / 2;
    return shares;
}

// Divides the work by its cost; every thread finds the same division. Calls `compute(block)` for each block, or split of one, of this
// thread, and for every block that is split `parts(block, where, splits, floats)`: the states of the splits lie at `where`, `floats`
// from one to the next. True if any block is split.
template <class Compute, class Parts>
static bool divide(const Attention& a, const Shape& shape, const Team& team, const Compute& compute, const Parts& parts) {
    double total = 0, before = 0;
    for (int64_t r = 0; r < a.requests; r++)
        blocks_of(a, shape, r, shape.shares(a), [&](const Block&, double cost) { total += cost; });
    double fair = total / team.threads;
    auto mine = [&](double cost) {  // whether the middle of this piece of work lies in this thread's part of all of it
        int64_t thread = (before + cost / 2) / fair;
        before += cost;
        return (thread < team.threads ? thread : team.threads - 1) == team.thread;
    };
    float *free = (float*)a.workspace, *end = free + a.workspace_bytes / sizeof(float);
    bool any = false;
    for (int64_t r = 0; r < a.requests; r++) {
        blocks_of(a, shape, r, widest(a, shape, r, fair, team.threads), [&](const Block& block, double cost) {
            int64_t first = block.begin / SPLIT, splits = (block.end + SPLIT - 1) / SPLIT - first;
            int64_t floats = block.rows * block.shares * shape.share * shape.state_floats();
            if (team.threads == 1 || splits == 1 || cost <= fair / 2 || end - free < splits * floats) {
                if (mine(cost)) compute(block);
                return;
            }
            any = true;
            parts(block, free, splits, floats);
            for (int64_t s = 0; s < splits; s++, free += floats) {
                Block part = block;
                part.part = free;
                if (s) part.begin = (first + s) * SPLIT;
                if (s + 1 < splits) part.end = (first + s + 1) * SPLIT;
                if (mine(cost * (part.end - part.begin) / (block.end - block.begin))) compute(part);
            }
        });
    }
    return any;
}

}  // namespace
