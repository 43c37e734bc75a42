// Vectors of float32 for kernels of few rows, which low_rank_kernel.cpp, rowwise_kernel.cpp and logprobs_kernel.cpp share:
// numbers are float32 or bfloat16 in memory, and float32 in registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif

typedef float vector __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t integers __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t words __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint16_t halves __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

struct bfloat16 {
    uint16_t bits;
};

inline bfloat16 narrow(float x) {  // of numbers that bfloat16 holds
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {uint16_t(bits >> 16)};
}

// WIDTH numbers from `at` on, or `count` and behind them `rest`, which bfloat16 holds.
inline vector load(const float *at, int64_t count, float rest = 0) {
    vector v = vector{} + rest;
    if (count >= WIDTH) std::memcpy(&v, at, sizeof v);
    else std::memcpy(&v, at, count * sizeof *at);
    return v;
}
inline vector load(const bfloat16 *at, int64_t count, float rest = 0) {
    halves h = halves{} + narrow(rest).bits;
    if (count >= WIDTH) std::memcpy(&h, at, sizeof h);
    else std::memcpy(&h, at, count * sizeof *at);
    return (vector)(__builtin_convertvector(h, words) << 16);
}

}  // namespace
