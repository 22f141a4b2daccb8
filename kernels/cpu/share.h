// How a team divides work.
#pragma once

#include "kernels.h"

namespace {

// This thread's share of [0, count), in whole units.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int64_t unit, const Team& team) {
        int64_t units = (count + unit - 1) / unit;
        begin = units * team.thread / team.threads * unit;
        end = units * (team.thread + 1) / team.threads * unit;
        if (end > count) end = count;
        if (begin > count) begin = count;
    }
};

}  // namespace
