// Shared by the kernels over whole rows: one block processes a row, and thread t the vectors t, t + 256, ….
#pragma once

#include "elements.cuh"

constexpr uint32_t ROW_THREADS = 256;
constexpr uint32_t ROW_WARPS = ROW_THREADS / WARP;
// The largest FP8 number.
constexpr float FP8_MAX = 448.0f;
// If all values of a row are at most this large, they become zero, since their inverse scale would overflow.
constexpr float NEGLIGIBLE = 1e-30f;

struct Fp8Scale {
    // A value times `inverse` gives its FP8 form; the FP8 form times `scale` gives the value. `scale` is NaN if the row has a
    // value that is not finite.
    float inverse, scale;
};

// The scale of a row whose largest absolute value has these bits. Bits of absolute values are ordered like the values, with
// NaN last.
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
