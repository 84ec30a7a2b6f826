// E2M1, the 4-bit float of FP4 weights: sign, 2 exponent bits, 1 mantissa bit; 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
// negatives, no infinity, no NaN. Owns the conversion of single codes (one per byte, low nibble); leaves packing
// into nibbles to mxfp4.h.

#pragma once

#include "f32-bits.h"

namespace dsv4_codec {

// Twice the value of each code, so that they are integers. Code 8 is -0, which an integer cannot say.
constexpr int8_t E2M1_DOUBLED[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

// Exact; code 8 gives -0. The high nibble must be zero.
inline float e2m1_to_f32(uint8_t code) {
    const uint32_t sign = (uint32_t) (code & 8) << 28;
    return f32_from_bits(sign | f32_to_bits(0.5f * (float) E2M1_DOUBLED[code & 7]));
}

// Nearest code, ties to even (the code with a zero mantissa bit), saturating to +-6; the sign of zero is kept.
// x must not be NaN, which has no code.
inline uint8_t e2m1_from_f32(float x) {
    const uint32_t bits = f32_to_bits(x);
    const float    mag  = f32_from_bits(bits & ~F32_SIGN);

    // one comparison per midpoint; > where the lower neighbour is even, >= where the upper one is
    const int code = (mag >  0.25f) + (mag >= 0.75f) + (mag > 1.25f) + (mag >= 1.75f)
                   + (mag >  2.5f)  + (mag >= 3.5f)  + (mag > 5.0f);
    return (uint8_t) ((bits >> 28 & 8) | (uint32_t) code);
}

} // namespace dsv4_codec
