// How a product goes over rows and panels. Every output is one chain of sums in the order of K, whatever the number of rows, so
// the bits of a row never depend on its company.
//
// A form says what a unit of 32 bits of a row is (a float32, a widened bfloat16 or two, four int8) and how it is multiplied by that
// unit of 16 outputs. Rows are copied first: a block of R rows is [units][R], so that it is read in the order of memory. Of many rows a
// chunk stays in the second cache while a group of panels goes past it, a span of units at a time, and the span of a panel in the first
// while the rows do. Source: Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
#pragma once

#include "api.h"
#include "share.h"
#include "scratch.h"
#include "vector.h"

namespace {

constexpr int VECTORS = PANEL / W;

#if defined(WIDE)
constexpr int MOST_ROWS = 12;  // of one block of sums
#else
constexpr int MOST_ROWS = 6;
#endif
constexpr int64_t FEW = 2;                // rows of which many panels are taken at once
constexpr int64_t CHUNK = 96;             // rows that share one reading of a panel from memory, about
constexpr int64_t GROUP = 8;              // panels that share one reading of the rows
constexpr int64_t SPAN_BYTES = 16 << 10;  // of a panel that are multiplied before the next rows or panels have their turn
constexpr int64_t ROW_UNIT = 32;          // rows that are divided among threads together: those of two tiles of AMX

INLINE int64_t panels_of(const PackedHead* weight) { return (weight->outputs + PANEL - 1) / PANEL; }

INLINE const char* panel_of(const PackedHead* weight, int64_t panel) {
    return (const char*)(weight + 1) + panel * weight->panel_bytes;
}

// What a block of R rows by P panels adds up. Unit u of row r is x[r * row_step + u * unit_step]. Sums of a panel are rows of
// PANEL numbers, `row_sums` apart, and those of the next panel `panel_sums` further.
template <class Form>
struct Task {
    const char* panel;
    int64_t panel_bytes;
    const uint32_t* x;
    int64_t row_step, unit_step, units;  // `units`: a multiple of Form::STEP, not 0
    typename Form::Sum* sums;
    int64_t row_sums, panel_sums;
    const typename Form::Sum* start;  // [P * PANEL], what the sums of every row begin with; null: with those so far
};

alignas(64) const int32_t NOTHING[8 * PANEL] = {};  // zeros to start with, of either kind

// All its steps are runtime numbers, so that products and attention share the code of each block.
template <class Form, int R, int P>
static NOINLINE void add_units(const Task<Form>& task) {
    typedef typename Form::Vector Vector;
    Vector acc[R][P * VECTORS];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < P * VECTORS; j++) {
            const typename Form::Sum* at = task.sums + j / VECTORS * task.panel_sums + r * task.row_sums + j % VECTORS * W;
            acc[r][j] = load<Vector>(task.start ? task.start + j * W : at);
        }
    const char* panel = task.panel;
    const uint32_t *x = task.x, *end = x + task.units * task.unit_step;
    int64_t panel_bytes = task.panel_bytes, row_step = task.row_step, unit_step = task.unit_step;
    do {
        if (R < 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(panel + p * panel_bytes + 1024);
        UNROLL for (int i = 0; i < Form::STEP; i++) {
            typename Form::Weights w[P * VECTORS];
            UNROLL for (int j = 0; j < P * VECTORS; j++) w[j] = Form::weights(panel + j / VECTORS * panel_bytes, j % VECTORS, i);
            if (P * VECTORS <= 4) UNROLL for (int j = 0; j < P * VECTORS; j++) hold(w[j]);
            UNROLL for (int r = 0; r < R; r++) {
                typename Form::Row value = Form::row(x[r * row_step]);
                UNROLL for (int j = 0; j < P * VECTORS; j++) acc[r][j] = Form::dot(acc[r][j], value, w[j]);
            }
            x += unit_step;
        }
        panel += Form::STEP * Form::UNIT_BYTES;
    } while (x < end);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < P * VECTORS; j++)
            store(task.sums + j / VECTORS * task.panel_sums + r * task.row_sums + j % VECTORS * W, acc[r][j]);
}

// Units [begin, begin + count) of some panels: where the first panel's are, how far away the next panel's, what sums start with.
template <class Form>
struct Span {
    int64_t begin, count;
    const char* panel;
    int64_t panel_bytes;
    const typename Form::Sum* start;

    template <int R, int P>
    INLINE void add(const uint32_t* x, typename Form::Sum* sums, int64_t panel_sums) const {
        add_units<Form, R, P>({panel, panel_bytes, x + begin * R, 1, R, count, sums, PANEL, panel_sums, begin ? nullptr : start});
    }
};

// Calls `each.template run<R>(row)` for blocks of up to MOST_ROWS rows, nearly equal ones.
template <class Each>
INLINE void in_blocks(int64_t rows, const Each& each) {
    for (int64_t row = 0, left = rows; left > 0;) {
        int64_t blocks = (left + MOST_ROWS - 1) / MOST_ROWS, size = (left + blocks - 1) / blocks;
        if (MOST_ROWS > 6 && size > 4 && size % 2) size += size < left ? 1 : -1;
        switch (size) {
#define BLOCK(R) \
    case R: each.template run<R>(row); break
            BLOCK(1);
            BLOCK(2);
            BLOCK(3);
            BLOCK(4);
            BLOCK(6);
#if defined(WIDE)
            BLOCK(8);
            BLOCK(10);
            BLOCK(12);
#else
            BLOCK(5);
#endif
#undef BLOCK
        }
        row += size, left -= size;
    }
}

// Calls `each.template run<P>(panel)` for panels [begin, end), two at a time where registers are wide.
template <class Each>
INLINE void in_panels(int64_t begin, int64_t end, const Each& each) {
#if defined(WIDE)
    for (; begin + 2 <= end; begin += 2) each.template run<2>(begin);
#endif
    for (; begin < end; begin++) each.template run<1>(begin);
}

// Copies rows as blocks: those of R rows from `row` on come to to[row * units] as [units][R], filled up with zeros.
template <class Form>
struct CopyRows {
    const typename Form::Number* from;
    int64_t stride, inner, units;
    uint32_t* to;

    template <int R>
    INLINE void run(int64_t row) const {
        const typename Form::Number* x = from + row * stride;
        uint32_t* out = to + row * units;
        int64_t whole = inner / Form::UNIT, u = 0;
        for (; u < whole; u++, out += R)
            UNROLL for (int r = 0; r < R; r++) out[r] = Form::unit(x + r * stride + u * Form::UNIT);
        for (; u < units; u++, out += R)
            for (int r = 0; r < R; r++) {
                typename Form::Number rest[Form::UNIT] = {};
                for (int64_t k = u * Form::UNIT; k < inner; k++) rest[k - u * Form::UNIT] = x[r * stride + k];
                out[r] = Form::unit(rest);
            }
    }
};

// What the packed matrix holds of the span that comes next, asked for while the rows go past the present one.
struct Next {
    const char* from;
    int64_t bytes;

    // The part that belongs to rows [row, row + R) of `rows`.
    INLINE void ask(int64_t row, int64_t count, int64_t rows) const {
        for (int64_t at = bytes * row / rows / LINE * LINE; at < bytes * (row + count) / rows; at += LINE) __builtin_prefetch(from + at, 0, 2);
    }
};

template <class Form>
static NOINLINE void copy_rows(const typename Form::Number* from, int64_t rows, int64_t stride, int64_t inner, int64_t units, uint32_t* to) {
    in_blocks(rows, CopyRows<Form>{from, stride, inner, units, to});
}

template <class Form, int P>
struct AddSpan {
    const Form& form;
    const uint32_t* x;
    int64_t rows;
    const Span<Form>& span;
    Next next;
    typename Form::Sum* sums;
    template <int R>
    INLINE void run(int64_t row) const {
        if (rows > 2 * MOST_ROWS) next.ask(row, R, rows);
        span.template add<R, P>(x + row * form.units, sums + row * PANEL, rows * PANEL);
    }
};

template <class Form>
struct AddSpans {
    const Form& form;
    const uint32_t* x;
    int64_t rows, first, last, begin, count;
    typename Form::Sum* sums;
    template <int P>
    INLINE void run(int64_t panel) const {
        Span<Form> span = form.template span<P>(panel, begin, count);
        bool more = panel + P < last, over = !more && begin + count == form.units;  // of the group's panels; with the group
        const char* from = panel_of(form.weight, more || over ? panel + P : first) + (more ? begin : over ? 0 : begin + count) * Form::UNIT_BYTES;
        Next next = {from, count * P * Form::UNIT_BYTES};
        in_blocks(rows, AddSpan<Form, P>{form, x, rows, span, next, sums + (panel - first) * rows * PANEL});
    }
};

// Adds units [begin, begin + count) to the sums of rows by panels [first, last).
template <class Form>
static NOINLINE void add_spans(const Form& form, const uint32_t* x, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t count, typename Form::Sum* sums) {
    in_panels(first, last, AddSpans<Form>{form, x, rows, first, last, begin, count, sums});
}

// Few rows: many panels at once, to have enough loads on the way.
template <class Form, class Done>
static void walk_few(const Form& form, const uint32_t* x, int64_t rows, int64_t row0, int64_t begin, int64_t end, const Done& done) {
    alignas(64) typename Form::Sum sums[2 * 8 * PANEL];
#define BLOCKS(R, P)                                                                               \
    for (; panel + (P) <= end; panel += (P)) {                                                         \
        form.template span<P>(panel, 0, form.units).template add<R, P>(x, sums, (R) * PANEL);   \
        done(sums, (R) * PANEL, row0, R, panel, P);                                                    \
    }
    int64_t panel = begin;
    if (rows == 2) {
#if defined(WIDE)
        BLOCKS(2, 4)
#endif
        BLOCKS(2, 2)
        BLOCKS(2, 1)
    } else {
#if defined(WIDE)
        BLOCKS(1, 8)
#endif
        BLOCKS(1, 4)
        BLOCKS(1, 1)
    }
#undef BLOCKS
}

// Walks over `rows` rows, copied, and panels [begin, end). `sums` holds rows * GROUP * PANEL numbers. Calls done(sums, panel_sums,
// row0, rows, first panel, panels).
template <class Form, class Done>
static void walk(const Form& form, const uint32_t* x, int64_t rows, int64_t row0, int64_t begin, int64_t end, typename Form::Sum* sums, const Done& done) {
    for (int64_t first = begin; first < end; first += GROUP) {
        int64_t last = first + GROUP < end ? first + GROUP : end;
        constexpr int64_t span = SPAN_BYTES / Form::UNIT_BYTES;
        for (int64_t u = 0; u < form.units; u += span) {
            int64_t count = form.units - u < span ? form.units - u : span;
            add_spans(form, x, rows, first, last, u, count, sums);
        }
        done(sums, rows * PANEL, row0, rows, first, last - first);
    }
}

// Rows [row, row + rows) of a form, copied, times panels.
template <class Form>
struct CopiedRows {
    const Form& form;
    const uint32_t* x;
    typename Form::Sum* sums;
    int64_t row, rows;

    template <class Done>
    void operator()(int64_t begin, int64_t end, const Done& done) const {
        if (rows <= FEW) walk_few(form, x, rows, row, begin, end, done);
        else walk(form, x, rows, row, begin, end, sums, done);
    }
};

// Copies rows of x, chunk by chunk, and calls `each(row, count, chunk)`: chunk(begin, end, done) multiplies rows [row, row + count).
template <class Form, class Each>
static void in_chunks(const Form& form, const void* x, int64_t rows, int64_t stride, const Each& each) {
    int64_t chunks = (rows + CHUNK - 1) / CHUNK, step = ((rows + chunks - 1) / chunks + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
    typename Form::Sum* sums = (typename Form::Sum*)scratch(step * (GROUP * PANEL + form.units) * 4);
    uint32_t* copy = (uint32_t*)(sums + step * GROUP * PANEL);
    for (int64_t row = 0; row < rows; row += step) {
        int64_t count = rows - row < step ? rows - row : step;
        copy_rows<Form>((const typename Form::Number*)x + row * stride, count, stride, form.inner, form.units, copy);
        each(row, count, CopiedRows<Form>{form, copy, sums, row, count});
    }
}

// This thread's rows and panels of a product. Many rows are divided first, for a thread copies those that it computes.
struct Division {
    Share rows, panels;

    Division(int64_t num_rows, int64_t num_panels, const Team& team)
        : Division(num_rows, num_panels, team.thread, team.threads, parts_of(num_rows, team.threads)) {}

   private:
    Division(int64_t num_rows, int64_t num_panels, int thread, int threads, int parts)
        : rows(num_rows, ROW_UNIT, thread % parts, parts), panels(num_panels, 2, thread / parts, threads / parts) {}

    static int parts_of(int64_t num_rows, int threads) {
        int parts = threads;
        while (threads % parts || (parts > 1 && num_rows < parts * CHUNK)) parts--;
        return parts;
    }
};

}  // namespace
