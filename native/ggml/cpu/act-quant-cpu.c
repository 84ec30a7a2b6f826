// ACT_QUANT on the CPU: rows are shared out to the threads; a row is rounded block by block in two passes over
// registers, the largest magnitude and then the rounding. Needs the rounding mode "to nearest" and subnormals on.

#include "act-quant-cpu.h"

#include "ggml-cpu-impl.h"

#include <string.h>

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE static inline
#endif

#define F32_MAG 0x7FFFFFFF // all but the sign
#define F32_INF 0x7F800000

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// Constants of a format, in float32 bits where integers are compared: magnitudes order like their bits, and signed
// comparisons are the ones that every instruction set has.
struct format_constants {
    float   qmax_inv; // rounded to float32, as the scale is defined
    int32_t floor;
    int32_t qmax;
    int32_t min_power;   // smallest normal number of the format
    int32_t shift;       // 23 less the mantissa bits of the format, in the exponent's place
};

static const struct format_constants E4M3 = { 1.0f/448.0f, 0x38D1B717, 0x43E00000, (127 - 6) << 23, 20 << 23 };
static const struct format_constants E2M1 = { 1.0f/6.0f,   0x01C00000, 0x40C00000,  127      << 23, 22 << 23 };

// n and f are known wherever this is inlined
ALWAYS_INLINE void act_quant_block(const struct format_constants f, const float * x, float * y, const int64_t n) {
    int32_t amax = f.floor;
    for (int64_t i = 0; i < n; i++) {
        int32_t mag = (int32_t) (to_bits(x[i]) & F32_MAG);
        mag  = mag < F32_INF ? mag : 0;
        amax = amax > mag ? amax : mag;
    }

    // 2^ceil(log2 of the quotient): its exponent, plus one if a mantissa bit is set
    const uint32_t exponent = (to_bits(from_bits((uint32_t) amax) * f.qmax_inv) + 0x007FFFFF) >> 23;
    const float scale     = from_bits(exponent << 23);
    const float scale_inv = from_bits((254 - exponent) << 23);

    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = to_bits(x[i] * scale_inv); // exact, or too small to be anything but zero
        const uint32_t sign = bits & ~(uint32_t) F32_MAG;
        const int32_t  mag  = (int32_t) (bits & F32_MAG);
        const int32_t  top  = mag < f.qmax ? mag : f.qmax;

        // Adding and subtracting a power of two whose last bit is worth the format's step rounds to that step, ties to
        // even. The step is the number's own, and constant below the smallest normal number.
        int32_t power = top & F32_INF;
        power = power > f.min_power ? power : f.min_power;
        const float magic   = from_bits((uint32_t) (power + f.shift));
        const float rounded = (from_bits((uint32_t) top) + magic) - magic;

        const uint32_t is_nan = mag > F32_INF ? 0xFFFFFFFFu : 0;
        const uint32_t result = (to_bits(rounded) & ~is_nan) | ((uint32_t) mag & is_nan);
        y[i] = from_bits(result | sign) * scale;
    }
}

ALWAYS_INLINE void act_quant_row(const struct format_constants f, int64_t block, const float * x, float * y, int64_t n) {
    int64_t i = 0;
    // blocks of the lengths that occur are unrolled
    switch (block) {
        case 32:  for (; i +  32 <= n; i +=  32) { act_quant_block(f, x + i, y + i,  32); } break;
        case 64:  for (; i +  64 <= n; i +=  64) { act_quant_block(f, x + i, y + i,  64); } break;
        case 128: for (; i + 128 <= n; i += 128) { act_quant_block(f, x + i, y + i, 128); } break;
        default:  break;
    }
    for (; i < n; i += block) {
        act_quant_block(f, x + i, y + i, block < n - i ? block : n - i);
    }
}

void dsv4_act_quant_row(enum ggml_act_quant_format format, int64_t block, const float * x, float * y, int64_t n) {
    if (format == GGML_ACT_QUANT_E4M3) {
        act_quant_row(E4M3, block, x, y, n);
    } else {
        act_quant_row(E2M1, block, x, y, n);
    }
}

void dsv4_compute_forward_act_quant(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[0];
    const struct dsv4_act_quant_params p = dsv4_act_quant_get_params(dst);
    const enum ggml_act_quant_format format = (enum ggml_act_quant_format) p.format;

    const int64_t ne0 = dst->ne[0];
    const int64_t nr  = ggml_nrows(dst);

    // the reference path is what test-backend-ops compares with
    void (* const round_row)(enum ggml_act_quant_format, int64_t, const float *, float *, int64_t) =
        params->use_ref ? dsv4_act_quant_row_ref : dsv4_act_quant_row;

    for (int64_t ir = nr*params->ith/params->nth; ir < nr*(params->ith + 1)/params->nth; ir++) {
        const int64_t i1 = ir % dst->ne[1];
        const int64_t i2 = ir / dst->ne[1] % dst->ne[2];
        const int64_t i3 = ir / dst->ne[1] / dst->ne[2];
        const float * x = (const float *) ((const char *) src->data + i1*src->nb[1] + i2*src->nb[2] + i3*src->nb[3]);
        float       * y = (float       *) ((char       *) dst->data + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]);

        round_row(format, p.block, x, y, p.n_channels);
        memcpy(y + p.n_channels, x + p.n_channels, (size_t) (ne0 - p.n_channels)*sizeof(float));
    }
}
