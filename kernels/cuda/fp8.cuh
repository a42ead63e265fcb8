// Conversions to and from E4M3 by integer arithmetic, for the host and for devices without the conversion instructions.
// The results are the same as those of the instructions.
#pragma once

DEVICE fp8 to_fp8(float x) {
    uint32_t bits = float_as_uint(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return fp8{uint8_t(0x7f)};
    if (magnitude >= 0x43e00000) return fp8{uint8_t(sign | 0x7e)};
    if (magnitude < 0x3c800000) {  // below 2^-6: subnormal, a multiple of 2^-9
        return fp8{uint8_t(sign | uint32_t(round_even(uint_as_float(magnitude) * 512.0f)))};
    }
    uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
    return fp8{uint8_t(sign | ((rounded >> 20) - (120 << 3)))};
}
DEVICE float from_fp8(fp8 x) {
    uint32_t sign = uint32_t(x.bits & 0x80) << 24, exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
    if ((x.bits & 0x7f) == 0x7f) return uint_as_float(0x7fffffff);
    if (exponent == 0) return uint_as_float(sign | float_as_uint(float(mantissa) * 0.001953125f));
    return uint_as_float(sign | (exponent + 120) << 23 | mantissa << 20);
}
