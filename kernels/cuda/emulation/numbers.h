// Number types and arithmetic, exactly as in IEEE 754 and the conversion instructions.
#pragma once

#include <math.h>
#include <string.h>

DEVICE float uint_as_float(uint32_t x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE uint32_t float_as_uint(float x) {
    uint32_t y;
    memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE float fma_(float a, float b, float c) { return fmaf(a, b, c); }
// The maximum of a number and a NaN is the number.
DEVICE float max_(float a, float b) { return fmaxf(a, b); }
DEVICE float round_even(float x) { return rintf(x); }
DEVICE double ceiling(double x) { return ceil(x); }
DEVICE uint64_t round_to_u64(float x) { return uint64_t(rint(double(x))); }
DEVICE float sqrt_(float x) { return sqrtf(x); }
DEVICE float divide(float a, float b) { return a / b; }
// Flushes subnormal results to zero, as the instruction does.
DEVICE float fast_exp2(float x) {
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

DEVICE bf16 to_bf16(float x) {
    uint32_t bits = float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bf16{0x7fff};
    return bf16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
DEVICE f16 to_f16(float x) {
    uint32_t bits = float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return f16{0x7fff};
    if (magnitude >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};
    if (magnitude < 0x38800000) {  // below 2^-14: subnormal, a multiple of 2^-24
        return f16{uint16_t(sign | uint32_t(rintf(uint_as_float(magnitude) * 16777216.0f)))};
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return f16{uint16_t(sign | ((rounded >> 13) - (112 << 10)))};
}
DEVICE float from_f16(f16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    if (exponent == 31) return uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return uint_as_float(sign | float_as_uint(float(mantissa) * 5.9604644775390625e-8f));
    return uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
DEVICE uint32_t pack_bf16(float low, float high) { return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16; }
DEVICE uint32_t pack_f16(float low, float high) { return to_f16(low).bits | uint32_t(to_f16(high).bits) << 16; }
#include "../fp8.cuh"

// Widen the two bytes (E4M3) in the low half of a word. Exact.
DEVICE uint32_t unpack_fp8_f16(uint32_t two) {
    return pack_f16(from_fp8(fp8{uint8_t(two)}), from_fp8(fp8{uint8_t(two >> 8)}));
}
DEVICE uint32_t unpack_fp8_bf16(uint32_t two) {
    return pack_bf16(from_fp8(fp8{uint8_t(two)}), from_fp8(fp8{uint8_t(two >> 8)}));
}

DEVICE uint32_t count_ones(uint32_t x) { return uint32_t(__builtin_popcount(x)); }
DEVICE uint32_t leading_zeros(uint32_t x) { return x == 0 ? 32 : uint32_t(__builtin_clz(x)); }
DEVICE uint32_t leading_zeros(uint64_t x) { return x == 0 ? 64 : uint32_t(__builtin_clzll(x)); }
DEVICE uint32_t trailing_zeros(uint32_t x) { return x == 0 ? 32 : uint32_t(__builtin_ctz(x)); }
DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)(a) * b >> 64); }
