// Hopper's operations on the host, with the names of hopper.cuh. Bulk copies are performed when a thread waits at their
// barrier, and products of a warpgroup when it waits for them. Until then, tiles and sums are poison.
#pragma once

namespace emulation {

void init_transaction_barrier(uint64_t* barrier, uint32_t arrivals);
void arrive(uint64_t* barrier, uint32_t bytes);
void wait_for_phase(uint64_t* barrier, uint32_t parity);
void copy_box(void* tile, const void* map, uint32_t row, uint32_t col, uint64_t* barrier);

using Multiply = void (*)(float* const* c, uint32_t n, const unsigned char* a, const unsigned char* b);
Multiply multiply_tiles(bf16);
Multiply multiply_tiles(f16);
Multiply multiply_tiles(fp8);
void issue_product(float* c, uint32_t n, uint64_t a, uint64_t b, Multiply multiply);
void fence_products();
void commit_products();
void finish_products(size_t pending);

}  // namespace emulation

DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulation::init_transaction_barrier(barrier, arrivals); }
DEVICE void mbarrier_init_fence() {}
DEVICE void mbarrier_arrive(uint64_t* barrier) { emulation::arrive(barrier, 0); }
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulation::arrive(barrier, bytes); }
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulation::wait_for_phase(barrier, parity); }

DEVICE void tensor_copy(void* tile, const TensorMap& map, uint32_t row, uint32_t col, uint64_t* barrier) {
    emulation::copy_box(tile, &map, row, col, barrier);
}
DEVICE void tensor_copy_streaming(void* tile, const TensorMap& map, uint32_t row, uint32_t col, uint64_t* barrier) {
    emulation::copy_box(tile, &map, row, col, barrier);
}
DEVICE void tensor_map_prefetch(const TensorMap&) {}

DEVICE uint64_t wgmma_operand(const void* tile) {
    uint64_t start = (shared_address(tile) & 0x3ffff) >> 4, leading = 1, stride = 1024 >> 4, swizzle_128 = 1;
    return start | leading << 16 | stride << 32 | swizzle_128 << 62;
}
DEVICE uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }
template <uint32_t COUNT>
DEVICE void wgmma_pin(float (&)[COUNT]) {}
template <uint32_t COUNT>
DEVICE void wgmma_fence(float (&)[COUNT]) {
    emulation::fence_products();
}
DEVICE void wgmma_commit() { emulation::commit_products(); }
template <int PENDING, uint32_t COUNT>
DEVICE void wgmma_wait(float (&)[COUNT]) {
    emulation::finish_products(PENDING);
}
template <typename E, uint32_t N>
DEVICE void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "columns of a product");
    emulation::issue_product(c, N, a, b, emulation::multiply_tiles(E{}));
}
