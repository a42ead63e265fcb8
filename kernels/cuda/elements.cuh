// Reads and writes several activation elements (f32, f16 or bf16) in one access.
#pragma once

#include "prelude.cuh"

struct alignas(8) Bytes8 {
    uint32_t x, y;
};

// Widen the low and the high element of a word.
DEVICE void widen_pair(uint32_t word, float& low, float& high, bf16) {
    low = uint_as_float(word << 16);
    high = uint_as_float(word & 0xffff0000u);
}
DEVICE void widen_pair(uint32_t word, float& low, float& high, f16) {
    low = from_f16(f16{uint16_t(word)});
    high = from_f16(f16{uint16_t(word >> 16)});
}
DEVICE uint32_t narrow_pair(float low, float high, bf16) { return pack_bf16(low, high); }
DEVICE uint32_t narrow_pair(float low, float high, f16) { return pack_f16(low, high); }

// Four elements: one access of 8 bytes, or of 16 for f32. `from` and `to` must be aligned to its size.
template <typename T>
DEVICE void load4(const T* from, float (&x)[4]) {
    Bytes8 v = *reinterpret_cast<const Bytes8*>(from);
    widen_pair(v.x, x[0], x[1], T{});
    widen_pair(v.y, x[2], x[3], T{});
}
DEVICE void load4(const float* from, float (&x)[4]) {
    Bytes16 v = *reinterpret_cast<const Bytes16*>(from);
    x[0] = uint_as_float(v.x), x[1] = uint_as_float(v.y), x[2] = uint_as_float(v.z), x[3] = uint_as_float(v.w);
}
template <typename T>
DEVICE void store4(T* to, const float (&x)[4]) {
    *reinterpret_cast<Bytes8*>(to) = Bytes8{narrow_pair(x[0], x[1], T{}), narrow_pair(x[2], x[3], T{})};
}
DEVICE void store4(float* to, const float (&x)[4]) {
    *reinterpret_cast<Bytes16*>(to) =
        Bytes16{float_as_uint(x[0]), float_as_uint(x[1]), float_as_uint(x[2]), float_as_uint(x[3])};
}
DEVICE void store4(fp8* to, const float (&x)[4]) {
    uint32_t word = 0;
    UNROLL
    for (uint32_t i = 0; i < 4; i++) word |= uint32_t(to_fp8(x[i]).bits) << (8 * i);
    *reinterpret_cast<uint32_t*>(to) = word;
}

// Eight elements: one access of 16 bytes, or two for f32.
template <typename T>
DEVICE void load8(const T* from, float (&x)[8]) {
    Bytes16 v = *reinterpret_cast<const Bytes16*>(from);
    widen_pair(v.x, x[0], x[1], T{});
    widen_pair(v.y, x[2], x[3], T{});
    widen_pair(v.z, x[4], x[5], T{});
    widen_pair(v.w, x[6], x[7], T{});
}
DEVICE void load8(const float* from, float (&x)[8]) {
    float low[4], high[4];
    load4(from, low);
    load4(from + 4, high);
    UNROLL
    for (uint32_t i = 0; i < 4; i++) x[i] = low[i], x[i + 4] = high[i];
}
template <typename T>
DEVICE void store8(T* to, const float (&x)[8]) {
    *reinterpret_cast<Bytes16*>(to) = Bytes16{narrow_pair(x[0], x[1], T{}), narrow_pair(x[2], x[3], T{}),
                                              narrow_pair(x[4], x[5], T{}), narrow_pair(x[6], x[7], T{})};
}
DEVICE void store8(float* to, const float (&x)[8]) {
    float low[4], high[4];
    UNROLL
    for (uint32_t i = 0; i < 4; i++) low[i] = x[i], high[i] = x[i + 4];
    store4(to, low);
    store4(to + 4, high);
}
DEVICE void store8(fp8* to, const float (&x)[8]) {
    uint32_t words[2] = {0, 0};
    UNROLL
    for (uint32_t i = 0; i < 8; i++) words[i / 4] |= uint32_t(to_fp8(x[i]).bits) << (8 * (i % 4));
    *reinterpret_cast<Bytes8*>(to) = Bytes8{words[0], words[1]};
}
