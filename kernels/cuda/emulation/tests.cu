// Kernels that test the emulator itself (kernels/tests/emulator.rs): its operations, and the mistakes that it must detect.
#include "prelude.cuh"

struct EmulationScaleParams {
    float* out;
    const float* in;
    float factor;
    uint32_t len;
};
KERNEL(emulation_scale, EmulationScaleParams, 256) {
    grid_dependency_wait();
    uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i < p.len) p.out[i] = p.in[i] * p.factor;
}

// Copies a number. Reads or writes it before the wait for the previous kernel, or only after it.
struct EmulationEarlyParams {
    float* out;
    const float* in;
    uint32_t reads_early;
    uint32_t writes_early;
};
KERNEL(emulation_early, EmulationEarlyParams, 32) {
    float x = p.reads_early != 0 ? *p.in : 0.0f;
    if (p.writes_early != 0) *p.out = x;
    grid_dependency_wait();
    *p.out = p.reads_early != 0 ? x : *p.in;
}

// Reverses 128 numbers through shared memory, with the barrier that this needs or without it.
struct EmulationReverseParams {
    uint32_t* out;
    const uint32_t* in;
    uint32_t barrier;
};
KERNEL(emulation_reverse, EmulationReverseParams, 128) {
    SHARED(uint32_t, numbers, [128]);
    numbers[threadIdx.x] = p.in[threadIdx.x];
    if (p.barrier != 0) block_barrier();
    p.out[threadIdx.x] = numbers[127 - threadIdx.x];
}

// Tests the operations of a warp. out: [operation][lane]
struct EmulationWarpParams {
    uint32_t* out;
};
KERNEL(emulation_warp, EmulationWarpParams, 32) {
    uint32_t x = 100 + lane();
    p.out[lane()] = shuffle_xor(x, 5);
    p.out[32 + lane()] = shuffle(x, lane() / 4);
    p.out[64 + lane()] = shuffle_up(x, 3);
    p.out[96 + lane()] = votes(lane() % 3 == 0);
    p.out[128 + lane()] = warp_sum(x);
}

// Two pairs of warps exchange numbers, each pair at its own barrier.
struct EmulationPairsParams {
    uint32_t* out;
};
KERNEL(emulation_pairs, EmulationPairsParams, 128) {
    SHARED(uint32_t, numbers, [128]);
    uint32_t pair = threadIdx.x / 64;
    numbers[threadIdx.x] = threadIdx.x;
    named_barrier(1 + pair, 64);
    p.out[threadIdx.x] = numbers[threadIdx.x ^ 32];
}

// Copies 256 words in the background, in two groups, and waits for none, the first or both.
struct EmulationAsyncParams {
    uint32_t* out;
    const uint32_t* in;
    uint32_t groups;
};
KERNEL(emulation_async, EmulationAsyncParams, 32) {
    DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    for (uint32_t group = 0; group < 2; group++) {
        uint32_t at = group * 128 + 4 * lane();
        async_copy_16(words + at, p.in + at, lane() != 7);
        async_copy_commit();
    }
    if (p.groups == 1) async_copy_wait<1>();
    if (p.groups == 2) async_copy_wait<0>();
    warp_barrier();
    for (uint32_t i = lane(); i < 256; i += 32) p.out[i] = words[i];
}

// Counts the threads of the grid, and finds the largest thread number.
struct EmulationCountParams {
    uint32_t* count;
    uint64_t* largest;
};
KERNEL(emulation_count, EmulationCountParams, 64) {
    atomic_add(p.count, 1);
    atomic_max(p.largest, uint64_t(blockIdx.x) * 64 + threadIdx.x);
}

// Makes the mistake with the number `fault`.
struct EmulationMisuseParams {
    uint32_t* out;
    uint32_t fault;
    uint32_t index;
};
DEVICE uint32_t endless(uint32_t depth) {
    volatile uint32_t page[1024];
    page[depth % 1024] = depth;
    return depth == 0xffffffff ? 0 : endless(depth + 1) + page[0];
}
KERNEL(emulation_misuse, EmulationMisuseParams, 64) {
    SHARED(uint32_t, numbers, [64]);
    DYNAMIC_SHARED(memory);
    numbers[threadIdx.x] = 0;
    if (p.fault == 0 && threadIdx.x == 5) return;
    if (p.fault == 1 && lane() != 9) warp_barrier();
    if (p.fault == 2) lane() == 3 ? votes(true) : shuffle(1u, 0);
    if (p.fault == 3) p.out[p.index] = 1;
    if (p.fault == 4) numbers[p.index] = 1;
    if (p.fault == 5) p.out[0] = *reinterpret_cast<const uint32_t*>(memory + p.index);
    if (p.fault == 6) memory[p.index] = 1;
    if (p.fault == 7) p.out[0] = endless(p.index);
    if (p.fault == 8) named_barrier(1, threadIdx.x < 32 ? 64 : 32);
    if (p.fault == 9) p.out[0] = 1u << p.index;
    block_barrier();
}
