// E8M0 scales of the OCP MX formats: one byte e stands for 2^(e-127), 255 for NaN. Owns the two readings of the
// byte, full (bias 127) and half (bias 128), that GGUF block types use; leaves the blocks to f8-e4m3-b128.h and
// mxfp4.h.

#pragma once

#include "f32-bits.h"

namespace dsv4_codec {

constexpr uint8_t E8M0_NAN = 255;

// 2^(e-127). e = 0 is the float32 subnormal 2^-127, which `e << 23` would turn into zero.
inline float e8m0_to_f32(uint8_t e) {
    uint32_t bits = (uint32_t) e << 23;
    bits = e == 0        ? 0x00400000u : bits;
    bits = e == E8M0_NAN ? F32_QNAN    : bits;
    return f32_from_bits(bits);
}

// 2^(e-128), the factor of the doubled E2M1 values of MXFP4. Both e = 0 and e = 1 are subnormal.
inline float e8m0_to_f32_half(uint8_t e) {
    if (e == E8M0_NAN) {
        return f32_from_bits(F32_QNAN);
    }
    return f32_from_bits(e < 2 ? 0x00200000u << e : (uint32_t) (e - 1) << 23);
}

// Returns false, leaving *e alone, unless x is a power of two in 2^-127 .. 2^127. Never rounds: the scales that
// are encoded here come from files that claim to hold powers of two, and a rounded scale is a wrong tensor.
inline bool e8m0_from_f32(float x, uint8_t * e) {
    const uint32_t bits = f32_to_bits(x);
    if (bits == 0x00400000u) {
        *e = 0;
        return true;
    }
    if ((bits & 0x007FFFFFu) != 0 || bits == 0 || bits >= F32_INF) { // a set sign bit is >= F32_INF as well
        return false;
    }
    *e = (uint8_t) (bits >> 23);
    return true;
}

} // namespace dsv4_codec
