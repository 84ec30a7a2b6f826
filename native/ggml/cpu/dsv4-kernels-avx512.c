// Kernels for CPUs with AVX-512 VBMI (Ice Lake, Zen 4 and later), chosen at run time whatever the compiler's options are.
//
// FP8: the upper 16 bits of a code's float32 value come from two tables of 128 bytes (vpermi2b), so subnormals and NaN
// need no extra work. Bytes are interleaved to 16-bit words in each 128-bit lane, then even and odd words become float32.
// MXFP4: four blocks side by side, one in each 128-bit lane; a table of 16 float32 is indexed by the low 4 bits of every
// 32-bit lane (vpermps ignores the others), which a shift moves from nibble to nibble.

#include "dsv4-kernels.h"

#include "../f8-e4m3-b128.h"

#include <stddef.h>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { MXFP4_N = 32, MXFP4_BYTES = 17, MXFP4_BLOCKS = DSV4_GROUP/MXFP4_N };

// A group of weights in registers.
struct group {
    __m512 w[DSV4_VECS];
    __m512 d;
};

// --- FP8 ---

// bytes 2 and 3 (the upper ones) of the float32 of codes 0 to 127
#define HI8(e)    e, e, e, e, e, e, e, e
#define HI16(e)   HI8(e), HI8(e) // two exponents share the byte
static const uint8_t F8_HI[128] __attribute__((aligned(64))) = {
    0x00, 0x3B, 0x3B, 0x3B, 0x3C, 0x3C, 0x3C, 0x3C, HI8(0x3C),
    HI16(0x3D), HI16(0x3E), HI16(0x3F), HI16(0x40), HI16(0x41), HI16(0x42),
    HI8(0x43), 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x7F,
};
#define LO16 0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0
static const uint8_t F8_LO[128] __attribute__((aligned(64))) = {
    0x00, 0x00, 0x80, 0xC0, 0x00, 0x20, 0x40, 0x60, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0, 0xF0,
    LO16, LO16, LO16, LO16, LO16, LO16, LO16,
};

INLINE void f8_load(const uint8_t * x, struct group * g) {
    const __m512i hi0 = _mm512_load_si512(F8_HI), hi1 = _mm512_load_si512(F8_HI + 64);
    const __m512i lo0 = _mm512_load_si512(F8_LO), lo1 = _mm512_load_si512(F8_LO + 64);

    for (int half = 0; half < 2; half++) {
        const __m512i codes = _mm512_loadu_si512(x + 1 + 64*half);
        const __m512i lo    = _mm512_permutex2var_epi8(lo0, codes, lo1);
        // hi | (codes & 0x80)
        const __m512i hi    = _mm512_ternarylogic_epi32(
            _mm512_permutex2var_epi8(hi0, codes, hi1), codes, _mm512_set1_epi8((char) 0x80), 0xF8);
        const __m512i words[2] = { _mm512_unpacklo_epi8(lo, hi), _mm512_unpackhi_epi8(lo, hi) };
        for (int i = 0; i < 2; i++) {
            g->w[4*half + 2*i]     = _mm512_castsi512_ps(_mm512_slli_epi32(words[i], 16));
            g->w[4*half + 2*i + 1] = _mm512_castsi512_ps(
                _mm512_and_si512(words[i], _mm512_set1_epi32((int) 0xFFFF0000u)));
        }
    }
    g->d = _mm512_set1_ps(dsv4_e8m0_to_f32(x[0]));
}

// --- MXFP4 ---

// Bits of scales by their codes, 2^(e - 127). A load costs nothing here, where the two ports of vector arithmetic limit.
#define E1(e)  (uint32_t) (e) << 23
#define E5(e)  E1(e), E1((e) + 1), E1((e) + 2), E1((e) + 3), E1((e) + 4)
#define E15(e) E5(e), E5((e) + 5), E5((e) + 10)
#define E60(e) E15(e), E15((e) + 15), E15((e) + 30), E15((e) + 45)
static const uint32_t E8M0[256] = {
    0x00400000, E60(1), E60(61), E60(121), E60(181), E5(241), E5(246), E1(251), E1(252), E1(253), E1(254), 0x7FC00000,
};

// x: 4 blocks, 68 bytes
INLINE void mxfp4_load(const uint8_t * x, struct group * g) {
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
        -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    // where the codes of blocks 0 to 2 are in the first 64 bytes; those of block 3 are in place in the last 64
    const __m512i at = _mm512_setr_epi32(
        0x04030201, 0x08070605, 0x0C0B0A09, 0x100F0E0D, 0x15141312, 0x19181716, 0x1D1C1B1A, 0x21201F1E,
        0x26252423, 0x2A292827, 0x2E2D2C2B, 0x3231302F, 0, 0, 0, 0);
    const __m512i first = _mm512_loadu_si512(x);
    const __m512i codes = _mm512_mask_permutexvar_epi8(_mm512_loadu_si512(x + 4), 0x0000FFFFFFFFFFFFull, at, first);
    for (int v = 0; v < DSV4_VECS; v++) {
        g->w[v] = _mm512_permutexvar_ps(v == 0 ? codes : _mm512_srli_epi32(codes, 4*v), values);
    }

    __m512i d = _mm512_set1_epi32((int) E8M0[x[0]]);
    for (int b = 1; b < MXFP4_BLOCKS; b++) {
        d = _mm512_mask_set1_epi32(d, (__mmask16) (15 << 4*b), (int) E8M0[x[b*MXFP4_BYTES]]);
    }
    g->d = _mm512_castsi512_ps(d);
}

// --- BF16 ---

INLINE void bf16_load(const uint16_t * x, struct group * g) {
    for (int i = 0; i < DSV4_VECS/2; i++) {
        const __m512i words = _mm512_loadu_si512(x + 2*DSV4_LANES*i);
        g->w[2*i]     = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        g->w[2*i + 1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int) 0xFFFF0000u)));
    }
    g->d = _mm512_set1_ps(1.0f);
}

// --- rows ---

INLINE __m512 add_group(const struct group * g, const float * y, __m512 sum) {
    __m512 group = _mm512_mul_ps(g->w[0], _mm512_loadu_ps(y));
    for (int v = 1; v < DSV4_VECS; v++) {
        group = _mm512_fmadd_ps(g->w[v], _mm512_loadu_ps(y + v*DSV4_LANES), group);
    }
    return _mm512_fmadd_ps(g->d, group, sum);
}

INLINE void store_group(const struct group * g, float * w, float * d) {
    for (int v = 0; v < DSV4_VECS; v++) {
        _mm512_storeu_ps(w + v*DSV4_LANES, g->w[v]);
    }
    _mm512_storeu_ps(d, g->d);
}

INLINE float sum_lanes(__m512 sum) {
    float lanes[DSV4_LANES];
    _mm512_storeu_ps(lanes, sum);
    return dsv4_sum_lanes(lanes);
}

TARGET static void f8_dot(int64_t n, const void * x, const float * y, float * s) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n/DSV4_GROUP; i++) {
        const block_f8_e4m3_b128 * block = (const block_f8_e4m3_b128 *) x + i;
        struct group g;
        dsv4_fetch_ahead(block, sizeof(block->qs));
        f8_load((const uint8_t *) block, &g);
        sum = add_group(&g, y + i*DSV4_GROUP, sum);
    }
    *s = sum_lanes(sum);
}

TARGET static void f8_decode(int64_t n, const void * x, float * w, float * d) {
    for (int64_t i = 0; i < n/DSV4_GROUP; i++) {
        struct group g;
        f8_load((const uint8_t *) x + i*sizeof(block_f8_e4m3_b128), &g);
        store_group(&g, w + i*DSV4_GROUP, d + i*DSV4_LANES);
    }
}

// The last blocks of a row whose number is no multiple of 4, with zeros behind them.
INLINE void mxfp4_load_tail(int64_t n, const void * x, struct group * g) {
    const int64_t n_full = n/DSV4_GROUP;
    uint8_t tail[MXFP4_BLOCKS*MXFP4_BYTES] = { 0 };
    memcpy(tail, (const uint8_t *) x + n_full*MXFP4_BLOCKS*MXFP4_BYTES, (size_t) (n%DSV4_GROUP/MXFP4_N)*MXFP4_BYTES);
    mxfp4_load(tail, g);
}

TARGET static void mxfp4_dot(int64_t n, const void * x, const float * y, float * s) {
    const int64_t n_full = n/DSV4_GROUP;
    __m512 sum = _mm512_setzero_ps();
    struct group g;
    for (int64_t i = 0; i < n_full; i++) {
        const uint8_t * blocks = (const uint8_t *) x + i*MXFP4_BLOCKS*MXFP4_BYTES;
        dsv4_fetch_ahead(blocks, MXFP4_BLOCKS*MXFP4_BYTES);
        mxfp4_load(blocks, &g);
        sum = add_group(&g, y + i*DSV4_GROUP, sum);
    }
    if (n%DSV4_GROUP != 0) {
        mxfp4_load_tail(n, x, &g);
        sum = add_group(&g, y + n_full*DSV4_GROUP, sum);
    }
    *s = sum_lanes(sum);
}

TARGET static void mxfp4_decode(int64_t n, const void * x, float * w, float * d) {
    const int64_t n_full = n/DSV4_GROUP;
    struct group g;
    for (int64_t i = 0; i < n_full; i++) {
        mxfp4_load((const uint8_t *) x + i*MXFP4_BLOCKS*MXFP4_BYTES, &g);
        store_group(&g, w + i*DSV4_GROUP, d + i*DSV4_LANES);
    }
    if (n%DSV4_GROUP != 0) {
        mxfp4_load_tail(n, x, &g);
        store_group(&g, w + n_full*DSV4_GROUP, d + n_full*DSV4_LANES);
    }
}

INLINE void bf16_load_tail(int64_t n, const void * x, struct group * g) {
    const int64_t n_full = n/DSV4_GROUP;
    uint16_t tail[DSV4_GROUP] = { 0 };
    memcpy(tail, (const uint16_t *) x + n_full*DSV4_GROUP, (size_t) (n%DSV4_GROUP)*sizeof(uint16_t));
    bf16_load(tail, g);
}

TARGET static void bf16_dot(int64_t n, const void * x, const float * y, float * s) {
    const int64_t n_full = n/DSV4_GROUP;
    __m512 sum = _mm512_setzero_ps();
    struct group g;
    for (int64_t i = 0; i < n_full; i++) {
        const uint16_t * w = (const uint16_t *) x + i*DSV4_GROUP;
        dsv4_fetch_ahead(w, DSV4_GROUP*sizeof(*w));
        bf16_load(w, &g);
        sum = add_group(&g, y + i*DSV4_GROUP, sum);
    }
    if (n%DSV4_GROUP != 0) {
        bf16_load_tail(n, x, &g);
        sum = add_group(&g, y + n_full*DSV4_GROUP, sum);
    }
    *s = sum_lanes(sum);
}

TARGET static void bf16_decode(int64_t n, const void * x, float * w, float * d) {
    const int64_t n_full = n/DSV4_GROUP;
    struct group g;
    for (int64_t i = 0; i < n_full; i++) {
        bf16_load((const uint16_t *) x + i*DSV4_GROUP, &g);
        store_group(&g, w + i*DSV4_GROUP, d + i*DSV4_LANES);
    }
    if (n%DSV4_GROUP != 0) {
        bf16_load_tail(n, x, &g);
        store_group(&g, w + n_full*DSV4_GROUP, d + n_full*DSV4_LANES);
    }
}

// --- tiles ---

// Compilers fold a load into each of its uses, and keep sums in registers that they then spill: a load too many for every
// multiplication, where loads are what limits a tile.
#define IN_REGISTER(x) __asm__ ("" : "+v"(x))
#define IN_MEMORY()    __asm__ volatile ("" : : : "memory")

// n_cols is a constant where this is inlined. 24 sums of a group, 3 activations and the weights fill the 32 registers.
INLINE void tile_cols(
        int64_t n_groups, const float * w, const float * d, const float * const * y, const int n_cols, float * sum) {
    for (int64_t g = 0; g < n_groups; g++) {
        __m512 group[DSV4_COLS][DSV4_ROWS];
        for (int c = 0; c < n_cols; c++) {
            for (int r = 0; r < DSV4_ROWS; r++) {
                group[c][r] = _mm512_setzero_ps();
            }
        }
        for (int v = 0; v < DSV4_VECS; v++) {
            __m512 yv[DSV4_COLS];
            for (int c = 0; c < n_cols; c++) {
                yv[c] = _mm512_loadu_ps(y[c] + g*DSV4_GROUP + v*DSV4_LANES);
            }
            for (int r = 0; r < DSV4_ROWS; r++) {
                __m512 wv = _mm512_loadu_ps(w + (r*n_groups + g)*DSV4_GROUP + v*DSV4_LANES);
                IN_REGISTER(wv);
                for (int c = 0; c < n_cols; c++) {
                    group[c][r] = _mm512_fmadd_ps(wv, yv[c], group[c][r]);
                }
            }
        }
        for (int r = 0; r < DSV4_ROWS; r++) {
            const __m512 dv = _mm512_loadu_ps(d + (r*n_groups + g)*DSV4_LANES);
            for (int c = 0; c < n_cols; c++) {
                float * s = sum + (c*DSV4_ROWS + r)*DSV4_LANES;
                _mm512_storeu_ps(s, _mm512_fmadd_ps(dv, group[c][r], _mm512_loadu_ps(s)));
            }
        }
        IN_MEMORY();
    }
}

TARGET static void tile(
        int64_t n_groups, const float * w, const float * d, const float * const * y, int n_cols, float * sum) {
    switch (n_cols) {
        case 1: tile_cols(n_groups, w, d, y, 1, sum); break;
        case 2: tile_cols(n_groups, w, d, y, 2, sum); break;
        case 3: tile_cols(n_groups, w, d, y, 3, sum); break;
    }
}

// --- tables ---

// half of 64 codes, 16 codes of a 128-bit lane, its lower or upper 8, pair, even or odd
#define F8_AT(v, l)    64*((v)/4) + 16*((l)/4) + 8*((v)%4/2) + 2*((l)%4) + (v)%2
// block, 32-bit lane of 4 bytes, byte, low or high nibble
#define MXFP4_AT(v, l) 32*((l)/4) + 4*((l)%4) + (v)/2 + 16*((v)%2)

// pair, even or odd
#define BF16_AT(v, l)  32*((v)/2) + 2*(l) + (v)%2

static const uint8_t f8_order[DSV4_GROUP]    = DSV4_GROUP_ORDER(F8_AT);
static const uint8_t mxfp4_order[DSV4_GROUP] = DSV4_GROUP_ORDER(MXFP4_AT);
static const uint8_t bf16_order[DSV4_GROUP]  = DSV4_GROUP_ORDER(BF16_AT);

static const struct dsv4_kernels f8_kernels    = { f8_order,    f8_dot,    f8_decode, tile, dsv4_sum_rows_avx2 };
static const struct dsv4_kernels mxfp4_kernels = { mxfp4_order, mxfp4_dot, mxfp4_decode, tile, dsv4_sum_rows_avx2 };
static const struct dsv4_kernels bf16_kernels  = { bf16_order,  bf16_dot,  bf16_decode, tile, dsv4_sum_rows_avx2 };

const struct dsv4_kernels * dsv4_kernels_avx512(enum ggml_type type) {
    if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) {
        return NULL;
    }
    switch (type) {
        case GGML_TYPE_F8_E4M3_B128: return &f8_kernels;
        case GGML_TYPE_MXFP4:        return &mxfp4_kernels;
        case GGML_TYPE_BF16:         return &bf16_kernels;
        default:                     return NULL;
    }
}

#else

const struct dsv4_kernels * dsv4_kernels_avx512(enum ggml_type type) {
    (void) type;
    return NULL;
}

#endif
