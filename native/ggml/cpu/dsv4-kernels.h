// Inner loops of products with the weights of native files. A row is cut into groups of 128 weights; a group is held as 8 vectors of
// 16 lanes, in an order that suits the instruction set, and one scale per lane:
//
//     s = sum over lanes l of ( sum over groups g of d[g][l] * ( sum over v < 8 of w[g][v][l] * y[g][v][l] ) )
//
// with w the codes' values before scaling and y the float32 activations. One weight row with one activation row, and
// tiles of several, add in this same order: a token's result does not depend on what else is in its batch. Owns decoding
// and summing; leaves threads, batches and experts to dsv4-product.c.

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DSV4_GROUP = 128, // weights
    DSV4_LANES = 16,
    DSV4_VECS  = DSV4_GROUP/DSV4_LANES,
    DSV4_ROWS  = 8,   // weight rows of a tile
    DSV4_COLS  = 3,   // activation rows of a tile at most
    DSV4_AHEAD = 4096, // bytes between what is decoded and what is fetched from memory
};

// { F(0, 0), F(0, 1), ... F(7, 15) }: a table with an entry for every lane of every vector
#define DSV4_VEC_ORDER(F, v) \
    F(v, 0), F(v, 1), F(v, 2), F(v, 3), F(v, 4), F(v, 5), F(v, 6), F(v, 7), \
    F(v, 8), F(v, 9), F(v, 10), F(v, 11), F(v, 12), F(v, 13), F(v, 14), F(v, 15)
#define DSV4_GROUP_ORDER(F) \
    { DSV4_VEC_ORDER(F, 0), DSV4_VEC_ORDER(F, 1), DSV4_VEC_ORDER(F, 2), DSV4_VEC_ORDER(F, 3), \
      DSV4_VEC_ORDER(F, 4), DSV4_VEC_ORDER(F, 5), DSV4_VEC_ORDER(F, 6), DSV4_VEC_ORDER(F, 7) }

struct dsv4_kernels {
    // (128) which weight of the group is in lane l of vector v: order[v*16 + l]
    const uint8_t * order;

    // *s = x * y. x: blocks of one row of n weights; y: (n_groups, 8, 16) in the order above, padded with zeros.
    void (*dot)(int64_t n, const void * x, const float * y, float * s);

    // x: blocks of one row of n weights -> w: (n_groups, 8, 16) values before scaling, d: (n_groups, 16) scales.
    // A last group that is not full is padded with zeros.
    void (*decode)(int64_t n, const void * x, float * w, float * d);

    // Adds n_groups groups of DSV4_ROWS rows times n_cols <= DSV4_COLS columns to the lanes of their sums, so that long
    // rows can be taken in pieces that stay in the nearest cache. w: (DSV4_ROWS, n_groups, 8, 16),
    // d: (DSV4_ROWS, n_groups, 16), y[c]: (n_groups, 8, 16), sum: (n_cols, DSV4_ROWS, 16).
    void (*tile)(int64_t n_groups, const float * w, const float * d, const float * const * y, int n_cols, float * sum);

    // s[r] = dsv4_sum_lanes(sum[r]) for sum: (DSV4_ROWS, 16), s: (DSV4_ROWS)
    void (*sum_rows)(const float * sum, float * s);
};

// Fetches the lines of n_bytes that will be decoded DSV4_AHEAD bytes later. Files are mapped in pages of 4 KB, at whose ends
// the processor's own fetching stops, and a core waits for memory most of the time without this.
static inline void dsv4_fetch_ahead(const void * x, size_t n_bytes) {
#if defined(__GNUC__) || defined(__clang__)
    for (size_t i = 0; i < n_bytes; i += 64) {
        __builtin_prefetch((const void *) ((uintptr_t) x + DSV4_AHEAD + i)); // may lie behind the end: then nothing happens
    }
#else
    (void) x; (void) n_bytes;
#endif
}

static inline int64_t dsv4_n_groups(int64_t n) {
    return (n + DSV4_GROUP - 1)/DSV4_GROUP;
}

// Halves the lanes until one sum is left, the same way everywhere.
static inline float dsv4_sum_lanes(float * lanes) {
    for (int half = DSV4_LANES/2; half > 0; half /= 2) {
        for (int l = 0; l < half; l++) {
            lanes[l] += lanes[l + half];
        }
    }
    return lanes[0];
}

// The fastest kernels of this CPU for GGML_TYPE_F8_E4M3_B128, MXFP4 or BF16; NULL for other types.
const struct dsv4_kernels * dsv4_kernels_for(enum ggml_type type);

// Those without instructions beyond the compiler's options, then those for AVX2 with FMA and F16C, AVX-512 with VBMI, and
// NEON: NULL where the CPU or the compiler has none.
const struct dsv4_kernels * dsv4_kernels_portable(enum ggml_type type);
const struct dsv4_kernels * dsv4_kernels_avx2(enum ggml_type type);
const struct dsv4_kernels * dsv4_kernels_avx512(enum ggml_type type);
const struct dsv4_kernels * dsv4_kernels_neon(enum ggml_type type);

// What they share: see dsv4_kernels::sum_rows.
void dsv4_sum_rows_portable(const float * sum, float * s);
void dsv4_sum_rows_avx2(const float * sum, float * s);

#ifdef __cplusplus
}
#endif
