// F8_E4M3_B128, tensor type 42 of the native file: 128 weights in 129 bytes, an E8M0 scale and 128 E4M3FN codes. Owns
// the block layout, the conversion of single codes and scales, and the row functions that ggml's type tables point to.
// Leaves dot products to cpu/f8-e4m3-b128-cpu.h and the recognition of the type in files to gguf-type42.h.
//
// Called from ggml.c (type_traits, ggml_quantize_chunk), ggml-quants.c (ggml_validate_row_data) and ggml-cpu.c.

#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__)
#error "FP8 needs IEEE arithmetic, subnormals and NaN are part of it: compile without -ffast-math"
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define QK_F8_E4M3_B128 128

// value k = E4M3FN(qs[k]) * 2^(e-127). Blocks are odd-sized and unaligned.
typedef struct {
    uint8_t e;                   // E8M0, 255 = NaN
    uint8_t qs[QK_F8_E4M3_B128]; // (128) codes along ne0
} block_f8_e4m3_b128;

#ifdef __cplusplus
static_assert(sizeof(block_f8_e4m3_b128) == 129, "the block must have no padding");
#else
_Static_assert(sizeof(block_f8_e4m3_b128) == 129, "the block must have no padding");
#endif

// Exact for every code; 0x7F and 0xFF are NaN, there is no infinity. Selects by integer masks and computes its one
// float operation for every code, because a compiler may not vectorise what it would have to compute conditionally.
// A subnormal M*2^-9 is (1 + M/8) * 2^-6 less 2^-6. Reading the bits as a scaled float32 would be shorter, but a
// subnormal operand costs a microcode assist, and becomes zero where the process flushes subnormals.
static inline float dsv4_e4m3_to_f32(uint8_t code) {
    const uint32_t sign = (uint32_t) (code & 0x80) << 24;
    const uint32_t mag  = code & 0x7F;

    const uint32_t is_sub = mag < 8     ? 0xFFFFFFFFu : 0;
    const uint32_t is_nan = mag == 0x7F ? 0xFFFFFFFFu : 0;

    uint32_t bits = (mag << 20) + (120u << 23); // exponent bias 7 -> 127
    bits += is_sub & (1u << 23);
    bits |= is_nan & 0x7FC00000u;
    const uint32_t offset_bits = is_sub & 0x3C800000u; // 2^-6

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

// Nearest code, ties to even, saturating at +-448; NaN keeps its sign. Needs the rounding mode "to nearest". Masks as
// above.
static inline uint8_t dsv4_e4m3_from_f32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint32_t sign = (bits >> 24) & 0x80;
    const uint32_t mag  = bits & 0x7FFFFFFFu;

    // keep 3 of 23 mantissa bits; the carry of the rounding may move on into the exponent, which is right
    uint32_t code = ((mag + 0x0007FFFFu + ((mag >> 20) & 1)) >> 20) - (120u << 3);
    code = mag > 0x43E00000u ? 0x7Eu : code; // 448
    code = mag > 0x7F800000u ? 0x7Fu : code;

    // below 2^-6 codes are 2^-9 apart, as are the float32 values from 2^14 on: the addition rounds
    const uint32_t is_sub   = mag < 0x3C800000u ? 0xFFFFFFFFu : 0;
    const uint32_t sub_bits = mag & is_sub;
    float shifted;
    memcpy(&shifted, &sub_bits, sizeof(shifted));
    shifted += 0x1p14f;
    uint32_t sub;
    memcpy(&sub, &shifted, sizeof(sub));
    sub -= 0x46800000u; // bits of 2^14

    return (uint8_t) (sign | (sub & is_sub) | (code & ~is_sub));
}

// 2^(e-127), the full scale; MXFP4 halves it, this type does not. e = 0 is a float32 subnormal.
static inline float dsv4_e8m0_to_f32(uint8_t e) {
    uint32_t bits = (uint32_t) e << 23;
    bits = e == 0   ? 0x00400000u : bits;
    bits = e == 255 ? 0x7FC00000u : bits;

    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// Rows of k values, k a multiple of 128.
// y = code * scale, exact unless the product overflows to infinity (e >= 247)
GGML_API void dsv4_f8_e4m3_b128_dequantize_row(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
// The scale is the smallest power of two that brings the largest finite |x| to 448 or below.
GGML_API void dsv4_f8_e4m3_b128_quantize_row_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
// (nrows, n_per_row) values -> nrows rows of blocks; returns the bytes written. The importance matrix is not used.
GGML_API size_t dsv4_f8_e4m3_b128_quantize(
        const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
// false, with a log line, if a scale or a code of the nb blocks is NaN
GGML_API bool dsv4_f8_e4m3_b128_validate(const void * data, size_t nb);

#ifdef __cplusplus
}
#endif
