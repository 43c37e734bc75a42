// Products with quantized matrices on CPUs, which read the matrix as it is stored. Called by cpu.py.
//
// Numbers are decoded 32 at a time into vector registers. A few rows of x are multiplied with them there, as many as there
// are registers for: such a product waits for the matrix alone. For more rows they are kept in a tile that stays in the
// first cache: some rows of the matrix, for a stretch of columns. Either way the matrix is read from memory once, and
// nothing of it is kept.
// Numbers and sums are float32: what comes out is the product with the dequantized matrix. Vectors are the compiler's
// own, which has them for every processor.

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, FEW = 4;  // numbers of a vector; rows of x whose sums stay in registers
#else
constexpr int LANES = 8, FEW = 2;
#endif
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));
typedef int8_t signed_bytes __attribute__((vector_size(LANES)));

constexpr int UNIT = 32, HALF = UNIT / 2;  // numbers that are decoded at a time
constexpr int VECTORS = UNIT / LANES;      // that hold them
constexpr int ROWS = 4, COLUMNS = 256;     // of a tile
constexpr int LINE = 64, AHEAD = 1 << 13;  // bytes that are fetched at once, and so far before they are used
constexpr int64_t THREAD_WORK = 1 << 16;   // multiplications that waking another thread is worth

#define INLINE inline __attribute__((always_inline))

// The matrix: `size` bytes of a row at `values`; where they are not within the blocks, scales and offsets of groups
// of 2^shift columns.
struct Matrix {
    const uint8_t *values;
    const float *scale, *offset, *table;
    int64_t size, groups, shift;
};

template <class Type> INLINE Type read(const void *from) {
    Type found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

INLINE float half(const uint8_t *at) { return float(read<_Float16>(at)); }

// The next LANES bytes, as integers. GCC converts such short vectors byte by byte, hence the processor's own names.
#if defined(__AVX512F__)
INLINE integers unsigned_at(const uint8_t *at) { return (integers)_mm512_cvtepu8_epi32(read<__m128i>(at)); }
INLINE integers signed_at(const uint8_t *at) { return (integers)_mm512_cvtepi8_epi32(read<__m128i>(at)); }
#elif defined(__AVX2__)
INLINE integers unsigned_at(const uint8_t *at) { return (integers)_mm256_cvtepu8_epi32(_mm_loadu_si64(at)); }
INLINE integers signed_at(const uint8_t *at) { return (integers)_mm256_cvtepi8_epi32(_mm_loadu_si64(at)); }
#else
INLINE integers unsigned_at(const uint8_t *at) { return __builtin_convertvector(read<bytes>(at), integers); }
INLINE integers signed_at(const uint8_t *at) { return __builtin_convertvector(read<signed_bytes>(at), integers); }
#endif

INLINE vector scaled(integers codes, float s, float o) { return __builtin_convertvector(codes, vector) * s + o; }

// Each Kind decodes the numbers `column` to `column` + 32 of a row.

struct int8 {
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        int64_t group = row * m.groups + (column >> m.shift);
        const uint8_t *at = m.values + row * m.size + column;
        float s = m.scale[group], o = m.offset ? m.offset[group] : 0;
        for (int v = 0; v < VECTORS; v++) out[v] = scaled(signed_at(at + v * LANES), s, o);
    }
};

struct int4 {  // of 32 numbers the first, third ... and then the others
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        int64_t group = row * m.groups + (column >> m.shift);
        float s = m.scale[group], o = (m.offset ? m.offset[group] : 0) - 8 * s;
        const uint8_t *at = m.values + row * m.size + column / 2;
        for (int v = 0; v < VECTORS / 2; v++) {
            integers both = unsigned_at(at + v * LANES);
            out[v] = scaled(both & 15, s, o);
            out[v + VECTORS / 2] = scaled(both >> 4, s, o);
        }
    }
};

struct e4m3 {  // a sign, four bits of the exponent, three of the mantissa: those of float32 but for the exponent's bias
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        const uint8_t *at = m.values + row * m.size + column;
        float s = m.scale[row * m.groups + (column >> m.shift)];
        for (int v = 0; v < VECTORS; v++) {
            integers code = signed_at(at + v * LANES), size = code & 127;
            integers bits = (code & int32_t(0x80000000)) | size << 20;
            vector number = (vector)bits * 0x1p120f * s;
            out[v] = (vector)((integers)number | (size == 127));  // which is no number
        }
    }
};

struct table4 {  // halves of bytes that stand for the numbers of a table, in the order of int4
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        float s = m.scale[row * m.groups + (column >> m.shift)];
        const uint8_t *at = m.values + row * m.size + column / 2;
        for (int v = 0; v < VECTORS / 2; v++) {
            integers both = unsigned_at(at + v * LANES);
            out[v] = s * chosen(m.table, both & 15);
            out[v + VECTORS / 2] = s * chosen(m.table, both >> 4);
        }
    }
    static INLINE vector chosen(const float *table, integers places) {
#ifdef __AVX512F__
        return __builtin_shuffle(read<vector>(table), places);
#else
        return __builtin_shuffle(read<vector>(table), read<vector>(table + LANES), places);
#endif
    }
};

// ggml's blocks of 32 numbers: a scale, a least number where there is one, fifth bits where there are.

template <int BITS, bool LEAST> struct Small {
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        constexpr int HEAD = LEAST ? 4 : 2, BYTES = HEAD + (BITS == 5 ? 4 : 0) + (BITS == 8 ? 32 : 16);
        const uint8_t *block = m.values + row * m.size + column / UNIT * BYTES;
        float s = half(block), o = LEAST ? half(block + 2) : -s * (1 << (BITS - 1));
        if constexpr (BITS == 8) {
            for (int v = 0; v < VECTORS; v++) out[v] = scaled(signed_at(block + HEAD + v * LANES), s, 0);
            return;
        }
        int32_t fifth = BITS == 5 ? read<int32_t>(block + HEAD) : 0;
        for (int v = 0; v < VECTORS / 2; v++) {
            integers both = unsigned_at(block + BYTES - HALF + v * LANES), low = both & 15, high = both >> 4;
            if constexpr (BITS == 5) {
                low |= bits_of(fifth, v * LANES);
                high |= bits_of(fifth, v * LANES + HALF);
            }
            out[v] = scaled(low, s, o);
            out[v + VECTORS / 2] = scaled(high, s, o);
        }
    }
    // Bits of a word from `first` on, one in each lane, where the fifth bit of a number is.
    static INLINE integers bits_of(int32_t word, int first) {
        integers lane;
        for (int i = 0; i < LANES; i++) lane[i] = first + i;
        return (word >> lane & 1) << 4;
    }
};

// And those of 256, in eight parts that have a scale and a least number of six bits each.

template <int BITS> struct Large {
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        constexpr int BYTES = BITS == 4 ? 144 : 176;
        const uint8_t *block = m.values + row * m.size + column / 256 * BYTES, *six = block + 4;
        int part = column % 256 / UNIT, shift = part % 2 * 4;
        int scale = part < 4 ? six[part] & 63 : (six[part + 4] & 15) | (six[part - 4] >> 6) << 4;
        int least = part < 4 ? six[part + 4] & 63 : six[part + 4] >> 4 | (six[part] >> 6) << 4;
        const uint8_t *at = block + BYTES - 128 + part / 2 * UNIT, *fifth = block + 16;
        float s = half(block) * float(scale), o = -half(block + 2) * float(least);
        for (int v = 0; v < VECTORS; v++) {
            integers code = unsigned_at(at + v * LANES) >> shift & 15;
            if constexpr (BITS == 5) code |= (unsigned_at(fifth + v * LANES) >> part & 1) << 4;
            out[v] = scaled(code, s, o);
        }
    }
};

struct Six {  // of sixteen parts of 16 numbers, of six bits each
    static INLINE void decode(const Matrix &m, int64_t row, int64_t column, vector *out) {
        const uint8_t *block = m.values + row * m.size + column / 256 * 210;
        int part = column % 256 / UNIT, side = part / 4, quarter = part % 4;
        const uint8_t *low = block + 64 * side + 32 * (quarter % 2), *high = block + 128 + 32 * side;
        const uint8_t *scales = block + 192 + 2 * part;
        int down = quarter / 2 * 4, up = 2 * quarter;
        for (int v = 0; v < VECTORS; v++) {
            float s = half(block + 208) * float(int8_t(scales[v * LANES / HALF]));
            integers l = unsigned_at(low + v * LANES) >> down & 15, h = unsigned_at(high + v * LANES) >> up & 3;
            out[v] = scaled(l | h << 4, s, -32 * s);
        }
    }
};

// Begins to fetch so many bytes from AHEAD behind `at` on, and moves `at` behind them: the processor by itself does not
// see that rows are read in one sweep.
INLINE void fetch_later(const uint8_t *&at, int64_t count) {
    for (int64_t line = 0; line < count; line += LINE) __builtin_prefetch(at + AHEAD + line);
    at += count;
}

INLINE float sum(vector v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

// The products of COUNT rows of x with up to ROWS rows of the matrix, from `first` on.
template <class Kind, int COUNT>
void from_registers(const float *x, const Matrix &m, float *out, int64_t first, int64_t height, int64_t columns) {
    int64_t rows = std::min<int64_t>(ROWS, height - first);
    vector sums[COUNT][ROWS] = {};
    const uint8_t *at = m.values + first * m.size;
    int64_t bytes_of_unit = ROWS * m.size * UNIT / columns;
    for (int64_t k = 0; k < columns; k += UNIT) {
        fetch_later(at, bytes_of_unit);
        for (int r = 0; r < ROWS; r++) {  // rows behind the last are the last again, and not kept
            vector w[VECTORS];
            Kind::decode(m, first + std::min<int64_t>(r, rows - 1), k, w);
            for (int n = 0; n < COUNT; n++)
                for (int v = 0; v < VECTORS; v++) sums[n][r] += read<vector>(x + n * columns + k + v * LANES) * w[v];
        }
    }
    for (int n = 0; n < COUNT; n++)
        for (int r = 0; r < rows; r++) out[n * height + first + r] = sum(sums[n][r]);
}

// Adds the products of COUNT rows of x with the rows of a tile, `width` columns of each, to `sums`.
template <int COUNT>
void multiply(const float *x, int64_t stride, const float *tile, int width, vector (*sums)[ROWS]) {
    vector kept[COUNT][ROWS];
    for (int n = 0; n < COUNT; n++)
        for (int r = 0; r < ROWS; r++) kept[n][r] = sums[n][r];
    for (int k = 0; k < width; k += LANES) {
        vector given[COUNT];
        for (int n = 0; n < COUNT; n++) given[n] = read<vector>(x + n * stride + k);
        for (int r = 0; r < ROWS; r++) {
            vector w = read<vector>(tile + r * COLUMNS + k);
            for (int n = 0; n < COUNT; n++) kept[n][r] += given[n] * w;
        }
    }
    for (int n = 0; n < COUNT; n++)
        for (int r = 0; r < ROWS; r++) sums[n][r] = kept[n][r];
}

constexpr int MOST = 32;  // rows of x at a time

// The products of `count` rows of x, up to MOST, with up to ROWS rows of the matrix, from `first` on.
template <class Kind>
void from_tiles(const float *x, int count, const Matrix &m, float *out, int64_t first, int64_t height, int64_t columns) {
    alignas(64) float tile[ROWS * COLUMNS];
    int64_t rows = std::min<int64_t>(ROWS, height - first);
    vector sums[MOST][ROWS] = {};
    const uint8_t *at = m.values + first * m.size;
    for (int64_t k = 0; k < columns; k += COLUMNS) {
        int width = std::min<int64_t>(COLUMNS, columns - k);
        fetch_later(at, ROWS * m.size * width / columns);
        for (int r = 0; r < ROWS; r++)
            for (int unit = 0; unit < width; unit += UNIT) {
                vector w[VECTORS];
                Kind::decode(m, first + std::min<int64_t>(r, rows - 1), k + unit, w);
                std::memcpy(tile + r * COLUMNS + unit, w, sizeof w);
            }
        const float *from = x + k;
        int n = 0;
        for (; n + 3 <= count; n += 3) multiply<3>(from + n * columns, columns, tile, width, sums + n);
        if (count - n == 2) multiply<2>(from + n * columns, columns, tile, width, sums + n);
        if (count - n == 1) multiply<1>(from + n * columns, columns, tile, width, sums + n);
    }
    for (int n = 0; n < count; n++)
        for (int r = 0; r < rows; r++) out[n * height + first + r] = sum(sums[n][r]);
}

// Whether a kind decodes 32 numbers in another order than theirs; x is brought to the same.
template <class Kind> constexpr bool HALVED = std::is_same_v<Kind, int4> || std::is_same_v<Kind, table4>;

// Of each 32 of `count` numbers the first, third ... and then the others.
std::vector<float> halved(const float *x, int64_t count) {
    std::vector<float> found(count);
    for (int64_t k = 0; k < count; k += UNIT)
        for (int i = 0; i < HALF; i++) found[k + i] = x[k + 2 * i], found[k + HALF + i] = x[k + 2 * i + 1];
    return found;
}

template <class Kind>
void product(const float *x, const Matrix &m, float *out, int64_t count, int64_t height, int64_t columns, int64_t threads) {
    std::vector<float> given;
    if constexpr (HALVED<Kind>) given = halved(x, count * columns), x = given.data();
    int64_t groups = (height + ROWS - 1) / ROWS;
    threads = std::clamp<int64_t>(count * height * columns / THREAD_WORK, 1, std::min(threads, groups));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * ROWS;
        if (count == 1) from_registers<Kind, 1>(x, m, out, first, height, columns);
        else if (count == 2) from_registers<Kind, 2>(x, m, out, first, height, columns);
        else if (FEW > 2 && count == 3) from_registers<Kind, 3>(x, m, out, first, height, columns);
        else if (FEW > 2 && count == 4) from_registers<Kind, 4>(x, m, out, first, height, columns);
        else
            for (int64_t n = 0; n < count; n += MOST)
                from_tiles<Kind>(x + n * columns, std::min<int64_t>(MOST, count - n), m, out + n * height, first, height, columns);
    }
}

// The numbers of the rows that are stored in their order.
template <class Kind> void dequantize(const Matrix &m, float *out, int64_t height, int64_t columns, int64_t threads) {
    threads = std::clamp<int64_t>(height * columns / THREAD_WORK, 1, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < height; row++) {
        const uint8_t *at = m.values + row * m.size;
        for (int64_t k = 0; k < columns; k += UNIT) {
            fetch_later(at, m.size * UNIT / columns);
            vector w[VECTORS];
            Kind::decode(m, row, k, w);
            std::memcpy(out + row * columns + k, w, sizeof w);
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
PRODUCT(e4m3_product, e4m3)
PRODUCT(table4_product, table4)

#define BLOCKS(name, ...)                                                                                             \
    PRODUCT(name##_product, __VA_ARGS__)                                                                              \
    extern "C" void name##_numbers(const uint8_t *values, float *out, int64_t height, int64_t columns, int64_t size,  \
                                   int64_t threads) {                                                                 \
        dequantize<__VA_ARGS__>({values, nullptr, nullptr, nullptr, size, 0, 0}, out, height, columns, threads);      \
    }

BLOCKS(Q8_0, Small<8, false>)
BLOCKS(Q4_0, Small<4, false>)
BLOCKS(Q4_1, Small<4, true>)
BLOCKS(Q5_0, Small<5, false>)
BLOCKS(Q5_1, Small<5, true>)
BLOCKS(Q4_K, Large<4>)
BLOCKS(Q5_K, Large<5>)
BLOCKS(Q6_K, Six)
