// Dense products out[m, n] = x[m, k] · w[n, k]^T with the tensor cores of Ampere and later (mma.sync).
//
// Every output element is one f32 sum that starts at zero and runs over ascending k, in steps of one instruction (32 bytes of
// k), with every tile. So the tile can be chosen by m and n without changing a row's bits. Weights are the instruction's 16
// rows and tokens its 8 columns, which wastes less for single tokens. Blocks copy slices of 128 bytes of k in the background,
// several slices ahead.
//
// gemm_sm90.cu computes the same product with Hopper's instructions. Its results may differ in the last bits.
#include "prelude.cuh"
#include "gemm.cuh"

struct GemmParams {
    const unsigned char* w;  // [n, row_bytes]
    const unsigned char* x;  // [m, row_bytes]
    ProductOutput out;
    uint64_t row_bytes;  // of one row of k elements; a multiple of 16
};

constexpr uint32_t SLICE_BYTES = 128, CHUNK_BYTES = 16, CHUNKS = SLICE_BYTES / CHUNK_BYTES, STEP_CHUNKS = 2;

template <typename E>
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DEVICE void multiply<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
template <>
DEVICE void multiply<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
#if HAS_FP8_PRODUCTS
template <>
DEVICE void multiply<fp8>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_fp8(c, a, b); }
#endif

// A tile of FEATURES × TOKENS, computed by a block of FEATURE_WARPS × TOKEN_WARPS warps with STAGES slices in shared memory.
template <uint32_t FEATURES_, uint32_t TOKENS_, uint32_t FEATURE_WARPS_, uint32_t TOKEN_WARPS_, uint32_t STAGES_>
struct Tile {
    static constexpr uint32_t FEATURES = FEATURES_, TOKENS = TOKENS_, STAGES = STAGES_;
    static constexpr uint32_t FEATURE_WARPS = FEATURE_WARPS_, THREADS = FEATURE_WARPS_ * TOKEN_WARPS_ * WARP;
    // The numbers of 16-feature blocks and of 8-token blocks that one warp computes.
    static constexpr uint32_t WARP_FEATURES = FEATURES / FEATURE_WARPS_ / 16, WARP_TOKENS = TOKENS / TOKEN_WARPS_ / 8;
    static constexpr uint32_t ROWS_AT_ONCE = THREADS / CHUNKS, STAGE_BYTES = (FEATURES + TOKENS) * SLICE_BYTES;
    static_assert(FEATURES % ROWS_AT_ONCE == 0 && TOKENS % ROWS_AT_ONCE == 0, "a thread copies whole rows of either operand");
    static_assert(TOKENS * STAGED_ROW<FEATURES> * 4 <= STAGES * STAGE_BYTES, "the staged sums reuse the slices' memory");
};

// The address of a chunk. Rows of 128 bytes are contiguous. The 16-byte chunks of each row are permuted, so that neither the
// copies nor the loads of the same chunk of eight rows cause bank conflicts.
DEVICE unsigned char* chunk_at(unsigned char* rows, uint32_t row, uint32_t chunk) {
    return rows + row * SLICE_BYTES + (chunk ^ row % 8) * CHUNK_BYTES;
}

// Starts this thread's share of copying `ROWS` rows from `first_row` on. Elements beyond the matrix become zero.
template <uint32_t ROWS, typename T>
DEVICE void copy_rows(unsigned char* to, const unsigned char* matrix, uint32_t first_row, uint32_t rows, uint64_t row_bytes, uint32_t slice) {
    uint32_t chunk = threadIdx.x % CHUNKS;
    uint64_t offset = uint64_t(slice) * SLICE_BYTES + chunk * CHUNK_BYTES;
    UNROLL for (uint32_t first = 0; first < ROWS; first += T::ROWS_AT_ONCE) {
        uint32_t row = first + threadIdx.x / CHUNKS;
        bool valid = first_row + row < rows && offset < row_bytes;
        const unsigned char* from = valid ? matrix + (first_row + row) * row_bytes + offset : matrix;
        async_copy_16(chunk_at(to, row, chunk), from, valid);
    }
}

template <typename E, typename T>
struct Product {
    const GemmParams& p;
    unsigned char* stages;
    float c[T::WARP_FEATURES][T::WARP_TOKENS][4];
    uint32_t first_feature, first_token;

    DEVICE void copy(uint32_t slice) {
        unsigned char* to = stages + slice % T::STAGES * T::STAGE_BYTES;
        copy_rows<T::FEATURES, T>(to, p.w, first_feature, p.out.n, p.row_bytes, slice);
        copy_rows<T::TOKENS, T>(to + T::FEATURES * SLICE_BYTES, p.x, first_token, p.out.m, p.row_bytes, slice);
    }

    // Loads the warp's tokens as the second operand of two steps: each register pair holds eight tokens for one step.
    DEVICE void load_tokens(uint32_t (&b)[2][T::WARP_TOKENS][2], unsigned char* tokens, uint32_t first_chunk) {
        uint32_t r[4], first = warp() / T::FEATURE_WARPS * T::WARP_TOKENS * 8;
        if constexpr (T::WARP_TOKENS == 1) {
            load_matrix_x4(r, chunk_at(tokens, first + lane() % 8, first_chunk + lane() / 8));
            for (uint32_t i = 0; i < 4; i++) b[i / 2][0][i % 2] = r[i];
        } else {
            UNROLL for (uint32_t step = 0; step < 2; step++) {
                UNROLL for (uint32_t j = 0; j < T::WARP_TOKENS; j += 2) {
                    uint32_t row = first + j * 8 + lane() % 8 + lane() / 16 * 8;
                    load_matrix_x4(r, chunk_at(tokens, row, first_chunk + step * STEP_CHUNKS + lane() / 8 % 2));
                    b[step][j][0] = r[0], b[step][j][1] = r[1];
                    b[step][j + 1][0] = r[2], b[step][j + 1][1] = r[3];
                }
            }
        }
    }

    DEVICE void add_slice(uint32_t slice) {
        unsigned char* features = stages + slice % T::STAGES * T::STAGE_BYTES;
        unsigned char* tokens = features + T::FEATURES * SLICE_BYTES;
        uint32_t first = warp() % T::FEATURE_WARPS * T::WARP_FEATURES * 16;
        UNROLL for (uint32_t chunk = 0; chunk < CHUNKS; chunk += 2 * STEP_CHUNKS) {
            uint32_t b[2][T::WARP_TOKENS][2];
            load_tokens(b, tokens, chunk);
            UNROLL for (uint32_t step = 0; step < 2; step++) {
                UNROLL for (uint32_t i = 0; i < T::WARP_FEATURES; i++) {
                    uint32_t a[4];
                    load_matrix_x4(a, chunk_at(features, first + i * 16 + lane() % 16, chunk + step * STEP_CHUNKS + lane() / 16));
                    UNROLL for (uint32_t j = 0; j < T::WARP_TOKENS; j++) multiply<E>(c[i][j], a, b[step][j]);
                }
            }
        }
    }

    DEVICE void sum() {
        uint32_t slices = uint32_t((p.row_bytes + SLICE_BYTES - 1) / SLICE_BYTES);
        for (uint32_t slice = 0; slice < T::STAGES - 1; slice++) {
            if (slice < slices) copy(slice);
            async_copy_commit();
        }
        for (uint32_t slice = 0; slice < slices; slice++) {
            async_copy_wait<T::STAGES - 2>();
            // After the barrier, all threads' copies of this slice have arrived, and no thread reads the previous slice.
            block_barrier();
            if (slice + T::STAGES - 1 < slices) copy(slice + T::STAGES - 1);
            async_copy_commit();
            add_slice(slice);
        }
        async_copy_wait<0>();
        block_barrier();
    }

    DEVICE void write() {
        float* staged = reinterpret_cast<float*>(stages);
        uint32_t feature = warp() % T::FEATURE_WARPS * T::WARP_FEATURES * 16;
        uint32_t token = warp() / T::FEATURE_WARPS * T::WARP_TOKENS * 8;
        UNROLL for (uint32_t i = 0; i < T::WARP_FEATURES; i++) {
            UNROLL for (uint32_t j = 0; j < T::WARP_TOKENS; j++) {
                stage_sums<T::FEATURES>(staged, feature + i * 16, token + j * 8, c[i][j][0], c[i][j][1], c[i][j][2], c[i][j][3]);
            }
        }
        block_barrier();
        write_staged<T::FEATURES, T::TOKENS, T::THREADS>(p.out, staged, first_token, first_feature, threadIdx.x);
    }
};

// Blocks along x are tiles of tokens, so that they read the same weights at about the same time. Blocks along y are tiles of
// features.
template <typename E, typename T>
DEVICE void gemm(const GemmParams& p, unsigned char* stages) {
    Product<E, T> product{p, stages, {}, blockIdx.y * T::FEATURES, blockIdx.x * T::TOKENS};
    grid_dependency_wait();
    grid_dependency_launch();
    product.sum();
    product.write();
}

// The same tiles as in gpu/gemm.rs.
using Tile32x8 = Tile<32, 8, 2, 1, 8>;
using Tile32x16 = Tile<32, 16, 2, 1, 8>;
using Tile64x32 = Tile<64, 32, 4, 1, 6>;
using Tile64x64 = Tile<64, 64, 2, 2, 4>;
using Tile128x128 = Tile<128, 128, 2, 4, 3>;

#define GEMM(E, T)            \
    DYNAMIC_SHARED(stages);   \
    gemm<E, T>(p, stages)

KERNEL(gemm_bf16_32x8, GemmParams, Tile32x8::THREADS) { GEMM(bf16, Tile32x8); }
KERNEL(gemm_bf16_32x16, GemmParams, Tile32x16::THREADS) { GEMM(bf16, Tile32x16); }
KERNEL(gemm_bf16_64x32, GemmParams, Tile64x32::THREADS) { GEMM(bf16, Tile64x32); }
KERNEL(gemm_bf16_64x64, GemmParams, Tile64x64::THREADS) { GEMM(bf16, Tile64x64); }
KERNEL(gemm_bf16_128x128, GemmParams, Tile128x128::THREADS) { GEMM(bf16, Tile128x128); }

KERNEL(gemm_f16_32x8, GemmParams, Tile32x8::THREADS) { GEMM(f16, Tile32x8); }
KERNEL(gemm_f16_32x16, GemmParams, Tile32x16::THREADS) { GEMM(f16, Tile32x16); }
KERNEL(gemm_f16_64x32, GemmParams, Tile64x32::THREADS) { GEMM(f16, Tile64x32); }
KERNEL(gemm_f16_64x64, GemmParams, Tile64x64::THREADS) { GEMM(f16, Tile64x64); }
KERNEL(gemm_f16_128x128, GemmParams, Tile128x128::THREADS) { GEMM(f16, Tile128x128); }

#if HAS_FP8_PRODUCTS
KERNEL(gemm_fp8_32x8, GemmParams, Tile32x8::THREADS) { GEMM(fp8, Tile32x8); }
KERNEL(gemm_fp8_32x16, GemmParams, Tile32x16::THREADS) { GEMM(fp8, Tile32x16); }
KERNEL(gemm_fp8_64x32, GemmParams, Tile64x32::THREADS) { GEMM(fp8, Tile64x32); }
KERNEL(gemm_fp8_64x64, GemmParams, Tile64x64::THREADS) { GEMM(fp8, Tile64x64); }
KERNEL(gemm_fp8_128x128, GemmParams, Tile128x128::THREADS) { GEMM(fp8, Tile128x128); }
#endif
