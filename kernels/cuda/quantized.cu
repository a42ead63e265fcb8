// Products with GGUF-quantized weights: exact integers within a group of 32 inputs, fused multiply-adds over groups. The
// CPU's are in kernels/src/matrix/quantized.rs, and the arithmetic of a group is the same; its packing for the device is
// kernels/src/gpu/quantized/packing.rs.
//
// The weights stand in tiles of sixteen output features, and within a tile pair by pair of groups, the way the matrix
// instruction takes them: with g = lane / 4 and t = lane % 4, a lane has inputs 4t … 4t + 3 and 4t + 16 … 4t + 19 of
// features g and g + 8. So a warp reads every pair as whole lines and has its fragments in registers, without shared memory.
// Quantized activations stand the same way, in tiles of eight rows.
//
// One output is summed thus: the pairs are cut into SPANS runs of equal length (the last ones may be short or empty);
// within a run groups are added in order, and then the runs in order. Neither depends on the number of rows. The CPU adds
// all groups in order: that chain would leave one warp to sixteen features, too few for the memory's latency. A sum in
// another order differs by at most about 2 * groups * 2^-24 of the sum of its terms' absolute values, and typically by
// 1e-7 of the result's norm.
#include "elements.cuh"

constexpr uint32_t GROUP = 32;
constexpr uint32_t TILE_FEATURES = 16;
constexpr uint32_t TILE_ROWS = 8;
// Warps of a block, each with its run of the inputs.
constexpr uint32_t SPANS = 8;
constexpr uint32_t THREADS = SPANS * WARP;
// Values of a group whose absolute values are all at most this large count as zero, as on the CPU.
constexpr float NEGLIGIBLE = 1e-30f;

// Integers from -2^22 to 2^22 - 1 added to these bits are the bits of a float that is as much larger than INTEGER_ORIGIN.
constexpr uint32_t INTEGER_BITS = 0x4b400000u;
constexpr float INTEGER_ORIGIN = 12582912.0f;

// Unsigned byte `index` of a word as a float.
DEVICE float byte_of(uint32_t word, uint32_t index) {
    return uint_as_float(0x4b000000u | (word >> (8 * index) & 0xff)) - 8388608.0f;
}
// The low or high half of a word as a float.
DEVICE float half_of(uint32_t word, uint32_t index) { return from_f16(f16{uint16_t(word >> (16 * index))}); }

DEVICE uint32_t word_at(const uint8_t* from) { return *reinterpret_cast<const uint32_t*>(from); }

DEVICE void load_words(const uint8_t* from, uint32_t* words) {
    Bytes16 v = load_streaming(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// ---- formats
//
// Each holds what a lane needs of one pair of groups of one tile: `load` reads it, `fragment` unpacks the bytes of one
// group (0 or 1 of the pair) to signed ones, `scale` gives what the integer is multiplied by, for inputs below (half 0) or
// from 16 on (half 1) of the group, of feature g (side 0) or g + 8 (side 1). Where unpacking leaves the quants times a power
// of two the scale is that much smaller, which is exact. `minimum` is what the scaled sum of the inputs is multiplied by.

// Four-bit words: inputs 4t … in the low and inputs 4t + 16 … in the high nibbles; word 2 * group + side.
struct Nibbles {
    uint32_t words[4];

    // 0 … 15.
    DEVICE void unsigned_fragment(uint32_t group, uint32_t (&a)[4]) const {
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t word = words[2 * group + side];
            a[side] = word & 0x0f0f0f0fu;
            a[2 + side] = word >> 4 & 0x0f0f0f0fu;
        }
    }
    // Sixteen times the nibbles' two's complement.
    DEVICE void signed_fragment(uint32_t group, uint32_t (&a)[4]) const {
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t word = words[2 * group + side];
            a[side] = word << 4 & 0xf0f0f0f0u;
            a[2 + side] = word & 0xf0f0f0f0u;
        }
    }
};

struct Q4_0 {
    static constexpr bool HALVES = false, MINIMUM = false;
    static constexpr uint32_t PAIR_BYTES = 512 + 64;
    Nibbles quants;
    Bytes8 scales;  // f16: side 0 in x, side 1 in y; group 0 low, group 1 high

    DEVICE static size_t tile_bytes(uint32_t pairs) { return size_t(pairs) * PAIR_BYTES; }
    DEVICE void load(const uint8_t* tile, uint32_t pair, uint32_t of_lane) {
        const uint8_t* from = tile + size_t(pair) * PAIR_BYTES;
        load_words(from + of_lane * 16, quants.words);
        scales = *reinterpret_cast<const Bytes8*>(from + 512 + of_lane / 4 * 8);
    }
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const { quants.signed_fragment(group, a); }
    DEVICE float scale(uint32_t group, uint32_t, uint32_t side) const {
        return half_of(side ? scales.y : scales.x, group) * 0.0625f;
    }
    DEVICE float minimum(uint32_t, uint32_t) const { return 0.0f; }
};

struct Q4_1 {
    static constexpr bool HALVES = false, MINIMUM = true;
    static constexpr uint32_t PAIR_BYTES = 512 + 128;
    Nibbles quants;
    Bytes16 scales;  // x and y as above, then the minimums in z and w

    DEVICE static size_t tile_bytes(uint32_t pairs) { return size_t(pairs) * PAIR_BYTES; }
    DEVICE void load(const uint8_t* tile, uint32_t pair, uint32_t of_lane) {
        const uint8_t* from = tile + size_t(pair) * PAIR_BYTES;
        load_words(from + of_lane * 16, quants.words);
        scales = *reinterpret_cast<const Bytes16*>(from + 512 + of_lane / 4 * 16);
    }
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const { quants.unsigned_fragment(group, a); }
    DEVICE float scale(uint32_t group, uint32_t, uint32_t side) const {
        return half_of(side ? scales.y : scales.x, group);
    }
    DEVICE float minimum(uint32_t group, uint32_t side) const { return half_of(side ? scales.w : scales.z, group); }
};

struct Q8_0 {
    static constexpr bool HALVES = false, MINIMUM = false;
    static constexpr uint32_t PAIR_BYTES = 1024 + 64;
    uint32_t quants[8];  // per group: inputs 4t … of both sides, then inputs 4t + 16 …
    Bytes8 scales;

    DEVICE static size_t tile_bytes(uint32_t pairs) { return size_t(pairs) * PAIR_BYTES; }
    DEVICE void load(const uint8_t* tile, uint32_t pair, uint32_t of_lane) {
        const uint8_t* from = tile + size_t(pair) * PAIR_BYTES;
        load_words(from + of_lane * 16, quants);
        load_words(from + 512 + of_lane * 16, quants + 4);
        scales = *reinterpret_cast<const Bytes8*>(from + 1024 + of_lane / 4 * 8);
    }
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const {
        UNROLL
        for (uint32_t i = 0; i < 4; i++) a[i] = quants[4 * group + i];
    }
    DEVICE float scale(uint32_t group, uint32_t, uint32_t side) const {
        return half_of(side ? scales.y : scales.x, group);
    }
    DEVICE float minimum(uint32_t, uint32_t) const { return 0.0f; }
};

// Four pairs make a block of 256 inputs, which ends in the features' factors.
struct Q4K {
    static constexpr bool HALVES = false, MINIMUM = true;
    static constexpr uint32_t PAIR_BYTES = 512 + 64, BLOCK_BYTES = 4 * PAIR_BYTES + 64;
    Nibbles quants;
    uint32_t steps[2];    // per side four bytes: the scales of both groups, the minimums of both
    uint32_t factors[2];  // per side: f16 factor of the scales, f16 factor of the minimums

    DEVICE static size_t tile_bytes(uint32_t pairs) { return size_t(pairs / 4) * BLOCK_BYTES; }
    DEVICE void load(const uint8_t* tile, uint32_t pair, uint32_t of_lane) {
        const uint8_t* block = tile + size_t(pair / 4) * BLOCK_BYTES;
        const uint8_t* from = block + pair % 4 * PAIR_BYTES;
        load_words(from + of_lane * 16, quants.words);
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t feature = of_lane / 4 + 8 * side;
            steps[side] = word_at(from + 512 + feature * 4);
            factors[side] = word_at(block + 4 * PAIR_BYTES + feature * 4);
        }
    }
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const { quants.unsigned_fragment(group, a); }
    DEVICE float scale(uint32_t group, uint32_t, uint32_t side) const {
        return half_of(factors[side], 0) * byte_of(steps[side], group);
    }
    DEVICE float minimum(uint32_t group, uint32_t side) const {
        return -(half_of(factors[side], 1) * byte_of(steps[side], 2 + group));
    }
};

struct Q6K {
    static constexpr bool HALVES = true, MINIMUM = false;
    static constexpr uint32_t PAIR_BYTES = 512 + 256 + 64, BLOCK_BYTES = 4 * PAIR_BYTES + 32;
    Nibbles low;
    Bytes8 high;        // a word a group: bits 2 * (2 * side + half) and the next of each byte
    uint32_t steps[2];  // per side four bytes, each plus 128: half 0 and 1 of group 0, half 0 and 1 of group 1
    f16 factors[2];

    DEVICE static size_t tile_bytes(uint32_t pairs) { return size_t(pairs / 4) * BLOCK_BYTES; }
    DEVICE void load(const uint8_t* tile, uint32_t pair, uint32_t of_lane) {
        const uint8_t* block = tile + size_t(pair / 4) * BLOCK_BYTES;
        const uint8_t* from = block + pair % 4 * PAIR_BYTES;
        load_words(from + of_lane * 16, low.words);
        high = *reinterpret_cast<const Bytes8*>(from + 512 + of_lane * 8);
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t feature = of_lane / 4 + 8 * side;
            steps[side] = word_at(from + 768 + feature * 4);
            factors[side] = *reinterpret_cast<const f16*>(block + 4 * PAIR_BYTES + feature * 2);
        }
    }
    // Four times the quants' two's complement of six bits.
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const {
        uint32_t top = group ? high.y : high.x;
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t word = low.words[2 * group + side];
            a[side] = (word << 2 & 0x3c3c3c3cu) | (top << (6 - 4 * side) & 0xc0c0c0c0u);
            a[2 + side] = (word >> 2 & 0x3c3c3c3cu) | (top << (4 - 4 * side) & 0xc0c0c0c0u);
        }
    }
    DEVICE float scale(uint32_t group, uint32_t half, uint32_t side) const {
        return from_f16(factors[side]) * ((byte_of(steps[side], 2 * group + half) - 128.0f) * 0.25f);
    }
    DEVICE float minimum(uint32_t, uint32_t) const { return 0.0f; }
};

// ---- activations

struct QuantizeParams {
    const void* x;    // [rows, cols]
    uint8_t* quants;  // [pairs, tiles of 8 rows, 32 lanes, 16 bytes]: per group inputs 4t … and 4t + 16 … of row g
    float* scales;    // [pairs, tiles, 4, 2 groups, 2 rows]: rows 2t and 2t + 1
    float* sums;      // the same: scale * sum of the group's quants
    uint32_t rows, cols, pairs;
};

struct Group {
    uint32_t words[2];
    float scale, sum;
};

// A row's group over four lanes, eight inputs a lane, rounded as on the CPU. A value that is not finite makes the scale NaN,
// so that it reaches the logits.
DEVICE Group quantize_group(const float (&x)[2][4]) {
    uint32_t largest = 0;
    UNROLL
    for (uint32_t i = 0; i < 8; i++) {
        uint32_t bits = float_as_uint(x[i / 4][i % 4]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    UNROLL
    for (uint32_t offset = 1; offset <= 2; offset *= 2) {
        uint32_t other = shuffle_xor(largest, offset);
        largest = other > largest ? other : largest;
    }
    bool finite = largest < 0x7f800000u;
    float max = uint_as_float(largest);
    float inverse = finite && max > NEGLIGIBLE ? divide(127.0f, max) : 0.0f;
    Group group{{0, 0}, finite ? divide(max, 127.0f) : uint_as_float(0x7fffffff), 0.0f};
    int32_t sum = 0;
    UNROLL
    for (uint32_t i = 0; i < 8; i++) {
        int32_t quant = finite ? int32_t(round_even(x[i / 4][i % 4] * inverse)) : 0;
        group.words[i / 4] |= (uint32_t(quant) & 0xff) << (8 * (i % 4));
        sum += quant;
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    group.sum = group.scale * float(sum);
    return group;
}

// A warp for each tile and pair.
template <typename T>
DEVICE void quantize_rows(const QuantizeParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t pair = blockIdx.x * SPANS + warp();
    if (pair >= p.pairs) return;
    uint32_t g = lane() / 4, t = lane() % 4, row = blockIdx.y * TILE_ROWS + g;
    bool valid = row < p.rows;
    const T* from = static_cast<const T*>(p.x) + size_t(valid ? row : 0) * p.cols;
    Group groups[2];
    UNROLL
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t at = (2 * pair + i) * GROUP;
        float x[2][4] = {};
        // The last pair may lack its second group, which counts as zeros.
        if (valid && at < p.cols) {
            load4(from + at + 4 * t, x[0]);
            load4(from + at + 4 * t + 16, x[1]);
        }
        groups[i] = quantize_group(x);
    }
    if (!valid) return;
    size_t index = size_t(pair) * gridDim.y + blockIdx.y;
    *reinterpret_cast<Bytes16*>(p.quants + (index * WARP + lane()) * 16) =
        Bytes16{groups[0].words[0], groups[0].words[1], groups[1].words[0], groups[1].words[1]};
    if (t < 2) {
        size_t to = (index * 4 + g / 2) * 4 + 2 * t + g % 2;
        p.scales[to] = t ? groups[1].scale : groups[0].scale;
        p.sums[to] = t ? groups[1].sum : groups[0].sum;
    }
}

KERNEL(quantize_rows_f32, QuantizeParams, THREADS) { quantize_rows<float>(p); }
KERNEL(quantize_rows_f16, QuantizeParams, THREADS) { quantize_rows<f16>(p); }
KERNEL(quantize_rows_bf16, QuantizeParams, THREADS) { quantize_rows<bf16>(p); }

// ---- product

struct QuantizedProductParams {
    const uint8_t* weights;
    const uint8_t* quants;
    const float* scales;
    const float* sums;
    void* out;          // rows of `row_stride` elements
    const float* bias;  // [features] or null
    uint64_t row_stride;
    uint32_t rows, features, pairs;
    uint32_t element, add;
};
// As gpu::Element numbers them.
constexpr uint32_t ELEMENT_F32 = 0, ELEMENT_F16 = 1;

// What a lane needs of one pair of groups of eight rows.
template <bool MINIMUM>
struct Columns {
    Bytes16 quants;
    float scales[4], sums[4];

    // Of a tile whose first row is `first` and whose index over pairs and tiles is `index`. Rows that are not there are not
    // read: they would cost a single row most of its bandwidth.
    DEVICE void load(const QuantizedProductParams& p, uint32_t first, size_t index) {
        uint32_t g = lane() / 4, t = lane() % 4;
        quants = Bytes16{0, 0, 0, 0};
        UNROLL
        for (uint32_t i = 0; i < 4; i++) scales[i] = 0.0f, sums[i] = 0.0f;
        if (first + g < p.rows) quants = *reinterpret_cast<const Bytes16*>(p.quants + (index * WARP + lane()) * 16);
        if (first + 2 * t < p.rows) {
            load4(p.scales + (index * 4 + t) * 4, scales);
            if (MINIMUM) load4(p.sums + (index * 4 + t) * 4, sums);
        }
    }
};

// Adds one group's part to a tile of sums; `half` picks the scale.
DEVICE void add_products(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&scale)[2],
                         const float* column_scales) {
    int32_t c[4] = {int32_t(INTEGER_BITS), int32_t(INTEGER_BITS), int32_t(INTEGER_BITS), int32_t(INTEGER_BITS)};
    mma_s8(c, a, b);
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        float integer = uint_as_float(uint32_t(c[i])) - INTEGER_ORIGIN;
        sums[i] = fma_(integer, scale[i / 2] * column_scales[i % 2], sums[i]);
    }
}

// One pair of groups of one tile of features by one tile of rows.
template <typename F>
DEVICE void add_pair(float (&sums)[4], const F& weights, const Columns<F::MINIMUM>& columns) {
    UNROLL
    for (uint32_t group = 0; group < 2; group++) {
        uint32_t a[4];
        weights.fragment(group, a);
        uint32_t b[2] = {group ? columns.quants.z : columns.quants.x, group ? columns.quants.w : columns.quants.y};
        float low[2] = {weights.scale(group, 0, 0), weights.scale(group, 0, 1)};
        if (F::HALVES) {
            float high[2] = {weights.scale(group, 1, 0), weights.scale(group, 1, 1)};
            uint32_t below[4] = {a[0], a[1], 0, 0}, above[4] = {0, 0, a[2], a[3]};
            add_products(sums, below, b, low, columns.scales + 2 * group);
            add_products(sums, above, b, high, columns.scales + 2 * group);
        } else {
            add_products(sums, a, b, low, columns.scales + 2 * group);
        }
        if (F::MINIMUM) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) {
                sums[i] = fma_(weights.minimum(group, i / 2), columns.sums[2 * group + i % 2], sums[i]);
            }
        }
    }
}

// Writes one sum: added to what is there, or with the bias alone.
DEVICE void put(const QuantizedProductParams& p, uint32_t row, uint32_t feature, float sum) {
    size_t at = size_t(row) * p.row_stride + feature;
    if (p.add) sum = static_cast<float*>(p.out)[at] + sum;
    if (p.bias) sum = sum + p.bias[feature];
    if (p.element == ELEMENT_F32) {
        static_cast<float*>(p.out)[at] = sum;
    } else if (p.element == ELEMENT_F16) {
        static_cast<f16*>(p.out)[at] = to_f16(sum);
    } else {
        static_cast<bf16*>(p.out)[at] = to_bf16(sum);
    }
}

// A tile of features by R tiles of rows a block; each warp takes one span of the inputs, with DEPTH pairs of weights under
// way. Weights may be read before the kernel ahead of this one has ended.
template <typename Format, uint32_t R, uint32_t DEPTH>
DEVICE void multiply_quantized(const QuantizedProductParams& p) {
    constexpr uint32_t ROWS = R * TILE_ROWS;
    // A row has four floats more than the tile, so that the lanes of a warp meet different banks.
    constexpr uint32_t STRIDE = TILE_FEATURES + 4;
    SHARED(float, partial, [SPANS * ROWS * STRIDE]);
    grid_dependency_launch();
    uint32_t span = (p.pairs + SPANS - 1) / SPANS;
    uint32_t begin = warp() * span, end = begin + span < p.pairs ? begin + span : p.pairs;
    const uint8_t* tile = p.weights + blockIdx.x * Format::tile_bytes(p.pairs);
    Format ahead[DEPTH];
    UNROLL
    for (uint32_t d = 0; d < DEPTH; d++) {
        if (begin + d < end) ahead[d].load(tile, begin + d, lane());
    }
    grid_dependency_wait();
    uint32_t row_tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
    float sums[R][4] = {};
    for (uint32_t pair = begin; pair < end; pair++) {
        Format weights = ahead[0];
        UNROLL
        for (uint32_t d = 0; d + 1 < DEPTH; d++) ahead[d] = ahead[d + 1];
        if (pair + DEPTH < end) ahead[DEPTH - 1].load(tile, pair + DEPTH, lane());
        UNROLL
        for (uint32_t r = 0; r < R; r++) {
            uint32_t row_tile = blockIdx.y * R + r;
            Columns<Format::MINIMUM> columns;
            columns.load(p, row_tile * TILE_ROWS, size_t(pair) * row_tiles + row_tile);
            add_pair(sums[r], weights, columns);
        }
    }
    UNROLL
    for (uint32_t r = 0; r < R; r++) {
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t row = r * TILE_ROWS + lane() % 4 * 2 + i % 2, feature = lane() / 4 + 8 * (i / 2);
            partial[(warp() * ROWS + row) * STRIDE + feature] = sums[r][i];
        }
    }
    block_barrier();
    for (uint32_t i = threadIdx.x; i < ROWS * TILE_FEATURES; i += THREADS) {
        uint32_t feature = i % TILE_FEATURES, row = i / TILE_FEATURES;
        float sum = 0.0f;
        UNROLL
        for (uint32_t s = 0; s < SPANS; s++) sum = sum + partial[(s * ROWS + row) * STRIDE + feature];
        row += blockIdx.y * ROWS;
        feature += blockIdx.x * TILE_FEATURES;
        if (row < p.rows && feature < p.features) put(p, row, feature, sum);
    }
}

// Kernels by the rows of a block. What they compute for a row is the same.
#define QUANTIZED_KERNELS(name, Format)                                                                                    \
    KERNEL_OCCUPANCY(multiply_##name##_8, QuantizedProductParams, THREADS, 2) { multiply_quantized<Format, 1, 4>(p); }     \
    KERNEL_OCCUPANCY(multiply_##name##_16, QuantizedProductParams, THREADS, 2) { multiply_quantized<Format, 2, 4>(p); }    \
    KERNEL_OCCUPANCY(multiply_##name##_32, QuantizedProductParams, THREADS, 2) { multiply_quantized<Format, 4, 3>(p); }    \
    KERNEL_OCCUPANCY(multiply_##name##_64, QuantizedProductParams, THREADS, 2) { multiply_quantized<Format, 8, 2>(p); }

QUANTIZED_KERNELS(q4_0, Q4_0)
QUANTIZED_KERNELS(q4_1, Q4_1)
QUANTIZED_KERNELS(q8_0, Q8_0)
QUANTIZED_KERNELS(q4k, Q4K)
QUANTIZED_KERNELS(q6k, Q6K)

// ---- embedding

struct QuantizedEmbedParams {
    const uint8_t* weights;
    const uint32_t* tokens;  // [gridDim.x]
    float* hidden;           // [gridDim.x, cols]
    uint32_t vocab, cols, pairs;
};

// Rows of the table as f32. A token that is no row of the table gives a row of NaN, which reaches the logits.
template <typename Format>
DEVICE void embed_quantized(const QuantizedEmbedParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t token = p.tokens[blockIdx.x];
    bool known = token < p.vocab;
    uint32_t feature = known ? token : 0, side = feature % TILE_FEATURES / 8;
    const uint8_t* tile = p.weights + feature / TILE_FEATURES * Format::tile_bytes(p.pairs);
    float* out = p.hidden + size_t(blockIdx.x) * p.cols;
    // Four threads a pair of groups, eight values of each.
    for (uint32_t i = threadIdx.x; i < p.pairs * 4; i += THREADS) {
        uint32_t pair = i / 4, t = i % 4;
        Format weights;
        weights.load(tile, pair, feature % 8 * 4 + t);
        UNROLL
        for (uint32_t group = 0; group < 2; group++) {
            uint32_t a[4], first = (2 * pair + group) * GROUP;
            weights.fragment(group, a);
            UNROLL
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t quants = side ? a[2 * half + 1] : a[2 * half];
                float scale = side ? weights.scale(group, half, 1) : weights.scale(group, half, 0);
                float minimum = side ? weights.minimum(group, 1) : weights.minimum(group, 0);
                float x[4];
                UNROLL
                for (uint32_t k = 0; k < 4; k++) {
                    float quant = float(int8_t(quants >> (8 * k)));
                    x[k] = known ? scale * quant + minimum : uint_as_float(0x7fffffff);
                }
                if (first < p.cols) store4(out + first + 16 * half + 4 * t, x);
            }
        }
    }
}

KERNEL(embed_q4_0, QuantizedEmbedParams, THREADS) { embed_quantized<Q4_0>(p); }
KERNEL(embed_q4_1, QuantizedEmbedParams, THREADS) { embed_quantized<Q4_1>(p); }
KERNEL(embed_q8_0, QuantizedEmbedParams, THREADS) { embed_quantized<Q8_0>(p); }
KERNEL(embed_q4k, QuantizedEmbedParams, THREADS) { embed_quantized<Q4K>(p); }
KERNEL(embed_q6k, QuantizedEmbedParams, THREADS) { embed_quantized<Q6K>(p); }
