// Attention over keys and values in blocks of a pool, for CPUs. Called by cpu.py.
//
// A block of one layer and one KV head is a slab: its keys transposed, [head_dim][block_size], then its values,
// [block_size][head_dim]; in int8, each followed by the steps of its codes, one for each token, in float32. So the scores
// of a vector of keys, and an output row, are both sums of "scalar times vector", with no sum across lanes, and one inner
// loop computes both. Vectors reach past the end of short rows: what is
// computed there belongs to nobody and is thrown away, and the memory has a vector of padding at its end.
//
// Queries come in tiles: rows of one sequence that share a KV head, so that a key is fetched once for all of them.
// Rows are ordered by token, and within a token by head. All work is laid end to end, tile after tile, in units of a
// tile's rows times a chunk of keys, and dealt to the threads in equal shares, whatever tiles the cuts go through
// (stream-K). A tile that was cut is put together from its parts by the first thread that had one.
//
// What a tile's rows see may lie in several pieces, one behind the other in the running softmax: places of the layer's
// own slabs; places of other layers, where some layers keep more tokens than others (layered.py); and the newest places
// in full precision, in slabs of their own (residual.py).
//
// Where no tile is cut, each row's bits depend on its own keys and values alone: chunks begin at the same places for all
// rows, every sum over a row's numbers is in the same order however many rows are computed together, and keys that a row
// does not see add exactly nothing.

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64, REGISTERS_FOR_SUMS = 16;
#else
constexpr int VECTOR_BYTES = 32, REGISTERS_FOR_SUMS = 8;
#endif
constexpr int CHUNK = 8;      // vectors of keys between two updates of the running softmax
constexpr int TILE_ROWS = 64;
constexpr int MOST_PIECES = 8;
constexpr int LOOK_ROWS = 24;  // of a tile whose attention is told: all their scores are in memory
constexpr int UNIT_ROWS = 8;  // what fetching a chunk costs, in rows computed on it
constexpr int64_t THREAD_WORK = 1 << 13;  // the least that waking another thread is worth, in rows times keys

// ---------------------------------------------------------------------------------------------- numbers and vectors

struct bfloat16 {
    uint16_t bits;
};

struct e4m3 {  // 8-bit floating point with 4 bits of exponent, in units of a head's scale
    uint8_t bits;
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
template <> struct Traits<int8_t> : Traits<float> {};
template <> struct Traits<e4m3> : Traits<float> {};

// Whether numbers of type S in blocks are codes, to be multiplied by a step for each vector.
template <class S> constexpr bool STEPPED = std::is_same_v<S, int8_t>;
constexpr int STEP_BYTES = sizeof(float);

// Whether they are in units of scales, one for the keys and one for the values of a head; and what they are loaded in.
template <class S> constexpr bool SCALED = std::is_same_v<S, e4m3>;
constexpr float LOADED = 1.0f / 256;

template <class T> using sum_t = typename Traits<T>::sum;  // what numbers of type T are added up in
template <class A> using vector = typename Traits<A>::vector;
template <class A> using integers = typename Traits<A>::integers;
template <class A> constexpr int WIDTH = VECTOR_BYTES / sizeof(A);
constexpr double LOG2E = 1.4426950408889634;
template <class A> constexpr A NOTHING = -std::numeric_limits<A>::infinity();

template <class A> integers<A> make_lanes() {
    integers<A> lanes;
    for (int i = 0; i < WIDTH<A>; ++i) lanes[i] = i;
    return lanes;
}
template <class A> const integers<A> LANES = make_lanes<A>();

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

inline vector<float> load(const int8_t *from) {
    // GCC converts such short vectors number by number, hence the processors' own names.
#if defined(__AVX512F__)
    const auto codes = (integers<float>)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    const auto codes = (integers<float>)_mm256_cvtepi8_epi32(_mm_loadu_si64(from));
#else
    integers<float> codes;
    for (int lane = 0; lane < WIDTH<float>; ++lane) codes[lane] = from[lane];
#endif
    return __builtin_convertvector(codes, vector<float>);
}

// In units of LOADED: as half precision, whose exponents count from 8 more, the bits are these.
inline vector<float> load(const e4m3 *from) {
#if defined(__AVX512F__)
    const __m256i codes = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), 7);
    const __m256i size = _mm256_and_si256(codes, _mm256_set1_epi16(0x3f80));
    const __m256i wrong = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x3f80));  // not a number
    const __m256i halves = _mm256_and_si256(codes, _mm256_set1_epi16(short(0xbf80)));
    return (vector<float>)_mm512_cvtph_ps(_mm256_or_si256(halves, wrong));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i codes = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadu_si64(from)), 7);
    const __m128i size = _mm_and_si128(codes, _mm_set1_epi16(0x3f80));
    const __m128i wrong = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x3f80));
    const __m128i halves = _mm_and_si128(codes, _mm_set1_epi16(short(0xbf80)));
    return (vector<float>)_mm256_cvtph_ps(_mm_or_si128(halves, wrong));
#else
    vector<float> numbers;
    for (int lane = 0; lane < WIDTH<float>; ++lane) {
        const int code = from[lane].bits, exponent = code >> 3 & 15, fraction = code & 7;
        const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
        const float number = (code & 127) == 127 ? std::numeric_limits<float>::quiet_NaN() : size * LOADED;
        numbers[lane] = code & 128 ? -number : number;
    }
    return numbers;
#endif
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

// To nearest, ties to even, and what is too large to the largest; see codecs/fp8.py.
inline void narrow(float x, e4m3 &to) {
    uint32_t bits, cut, small;
    std::memcpy(&bits, &x, sizeof bits);
    const float size = std::abs(x), held = std::min(size, 448.0f);
    // Exponents count from -7 instead of -127; below 2^-6 all steps are 2^-9, the last bit of numbers from 2^14 on.
    std::memcpy(&cut, &held, sizeof cut);
    const uint32_t normal = ((cut + 0x7ffff + (cut >> 20 & 1)) >> 20) - (120 << 3);
    const float lifted = std::min(size, 1.0f) + 16384;
    std::memcpy(&small, &lifted, sizeof small);
    const uint32_t code = size < 0.015625f ? small - (141u << 23) : normal;
    to.bits = size <= std::numeric_limits<float>::max() ? uint8_t(code | (bits >> 24 & 128)) : 0x7f;
}

// Codes of a vector of `dim` numbers, `apart` from each other, and their step; see codecs/int8.py.
template <class T> inline void encode(const T *numbers, int dim, int8_t *codes, int64_t apart, char *step_at) {
    float largest = 0, wrong = 0;  // NaN if a number is NaN or infinite
    for (int d = 0; d < dim; ++d) {
        const float x = widen(numbers[d]);
        largest = std::max(largest, std::abs(x));
        wrong += x * 0;
    }
    const float step = largest / 127, inverse = step < std::numeric_limits<float>::min() ? 0 : 1 / step;
    for (int d = 0; d < dim; ++d)
        codes[d * apart] = wrong == 0 ? int8_t(std::nearbyint(widen(numbers[d]) * inverse)) : 0;
    const float stored = step + wrong;
    std::memcpy(step_at, &stored, sizeof stored);
}

// 2 to the power of x <= 0, to 1e-7; 0 below the normal numbers, NaN for NaN. The polynomial, for |f| <= 1/2, is a
// Chebyshev fit whose own error is 5e-9.
inline vector<float> exp2(vector<float> x) {
    const float magic = 12582912;  // 1.5 * 2^23: when it is added, the nearest integer is left in the low bits
    x = x < -127.0f ? vector<float>{} - 127.0f : x;
    vector<float> shifted = x + magic, f = x - (shifted - magic), p = f * 1.54614478e-4f + 1.33908668e-3f;
    p = p * f + 9.61805694e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    integers<float> exponent = reinterpret_cast<integers<float>>(shifted) - (0x4b400000 - 127);
    return p * reinterpret_cast<vector<float>>(exponent << 23);
}

inline vector<double> exp2(vector<double> x) {
    for (int lane = 0; lane < WIDTH<double>; ++lane) x[lane] = std::exp2(x[lane]);
    return x;
}

// The hyperbolic tangent, to 2e-7. Near 0 it is x times a polynomial in its square, a Chebyshev fit whose own error is
// 3e-9; elsewhere it follows from 2 to the power of -2 |x| log2(e).
inline vector<float> tanh(vector<float> x) {
    const vector<float> size = x < 0.0f ? -x : x, z = x * x, power = exp2(size * -2.88539008f);
    vector<float> p = z * -5.85642786e-3f + 2.07574754e-2f;
    p = p * z - 5.37699218e-2f;
    p = p * z + 1.33317047e-1f;
    p = p * z - 3.33332840e-1f;
    p = p * z + 1.0f;
    const vector<float> large = (1.0f - power) / (1.0f + power);
    return size < 0.6f ? x * p : x < 0.0f ? -large : large;
}

inline vector<double> tanh(vector<double> x) {
    for (int lane = 0; lane < WIDTH<double>; ++lane) x[lane] = std::tanh(x[lane]);
    return x;
}

template <class A, class Combine> inline A across(vector<A> v, Combine combine) {
#pragma GCC unroll 4
    for (int half = WIDTH<A> / 2; half > 0; half /= 2) v = combine(v, __builtin_shuffle(v, LANES<A> ^ half));
    return v[0];
}

// ------------------------------------------------------------------------------------------------- the inner product

// c[R rows][N vectors] (+)= a[R rows][depth] * b[depth][N vectors], where each column of b has its own address. The
// columns `ahead`, which will be wanted next, are fetched on the way: blocks are too short for the processor to foresee
// them, and a burst of requests between two products would have to be waited for.
template <class T, int R, int N>
void multiply(const sum_t<T> *a, long a_row, const T *const *b, const T *const *ahead, long b_row, int depth,
              sum_t<T> *c, long c_row, bool add) {
    using A = sum_t<T>;
    vector<A> sums[R][N] = {};
    for (int i = 0; i < depth; ++i) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            __builtin_prefetch(ahead[n] + i * b_row, 0, 2);
            const vector<A> row = load(b[n] + i * b_row);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][n] += a[r * a_row + i] * row;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            A *to = c + r * c_row + n * WIDTH<A>;
            store(to, add ? load(to) + sums[r][n] : sums[r][n]);
        }
    }
}

// The same for any number of vectors, as many at a time as there are registers for.
template <class T, int R, int N = std::min(8, REGISTERS_FOR_SUMS / R)>
void multiply_all(const sum_t<T> *a, long a_row, const T *const *b, const T *const *ahead, long b_row, int count,
                  int depth, sum_t<T> *c, long c_row, bool add) {
    for (; count >= N; count -= N, b += N, ahead += N, c += N * WIDTH<sum_t<T>>)
        multiply<T, R, N>(a, a_row, b, ahead, b_row, depth, c, c_row, add);
    if constexpr (N > 1) multiply_all<T, R, N / 2>(a, a_row, b, ahead, b_row, count, depth, c, c_row, add);
}

}  // namespace

// ------------------------------------------------------------------------------------------ what the caller describes

struct Memory {
    void *slabs;  // [layers][blocks][kv_heads]
    // Windows in full precision: [layers][window_blocks][kv_heads]; and for one layer at a time blocks behind those,
    // [..][kv_heads]. In the type of queries, without steps.
    void *windows, *spilled;
    int64_t heads, kv_heads, head_dim, blocks, block_size, window_blocks;
};

struct Batch {  // as in PagedBatch
    const int32_t *starts, *lengths, *tables;
    const int64_t *slots;
    // Of masks, null where all sequences are causal: the position of each new token, how many tokens of each sequence
    // are before its mask (all of them, where it has none), where the mask's rows begin, and all those rows.
    const int64_t *positions, *before, *offsets;
    const uint8_t *seen;
    // Of sequences that share their first places among layers, null where none do: how many those places are, and of
    // each layer the spans of places in which its own tokens lie: layer, first place, place behind the last.
    const int32_t *behind, *spans;  // [sequences], [layers][sequences][span_count][3]
    // Of windows in full precision, null where there are none: where in windows the blocks of a sequence are, from
    // which place on they are counted, and where new tokens go; slots that are copied before attention, and behind it.
    const int32_t *window_tables, *since;
    const int64_t *window_slots, *fetched, *returned;  // the last two are pairs
    int64_t sequences, table_width, threads, whole_tiles, span_count, window, fetches, returns;
};

struct Tokens {  // the numbers of a head are contiguous; tokens and heads are so many numbers apart
    const void *query, *key, *value;
    void *out;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    // What some models' attention has besides: a score for each head without a value, null where there is none; a bound
    // that scores bend towards, 0 for none; and how many positions a chunk has, no fewer than any length for no chunks.
    const double *sinks;
    double cap;
    int64_t chunk;
    const float *scales;  // of codes that have some: those of the keys of each KV head, and behind them of the values
};

namespace {

// Places of a sequence in the slabs of a layer, or in its window, from `low` up to `high`, and the vectors and chunks
// of keys that they lie in.
struct Piece {
    bool window;
    int layer, low, high, first_vector, last_vector, chunks;
};

// A query tile of one KV head, and the chunks of keys that its rows see.
struct Tile {
    int sequence, head, first_token, tokens;
    int place;  // of the first token in its sequence
    int before;  // what is behind so many tokens of the sequence is seen by the leave of its mask alone
    int count, chunks;  // of pieces, and of the chunks of all
    Piece pieces[MOST_PIECES];

    bool masked() const { return place + tokens > before; }
};

// A running softmax over part of a tile's keys. The output is not yet divided by its weight.
template <class A> struct State {
    struct alignas(VECTOR_BYTES) Aligned {
        A lanes[WIDTH<A>];
    };
    std::vector<Aligned> storage;
    A *out, *query, *top, *weight;  // [rows][padded dim], [rows][dim], [rows], [rows]

    void reset(int rows, int dim, int padded) {
        size_t vectors = (rows * (dim + padded + 2)) / WIDTH<A> + 1;
        if (storage.size() < vectors) storage.resize(vectors);
        out = storage.data()->lanes;
        query = out + rows * padded;
        top = query + rows * dim;
        weight = top + rows;
        std::fill(out, query, A(0));
        std::fill(top, weight, NOTHING<A>);
        std::fill(weight, weight + rows, A(0));
    }
};

// What a thread keeps: `own` is the tile that it works on, `cut` its part of a tile that an earlier thread began.
template <class A> struct Worker {
    State<A> own, cut;
    Tile begun;  // is in `own`, and later threads have the rest
    bool has_begun, has_cut;
};

// Some vectors of keys: their addresses, the position of the first key, and of the one behind the last. What is behind
// `count` repeats the last one. Where there are steps, those of the keys and of the values.
template <class S> struct Chunk {
    const S *keys[CHUNK], *values[CHUNK];
    const char *key_steps[CHUNK], *value_steps[CHUNK];
    int first[CHUNK], end[CHUNK], count;
};

// Turns one row's scores into weights relative to its largest score so far. Returns the factor on what came before.
template <class A>
A reweigh(A *scores, const int *first, const int *end, int count, int low, int high, A &top, A &weight) {
    constexpr int W = WIDTH<A>;
    vector<A> best = vector<A>{} + NOTHING<A>, total = {};
    for (int v = 0; v < count; ++v) {
        vector<A> s = load(scores + v * W);
        const int behind = std::min(high, end[v]);
        if (first[v] < low || behind < first[v] + W) {
            s = (LANES<A> >= low - first[v]) & (LANES<A> < behind - first[v]) ? s : vector<A>{} + NOTHING<A>;
            store(scores + v * W, s);
        }
        best = s > best ? s : best;
    }
    const A before = top;
    top = std::max(before, across<A>(best, [](auto x, auto y) { return x > y ? x : y; }));
    const A base = top == NOTHING<A> ? 0 : top;
    for (int v = 0; v < count; ++v) {
        vector<A> p = exp2(load(scores + v * W) - base);
        store(scores + v * W, p);
        total += p;
    }
    const A factor = before == top ? 1 : std::exp2(before - base);
    weight = weight * factor + across<A>(total, [](auto x, auto y) { return x + y; });
    return factor;
}

// Attention of one batch in one layer: queries, new keys and values, and outputs are of type T, and blocks hold S.
template <class T, class S> struct Attention {
    using A = sum_t<T>;
    static_assert(std::is_same_v<A, sum_t<S>>);
    static constexpr int W = WIDTH<A>;

    const Memory &memory;
    const Batch &batch;
    const Tokens &tokens;
    int layer, heads, kv_heads, dim, size;
    A scale;     // to scores in powers of two
    int window;  // no smaller than any length where there is none
    int groups = heads / kv_heads, padded = (dim + W - 1) / W * W, block_vectors = (size + W - 1) / W;

    // Bytes of a slab's codes of keys, or of values, where it holds X; and of those with their steps.
    template <class X> int64_t code_bytes() const { return int64_t(size) * dim * sizeof(X); }
    template <class X> int64_t half_bytes() const { return code_bytes<X>() + (STEPPED<X> ? size * STEP_BYTES : 0); }
    char *slab(int64_t layer, int64_t block, int head) const {
        const int64_t number = (layer * memory.blocks + block) * kv_heads + head;
        return static_cast<char *>(memory.slabs) + number * 2 * half_bytes<S>();
    }
    char *window_slab(int64_t block, int head) const {
        const int64_t behind = block - memory.window_blocks, row = 2 * half_bytes<T>();
        if (behind >= 0) return static_cast<char *>(memory.spilled) + (behind * kv_heads + head) * row;
        return static_cast<char *>(memory.windows) + ((layer * memory.window_blocks + block) * kv_heads + head) * row;
    }
    int vector_of(int position) const { return position / size * block_vectors + position % size / W; }

    // The places of the first token that token t of a tile may see, and behind the last.
    int low_of(const Tile &tile, int t) const {
        const int position = tile.masked() ? int(batch.positions[tile.first_token + t]) : tile.place + t;
        return std::max(position + 1 - window, position / int(tokens.chunk) * int(tokens.chunk));
    }
    int high_of(const Tile &tile, int t) const {
        return tile.place + t >= tile.before ? batch.lengths[tile.sequence] : tile.place + t + 1;
    }

    // Takes away the scores of what token t of a tile does not see of the tokens that are under a mask.
    void hide(const Tile &tile, int t, const int *first, const int *end, int count, A *scores) const {
        const int length = batch.lengths[tile.sequence], size = length - tile.before, row = tile.place + t - tile.before;
        if (row < 0) return;
        const uint8_t *seen = batch.seen + batch.offsets[tile.sequence] + int64_t(row) * size;
        const int64_t *positions = batch.positions + batch.starts[tile.sequence + 1] - size;
        for (int v = 0; v < count; ++v) {
            for (int place = std::max(first[v], tile.before); place < std::min(end[v], length); ++place) {
                const int other = place - tile.before;
                if (!seen[other] || std::abs(positions[row] - positions[other]) >= window ||
                    positions[row] / tokens.chunk != positions[other] / tokens.chunk)
                    scores[v * W + place - first[v]] = NOTHING<A>;
            }
        }
    }

    // Stores the keys and values of the tokens from `from` up to `to`.
    void write(int64_t from, int64_t to) const {
        for (int64_t token = from; token < to; ++token) {
            for (int head = 0; head < kv_heads; ++head) {
                auto key = static_cast<const T *>(tokens.key) + token * tokens.key_token + head * tokens.key_head;
                auto value = static_cast<const T *>(tokens.value);
                value += token * tokens.value_token + head * tokens.value_head;
                put<S>(key, value, slab(layer, batch.slots[token] / size, head), batch.slots[token] % size, head);
                if (!batch.window_tables) continue;
                const int64_t slot = batch.window_slots[token];
                put<T>(key, value, window_slab(slot / size, head), slot % size, head);
            }
        }
    }

    // Stores a key and a value of a head in a slab that holds X, at an offset.
    template <class X> void put(const T *key, const T *value, char *half, int64_t offset, int head) const {
        char *other = half + half_bytes<X>();
        X *keys = reinterpret_cast<X *>(half) + offset, *values = reinterpret_cast<X *>(other) + offset * dim;
        if constexpr (STEPPED<X>) {
            encode(key, dim, keys, size, half + code_bytes<X>() + offset * STEP_BYTES);
            encode(value, dim, values, 1, other + code_bytes<X>() + offset * STEP_BYTES);
        } else if constexpr (SCALED<X>) {
            const float of_key = tokens.scales[head], of_value = tokens.scales[kv_heads + head];
            for (int d = 0; d < dim; ++d) {
                narrow(widen(key[d]) / of_key, keys[d * size]);
                narrow(widen(value[d]) / of_value, values[d]);
            }
        } else if constexpr (std::is_same_v<T, X>) {
            for (int d = 0; d < dim; ++d) keys[d * size] = key[d];
            std::copy(value, value + dim, values);
        } else {
            for (int d = 0; d < dim; ++d) {
                narrow(widen(key[d]), keys[d * size]);
                narrow(widen(value[d]), values[d]);
            }
        }
    }

    // Copies keys and values among windows, from the first of each pair of slots to the second.
    void copy(const int64_t *pairs, int64_t count) const {
        for (; count > 0; --count, pairs += 2) {
            for (int head = 0; head < kv_heads; ++head) {
                auto from = reinterpret_cast<const T *>(window_slab(pairs[0] / size, head));
                auto to = reinterpret_cast<T *>(window_slab(pairs[1] / size, head));
                const int64_t source = pairs[0] % size, target = pairs[1] % size, half = int64_t(size) * dim;
                for (int d = 0; d < dim; ++d) to[d * size + target] = from[d * size + source];
                std::copy_n(from + half + source * dim, dim, to + half + target * dim);
            }
        }
    }

    // Calls visit(tile, begin, unit) for all tiles in order: a tile's work begins at `begin`, and is `unit` for each of
    // its chunks. Returns the whole of the work. No tile has tokens of two windows in full precision.
    template <class Visit> int64_t each_tile(Visit visit) const {
        const int most = std::max(1, TILE_ROWS / groups);
        int64_t work = 0;
        for (int sequence = 0; sequence < batch.sequences; ++sequence) {
            const int stop = batch.starts[sequence + 1], length = batch.lengths[sequence];
            for (int token = batch.starts[sequence], tokens; token < stop; token += tokens) {
                const int place = length - (stop - token);
                tokens = std::min(most, stop - token);
                if (batch.window_tables) tokens = std::min(tokens, int(batch.window - place % batch.window));
                Tile tile{sequence, 0, token, tokens, place, length, 0, 0, {}};
                if (batch.before) tile.before = batch.before[sequence];
                cut(tile);
                const int64_t unit = UNIT_ROWS + tile.tokens * groups;
                for (; tile.head < kv_heads; ++tile.head, work += tile.chunks * unit) visit(tile, work, unit);
            }
        }
        return work;
    }

    // Finds the pieces of what a tile's rows see.
    void cut(Tile &tile) const {
        int low = low_of(tile, 0), behind = 0;
        if (tile.masked())
            for (int t = 1; t < tile.tokens; ++t) low = std::min(low, low_of(tile, t));
        low = std::max(0, low);
        if (batch.behind && (behind = batch.behind[tile.sequence])) {
            const int32_t *span = batch.spans + (layer * batch.sequences + tile.sequence) * batch.span_count * 3;
            for (int i = 0; i < batch.span_count; ++i, span += 3) add(tile, false, span[0], span[1], span[2]);
            low = std::max(low, behind);
        }
        const int high = high_of(tile, tile.tokens - 1);
        if (!batch.window_tables) return add(tile, false, layer, low, high);
        const int begin = std::max(batch.since[tile.sequence], tile.place - tile.place % int(batch.window));
        add(tile, false, layer, low, begin);
        add(tile, true, layer, std::max(low, begin), high);
    }

    void add(Tile &tile, bool window, int from, int low, int high) const {
        if (low >= high) return;
        const int first = vector_of(low) / CHUNK * CHUNK, last = vector_of(high - 1);
        const int chunks = (last - first) / CHUNK + 1;
        tile.pieces[tile.count++] = {window, from, low, high, first, last, chunks};
        tile.chunks += chunks;
    }

    // Does the share of all work from `from` up to `to`: every unit that begins there.
    void work(int64_t from, int64_t to, Worker<A> &worker) const {
        worker.has_begun = worker.has_cut = false;
        each_tile([&](const Tile &tile, int64_t begin, int64_t unit) {
            auto units_before = [&](int64_t end) {
                if (batch.whole_tiles) return end <= begin ? 0 : tile.chunks;
                return int(std::clamp<int64_t>((end - begin + unit - 1) / unit, 0, tile.chunks));
            };
            const int first = from <= begin ? 0 : units_before(from), last = to <= begin ? 0 : units_before(to);
            if (first == last) return;
            State<A> &state = first > 0 ? worker.cut : worker.own;
            attend(tile, first, last, state);
            if (first > 0) {
                worker.has_cut = true;
            } else if (last < tile.chunks) {
                worker.has_begun = true;
                worker.begun = tile;
            }
            if (first == 0 && last == tile.chunks) finish(tile, state);
        });
    }

    // The rows of a tile against its chunks from `first` up to `last`.
    void attend(const Tile &tile, int first, int last, State<A> &state) const {
        state.reset(tile.tokens * groups, dim, padded);
        fetch(tile, state);
        Tile next = tile;
        next.head = std::min(tile.head + 1, kv_heads - 1);
        const Piece *piece = tile.pieces;
        int number = first;
        for (int c = first; c < last; ++c, ++number) {
            while (number >= piece->chunks) number -= piece++->chunks;
            if (piece->window) attend_chunk<T>(tile, next, *piece, number, state);
            else attend_chunk<S>(tile, next, *piece, number, state);
        }
    }

    // Widens the queries of a tile, and scales them.
    void fetch(const Tile &tile, State<A> &state) const {
        for (int row = 0; row < tile.tokens * groups; ++row) {
            const int64_t token = tile.first_token + row / groups, head = tile.head * groups + row % groups;
            auto query = static_cast<const T *>(tokens.query) + token * tokens.query_token + head * tokens.query_head;
            for (int d = 0; d < dim; ++d) state.query[row * dim + d] = widen(query[d]) * scale;
        }
    }

    // The rows of a tile against a chunk of one of its pieces, whose slabs hold X. What comes next is the piece's next
    // chunk, or the first one of `next`.
    template <class X>
    void attend_chunk(const Tile &tile, const Tile &next, const Piece &piece, int number, State<A> &state) const {
        const bool more = number + 1 < piece.chunks;
        const Chunk<X> chunk = locate<X>(tile, piece, number);
        const Chunk<X> ahead = locate<X>(more ? tile : next, piece, more ? number + 1 : 0);
        const int rows = tile.tokens * groups;
        int row = 0;
        for (; rows - row >= 8; row += 8) attend_rows<8>(tile, piece, chunk, ahead, state, row);
        if (rows - row >= 4) attend_rows<4>(tile, piece, chunk, ahead, state, row), row += 4;
        if (rows - row >= 2) attend_rows<2>(tile, piece, chunk, ahead, state, row), row += 2;
        if (rows - row >= 1) attend_rows<1>(tile, piece, chunk, ahead, state, row);
    }

    template <class X> Chunk<X> locate(const Tile &tile, const Piece &piece, int number) const {
        Chunk<X> chunk;
        const int32_t *table = (piece.window ? batch.window_tables : batch.tables) + tile.sequence * batch.table_width;
        const int from = piece.first_vector + number * CHUNK;
        chunk.count = std::min(CHUNK, piece.last_vector + 1 - from);
        // A chunk begins at the same places for all, and may do so in blocks that are none of the piece's.
        const int least = vector_of(piece.low);
        for (int v = 0; v < CHUNK; ++v) {
            const int number = from + std::min(v, chunk.count - 1), at = std::max(number, least);
            const int block = at / block_vectors, offset = at % block_vectors * W;
            const char *base = piece.window ? window_slab(table[block], tile.head)
                                            : slab(piece.layer, table[block], tile.head);
            const char *other = base + half_bytes<X>();
            chunk.keys[v] = reinterpret_cast<const X *>(base) + offset;
            chunk.values[v] = reinterpret_cast<const X *>(other) + offset * dim;
            if constexpr (STEPPED<X>) {
                chunk.key_steps[v] = base + code_bytes<X>() + offset * STEP_BYTES;
                chunk.value_steps[v] = other + code_bytes<X>() + offset * STEP_BYTES;
            }
            chunk.first[v] = number / block_vectors * size + number % block_vectors * W;
            chunk.end[v] = std::min(chunk.first[v] + W, (number / block_vectors + 1) * size);
        }
        return chunk;
    }

    // R rows of a tile, from `row` on, against the keys of a chunk that any of them sees.
    template <int R, class X>
    void attend_rows(const Tile &tile, const Piece &piece, const Chunk<X> &chunk, const Chunk<X> &ahead,
                     State<A> &state, int row) const {
        constexpr int ACROSS = CHUNK * W;
        const auto from_of = [&](int t) { return std::max(piece.low, low_of(tile, t)); };
        const auto to_of = [&](int t) { return std::min(piece.high, high_of(tile, t)); };
        int low = from_of(row / groups);
        const int high = to_of((row + R - 1) / groups);
        if (tile.masked())
            for (int t = row / groups + 1; t <= (row + R - 1) / groups; ++t) low = std::min(low, from_of(t));
        int from = 0, to = chunk.count;
        while (from < to && chunk.end[from] <= low) ++from;
        while (from < to && chunk.first[to - 1] >= high) --to;
        if (from == to) return;

        alignas(VECTOR_BYTES) A scores[R * ACROSS];
        multiply_all<X, R>(state.query + row * dim, dim, chunk.keys + from, ahead.keys + from, size, to - from, dim,
                           scores, ACROSS, false);
        for (int r = 0; r < R; ++r) {
            const int t = (row + r) / groups;
            A *own = scores + r * ACROSS;
            if constexpr (STEPPED<X>) stretch(own, chunk.key_steps + from, to - from);
            if constexpr (SCALED<X>) multiply_by(tokens.scales[tile.head] / LOADED, own, to - from);
            if (tokens.cap) bend(own, to - from);
            if (tile.masked()) hide(tile, t, chunk.first + from, chunk.end + from, to - from, own);
            const A factor = reweigh(own, chunk.first + from, chunk.end + from, to - from, from_of(t), to_of(t),
                                     state.top[row + r], state.weight[row + r]);
            A *out = state.out + (row + r) * padded;
            if (factor != 1)
                for (int d = 0; d < padded; ++d) out[d] *= factor;
            if constexpr (STEPPED<X>) stretch(own, chunk.value_steps + from, to - from);
            if constexpr (SCALED<X>) multiply_by(tokens.scales[kv_heads + tile.head] / LOADED, own, to - from);
        }
        for (int v = from; v < to; ++v) {
            const int depth = std::min(chunk.end[v], high) - chunk.first[v];
            for (int d = 0; d < padded; d += 8 * W) {
                const X *columns[8], *later[8];
                for (int n = 0; n < 8; ++n) {
                    columns[n] = chunk.values[v] + d + n * W;
                    later[n] = ahead.values[v] + d + n * W;
                }
                multiply_all<X, R>(scores + (v - from) * W, ACROSS, columns, later, dim, std::min(8, (padded - d) / W),
                                   depth, state.out + row * padded + d, padded, true);
            }
        }
    }

    // Adds another part's softmax to `state`, by the logarithms of their sums.
    void merge(const State<A> &part, int rows, State<A> &state) const {
        for (int row = 0; row < rows; ++row) {
            const A top = std::max(state.top[row], part.top[row]), base = top == NOTHING<A> ? 0 : top;
            const A ours = std::exp2(state.top[row] - base), theirs = std::exp2(part.top[row] - base);
            for (int d = row * padded; d < (row + 1) * padded; ++d)
                state.out[d] = ours * state.out[d] + theirs * part.out[d];
            state.weight[row] = ours * state.weight[row] + theirs * part.weight[row];
            state.top[row] = top;
        }
    }

    // Multiplies vectors of scores or weights by the steps of their keys or values.
    void stretch(A *scores, const char *const *steps, int count) const {
        for (int v = 0; v < count; ++v) {
            vector<A> step;
            std::memcpy(&step, steps[v], sizeof step);
            store(scores + v * W, load(scores + v * W) * step);
        }
    }

    void multiply_by(A factor, A *scores, int count) const {
        for (int v = 0; v < count; ++v) store(scores + v * W, load(scores + v * W) * factor);
    }

    // Bends vectors of scores, in powers of two, towards the bound.
    void bend(A *scores, int count) const {
        const A bound = A(tokens.cap * LOG2E);
        for (int v = 0; v < count; ++v) store(scores + v * W, bound * tanh(load(scores + v * W) / bound));
    }

    void finish(const Tile &tile, const State<A> &state) const {
        for (int row = 0; row < tile.tokens * groups; ++row) {
            const int64_t token = tile.first_token + row / groups, head = tile.head * groups + row % groups;
            T *out = static_cast<T *>(tokens.out) + (token * heads + head) * dim;
            A weight = state.weight[row];
            if (tokens.sinks) weight += std::exp2(A(tokens.sinks[head] * LOG2E) - state.top[row]);
            for (int d = 0; d < dim; ++d) narrow(state.out[row * padded + d] / weight, out[d]);
        }
    }

    void run(int64_t total_tokens, int threads) const {
        const int64_t all = each_tile([](const Tile &, int64_t, int64_t) {});
        threads = std::clamp<int64_t>(all * W * CHUNK / THREAD_WORK, 1, threads);
        std::vector<Worker<A> *> workers(threads);
        copy(batch.fetched, batch.fetches);
#pragma omp parallel num_threads(threads)
        {
            static thread_local Worker<A> worker;
            const int64_t self = omp_get_thread_num(), crew = omp_get_num_threads();
            workers[self] = &worker;
            write(total_tokens * self / crew, total_tokens * (self + 1) / crew);
#pragma omp barrier
            work(all * self / crew, all * (self + 1) / crew, worker);
#pragma omp barrier
            if (worker.has_begun) {
                for (int other = self + 1; other < crew; ++other) {
                    if (workers[other]->has_cut) merge(workers[other]->cut, worker.begun.tokens * groups, worker.own);
                    if (workers[other]->has_begun) break;
                }
                finish(worker.begun, worker.own);
            }
        }
        copy(batch.returned, batch.returns);
    }
};

// Attention of queries that were computed before, in full: what they pay to each key.
template <class T, class S> struct Looks : Attention<T, S> {
    using Base = Attention<T, S>;
    using A = sum_t<T>;
    using Base::W, Base::batch, Base::tokens, Base::kv_heads, Base::groups, Base::dim;

    // Tells it of all sequences, which have as many queries each: out [sequences][kv_heads][queries][columns], averaged
    // over the query heads of a key head. The keys that a layer sees are the last columns.
    void run(int missing, int64_t columns, float *out) const {
        const int queries = batch.starts[1] - batch.starts[0], most = std::max(1, LOOK_ROWS / groups);
        const int tiles = (queries + most - 1) / most;
#pragma omp parallel for collapse(3) num_threads(batch.threads)
        for (int sequence = 0; sequence < batch.sequences; ++sequence)
            for (int head = 0; head < kv_heads; ++head)
                for (int number = 0; number < tiles; ++number) {
                    const int first = number * most, count = std::min(most, queries - first);
                    const int length = batch.lengths[sequence], token = batch.starts[sequence] + first;
                    const int64_t row = (sequence * int64_t(kv_heads) + head) * queries + first;
                    Tile tile{sequence, head, token, count, length - queries + first, length, 0, 0, {}};
                    Base::cut(tile);
                    tell(tile, missing, columns, out + row * columns);
                }
    }

    void tell(const Tile &tile, int missing, int64_t columns, float *out) const {
        static thread_local State<A> state;
        const int rows = tile.tokens * groups, width = (columns + W - 1) / W * W;
        state.reset(rows, dim, width);
        Base::fetch(tile, state);
        std::fill(state.out, state.out + rows * int64_t(width), NOTHING<A>);
        int column = missing;
        for (const Piece *piece = tile.pieces; piece < tile.pieces + tile.count; ++piece) {
            for (int number = 0; number < piece->chunks; ++number) {
                const Chunk<S> chunk = Base::template locate<S>(tile, *piece, number);
                int row = 0;
                for (; rows - row >= 8; row += 8) score<8>(tile, *piece, chunk, state, row, width, column);
                if (rows - row >= 4) score<4>(tile, *piece, chunk, state, row, width, column), row += 4;
                if (rows - row >= 2) score<2>(tile, *piece, chunk, state, row, width, column), row += 2;
                if (rows - row >= 1) score<1>(tile, *piece, chunk, state, row, width, column);
            }
            column += piece->high - piece->low;
        }
        for (int row = 0; row < rows; ++row) weigh(state.out + row * int64_t(width), width);
        for (int t = 0; t < tile.tokens; ++t, out += columns) {
            const A *own = state.out + t * groups * int64_t(width);
            for (int64_t at = 0; at < columns; ++at) {
                A sum = own[at];
                for (int g = 1; g < groups; ++g) sum += own[g * width + at];
                out[at] = sum / groups;
            }
        }
    }

    // Puts the scores of R rows, from `row` on, for the keys of a chunk that they see, where the piece's columns begin
    // at `column`.
    template <int R>
    void score(const Tile &tile, const Piece &piece, const Chunk<S> &chunk, State<A> &state, int row, int width,
               int column) const {
        constexpr int ACROSS = CHUNK * W;
        alignas(VECTOR_BYTES) A scores[R * ACROSS];
        multiply_all<S, R>(state.query + row * dim, dim, chunk.keys, chunk.keys, Base::size, chunk.count, dim, scores,
                           ACROSS, false);
        for (int r = 0; r < R; ++r) {
            A *own = scores + r * ACROSS, *to = state.out + (row + r) * int64_t(width);
            if constexpr (STEPPED<S>) Base::stretch(own, chunk.key_steps, chunk.count);
            if constexpr (SCALED<S>) Base::multiply_by(tokens.scales[tile.head] / LOADED, own, chunk.count);
            const int t = (row + r) / groups;
            const int high = std::min(piece.high, Base::high_of(tile, t));
            for (int v = 0; v < chunk.count; ++v) {
                const int from = std::max(chunk.first[v], piece.low), behind = std::min(chunk.end[v], high);
                if (from >= behind) continue;
                std::copy(own + v * W + from - chunk.first[v], own + v * W + behind - chunk.first[v],
                          to + column + from - piece.low);
            }
        }
    }

    // The softmax of scores in powers of two.
    static void weigh(A *scores, int width) {
        vector<A> best = vector<A>{} + NOTHING<A>, total = {};
        for (int at = 0; at < width; at += W) {
            const vector<A> s = load(scores + at);
            best = s > best ? s : best;
        }
        const A top = across<A>(best, [](auto x, auto y) { return x > y ? x : y; });
        for (int at = 0; at < width; at += W) {
            const vector<A> p = exp2(load(scores + at) - top);
            store(scores + at, p);
            total += p;
        }
        const A inverse = 1 / across<A>(total, [](auto x, auto y) { return x + y; });
        for (int at = 0; at < width; at += W) store(scores + at, load(scores + at) * inverse);
    }
};

template <template <class, class> class Work, class T, class S>
Work<T, S> described(const Memory &memory, const Batch &batch, const Tokens &tokens, int64_t layer, double scale,
                     int window) {
    return {memory, batch, tokens, int(layer), int(memory.heads), int(memory.kv_heads), int(memory.head_dim),
            int(memory.block_size), sum_t<T>(scale * LOG2E), window};
}

template <class T, class S = T>
void attend(const Memory &memory, const Batch &batch, const Tokens &tokens, int64_t layer, double scale, int window) {
    described<Attention, T, S>(memory, batch, tokens, layer, scale, window)
        .run(batch.starts[batch.sequences], batch.threads);
}

template <class T, class S = T>
void look(const Memory &memory, const Batch &batch, const Tokens &tokens, int64_t layer, double scale, int window,
          int missing, int64_t columns, float *out) {
    described<Looks, T, S>(memory, batch, tokens, layer, scale, window).run(missing, columns, out);
}

}  // namespace

extern "C" {

#define KERNELS(name, ...)                                                                                            \
    void attend_##name(const Memory *memory, const Batch *batch, const Tokens *tokens, int64_t layer, double scale,   \
                       int window) {                                                                                  \
        attend<__VA_ARGS__>(*memory, *batch, *tokens, layer, scale, window);                                          \
    }                                                                                                                 \
    void look_##name(const Memory *memory, const Batch *batch, const Tokens *tokens, int64_t layer, double scale,     \
                     int window, int missing, int64_t columns, float *out) {                                          \
        look<__VA_ARGS__>(*memory, *batch, *tokens, layer, scale, window, missing, columns, out);                     \
    }

// By the type of queries, and of what blocks hold where that is another.
KERNELS(float32, float)
KERNELS(float64, double)
KERNELS(bfloat16, bfloat16)
KERNELS(float32_over_bfloat16, float, bfloat16)
KERNELS(float32_over_int8, float, int8_t)
KERNELS(bfloat16_over_int8, bfloat16, int8_t)
KERNELS(float32_over_e4m3, float, e4m3)
KERNELS(bfloat16_over_e4m3, bfloat16, e4m3)

// Whether all of a batch lies in the memory: the number of its first sequence that does not, or -1.
int64_t stray(const Memory *memory, const Batch *batch) {
    for (int64_t b = 0; b < batch->sequences; ++b) {
        const int64_t needed = (batch->lengths[b] + memory->block_size - 1) / memory->block_size;
        if (batch->starts[b] > batch->starts[b + 1] || needed > batch->table_width ||
            batch->lengths[b] < batch->starts[b + 1] - batch->starts[b])
            return b;
        for (int64_t i = 0; i < needed; ++i)
            if (uint64_t(batch->tables[b * batch->table_width + i]) >= uint64_t(memory->blocks)) return b;
        for (int64_t t = batch->starts[b]; t < batch->starts[b + 1]; ++t)
            if (uint64_t(batch->slots[t]) >= uint64_t(memory->blocks * memory->block_size)) return b;
    }
    return -1;
}
}
