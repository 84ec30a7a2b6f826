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

// Bits of the largest finite |x| among n values, 0 if there is none. Magnitudes order like their bits, and signed
// comparisons are the ones that every instruction set has.
inline uint32_t f32_amax_finite(const float * x, int n) {
    int32_t amax = 0;
    for (int i = 0; i < n; i++) {
        const int32_t mag = (int32_t) (f32_to_bits(x[i]) & ~F32_SIGN);
        const int32_t finite = mag < (int32_t) F32_INF ? mag : 0;
        amax = amax > finite ? amax : finite;
    }
    return (uint32_t) amax;
}

inline float f32_from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

// condition ? a : b without a branch. The compiler may not evaluate a floating-point operation that the program skips
// (it might trap), so it turns `condition ? a : b` over their results into jumps, and the loop stays scalar.
inline uint32_t select(bool condition, uint32_t a, uint32_t b) {
    const uint32_t mask = 0u - (uint32_t) condition;
    return (a & mask) | (b & ~mask);
}

} // namespace dsv4_codec
