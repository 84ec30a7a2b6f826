// The operation ACT_QUANT: making it, reading its parameters, and its scalar reference. See act-quant.h.

#include "act-quant.h"

#include "ggml-impl.h"

#include <math.h>
#include <string.h>

struct ggml_tensor * ggml_act_quant(
        struct ggml_context * ctx, struct ggml_tensor * a, enum ggml_act_quant_format format, int64_t block,
        int64_t n_channels) {
    GGML_ASSERT(a->type == GGML_TYPE_F32);
    GGML_ASSERT(a->nb[0] == sizeof(float));
    GGML_ASSERT(format == GGML_ACT_QUANT_E4M3 || format == GGML_ACT_QUANT_E2M1);
    GGML_ASSERT(block > 0 && block <= INT32_MAX);
    GGML_ASSERT(n_channels >= 0 && n_channels <= a->ne[0] && n_channels <= INT32_MAX);

    struct ggml_tensor * result = ggml_new_tensor(ctx, GGML_TYPE_F32, GGML_MAX_DIMS, a->ne);

    const struct dsv4_act_quant_params params = { (int32_t) format, (int32_t) block, (int32_t) n_channels };
    ggml_set_op_params(result, &params, sizeof(params));

    result->op     = GGML_OP_ACT_QUANT;
    result->src[0] = a;

    return result;
}

struct dsv4_act_quant_params dsv4_act_quant_get_params(const struct ggml_tensor * op) {
    struct dsv4_act_quant_params params;
    memcpy(&params, op->op_params, sizeof(params));
    return params;
}

// exponent of the block's scale
static int scale_exponent(float amax, float floor, float qmax) {
    const float quotient = (amax > floor ? amax : floor) * (1.0f/qmax);
    uint32_t bits;
    memcpy(&bits, &quotient, sizeof(bits));
    return (int) (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0);
}

// nearest number of the format, ties to even
static float round_to_format(float y, int n_mantissa, int min_exponent, float qmax) {
    if (isnan(y)) {
        return y;
    }
    const float mag = fabsf(y) < qmax ? fabsf(y) : qmax;

    int exponent; // mag in [2^(exponent-1), 2^exponent)
    frexpf(mag, &exponent);
    exponent -= 1;
    // In units of the step the significand is an integer whose last bit is the code's last bit: an even integer is an
    // even code, also where rounding carries into the next power of two.
    const int step = (exponent > min_exponent ? exponent : min_exponent) - n_mantissa;

    return copysignf(ldexpf(nearbyintf(ldexpf(mag, -step)), step), y);
}

void dsv4_act_quant_row_ref(
        enum ggml_act_quant_format format, int64_t block, const float * x, float * y, int64_t n) {
    const bool  is_e4m3      = format == GGML_ACT_QUANT_E4M3;
    const float qmax         = is_e4m3 ? 448.0f : 6.0f;
    const float floor        = is_e4m3 ? 1e-4f : 0x6p-126f;
    const int   n_mantissa   = is_e4m3 ? 3 : 1;
    const int   min_exponent = is_e4m3 ? -6 : 0;

    for (int64_t i0 = 0; i0 < n; i0 += block) {
        const int64_t i1 = i0 + block < n ? i0 + block : n;

        float amax = 0.0f;
        for (int64_t i = i0; i < i1; i++) {
            amax = isfinite(x[i]) && fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
        }
        const int e = scale_exponent(amax, floor, qmax);
        for (int64_t i = i0; i < i1; i++) {
            y[i] = ldexpf(round_to_format(ldexpf(x[i], -e), n_mantissa, min_exponent, qmax), e);
        }
    }
}
