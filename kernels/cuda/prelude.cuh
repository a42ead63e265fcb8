// Included by every kernel source: number types, arithmetic, warps, barriers, asynchronous copies, matrix instructions.
// Under nvcc these are the device's own (device.cuh). When compiled for the host, emulation/host.h implements them with the
// same results.
//
// A kernel takes one argument, a struct of plain data that Rust mirrors with #[repr(C)]:
//
//     struct ScaleParams { float* out; const float* in; float factor; uint32_t len; };
//     KERNEL(scale, ScaleParams, 256) {
//         grid_dependency_wait();
//         uint32_t i = blockIdx.x * 256 + threadIdx.x;
//         if (i < p.len) p.out[i] = p.in[i] * p.factor;
//     }
//
// Rules that keep results the same on every device and in the emulator: products and sums are not contracted (-fmad=false;
// write fma_() for a single rounding), reductions use the fixed trees below, and there are no atomics on floats.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
// The number of positions whose attention scores are reduced together, whatever the block size. The same as on the CPU.
constexpr uint32_t STRETCH = 64;

struct alignas(2) bf16 {
    uint16_t bits;
};
struct alignas(2) f16 {
    uint16_t bits;
};
// E4M3 (arXiv 2209.05433): four exponent bits, three mantissa bits, no infinities.
struct alignas(1) fp8 {
    uint8_t bits;
};
// The driver's description of a matrix in device memory for the bulk copy engine.
struct alignas(64) TensorMap {
    unsigned char encoded[128];
};

#ifdef __CUDACC__
#include "device.cuh"
#include "hopper.cuh"
#else
#include "emulation/host.h"
#endif

// Conversions. Narrowing rounds to nearest, ties to even; fp8 saturates.
template <typename T>
DEVICE T narrow(float x);
template <>
DEVICE float narrow<float>(float x) { return x; }
template <>
DEVICE bf16 narrow<bf16>(float x) { return to_bf16(x); }
template <>
DEVICE f16 narrow<f16>(float x) { return to_f16(x); }
template <>
DEVICE fp8 narrow<fp8>(float x) { return to_fp8(x); }

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float widen(f16 x) { return from_f16(x); }
DEVICE float widen(fp8 x) { return from_fp8(x); }

// e^x to 2 ulp, and 0 below -87. The same bits as in the CPU kernels (kernels/src/simd/mod.rs).
DEVICE float exact_exp(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    clamped = clamped > 88.0f ? 88.0f : clamped;
    float n = round_even(clamped * 1.44269504088896340736f);
    float r = fma_(n, -0.693359375f, clamped);
    r = fma_(n, 2.12194440e-4f, r);
    float p = 1.3888889e-3f;
    p = fma_(p, r, 8.333334e-3f);
    p = fma_(p, r, 4.1666668e-2f);
    p = fma_(p, r, 1.6666667e-1f);
    p = fma_(p, r, 0.5f);
    p = fma_(p, r, 1.0f);
    p = fma_(p, r, 1.0f);
    float value = p * uint_as_float(uint32_t(int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : value;
}

// Reductions over the whole warp, in a fixed tree. Every lane gets the result.
template <typename T>
DEVICE T warp_sum(T x) {
    for (uint32_t offset = 16; offset > 0; offset /= 2) x = x + shuffle_xor(x, offset);
    return x;
}
DEVICE float warp_max(float x) {
    for (uint32_t offset = 16; offset > 0; offset /= 2) x = max_(x, shuffle_xor(x, offset));
    return x;
}

// The sum over a block of WARPS whole warps, in a fixed tree. Every thread gets the result. Ends with a barrier, so that
// `scratch` may be reused.
template <uint32_t WARPS>
DEVICE float block_sum(float x, float (&scratch)[WARPS]) {
    x = warp_sum(x);
    if (lane() == 0) scratch[warp()] = x;
    block_barrier();
    float total = 0.0f;
    for (uint32_t i = 0; i < WARPS; i++) total = total + scratch[i];
    block_barrier();
    return total;
}
