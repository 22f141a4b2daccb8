// What an instruction set offers: one table of functions each. Every function is this thread's share of one operation.
#pragma once

#include "api.h"

struct Kernels {
    void (*product)(const Product&, int thread, int threads);
};
