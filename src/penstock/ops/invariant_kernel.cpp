// Operations on rows of numbers, for CPUs, whose bits are the same for a row whatever other rows there are and however
// many threads: each sum is taken in one order, by lanes of a vector and by pieces of fixed size, and numbers at the end
// of a row go through the same vector instructions as all others. Called by invariant_cpu.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#endif
constexpr int DEPTH = 1024;    // numbers of a row that are summed by lanes, before the lanes are
constexpr int ROWS = 32, COLUMNS = 48;  // of the result, that a thread works on at a time
constexpr int64_t THREAD_WORK = 1 << 16;  // multiplications that waking another thread is worth

struct bfloat16 {
    uint16_t bits;
};

template <class T> struct Traits;
template <> struct Traits<float> {
    using sum = float;
    typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t integers __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Traits<double> {
    using sum = double;
    typedef double vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t integers __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Traits<bfloat16> : Traits<float> {};

template <class T> using sum_t = typename Traits<T>::sum;
template <class A> using vector = typename Traits<A>::vector;
template <class A> constexpr int WIDTH = VECTOR_BYTES / sizeof(A);

template <class A> inline vector<A> load(const A *from) {
    vector<A> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline vector<float> load(const bfloat16 *from) {
    typedef uint16_t narrow __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t wide __attribute__((vector_size(VECTOR_BYTES)));
    narrow bits;
    std::memcpy(&bits, from, sizeof bits);
    return reinterpret_cast<vector<float>>(__builtin_convertvector(bits, wide) << 16);
}
template <class T> inline vector<sum_t<T>> load_some(const T *from, int count) {  // zeros behind `count`
    T padded[WIDTH<sum_t<T>>] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}
template <class A> inline void store(A *to, vector<A> v) { std::memcpy(to, &v, sizeof v); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline void narrow(float x, float &to) { to = x; }
inline void narrow(double x, double &to) { to = x; }
inline void narrow(float x, bfloat16 &to) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// The upper half of the lanes is added to the lower one, until there is one.
template <class A> inline A sum_lanes(vector<A> v) {
    A lanes[WIDTH<A>];
    store(lanes, v);
    for (int half = WIDTH<A> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// ----------------------------------------------------------------------------------------------------- the product

// As above, for as many vectors as a vector has lanes, together: the sum of `some[i]` is lane i.
template <class A, int HALF = WIDTH<A> / 2> inline vector<A> sum_lanes(vector<A> *some) {
    constexpr int W = WIDTH<A>, COUNT = 2 * HALF;
    typename Traits<A>::integers low, high;
    for (int lane = 0; lane < W; ++lane) {
        const int within = lane % (W / 2), from = lane / (W / 2) * W + within / HALF * COUNT + within % HALF;
        low[lane] = from;
        high[lane] = from + HALF;
    }
    for (int i = 0; i < HALF; ++i) {
        const vector<A> one = some[2 * i], other = some[2 * i + 1];
        some[i] = __builtin_shuffle(one, other, low) + __builtin_shuffle(one, other, high);
    }
    if constexpr (HALF > 1) return sum_lanes<A, HALF / 2>(some);
    else return some[0];
}

// R rows of x times C rows of the weight, over `depth` numbers of each, a whole number of vectors but for the weight's
// last `rest`: out [R][C] (+)=. However large R and C are, each result is summed in the same order. Where `ahead`, the
// C rows of the weight behind these are brought nearer.
template <class T, int R, int C>
void multiply(const sum_t<T> *x, int64_t x_row, const T *weight, int64_t weight_row, int depth, int rest,
              sum_t<T> *out, int64_t out_row, bool add, bool ahead) {
    using A = sum_t<T>;
    constexpr int W = WIDTH<A>;
    constexpr int SUMS = (R * C + W - 1) / W * W;  // R * C of them, and what is wanting to a whole vector's
    vector<A> sums[SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; ++i) sums[i] = vector<A>{};
    int k = 0;
    for (; k + W <= depth; k += W) {
        vector<A> rows[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            vector<A> row = load(weight + c * weight_row + k);
            asm("" : "+v"(row));  // in a register: else it is loaded again by each multiplication
            if (ahead) __builtin_prefetch(weight + (C + c) * weight_row + k);
            rows[c] = row;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vector<A> own = load(x + r * x_row + k);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[r * C + c] += own * rows[c];
        }
    }
    if (rest) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const vector<A> row = load_some(weight + c * weight_row + k, rest);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r * C + c] += load(x + r * x_row + k) * row;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; i += W) {
        A totals[W];
        store(totals, sum_lanes<A>(sums + i));
        for (int j = i; j < std::min(i + W, R * C); ++j) {
            A &place = out[j / C * out_row + j % C];
            place = add ? place + totals[j - i] : totals[j - i];
        }
    }
}

// `rows` of x, R at a time, times C rows of the weight, which stay in the nearest cache.
template <class T, int R, int C>
void multiply_rows(const sum_t<T> *x, int64_t x_row, int rows, const T *weight, int64_t weight_row, int depth, int rest,
                   sum_t<T> *out, int64_t out_row, bool add, bool ahead = true) {
    for (; rows >= R; rows -= R, x += R * x_row, out += R * out_row, ahead = false)
        multiply<T, R, C>(x, x_row, weight, weight_row, depth, rest, out, out_row, add, ahead);
    if constexpr (R > 1)
        multiply_rows<T, R / 2, C>(x, x_row, rows, weight, weight_row, depth, rest, out, out_row, add, ahead);
}

// `rows` of x times so many `columns` of the result, C at a time.
template <class T, int R, int C>
void multiply_columns(const sum_t<T> *x, int64_t x_row, int rows, const T *weight, int64_t weight_row, int columns,
                      int depth, int rest, sum_t<T> *out, int64_t out_row, bool add) {
    for (; columns >= C; columns -= C, weight += C * weight_row, out += C)
        multiply_rows<T, R, C>(x, x_row, rows, weight, weight_row, depth, rest, out, out_row, add);
    if constexpr (C > 1)
        multiply_columns<T, R, C / 2>(x, x_row, rows, weight, weight_row, columns, depth, rest, out, out_row, add);
}

// out [rows][height] = x [rows][size] times the transpose of weight [height][size], plus bias [height], or null.
template <class T>
void product(const T *x, const T *weight, const T *bias, T *out, int64_t rows, int64_t size, int64_t height,
             int64_t threads) {
    using A = sum_t<T>;
    constexpr int W = WIDTH<A>;
    const int64_t padded = (size + W - 1) / W * W;
    const int64_t tall = (rows + ROWS - 1) / ROWS, wide = (height + COLUMNS - 1) / COLUMNS;
    threads = std::clamp<int64_t>(rows * size * height / THREAD_WORK, 1, threads);
    std::vector<A> widened(rows * padded + W);  // as numbers that are summed, with zeros behind each row
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t k = 0; k < size; ++k) widened[row * padded + k] = widen(x[row * size + k]);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tall * wide; ++tile) {
            // Threads go on from one piece of the weight to the next, and use each for all rows.
            const int64_t column = tile / tall * COLUMNS, row = tile % tall * ROWS;
            const int own_rows = std::min<int64_t>(ROWS, rows - row);
            const int columns = std::min<int64_t>(COLUMNS, height - column);
            A sums[ROWS * COLUMNS];
            for (int64_t k = 0; k < std::max<int64_t>(size, 1); k += DEPTH) {
                const int depth = std::min<int64_t>(DEPTH, size - k);
                multiply_columns<T, 4, REGISTERS == 32 ? 6 : 3>(
                    widened.data() + row * padded + k, padded, own_rows, weight + column * size + k, size, columns,
                    depth, depth % W, sums, COLUMNS, k > 0);
            }
            for (int r = 0; r < own_rows; ++r) {
                for (int c = 0; c < columns; ++c) {
                    const A total = sums[r * COLUMNS + c];
                    narrow(bias ? total + widen(bias[column + c]) : total, out[(row + r) * height + column + c]);
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------ row by row

// out [rows][size] = x over its root mean square, times the weight. A row of x is `step` numbers behind the last.
template <class T>
void norm(const T *x, int64_t step, const T *weight, T *out, int64_t rows, int64_t size, double eps, int64_t threads) {
    using A = sum_t<T>;
    constexpr int W = WIDTH<A>;
    threads = std::clamp<int64_t>(rows * size / THREAD_WORK, 1, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *own = x + row * step;
        vector<A> sums = {};
        int64_t k = 0;
        for (; k + W <= size; k += W) {
            const vector<A> v = load(own + k);
            sums += v * v;
        }
        if (k < size) {
            const vector<A> v = load_some(own + k, size - k);
            sums += v * v;
        }
        const A factor = 1 / std::sqrt(sum_lanes<A>(sums) / size + A(eps));
        for (k = 0; k < size; ++k) narrow(widen(own[k]) * factor * widen(weight[k]), out[row * size + k]);
    }
}

// e to the power of x, of all lanes by the same instructions; infinite from 2^127 on. The polynomial, for |f| <= 1/2, is a Chebyshev fit of the
// power of two, whose own error is 5e-9.
inline vector<float> exponential(vector<float> x) {
    typedef Traits<float>::integers integers;
    const vector<float> low = vector<float>{} - 126.0f, high = vector<float>{} + 127.0f;
    const vector<float> y = x * 1.44269504f;
    const float magic = 12582912;  // 1.5 * 2^23: when it is added, the nearest integer is left in the low bits
    const vector<float> bounded = y < low ? low : y > high ? high : y, shifted = bounded + magic;
    const vector<float> whole = shifted - magic;
    // In two steps: where the exponent is large, the rounding of one product would show.
    vector<float> f = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    f = y < low || y > high ? vector<float>{} : f * 1.44269504f;
    vector<float> p = f * 1.54614478e-4f + 1.33908668e-3f;
    p = p * f + 9.61805694e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    const integers exponent = reinterpret_cast<integers>(shifted) - (0x4b400000 - 127);
    p = p * reinterpret_cast<vector<float>>(exponent << 23);
    p = y > high ? vector<float>{} + std::numeric_limits<float>::infinity() : p;
    return x == x ? p : x;
}
inline vector<double> exponential(vector<double> x) {
    for (int lane = 0; lane < WIDTH<double>; ++lane) x[lane] = std::exp(x[lane]);
    return x;
}

// out [rows][size] = silu(gate) * up, of the halves of gate_up [rows][2 * size].
template <class T> void gated(const T *gate_up, T *out, int64_t rows, int64_t size, int64_t threads) {
    using A = sum_t<T>;
    constexpr int W = WIDTH<A>;
    threads = std::clamp<int64_t>(rows * size * 8 / THREAD_WORK, 1, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t k = 0; k < size; k += W) {
            const int count = std::min<int64_t>(W, size - k);
            const vector<A> x = load_some(gate + k, count), y = load_some(up + k, count);
            A lanes[W];
            store(lanes, x / (A(1) + exponential(-x)) * y);
            for (int i = 0; i < count; ++i) narrow(lanes[i], out[row * size + k + i]);
        }
    }
}

}  // namespace

extern "C" {

#define ROW_OPERATIONS(NAME, TYPE)                                                                                     \
    void product_##NAME(const TYPE *x, const TYPE *weight, const TYPE *bias, TYPE *out, int64_t rows, int64_t size,    \
                        int64_t height, int64_t threads) {                                                             \
        product<TYPE>(x, weight, bias, out, rows, size, height, threads);                                              \
    }                                                                                                                  \
    void norm_##NAME(const TYPE *x, int64_t step, const TYPE *weight, TYPE *out, int64_t rows, int64_t size,           \
                     double eps, int64_t threads) {                                                                    \
        norm<TYPE>(x, step, weight, out, rows, size, eps, threads);                                                    \
    }                                                                                                                  \
    void gated_##NAME(const TYPE *gate_up, TYPE *out, int64_t rows, int64_t size, int64_t threads) {                   \
        gated<TYPE>(gate_up, out, rows, size, threads);                                                                \
    }

ROW_OPERATIONS(float32, float)
ROW_OPERATIONS(float64, double)
ROW_OPERATIONS(bfloat16, bfloat16)

// The cosines and sines of angles [count], one at a time.
void turns(const float *angles, float *cosines, float *sines, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        cosines[i] = std::cos(angles[i]);
        sines[i] = std::sin(angles[i]);
    }
}
}
