// Two threads run operations whose barriers order what one writes and the other reads; ThreadSanitizer sees an order that is missing,
// whatever the threads' luck. Built and run by test_cpu_races.py.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#include "all_reduce.h"

extern "C" void* tpserve_scratch(size_t bytes) {
    static __thread void* memory;
    free(memory);
    return memory = malloc(bytes);
}

constexpr int THREADS = 2;
constexpr int64_t SLOT = 1 << 12, ROWS = 2, WIDTH = 1500;  // 12,000 bytes: three rounds, which end within a row
static int32_t failed;

template <class Work>
static void in_team(const Work& work) {
    struct Job {
        const Work* work;
        Team team;
    };
    Meeting meeting{};
    pthread_t threads[THREADS];
    Job jobs[THREADS];
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = {&work, {i, THREADS, &meeting}};
        pthread_create(&threads[i], nullptr, [](void* job) -> void* {
            (*((Job*)job)->work)(((Job*)job)->team);
            return nullptr;
        }, &jobs[i]);
    }
    for (pthread_t& thread : threads) pthread_join(thread, nullptr);
}

static void check(bool right, const char* what) {
    if (!right) printf("%s\n", what), failed = 1;
}

static void all_reduce_with_norm() {
    static char counters[2 * LINE], slots[2 * 2 * SLOT];
    static float x[ROWS * WIDTH], out[ROWS * WIDTH];
    *(int64_t*)(counters + LINE) = 1 << 20;  // the other rank has published everything: zeros
    for (int64_t i = 0; i < ROWS * WIDTH; i++) x[i] = 3;
    Page page{counters, slots, SLOT, 0, 0, 0, 2, 0};
    Norm norm{};
    norm.x = x, norm.out = out, norm.width = norm.x_stride = norm.out_stride = WIDTH, norm.dtype = FLOAT32;
    AllReduce call{&page, x, &norm, ROWS, WIDTH, FLOAT32, SUM};
    in_team([&](const Team& team) { all_reduce(call, team); });
    for (int64_t i = 0; i < ROWS * WIDTH; i++) check(out[i] == 1, "all_reduce");
}

static void activation_with_quantize() {
    constexpr int64_t width = 1200;  // one row, which both threads share
    static float x[width], out[width], scale[1];
    static int8_t numbers[width + 64];
    for (int64_t i = 0; i < width; i++) x[i] = 2;
    Quantize quantize{out, scale, numbers, 1, width, width, width, FLOAT32, 0};
    Activation call{x, out, 1, width, width, width, &quantize, 0, 0, FLOAT32, RELU};
    in_team([&](const Team& team) { activation(call, team); });
    for (int64_t i = 0; i < width; i++) check(numbers[i] == 127, "activation");
}

int main() {
    all_reduce_with_norm();
    activation_with_quantize();
    return failed;
}
