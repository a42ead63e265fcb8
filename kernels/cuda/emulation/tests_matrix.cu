// Kernels that test the emulator's matrix instructions and Hopper's copies (kernels/tests/emulator.rs).
#include "prelude.cuh"

// Computes one product of a warp from row-major operands a [16, k], b [8, k] into c [16, 8]; k is 32 bytes. Fragments are read
// word by word, in the layout that device.cuh describes.
struct EmulationProductParams {
    uint32_t* c;
    const uint32_t* a;
    const uint32_t* b;
    // 0: bf16, 1: f16, 2: fp8, 3: signed bytes
    uint32_t type;
};
KERNEL(emulation_product, EmulationProductParams, 32) {
    uint32_t g = lane() / 4, t = lane() % 4;
    uint32_t a[4], b[2], bits[4];
    for (uint32_t i = 0; i < 4; i++) a[i] = p.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
    for (uint32_t i = 0; i < 2; i++) b[i] = p.b[g * 8 + t + i * 4];
    for (uint32_t i = 0; i < 4; i++) bits[i] = p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    if (p.type == 3) {
        int32_t sums[4];
        for (uint32_t i = 0; i < 4; i++) sums[i] = int32_t(bits[i]);
        mma_s8(sums, a, b);
        for (uint32_t i = 0; i < 4; i++) bits[i] = uint32_t(sums[i]);
    } else {
        float sums[4];
        for (uint32_t i = 0; i < 4; i++) sums[i] = uint_as_float(bits[i]);
        if (p.type == 0) mma_bf16(sums, a, b);
        if (p.type == 1) mma_f16(sums, a, b);
        if (p.type == 2) mma_fp8(sums, a, b);
        for (uint32_t i = 0; i < 4; i++) bits[i] = float_as_uint(sums[i]);
    }
    for (uint32_t i = 0; i < 4; i++) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = bits[i];
}

// Loads four 8×8 matrices, stored one after another as [32, 8] of 16 bits. out: [transposed][register][lane].
struct EmulationLoadMatrixParams {
    uint32_t* out;
    const Bytes16* in;
};
KERNEL(emulation_load_matrix, EmulationLoadMatrixParams, 32) {
    SHARED(Bytes16, rows, [32]);
    rows[lane()] = p.in[lane()];
    warp_barrier();
    uint32_t plain[4], transposed[4];
    load_matrix_x4(plain, &rows[lane()]);
    load_matrix_x4_transposed(transposed, &rows[lane()]);
    for (uint32_t i = 0; i < 4; i++) {
        p.out[i * 32 + lane()] = plain[i];
        p.out[(4 + i) * 32 + lane()] = transposed[i];
    }
}

// Computes c[64, 16] = a · b^T with tiles of 64 elements of k in a ring of two: one thread starts the copies, and all 128
// multiply. `fault` selects a wait, a fence or a count of bytes that is left out.
struct EmulationTilesParams {
    TensorMap a;
    TensorMap b;
    float* c;
    uint32_t k;
    uint32_t fault;
};
KERNEL(emulation_tiles, EmulationTilesParams, 128) {
    constexpr uint32_t STAGES = 2, A_BYTES = 64 * 128, B_BYTES = 16 * 128;
    DYNAMIC_SHARED(memory);
    SHARED(uint64_t, filled, [STAGES]);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < STAGES; i++) mbarrier_init(&filled[i], 1);
        mbarrier_init_fence();
    }
    if (p.fault != 1) block_barrier();
    auto fill = [&](uint32_t tile) {
        unsigned char* stage = memory + tile % STAGES * (A_BYTES + B_BYTES);
        mbarrier_arrive_expect(&filled[tile % STAGES], A_BYTES + (p.fault == 2 ? 0 : B_BYTES));
        tensor_copy(stage, p.a, 0, tile * 64, &filled[tile % STAGES]);
        tensor_copy(stage + A_BYTES, p.b, 0, tile * 64, &filled[tile % STAGES]);
    };
    uint32_t tiles = (p.k + 63) / 64;
    if (threadIdx.x == 0) {
        for (uint32_t tile = 0; tile < STAGES && tile < tiles; tile++) fill(tile);
    }
    float c[8] = {};
    for (uint32_t tile = 0; tile < tiles; tile++) {
        unsigned char* stage = memory + tile % STAGES * (A_BYTES + B_BYTES);
        if (p.fault != 3) mbarrier_wait(&filled[tile % STAGES], tile / STAGES % 2);
        if (p.fault != 4) wgmma_fence(c);
        uint64_t a = wgmma_operand(stage), b = wgmma_operand(stage + A_BYTES);
        for (uint32_t bytes = 0; bytes < 128; bytes += 32) {
            wgmma<bf16, 16>(c, wgmma_advance(a, bytes), wgmma_advance(b, bytes));
        }
        wgmma_commit();
        // Waits for the products: the last ones, or those whose tile is about to be filled again.
        if (tile + 1 < tiles ? p.fault != 5 : p.fault != 6) wgmma_wait<0>(c);
        block_barrier();
        if (threadIdx.x == 0 && tile + STAGES < tiles) fill(tile + STAGES);
    }
    uint32_t row = threadIdx.x / 32 * 16 + lane() / 4, col = lane() % 4 * 2;
    for (uint32_t i = 0; i < 8; i++) p.c[(row + i % 4 / 2 * 8) * 16 + i / 4 * 8 + col + i % 2] = c[i];
    if (p.fault == 6) wgmma_wait<0>(c);
}
