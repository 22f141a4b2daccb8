// How a team divides work.
#pragma once

#include "kernels.h"

namespace {

// This thread's share of [0, count), in whole units.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int64_t unit, const Team& team) : Share(count, unit, team.thread, team.threads) {}
    Share(int64_t count, int64_t unit, int part, int parts) {  // part `part` of `parts`
        int64_t units = (count + unit - 1) / unit;
        begin = units * part / parts * unit;
        end = units * (part + 1) / parts * unit;
        if (end > count) end = count;
        if (begin > count) begin = count;
    }
};

}  // namespace
