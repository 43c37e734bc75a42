// What adapters add to the products of rows with a matrix, for CPUs: out += x A^T B, each row with the A and B of its
// own adapter. Called by low_rank.py. A row's bits do not depend on the others: whatever rows are taken together, each
// sum is in one order.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int ROWS = 4, RANKS = 4;       // rows of one adapter, and of its matrices, that are in registers together
constexpr int64_t THREAD_WORK = 1 << 16;  // multiplications that waking another thread is worth

inline float sum_lanes(vector v) {
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

struct Matrices {
    const float *a;         // [pieces][slots][rank][size]
    const float *const *b;  // of each piece [slots][rank][its rows]
    const int64_t *ranges;  // [pieces][2]: where a piece's rows begin and end
    int64_t pieces, slots, rank, size;
};

// Adds to R rows of out what Q rows of A [size] and of B [width] make of those of x.
template <int R, int Q>
void add_ranks(const float *const *x, const float *a, int64_t size, const float *b, int64_t width, float *const *out) {
    vector sums[R][Q] = {};
    // What is needed next comes from far away.
    for (int64_t k = 0; k < Q * width; k += 64 / sizeof(float)) __builtin_prefetch(b + k);
    for (int64_t k = 0; k < size; k += WIDTH) {
        const int64_t count = size - k;
        vector own[R];
        for (int r = 0; r < R; ++r) own[r] = load(x[r] + k, count);
        for (int q = 0; q < Q; ++q) {
            const vector row = load(a + q * size + k, count);
            for (int r = 0; r < R; ++r) sums[r][q] += own[r] * row;
        }
    }
    float inner[R][Q];
    for (int r = 0; r < R; ++r)
        for (int q = 0; q < Q; ++q) inner[r][q] = sum_lanes(sums[r][q]);
    for (int64_t k = 0; k < width; k += WIDTH) {
        const int64_t count = std::min<int64_t>(WIDTH, width - k);
        vector rows[Q];
        for (int q = 0; q < Q; ++q)
            rows[q] = load(b + q * width + k, count);
        for (int r = 0; r < R; ++r) {
            vector sum = load(out[r] + k, count);
            for (int q = 0; q < Q; ++q) sum += inner[r][q] * rows[q];
            std::memcpy(out[r] + k, &sum, count * sizeof(float));
        }
    }
}

template <int R> void add_rows(const Matrices &matrices, int64_t slot, const float *const *x, float *const *out) {
    const int64_t rank = matrices.rank, size = matrices.size;
    for (int64_t piece = 0; piece < matrices.pieces; ++piece) {
        const int64_t begin = matrices.ranges[2 * piece], width = matrices.ranges[2 * piece + 1] - begin;
        const float *a = matrices.a + (piece * matrices.slots + slot) * rank * size;
        const float *b = matrices.b[piece] + slot * rank * width;
        float *own[R];
        for (int r = 0; r < R; ++r) own[r] = out[r] + begin;
        int64_t q = 0;
        for (; q + RANKS <= rank; q += RANKS) add_ranks<R, RANKS>(x, a + q * size, size, b + q * width, width, own);
        for (; q < rank; ++q) add_ranks<R, 1>(x, a + q * size, size, b + q * width, width, own);
    }
}

struct Run {
    int64_t slot, first, count;
};

// The runs of up to ROWS rows that have the same adapter, as places in `rows`: those that have one, by slots.
std::vector<Run> runs_of(const int64_t *owners, int64_t count, int64_t slots, std::vector<int64_t> &rows) {
    std::vector<int64_t> ends(slots + 2);
    for (int64_t row = 0; row < count; ++row) ++ends[owners[row] + 1];
    for (int64_t slot = 1; slot < slots + 2; ++slot) ends[slot] += ends[slot - 1];
    rows.resize(count);
    for (int64_t row = 0; row < count; ++row) rows[ends[owners[row]]++] = row;
    std::vector<Run> runs;
    for (int64_t slot = 1; slot <= slots; ++slot)
        for (int64_t first = ends[slot - 1]; first < ends[slot]; first += ROWS)
            runs.push_back({slot - 1, first, std::min<int64_t>(ROWS, ends[slot] - first)});
    return runs;
}

}  // namespace

extern "C" {

// Of each of `count` rows, `owners` has the slot, counted from 1; 0 is none. Those of x and out are `x_row` and
// `out_row` numbers apart.
void add(const int64_t *owners, int64_t count, const float *x, int64_t x_row, float *out, int64_t out_row,
         const Matrices *matrices, int64_t threads) {
    std::vector<int64_t> rows;
    const std::vector<Run> runs = runs_of(owners, count, matrices->slots, rows);
    int64_t each = matrices->pieces * matrices->size;
    for (int64_t piece = 0; piece < matrices->pieces; ++piece)
        each += matrices->ranges[2 * piece + 1] - matrices->ranges[2 * piece];
    threads = std::clamp<int64_t>(count * matrices->rank * each / THREAD_WORK, 1, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t number = 0; number < runs.size(); ++number) {
        const Run &run = runs[number];
        const float *from[ROWS];
        float *to[ROWS];
        for (int64_t r = 0; r < run.count; ++r) {
            from[r] = x + rows[run.first + r] * x_row;
            to[r] = out + rows[run.first + r] * out_row;
        }
        switch (run.count) {
        case 1: add_rows<1>(*matrices, run.slot, from, to); break;
        case 2: add_rows<2>(*matrices, run.slot, from, to); break;
        case 3: add_rows<3>(*matrices, run.slot, from, to); break;
        default: add_rows<4>(*matrices, run.slot, from, to);
        }
    }
}
}
