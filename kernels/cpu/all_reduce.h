// Sums over the ranks of one host through the page of parallel/shm.py.
#pragma once

#include "scratch.h"

#include <time.h>

#include "api.h"
#include "rows.h"
#include "share.h"
#include "vector.h"

namespace {

constexpr int64_t SPIN_NS = 10000, SLEEP_AFTER_NS = 1000000, STOP_AFTER_NS = 5000000, SLEEP_NS = 50000;

static inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

INLINE int64_t* counter_of(const Page& page, int rank) { return (int64_t*)(page.counters + rank * LINE); }

static inline bool all_published(const Page& page, int64_t round) {
    for (int i = 0; i < page.ranks; i++)
        if (__atomic_load_n(counter_of(page, i), __ATOMIC_ACQUIRE) < round) return false;
    return true;
}

// Waits until every rank has published `round`: spins, then yields, then sleeps, then gives up. One look when `patient` is false.
static bool wait_for(const Page& page, int64_t round, bool may_spin, bool patient) {
    if (all_published(page, round)) return true;
    if (!patient) return false;
    int64_t begin = now_ns(), waited = 0;
    while (!all_published(page, round)) {
        if (waited > STOP_AFTER_NS) return false;
        if (may_spin && waited < SPIN_NS) {
#if defined(__x86_64__)
            for (int i = 0; i < 8; i++) _mm_pause();
#endif
        } else if (waited < SLEEP_AFTER_NS) {
            sched_yield();
        } else {
            timespec pause = {0, SLEEP_NS};
            nanosleep(&pause, nullptr);
        }
        waited = now_ns() - begin;
    }
    return true;
}

// x[begin, end) = the sum of what the ranks have there in their slots of a half.
template <class T>
static void reduce_slots(const Page& page, const char* half, T* x, int64_t begin, int64_t end, int32_t) {
    for (int64_t at = begin; at < end; at += W) {
        V sum = read_at((const T*)half, at, end) + read_at((const T*)(half + page.slot_bytes), at, end);
        for (int i = 2; i < page.ranks; i++) sum = rounded(sum, x) + read_at((const T*)(half + i * page.slot_bytes), at, end);
        write_at(x, at, end, sum);
    }
}

// W integers of a slot from `at` on, zeros past `end`.
INLINE VI integers_at(const char* slot, int64_t at, int64_t end) {
    if (at + W <= end) return load<VI>(slot + at * 4);
    VI lanes = {};
    memcpy(&lanes, slot + at * 4, (end - at) * 4);
    return lanes;
}

// The same of integers, or their maximum.
static void reduce_slots(const Page& page, const char* half, int32_t* x, int64_t begin, int64_t end, int32_t reduction) {
    for (int64_t at = begin; at < end; at += W) {
        VI all = integers_at(half, at, end);
        for (int i = 1; i < page.ranks; i++) {
            VI one = integers_at(half + i * page.slot_bytes, at, end);
            all = reduction == MAX ? (all > one ? all : one) : (VI)((VU)all + (VU)one);
        }
        if (at + W <= end) store(x + at, all);
        else memcpy(x + at, &all, (end - at) * 4);
    }
}

template <class T>
static void all_reduce_numbers(const AllReduce& arguments, const Team& team) {
    Page& page = *arguments.page;
    int64_t count = arguments.rows * arguments.width, most = page.slot_bytes / sizeof(T);
    // Every thread keeps its own copy of these; thread 0 alone writes the page's, between two barriers.
    int64_t done = page.done, round = page.round;
    bool published = page.waiting;
    Share rows(arguments.rows, 1, team);
    bool by_rows = arguments.norm && count <= most;  // the thread that sums a row also norms it
    while (done < count) {
        int64_t part = count - done < most ? count - done : most;
        T* x = (T*)arguments.x + done;
        Share share(part, LINE, team);
        if (by_rows) share.begin = rows.begin * arguments.width, share.end = rows.end * arguments.width;
        if (!published) round++;
        char* half = page.slots + (round & 1) * page.ranks * page.slot_bytes;
        if (!published) memcpy((T*)(half + page.index * page.slot_bytes) + share.begin, x + share.begin, (share.end - share.begin) * sizeof(T));
        team.barrier();
        if (team.thread == 0) {
            if (!published) __atomic_store_n(counter_of(page, page.index), round, __ATOMIC_RELEASE);
            bool complete = wait_for(page, round, team.meeting->spins > 0, !published);
            page.round = round, page.done = done, page.waiting = !complete;
            if (!complete) team.meeting->stopped = 1;
        }
        team.barrier();
        if (team.meeting->stopped) return;
        published = false;
        reduce_slots(page, half, x, share.begin, share.end, arguments.reduction);
        done += part;
    }
    if (team.thread == 0) page.done = 0;
    if (!arguments.norm) return;
    if (!by_rows) team.barrier();
    norm_rows(*arguments.norm, rows);
}

static void all_reduce(const AllReduce& arguments, const Team& team) {
    if (arguments.dtype == INT32) return all_reduce_numbers<int32_t>(arguments, team);
    arguments.dtype == FLOAT32 ? all_reduce_numbers<float>(arguments, team) : all_reduce_numbers<bf16>(arguments, team);
}

}  // namespace
