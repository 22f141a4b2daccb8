// Paged attention, prefill and decode in one form: an online softmax over fixed tiles of the context (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), its tables of blocks as in Kwon et al. 2023, arXiv:2309.06180.
//
// A row's bits depend on its query and on the keys and values that it sees, on nothing else:
//   - tiles start at multiples of TILE, splits at multiples of SPLIT; tiles of a split are summed in order from an empty state, splits
//     are merged in order; a tile or split of which a row sees nothing changes none of its bits
//   - a score is one chain of sums over channels, a split's value one over positions, scaled where the row's peak rises; hidden
//     positions add an exact zero
//   - what no row of a block sees is never read
#pragma once

#include "attention_plan.h"
#include "attention_tile.h"
#include "kv_int8.h"

namespace {

// The softmax of rows so far: weighted values, weights and peaks, in one piece of memory.
struct State {
    float *sums, *weights, *peaks;

    State(const Shape& shape, int64_t rows, float* memory)
        : sums(memory), weights(memory + rows * shape.value_dim), peaks(weights + rows * W) {}

    void clear(const Shape& shape, int64_t rows) const {
        memset(sums, 0, rows * shape.value_dim * sizeof(float));
        memset(weights, 0, rows * W * sizeof(float));
        for (int64_t m = 0; m < rows; m++) peaks[m] = LOWEST;
    }

    // Adds what another split has to a row.
    void merge(const Shape& shape, int64_t m, const State& other) const {
        float peak = other.peaks[m] > peaks[m] ? other.peaks[m] : peaks[m];
        V mine = broadcast(exp2_negative1(peaks[m] - peak)), others = broadcast(exp2_negative1(other.peaks[m] - peak));
        auto add = [&](float* to, const float* from) { store(to, fma(load<V>(from), others, load<V>(to) * mine)); };
        for (int64_t e = 0; e < shape.value_dim; e += W) add(sums + m * shape.value_dim + e, other.sums + m * shape.value_dim + e);
        add(weights + m * W, other.weights + m * W);
        peaks[m] = peak;
    }
};

// Where the positions [first + begin, first + end) of a tile are, in numbers from the start of the caches.
struct Places {
    int64_t first, k_at[TILE], v_at[TILE];
    int begin, end;

    // From `position` to the end of its tile, or to `last`.
    void set(const Attention& a, int64_t request, int64_t position, int64_t last) {
        first = position / TILE * TILE, begin = position - first, end = last < first + TILE ? last - first : TILE;
        const int32_t* table = a.tables + request * a.table_stride;
        for (int x = begin; x < end;) {
            int64_t number = (first + x) / a.block_size, entry = (first + x) % a.block_size;
            for (; x < end && entry < a.block_size; x++, entry++) {
                k_at[x] = table[number] * a.k_strides[0] + entry * a.k_strides[1];
                v_at[x] = table[number] * a.v_strides[0] + entry * a.v_strides[1];
            }
        }
    }
};

constexpr int64_t QUERY_ROWS = 24;  // query rows that go past a tile together

// What a thread needs to compute blocks. `T`: the dtype's number; `Form`: how a product of few rows reads keys of that dtype.
template <class T, class Form>
struct Attending {
    const Attention& a;
    const Shape& shape;
    Scoring scoring;
    int64_t item;  // bytes of a number of keys and values
    char *keys, *values;
    T *zeros, *wide;
    float *queries, *scores, *scales, *memory;

    Attending(const Attention& a, const Shape& shape) : a(a), shape(shape), scoring{a.scale, a.cap} {
        item = a.kv_dtype == INT8 ? 1 : sizeof(T);
        int64_t most = shape.most, key_bytes = TILE * shape.units * 4, value_bytes = TILE * shape.value_dim * sizeof(T);
        int64_t row = a.k_dim > a.v_dim ? a.k_dim : a.v_dim;
        int64_t floats = most * (shape.key_dim + 2 * shape.state_floats()) + QUERY_ROWS * (TILE > a.k_dim ? TILE : a.k_dim) + 2 * TILE;
        keys = (char*)scratch(key_bytes + value_bytes + floats * sizeof(float) + (1 + 2 * PANEL) * row * sizeof(T));
        values = keys + key_bytes;
        queries = (float*)(values + value_bytes), scores = queries + most * shape.key_dim;
        scales = scores + QUERY_ROWS * (TILE > a.k_dim ? TILE : a.k_dim), memory = scales + 2 * TILE;
        zeros = (T*)(memory + 2 * most * shape.state_floats()), wide = zeros + row;
        memset(zeros, 0, row * sizeof(T));
    }

    int64_t rows_of(const Block& block) const { return block.rows * block.shares * shape.share; }

    void compute(const Block& block) const {
        load_queries(block);
        int64_t rows = rows_of(block);
        if (block.part) return split(block, block.begin, block.end, State(shape, rows, block.part));
        State total(shape, rows, memory), other(shape, rows, memory + shape.most * shape.state_floats());
        for (int64_t begin = block.begin, end; begin < block.end; begin = end) {
            end = (begin / SPLIT + 1) * SPLIT < block.end ? (begin / SPLIT + 1) * SPLIT : block.end;
            split(block, begin, end, begin == block.begin ? total : other);
            for (int64_t m = 0; m < rows && begin > block.begin; m++) total.merge(shape, m, other);
        }
        for (int64_t m = 0; m < rows; m++) finish(block, total, m);
    }

    // Merges this thread's rows of a block's splits, in order.
    void merge(const Block& block, float* where, int64_t splits, int64_t floats, const Team& team) const {
        int64_t rows = rows_of(block);
        State total(shape, rows, where);
        Share mine(rows, 1, team);
        for (int64_t m = mine.begin; m < mine.end; m++) {
            for (int64_t s = 1; s < splits; s++) total.merge(shape, m, State(shape, rows, where + s * floats));
            finish(block, total, m);
        }
    }

   private:
    // The queries of each share, as blocks of up to QUERY_ROWS rows.
    void load_queries(const Block& block) const {
        T* rows = (T*)scores;
        for (int64_t i = 0; i < block.shares; i++) {
            int64_t head, count = shape.heads_of(block.share + i, &head), all = block.rows * count;
            uint32_t* to = (uint32_t*)queries + i * block.rows * shape.share * shape.key_dim;
            for (int64_t m = 0; m < all; m++) {
                const T* from = (const T*)a.q + (block.row + m / count) * a.q_strides[0] + (head + m % count) * a.q_strides[1];
                memcpy(rows + m % QUERY_ROWS * a.k_dim, from, a.k_dim * sizeof(T));
                if (m % QUERY_ROWS == QUERY_ROWS - 1 || m == all - 1)
                    copy_rows<Form>(rows, m % QUERY_ROWS + 1, a.k_dim, a.k_dim, shape.key_dim, to + m / QUERY_ROWS * QUERY_ROWS * shape.key_dim);
            }
        }
    }

    // The tiles of a split, one key head after the other; while one is computed, the next one comes from memory.
    void split(const Block& block, int64_t begin, int64_t end, const State& state) const {
        state.clear(shape, rows_of(block));
        Places places[2];
        places[0].set(a, block.request, begin, end);
        for (int number = 0;; number = 1 - number) {
            const Places& now = places[number];
            Places& next = places[1 - number];
            next.set(a, block.request, now.first + now.end, end);
            for (int64_t i = 0, last = -1; i < block.shares; i++) {
                int64_t head = (block.share + i) / shape.shares_a_group;
                if (head != last) pack(head, now);
                last = head;
                prefetch(block, next, i);
                multiply(block, i, now, state);
            }
            if (next.begin == next.end) return;
        }
    }

    // Asks for a part of a tile's positions, all key heads of the block, when share `i` is at its turn.
    void prefetch(const Block& block, const Places& places, int64_t i) const {
        int64_t head = block.share / shape.shares_a_group, last = (block.share + block.shares - 1) / shape.shares_a_group;
        int64_t count = places.end - places.begin;
        for (int64_t x = places.begin + count * i / block.shares; x < places.begin + count * (i + 1) / block.shares; x++) {
            ask((const char*)a.k + places.k_at[x] * item, head, last, a.k_strides[2] * item, a.k_dim * item);
            if (a.v != a.k) ask((const char*)a.v + places.v_at[x] * item, head, last, a.v_strides[2] * item, a.v_dim * item);
        }
    }
    static INLINE void ask(const char* from, int64_t head, int64_t last, int64_t stride, int64_t bytes) {
        for (; head <= last; head++)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + head * stride + at, 0, 2);
    }

    // Brings keys and values of a tile into panels; the places of positions outside of them in the same panel are zeros.
    void pack(int64_t head, const Places& places) const {
        int64_t row = wide - zeros;
        for (int x0 = places.begin / PANEL * PANEL; x0 < places.end; x0 += PANEL) {
            const T *k_rows[PANEL], *v_rows[PANEL];
            for (int r = 0; r < PANEL; r++) {
                int x = x0 + r;
                if (x < places.begin || x >= places.end) {
                    k_rows[r] = v_rows[r] = zeros, scales[x] = scales[TILE + x] = 0;
                    continue;
                }
                const char* k = (const char*)a.k + (places.k_at[x] + head * a.k_strides[2]) * item;
                const char* v = (const char*)a.v + (places.v_at[x] + head * a.v_strides[2]) * item;
                k_rows[r] = (const T*)k, v_rows[r] = (const T*)v;
                if (a.kv_dtype != INT8) continue;
                widen_head((const int8_t*)k, a.k_dim, wide + r * row), k_rows[r] = v_rows[r] = wide + r * row;
                if (v != k) widen_head((const int8_t*)v, a.v_dim, wide + (PANEL + r) * row), v_rows[r] = wide + (PANEL + r) * row;
                scales[x] = load<float>(k + a.k_scale), scales[TILE + x] = load<float>(v + a.v_scale);
            }
            pack_keys((const char* const*)k_rows, a.k_dim * sizeof(T), keys + x0 * shape.units * 4);
            pack_values(v_rows, a.v_dim, values + x0 * PANEL * sizeof(T), TILE * PANEL * sizeof(T));
        }
    }

    // The rows of one share against the tile that is packed.
    void multiply(const Block& block, int64_t i, const Places& places, const State& state) const {
        int64_t head, count = shape.heads_of(block.share + i, &head), rows = block.rows * count, base = i * block.rows * shape.share;
        int from = places.begin / PANEL, to = (places.end + PANEL - 1) / PANEL;
        int64_t positions = (places.end + 1) / 2 * 2 - from * PANEL;
        const float *zeros = (const float*)NOTHING, *so_far = nullptr, *each = a.kv_dtype == INT8 ? scales : nullptr;
        for (int64_t first = 0; first < rows; first += QUERY_ROWS) {
            int64_t some = rows - first < QUERY_ROWS ? rows - first : QUERY_ROWS, at = base + first;
            float* sums = state.sums + at * shape.value_dim;
            TileProduct<Form> of_keys{keys, shape.key_dim * Form::UNIT_BYTES, queries + at * shape.key_dim, shape.key_dim, 1, 0,
                                        shape.key_dim, scores, TILE, zeros, some};
            in_panels(from, to, of_keys);
            for (int64_t m = 0; m < some; m++) {
                int64_t position = block.position + (first + m) / count, low = first_seen(a, position) - places.first;
                int64_t high = position + 1 - places.first;
                RowState row = {load<V>(state.weights + (at + m) * W), state.peaks[at + m]};
                low = low > 0 ? low : 0, high = high < TILE ? high : TILE;
                float factor = softmax_row(scoring, row, scores + m * TILE, each, from * PANEL, to * PANEL, low, high);
                store(state.weights + (at + m) * W, row.weight), state.peaks[at + m] = row.peak;
                float* values_of = sums + m * shape.value_dim;
                for (int64_t e = 0; e < shape.value_dim && factor != 1; e += W) store(values_of + e, load<V>(values_of + e) * factor);
            }
            TileProduct<Form> of_values{values + from * PANEL * Form::UNIT_BYTES, TILE * Form::UNIT_BYTES, scores + from * PANEL,
                                          TILE, TILE, 1, positions, sums, shape.value_dim, so_far, some};
            in_panels(0, shape.value_dim / PANEL, of_values);
        }
    }

    // Writes row `m` of a block, with the sink in its softmax.
    void finish(const Block& block, const State& state, int64_t m) const {
        int64_t head, i = m / (block.rows * shape.share), inside = m % (block.rows * shape.share);
        int64_t count = shape.heads_of(block.share + i, &head);
        if (inside >= block.rows * count) return;
        head += inside % count;
        float weight = lane_sum(load<V>(state.weights + m * W)), factor = 1;
        if (a.sinks) {
            float sink = a.sinks[head] * LOG2_E, peak = sink > state.peaks[m] ? sink : state.peaks[m];
            factor = exp2_negative1(state.peaks[m] - peak);
            weight = weight * factor + exp2_negative1(sink - peak);
        }
        V inverse = broadcast(factor / weight);
        T* out = (T*)a.out + (block.row + inside / count) * a.out_strides[0] + head * a.out_strides[1];
        const float* sums = state.sums + m * shape.value_dim;
        int64_t e = 0;
        for (; e + W <= a.v_dim; e += W) write(out + e, load<V>(sums + e) * inverse + 0.0f);  // no negative zero
        for (; e < a.v_dim; e++) write1(out + e, sums[e] * inverse[0] + 0.0f);
    }
};

template <class T, class Panels>
static void attention_of(const Attention& a, const Team& team) {
    Shape shape(a);
    Attending<T, Panels> attending(a, shape);
    auto compute = [&](const Block& block) { attending.compute(block); };
    bool any = divide(a, shape, team, compute, [](const Block&, float*, int64_t, int64_t) {});
    for (int64_t row = a.query_starts[a.requests] + team.thread; row < a.rows; row += team.threads)
        for (int64_t head = 0; head < a.heads; head++)
            memset((T*)a.out + row * a.out_strides[0] + head * a.out_strides[1], 0, a.v_dim * sizeof(T));
    if (!any) return;
    team.barrier();
    auto merge = [&](const Block& block, float* where, int64_t splits, int64_t floats) {
        attending.merge(block, where, splits, floats, team);
    };
    divide(a, shape, team, [](const Block&) {}, merge);
}

static void attention(const Attention& a, const Team& team) {
    if (a.dtype == FLOAT32) attention_of<float, Float32>(a, team);
    else attention_of<bf16, Bfloat16>(a, team);
}

}  // namespace
