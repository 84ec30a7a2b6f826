// Kernels for 64-bit ARM, whose NEON every such CPU has. A vector of 16 lanes is four registers.
//
// FP8: a code's bits, moved to their places in a float16 of the same value times 2^-8, convert in one instruction, subnormals
// included; the factor goes into the scale. Groups where that is not exact (NaN codes, scales near the end of the exponent)
// are rare and take a plain loop, in dot and decode alike. MXFP4: integers of twice the value from a table, halved as they convert.

#include "dsv4-kernels.h"

#include "../f8-e4m3-b128.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))

#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

enum { MXFP4_N = 32, MXFP4_BYTES = 17, MXFP4_BLOCKS = DSV4_GROUP/MXFP4_N, QUARTERS = 4 };

// block, four of its weights at a time
#define MXFP4_AT(v, l) 32*((l)/4) + 4*(v) + (l)%4
#define IN_PLACE(v, l) 16*(v) + (l)

static const uint8_t mxfp4_order[DSV4_GROUP] = DSV4_GROUP_ORDER(MXFP4_AT);
static const uint8_t in_place[DSV4_GROUP]    = DSV4_GROUP_ORDER(IN_PLACE);

struct group {
    float32x4_t w[DSV4_VECS][QUARTERS];
    float32x4_t d[QUARTERS];
};

// --- one group ---

static __attribute__((noinline)) void f8_plain(const uint8_t * x, struct group * g) {
    for (int v = 0; v < DSV4_VECS; v++) {
        for (int q = 0; q < QUARTERS; q++) {
            float w[4];
            for (int l = 0; l < 4; l++) {
                w[l] = dsv4_e4m3_to_f32(x[1 + v*DSV4_LANES + q*4 + l]);
            }
            g->w[v][q] = vld1q_f32(w);
        }
    }
    for (int q = 0; q < QUARTERS; q++) {
        g->d[q] = vdupq_n_f32(dsv4_e8m0_to_f32(x[0]));
    }
}

INLINE void f8_load(const uint8_t * x, struct group * g) {
    uint8x16_t max = vdupq_n_u8(0);
    for (int v = 0; v < DSV4_VECS; v++) {
        max = vmaxq_u8(max, vorrq_u8(vld1q_u8(x + 1 + v*DSV4_LANES), vdupq_n_u8(0x80)));
    }
    if (__builtin_expect(x[0] > 246 || vmaxvq_u8(max) == 0xFF, 0)) {
        f8_plain(x, g);
        return;
    }
    for (int v = 0; v < DSV4_VECS; v++) {
        const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(x + 1 + v*DSV4_LANES));
        const int16x8_t words[2] = { vshll_n_s8(vget_low_s8(codes), 7), vshll_high_n_s8(codes, 7) };
        for (int i = 0; i < 2; i++) {
            const float16x8_t half = vreinterpretq_f16_s16(vandq_s16(words[i], vdupq_n_s16((int16_t) 0xBFFF)));
            g->w[v][2*i]     = vcvt_f32_f16(vget_low_f16(half));
            g->w[v][2*i + 1] = vcvt_high_f32_f16(half);
        }
    }
    for (int q = 0; q < QUARTERS; q++) {
        g->d[q] = vreinterpretq_f32_u32(vdupq_n_u32((uint32_t) (x[0] + 8) << 23));
    }
}

// x: 4 blocks, 68 bytes
INLINE void mxfp4_load(const uint8_t * x, struct group * g) {
    static const int8_t twice[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };
    const int8x16_t table = vld1q_s8(twice);
    for (int b = 0; b < MXFP4_BLOCKS; b++) {
        const uint8_t  * block = x + b*MXFP4_BYTES;
        const uint8x16_t codes = vld1q_u8(block + 1);
        const int8x16_t  values[2] = {
            vqtbl1q_s8(table, vandq_u8(codes, vdupq_n_u8(15))), vqtbl1q_s8(table, vshrq_n_u8(codes, 4)),
        };
        for (int i = 0; i < 2; i++) {
            const int16x8_t words[2] = { vmovl_s8(vget_low_s8(values[i])), vmovl_high_s8(values[i]) };
            for (int j = 0; j < 2; j++) {
                g->w[4*i + 2*j][b]     = vcvtq_n_f32_s32(vmovl_s16(vget_low_s16(words[j])), 1);
                g->w[4*i + 2*j + 1][b] = vcvtq_n_f32_s32(vmovl_high_s16(words[j]), 1);
            }
        }
        g->d[b] = vdupq_n_f32(dsv4_e8m0_to_f32(block[0]));
    }
}

INLINE void bf16_load(const uint8_t * x, struct group * g) {
    for (int v = 0; v < DSV4_VECS; v++) {
        for (int i = 0; i < 2; i++) {
            const uint16x8_t words = vreinterpretq_u16_u8(vld1q_u8(x + 2*v*DSV4_LANES + 16*i));
            g->w[v][2*i]     = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16));
            g->w[v][2*i + 1] = vreinterpretq_f32_u32(vshll_high_n_u16(words, 16));
        }
    }
    for (int q = 0; q < QUARTERS; q++) {
        g->d[q] = vdupq_n_f32(1.0f);
    }
}

// --- rows ---

INLINE void add_group(const struct group * g, const float * y, float32x4_t * sum) {
    for (int q = 0; q < QUARTERS; q++) {
        float32x4_t group = vmulq_f32(g->w[0][q], vld1q_f32(y + 4*q));
        for (int v = 1; v < DSV4_VECS; v++) {
            group = vfmaq_f32(group, g->w[v][q], vld1q_f32(y + v*DSV4_LANES + 4*q));
        }
        sum[q] = vfmaq_f32(sum[q], g->d[q], group);
    }
}

INLINE void store_group(const struct group * g, float * w, float * d) {
    for (int q = 0; q < QUARTERS; q++) {
        for (int v = 0; v < DSV4_VECS; v++) {
            vst1q_f32(w + v*DSV4_LANES + 4*q, g->w[v][q]);
        }
        vst1q_f32(d + 4*q, g->d[q]);
    }
}

INLINE float sum_lanes(const float32x4_t * sum) {
    float lanes[DSV4_LANES];
    for (int q = 0; q < QUARTERS; q++) {
        vst1q_f32(lanes + 4*q, sum[q]);
    }
    return dsv4_sum_lanes(lanes);
}

// The functions of a type: LOAD reads a group of BYTES bytes; a last group that is not full gets zeros behind it.
#define DEFINE_ROWS(NAME, BYTES, N_BYTES, LOAD) \
    static void NAME##_dot(int64_t n, const void * x, const float * y, float * s) { \
        const uint8_t * p = x; \
        float32x4_t sum[QUARTERS] = { vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0) }; \
        struct group g; \
        for (int64_t i = 0; i < n/DSV4_GROUP; i++) { \
            dsv4_fetch_ahead(p + i*(BYTES), BYTES); \
            LOAD(p + i*(BYTES), &g); \
            add_group(&g, y + i*DSV4_GROUP, sum); \
        } \
        if (n%DSV4_GROUP != 0) { \
            uint8_t tail[BYTES] = { 0 }; \
            memcpy(tail, p + n/DSV4_GROUP*(BYTES), (size_t) (N_BYTES(n%DSV4_GROUP))); \
            LOAD(tail, &g); \
            add_group(&g, y + n/DSV4_GROUP*DSV4_GROUP, sum); \
        } \
        *s = sum_lanes(sum); \
    } \
    static void NAME##_decode(int64_t n, const void * x, float * w, float * d) { \
        const uint8_t * p = x; \
        struct group g; \
        for (int64_t i = 0; i < n/DSV4_GROUP; i++) { \
            LOAD(p + i*(BYTES), &g); \
            store_group(&g, w + i*DSV4_GROUP, d + i*DSV4_LANES); \
        } \
        if (n%DSV4_GROUP != 0) { \
            uint8_t tail[BYTES] = { 0 }; \
            memcpy(tail, p + n/DSV4_GROUP*(BYTES), (size_t) (N_BYTES(n%DSV4_GROUP))); \
            LOAD(tail, &g); \
            store_group(&g, w + n/DSV4_GROUP*DSV4_GROUP, d + n/DSV4_GROUP*DSV4_LANES); \
        } \
    }

#define F8_N_BYTES(n)    0*(n) // rows are whole blocks
#define MXFP4_N_BYTES(n) (n)/MXFP4_N*MXFP4_BYTES
#define BF16_N_BYTES(n)  (n)*2

DEFINE_ROWS(f8,    sizeof(block_f8_e4m3_b128), F8_N_BYTES,    f8_load)
DEFINE_ROWS(mxfp4, MXFP4_BLOCKS*MXFP4_BYTES,   MXFP4_N_BYTES, mxfp4_load)
DEFINE_ROWS(bf16,  2*DSV4_GROUP,               BF16_N_BYTES,  bf16_load)

// --- tiles ---

// n_cols is a constant where this is inlined. 24 sums of a group, 3 activations and the weights fill the 32 registers.
INLINE void tile_cols(
        int64_t n_groups, const float * w, const float * d, const float * const * y, const int n_cols, float * sum) {
    for (int64_t g = 0; g < n_groups; g++) {
        for (int q = 0; q < QUARTERS; q++) {
            float32x4_t group[DSV4_COLS][DSV4_ROWS];
            for (int v = 0; v < DSV4_VECS; v++) {
                const int64_t at = g*DSV4_GROUP + v*DSV4_LANES + 4*q;
                float32x4_t yv[DSV4_COLS];
                for (int c = 0; c < n_cols; c++) {
                    yv[c] = vld1q_f32(y[c] + at);
                }
                for (int r = 0; r < DSV4_ROWS; r++) {
                    const float32x4_t wv = vld1q_f32(w + r*n_groups*DSV4_GROUP + at);
                    for (int c = 0; c < n_cols; c++) {
                        group[c][r] = v == 0 ? vmulq_f32(wv, yv[c]) : vfmaq_f32(group[c][r], wv, yv[c]);
                    }
                }
            }
            for (int r = 0; r < DSV4_ROWS; r++) {
                const float32x4_t dv = vld1q_f32(d + (r*n_groups + g)*DSV4_LANES + 4*q);
                for (int c = 0; c < n_cols; c++) {
                    float * s = sum + (c*DSV4_ROWS + r)*DSV4_LANES + 4*q;
                    vst1q_f32(s, vfmaq_f32(vld1q_f32(s), dv, group[c][r]));
                }
            }
        }
    }
}

static void tile(int64_t n_groups, const float * w, const float * d, const float * const * y, int n_cols, float * sum) {
    switch (n_cols) {
        case 1: tile_cols(n_groups, w, d, y, 1, sum); break;
        case 2: tile_cols(n_groups, w, d, y, 2, sum); break;
        case 3: tile_cols(n_groups, w, d, y, 3, sum); break;
    }
}

// --- tables ---

static const struct dsv4_kernels f8_kernels    = { in_place,    f8_dot,    f8_decode, tile, dsv4_sum_rows_portable };
static const struct dsv4_kernels mxfp4_kernels = { mxfp4_order, mxfp4_dot, mxfp4_decode, tile, dsv4_sum_rows_portable };
static const struct dsv4_kernels bf16_kernels  = { in_place,    bf16_dot,  bf16_decode, tile, dsv4_sum_rows_portable };

const struct dsv4_kernels * dsv4_kernels_neon(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F8_E4M3_B128: return &f8_kernels;
        case GGML_TYPE_MXFP4:        return &mxfp4_kernels;
        case GGML_TYPE_BF16:         return &bf16_kernels;
        default:                     return NULL;
    }
}

#else

const struct dsv4_kernels * dsv4_kernels_neon(enum ggml_type type) {
    (void) type;
    return NULL;
}

#endif
