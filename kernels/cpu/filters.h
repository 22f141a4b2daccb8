// Filters of whole rows of logits before a draw, in place. Their specification, in torch, is sampler/filters.py.
//
// A row's bits depend on that row alone: thresholds are exact, and weights are summed as integers.
#pragma once

#include <string.h>

#include "api.h"
#include "scratch.h"
#include "share.h"
#include "vector.h"

namespace {

constexpr float LEFT_OUT = -__builtin_inff();

static void mask_bits(const MaskBits& call, const Team& team) {
    VI lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    Share share(call.rows, 1, team);
    for (int64_t r = share.begin; r < share.end; r++) {
        float* x = call.logits + call.row[r] * call.stride;
        const int32_t* bits = call.bits + r * call.bits_stride;
        for (int64_t at = 0; at < call.vocab; at += 32) {
            uint32_t word = bits[at / 32];
            if (word == 0xffffffffu) continue;
            int64_t i = 0;
            for (; i + W <= 32 && at + i + W <= call.vocab; i += W) {
                VU of_lane = ((word >> i) - (VU){}) >> (VU)lane & 1;
                store(x + at + i, of_lane != 0 ? load<V>(x + at + i) : broadcast(LEFT_OUT));
            }
            for (; i < 32 && at + i < call.vocab; i++)
                if (!(word >> i & 1)) x[at + i] = LEFT_OUT;
        }
    }
}

static void penalize(const Penalize& call, const Team& team) {
    Share share(call.rows, 1, team);
    if (share.begin == share.end) return;
    int32_t* seen = (int32_t*)scratch(call.vocab * 4);  // 2 * (times in the output) + 1 for a token of the sequence, else 0
    memset(seen, 0, call.vocab * 4);
    for (int64_t r = share.begin; r < share.end; r++) {
        float* x = call.logits + call.row[r] * call.stride;
        const int32_t* tokens = call.tokens + call.row[r] * call.tokens_stride;
        int64_t known = call.position[r] < call.history ? call.position[r] : call.history;
        for (int64_t i = 0; i < known; i++)
            if ((uint32_t)tokens[i] < call.vocab) seen[tokens[i]] = (seen[tokens[i]] | 1) + (i >= call.prompt[r] ? 2 : 0);
        for (int64_t i = 0; i < known; i++) {
            if ((uint32_t)tokens[i] >= call.vocab || !seen[tokens[i]]) continue;
            float& logit = x[tokens[i]];
            int32_t count = seen[tokens[i]] >> 1;
            seen[tokens[i]] = 0;
            logit = logit > 0 ? logit / call.repetition[r] : logit * call.repetition[r];
            logit = logit - call.frequency[r] * (float)count - call.presence[r] * (count ? 1.0f : 0.0f);
        }
    }
}

// Keys are in the order of the numbers; both zeros have one key.
INLINE VU keys_of(V x) {
    VU bits = (VU)(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
INLINE float number_of(uint32_t key) {
    uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    return load<float>(&bits);
}

INLINE bool any(VI condition) {
    uint64_t halves[W / 2], found = 0;
    memcpy(halves, &condition, sizeof halves);
    for (int i = 0; i < W / 2; i++) found |= halves[i];
    return found;
}

// W numbers of a row, filled up with -inf, and how many are of the row.
struct Part {
    V values;
    int64_t count;
    INLINE Part(const float* x, int64_t at, int64_t size) : count(size - at < W ? size - at : W) {
        if (count == W) {
            values = load<V>(x + at);
            return;
        }
        float filled[W];
        for (int i = 0; i < W; i++) filled[i] = i < count ? x[at + i] : LEFT_OUT;
        values = load<V>(filled);
    }
};

struct CountOne {
    INLINE void operator()(V, int64_t* weights) const {
        for (int i = 0; i < W; i++) weights[i] = 1;
    }
};
// exp((x - top) / temperature) as an integer, 2^40 for the largest.
struct Probability {
    float top, temperature;
    INLINE void operator()(V x, int64_t* weights) const {
        float terms[W];
        store(terms, exp((x - broadcast(top)) / broadcast(temperature)));
        for (int i = 0; i < W; i++) {
            double scaled = (double)terms[i] * 1099511627776.0;
            weights[i] = (int64_t)((scaled + 6755399441055744.0) - 6755399441055744.0);  // 1.5 * 2^52: to the nearest integer
        }
    }
};

// The numbers above a key stay, and of those at it the first `ties`.
struct Cut {
    uint32_t key;
    int64_t ties;
};

constexpr int LEVELS = 3, BINS = 2048;
constexpr int SHIFT[LEVELS] = {21, 10, 0}, SIZE[LEVELS] = {2048, 2048, 1024};

// Keeps the fewest of the largest numbers that weigh as much as `target_of(weight of all)`, by a radix select on their keys.
template <class Weigh, class Target>
static Cut find_cut(const float* x, int64_t size, const Weigh& weigh, const Target& target_of) {
    int64_t* bins = (int64_t*)scratch(BINS * 8);
    uint32_t prefix = 0;
    int64_t above = 0, target = 0;
    for (int level = 0; level < LEVELS; level++) {
        memset(bins, 0, BINS * 8);
        for (int64_t at = 0; at < size; at += W) {
            Part part(x, at, size);
            VU keys = keys_of(part.values), upper = level ? keys >> SHIFT[level ? level - 1 : 0] : prefix - (VU){};
            if (!any(upper == prefix)) continue;
            uint32_t of_lane[W], prefixes[W];
            int64_t weights[W];
            store(of_lane, keys >> SHIFT[level] & (SIZE[level] - 1));
            store(prefixes, upper);
            weigh(part.values, weights);
            for (int64_t i = 0; i < part.count; i++)
                if (prefixes[i] == prefix) bins[of_lane[i]] += weights[i];
        }
        if (level == 0) {
            int64_t total = 0;
            for (int i = 0; i < BINS; i++) total += bins[i];
            target = target_of(total);
        }
        int bin = SIZE[level] - 1;
        while (bin > 0 && above + bins[bin] < target) above += bins[bin--];
        prefix = prefix * SIZE[level] + bin;
    }
    int64_t one[W];
    weigh(broadcast(number_of(prefix)), one);
    return {prefix, one[0] > 0 ? (target - above + one[0] - 1) / one[0] : 0};
}

static void keep(float* x, int64_t size, Cut cut) {
    for (int64_t at = 0; at < size; at += W) {
        Part part(x, at, size);
        VU keys = keys_of(part.values);
        if (part.count == W && !any(keys == cut.key)) {
            store(x + at, keys > cut.key ? part.values : broadcast(LEFT_OUT));
            continue;
        }
        for (int64_t i = 0; i < part.count; i++)
            if (keys[i] < cut.key || (keys[i] == cut.key && cut.ties-- <= 0)) x[at + i] = LEFT_OUT;
    }
}

// The smallest float32 that is not below a number.
INLINE float at_least(double x) {
    float nearest = (float)x;
    if ((double)nearest >= x) return nearest;
    int32_t bits = load<int32_t>(&nearest) & 0x7fffffff;
    bits = bits == 0 ? 1 : nearest < 0 ? (load<int32_t>(&nearest) - 1) : bits + 1;
    return load<float>(&bits);
}

static void truncate_row(const Truncate& call, int64_t r) {
    float *x = call.logits + call.row[r] * call.stride, temperature = call.temperature[r];
    V best = broadcast(LEFT_OUT);
    for (int64_t at = 0; at < call.vocab; at += W) best = max(Part(x, at, call.vocab).values, best);
    float top = lane_max(best);
    if (top == LEFT_OUT) return;
    if (call.log_min_p[r] > LEFT_OUT) {
        V least = broadcast(at_least((double)top + (double)temperature * call.log_min_p[r]));
        for (int64_t at = 0; at < call.vocab; at += W) {
            Part part(x, at, call.vocab);
            V kept = part.values < least ? broadcast(LEFT_OUT) : part.values;
            if (part.count == W) store(x + at, kept);
            else
                for (int64_t i = 0; i < part.count; i++) x[at + i] = kept[i];
        }
    }
    if (int64_t k = call.top_k[r]) keep(x, call.vocab, find_cut(x, call.vocab, CountOne{}, [k](int64_t) { return k; }));
    double p = call.top_p[r];
    if (p >= 1) return;
    auto target = [p](int64_t total) {
        double wanted = (double)total * p;
        int64_t whole = (int64_t)wanted;
        whole += (double)whole < wanted;
        return whole < 1 ? (int64_t)1 : whole < total ? whole : total;
    };
    keep(x, call.vocab, find_cut(x, call.vocab, Probability{top, temperature}, target));
}

static void truncate(const Truncate& call, const Team& team) {
    Share share(call.rows, 1, team);
    for (int64_t r = share.begin; r < share.end; r++) truncate_row(call, r);
}

}  // namespace
