// Log-probabilities of tokens and how their distributions are spread, for CPUs. Called by logprobs.py.
// Scores are float32 or bfloat16; terms are computed in float32, and sums over blocks of them in float64. A row's bits
// do not depend on the others.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace {

constexpr int64_t THREAD_WORK = 1 << 14;  // scores that waking another thread is worth
constexpr int64_t BLOCK = 512;            // scores whose terms are added in float32
constexpr int64_t FIXED = 5;              // columns: token, rank, log-probability, entropy and certainty
constexpr float LOG2E = 1.44269504f, LOWEST = -std::numeric_limits<float>::infinity();

inline float number(float x) { return x; }
inline float number(bfloat16 x) {
    const uint32_t wide = uint32_t(x.bits) << 16;
    float found;
    std::memcpy(&found, &wide, sizeof found);
    return found;
}

// 2 to the power of numbers up to 0, to 2e-7; below -127 it is that of -127.
inline vector exp2(vector x) {
    const float magic = 12582912;  // 1.5 * 2^23: when it is added, the nearest integer is left in the low bits
    x = x < -127.0f ? vector{} - 127.0f : x;
    const vector shifted = x + magic, f = x - (shifted - magic);
    vector p = f * 1.54614478e-4f + 1.33908668e-3f;
    p = p * f + 9.61805694e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return p * (vector)(((integers)shifted - (0x4b400000 - 127)) << 23);
}

inline double sum(vector v) {
    double total = 0;
    for (int i = 0; i < WIDTH; ++i) total += v[i];
    return total;
}

// Of gaps g = score - top: the sums of exp(g), of g exp(g) and of g, how many scores are above one, and how many can
// come.
struct Sums {
    double weights = 0, weighted = 0, gaps = 0;
    int64_t above = 0, there = 0;
};

template <class T> Sums sums_of(const T *scores, int64_t size, float top, float own) {
    Sums found;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t end = std::min(size, begin + BLOCK);
        vector weights = {}, weighted = {}, gaps = {};
        integers above = {}, counted = {};
        for (int64_t k = begin; k < end; k += WIDTH) {
            const vector score = load(scores + k, end - k, LOWEST), gap = score - top;
            const integers there = gap > LOWEST;  // what cannot come has no weight, and its gap no number
            const vector weight = (vector)((integers)exp2(gap * LOG2E) & there), known = (vector)((integers)gap & there);
            weights += weight;
            weighted += weight * known;
            gaps += known;
            above -= score > own;
            counted -= there;
        }
        found.weights += sum(weights), found.weighted += sum(weighted), found.gaps += sum(gaps);
        for (int i = 0; i < WIDTH; ++i) found.above += above[i], found.there += counted[i];
    }
    return found;
}

template <class T> float largest(const T *scores, int64_t size) {
    vector top = vector{} + LOWEST;
    for (int64_t k = 0; k < size; k += WIDTH) {
        const vector score = load(scores + k, size - k, LOWEST);
        top = score > top ? score : top;
    }
    float found = LOWEST;
    for (int i = 0; i < WIDTH; ++i) found = std::max(found, top[i]);
    return found;
}

template <class T>
void tell(const T *scores, int64_t stride, const int64_t *tokens, const bool *spread, int32_t *table, double *bases,
          int64_t rows, int64_t size, int64_t threads) {
    threads = std::clamp<int64_t>(rows * size / THREAD_WORK, 1, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const T *own = scores + row * stride;
        const float top = largest(own, size), score = number(own[tokens[row]]);
        const Sums sums = sums_of(own, size, top, score);
        const double base = std::log(sums.weights);
        float told[3] = {float(double(score) - top - base), 0, 0};
        if (spread && spread[row]) {
            told[1] = float(base - sums.weighted / sums.weights);
            told[2] = sums.there == size ? float(base - sums.gaps / size - std::log(double(size))) : -LOWEST;
        }
        int32_t *out = table + row * FIXED;
        out[0] = int32_t(tokens[row]), out[1] = int32_t(sums.above + 1);
        std::memcpy(out + 2, told, sizeof told);
        bases[2 * row] = top, bases[2 * row + 1] = base;  // what is told of another token is reckoned as this one
    }
}

}  // namespace

#define LOGPROBS(T, name)                                                                                           \
    extern "C" void tell_##name(const T *scores, int64_t stride, const int64_t *tokens, const bool *spread,         \
                                int32_t *table, double *bases, int64_t rows, int64_t size, int64_t threads) {        \
        tell(scores, stride, tokens, spread, table, bases, rows, size, threads);                                    \
    }

LOGPROBS(float, float32)
LOGPROBS(bfloat16, bfloat16)
