// The prelude's operations on NVIDIA devices: thin wrappers of single instructions.
#pragma once

#define DEVICE __device__ __forceinline__
// Defines a kernel whose parameter is named `p`. MAX_THREADS is the block size it is launched with.
#define KERNEL(name, Params, MAX_THREADS) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS) name(const __grid_constant__ Params p)
// As KERNEL, with registers limited so that at least BLOCKS blocks fit on a multiprocessor.
#define KERNEL_OCCUPANCY(name, Params, MAX_THREADS, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, BLOCKS) name(const __grid_constant__ Params p)
// Static shared memory, undefined at the start of a block:  SHARED(float, scratch, [8]);
#define SHARED(type, name, dims) __shared__ type name dims
// The block's dynamic shared memory, aligned to 1024 bytes.
#define DYNAMIC_SHARED(name)                                                \
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[]; \
    unsigned char* name = dynamic_shared_memory

#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")

DEVICE uint32_t lane() { return threadIdx.x % 32; }
DEVICE uint32_t warp() { return threadIdx.x / 32; }

// ---- numbers

DEVICE float uint_as_float(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t float_as_uint(float x) { return __float_as_uint(x); }
DEVICE float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float max_(float a, float b) { return fmaxf(a, b); }
DEVICE float round_even(float x) { return rintf(x); }
DEVICE double ceiling(double x) { return ceil(x); }
// Rounds to the nearest integer, ties to even. x is in [0, 2^63).
DEVICE uint64_t round_to_u64(float x) { return __float2ull_rn(x); }
DEVICE float sqrt_(float x) { return __fsqrt_rn(x); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
// 2^x, approximately. The last bits differ from the emulator's.
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE bf16 to_bf16(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bf16{bits};
}
DEVICE f16 to_f16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return f16{bits};
}
DEVICE float from_f16(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// Convert two numbers, with `low` in the low half of the word.
DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
DEVICE uint32_t pack_f16(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
#if __CUDA_ARCH__ >= 890
DEVICE fp8 to_fp8(float x) {
    uint16_t bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(0.0f), "f"(x));
    return fp8{uint8_t(bits)};
}
DEVICE float from_fp8(fp8 x) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(x.bits)));
    return from_f16(f16{uint16_t(halves)});
}
#else
#include "fp8.cuh"
#endif

// Widen the two bytes (E4M3) in the low half of a word. Exact.
#if __CUDA_ARCH__ >= 890
DEVICE uint32_t unpack_fp8_f16(uint32_t two) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(two)));
    return halves;
}
DEVICE uint32_t unpack_fp8_bf16(uint32_t two) {
    uint32_t halves = unpack_fp8_f16(two);
    return pack_bf16(from_f16(f16{uint16_t(halves)}), from_f16(f16{uint16_t(halves >> 16)}));
}
#else
// Moves the bits into place and multiplies by a power of two for the difference of the exponents' biases. A byte whose bits
// are all ones, apart from the sign, is NaN.
DEVICE uint32_t unpack_fp8_f16(uint32_t two) {
    uint32_t spread = (two & 0xff) | (two & 0xff00) << 8, magnitude = spread & 0x007f007f;
    uint32_t nan = ((magnitude + 0x00010001) >> 7 & 0x00010001) * 0x7fff;
    uint32_t bits = (spread & 0x00800080) << 8 | magnitude << 7, widened;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(widened) : "r"(bits), "r"(0x5c005c00));
    return widened | nan;
}
DEVICE uint32_t unpack_fp8_bf16(uint32_t two) {
    uint32_t spread = (two & 0xff) | (two & 0xff00) << 8, magnitude = spread & 0x007f007f;
    uint32_t nan = ((magnitude + 0x00010001) >> 7 & 0x00010001) * 0x7fff;
    uint32_t bits = (spread & 0x00800080) << 8 | magnitude << 4, widened;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(widened) : "r"(bits), "r"(0x7b807b80), "r"(0x80008000));
    return widened | nan;
}
#endif

// ---- threads

DEVICE void block_barrier() { __syncthreads(); }
// Waits at barrier `id` (1 to 15) until `threads` threads have arrived.
DEVICE void named_barrier(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE float shuffle_xor(float x, uint32_t mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, uint32_t mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
DEVICE int32_t shuffle_xor(int32_t x, uint32_t mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
DEVICE uint64_t shuffle_xor(uint64_t x, uint32_t mask) { return __shfl_xor_sync(ALL_LANES, static_cast<unsigned long long>(x), mask); }
DEVICE float shuffle(float x, uint32_t source) { return __shfl_sync(ALL_LANES, x, source); }
DEVICE uint32_t shuffle(uint32_t x, uint32_t source) { return __shfl_sync(ALL_LANES, x, source); }
DEVICE uint64_t shuffle(uint64_t x, uint32_t source) { return __shfl_sync(ALL_LANES, static_cast<unsigned long long>(x), source); }
// The value of the lane `delta` below this one. Lanes without such a lane keep their own value.
DEVICE uint32_t shuffle_up(uint32_t x, uint32_t delta) { return __shfl_up_sync(ALL_LANES, x, delta); }
DEVICE uint64_t shuffle_up(uint64_t x, uint32_t delta) { return __shfl_up_sync(ALL_LANES, static_cast<unsigned long long>(x), delta); }
DEVICE uint32_t votes(bool x) { return __ballot_sync(ALL_LANES, x); }
DEVICE uint32_t count_ones(uint32_t x) { return __popc(x); }
DEVICE uint32_t leading_zeros(uint32_t x) { return __clz(x); }
DEVICE uint32_t leading_zeros(uint64_t x) { return __clzll(static_cast<long long>(x)); }
DEVICE uint32_t trailing_zeros(uint32_t x) { return x == 0 ? 32 : __ffs(x) - 1; }

// Atomic operations in shared or global memory, for integers only. They return the old value.
DEVICE uint32_t atomic_add(uint32_t* to, uint32_t x) { return atomicAdd(to, x); }
DEVICE uint64_t atomic_add(uint64_t* to, uint64_t x) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}
DEVICE uint32_t atomic_max(uint32_t* to, uint32_t x) { return atomicMax(to, x); }
DEVICE uint64_t atomic_max(uint64_t* to, uint64_t x) {
    return atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(x));
}
// Makes this thread's writes to global memory visible to other blocks before its later ones.
DEVICE void global_fence() { __threadfence(); }
// The high half of a product.
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

// ---- overlapping launches (programmatic dependent launch). No effect on devices and launches without it.

// Waits until the previous kernel has ended. Nothing that it writes may be read before this.
DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allows the next kernel to start. It still waits for the end of this one at its grid_dependency_wait.
DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- memory

struct alignas(16) Bytes16 {
    uint32_t x, y, z, w;
};
// Loads data that is read only once and need not stay in the L1 cache.
DEVICE Bytes16 load_streaming(const void* from) {
    Bytes16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}
DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Copies 16 bytes from global to shared memory in the background. If not `valid`, writes zeros and does not read `from`.
DEVICE void async_copy_16(void* to, const void* from, bool valid) {
    uint32_t bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
DEVICE void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's committed groups are in flight. Other threads' copies also need a barrier.
template <int PENDING>
DEVICE void async_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- matrix instructions, executed by a whole warp. Fragments as in the PTX manual: with g = lane / 4 and t = lane % 4,
// A (row-major 16×16, two 16-bit elements a word): a0 = (g, 2t), a1 = (g + 8, 2t), a2 = (g, 2t + 8), a3 = (g + 8, 2t + 8);
// B (16×8): b0 = (2t, g), b1 = (2t + 8, g), consecutive k in one word; C (16×8): c0, c1 = (g, 2t), c2, c3 = (g + 8, 2t).

DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 16×32 by 32×8 signed bytes, four consecutive k in a word: a0 = (g, 4t), a1 = (g + 8, 4t), a2 = (g, 4t + 16),
// a3 = (g + 8, 4t + 16).
DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Whether this device has matrix instructions for 8-bit floats.
#define HAS_FP8_PRODUCTS (__CUDA_ARCH__ >= 890)
#if HAS_FP8_PRODUCTS
DEVICE void mma_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
// Loads four 8×8 matrices of 16-bit elements from shared memory. Lane i passes the address of row i % 8 (16 bytes) of matrix
// i / 8; register j of lane i gets word i % 4 of row i / 4 of matrix j.
DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// As load_matrix_x4, with each matrix transposed.
DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
