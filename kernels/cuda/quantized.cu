// Quantization of activations, products of few rows with quantized weights, and embeddings. quantized.cuh describes the
// arithmetic; products of many rows are in quantized_wide.cu.
//
// Products of few rows are bound by the bandwidth for the weights, so each warp reads its fragments straight into registers,
// several pairs ahead, and the inputs are split over the warps of a block.
#include "quantized.cuh"

constexpr uint32_t THREADS = SPANS * WARP;

// ---- activations

struct QuantizeParams {
    const void* x;  // [rows, cols]
    QuantizedTarget out;
    uint32_t rows, cols;
};

// One warp for each tile and pair, and four lanes for each row.
template <typename T>
DEVICE void quantize_rows(const QuantizeParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t pair = blockIdx.x * SPANS + warp(), tile = blockIdx.y;
    if (pair >= p.out.pairs) return;
    uint32_t t = lane() % 4, row = tile * TILE_ROWS + lane() / 4;
    bool valid = row < p.rows;
    const T* from = static_cast<const T*>(p.x) + size_t(valid ? row : 0) * p.cols;
    Group<2> groups[2];
    UNROLL
    for (uint32_t i = 0; i < 2; i++) {
        uint32_t at = (2 * pair + i) * GROUP;
        float x[8] = {};
        if (valid && at < p.cols) {
            float low[4], high[4];
            load4(from + at + 4 * t, low);
            load4(from + at + 4 * t + 16, high);
            UNROLL
            for (uint32_t k = 0; k < 4; k++) x[k] = low[k], x[k + 4] = high[k];
        }
        groups[i] = quantize_group<2>(x);
    }
    if (!valid) return;
    *reinterpret_cast<Bytes16*>(p.out.quants + lane_index(p.out, pair, tile, lane()) * 16) =
        Bytes16{groups[0].words[0], groups[0].words[1], groups[1].words[0], groups[1].words[1]};
    if (t < 2) put_factors(p.out, row, 2 * pair + t, t ? groups[1].scale : groups[0].scale, t ? groups[1].sum : groups[0].sum);
}

KERNEL(quantize_rows_f32, QuantizeParams, THREADS) { quantize_rows<float>(p); }
KERNEL(quantize_rows_f16, QuantizeParams, THREADS) { quantize_rows<f16>(p); }
KERNEL(quantize_rows_bf16, QuantizeParams, THREADS) { quantize_rows<bf16>(p); }

// ---- products of few rows

// Loads a pair of groups of the rows from `first` on; `index` is its index over pairs and tiles. Rows that do not exist are not
// read: with a single row, they would take most of the bandwidth.
template <bool MINIMUM>
DEVICE void load_columns(Columns<MINIMUM>& columns, const QuantizedProductParams& p, uint32_t first, size_t index) {
    uint32_t g = lane() / 4, t = lane() % 4;
    columns.quants = Bytes16{0, 0, 0, 0};
    UNROLL
    for (uint32_t i = 0; i < 4; i++) columns.scales[i] = 0.0f, columns.sums[i] = 0.0f;
    if (first + g < p.rows) {
        columns.quants = *reinterpret_cast<const Bytes16*>(p.quants + (index * WARP + lane()) * 16);
    }
    if (first + 2 * t < p.rows) {
        load4(p.scales + (index * 4 + t) * 4, columns.scales);
        if (MINIMUM) load4(p.sums + (index * 4 + t) * 4, columns.sums);
    }
}

// A block computes a tile of features by R tiles of rows. Each warp sums one run of the inputs, with DEPTH pairs of weights in
// flight. Weights may be read before the previous kernel has ended.
template <typename Format, uint32_t R, uint32_t DEPTH>
DEVICE void multiply_quantized(const QuantizedProductParams& p) {
    constexpr uint32_t ROWS = R * TILE_ROWS;
    // Rows are padded by four floats, so that the lanes of a warp access different banks.
    constexpr uint32_t STRIDE = TILE_FEATURES + 4;
    SHARED(float, partial, [SPANS * ROWS * STRIDE]);
    grid_dependency_launch();
    uint32_t span = (p.pairs + SPANS - 1) / SPANS;
    uint32_t begin = warp() * span, end = begin + span < p.pairs ? begin + span : p.pairs;
    const uint8_t* tile = p.weights + blockIdx.x * pair_offset<Format>(p.pairs);
    Format ahead[DEPTH];
    UNROLL
    for (uint32_t d = 0; d < DEPTH; d++) {
        if (begin + d < end) load_pair(ahead[d], tile, begin + d, lane());
    }
    grid_dependency_wait();
    uint32_t row_tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS;
    float sums[R][4] = {};
    for (uint32_t pair = begin; pair < end; pair++) {
        Format weights = ahead[0];
        UNROLL
        for (uint32_t d = 0; d + 1 < DEPTH; d++) ahead[d] = ahead[d + 1];
        if (pair + DEPTH < end) load_pair(ahead[DEPTH - 1], tile, pair + DEPTH, lane());
        UNROLL
        for (uint32_t r = 0; r < R; r++) {
            uint32_t row_tile = blockIdx.y * R + r;
            Columns<Format::MINIMUM> columns;
            load_columns(columns, p, row_tile * TILE_ROWS, size_t(pair) * row_tiles + row_tile);
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

// Kernels by the number of rows of a block. All compute the same result for a row.
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

// Rows of the table as f32. A token that is not in the table gives a row of NaN, which reaches the logits.
template <typename Format>
DEVICE void embed_quantized(const QuantizedEmbedParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t token = p.tokens[blockIdx.x];
    bool known = token < p.vocab;
    uint32_t feature = known ? token : 0, side = feature % TILE_FEATURES / 8;
    const uint8_t* tile = p.weights + feature / TILE_FEATURES * pair_offset<Format>(p.pairs);
    float* out = p.hidden + size_t(blockIdx.x) * p.cols;
    // Four threads process each pair of groups, with eight values of each group per thread.
    for (uint32_t i = threadIdx.x; i < p.pairs * 4; i += THREADS) {
        uint32_t pair = i / 4, t = i % 4;
        Format weights;
        load_pair(weights, tile, pair, feature % 8 * 4 + t);
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
