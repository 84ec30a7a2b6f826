// E4M3FN, the 8-bit float of FP8 weights: sign, 4 exponent bits (bias 7), 3 mantissa bits, subnormals, no infinity,
// NaN at 0x7F and 0xFF, largest value 448. Owns the conversion of single codes; leaves scales and blocks to
// f8-e4m3-b128.h. Written without branches so that loops over it vectorise.

#pragma once

#include "f32-bits.h"

namespace dsv4_codec {

constexpr uint8_t E4M3_MAX = 0x7E; // 448
constexpr uint8_t E4M3_NAN = 0x7F;

// Exact for every code; the sign of zero and of NaN is kept.
inline float e4m3_to_f32(uint8_t code) {
    const uint32_t sign = (uint32_t) (code & 0x80) << 24;
    const uint32_t mag  = code & 0x7F;

    const uint32_t normal    = (mag << 20) + (120u << 23);                // exponent bias 7 -> 127
    const uint32_t subnormal = f32_to_bits((float) (int32_t) mag * 0x1p-9f); // M * 2^-9, and zero

    uint32_t bits = select(mag < 8, subnormal, normal);
    bits = select(mag == E4M3_NAN, F32_QNAN, bits);
    return f32_from_bits(sign | bits);
}

// Nearest code, ties to even, as torch, ml_dtypes and the hardware casts round, but saturating: everything above
// 448, infinities included, becomes +-448. NaN becomes 0x7F with its sign. Needs the rounding mode "to nearest".
inline uint8_t e4m3_from_f32(float x) {
    const uint32_t bits = f32_to_bits(x);
    const uint32_t sign = (bits >> 24) & 0x80;
    const uint32_t mag  = bits & ~F32_SIGN;

    // keep 3 of 23 mantissa bits; the carry of the rounding may move on into the exponent, which is right
    uint32_t normal = ((mag + 0x0007FFFFu + ((mag >> 20) & 1)) >> 20) - (120u << 3);
    normal = select(mag > 0x43E00000u, E4M3_MAX, normal); // 448.0f

    // below 2^-6 the codes are 2^-9 apart, as are the float32 values next to 2^14: the addition rounds
    const uint32_t subnormal = f32_to_bits(f32_from_bits(mag) + 0x1p14f) - f32_to_bits(0x1p14f);

    uint32_t code = select(mag < 0x3C800000u, subnormal, normal); // 2^-6
    code = select(mag > F32_INF, E4M3_NAN, code);
    return (uint8_t) (sign | code);
}

} // namespace dsv4_codec
