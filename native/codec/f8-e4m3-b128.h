// Rows of F8_E4M3_B128, the GGUF block type of the native file's dense weights: 129 bytes for 128 values,
//     byte 0        E8M0 scale e, 2^(e-127)
//     byte 1 .. 128 E4M3FN codes, in order
// Owns decode, encode, the 1:1 repack from and to the checkpoint's separate codes and scales, and the search for
// bytes that stand for NaN. Leaves threads and argument checks to its callers. Blocks are unaligned: byte access only.

#pragma once

#include "e4m3.h"
#include "e8m0.h"

namespace dsv4_codec {

constexpr int F8_E4M3_B128_N     = 128; // values per block
constexpr int F8_E4M3_B128_BYTES = 129;
constexpr int F8_TILE_ROWS       = 128; // the checkpoint has one scale per tile of 128 rows and 128 columns

// blocks: (n_blocks, 129) -> y: (n_blocks, 128). y = E4M3(code) * 2^(e-127), exact except that large products
// (e >= 247) overflow to infinity. e = 255 makes the whole block NaN.
inline void f8_e4m3_b128_decode_row(const uint8_t * __restrict blocks, float * __restrict y, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const float scale = e8m0_to_f32(blocks[0]);
        for (int k = 0; k < F8_E4M3_B128_N; k++) {
            y[k] = e4m3_to_f32(blocks[1 + k]) * scale;
        }
        blocks += F8_E4M3_B128_BYTES;
        y      += F8_E4M3_B128_N;
    }
}

// The smallest e with amax <= 448 * 2^(e-127), at least 0. amax: bits of a finite float32 >= 0.
// 448 = 1.75 * 2^8, so this is the exponent field less 8, plus one if the mantissa exceeds .75; amax = 448*2^k gives
// exactly k + 127, where a rounded log2 may give one more. Subnormal amax gives 0 like everything below 2^-119.
inline uint8_t f8_e4m3_b128_scale(uint32_t amax) {
    const int e = (int) (amax >> 23) - 8 + ((amax & 0x007FFFFFu) > 0x00600000u);
    return (uint8_t) (e < 0 ? 0 : e);
}

// x: (n_blocks, 128) -> blocks: (n_blocks, 129). The scale covers the largest finite |x|; codes round to nearest,
// ties to even. Non-finite input does not influence the scale: NaN becomes a NaN code with its sign, infinities
// become +-448 times the scale.
inline void f8_e4m3_b128_encode_row(const float * __restrict x, uint8_t * __restrict blocks, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const uint8_t e = f8_e4m3_b128_scale(f32_amax_finite(x, F8_E4M3_B128_N));

        // e <= 247, so the factor is a normal number and the product exact, or so small that its code is 0
        const float inv_scale = f32_from_bits((uint32_t) (254 - e) << 23);

        blocks[0] = e;
        for (int k = 0; k < F8_E4M3_B128_N; k++) {
            blocks[1 + k] = e4m3_from_f32(x[k] * inv_scale);
        }
        blocks += F8_E4M3_B128_BYTES;
        x      += F8_E4M3_B128_N;
    }
}

// One row. codes: (n_blocks, 128), scales: (n_blocks), the tile scales of that row -> blocks: (n_blocks, 129).
inline void f8_e4m3_b128_pack_row(
        const uint8_t * __restrict codes, const uint8_t * __restrict scales, uint8_t * __restrict blocks,
        int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        blocks[0] = scales[i];
        std::memcpy(blocks + 1, codes, F8_E4M3_B128_N);
        blocks += F8_E4M3_B128_BYTES;
        codes  += F8_E4M3_B128_N;
    }
}

// One row of codes back. Returns the first block whose scale byte differs from scales[i], or -1. Codes are complete
// only if it returns -1.
inline int64_t f8_e4m3_b128_unpack_row(
        const uint8_t * __restrict blocks, const uint8_t * __restrict scales, uint8_t * __restrict codes,
        int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        if (blocks[0] != scales[i]) {
            return i;
        }
        std::memcpy(codes, blocks + 1, F8_E4M3_B128_N);
        blocks += F8_E4M3_B128_BYTES;
        codes  += F8_E4M3_B128_N;
    }
    return -1;
}

// NaN codes among the 128 of one block.
inline int f8_e4m3_b128_count_nan(const uint8_t * block) {
    int n = 0;
    for (int k = 0; k < F8_E4M3_B128_N; k++) {
        n += (block[1 + k] & 0x7F) == E4M3_NAN;
    }
    return n;
}

} // namespace dsv4_codec
