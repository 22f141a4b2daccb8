// What an instruction set offers: a table with one function for each operation. The threads of a region, a team, call it together;
// each computes its share.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include "api.h"

// Where the threads of a team wait for each other. A waiting thread spins for some microseconds, then gives its core away.
struct Meeting {
    int32_t arrived = 0, round = 0;
    int32_t spins;  // 0 when there are more threads and ranks than cores: then nobody spins, for other ranks neither
    int32_t stopped = 0;  // set between two barriers of an operation that cannot go on: the list of calls ends there
};

struct Team {
    int thread, threads;
    Meeting* meeting;

    // Everything that any thread of the team wrote before is visible to all after.
    // Inlined, so that no instruction set takes the copy of another.
    inline __attribute__((always_inline)) void barrier() const {
        if (threads == 1) return;
        int32_t round = __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&meeting->round, round + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int32_t spin = 0; __atomic_load_n(&meeting->round, __ATOMIC_ACQUIRE) == round;) {
            if (spin++ < meeting->spins) {
#if defined(__x86_64__)
                _mm_pause();
#endif
            } else {
                sched_yield();
            }
        }
    }
};

struct Kernels {
    void (*operations[NUM_OPERATIONS])(const void* arguments, const Team&);
};
