// The choice of kernels, and those that any compiler vectorises as its options allow.

#include "dsv4-kernels.h"

#include "../e2m1.h"
#include "../f8-e4m3-b128.h"

#include <stddef.h>
#include <string.h>

enum { MXFP4_N = 32, MXFP4_BYTES = 17, MXFP4_BLOCKS = DSV4_GROUP/MXFP4_N };

// --- one group ---

static void decode_f8(const uint8_t * x, float * restrict w, float * restrict d) {
    const float scale = dsv4_e8m0_to_f32(x[0]);
    for (int i = 0; i < DSV4_GROUP; i++) {
        w[i] = dsv4_e4m3_to_f32(x[1 + i]);
    }
    for (int l = 0; l < DSV4_LANES; l++) {
        d[l] = scale;
    }
}

// Lanes 4b..4b+3 belong to block b, so that one scale per lane holds for all vectors.
static void decode_mxfp4(const uint8_t * x, float * restrict w, float * restrict d) {
    for (int b = 0; b < MXFP4_BLOCKS; b++) {
        const uint8_t * block = x + b*MXFP4_BYTES;
        const float     scale = dsv4_e8m0_to_f32(block[0]);
        float values[MXFP4_N];
        for (int j = 0; j < MXFP4_N/2; j++) {
            values[j]             = dsv4_e2m1_to_f32(block[1 + j] & 15);
            values[j + MXFP4_N/2] = dsv4_e2m1_to_f32(block[1 + j] >> 4);
        }
        for (int v = 0; v < DSV4_VECS; v++) {
            memcpy(w + v*DSV4_LANES + 4*b, values + 4*v, 4*sizeof(float));
        }
        for (int l = 4*b; l < 4*b + 4; l++) {
            d[l] = scale;
        }
    }
}

static void decode_bf16(const uint16_t * x, float * restrict w, float * restrict d) {
    for (int i = 0; i < DSV4_GROUP; i++) {
        const uint32_t bits = (uint32_t) x[i] << 16;
        memcpy(w + i, &bits, sizeof(bits));
    }
    for (int l = 0; l < DSV4_LANES; l++) {
        d[l] = 1.0f;
    }
}

// sum[l] += d[l] * sum over v of w[v][l]*y[v][l]
static inline void add_group(const float * w, const float * d, const float * y, float * restrict sum) {
    float group[DSV4_LANES] = { 0.0f };
    for (int v = 0; v < DSV4_VECS; v++) {
        for (int l = 0; l < DSV4_LANES; l++) {
            group[l] += w[v*DSV4_LANES + l]*y[v*DSV4_LANES + l];
        }
    }
    for (int l = 0; l < DSV4_LANES; l++) {
        sum[l] += d[l]*group[l];
    }
}

// --- rows ---

static void f8_decode_row(int64_t n, const void * x, float * w, float * d) {
    for (int64_t g = 0; g < n/DSV4_GROUP; g++) {
        decode_f8((const uint8_t *) x + g*sizeof(block_f8_e4m3_b128), w + g*DSV4_GROUP, d + g*DSV4_LANES);
    }
}

static void f8_dot(int64_t n, const void * x, const float * y, float * s) {
    float sum[DSV4_LANES] = { 0.0f };
    for (int64_t g = 0; g < n/DSV4_GROUP; g++) {
        float w[DSV4_GROUP], d[DSV4_LANES];
        const block_f8_e4m3_b128 * block = (const block_f8_e4m3_b128 *) x + g;
        dsv4_fetch_ahead(block, sizeof(*block));
        decode_f8((const uint8_t *) block, w, d);
        add_group(w, d, y + g*DSV4_GROUP, sum);
    }
    *s = dsv4_sum_lanes(sum);
}

// Group g of a row of n MXFP4 weights; one that is not full is copied to tail, before zeros.
static inline const uint8_t * mxfp4_group(int64_t n, const void * x, int64_t g, uint8_t * tail) {
    const uint8_t * p      = (const uint8_t *) x + g*MXFP4_BLOCKS*MXFP4_BYTES;
    const int64_t   blocks = n/MXFP4_N - g*MXFP4_BLOCKS;
    if (blocks >= MXFP4_BLOCKS) {
        return p;
    }
    memset(tail, 0, MXFP4_BLOCKS*MXFP4_BYTES);
    memcpy(tail, p, (size_t) blocks*MXFP4_BYTES);
    return tail;
}

static void mxfp4_decode_row(int64_t n, const void * x, float * w, float * d) {
    uint8_t tail[MXFP4_BLOCKS*MXFP4_BYTES];
    for (int64_t g = 0; g < dsv4_n_groups(n); g++) {
        decode_mxfp4(mxfp4_group(n, x, g, tail), w + g*DSV4_GROUP, d + g*DSV4_LANES);
    }
}

static void mxfp4_dot(int64_t n, const void * x, const float * y, float * s) {
    uint8_t tail[MXFP4_BLOCKS*MXFP4_BYTES];
    float sum[DSV4_LANES] = { 0.0f };
    for (int64_t g = 0; g < dsv4_n_groups(n); g++) {
        float w[DSV4_GROUP], d[DSV4_LANES];
        dsv4_fetch_ahead((const uint8_t *) x + g*MXFP4_BLOCKS*MXFP4_BYTES, MXFP4_BLOCKS*MXFP4_BYTES);
        decode_mxfp4(mxfp4_group(n, x, g, tail), w, d);
        add_group(w, d, y + g*DSV4_GROUP, sum);
    }
    *s = dsv4_sum_lanes(sum);
}

// Group g of a row of n BF16 weights; one that is not full is copied to tail, before zeros.
static inline const uint16_t * bf16_group(int64_t n, const void * x, int64_t g, uint16_t * tail) {
    const uint16_t * p = (const uint16_t *) x + g*DSV4_GROUP;
    const int64_t    k = n - g*DSV4_GROUP;
    if (k >= DSV4_GROUP) {
        return p;
    }
    memset(tail, 0, DSV4_GROUP*sizeof(uint16_t));
    memcpy(tail, p, (size_t) k*sizeof(uint16_t));
    return tail;
}

static void bf16_decode_row(int64_t n, const void * x, float * w, float * d) {
    uint16_t tail[DSV4_GROUP];
    for (int64_t g = 0; g < dsv4_n_groups(n); g++) {
        decode_bf16(bf16_group(n, x, g, tail), w + g*DSV4_GROUP, d + g*DSV4_LANES);
    }
}

static void bf16_dot(int64_t n, const void * x, const float * y, float * s) {
    uint16_t tail[DSV4_GROUP];
    float sum[DSV4_LANES] = { 0.0f };
    for (int64_t g = 0; g < dsv4_n_groups(n); g++) {
        float w[DSV4_GROUP], d[DSV4_LANES];
        dsv4_fetch_ahead((const uint16_t *) x + g*DSV4_GROUP, DSV4_GROUP*sizeof(uint16_t));
        decode_bf16(bf16_group(n, x, g, tail), w, d);
        add_group(w, d, y + g*DSV4_GROUP, sum);
    }
    *s = dsv4_sum_lanes(sum);
}

static void tile(int64_t n_groups, const float * w, const float * d, const float * const * y, int n_cols, float * sum) {
    for (int c = 0; c < n_cols; c++) {
        for (int r = 0; r < DSV4_ROWS; r++) {
            float lanes[DSV4_LANES];
            memcpy(lanes, sum + (c*DSV4_ROWS + r)*DSV4_LANES, sizeof(lanes));
            for (int64_t g = 0; g < n_groups; g++) {
                const int64_t i = r*n_groups + g;
                add_group(w + i*DSV4_GROUP, d + i*DSV4_LANES, y[c] + g*DSV4_GROUP, lanes);
            }
            memcpy(sum + (c*DSV4_ROWS + r)*DSV4_LANES, lanes, sizeof(lanes));
        }
    }
}

// In loops that compilers vectorise.
void dsv4_sum_rows_portable(const float * sum, float * s) {
    float lanes[DSV4_LANES/2][DSV4_ROWS];
    for (int r = 0; r < DSV4_ROWS; r++) {
        for (int l = 0; l < DSV4_LANES/2; l++) {
            lanes[l][r] = sum[r*DSV4_LANES + l] + sum[r*DSV4_LANES + l + DSV4_LANES/2];
        }
    }
    for (int half = DSV4_LANES/4; half > 0; half /= 2) {
        for (int l = 0; l < half; l++) {
            for (int r = 0; r < DSV4_ROWS; r++) {
                lanes[l][r] += lanes[l + half][r];
            }
        }
    }
    memcpy(s, lanes[0], sizeof(lanes[0]));
}

// --- tables ---

#define IN_PLACE(v, l)   16*(v) + (l)
#define MXFP4_AT(v, l) 32*((l)/4) + 4*(v) + (l)%4

static const uint8_t in_place[DSV4_GROUP]    = DSV4_GROUP_ORDER(IN_PLACE);
static const uint8_t mxfp4_order[DSV4_GROUP] = DSV4_GROUP_ORDER(MXFP4_AT);

static const struct dsv4_kernels f8_kernels    = { in_place,    f8_dot,    f8_decode_row, tile, dsv4_sum_rows_portable };
static const struct dsv4_kernels mxfp4_kernels = { mxfp4_order, mxfp4_dot, mxfp4_decode_row, tile, dsv4_sum_rows_portable };
static const struct dsv4_kernels bf16_kernels  = { in_place,    bf16_dot,  bf16_decode_row, tile, dsv4_sum_rows_portable };

const struct dsv4_kernels * dsv4_kernels_portable(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F8_E4M3_B128: return &f8_kernels;
        case GGML_TYPE_MXFP4:        return &mxfp4_kernels;
        case GGML_TYPE_BF16:         return &bf16_kernels;
        default:                     return NULL;
    }
}

const struct dsv4_kernels * dsv4_kernels_for(enum ggml_type type) {
    const struct dsv4_kernels * best[] = {
        dsv4_kernels_avx512(type), dsv4_kernels_avx2(type), dsv4_kernels_neon(type), dsv4_kernels_portable(type),
    };
    for (int i = 0; i < (int) (sizeof(best)/sizeof(best[0])); i++) {
        if (best[i]) {
            return best[i];
        }
    }
    return NULL;
}
