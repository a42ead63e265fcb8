// Attention of query rows over paged keys and values: the arithmetic and the memory layout that both kernels share.
//
// A row's result must have the same bits whether it is computed alone in a decode step or within a chunk of a prompt, so
// both kernels use the same arithmetic. Absolute positions are divided into stretches of 64, and stretches into splits of
// four. Within a split, stretches are added in ascending order (online softmax, arXiv 1805.02867, 2205.14135), starting from
// an empty state; splits are merged in ascending order into a total. A score is a chain of matrix instructions over the
// head's dimensions. A weighted value is a chain over the stretch's positions, and the sum of the weights is an additional
// column of values that are all one. A matrix instruction never mixes the rows of a tile, and a stretch that a row does not
// see does not change the row's state. So it makes no difference which rows share a tile, which warp computes which columns,
// and which block merges.
//
// Keys and values of a layer are stored as [block][kv_head][position in block][head_dim], query rows and output as
// [row of the batch][head][head_dim]. Heads smaller than D are padded with zeros in shared memory.
#pragma once

#include "prelude.cuh"

constexpr uint32_t SPLIT_STRETCHES = 4;
// The number of rows of a matrix instruction.
constexpr uint32_t TILE_ROWS = 16;
// A value of Item::partial: the item covers all splits of its rows and merges them itself.
constexpr uint32_t WHOLE = 0xffffffffu;

struct AttentionParams {
    const uint8_t* queries;  // [rows, heads, head_dim] of T, rotated, not scaled
    uint8_t* out;            // [rows, heads, head_dim] of T
    const uint8_t* keys;     // the keys and values of this layer
    const uint8_t* values;
    const uint32_t* block_tables;
    const uint32_t* plan;
    float* partials;     // rows of maximum, sum, two words of padding, then head_dim values
    uint32_t* counters;  // the number of finished splits of each tile; zero before and after a launch
    uint32_t num_heads, num_kv_heads, head_dim, block_size;
    // The number of query heads that share a KV head.
    uint32_t group;
    // block_size is 2^block_shift; 32 if it is not a power of two.
    uint32_t block_shift;
    // How many positions a row sees, including its own; 2^32 - 1 for all.
    uint32_t window;
    // The word of the plan at which the items of this launch begin.
    uint32_t first_item;
    // The number of stages of the pipeline from device memory to shared memory.
    uint32_t stages;
    // The factor on scores, times log2(e).
    float scale;
    // For soft-capped scores c · tanh(x / c): `cap` is c · log2(e), or 0 for no cap; a score times `cap_scale` is
    // 2 log2(e) x / c.
    float cap, cap_scale;
};

// Consecutive rows of a sequence that share a KV head: row r is head r % group of token r / group.
struct alignas(16) Item {
    uint32_t first_row;  // row of the batch with the sequence's first token
    uint32_t start;      // that token's position
    uint32_t tile_row;   // first row r
    uint32_t rows;
    uint32_t table;  // first entry in the block tables
    uint32_t kv_head;
    uint32_t first_stretch, end_stretch;
    // For an item of a single split: the first partial row of split 0, this split's number, the number of splits, and the
    // counter's index.
    uint32_t partial, split, splits, counter;
};

DEVICE Item read_item(const AttentionParams& p, uint32_t index) {
    return reinterpret_cast<const Item*>(p.plan + p.first_item)[index];
}

DEVICE uint32_t min_index(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEVICE float minus_infinity() { return uint_as_float(0xff800000u); }

// ---- what a row sees

// Positions from `from` to `to`, excluding `to`.
struct Span {
    uint32_t from, to;
};

DEVICE Span span_of_row(const AttentionParams& p, const Item& item, uint32_t row) {
    if (row >= item.rows) return Span{0, 0};
    uint32_t to = item.start + (item.tile_row + row) / p.group + 1;
    return Span{to > p.window ? to - p.window : 0, to};
}

// The positions that any of the item's rows sees.
DEVICE Span span_of_item(const AttentionParams& p, const Item& item) {
    return Span{span_of_row(p, item, 0).from, span_of_row(p, item, item.rows - 1).to};
}

// The index of the item's row `row` in [rows of the batch, heads].
DEVICE uint64_t query_row(const AttentionParams& p, const Item& item, uint32_t row) {
    uint32_t r = item.tile_row + row, token = r / p.group;
    return uint64_t(item.first_row + token) * p.num_heads + item.kv_head * p.group + (r - token * p.group);
}

// ---- tiles in shared memory

// Rows of D elements of E. The 16-byte chunks of each row are permuted so that chunks with the same number in eight
// consecutive rows are in different banks.
template <typename E, uint32_t D>
struct Tile {
    static constexpr uint32_t ROW_BYTES = D * sizeof(E);
    static constexpr uint32_t CHUNKS = ROW_BYTES / 16;

    static DEVICE uint32_t turn(uint32_t row) { return CHUNKS >= 8 ? row % 8 : row / 2 % 4; }
    static DEVICE uint32_t offset(uint32_t row, uint32_t chunk) { return row * ROW_BYTES + (chunk ^ turn(row)) * 16; }
};

// Sixteen positions, which are always within one block.
struct Sixteen {
    uint64_t element;  // index of the first position's first element in the layer's keys and values
    uint32_t from, to;  // the positions of these sixteen that must be read
};

DEVICE Sixteen locate(const AttentionParams& p, const Item& item, Span seen, uint32_t position) {
    uint32_t from = seen.from > position ? min_index(seen.from - position, 16) : 0;
    uint32_t to = seen.to > position ? min_index(seen.to - position, 16) : 0;
    // No position is read, so the block might not exist.
    if (from >= to) return Sixteen{0, 0, 0};
    uint32_t index = p.block_shift < 32 ? position >> p.block_shift : position / p.block_size;
    uint32_t block = p.block_tables[item.table + index];
    uint64_t row = (uint64_t(block) * p.num_kv_heads + item.kv_head) * p.block_size + (position - index * p.block_size);
    return Sixteen{row * p.head_dim, from, to};
}

// One warp starts to copy sixteen positions to rows from `first_row` on. Positions that are not read become zero: their weights
// are zero, and zero times a NaN would be NaN.
template <typename E, uint32_t D>
DEVICE void load_sixteen(const AttentionParams& p, unsigned char* tile, uint32_t first_row, const uint8_t* layer, const Sixteen& at) {
    using Rows = Tile<E, D>;
    uint32_t row_bytes = p.head_dim * sizeof(E);
    const uint8_t* from = layer + at.element * sizeof(E);
    if (at.from == 0 && at.to == 16 && row_bytes == Rows::ROW_BYTES) {
        // The usual case: all sixteen positions are read, and they are contiguous. Between steps, only a constant part of the
        // permutation changes, because 16 rows are a multiple of its period and a step is a power of two rows.
        constexpr uint32_t STEP_ROWS = WARP / Rows::CHUNKS;
        const uint32_t first = Rows::offset(lane() / Rows::CHUNKS, lane() % Rows::CHUNKS);
        from += lane() * 16;
        tile += first_row * Rows::ROW_BYTES;
        UNROLL
        for (uint32_t i = 0; i < Rows::CHUNKS / 2; i++) {
            async_copy_16(tile + (first ^ Rows::turn(i * STEP_ROWS) * 16) + i * WARP * 16, from + i * WARP * 16, true);
        }
        return;
    }
    UNROLL
    for (uint32_t i = 0; i < Rows::CHUNKS / 2; i++) {
        uint32_t row = (i * WARP + lane()) / Rows::CHUNKS, chunk = (i * WARP + lane()) % Rows::CHUNKS;
        bool valid = row >= at.from && row < at.to && chunk * 16 < row_bytes;
        async_copy_16(tile + Rows::offset(first_row + row, chunk), valid ? from + row * row_bytes + chunk * 16 : layer, valid);
    }
}

// One warp starts to copy query rows `row` to `row + count` of the item.
template <typename T, uint32_t D>
DEVICE void load_queries(const AttentionParams& p, unsigned char* tile, const Item& item, uint32_t row, uint32_t count) {
    using Rows = Tile<T, D>;
    for (uint32_t i = lane(); i < count * Rows::CHUNKS; i += WARP) {
        uint32_t at = row + i / Rows::CHUNKS, chunk = i % Rows::CHUNKS;
        bool valid = at < item.rows && chunk * 8 < p.head_dim;
        const uint8_t* from = p.queries;
        if (valid) from += query_row(p, item, at) * p.head_dim * sizeof(T) + chunk * 16;
        async_copy_16(tile + Rows::offset(at, chunk), from, valid);
    }
}

// Waits until at most `pending` of the thread's groups of copies are in flight.
DEVICE void await_copies(uint32_t pending) {
    switch (pending) {
        case 0: async_copy_wait<0>(); break;
        case 1: async_copy_wait<1>(); break;
        case 2: async_copy_wait<2>(); break;
        case 3: async_copy_wait<3>(); break;
        case 4: async_copy_wait<4>(); break;
        case 5: async_copy_wait<5>(); break;
        case 6: async_copy_wait<6>(); break;
        default: async_copy_wait<7>(); break;
    }
}

// ---- the two number types of activations

template <typename T>
struct Number;
template <>
struct Number<bf16> {
    static constexpr uint32_t ONES = 0x3f803f80u;
    static DEVICE uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE uint32_t unpack(uint32_t two) { return unpack_fp8_bf16(two); }
    static DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
};
template <>
struct Number<f16> {
    static constexpr uint32_t ONES = 0x3c003c00u;
    static DEVICE uint32_t pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE uint32_t unpack(uint32_t two) { return unpack_fp8_f16(two); }
    static DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
};

// ---- operands of the matrix instructions. FP8 keys and values are widened to T in registers. A word of an FP8 key contains
// two pairs of dimensions, so the queries use the same order of dimensions: 4t, 4t + 1 first, then 4t + 2, 4t + 3.

// Loads sixteen query rows from `first_row` on, dimensions 16 step to 16 step + 15.
template <typename T, typename E, uint32_t D>
DEVICE void query_fragment(uint32_t (&a)[4], const unsigned char* tile, uint32_t first_row, uint32_t step) {
    using Rows = Tile<T, D>;
    if constexpr (sizeof(E) == 2) {
        uint32_t row = first_row + lane() % 16;
        load_matrix_x4(a, tile + Rows::offset(row, 2 * step + lane() / 16));
    } else {
        uint32_t row = first_row + lane() / 4, t = lane() % 4;
        UNROLL
        for (uint32_t half = 0; half < 2; half++) {
            const unsigned char* from = tile + Rows::offset(row + 8 * half, 2 * step + t / 2) + t % 2 * 8;
            a[half] = *reinterpret_cast<const uint32_t*>(from);
            a[half + 2] = *reinterpret_cast<const uint32_t*>(from + 4);
        }
    }
}

// Loads the keys of sixteen positions from row `first_row` on, for steps `step` and `step + 1`: b[step][half of the positions].
template <typename T, typename E, uint32_t D>
DEVICE void key_fragments(uint32_t (&b)[2][2][2], const unsigned char* tile, uint32_t first_row, uint32_t step) {
    using Rows = Tile<E, D>;
    uint32_t row = first_row + lane() % 8 + lane() / 16 * 8, odd = lane() / 8 % 2;
    uint32_t r[4];
    if constexpr (sizeof(E) == 2) {
        UNROLL
        for (uint32_t i = 0; i < 2; i++) {
            load_matrix_x4(r, tile + Rows::offset(row, 2 * (step + i) + odd));
            b[i][0][0] = r[0], b[i][0][1] = r[1], b[i][1][0] = r[2], b[i][1][1] = r[3];
        }
    } else {
        load_matrix_x4(r, tile + Rows::offset(row, step + odd));
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            b[i % 2][i / 2][0] = Number<T>::unpack(r[i] & 0xffff);
            b[i % 2][i / 2][1] = Number<T>::unpack(r[i] >> 16);
        }
    }
}

// Loads the values of 32 positions from row 32 half on, sixteen columns from 16 group on: b[tile of eight columns][step].
template <typename T, typename E, uint32_t D>
DEVICE void value_fragments(uint32_t (&b)[2][2][2], const unsigned char* tile, uint32_t half, uint32_t group) {
    using Rows = Tile<E, D>;
    uint32_t row = 32 * half + lane();
    uint32_t r[4];
    if constexpr (sizeof(E) == 2) {
        UNROLL
        for (uint32_t i = 0; i < 2; i++) {
            load_matrix_x4_transposed(r, tile + Rows::offset(row, 2 * group + i));
            b[i][0][0] = r[0], b[i][0][1] = r[1], b[i][1][0] = r[2], b[i][1][1] = r[3];
        }
    } else {
        // A word contains columns 2g, 2g + 1 of one position, then of the next. One tile gets the even columns, the other the
        // odd ones.
        load_matrix_x4_transposed(r, tile + Rows::offset(row, group));
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            b[0][i / 2][i % 2] = Number<T>::unpack((r[i] & 0xff) | (r[i] >> 8 & 0xff00));
            b[1][i / 2][i % 2] = Number<T>::unpack((r[i] >> 8 & 0xff) | (r[i] >> 16 & 0xff00));
        }
    }
}

// Access to two adjacent columns of a row in the sums of sixteen columns. `pair` is 0 or 1; `row` is 0 for rows 0 to 7, and 1
// for rows 8 to 15.
template <typename E>
struct Columns {
    static DEVICE uint32_t first(uint32_t pair) {
        uint32_t t = lane() % 4;
        return sizeof(E) == 2 ? 8 * pair + 2 * t : 4 * t + 2 * pair;
    }
    static DEVICE float low(const float (&o)[2][4], uint32_t pair, uint32_t row) {
        return sizeof(E) == 2 ? o[pair][2 * row] : o[0][2 * row + pair];
    }
    static DEVICE float high(const float (&o)[2][4], uint32_t pair, uint32_t row) {
        return sizeof(E) == 2 ? o[pair][2 * row + 1] : o[1][2 * row + pair];
    }
};

// ---- softmax

// Scales the scores of positions from `first` on (N tiles of eight) to units of log2, and sets those that a row does not see to
// -inf.
template <uint32_t N>
DEVICE void mask_scores(const AttentionParams& p, float (&s)[N][4], uint32_t first, const Span (&rows)[2], bool all_seen) {
    if (p.cap == 0.0f) {
        UNROLL
        for (uint32_t i = 0; i < N * 4; i++) s[i / 4][i % 4] = s[i / 4][i % 4] * p.scale;
    } else {
        // tanh(x) = 1 - 2 / (e^2x + 1)
        UNROLL
        for (uint32_t i = 0; i < N * 4; i++) {
            s[i / 4][i % 4] = p.cap - divide(2.0f * p.cap, fast_exp2(s[i / 4][i % 4] * p.cap_scale) + 1.0f);
        }
    }
    if (all_seen) return;
    UNROLL
    for (uint32_t j = 0; j < N; j++) {
        UNROLL
        for (uint32_t e = 0; e < 4; e++) {
            uint32_t position = first + 8 * j + lane() % 4 * 2 + e % 2;
            bool seen = position >= rows[e / 2].from && position < rows[e / 2].to;
            s[j][e] = seen ? s[j][e] : minus_infinity();
        }
    }
}

// The largest score of each of a lane's two rows.
template <uint32_t N>
DEVICE void row_maxima(const float (&s)[N][4], float (&maxima)[2]) {
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        float x = minus_infinity();
        UNROLL
        for (uint32_t j = 0; j < N; j++) x = max_(x, max_(s[j][2 * row], s[j][2 * row + 1]));
        x = max_(x, shuffle_xor(x, 1));
        maxima[row] = max_(x, shuffle_xor(x, 2));
    }
}

// Updates the running maximum with a stretch's maximum. Returns the factor for earlier sums. `reference` is what must be
// subtracted from the stretch's scores.
DEVICE float raise_maximum(float& running, float stretch, float& reference) {
    float raised = max_(running, stretch);
    // The row has seen no position yet: any finite reference makes all weights zero.
    reference = raised == minus_infinity() ? 0.0f : raised;
    float factor = fast_exp2(running - reference);
    running = raised;
    return factor;
}

// The state of a lane's two rows: maxima, sums of the weights (elements 0 and 2), and weighted values of 16 G columns.
template <uint32_t G>
struct State {
    float max[2];
    float sum[4];
    float o[G][2][4];

    DEVICE void clear() {
        max[0] = max[1] = minus_infinity();
        UNROLL
        for (uint32_t e = 0; e < 4; e++) sum[e] = 0.0f;
        UNROLL
        for (uint32_t i = 0; i < G * 8; i++) o[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    // Multiplies each row's sums by its factor.
    DEVICE void scale(const float (&factors)[2]) {
        UNROLL
        for (uint32_t e = 0; e < 4; e++) sum[e] = sum[e] * factors[e / 2];
        UNROLL
        for (uint32_t i = 0; i < G * 8; i++) o[i / 8][i / 4 % 2][i % 4] = o[i / 8][i / 4 % 2][i % 4] * factors[i % 4 / 2];
    }

    // Adds a stretch. `weights` holds its four steps of sixteen positions; columns start at group `first_group` of the tile.
    template <typename T, typename E, uint32_t D>
    DEVICE void add_values(const uint32_t (&weights)[4][4], const unsigned char* tile, uint32_t first_group) {
        const uint32_t ones[2] = {Number<T>::ONES, Number<T>::ONES};
        UNROLL
        for (uint32_t step = 0; step < 4; step++) Number<T>::multiply(sum, weights[step], ones);
        UNROLL
        for (uint32_t group = 0; group < G; group++) {
            UNROLL
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t b[2][2][2];
                value_fragments<T, E, D>(b, tile, half, first_group + group);
                UNROLL
                for (uint32_t step = 0; step < 2; step++) {
                    Number<T>::multiply(o[group][0], weights[2 * half + step], b[0][step]);
                    Number<T>::multiply(o[group][1], weights[2 * half + step], b[1][step]);
                }
            }
        }
    }
};

// The factors for a total and for a split's part when they are added.
struct Shares {
    float total, part;

    DEVICE float merge(float total_value, float part_value) const { return fma_(total_value, total, part_value * part); }
};

// Updates a row's total maximum with that of a split, and returns the factors. A split that the row does not see changes
// nothing.
DEVICE Shares merge_shares(float& total_max, float part_max, float part_sum) {
    if (part_sum == 0.0f) return Shares{1.0f, 0.0f};
    float reference, factor = raise_maximum(total_max, part_max, reference);
    return Shares{factor, fast_exp2(part_max - reference)};
}

// Writes two columns of an output row.
template <typename T>
DEVICE void write_pair(const AttentionParams& p, uint64_t row, uint32_t column, float low, float high) {
    uint8_t* to = p.out + (row * p.head_dim + column) * sizeof(T);
    *reinterpret_cast<uint32_t*>(to) = Number<T>::pack(low, high);
}
