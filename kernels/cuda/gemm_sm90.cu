// Dense products out[m, n] = x[m, k] · w[n, k]^T with Hopper's warpgroup products (wgmma), on tiles that the bulk copy engine
// copies to shared memory.
//
// Every output element is one f32 sum that starts at zero and runs over ascending k, in steps of one instruction (32 bytes of
// k), with every tile. Weights are the instruction's 64 rows, tokens its N columns. A sum depends only on its own row and
// column, so a tile may have fewer than 64 weights: the instruction reads beyond them whatever follows in shared memory, and
// those rows of sums are dropped. Small tiles spread few weights over all multiprocessors when there are few tokens.
//
// One warp copies: slices of 128 bytes of k go through a ring of stages, as far ahead as shared memory allows. One or two
// warpgroups multiply. They need no registers from the copying warp (setmaxnreg), since a single copying warp leaves 224 for
// each thread. Blocks are persistent and compute one tile after another. Weights do not depend on earlier kernels, so the
// first copies of weights start before the previous kernel has ended.
#include "prelude.cuh"
#include "gemm.cuh"

struct GemmSm90Params {
    // w [n, k] in boxes of a tile's features by 128 bytes of k; x [m, k] in boxes of a tile's tokens by 128 bytes of k.
    TensorMap w, x;
    ProductOutput out;
    uint32_t slices;  // number of 128-byte slices in a row
    uint32_t token_tiles, feature_tiles;
    // How many tiles of tokens are computed for all features before the next ones, so that their rows stay in the cache.
    uint32_t token_tiles_together;
};

constexpr uint32_t SLICE_BYTES = 128, STEP_BYTES = 32, WARPGROUP = 128, WARPGROUP_WARPS = 4, INSTRUCTION_ROWS = 64;

// A tile of CONSUMERS warpgroups with ROWS features each, by TOKENS tokens; the ring has STAGES stages of SLICES slices.
template <uint32_t ROWS_, uint32_t CONSUMERS_, uint32_t TOKENS_, uint32_t SLICES_, uint32_t STAGES_>
struct Tile {
    static constexpr uint32_t ROWS = ROWS_, CONSUMERS = CONSUMERS_, TOKENS = TOKENS_, SLICES = SLICES_, STAGES = STAGES_;
    static constexpr uint32_t FEATURES = ROWS * CONSUMERS, THREADS = CONSUMERS * WARPGROUP + WARP;
    static constexpr uint32_t SLICE_TILES = (FEATURES + TOKENS) * SLICE_BYTES, STAGE_BYTES = SLICES * SLICE_TILES;
    // Sums are written in PARTS parts of STAGED_TOKENS tokens.
    static constexpr uint32_t STAGED_TOKENS = TOKENS < 32 ? TOKENS : 32, PARTS = TOKENS / STAGED_TOKENS;
    static constexpr uint32_t STAGED_FLOATS = STAGED_TOKENS * STAGED_ROW<ROWS>;
    static_assert(ROWS <= INSTRUCTION_ROWS && (CONSUMERS == 1 || ROWS == INSTRUCTION_ROWS), "whole instructions but for the last");
    static_assert(ROWS % 16 == 0, "a tile starts at a multiple of 1024 bytes, and a warp has 16 rows");
};

struct Place {
    uint32_t first_feature, first_token;
};
template <typename T>
DEVICE Place place_of(const GemmSm90Params& p, uint32_t tile) {
    uint32_t together = p.token_tiles_together * p.feature_tiles, first = tile / together * p.token_tiles_together;
    uint32_t left = p.token_tiles - first, width = left < p.token_tiles_together ? left : p.token_tiles_together;
    uint32_t in_group = tile % together;
    return Place{in_group / width * T::FEATURES, (first + in_group % width) * T::TOKENS};
}

// A position in the ring, with the parity of the current phase of the stage's barriers.
template <typename T>
struct Stage {
    uint32_t index = 0, parity = 0;

    DEVICE void advance() {
        index++;
        if (index == T::STAGES) index = 0, parity ^= 1;
    }
};

template <typename T>
struct Ring {
    unsigned char* memory;
    uint64_t* full;   // barriers on which the copying thread and the bytes arrive
    uint64_t* empty;  // barriers on which every multiplying warp arrives

    DEVICE void init() {
        for (uint32_t i = 0; i < T::STAGES; i++) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], T::CONSUMERS * WARPGROUP_WARPS);
        }
        mbarrier_init_fence();
    }
    DEVICE unsigned char* weights(uint32_t stage, uint32_t slice) { return memory + stage * T::STAGE_BYTES + slice * T::SLICE_TILES; }
    DEVICE unsigned char* tokens(uint32_t stage, uint32_t slice) { return weights(stage, slice) + T::FEATURES * SLICE_BYTES; }
    DEVICE float* staged(uint32_t consumer) {
        return reinterpret_cast<float*>(memory + T::STAGES * T::STAGE_BYTES) + consumer * T::STAGED_FLOATS;
    }
};

// The copying thread.
template <typename E, typename T>
struct Producer {
    static constexpr uint32_t SLICE_ELEMENTS = SLICE_BYTES / sizeof(E);
    const GemmSm90Params& p;
    Ring<T> ring;

    DEVICE void copy_weights(uint32_t stage, Place place, uint32_t step) {
        mbarrier_arrive_expect(&ring.full[stage], T::STAGE_BYTES);
        UNROLL for (uint32_t i = 0; i < T::SLICES; i++) {
            uint32_t col = (step * T::SLICES + i) * SLICE_ELEMENTS;
            if (p.token_tiles == 1) {
                tensor_copy_streaming(ring.weights(stage, i), p.w, place.first_feature, col, &ring.full[stage]);
            } else {
                tensor_copy(ring.weights(stage, i), p.w, place.first_feature, col, &ring.full[stage]);
            }
        }
    }
    DEVICE void copy_tokens(uint32_t stage, Place place, uint32_t step) {
        UNROLL for (uint32_t i = 0; i < T::SLICES; i++) {
            uint32_t col = (step * T::SLICES + i) * SLICE_ELEMENTS;
            tensor_copy(ring.tokens(stage, i), p.x, place.first_token, col, &ring.full[stage]);
        }
    }

    DEVICE void run(uint32_t steps, uint32_t tiles) {
        uint32_t ahead = steps < T::STAGES ? steps : T::STAGES;
        Place first = place_of<T>(p, blockIdx.x);
        for (uint32_t step = 0; step < ahead; step++) copy_weights(step, first, step);
        grid_dependency_wait();
        Stage<T> stage;
        for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            Place place = place_of<T>(p, tile);
            for (uint32_t step = 0; step < steps; step++) {
                if (tile != blockIdx.x || step >= ahead) {
                    // The phase before the first counts as ended, so the first wait on each stage returns at once.
                    mbarrier_wait(&ring.empty[stage.index], stage.parity ^ 1);
                    copy_weights(stage.index, place, step);
                }
                copy_tokens(stage.index, place, step);
                stage.advance();
            }
        }
    }
};

// A multiplying warpgroup.
template <typename E, typename T>
struct Consumer {
    const GemmSm90Params& p;
    Ring<T> ring;
    uint32_t number;

    DEVICE void release(uint32_t stage) {
        if (lane() == 0) mbarrier_arrive(&ring.empty[stage]);
    }

    DEVICE void add_stage(float (&c)[T::TOKENS / 2], uint32_t stage) {
        UNROLL for (uint32_t i = 0; i < T::SLICES; i++) {
            uint64_t features = wgmma_operand(ring.weights(stage, i) + number * T::ROWS * SLICE_BYTES);
            uint64_t tokens = wgmma_operand(ring.tokens(stage, i));
            UNROLL for (uint32_t at = 0; at < SLICE_BYTES; at += STEP_BYTES) {
                wgmma<E, T::TOKENS>(c, wgmma_advance(features, at), wgmma_advance(tokens, at));
            }
        }
    }

    // While one step's products are running, waits for the next stage.
    DEVICE void sum(float (&c)[T::TOKENS / 2], Stage<T>& stage, uint32_t steps) {
        UNROLL for (uint32_t i = 0; i < T::TOKENS / 2; i++) c[i] = 0.0f;
        uint32_t before = 0;
        for (uint32_t step = 0; step < steps; step++) {
            mbarrier_wait(&ring.full[stage.index], stage.parity);
            wgmma_fence(c);
            add_stage(c, stage.index);
            wgmma_commit();
            wgmma_wait<1>(c);
            if (step > 0) release(before);
            before = stage.index;
            stage.advance();
        }
        wgmma_wait<0>(c);
        release(before);
    }

    DEVICE void stage(const float (&c)[T::TOKENS / 2], float* staged, uint32_t feature, uint32_t part) {
        // Registers cannot be indexed at run time, so the loop over the parts is unrolled.
        UNROLL for (uint32_t i = 0; i < T::PARTS; i++) {
            if (i != part) continue;
            UNROLL for (uint32_t token = 0; token < T::STAGED_TOKENS; token += 8) {
                uint32_t at = (i * T::STAGED_TOKENS + token) / 2;
                stage_sums<T::ROWS>(staged, feature, token, c[at], c[at + 1], c[at + 2], c[at + 3]);
            }
        }
    }

    DEVICE void write(const float (&c)[T::TOKENS / 2], Place place) {
        uint32_t feature = threadIdx.x % WARPGROUP / WARP * 16, first_feature = place.first_feature + number * T::ROWS;
        float* staged = ring.staged(number);
        NO_UNROLL for (uint32_t part = 0; part < T::PARTS; part++) {
            uint32_t first_token = place.first_token + part * T::STAGED_TOKENS;
            if (first_token >= p.out.m) break;
            if (feature < T::ROWS) stage(c, staged, feature, part);
            named_barrier(1 + number, WARPGROUP);
            write_staged<T::ROWS, T::STAGED_TOKENS, WARPGROUP>(p.out, staged, first_token, first_feature, threadIdx.x % WARPGROUP);
            named_barrier(1 + number, WARPGROUP);
        }
    }

    DEVICE void run(uint32_t steps, uint32_t tiles) {
        // The previous kernel may still read the output.
        grid_dependency_wait();
        Stage<T> stage;
        for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            float c[T::TOKENS / 2];
            sum(c, stage, steps);
            write(c, place_of<T>(p, tile));
        }
    }
};

template <typename E, typename T>
DEVICE void gemm(const GemmSm90Params& p, unsigned char* memory) {
    SHARED(uint64_t, full, [T::STAGES]);
    SHARED(uint64_t, empty, [T::STAGES]);
    Ring<T> ring{memory, full, empty};
    uint32_t steps = (p.slices + T::SLICES - 1) / T::SLICES, tiles = p.token_tiles * p.feature_tiles;
    if (threadIdx.x == 0) {
        tensor_map_prefetch(p.w);
        tensor_map_prefetch(p.x);
        ring.init();
    }
    block_barrier();
    grid_dependency_launch();
    if (warp() == T::CONSUMERS * WARPGROUP_WARPS) {
        if (lane() == 0) Producer<E, T>{p, ring}.run(steps, tiles);
    } else {
        Consumer<E, T>{p, ring, threadIdx.x / WARPGROUP}.run(steps, tiles);
    }
}

// The same tiles as in gpu/gemm/tiles.rs. Up to 64 tokens, products are bound by the bandwidth for the weights, and stages hold
// two slices, so that each wait covers twice the bytes. Beyond that, they are bound by the tensor cores.
using Tile16x8 = Tile<16, 1, 8, 2, 24>;
using Tile32x8 = Tile<32, 1, 8, 2, 16>;
using Tile64x8 = Tile<64, 1, 8, 2, 9>;
using Tile16x16 = Tile<16, 1, 16, 2, 20>;
using Tile32x16 = Tile<32, 1, 16, 2, 14>;
using Tile64x16 = Tile<64, 1, 16, 2, 8>;
using Tile32x32 = Tile<32, 1, 32, 2, 10>;
using Tile64x32 = Tile<64, 1, 32, 2, 7>;
using Tile32x64 = Tile<32, 1, 64, 2, 7>;
using Tile64x64 = Tile<64, 1, 64, 2, 6>;
using Tile128x64 = Tile<64, 2, 64, 1, 8>;
using Tile64x128 = Tile<64, 1, 128, 1, 8>;
using Tile128x128 = Tile<64, 2, 128, 1, 6>;
using Tile128x256 = Tile<64, 2, 256, 1, 4>;

#define GEMM(E, T)            \
    DYNAMIC_SHARED(memory);   \
    gemm<E, T>(p, memory)

KERNEL(gemm_sm90_bf16_16x8, GemmSm90Params, Tile16x8::THREADS) { GEMM(bf16, Tile16x8); }
KERNEL(gemm_sm90_bf16_32x8, GemmSm90Params, Tile32x8::THREADS) { GEMM(bf16, Tile32x8); }
KERNEL(gemm_sm90_bf16_64x8, GemmSm90Params, Tile64x8::THREADS) { GEMM(bf16, Tile64x8); }
KERNEL(gemm_sm90_bf16_16x16, GemmSm90Params, Tile16x16::THREADS) { GEMM(bf16, Tile16x16); }
KERNEL(gemm_sm90_bf16_32x16, GemmSm90Params, Tile32x16::THREADS) { GEMM(bf16, Tile32x16); }
KERNEL(gemm_sm90_bf16_64x16, GemmSm90Params, Tile64x16::THREADS) { GEMM(bf16, Tile64x16); }
KERNEL(gemm_sm90_bf16_32x32, GemmSm90Params, Tile32x32::THREADS) { GEMM(bf16, Tile32x32); }
KERNEL(gemm_sm90_bf16_64x32, GemmSm90Params, Tile64x32::THREADS) { GEMM(bf16, Tile64x32); }
KERNEL(gemm_sm90_bf16_32x64, GemmSm90Params, Tile32x64::THREADS) { GEMM(bf16, Tile32x64); }
KERNEL(gemm_sm90_bf16_64x64, GemmSm90Params, Tile64x64::THREADS) { GEMM(bf16, Tile64x64); }
KERNEL(gemm_sm90_bf16_128x64, GemmSm90Params, Tile128x64::THREADS) { GEMM(bf16, Tile128x64); }
KERNEL(gemm_sm90_bf16_64x128, GemmSm90Params, Tile64x128::THREADS) { GEMM(bf16, Tile64x128); }
KERNEL(gemm_sm90_bf16_128x128, GemmSm90Params, Tile128x128::THREADS) { GEMM(bf16, Tile128x128); }
KERNEL(gemm_sm90_bf16_128x256, GemmSm90Params, Tile128x256::THREADS) { GEMM(bf16, Tile128x256); }

KERNEL(gemm_sm90_f16_16x8, GemmSm90Params, Tile16x8::THREADS) { GEMM(f16, Tile16x8); }
KERNEL(gemm_sm90_f16_32x8, GemmSm90Params, Tile32x8::THREADS) { GEMM(f16, Tile32x8); }
KERNEL(gemm_sm90_f16_64x8, GemmSm90Params, Tile64x8::THREADS) { GEMM(f16, Tile64x8); }
KERNEL(gemm_sm90_f16_16x16, GemmSm90Params, Tile16x16::THREADS) { GEMM(f16, Tile16x16); }
KERNEL(gemm_sm90_f16_32x16, GemmSm90Params, Tile32x16::THREADS) { GEMM(f16, Tile32x16); }
KERNEL(gemm_sm90_f16_64x16, GemmSm90Params, Tile64x16::THREADS) { GEMM(f16, Tile64x16); }
KERNEL(gemm_sm90_f16_32x32, GemmSm90Params, Tile32x32::THREADS) { GEMM(f16, Tile32x32); }
KERNEL(gemm_sm90_f16_64x32, GemmSm90Params, Tile64x32::THREADS) { GEMM(f16, Tile64x32); }
KERNEL(gemm_sm90_f16_32x64, GemmSm90Params, Tile32x64::THREADS) { GEMM(f16, Tile32x64); }
KERNEL(gemm_sm90_f16_64x64, GemmSm90Params, Tile64x64::THREADS) { GEMM(f16, Tile64x64); }
KERNEL(gemm_sm90_f16_128x64, GemmSm90Params, Tile128x64::THREADS) { GEMM(f16, Tile128x64); }
KERNEL(gemm_sm90_f16_64x128, GemmSm90Params, Tile64x128::THREADS) { GEMM(f16, Tile64x128); }
KERNEL(gemm_sm90_f16_128x128, GemmSm90Params, Tile128x128::THREADS) { GEMM(f16, Tile128x128); }
KERNEL(gemm_sm90_f16_128x256, GemmSm90Params, Tile128x256::THREADS) { GEMM(f16, Tile128x256); }

KERNEL(gemm_sm90_fp8_16x8, GemmSm90Params, Tile16x8::THREADS) { GEMM(fp8, Tile16x8); }
KERNEL(gemm_sm90_fp8_32x8, GemmSm90Params, Tile32x8::THREADS) { GEMM(fp8, Tile32x8); }
KERNEL(gemm_sm90_fp8_64x8, GemmSm90Params, Tile64x8::THREADS) { GEMM(fp8, Tile64x8); }
KERNEL(gemm_sm90_fp8_16x16, GemmSm90Params, Tile16x16::THREADS) { GEMM(fp8, Tile16x16); }
KERNEL(gemm_sm90_fp8_32x16, GemmSm90Params, Tile32x16::THREADS) { GEMM(fp8, Tile32x16); }
KERNEL(gemm_sm90_fp8_64x16, GemmSm90Params, Tile64x16::THREADS) { GEMM(fp8, Tile64x16); }
KERNEL(gemm_sm90_fp8_32x32, GemmSm90Params, Tile32x32::THREADS) { GEMM(fp8, Tile32x32); }
KERNEL(gemm_sm90_fp8_64x32, GemmSm90Params, Tile64x32::THREADS) { GEMM(fp8, Tile64x32); }
KERNEL(gemm_sm90_fp8_32x64, GemmSm90Params, Tile32x64::THREADS) { GEMM(fp8, Tile32x64); }
KERNEL(gemm_sm90_fp8_64x64, GemmSm90Params, Tile64x64::THREADS) { GEMM(fp8, Tile64x64); }
KERNEL(gemm_sm90_fp8_128x64, GemmSm90Params, Tile128x64::THREADS) { GEMM(fp8, Tile128x64); }
KERNEL(gemm_sm90_fp8_64x128, GemmSm90Params, Tile64x128::THREADS) { GEMM(fp8, Tile64x128); }
KERNEL(gemm_sm90_fp8_128x128, GemmSm90Params, Tile128x128::THREADS) { GEMM(fp8, Tile128x128); }
KERNEL(gemm_sm90_fp8_128x256, GemmSm90Params, Tile128x256::THREADS) { GEMM(fp8, Tile128x256); }
