// Working memory of a thread, kept for its next call.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" __attribute__((visibility("hidden"))) void* tpserve_scratch(size_t bytes);

namespace {
constexpr int64_t LINE = 64;  // bytes. Rows of scratch are a multiple of lines plus one apart, or they would share lines of a cache
constexpr size_t CHUNK_BYTES = 256 << 10;  // half of a small core's second cache
static inline void* scratch(size_t bytes) { return tpserve_scratch(bytes); }
}  // namespace
