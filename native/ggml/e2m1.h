// E2M1, the 4-bit codes of MXFP4: sign, 2 bits of exponent, 1 of mantissa; 0, 0.5, 1, 1.5, 2, 3, 4, 6.

#pragma once

#include <stdint.h>
#include <string.h>

// code < 16. Selects by masks for the reason given at dsv4_e4m3_to_f32. Codes 0 and 1 are (1 + code/2) less 1.
static inline float dsv4_e2m1_to_f32(uint8_t code) {
    const uint32_t sign   = (uint32_t) (code & 8) << 28;
    const uint32_t mag    = code & 7;
    const uint32_t is_sub = mag < 2 ? 0xFFFFFFFFu : 0;

    uint32_t       bits        = (mag << 22) + (126u << 23) + (is_sub & (1u << 23));
    const uint32_t offset_bits = is_sub & 0x3F800000u; // 1.0

    float x;
    float offset;
    memcpy(&x, &bits, sizeof(x));
    memcpy(&offset, &offset_bits, sizeof(offset));
    x -= offset;

    memcpy(&bits, &x, sizeof(bits));
    bits |= sign;
    memcpy(&x, &bits, sizeof(x));
    return x;
}
