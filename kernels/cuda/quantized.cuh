// Shared by the products with GGUF-quantized weights: formats, fragments and the arithmetic. Within a group of 32 inputs,
// integer sums are exact; groups are added by fused multiply-adds. The CPU kernels (kernels/src/matrix/quantized.rs) use the
// same arithmetic within a group. The weights are packed for the device by kernels/src/gpu/quantized/packing.rs.
//
// The weights are stored in tiles of sixteen output features, and a tile as pairs of groups, in the order of the matrix
// instruction's fragments: with g = lane / 4 and t = lane % 4, a lane has inputs 4t … 4t + 3 and 4t + 16 … 4t + 19 of
// features g and g + 8. So a warp reads every pair as whole cache lines straight into its fragments, without shared memory.
// Quantized activations are stored in the same order, see quantize.cuh.
//
// The order of summation of an output: the pairs are divided into SPANS runs of equal length (the last ones may be shorter
// or empty); groups are added in order within a run, and then the runs in order. This depends neither on the number of rows
// nor on the kernel. The CPU adds all groups in order. On the device, such a chain would allow only one warp for sixteen
// features, which is too few to hide the memory's latency. A sum in another order differs by at most about
// 2 * groups * 2^-24 of the sum of its terms' absolute values, and typically by 1e-7 of the result's norm.
#pragma once

#include "quantize.cuh"

constexpr uint32_t TILE_FEATURES = 16;
constexpr uint32_t SPANS = 8;

// Converts integers to floats: an integer n from -2^22 to 2^22 - 1, added to INTEGER_BITS, gives the bits of the float
// INTEGER_ORIGIN + n.
constexpr uint32_t INTEGER_BITS = 0x4b400000u;
constexpr float INTEGER_ORIGIN = 12582912.0f;

// Unsigned byte `index` of a word as a float.
DEVICE float byte_of(uint32_t word, uint32_t index) {
    return uint_as_float(0x4b000000u | (word >> (8 * index) & 0xff)) - 8388608.0f;
}
// The low or high half of a word as a float.
DEVICE float half_of(uint32_t word, uint32_t index) { return from_f16(f16{uint16_t(word >> (16 * index))}); }

DEVICE uint32_t word_at(const uint8_t* from) { return *reinterpret_cast<const uint32_t*>(from); }

// The memory from which weights are read.
enum class From { GLOBAL, SHARED };

template <From FROM>
DEVICE void load_words(const uint8_t* from, uint32_t* words) {
    Bytes16 v = FROM == From::GLOBAL ? load_streaming(from) : *reinterpret_cast<const Bytes16*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// ---- formats
//
// Each format struct holds a lane's part of one pair of groups of one tile. `load` reads it from the pair and, for types with
// blocks of four pairs, from the factors after the block. `fragment` unpacks one group (0 or 1 of the pair) to signed bytes.
// `scale` is the factor of the integer sum, for inputs 0 to 15 (half 0) or 16 to 31 (half 1) of the group, and for feature g
// (side 0) or g + 8 (side 1). If unpacking leaves the quants multiplied by a power of two, `scale` is divided by it, which is
// exact. `minimum` is the factor of the scaled sum of the inputs.

// 4-bit quants: inputs 4t … in the low nibbles and inputs 4t + 16 … in the high nibbles of word 2 * group + side.
struct Nibbles {
    uint32_t words[4];

    // The nibbles as numbers from 0 to 15.
    DEVICE void unsigned_fragment(uint32_t group, uint32_t (&a)[4]) const {
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t word = words[2 * group + side];
            a[side] = word & 0x0f0f0f0fu;
            a[2 + side] = word >> 4 & 0x0f0f0f0fu;
        }
    }
    // The nibbles as signed numbers (two's complement), times 16.
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
    static constexpr uint32_t PAIR_BYTES = 512 + 64, FACTOR_BYTES = 0;
    Nibbles quants;
    Bytes8 scales;  // f16: side 0 in x, side 1 in y; group 0 low, group 1 high

    template <From FROM>
    DEVICE void load(const uint8_t* pair, const uint8_t*, uint32_t of_lane) {
        load_words<FROM>(pair + of_lane * 16, quants.words);
        scales = *reinterpret_cast<const Bytes8*>(pair + 512 + of_lane / 4 * 8);
    }
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const { quants.signed_fragment(group, a); }
    DEVICE float scale(uint32_t group, uint32_t, uint32_t side) const {
        return half_of(side ? scales.y : scales.x, group) * 0.0625f;
    }
    DEVICE float minimum(uint32_t, uint32_t) const { return 0.0f; }
};

struct Q4_1 {
    static constexpr bool HALVES = false, MINIMUM = true;
    static constexpr uint32_t PAIR_BYTES = 512 + 128, FACTOR_BYTES = 0;
    Nibbles quants;
    Bytes16 scales;  // x and y as above, then the minimums in z and w

    template <From FROM>
    DEVICE void load(const uint8_t* pair, const uint8_t*, uint32_t of_lane) {
        load_words<FROM>(pair + of_lane * 16, quants.words);
        scales = *reinterpret_cast<const Bytes16*>(pair + 512 + of_lane / 4 * 16);
    }
    DEVICE void fragment(uint32_t group, uint32_t (&a)[4]) const { quants.unsigned_fragment(group, a); }
    DEVICE float scale(uint32_t group, uint32_t, uint32_t side) const {
        return half_of(side ? scales.y : scales.x, group);
    }
    DEVICE float minimum(uint32_t group, uint32_t side) const { return half_of(side ? scales.w : scales.z, group); }
};

struct Q8_0 {
    static constexpr bool HALVES = false, MINIMUM = false;
    static constexpr uint32_t PAIR_BYTES = 1024 + 64, FACTOR_BYTES = 0;
    uint32_t quants[8];  // for each group: inputs 4t … of both sides, then inputs 4t + 16 …
    Bytes8 scales;

    template <From FROM>
    DEVICE void load(const uint8_t* pair, const uint8_t*, uint32_t of_lane) {
        load_words<FROM>(pair + of_lane * 16, quants);
        load_words<FROM>(pair + 512 + of_lane * 16, quants + 4);
        scales = *reinterpret_cast<const Bytes8*>(pair + 1024 + of_lane / 4 * 8);
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

// Four pairs form a block of 256 inputs. The features' factors follow the block.
struct Q4K {
    static constexpr bool HALVES = false, MINIMUM = true;
    static constexpr uint32_t PAIR_BYTES = 512 + 64, FACTOR_BYTES = 64;
    Nibbles quants;
    uint32_t steps[2];    // for each side four bytes: the scales of both groups, then the minimums of both
    uint32_t factors[2];  // for each side: f16 factor of the scales, f16 factor of the minimums

    template <From FROM>
    DEVICE void load(const uint8_t* pair, const uint8_t* behind, uint32_t of_lane) {
        load_words<FROM>(pair + of_lane * 16, quants.words);
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t feature = of_lane / 4 + 8 * side;
            steps[side] = word_at(pair + 512 + feature * 4);
            factors[side] = word_at(behind + feature * 4);
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
    static constexpr uint32_t PAIR_BYTES = 512 + 256 + 64, FACTOR_BYTES = 32;
    Nibbles low;
    Bytes8 high;        // one word for each group: the high bits of (side, half) are bits 2 * (2 * side + half) and the next
    uint32_t steps[2];  // for each side four bytes, each plus 128: halves 0 and 1 of group 0, halves 0 and 1 of group 1
    f16 factors[2];

    template <From FROM>
    DEVICE void load(const uint8_t* pair, const uint8_t* behind, uint32_t of_lane) {
        load_words<FROM>(pair + of_lane * 16, low.words);
        high = *reinterpret_cast<const Bytes8*>(pair + 512 + of_lane * 8);
        UNROLL
        for (uint32_t side = 0; side < 2; side++) {
            uint32_t feature = of_lane / 4 + 8 * side;
            steps[side] = word_at(pair + 768 + feature * 4);
            factors[side] = *reinterpret_cast<const f16*>(behind + feature * 2);
        }
    }
    // The quants as signed 6-bit numbers (two's complement), times 4.
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

// The offset of a pair in its tile.
template <typename Format>
DEVICE size_t pair_offset(uint32_t pair) {
    return size_t(pair) * Format::PAIR_BYTES + pair / 4 * Format::FACTOR_BYTES;
}
// The offset of a pair's factors in its tile.
template <typename Format>
DEVICE size_t factors_offset(uint32_t pair) {
    return pair_offset<Format>(pair / 4 * 4) + 4 * Format::PAIR_BYTES;
}
template <typename Format>
DEVICE void load_pair(Format& weights, const uint8_t* tile, uint32_t pair, uint32_t of_lane) {
    weights.template load<From::GLOBAL>(tile + pair_offset<Format>(pair), tile + factors_offset<Format>(pair), of_lane);
}

// ---- products

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
// The numbers of gpu::Element.
constexpr uint32_t ELEMENT_F32 = 0, ELEMENT_F16 = 1;

// A lane's part of one pair of groups of eight rows: the quants of row g, and the factors of rows 2t and 2t + 1.
template <bool MINIMUM>
struct Columns {
    Bytes16 quants;
    float scales[4], sums[4];
};

// Adds one group's products to a tile of sums.
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

// Adds the products of one pair of groups, of one tile of features by one tile of rows.
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

// Writes one sum. If `add` is set, the previous value is added first; then the bias, if there is one.
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
