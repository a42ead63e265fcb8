// Products of many rows with quantized weights, for prefill. They are bound by arithmetic, so a block stages a tile of 128
// features by 64 rows in shared memory, of which each warp computes 32 by 32. quantized.cuh describes the arithmetic.
#include "quantized.cuh"

constexpr uint32_t THREADS = 256;
// The tiles of a block, and of each of its warps, which are arranged four by two.
constexpr uint32_t FEATURE_TILES = 8, ROW_TILES = 8;
constexpr uint32_t WARP_FEATURE_TILES = 2, WARP_ROW_TILES = 4;
static_assert(THREADS == ROW_TILES * WARP, "a warp copies a tile of rows");
// Pairs of groups in shared memory: one that is read, and two in flight.
constexpr uint32_t STAGES = 3;

// The layout of one pair of groups in shared memory, in units of 16 bytes.
template <typename Format>
struct Stage {
    static constexpr uint32_t PAIR = Format::PAIR_BYTES / 16, WEIGHTS = PAIR + Format::FACTOR_BYTES / 16;
    static constexpr uint32_t QUANTS_AT = FEATURE_TILES * WEIGHTS;
    static constexpr uint32_t SCALES_AT = QUANTS_AT + ROW_TILES * WARP, SCALES = ROW_TILES * 4;
    static constexpr uint32_t SUMS_AT = SCALES_AT + SCALES;
    static constexpr uint32_t UNITS = SUMS_AT + (Format::MINIMUM ? SCALES : 0);
};

// What a thread copies of every pair: offsets into the block's part of the operands, which are the same for all pairs. In place
// of tiles beyond the end, the last tile is copied again; the results are not written.
template <typename Format>
struct Copies {
    using S = Stage<Format>;
    static constexpr uint32_t UNITS = FEATURE_TILES * S::WEIGHTS, EACH = (UNITS + THREADS - 1) / THREADS;
    const uint8_t* weights;  // the block's first tile
    uint32_t units[EACH];    // byte offsets from there, for the first pair
    bool factors[EACH];
    uint32_t row_tiles, row_tile;

    DEVICE explicit Copies(const QuantizedProductParams& p) {
        uint32_t first = blockIdx.x * FEATURE_TILES, tiles = (p.features + TILE_FEATURES - 1) / TILE_FEATURES;
        weights = p.weights + first * pair_offset<Format>(p.pairs);
        UNROLL
        for (uint32_t i = 0; i < EACH; i++) {
            uint32_t at = threadIdx.x + i * THREADS, tile = at / S::WEIGHTS, unit = at % S::WEIGHTS;
            if (first + tile >= tiles) tile = tiles - 1 - first;
            factors[i] = unit >= S::PAIR;
            units[i] = tile * uint32_t(pair_offset<Format>(p.pairs)) + (factors[i] ? unit - S::PAIR : unit) * 16;
        }
        row_tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
        row_tile = blockIdx.y * ROW_TILES + warp();
        if (row_tile >= row_tiles) row_tile = row_tiles - 1;
    }

    // Starts the copies of one pair.
    DEVICE void start(Bytes16* stage, const QuantizedProductParams& p, uint32_t pair) const {
        const uint8_t* from = weights + pair_offset<Format>(pair);
        uint32_t to_factors = (4 - pair % 4) * Format::PAIR_BYTES;
        UNROLL
        for (uint32_t i = 0; i < EACH; i++) {
            uint32_t at = threadIdx.x + i * THREADS;
            if (at < UNITS) async_copy_16(stage + at, from + units[i] + (factors[i] ? to_factors : 0), true);
        }
        // The row tiles of a pair are contiguous, and each is copied by one warp.
        size_t index = size_t(pair) * row_tiles + row_tile;
        async_copy_16(stage + S::QUANTS_AT + threadIdx.x, p.quants + (index * WARP + lane()) * 16, true);
        if (lane() < 4) {
            async_copy_16(stage + S::SCALES_AT + warp() * 4 + lane(), p.scales + (index * 4 + lane()) * 4, true);
            if (Format::MINIMUM) {
                async_copy_16(stage + S::SUMS_AT + warp() * 4 + lane(), p.sums + (index * 4 + lane()) * 4, true);
            }
        }
    }
};

// Adds the warp's products of the pair in `stage`.
template <typename Format>
DEVICE void add_staged(float (&sums)[WARP_FEATURE_TILES][WARP_ROW_TILES][4], const Bytes16* stage) {
    using S = Stage<Format>;
    uint32_t first_feature = warp() / 2 * WARP_FEATURE_TILES, first_row = warp() % 2 * WARP_ROW_TILES, t = lane() % 4;
    Format weights[WARP_FEATURE_TILES];
    UNROLL
    for (uint32_t f = 0; f < WARP_FEATURE_TILES; f++) {
        const Bytes16* from = stage + (first_feature + f) * S::WEIGHTS;
        weights[f].template load<From::SHARED>(reinterpret_cast<const uint8_t*>(from),
                                               reinterpret_cast<const uint8_t*>(from + S::PAIR), lane());
    }
    UNROLL
    for (uint32_t r = 0; r < WARP_ROW_TILES; r++) {
        Columns<Format::MINIMUM> columns;
        columns.quants = stage[S::QUANTS_AT + (first_row + r) * WARP + lane()];
        load4(reinterpret_cast<const float*>(stage + S::SCALES_AT + (first_row + r) * 4 + t), columns.scales);
        if (Format::MINIMUM) {
            load4(reinterpret_cast<const float*>(stage + S::SUMS_AT + (first_row + r) * 4 + t), columns.sums);
        }
        UNROLL
        for (uint32_t f = 0; f < WARP_FEATURE_TILES; f++) add_pair(sums[f][r], weights[f], columns);
    }
}

template <typename Format>
DEVICE void multiply_wide(const QuantizedProductParams& p) {
    SHARED(Bytes16, stages, [STAGES * Stage<Format>::UNITS]);
    grid_dependency_launch();
    grid_dependency_wait();
    const Copies<Format> copies(p);
    UNROLL
    for (uint32_t pair = 0; pair < STAGES - 1; pair++) {
        if (pair < p.pairs) copies.start(stages + pair * Stage<Format>::UNITS, p, pair);
        async_copy_commit();
    }
    uint32_t span = (p.pairs + SPANS - 1) / SPANS, left = span;
    float totals[WARP_FEATURE_TILES][WARP_ROW_TILES][4] = {}, sums[WARP_FEATURE_TILES][WARP_ROW_TILES][4] = {};
    for (uint32_t pair = 0; pair < p.pairs; pair++) {
        async_copy_wait<STAGES - 2>();
        // After the barrier, this pair has arrived completely, and no thread reads the previous pair, which the next copy
        // overwrites.
        block_barrier();
        uint32_t next = pair + STAGES - 1;
        if (next < p.pairs) copies.start(stages + next % STAGES * Stage<Format>::UNITS, p, next);
        async_copy_commit();
        add_staged<Format>(sums, stages + pair % STAGES * Stage<Format>::UNITS);
        left -= 1;
        if (left == 0 || pair + 1 == p.pairs) {
            left = span;
            UNROLL
            for (uint32_t i = 0; i < WARP_FEATURE_TILES * WARP_ROW_TILES * 4; i++) {
                uint32_t f = i / 4 / WARP_ROW_TILES, r = i / 4 % WARP_ROW_TILES;
                totals[f][r][i % 4] = totals[f][r][i % 4] + sums[f][r][i % 4];
                sums[f][r][i % 4] = 0.0f;
            }
        }
    }
    UNROLL
    for (uint32_t i = 0; i < WARP_FEATURE_TILES * WARP_ROW_TILES * 4; i++) {
        uint32_t f = i / 4 / WARP_ROW_TILES, r = i / 4 % WARP_ROW_TILES;
        uint32_t feature_tile = blockIdx.x * FEATURE_TILES + warp() / 2 * WARP_FEATURE_TILES + f;
        uint32_t row_tile = blockIdx.y * ROW_TILES + warp() % 2 * WARP_ROW_TILES + r;
        uint32_t feature = feature_tile * TILE_FEATURES + lane() / 4 + i % 4 / 2 * 8;
        uint32_t row = row_tile * TILE_ROWS + lane() % 4 * 2 + i % 2;
        if (row < p.rows && feature < p.features) put(p, row, feature, totals[f][r][i % 4]);
    }
}

KERNEL_OCCUPANCY(multiply_q4_0_wide, QuantizedProductParams, THREADS, 2) { multiply_wide<Q4_0>(p); }
KERNEL_OCCUPANCY(multiply_q4_1_wide, QuantizedProductParams, THREADS, 2) { multiply_wide<Q4_1>(p); }
KERNEL_OCCUPANCY(multiply_q8_0_wide, QuantizedProductParams, THREADS, 2) { multiply_wide<Q8_0>(p); }
KERNEL_OCCUPANCY(multiply_q4k_wide, QuantizedProductParams, THREADS, 2) { multiply_wide<Q4K>(p); }
KERNEL_OCCUPANCY(multiply_q6k_wide, QuantizedProductParams, THREADS, 2) { multiply_wide<Q6K>(p); }
