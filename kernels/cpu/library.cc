// The library's entry points: which instruction set, how many threads, then the kernels.
//
// No libstdc++, no libm, no threads of its own: parallel regions run through GOMP_parallel of the libgomp that torch has loaded,
// whose address comes from Python. Any thread may call.
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <xmmintrin.h>
#endif

#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// A set that was not built is null.
#define SET_OF(NAME) extern "C" const Kernels NAME __attribute__((weak, visibility("hidden")))
SET_OF(tpserve_portable);
SET_OF(tpserve_avx2);
SET_OF(tpserve_avx512);
SET_OF(tpserve_avx512_bf16);
SET_OF(tpserve_amx);
static const Kernels* const SETS[] = {&tpserve_portable, &tpserve_avx2, &tpserve_avx512, &tpserve_avx512_bf16, &tpserve_amx};

typedef void (*Region)(void*);
typedef void (*GompParallel)(Region, void*, unsigned, unsigned);
typedef int (*OmpNumber)();

static const Kernels* kernels = &tpserve_portable;
static GompParallel gomp_parallel;
static OmpNumber omp_thread, omp_threads;
static int32_t spins;  // of a thread that waits for its team

// Names the sources that the library was built from.
EXPORT const char* tpserve_version() { return VERSION; }

#if defined(__x86_64__)
static uint64_t enabled_state() {  // which registers the system saves (XGETBV)
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}

static bool allow_tiles() {  // asks Linux for the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM, XFEATURE 18)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

static int32_t highest() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C)) return PORTABLE;
    uint64_t state = enabled_state();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return PORTABLE;
    uint32_t wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL, vnni = 1u << 11;
    if ((state & 0xe6) != 0xe6 || (b & wide) != wide || !(c & vnni)) return AVX2;
    uint32_t tiles = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    bool has_tiles = (d & tiles) == tiles && (state & 3u << 17) == 3u << 17;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return AVX512;
    return has_tiles ? AMX : AVX512_BF16;
}
#else
static int32_t highest() { return PORTABLE; }
static bool allow_tiles() { return false; }
#endif

// The highest instruction set of this processor and system that was built, at most `limit`. Asks the system for the tile
// registers, which it grants to threads that start later, so it is called before they start.
EXPORT int32_t tpserve_detect(int32_t limit) {
    int32_t best = highest();
    bool tiles = best == AMX && limit >= AMX && allow_tiles();
#if defined(EMULATED)
    best = AMX, tiles = true;
#endif
    if (best > limit) best = limit;
    while (best > PORTABLE && (!SETS[best] || (best == AMX && !tiles))) best--;
    return best;
}

// `isa`: from tpserve_detect. The functions of libgomp may be null: then every call runs on one thread. `may_spin`: whether each
// thread of each rank has a core of its own.
EXPORT void tpserve_start(int32_t isa, void* parallel, void* thread_number, void* number_of_threads, int32_t may_spin) {
    spins = may_spin ? 4000 : 0;
    kernels = SETS[isa];
    gomp_parallel = (GompParallel)parallel;
    omp_thread = (OmpNumber)thread_number;
    omp_threads = (OmpNumber)number_of_threads;
}

extern "C" void* tpserve_scratch(size_t bytes) {
    static __thread void* memory;
    static __thread size_t size;
    if (bytes > size) {
        free(memory);
        size = (bytes + 4095) / 4096 * 4096;
        memory = aligned_alloc(4096, size);
        if (!memory) abort();
    }
    return memory;
}

// Runs `work(team)` on every thread of a region. Rounding to nearest and denormal numbers as IEEE 754 has them, whatever
// the caller's thread had set.
template <class Work>
static void parallel(int32_t threads, const Work& work) {
    struct Job {
        const Work& work;
        Meeting meeting;
        static void run(void* self) {
            Job* job = (Job*)self;
#if defined(__x86_64__)
            unsigned before = _mm_getcsr();
            _mm_setcsr(0x1f80);
#endif
            job->work(Team{omp_thread ? omp_thread() : 0, omp_threads ? omp_threads() : 1, &job->meeting});
#if defined(__x86_64__)
            _mm_setcsr(before);
#endif
        }
    } job{work, {0, 0, spins, 0}};
    if (threads > 1 && gomp_parallel) gomp_parallel(Job::run, &job, threads, 0);
    else Job::run(&job);
}

// Bytes of a packed matrix, its head included.
EXPORT int64_t tpserve_packed_bytes(int32_t dtype, int64_t outputs, int64_t inner) {
    return sizeof(PackedHead) + (outputs + 15) / 16 * packed_panel_bytes(dtype, inner);
}

// Writes the head of a packed matrix, then `fill(row, n, panel)` for each row, the n-th output of its panel, which is zero before.
template <class Fill>
static void pack_panels(int32_t dtype, int64_t outputs, int64_t inner, void* to, int32_t threads, const Fill& fill) {
    PackedHead head = {PACKED_MAGIC, PACKED_VERSION, dtype, 0, outputs, inner, packed_panel_bytes(dtype, inner), {}};
    memcpy(to, &head, sizeof head);
    int64_t panels = (outputs + 15) / 16;
    parallel(threads, [&](const Team& team) {
        for (int64_t panel = team.thread; panel < panels; panel += team.threads) {
            char* out = (char*)to + sizeof head + panel * head.panel_bytes;
            memset(out, 0, head.panel_bytes);
            for (int n = 0; n < 16 && panel * 16 + n < outputs; n++) fill(panel * 16 + n, n, out);
        }
    });
}

// Packs a matrix [outputs, inner] with rows of `stride` numbers into `to`, 64-byte aligned and of tpserve_packed_bytes.
EXPORT void tpserve_pack(int32_t dtype, int64_t outputs, int64_t inner, const void* from, int64_t stride, void* to, int32_t threads) {
    pack_panels(dtype, outputs, inner, to, threads, [&](int64_t row, int n, char* out) {
        const uint16_t* halves = (const uint16_t*)from + row * stride;
        const uint32_t* words = (const uint32_t*)from + row * stride;
        if (dtype == BFLOAT16)
            for (int64_t k = 0; k < inner; k++) ((uint16_t*)out)[k / 2 * 32 + 2 * n + k % 2] = halves[k];
        else
            for (int64_t k = 0; k < inner; k++) ((uint32_t*)out)[k * 16 + n] = words[k];
    });
}

// Packs int8 numbers [outputs, inner] with their scales [outputs]; the rest as of tpserve_pack.
EXPORT void tpserve_pack_int8(int64_t outputs, int64_t inner, const int8_t* from, int64_t stride, const float* scales, void* to, int32_t threads) {
    int64_t end = packed_panel_bytes(INT8, inner);
    pack_panels(INT8, outputs, inner, to, threads, [&](int64_t row, int n, char* out) {
        const int8_t* numbers = from + row * stride;
        int32_t* sum = (int32_t*)(out + end - 64) + n;
        for (int64_t k = 0; k < inner; k += 4) memcpy(out + k * 16 + n * 4, numbers + k, inner - k < 4 ? inner - k : 4);
        for (int64_t k = 0; k < inner; k++) *sum += numbers[k];
        ((float*)(out + end - 128))[n] = scales[row];
    });
}

// Rows `ids` of a packed matrix, as they were before packing: out[i] = matrix[ids[i]], rows of `inner` numbers. Of int8: float32.
EXPORT void tpserve_lookup(const PackedHead* weight, const int64_t* ids, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i++) {
        const char* panel = (const char*)(weight + 1) + ids[i] / 16 * weight->panel_bytes;
        int64_t n = ids[i] % 16, inner = weight->inner;
        if (weight->dtype == INT8) {
            float scale = ((const float*)(panel + weight->panel_bytes - 128))[n];
            for (int64_t k = 0; k < inner; k++) ((float*)to)[i * inner + k] = (float)((const int8_t*)panel)[k / 4 * 64 + 4 * n + k % 4] * scale;
        } else if (weight->dtype == BFLOAT16)
            for (int64_t k = 0; k < inner; k++) ((uint16_t*)to)[i * inner + k] = ((const uint16_t*)panel)[k / 2 * 32 + 2 * n + k % 2];
        else
            for (int64_t k = 0; k < inner; k++) ((uint32_t*)to)[i * inner + k] = ((const uint32_t*)panel)[k * 16 + n];
    }
}

// Writes values[which[i]] to addresses[i]: what changes in a list of calls from step to step.
EXPORT void tpserve_set(int64_t* const* addresses, const int32_t* which, int64_t count, const int64_t* values) {
    for (int64_t i = 0; i < count; i++) *addresses[i] = values[which[i]];
}

// Runs the calls in order on `threads` threads; a call begins when every thread has ended the one before. Returns how many have
// ended: less than `count` when the next one has stopped, which is continued by running the rest of the list.
EXPORT int32_t tpserve_run(const Call* calls, int32_t count, int32_t threads) {
    int32_t ended = count;
    parallel(threads, [&](const Team& team) {
        for (int32_t i = 0; i < count; i++) {
            if (i) team.barrier();
            kernels->operations[calls[i].operation](calls[i].arguments, team);
            if (team.meeting->stopped) {
                if (team.thread == 0) ended = i;
                return;
            }
        }
    });
    return ended;
}
