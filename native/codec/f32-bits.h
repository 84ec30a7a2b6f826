// The bit view of float32 that every codec here is written with. Owns the guard against value-changing compiler
// flags: subnormals, signed zeros and NaN are part of the formats. Leaves the formats to the other headers.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FAST_MATH__) || defined(_M_FP_FAST)
#error "the codecs need IEEE arithmetic: compile without -ffast-math (/fp:fast)"
#endif

namespace dsv4_codec {

constexpr uint32_t F32_SIGN = 0x80000000u;
constexpr uint32_t F32_INF  = 0x7F800000u; // magnitudes above this are NaN
constexpr uint32_t F32_QNAN = 0x7FC00000u;

inline uint32_t f32_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline float f32_from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

} // namespace dsv4_codec
