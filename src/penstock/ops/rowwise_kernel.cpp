// What is done to each row alone between products, for CPUs: norms and rotations. Called by rowwise.py.
// Numbers are float32 or bfloat16, and all is computed in float32. A row's bits do not depend on the others.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int64_t THREAD_WORK = 1 << 15;  // numbers that waking another thread is worth

inline void store(float *at, vector v, int64_t count) {
    std::memcpy(at, &v, std::min<int64_t>(count, WIDTH) * sizeof *at);
}
inline void store(bfloat16 *at, vector v, int64_t count) {  // to the nearest, of two the even one
    words bits = (words)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    rounded = v == v ? rounded : 0x7fc0u + (bits & 0);  // else what is no number might become infinite
    halves h = __builtin_convertvector(rounded, halves);
    std::memcpy(at, &h, std::min<int64_t>(count, WIDTH) * sizeof *at);
}

// What brings the root of the mean square of a row to one.
template <class T> float inverse_rms(const T *x, int64_t size, float eps) {
    vector sums = {};
    for (int64_t k = 0; k < size; k += WIDTH) {
        vector v = load(x + k, size - k);
        sums += v * v;
    }
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += sums[i];
    return 1 / std::sqrt(total / float(size) + eps);
}

// Calls `each` with all numbers below `rows`, on as many threads as so much work for each is worth.
template <class Each> void for_rows(int64_t rows, int64_t work, int64_t threads, Each each) {
    threads = std::clamp<int64_t>(rows * work / THREAD_WORK, 1, threads);
    if (threads == 1) {
        for (int64_t row = 0; row < rows; ++row) each(row);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) each(row);
}

template <class T>
void rms_norm(const T *x, const T *scale, double eps, T *out, int64_t rows, int64_t size, int64_t threads) {
    for_rows(rows, size, threads, [=](int64_t row) {
        const T *from = x + row * size;
        float factor = inverse_rms(from, size, float(eps));
        for (int64_t k = 0; k < size; k += WIDTH)
            store(out + row * size + k, load(from + k, size - k) * factor * load(scale + k, size - k), size - k);
    });
}

// Heads of a token, `token` and `head` numbers apart, and where they go: [tokens, heads, dim].
template <class T> struct Heads {
    const T *from, *scale;
    T *out;
    int64_t heads, token, head;
};

template <class T>
void rotate(const Heads<T> &given, int64_t row, const T *cosine, const T *sine, int64_t dim, float eps) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < given.heads; ++h) {
        const T *x = given.from + row * given.token + h * given.head, *scale = given.scale;
        T *out = given.out + (row * given.heads + h) * dim;
        float factor = scale ? inverse_rms(x, dim, eps) : 1;
        for (int64_t k = 0; k < half; k += WIDTH) {
            const int64_t left = half - k;
            vector a = load(x + k, left), b = load(x + half + k, left);
            if (scale) a *= factor * load(scale + k, left), b *= factor * load(scale + half + k, left);
            vector c = load(cosine + row * half + k, left), s = load(sine + row * half + k, left);
            store(out + k, a * c - b * s, left);
            store(out + half + k, b * c + a * s, left);
        }
    }
}

template <class T>
void rotate_heads(const Heads<T> *query, const Heads<T> *key, const T *cosine, const T *sine, double eps, int64_t rows,
                  int64_t dim, int64_t threads) {
    for_rows(rows, 2 * (query->heads + key->heads) * dim, threads, [=](int64_t row) {
        rotate(*query, row, cosine, sine, dim, float(eps));
        rotate(*key, row, cosine, sine, dim, float(eps));
    });
}

template <class T> void add(const T *a, const T *b, T *out, int64_t count) {
    for (int64_t k = 0; k < count; k += WIDTH) store(out + k, load(a + k, count - k) + load(b + k, count - k), count - k);
}

}  // namespace

#define ROWWISE(T, name)                                                                                              \
    extern "C" void rms_norm_##name(const T *x, const T *scale, double eps, T *out, int64_t rows, int64_t size,      \
                                    int64_t threads) {                                                                \
        rms_norm(x, scale, eps, out, rows, size, threads);                                                            \
    }                                                                                                                 \
    extern "C" void rotate_heads_##name(const Heads<T> *query, const Heads<T> *key, const T *cosine, const T *sine,  \
                                        double eps, int64_t rows, int64_t dim, int64_t threads) {                    \
        rotate_heads(query, key, cosine, sine, eps, rows, dim, threads);                                              \
    }                                                                                                                 \
    extern "C" void add_##name(const T *a, const T *b, T *out, int64_t count) { add(a, b, out, count); }

ROWWISE(float, float32)
ROWWISE(bfloat16, bfloat16)
