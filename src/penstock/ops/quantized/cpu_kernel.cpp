// Products with quantized matrices on CPUs, which read the matrix as it is stored. Called by cpu.py.
//
// Some rows of the matrix are decoded for a stretch of columns into a tile that stays in the first cache, and multiplied
// with all rows of x from there; the matrix is read from memory once, and nothing of it is kept. Numbers and sums are
// float32: what comes out is the product with the dequantized matrix. Loops over 32 numbers are left to the compiler,
// which has vectors for them on every processor.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vector __attribute__((vector_size(4 * LANES)));

constexpr int UNIT = 32;                  // numbers that are decoded at a time
constexpr int ROWS = 4, COLUMNS = 256;    // of a tile
constexpr int64_t THREAD_WORK = 1 << 16;  // multiplications that waking another thread is worth

// The matrix: `size` bytes of a row at `values`; where they are not within the blocks, scales and offsets of groups
// of 2^shift columns.
struct Matrix {
    const uint8_t *values;
    const float *scale, *offset, *table;
    int64_t size, groups, shift;
};

inline vector load(const float *from) {
    vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline float half(const uint8_t *at) {
    _Float16 number;
    std::memcpy(&number, at, 2);
    return float(number);
}

constexpr int HALF = UNIT / 2;

// Half a unit: the numbers that the bytes `code(0)` to `code(15)` become, times s plus o. A loop without memory between
// bits and numbers, whose codes stay bytes as long as they can: compilers have vectors for it.
template <class Code> inline void scaled(Code code, float s, float o, float *__restrict out) {
#pragma GCC unroll 1  // what is unrolled before it is made vectors of never is
    for (int i = 0; i < HALF; i++) out[i] = s * float(code(i)) + o;
}

// Each Kind decodes the numbers `column` to `column` + 32 of a row.

struct int8 {
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        int64_t group = row * m.groups + (column >> m.shift);
        const uint8_t *bytes = m.values + row * m.size + column;
        float s = m.scale[group], o = m.offset ? m.offset[group] : 0;
        for (int i = 0; i < UNIT; i += HALF) scaled([=](int k) { return int8_t(bytes[i + k]); }, s, o, out + i);
    }
};

struct int4 {  // of 32 numbers the first, third ... and then the others, as x has them
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        int64_t group = row * m.groups + (column >> m.shift);
        float s = m.scale[group], o = (m.offset ? m.offset[group] : 0) - 8 * s;
        const uint8_t *bytes = m.values + row * m.size + column / 2;
        scaled([=](int k) { return uint8_t(bytes[k] & 15); }, s, o, out);
        scaled([=](int k) { return uint8_t(bytes[k] >> 4); }, s, o, out + HALF);
    }
};

struct table8 {  // bytes that stand for the numbers of a table
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        const uint8_t *bytes = m.values + row * m.size + column;
        float s = m.scale[row * m.groups + (column >> m.shift)];
        for (int i = 0; i < UNIT; i++) out[i] = s * m.table[bytes[i]];
    }
};

struct table4 {  // halves of bytes that do, in the order of int4
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        float s = m.scale[row * m.groups + (column >> m.shift)];
        const uint8_t *bytes = m.values + row * m.size + column / 2;
        for (int i = 0; i < HALF; i++) {
            out[i] = s * m.table[bytes[i] & 15];
            out[i + HALF] = s * m.table[bytes[i] >> 4];
        }
    }
};

// ggml's blocks of 32 numbers: a scale, a least number where there is one, fifth bits where there are.

template <int BITS, bool LEAST> struct Small {
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        constexpr int HEAD = LEAST ? 4 : 2, BYTES = HEAD + (BITS == 5 ? 4 : 0) + (BITS == 8 ? 32 : 16);
        const uint8_t *block = m.values + row * m.size + column / UNIT * BYTES;
        float s = half(block), o = LEAST ? half(block + 2) : -s * (1 << (BITS - 1));
        if constexpr (BITS == 8) {
            for (int i = 0; i < UNIT; i += HALF) scaled([=](int k) { return int8_t(block[HEAD + i + k]); }, s, 0, out + i);
            return;
        }
        const uint8_t *bytes = block + BYTES - HALF;
        if constexpr (BITS == 4) {
            scaled([=](int k) { return uint8_t(bytes[k] & 15); }, s, o, out);
            scaled([=](int k) { return uint8_t(bytes[k] >> 4); }, s, o, out + HALF);
        } else {
            uint32_t fifth;
            std::memcpy(&fifth, block + HEAD, 4);
            scaled([=](int k) { return (bytes[k] & 15) | (fifth >> k & 1) << 4; }, s, o, out);
            scaled([=](int k) { return bytes[k] >> 4 | (fifth >> (k + HALF) & 1) << 4; }, s, o, out + HALF);
        }
    }
};

// And those of 256, in eight parts that have a scale and a least number of six bits each.

template <int BITS> struct Large {
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        constexpr int BYTES = BITS == 4 ? 144 : 176;
        const uint8_t *block = m.values + row * m.size + column / 256 * BYTES, *six = block + 4;
        int part = column % 256 / UNIT, shift = part % 2 * 4;
        int scale = part < 4 ? six[part] & 63 : (six[part + 4] & 15) | (six[part - 4] >> 6) << 4;
        int least = part < 4 ? six[part + 4] & 63 : six[part + 4] >> 4 | (six[part] >> 6) << 4;
        const uint8_t *bytes = block + BYTES - 128 + part / 2 * UNIT, *fifth = block + 16;
        float s = half(block) * float(scale), o = -half(block + 2) * float(least);
        for (int i = 0; i < UNIT; i += HALF) {
            if constexpr (BITS == 4) {
                if (shift) scaled([=](int k) { return uint8_t(bytes[i + k] >> 4); }, s, o, out + i);
                else scaled([=](int k) { return uint8_t(bytes[i + k] & 15); }, s, o, out + i);
            } else {
                scaled([=](int k) { return (bytes[i + k] >> shift & 15) | (fifth[i + k] >> part & 1) << 4; }, s, o, out + i);
            }
        }
    }
};

struct Six {  // of sixteen parts of 16 numbers, of six bits each
    static void decode(const Matrix &m, int64_t row, int64_t column, float *out) {
        const uint8_t *block = m.values + row * m.size + column / 256 * 210;
        int part = column % 256 / UNIT, side = part / 4, quarter = part % 4;
        const uint8_t *low = block + 64 * side + 32 * (quarter % 2), *high = block + 128 + 32 * side;
        const int8_t *scales = reinterpret_cast<const int8_t *>(block) + 192 + 2 * part;
        for (int p = 0; p < 2; p++) {
            float s = half(block + 208) * float(scales[p]);
            const uint8_t *l = low + HALF * p, *h = high + HALF * p;
            int down = quarter / 2 * 4, up = 2 * quarter;
            scaled([=](int k) { return (l[k] >> down & 15) | (h[k] >> up & 3) << 4; }, s, -32 * s, out + HALF * p);
        }
    }
};

inline float sum(vector v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

// Adds the products of COUNT rows of x with the rows of a tile, `width` columns of each, to `sums`.
template <int COUNT>
inline void multiply(const float *x, int64_t stride, const float *tile, int width, vector (*sums)[ROWS]) {
    vector kept[COUNT][ROWS];
    for (int n = 0; n < COUNT; n++)
        for (int r = 0; r < ROWS; r++) kept[n][r] = sums[n][r];
    for (int k = 0; k < width; k += LANES) {
        vector given[COUNT];
        for (int n = 0; n < COUNT; n++) given[n] = load(x + n * stride + k);
        for (int r = 0; r < ROWS; r++) {
            vector w = load(tile + r * COLUMNS + k);
            for (int n = 0; n < COUNT; n++) kept[n][r] += given[n] * w;
        }
    }
    for (int n = 0; n < COUNT; n++)
        for (int r = 0; r < ROWS; r++) sums[n][r] = kept[n][r];
}

constexpr int MOST = 32;  // rows of x at a time

template <class Kind>
void product(const float *x, const Matrix &m, float *out, int64_t count, int64_t height, int64_t columns, int64_t threads) {
    int64_t groups = (height + ROWS - 1) / ROWS;
    threads = std::clamp<int64_t>(count * height * columns / THREAD_WORK, 1, std::min(threads, groups));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < groups; g++) {
        alignas(64) float tile[ROWS * COLUMNS];
        int64_t first = g * ROWS, rows = std::min<int64_t>(ROWS, height - first);
        for (int64_t begin = 0; begin < count; begin += MOST) {
            int here = std::min<int64_t>(MOST, count - begin);
            vector sums[MOST][ROWS] = {};
            for (int64_t k = 0; k < columns; k += COLUMNS) {
                int width = std::min<int64_t>(COLUMNS, columns - k);
                for (int r = 0; r < ROWS; r++)  // rows behind the last are the last again, and not kept
                    for (int unit = 0; unit < width; unit += UNIT)
                        Kind::decode(m, first + std::min<int64_t>(r, rows - 1), k + unit, tile + r * COLUMNS + unit);
                const float *from = x + begin * columns + k;
                int n = 0;
                for (; n + 2 <= here; n += 2) multiply<2>(from + n * columns, columns, tile, width, sums + n);
                if (n < here) multiply<1>(from + n * columns, columns, tile, width, sums + n);
            }
            for (int n = 0; n < here; n++)
                for (int r = 0; r < rows; r++) out[(begin + n) * height + first + r] = sum(sums[n][r]);
        }
    }
}

}  // namespace

#define PRODUCT(name, ...)                                                                                            \
    extern "C" void name(const float *x, const uint8_t *values, const float *scale, const float *offset,             \
                         const float *table, float *out, int64_t count, int64_t height, int64_t columns,             \
                         int64_t size, int64_t groups, int64_t shift, int64_t threads) {                              \
        product<__VA_ARGS__>(x, {values, scale, offset, table, size, groups, shift}, out, count, height, columns,    \
                             threads);                                                                               \
    }

PRODUCT(int8_product, int8)
PRODUCT(int4_product, int4)
PRODUCT(table8_product, table8)
PRODUCT(table4_product, table4)
PRODUCT(Q8_0_product, Small<8, false>)
PRODUCT(Q4_0_product, Small<4, false>)
PRODUCT(Q4_1_product, Small<4, true>)
PRODUCT(Q5_0_product, Small<5, false>)
PRODUCT(Q5_1_product, Small<5, true>)
PRODUCT(Q4_K_product, Large<4>)
PRODUCT(Q5_K_product, Large<5>)
PRODUCT(Q6_K_product, Six)
