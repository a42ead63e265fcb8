// Operations on single activation rows: embedding, gated activations, conversions. RMSNorm is in norm.cu, the CPU kernels are
// in kernels/src/rows.rs. Rows have a multiple of eight elements and no gaps, so that every access is 16 (or 8) bytes wide.
#include "quantize.cuh"
#include "rows.cuh"

// ---- embedding

struct EmbedParams {
    const void* table;       // [vocab, cols]
    const uint32_t* tokens;  // [gridDim.x]
    float* hidden;           // [gridDim.x, cols]
    uint32_t vocab, cols;
};

// A token that is not in the table gives a row of NaN, which reaches the logits.
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

// Fills in tokens that the previous step sampled on the device, for the rows whose token is not known on the host.
struct NextTokensParams {
    const uint32_t* sampled;
    const uint32_t* sources;  // [rows]: index in `sampled`; an index beyond its end leaves the row's token unchanged
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

// ---- gated activation

struct GatedParams {
    const void* gate_up;  // [gridDim.x, gate then up]
    void* out;            // [gridDim.x, width]
    uint32_t width, activation;
};
constexpr uint32_t GATED_THREADS = 128;
// Any other number means GELU with the error function.
constexpr uint32_t SILU = 0, GELU_TANH = 2;

// The error function with an error of about 2e-7: an odd polynomial up to 1, and 1 - e^(-x²) q(x) above. Both are our own
// least-squares fits at Chebyshev nodes. Above 4, the result is 1 in f32.
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

// The gated activation quantized to eight bits, for a product with quantized weights. It has the same bits as quantizing the
// f32 form. Four lanes share a group.
struct GatedQuantizedParams {
    GatedParams gated;  // its `out` is not used
    QuantizedTarget out;
};

KERNEL(gated_activation_quantized, GatedQuantizedParams, GATED_THREADS) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint32_t width = p.gated.width, at = (blockIdx.y * GATED_THREADS + threadIdx.x) * 8;
    const float* row = static_cast<const float*>(p.gated.gate_up) + size_t(blockIdx.x) * 2 * width + at;
    float gate[8] = {}, up[8];
    if (at < width) {
        load8(row, gate);
        load8(row + width, up);
        UNROLL
        for (uint32_t i = 0; i < 8; i++) gate[i] = activate(gate[i], p.gated.activation) * up[i];
    }
    Group<2> group = quantize_group<2>(gate);
    put_group(p.out, blockIdx.x, at, group);
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

// The second pass reads the row from the L1 cache: every thread reads the same elements again.
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
