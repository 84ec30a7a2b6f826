// Kernels for CPUs with AVX2, FMA and F16C (Haswell, Zen and later), chosen at run time. A vector of 16 lanes is two registers.
//
// FP8: a code's bits, moved to their places in a float16 of the same value times 2^-8, convert in one instruction, subnormals
// included. MXFP4: bytes of twice the value from a table, moved to the top of 32-bit lanes: integers that are the value times
// 2^25. Both factors go into the scale. Groups where that is not exact (NaN codes, scales near the ends of the exponent) are
// rare and take a plain loop; dot and decode take it for the same groups, so that their results stay the same.

#include "dsv4-kernels.h"

#include "../e2m1.h"
#include "../f8-e4m3-b128.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { MXFP4_N = 32, MXFP4_BYTES = 17, MXFP4_BLOCKS = DSV4_GROUP/MXFP4_N, HALF = DSV4_LANES/2 };

// block, 32-bit lane of 4 bytes, byte, low or high nibble
#define MXFP4_AT(v, l) 32*((l)/4) + 4*((l)%4) + (v)/2 + 16*((v)%2)
#define IN_PLACE(v, l) 16*(v) + (l)

static const uint8_t mxfp4_order[DSV4_GROUP] = DSV4_GROUP_ORDER(MXFP4_AT);
static const uint8_t in_place[DSV4_GROUP]    = DSV4_GROUP_ORDER(IN_PLACE);

// A group of weights: what does not fit the registers is spilled by the compiler.
struct group {
    __m256 w[2][DSV4_VECS]; // lanes 0 to 7, then 8 to 15
    __m256 d[2];
};

INLINE void load_plain(const float * w, const float * d, struct group * g) {
    for (int h = 0; h < 2; h++) {
        for (int v = 0; v < DSV4_VECS; v++) {
            g->w[h][v] = _mm256_loadu_ps(w + v*DSV4_LANES + h*HALF);
        }
        g->d[h] = _mm256_loadu_ps(d + h*HALF);
    }
}

INLINE __m256 exponent(int e) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(e << 23));
}

// --- FP8 ---

static __attribute__((noinline)) void f8_plain(const uint8_t * x, float * w, float * d) {
    for (int i = 0; i < DSV4_GROUP; i++) {
        w[i] = dsv4_e4m3_to_f32(x[1 + in_place[i]]);
    }
    for (int l = 0; l < DSV4_LANES; l++) {
        d[l] = dsv4_e8m0_to_f32(x[0]);
    }
}

INLINE bool f8_is_plain(const uint8_t * x) {
    __m256i is_nan = _mm256_setzero_si256();
    for (int i = 0; i < DSV4_GROUP; i += 32) {
        const __m256i codes = _mm256_loadu_si256((const __m256i *) (x + 1 + i));
        is_nan = _mm256_or_si256(is_nan,
            _mm256_cmpeq_epi8(_mm256_or_si256(codes, _mm256_set1_epi8((char) 0x80)), _mm256_set1_epi8(-1)));
    }
    return x[0] > 246 || !_mm256_testz_si256(is_nan, is_nan);
}

INLINE void f8_load(const uint8_t * x, struct group * g) {
    if (__builtin_expect(f8_is_plain(x), 0)) {
        float w[DSV4_GROUP], d[DSV4_LANES];
        f8_plain(x, w, d);
        load_plain(w, d, g);
        return;
    }
    for (int v = 0; v < DSV4_VECS; v++) {
        const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *) (x + 1 + v*DSV4_LANES)));
        const __m256i half  = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16((short) 0xBFFF));
        g->w[0][v] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        g->w[1][v] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    }
    g->d[0] = g->d[1] = exponent(x[0] + 8);
}

// --- MXFP4 ---

static __attribute__((noinline)) void mxfp4_plain(const uint8_t * x, float * w, float * d) {
    for (int i = 0; i < DSV4_GROUP; i++) {
        const int b = mxfp4_order[i]/MXFP4_N, j = mxfp4_order[i]%MXFP4_N;
        const uint8_t codes = x[b*MXFP4_BYTES + 1 + j%(MXFP4_N/2)];
        w[i] = dsv4_e2m1_to_f32(j < MXFP4_N/2 ? codes & 15 : codes >> 4);
    }
    for (int l = 0; l < DSV4_LANES; l++) {
        d[l] = dsv4_e8m0_to_f32(x[l/4*MXFP4_BYTES]);
    }
}

INLINE bool mxfp4_is_plain(const uint8_t * x) {
    int is_plain = 0;
    for (int b = 0; b < MXFP4_BLOCKS; b++) {
        is_plain |= (unsigned) x[b*MXFP4_BYTES] - 26u > 254u - 26u;
    }
    return is_plain;
}

// x: 4 blocks, 68 bytes
INLINE void mxfp4_load(const uint8_t * x, struct group * g) {
    if (__builtin_expect(mxfp4_is_plain(x), 0)) {
        float w[DSV4_GROUP], d[DSV4_LANES];
        mxfp4_plain(x, w, d);
        load_plain(w, d, g);
        return;
    }
    const __m256i twice = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i nibble = _mm256_set1_epi8(15);
    // byte 0 of every 32-bit lane to byte 3, the others zero; adding 1 takes the next byte
    const __m256i to_top = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        -128, -128, -128, 0, -128, -128, -128, 4, -128, -128, -128, 8, -128, -128, -128, 12));

    for (int h = 0; h < 2; h++) {
        const uint8_t * a = x + 2*h*MXFP4_BYTES;
        const uint8_t * b = a + MXFP4_BYTES;
        const __m256i codes = _mm256_inserti128_si256(_mm256_castsi128_si256(
            _mm_loadu_si128((const __m128i *) (a + 1))), _mm_loadu_si128((const __m128i *) (b + 1)), 1);
        const __m256i values[2] = {
            _mm256_shuffle_epi8(twice, _mm256_and_si256(codes, nibble)),
            _mm256_shuffle_epi8(twice, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)),
        };
        for (int v = 0; v < DSV4_VECS; v++) {
            const __m256i byte = _mm256_add_epi32(to_top, _mm256_set1_epi32((v/2) << 24));
            g->w[h][v] = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(values[v%2], byte));
        }
        g->d[h] = _mm256_blend_ps(exponent(a[0] - 25), exponent(b[0] - 25), 0xF0);
    }
}

// --- BF16 ---

INLINE void bf16_load(const uint16_t * x, struct group * g) {
    for (int v = 0; v < DSV4_VECS; v++) {
        for (int h = 0; h < 2; h++) {
            const __m128i words = _mm_loadu_si128((const __m128i *) (x + v*DSV4_LANES + h*HALF));
            g->w[h][v] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
        }
    }
    g->d[0] = g->d[1] = _mm256_set1_ps(1.0f);
}

// --- rows ---

INLINE void add_group(const struct group * g, const float * y, __m256 * sum) {
    for (int h = 0; h < 2; h++) {
        __m256 group = _mm256_mul_ps(g->w[h][0], _mm256_loadu_ps(y + h*HALF));
        for (int v = 1; v < DSV4_VECS; v++) {
            group = _mm256_fmadd_ps(g->w[h][v], _mm256_loadu_ps(y + v*DSV4_LANES + h*HALF), group);
        }
        sum[h] = _mm256_fmadd_ps(g->d[h], group, sum[h]);
    }
}

INLINE void store_group(const struct group * g, float * w, float * d) {
    for (int h = 0; h < 2; h++) {
        for (int v = 0; v < DSV4_VECS; v++) {
            _mm256_storeu_ps(w + v*DSV4_LANES + h*HALF, g->w[h][v]);
        }
        _mm256_storeu_ps(d + h*HALF, g->d[h]);
    }
}

INLINE float sum_lanes(const __m256 * sum) {
    float lanes[DSV4_LANES];
    _mm256_storeu_ps(lanes, sum[0]);
    _mm256_storeu_ps(lanes + HALF, sum[1]);
    return dsv4_sum_lanes(lanes);
}

// The functions of a type: LOAD reads a group of BYTES bytes; a last group that is not full gets zeros behind it.
#define DEFINE_ROWS(NAME, BYTES, N_BYTES, LOAD) \
    TARGET static void NAME##_dot(int64_t n, const void * x, const float * y, float * s) { \
        const uint8_t * p = x; \
        __m256 sum[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() }; \
        struct group g; \
        for (int64_t i = 0; i < n/DSV4_GROUP; i++) { \
            dsv4_fetch_ahead(p + i*(BYTES), BYTES); \
            LOAD((const void *) (p + i*(BYTES)), &g); \
            add_group(&g, y + i*DSV4_GROUP, sum); \
        } \
        if (n%DSV4_GROUP != 0) { \
            uint8_t tail[BYTES] __attribute__((aligned(2))) = { 0 }; \
            memcpy(tail, p + n/DSV4_GROUP*(BYTES), (size_t) (N_BYTES(n%DSV4_GROUP))); \
            LOAD((const void *) tail, &g); \
            add_group(&g, y + n/DSV4_GROUP*DSV4_GROUP, sum); \
        } \
        *s = sum_lanes(sum); \
    } \
    TARGET static void NAME##_decode(int64_t n, const void * x, float * w, float * d) { \
        const uint8_t * p = x; \
        struct group g; \
        for (int64_t i = 0; i < n/DSV4_GROUP; i++) { \
            LOAD((const void *) (p + i*(BYTES)), &g); \
            store_group(&g, w + i*DSV4_GROUP, d + i*DSV4_LANES); \
        } \
        if (n%DSV4_GROUP != 0) { \
            uint8_t tail[BYTES] __attribute__((aligned(2))) = { 0 }; \
            memcpy(tail, p + n/DSV4_GROUP*(BYTES), (size_t) (N_BYTES(n%DSV4_GROUP))); \
            LOAD((const void *) tail, &g); \
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

// Compilers fold a load into each of its uses, and keep sums in registers that they then spill: a load too many for every
// multiplication, where loads are what limits a tile.
#define IN_REGISTER(x) __asm__ ("" : "+x"(x))
#define IN_MEMORY()    __asm__ volatile ("" : : : "memory")

enum { TILE_ROWS = 4 }; // 12 sums of a group, 3 activations and the weights fill the 16 registers

// n_cols is a constant where this is inlined
INLINE void tile_cols(
        int64_t n_groups, const float * w, const float * d, const float * const * y, const int n_cols, float * sum) {
    for (int64_t g = 0; g < n_groups; g++) {
        for (int part = 0; part < DSV4_ROWS/TILE_ROWS*2; part++) {
            const int first = part/2*TILE_ROWS, lane = part%2*HALF;
            __m256 group[DSV4_COLS][TILE_ROWS];
            for (int c = 0; c < n_cols; c++) {
                for (int r = 0; r < TILE_ROWS; r++) {
                    group[c][r] = _mm256_setzero_ps();
                }
            }
            for (int v = 0; v < DSV4_VECS; v++) {
                __m256 yv[DSV4_COLS];
                for (int c = 0; c < n_cols; c++) {
                    yv[c] = _mm256_loadu_ps(y[c] + g*DSV4_GROUP + v*DSV4_LANES + lane);
                }
                for (int r = 0; r < TILE_ROWS; r++) {
                    __m256 wv = _mm256_loadu_ps(w + ((first + r)*n_groups + g)*DSV4_GROUP + v*DSV4_LANES + lane);
                    IN_REGISTER(wv);
                    for (int c = 0; c < n_cols; c++) {
                        group[c][r] = _mm256_fmadd_ps(wv, yv[c], group[c][r]);
                    }
                }
            }
            for (int r = 0; r < TILE_ROWS; r++) {
                const __m256 dv = _mm256_loadu_ps(d + ((first + r)*n_groups + g)*DSV4_LANES + lane);
                for (int c = 0; c < n_cols; c++) {
                    float * s = sum + (c*DSV4_ROWS + first + r)*DSV4_LANES + lane;
                    _mm256_storeu_ps(s, _mm256_fmadd_ps(dv, group[c][r], _mm256_loadu_ps(s)));
                }
            }
            IN_MEMORY();
        }
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

// The halves of all rows at first; then rows share registers, so that each step adds as many numbers as it leaves.
TARGET void dsv4_sum_rows_avx2(const float * sum, float * s) {
    __m256 eight[DSV4_ROWS]; // sums of 8 lanes each
    for (int r = 0; r < DSV4_ROWS; r++) {
        const float * lanes = sum + r*DSV4_LANES;
        eight[r] = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + HALF));
    }
    __m256 four[DSV4_ROWS/2]; // row 2i in the lower half, 2i + 1 in the upper
    for (int i = 0; i < DSV4_ROWS/2; i++) {
        four[i] = _mm256_add_ps(
            _mm256_permute2f128_ps(eight[2*i], eight[2*i + 1], 0x20), _mm256_permute2f128_ps(eight[2*i], eight[2*i + 1], 0x31));
    }
    __m256 two[DSV4_ROWS/4]; // rows 4i, 4i, 4i + 2, 4i + 2 and 4i + 1, 4i + 1, 4i + 3, 4i + 3
    for (int i = 0; i < DSV4_ROWS/4; i++) {
        two[i] = _mm256_add_ps(
            _mm256_shuffle_ps(four[2*i], four[2*i + 1], 0x44), _mm256_shuffle_ps(four[2*i], four[2*i + 1], 0xEE));
    }
    // rows 0, 2, 4, 6 and 1, 3, 5, 7
    const __m256 one = _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xDD));
    _mm256_storeu_ps(s, _mm256_permutevar8x32_ps(one, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

// --- tables ---

static const struct dsv4_kernels f8_kernels    = { in_place,    f8_dot,    f8_decode, tile, dsv4_sum_rows_avx2 };
static const struct dsv4_kernels mxfp4_kernels = { mxfp4_order, mxfp4_dot, mxfp4_decode, tile, dsv4_sum_rows_avx2 };
static const struct dsv4_kernels bf16_kernels  = { in_place,    bf16_dot,  bf16_decode, tile, dsv4_sum_rows_avx2 };

const struct dsv4_kernels * dsv4_kernels_avx2(enum ggml_type type) {
    // F16C came before AVX2, and not every compiler knows its name here
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
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

const struct dsv4_kernels * dsv4_kernels_avx2(enum ggml_type type) {
    (void) type;
    return NULL;
}

void dsv4_sum_rows_avx2(const float * sum, float * s) {
    dsv4_sum_rows_portable(sum, s);
}

#endif
