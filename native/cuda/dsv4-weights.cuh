// How kernels read weights: F8_E4M3_B128, MXFP4 and BF16 in the layouts of the file, at any alignment. Owns the decoding of
// codes and scales on the GPU; the readable reference is native/ggml/f8-e4m3-b128.h and native/ggml/e2m1.h.
//
// A row is a sequence of units, what one lane decodes at a time: 4 codes of FP8, 8 of FP4, 4 of BF16. Unit u of a row holds
// the weights k0(u) .. k0(u) + 3, and of FP4 also those 16 further. Decoded weights are without their scale: every
// code is exact in BF16, the scaled weight may not be.

#pragma once

#include "dsv4-device.cuh"

// 2^(e-127), as dsv4_e8m0_to_f32
static __device__ __forceinline__ float dsv4_cuda_e8m0(uint32_t e) {
    // 0, a subnormal, and 255, NaN, are the exponents' own bits with the first bit of the mantissa
    return __uint_as_float(e << 23 | (e - 1 >= 254 ? 0x00400000u : 0));
}

// 4 codes, the first in the lowest byte. Without the instruction: sign and magnitude move to their place in a float32,
// whose exponent is then 120 too small; the product that corrects it is exact, subnormals included.
template <bool has_cvt>
static __device__ __forceinline__ void dsv4_decode_e4m3x4(uint32_t codes, float (&w)[4]) {
    if constexpr (has_cvt) {
        dsv4_cvt_e4m3x2(codes & 0xFFFF, w[0], w[1]);
        dsv4_cvt_e4m3x2(codes >> 16,    w[2], w[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t top = (int32_t) (codes << (24 - 8*i)); // the code in the highest byte
            w[i] = __uint_as_float((uint32_t) (top >> 4) & 0x87F00000u) * 0x1p120f;
        }
        // 0x7F and 0xFF are NaN; they would have become 480
        if ((((codes & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) != 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                w[i] = (codes >> 8*i & 0x7F) == 0x7F ? __uint_as_float(0x7FC00000u) : w[i];
            }
        }
    }
}

// 4 codes of E2M1, code i in the bits 8*i .. 8*i + 3; the exponent is 126 too small before the product
static __device__ __forceinline__ void dsv4_decode_e2m1x4(uint32_t codes, float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t code = codes >> 8*i;
        w[i] = __uint_as_float((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
    }
}

struct dsv4_weights_f8 {
    static constexpr int UNIT  = 4;   // weights of a unit
    static constexpr int GROUP = 128; // weights that share a scale, 0: none
    static constexpr int BYTES = 129; // of a group
    static constexpr int STEP  = 516; // bytes from a unit to the 128th after it: whole words for every type

    struct raw { uint32_t codes; };

    static __device__ __forceinline__ int k0(int u) { return 4*u; }

    static __device__ __forceinline__ const uint8_t * codes_at(const uint8_t * row, int u) {
        return row + (int64_t) (u/32)*BYTES + 1 + u%32*4;
    }
    static __device__ __forceinline__ const uint8_t * scale_at(const uint8_t * row, int u) {
        return row + (int64_t) (u/32)*BYTES;
    }
    static __device__ __forceinline__ raw load(const uint8_t * row, int u) {
        return { dsv4_load_u32(codes_at(row, u)) };
    }
    static __device__ __forceinline__ float scale(const uint8_t * row, int u) {
        return dsv4_cuda_e8m0(*scale_at(row, u));
    }
    template <bool has_cvt>
    static __device__ __forceinline__ void decode(raw r, float (&w)[UNIT]) {
        dsv4_decode_e4m3x4<has_cvt>(r.codes, w);
    }
};

struct dsv4_weights_mxfp4 {
    static constexpr int UNIT  = 8;
    static constexpr int GROUP = 32;
    static constexpr int BYTES = 17;
    static constexpr int STEP  = 544;

    struct raw { uint32_t codes; };

    static __device__ __forceinline__ int k0(int u) { return u/4*32 + u%4*4; }

    static __device__ __forceinline__ const uint8_t * codes_at(const uint8_t * row, int u) {
        return row + (int64_t) (u/4)*BYTES + 1 + u%4*4;
    }
    static __device__ __forceinline__ const uint8_t * scale_at(const uint8_t * row, int u) {
        return row + (int64_t) (u/4)*BYTES;
    }
    static __device__ __forceinline__ raw load(const uint8_t * row, int u) {
        return { dsv4_load_u32(codes_at(row, u)) };
    }
    static __device__ __forceinline__ float scale(const uint8_t * row, int u) {
        return dsv4_cuda_e8m0(*scale_at(row, u));
    }
    template <bool has_cvt>
    static __device__ __forceinline__ void decode(raw r, float (&w)[UNIT]) {
        float half[4];
        dsv4_decode_e2m1x4(r.codes, half);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[i] = half[i];
        }
        dsv4_decode_e2m1x4(r.codes >> 4, half);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[4 + i] = half[i];
        }
    }
};

// Rows start at multiples of 8 bytes (dsv4_cuda_supports asks for it).
struct dsv4_weights_bf16 {
    static constexpr int UNIT  = 4;
    static constexpr int GROUP = 0;
    static constexpr int BYTES = 0;
    static constexpr int STEP  = 1024;

    struct raw { uint2 pairs; };

    static __device__ __forceinline__ int k0(int u) { return 4*u; }

    static __device__ __forceinline__ raw load(const uint8_t * row, int u) {
        return { *(const uint2 *) (row + (int64_t) u*8) };
    }
    static __device__ __forceinline__ float scale(const uint8_t *, int) {
        return 1.0f;
    }
    template <bool has_cvt>
    static __device__ __forceinline__ void decode(raw r, float (&w)[UNIT]) {
        w[0] = __uint_as_float(r.pairs.x << 16);
        w[1] = __uint_as_float(r.pairs.x & 0xFFFF0000u);
        w[2] = __uint_as_float(r.pairs.y << 16);
        w[3] = __uint_as_float(r.pairs.y & 0xFFFF0000u);
    }
};

// One lane's way along a row, 128 units at a time. Since a step is a multiple of 4 bytes, where the words lie and by how
// much they are shifted is found once: an iteration loads with fixed offsets.
template <typename W>
struct dsv4_cursor {
    const uint8_t * codes; // of the first unit, rounded down to a word
    const uint8_t * scales;
    uint32_t next;         // bytes to the word of the last code: 0 or 4
    uint32_t shift;

    static __device__ __forceinline__ dsv4_cursor at(const uint8_t * row, int u) {
        const uint8_t * p   = W::codes_at(row, u);
        const uint32_t  odd = (uint32_t) (uintptr_t) p & 3;
        return { p - odd, W::scale_at(row, u), odd ? 4u : 0u, 8*odd };
    }
    __device__ __forceinline__ typename W::raw load(int64_t offset) const {
        return { __funnelshift_r(*(const uint32_t *) (codes + offset), *(const uint32_t *) (codes + offset + next), shift) };
    }
    __device__ __forceinline__ float scale(int64_t offset) const {
        return dsv4_cuda_e8m0(scales[offset]);
    }
};

template <>
struct dsv4_cursor<dsv4_weights_bf16> {
    const uint8_t * pairs;

    static __device__ __forceinline__ dsv4_cursor at(const uint8_t * row, int u) {
        return { row + (int64_t) u*8 };
    }
    __device__ __forceinline__ dsv4_weights_bf16::raw load(int64_t offset) const {
        return { *(const uint2 *) (pairs + offset) };
    }
    __device__ __forceinline__ float scale(int64_t) const {
        return 1.0f;
    }
};
