// RMSNorm of rows of the residual stream, in each of the forms that the products read. The CPU kernel is in
// kernels/src/rows.rs.
//
// A row's arithmetic depends only on its length: each thread adds its squares to four sums, which the prelude's trees add up.
#include "quantize.cuh"
#include "rows.cuh"

struct RmsNormParams {
    const float* hidden;      // [rows, cols]
    const float* weight;      // [cols]
    const uint32_t* sources;  // [gridDim.x]: the row of `hidden` for each output row, or null for the same row;
                              // may be any number for a bucket's unused rows
    void* out;                // [gridDim.x, cols]
    float* scales;            // [gridDim.x], only for fp8
    uint32_t cols, rows;
    float epsilon;
};

// The number of vectors of four that a thread keeps in registers between the passes over a row: 8192 columns in total. The
// rest of a longer row is read again.
constexpr uint32_t HELD = 8;
constexpr uint32_t STRIDE = ROW_THREADS * 4;

// One thread's part of a row.
struct NormRow {
    float x[HELD][4], weight[HELD][4];
    const float* row;
    const float* weights;
    uint32_t cols;
    float inverse;

    // Reads the weights, which may be read before the previous kernel has ended; then reads the row and sums its squares over
    // the block.
    DEVICE void load(const RmsNormParams& p, float (&scratch)[ROW_WARPS]) {
        grid_dependency_launch();
        load_weights(p);
        grid_dependency_wait();
        load_row(p, scratch);
    }

    DEVICE void load_weights(const RmsNormParams& p) {
        weights = p.weight;
        cols = p.cols;
        UNROLL
        for (uint32_t v = 0; v < HELD; v++) {
            uint32_t at = v * STRIDE + threadIdx.x * 4;
            if (at < cols) load4(weights + at, weight[v]);
        }
    }

    DEVICE void load_row(const RmsNormParams& p, float (&scratch)[ROW_WARPS]) {
        uint32_t source = p.sources ? p.sources[blockIdx.x] : blockIdx.x;
        if (source >= p.rows) source = 0;
        row = p.hidden + size_t(source) * cols;
        UNROLL
        for (uint32_t v = 0; v < HELD; v++) {
            uint32_t at = v * STRIDE + threadIdx.x * 4;
            if (at < cols) load4(row + at, x[v]);
        }
        float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        UNROLL
        for (uint32_t v = 0; v < HELD; v++) {
            if (v * STRIDE + threadIdx.x * 4 < cols) add_squares(x[v], squares);
        }
        for (uint32_t at = HELD * STRIDE + threadIdx.x * 4; at < cols; at += STRIDE) {
            float again[4];
            load4(row + at, again);
            add_squares(again, squares);
        }
        float sum = block_sum<ROW_WARPS>((squares[0] + squares[2]) + (squares[1] + squares[3]), scratch);
        inverse = divide(1.0f, sqrt_(divide(sum, float(cols)) + p.epsilon));
    }

    DEVICE static void add_squares(const float (&x)[4], float (&squares)[4]) {
        UNROLL
        for (uint32_t i = 0; i < 4; i++) squares[i] = fma_(x[i], x[i], squares[i]);
    }

    // Calls visit(column, values) for the thread's normalized vectors, x / sqrt(mean(x²) + epsilon) * weight. Whole warps call
    // `visit`: a lane beyond the end of the row gets zeros.
    template <typename Visit>
    DEVICE void each(Visit visit) const {
        uint32_t first = threadIdx.x * 4, of_warp = warp() * WARP * 4;
        UNROLL
        for (uint32_t v = 0; v < HELD; v++) {
            if (v * STRIDE + of_warp < cols) {
                float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (v * STRIDE + first < cols) normalize(x[v], weight[v], y);
                visit(v * STRIDE + first, y);
            }
        }
        for (uint32_t start = HELD * STRIDE; start + of_warp < cols; start += STRIDE) {
            float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (start + first < cols) {
                float again[4], w[4];
                load4(row + start + first, again);
                load4(weights + start + first, w);
                normalize(again, w, y);
            }
            visit(start + first, y);
        }
    }

    DEVICE void normalize(const float (&x)[4], const float (&w)[4], float (&y)[4]) const {
        UNROLL
        for (uint32_t i = 0; i < 4; i++) y[i] = x[i] * inverse * w[i];
    }
};

template <typename T>
DEVICE void rms_norm(const RmsNormParams& p) {
    SHARED(float, sums, [ROW_WARPS]);
    NormRow row;
    row.load(p, sums);
    T* out = static_cast<T*>(p.out) + size_t(blockIdx.x) * p.cols;
    row.each([&](uint32_t at, const float (&y)[4]) {
        if (at < p.cols) store4(out + at, y);
    });
}

KERNEL(rms_norm_f32, RmsNormParams, ROW_THREADS) { rms_norm<float>(p); }
KERNEL(rms_norm_f16, RmsNormParams, ROW_THREADS) { rms_norm<f16>(p); }
KERNEL(rms_norm_bf16, RmsNormParams, ROW_THREADS) { rms_norm<bf16>(p); }

// The FP8 form, with a scale for each row.
KERNEL(rms_norm_fp8, RmsNormParams, ROW_THREADS) {
    SHARED(float, sums, [ROW_WARPS]);
    SHARED(uint32_t, maxima, [ROW_WARPS]);
    NormRow row;
    row.load(p, sums);
    uint32_t largest = 0;
    row.each([&](uint32_t, const float (&y)[4]) {
        UNROLL
        for (uint32_t i = 0; i < 4; i++) largest = absolute_bits(y[i]) > largest ? absolute_bits(y[i]) : largest;
    });
    Fp8Scale scale = fp8_scale(block_max(largest, maxima));
    if (threadIdx.x == 0) p.scales[blockIdx.x] = scale.scale;
    fp8* out = static_cast<fp8*>(p.out) + size_t(blockIdx.x) * p.cols;
    row.each([&](uint32_t at, const float (&y)[4]) {
        float scaled[4];
        UNROLL
        for (uint32_t i = 0; i < 4; i++) scaled[i] = y[i] * scale.inverse;
        if (at < p.cols) store4(out + at, scaled);
    });
}

// The form quantized to eight bits, for products with quantized weights. It has the same bits as quantizing the f32 form. Eight
// lanes share a group.
struct RmsNormQuantizedParams {
    RmsNormParams norm;  // its `out` and `scales` are not used
    QuantizedTarget out;
};

KERNEL(rms_norm_quantized, RmsNormQuantizedParams, ROW_THREADS) {
    SHARED(float, sums, [ROW_WARPS]);
    grid_dependency_launch();
    NormRow row;
    row.load_weights(p.norm);
    grid_dependency_wait();
    row.load(p.norm, sums);
    row.each([&](uint32_t at, const float (&y)[4]) {
        Group<1> group = quantize_group<1>(y);
        put_group(p.out, blockIdx.x, at, group);
    });
}
