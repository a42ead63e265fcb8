// Quantization of activation rows to eight bits, for the products with quantized weights. For each group of 32 inputs,
// scale = max|x| / 127 and q = round(x * (127 / max|x|)), rounded as in the CPU kernels (kernels/src/rows.rs).
//
// Rows are stored in tiles of eight, and inputs in pairs of groups. For each pair and tile, lane 4g + t of the matrix
// instruction has four words: for each group, inputs 4t … 4t + 3 and 4t + 16 … 4t + 19 of row g. If the number of groups is
// odd, the last group is paired with zeros.
#pragma once

#include "elements.cuh"

constexpr uint32_t GROUP = 32;
constexpr uint32_t TILE_ROWS = 8;
// If all values of a group are at most this large, they become zero, as on the CPU.
constexpr float NEGLIGIBLE_GROUP = 1e-30f;

struct QuantizedTarget {
    uint8_t* quants;  // [pairs, tiles of 8 rows, 32 lanes, 16 bytes]
    float* scales;    // [pairs, tiles, 4, 2 groups, 2 rows]: rows 2t and 2t + 1
    float* sums;      // the same: scale * sum of the group's quants
    uint32_t tiles, pairs;
};

// A lane's share of a group: 4 * WORDS inputs.
template <uint32_t WORDS>
struct Group {
    uint32_t words[WORDS];
    float scale, sum;
};

// Quantizes a group that is held by 8 / WORDS adjacent lanes. Whole warps must call it. A value that is not finite makes the
// scale NaN, which reaches the logits.
template <uint32_t WORDS>
DEVICE Group<WORDS> quantize_group(const float (&x)[4 * WORDS]) {
    uint32_t largest = 0;
    UNROLL
    for (uint32_t i = 0; i < 4 * WORDS; i++) {
        uint32_t bits = float_as_uint(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    UNROLL
    for (uint32_t offset = 1; offset < 8 / WORDS; offset *= 2) {
        uint32_t other = shuffle_xor(largest, offset);
        largest = other > largest ? other : largest;
    }
    bool finite = largest < 0x7f800000u;
    float max = uint_as_float(largest);
    float inverse = finite && max > NEGLIGIBLE_GROUP ? divide(127.0f, max) : 0.0f;
    Group<WORDS> group = {};
    group.scale = finite ? divide(max, 127.0f) : uint_as_float(0x7fffffff);
    int32_t sum = 0;
    UNROLL
    for (uint32_t i = 0; i < 4 * WORDS; i++) {
        int32_t quant = finite ? int32_t(round_even(x[i] * inverse)) : 0;
        group.words[i / 4] |= (uint32_t(quant) & 0xff) << (8 * (i % 4));
        sum += quant;
    }
    UNROLL
    for (uint32_t offset = 1; offset < 8 / WORDS; offset *= 2) sum += shuffle_xor(sum, offset);
    group.sum = group.scale * float(sum);
    return group;
}

// The index of a lane's 16 bytes for a pair and a tile.
DEVICE size_t lane_index(const QuantizedTarget& to, uint32_t pair, uint32_t tile, uint32_t of_lane) {
    return (size_t(pair) * to.tiles + tile) * WARP + of_lane;
}

// Writes a group's scale and sum for `row`.
DEVICE void put_factors(const QuantizedTarget& to, uint32_t row, uint32_t group, float scale, float sum) {
    uint32_t g = row % TILE_ROWS;
    size_t at = lane_index(to, group / 2, row / TILE_ROWS, 0) / 2 + g / 2 * 4 + group % 2 * 2 + g % 2;
    to.scales[at] = scale;
    to.sums[at] = sum;
}

// Writes WORDS consecutive words of `row`, from input `first` on. Does nothing beyond the last pair.
template <uint32_t WORDS>
DEVICE void put_group(const QuantizedTarget& to, uint32_t row, uint32_t first, const Group<WORDS>& part) {
    uint32_t group = first / GROUP, g = row % TILE_ROWS;
    if (group / 2 >= to.pairs) return;
    UNROLL
    for (uint32_t i = 0; i < WORDS; i++) {
        uint32_t word = first % GROUP / 4 + i;
        size_t lane_at = lane_index(to, group / 2, row / TILE_ROWS, g * 4 + word % 4);
        *reinterpret_cast<uint32_t*>(to.quants + lane_at * 16 + group % 2 * 8 + word / 4 * 4) = part.words[i];
    }
    if (first % GROUP == 0) put_factors(to, row, group, part.scale, part.sum);
}
