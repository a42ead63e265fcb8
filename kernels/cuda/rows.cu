// Operations on activation rows, each row for itself: embedding, RMSNorm, gated activations, conversions. The CPU's are in
// kernels/src/rows.rs. Rows have a multiple of eight elements and no gaps, so that every access is 16 (or 8) bytes wide.
//
// A row's arithmetic depends on its length alone: one block takes a row, thread t the vectors t, t + 256, …, and sums go
// through the prelude's trees.
#include "elements.cuh"

constexpr uint32_t ROW_THREADS = 256;
constexpr uint32_t ROW_WARPS = ROW_THREADS / WARP;

// ---- embedding

struct EmbedParams {
    const void* table;       // [vocab, cols]
    const uint32_t* tokens;  // [gridDim.x]
    float* hidden;           // [gridDim.x, cols]
    uint32_t vocab, cols;
};

// A token that is no row of the table gives a row of NaN, which reaches the logits.
template <typename T>
DEVICE void embed(const EmbedParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t token = p.tokens[blockIdx.x];
    float* out = p.hidden + size_t(blockIdx.x) * p.cols;
    const T* row = static_cast<const T*>(p.table) + size_t(token < p.vocab ? token : 0) * p.cols;
    for (uint32_t at = threadIdx.x * 4; at < p.cols; at += ROW_THREADS * 4) {
        float x[4];
        load4(row + at, x);
        if (token >= p.vocab) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) x[i] = uint_as_float(0x7fffffff);
        }
        store4(out + at, x);
    }
}

KERNEL(embed_f32, EmbedParams, ROW_THREADS) { embed<float>(p); }
KERNEL(embed_f16, EmbedParams, ROW_THREADS) { embed<f16>(p); }
KERNEL(embed_bf16, EmbedParams, ROW_THREADS) { embed<bf16>(p); }

// Tokens that the previous step sampled on the device, for the rows that wait for one.
struct NextTokensParams {
    const uint32_t* sampled;
    const uint32_t* sources;  // [rows]: which of `sampled`; one beyond them leaves the row's token as it is
    uint32_t* tokens;         // [rows]
    uint32_t rows, num_sampled;
};

KERNEL(next_tokens, NextTokensParams, ROW_THREADS) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t row = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (row >= p.rows) return;
    uint32_t source = p.sources[row];
    if (source < p.num_sampled) p.tokens[row] = p.sampled[source];
}

// ---- RMSNorm

struct RmsNormParams {
    const float* hidden;      // [rows, cols]
    const float* weight;      // [cols]
    const uint32_t* sources;  // [gridDim.x]: the row of `hidden` behind each output row; null for the same;
                              // of a bucket's unused rows it may be any number
    void* out;                // [gridDim.x, cols]
    float* scales;            // [gridDim.x], only for fp8
    uint32_t cols, rows;
    float epsilon;
};

// Vectors of four that a thread keeps in registers between the passes over a row, 8192 columns in all. The rest of a longer
// row is read again.
constexpr uint32_t HELD = 8;
// FP8's largest number.
constexpr float FP8_MAX = 448.0f;
// A row whose values are all at most this large counts as zero; its inverse scale would overflow.
constexpr float NEGLIGIBLE = 1e-30f;

struct Fp8Scale {
    // What a value is multiplied by, and what its fp8 form is multiplied by to get it back. The latter is NaN when the row
    // has a value that is not finite.
    float inverse, scale;
};

// For a row whose largest absolute value has these bits. Bits of absolute values order as the values do, and NaN last.
DEVICE Fp8Scale fp8_scale(uint32_t largest) {
    if (largest >= 0x7f800000u) return Fp8Scale{0.0f, uint_as_float(0x7fffffff)};
    float max = uint_as_float(largest);
    return Fp8Scale{max > NEGLIGIBLE ? divide(FP8_MAX, max) : 0.0f, divide(max, FP8_MAX)};
}

DEVICE uint32_t absolute_bits(float x) { return float_as_uint(x) & 0x7fffffffu; }

DEVICE uint32_t block_max(uint32_t x, uint32_t (&scratch)[ROW_WARPS]) {
    for (uint32_t offset = 16; offset > 0; offset /= 2) {
        uint32_t other = shuffle_xor(x, offset);
        x = x > other ? x : other;
    }
    if (lane() == 0) scratch[warp()] = x;
    block_barrier();
    for (uint32_t i = 0; i < ROW_WARPS; i++) x = x > scratch[i] ? x : scratch[i];
    return x;
}

// x / sqrt(mean(x²) + epsilon) * weight
DEVICE void normalize(const float (&x)[4], float inverse, const float (&weight)[4], float (&y)[4]) {
    UNROLL
    for (uint32_t i = 0; i < 4; i++) y[i] = x[i] * inverse * weight[i];
}

DEVICE void largest_of(const float (&x)[4], uint32_t& largest) {
    UNROLL
    for (uint32_t i = 0; i < 4; i++) largest = absolute_bits(x[i]) > largest ? absolute_bits(x[i]) : largest;
}

DEVICE void scale_by(float factor, float (&x)[4]) {
    UNROLL
    for (uint32_t i = 0; i < 4; i++) x[i] = x[i] * factor;
}

// One row: its sum of squares, then its values; for fp8 its largest value in between.
template <typename T, bool FP8>
DEVICE void rms_norm(const RmsNormParams& p) {
    SHARED(float, sums, [ROW_WARPS]);
    SHARED(uint32_t, maxima, [ROW_WARPS]);
    constexpr uint32_t STRIDE = ROW_THREADS * 4;
    grid_dependency_launch();
    float weight[HELD][4], x[HELD][4];
    UNROLL
    for (uint32_t v = 0; v < HELD; v++) {
        uint32_t at = v * STRIDE + threadIdx.x * 4;
        if (at < p.cols) load4(p.weight + at, weight[v]);
    }
    grid_dependency_wait();
    uint32_t source = p.sources ? p.sources[blockIdx.x] : blockIdx.x;
    if (source >= p.rows) source = 0;
    const float* row = p.hidden + size_t(source) * p.cols;
    T* out = static_cast<T*>(p.out) + size_t(blockIdx.x) * p.cols;
    UNROLL
    for (uint32_t v = 0; v < HELD; v++) {
        uint32_t at = v * STRIDE + threadIdx.x * 4;
        if (at < p.cols) load4(row + at, x[v]);
    }
    float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL
    for (uint32_t v = 0; v < HELD; v++) {
        if (v * STRIDE + threadIdx.x * 4 < p.cols) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) squares[i] = fma_(x[v][i], x[v][i], squares[i]);
        }
    }
    for (uint32_t at = HELD * STRIDE + threadIdx.x * 4; at < p.cols; at += STRIDE) {
        float y[4];
        load4(row + at, y);
        UNROLL
        for (uint32_t i = 0; i < 4; i++) squares[i] = fma_(y[i], y[i], squares[i]);
    }
    float sum = block_sum<ROW_WARPS>((squares[0] + squares[2]) + (squares[1] + squares[3]), sums);
    float inverse = divide(1.0f, sqrt_(divide(sum, float(p.cols)) + p.epsilon));
    Fp8Scale fp8{1.0f, 1.0f};
    if (FP8) {
        uint32_t largest = 0;
        UNROLL
        for (uint32_t v = 0; v < HELD; v++) {
            if (v * STRIDE + threadIdx.x * 4 < p.cols) {
                float y[4];
                normalize(x[v], inverse, weight[v], y);
                largest_of(y, largest);
            }
        }
        for (uint32_t at = HELD * STRIDE + threadIdx.x * 4; at < p.cols; at += STRIDE) {
            float z[4], w[4], y[4];
            load4(row + at, z);
            load4(p.weight + at, w);
            normalize(z, inverse, w, y);
            largest_of(y, largest);
        }
        fp8 = fp8_scale(block_max(largest, maxima));
        if (threadIdx.x == 0) p.scales[blockIdx.x] = fp8.scale;
    }
    UNROLL
    for (uint32_t v = 0; v < HELD; v++) {
        uint32_t at = v * STRIDE + threadIdx.x * 4;
        if (at < p.cols) {
            float y[4];
            normalize(x[v], inverse, weight[v], y);
            if (FP8) scale_by(fp8.inverse, y);
            store4(out + at, y);
        }
    }
    for (uint32_t at = HELD * STRIDE + threadIdx.x * 4; at < p.cols; at += STRIDE) {
        float z[4], w[4], y[4];
        load4(row + at, z);
        load4(p.weight + at, w);
        normalize(z, inverse, w, y);
        if (FP8) scale_by(fp8.inverse, y);
        store4(out + at, y);
    }
}

KERNEL(rms_norm_f32, RmsNormParams, ROW_THREADS) { rms_norm<float, false>(p); }
KERNEL(rms_norm_f16, RmsNormParams, ROW_THREADS) { rms_norm<f16, false>(p); }
KERNEL(rms_norm_bf16, RmsNormParams, ROW_THREADS) { rms_norm<bf16, false>(p); }
KERNEL(rms_norm_fp8, RmsNormParams, ROW_THREADS) { rms_norm<fp8, true>(p); }

// ---- gated activation

struct GatedParams {
    const void* gate_up;  // [gridDim.x, gate then up]
    void* out;            // [gridDim.x, width]
    uint32_t width, activation;
};
constexpr uint32_t GATED_THREADS = 128;
// Any other number is the gate with the error function.
constexpr uint32_t SILU = 0, GELU_TANH = 2;

// The error function to about 2e-7. Up to 1 an odd polynomial, beyond it 1 - e^(-x²) q(x): least-squares fits in Chebyshev
// nodes, of our own making. Beyond 4 it is 1 in f32.
DEVICE float error_function(float x) {
    float a = uint_as_float(absolute_bits(x));
    if (a <= 1.0f) {
        float s = x * x;
        float p = 7.882500358391553e-05f;
        p = fma_(p, s, -0.0008018859080038965f);
        p = fma_(p, s, 0.005189312621951103f);
        p = fma_(p, s, -0.02685432881116867f);
        p = fma_(p, s, 0.11283597350120544f);
        p = fma_(p, s, -0.3761262595653534f);
        p = fma_(p, s, 1.1283791065216064f);
        return x * p;
    }
    if (a >= 4.0f) return x > 0.0f ? 1.0f : -1.0f;
    float t = a - 2.0f;
    float q = -6.3862098613753915e-06f;
    q = fma_(q, t, 5.249597961665131e-05f);
    q = fma_(q, t, -0.0002060932747554034f);
    q = fma_(q, t, 0.0006153660942800343f);
    q = fma_(q, t, -0.0018202874343842268f);
    q = fma_(q, t, 0.005421091336756945f);
    q = fma_(q, t, -0.015461881645023823f);
    q = fma_(q, t, 0.041807737201452255f);
    q = fma_(q, t, -0.10679652541875839f);
    q = fma_(q, t, 0.25539547204971313f);
    float y = 1.0f - exact_exp(0.0f - a * a) * q;
    return x > 0.0f ? y : 0.0f - y;
}

// x / (1 + e^-y)
DEVICE float sigmoid_times(float x, float y) { return divide(x, 1.0f + exact_exp(0.0f - y)); }

DEVICE float activate(float x, uint32_t activation) {
    if (activation == SILU) return sigmoid_times(x, x);
    // tanh(y) = 2 sigmoid(2y) - 1, as on the CPU.
    if (activation == GELU_TANH) return sigmoid_times(x, 1.5957692f * fma_(0.044715f, x * x * x, x));
    return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752440f));
}

template <typename T>
DEVICE void gated_activation(const GatedParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t at = (blockIdx.y * GATED_THREADS + threadIdx.x) * 8;
    if (at >= p.width) return;
    const T* row = static_cast<const T*>(p.gate_up) + size_t(blockIdx.x) * 2 * p.width + at;
    float gate[8], up[8];
    load8(row, gate);
    load8(row + p.width, up);
    UNROLL
    for (uint32_t i = 0; i < 8; i++) gate[i] = activate(gate[i], p.activation) * up[i];
    store8(static_cast<T*>(p.out) + size_t(blockIdx.x) * p.width + at, gate);
}

KERNEL(gated_activation_f32, GatedParams, GATED_THREADS) { gated_activation<float>(p); }
KERNEL(gated_activation_f16, GatedParams, GATED_THREADS) { gated_activation<f16>(p); }
KERNEL(gated_activation_bf16, GatedParams, GATED_THREADS) { gated_activation<bf16>(p); }

// ---- conversions

struct ConvertParams {
    const float* x;
    void* out;
    uint64_t len;  // a multiple of 4
};

template <typename T>
DEVICE void convert(const ConvertParams& p) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint64_t at = (uint64_t(blockIdx.x) * ROW_THREADS + threadIdx.x) * 4;
    if (at >= p.len) return;
    float x[4];
    load4(p.x + at, x);
    store4(static_cast<T*>(p.out) + at, x);
}

KERNEL(convert_f32_f16, ConvertParams, ROW_THREADS) { convert<f16>(p); }
KERNEL(convert_f32_bf16, ConvertParams, ROW_THREADS) { convert<bf16>(p); }

struct QuantizeFp8Params {
    const void* x;  // [gridDim.x, cols]
    fp8* out;       // [gridDim.x, cols]
    float* scales;  // [gridDim.x]
    uint32_t cols;
};

// The second pass finds the row in the first-level cache: every thread reads again what it has read.
template <typename T>
DEVICE void quantize_fp8(const QuantizeFp8Params& p) {
    SHARED(uint32_t, maxima, [ROW_WARPS]);
    grid_dependency_launch();
    grid_dependency_wait();
    const T* row = static_cast<const T*>(p.x) + size_t(blockIdx.x) * p.cols;
    fp8* out = p.out + size_t(blockIdx.x) * p.cols;
    uint32_t largest = 0;
    for (uint32_t at = threadIdx.x * 8; at < p.cols; at += ROW_THREADS * 8) {
        float x[8];
        load8(row + at, x);
        UNROLL
        for (uint32_t i = 0; i < 8; i++) largest = absolute_bits(x[i]) > largest ? absolute_bits(x[i]) : largest;
    }
    Fp8Scale fp8 = fp8_scale(block_max(largest, maxima));
    if (threadIdx.x == 0) p.scales[blockIdx.x] = fp8.scale;
    for (uint32_t at = threadIdx.x * 8; at < p.cols; at += ROW_THREADS * 8) {
        float x[8];
        load8(row + at, x);
        UNROLL
        for (uint32_t i = 0; i < 8; i++) x[i] = x[i] * fp8.inverse;
        store8(out + at, x);
    }
}

KERNEL(quantize_fp8_f32, QuantizeFp8Params, ROW_THREADS) { quantize_fp8<float>(p); }
KERNEL(quantize_fp8_f16, QuantizeFp8Params, ROW_THREADS) { quantize_fp8<f16>(p); }
KERNEL(quantize_fp8_bf16, QuantizeFp8Params, ROW_THREADS) { quantize_fp8<bf16>(p); }
