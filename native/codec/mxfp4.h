// Rows of MXFP4, the GGUF block type of the routed experts: 17 bytes for 32 values,
//     byte 0          E8M0 scale e
//     byte 1+j, j<16  E2M1 codes: low nibble = value j, high nibble = value j+16
// Owns decode, encode with ggml's bytes, and the 1:1 repack from and to the checkpoint's order (byte i of a row: low
// nibble = value 2i, high nibble = value 2i+1). Leaves threads and argument checks to its callers.

#pragma once

#include "e2m1.h"
#include "e8m0.h"

#include <cmath>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the repack writes pairs of bytes as little-endian words, like everything in a GGUF file"
#endif

namespace dsv4_codec {

constexpr int MXFP4_N     = 32; // values per block
constexpr int MXFP4_BYTES = 17;

// blocks: (n_blocks, 17) -> y: (n_blocks, 32). y = E2M1(code) * 2^(e-127), computed from doubled values and the
// halved scale as ggml does; exact except where it overflows (e = 253 from |4| on, e = 254 from |2| on). Code 8 gives
// +0 as in ggml. e = 255 makes the whole block NaN, where ggml multiplies by 2^127.
inline void mxfp4_decode_row(const uint8_t * __restrict blocks, float * __restrict y, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const float half = e8m0_to_f32_half(blocks[0]);
        for (int j = 0; j < MXFP4_N/2; j++) {
            y[j]             = (float) E2M1_DOUBLED[blocks[1 + j] & 15] * half;
            y[j + MXFP4_N/2] = (float) E2M1_DOUBLED[blocks[1 + j] >> 4] * half;
        }
        blocks += MXFP4_BYTES;
        y      += MXFP4_N;
    }
}

// ggml's rule: e = floor(log2(amax)) - 2 + 127 with float32 log2. That function rounds up to k for values just below
// 2^k (large |k|), so integer arithmetic would give other bytes there; the libm's own log2f is part of the rule.
// Results below 0, which ggml converts to a byte with undefined behaviour, become 0.
inline uint8_t mxfp4_scale(float amax) {
    if (amax <= 0.0f) {
        return 0;
    }
    const int e = (int) std::floor(std::log2(amax)) - 2 + 127;
    return (uint8_t) (e < 0 ? 0 : e);
}

// x: (n_blocks, 32) -> blocks: (n_blocks, 17), byte for byte what ggml's quantize_row_mxfp4_ref writes for finite
// input with amax = 0 or amax >= 2^-125. It picks the nearest code by trying all 16 in order, so a tie goes to the
// smaller magnitude and negative values that round to zero get code 0; the comparisons below say the same.
// Non-finite input: NaN becomes code 0 as in ggml; infinities do not influence the scale and become the largest finite
// value it allows.
inline void mxfp4_encode_row(const float * __restrict x, uint8_t * __restrict blocks, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const uint8_t e = mxfp4_scale(f32_from_bits(f32_amax_finite(x, MXFP4_N)));
        const float   d = e8m0_to_f32_half(e); // at most 2^125

        // midpoints in units of d; for d = 2^125 the values 8d and 12d are infinite and never the nearest
        const float t0 = 0.5f*d, t1 = 1.5f*d, t2 = 2.5f*d, t3 = 3.5f*d, t4 = 5.0f*d;
        const float t5 = e == 253 ? f32_from_bits(F32_INF) : 7.0f*d;
        const float t6 = 10.0f*d;

        uint8_t codes[MXFP4_N];
        for (int j = 0; j < MXFP4_N; j++) {
            const uint32_t bits = f32_to_bits(x[j]);
            const float    mag  = f32_from_bits(bits & ~F32_SIGN); // all comparisons are false for NaN
            const int      code = (mag > t0) + (mag > t1) + (mag > t2) + (mag > t3)
                                + (mag > t4) + (mag > t5) + (mag > t6);
            const uint32_t sign = code != 0 ? bits >> 28 & 8 : 0;
            codes[j] = (uint8_t) (sign | (uint32_t) code);
        }

        blocks[0] = e;
        for (int j = 0; j < MXFP4_N/2; j++) {
            blocks[1 + j] = (uint8_t) (codes[j] | codes[j + MXFP4_N/2] << 4);
        }
        blocks += MXFP4_BYTES;
        x      += MXFP4_N;
    }
}

// weight: (n_blocks, 16) in checkpoint order, scales: (n_blocks) -> blocks: (n_blocks, 17). The scale byte is copied.
// With a = byte k and b = byte k+8 of the checkpoint (values 2k, 2k+1 and 2k+16, 2k+17), bytes 2k and 2k+1 of the
// block are low(a) | low(b) << 4 and high(a) | high(b) << 4: one 16-bit word, which is what makes the loop vectorise.
inline void mxfp4_pack_row(
        const uint8_t * __restrict weight, const uint8_t * __restrict scales, uint8_t * __restrict blocks,
        int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        uint16_t q[MXFP4_N/4];
        for (int k = 0; k < MXFP4_N/4; k++) {
            const int a = weight[k];
            const int b = weight[k + 8];
            q[k] = (uint16_t) (((a | a << 4) & 0x0F0F) | ((b << 4 | b << 8) & 0xF0F0));
        }
        blocks[0] = scales[i];
        std::memcpy(blocks + 1, q, sizeof(q));
        weight += MXFP4_N/2;
        blocks += MXFP4_BYTES;
    }
}

// The inverse of mxfp4_pack_row.
inline void mxfp4_unpack_row(
        const uint8_t * __restrict blocks, uint8_t * __restrict weight, uint8_t * __restrict scales, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        uint16_t q[MXFP4_N/4];
        std::memcpy(q, blocks + 1, sizeof(q));
        scales[i] = blocks[0];
        for (int k = 0; k < MXFP4_N/4; k++) {
            weight[k]     = (uint8_t) ((q[k]      & 0x0F) | (q[k] >> 4 & 0xF0));
            weight[k + 8] = (uint8_t) ((q[k] >> 4 & 0x0F) | (q[k] >> 8 & 0xF0));
        }
        weight += MXFP4_N/2;
        blocks += MXFP4_BYTES;
    }
}

} // namespace dsv4_codec
