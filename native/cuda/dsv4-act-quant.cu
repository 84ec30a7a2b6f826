#include "dsv4-act-quant.cuh"

static constexpr int N_WARPS = 4;

// x in units of the scale, clamped and rounded: to nearest, ties to even, in steps of the format
template <bool is_e4m3>
static __device__ __forceinline__ float round_to_format(float x) {
    constexpr float    qmax    = is_e4m3 ? 448.0f : 6.0f;
    constexpr int      shift   = is_e4m3 ? 20 : 22;                // mantissa bits that go
    constexpr float    min     = is_e4m3 ? 0x1p-6f : 1.0f;         // below it the steps are all alike,
    constexpr float    spacing = is_e4m3 ? 0x1p14f : 0x1p22f;      // as large as float32's own from here on

    const uint32_t bits = __float_as_uint(x);
    const float    mag  = fminf(__uint_as_float(bits & 0x7FFFFFFFu), qmax);

    uint32_t r = __float_as_uint(mag);
    if (mag < min) {
        r = __float_as_uint(__fsub_rn(__fadd_rn(mag, spacing), spacing));
    } else {
        r = (r + (1u << (shift - 1)) - 1 + (r >> shift & 1)) >> shift << shift;
    }
    return __uint_as_float(r | (bits & 0x80000000u));
}

template <bool is_e4m3>
static __global__ void __launch_bounds__(32*N_WARPS) act_quant(const dsv4_act_quant_args a) {
    const int     lane = threadIdx.x % 32;
    const int64_t unit = (int64_t) blockIdx.x*N_WARPS + threadIdx.x/32;
    if (unit >= a.n_rows*a.n_blocks) {
        return;
    }
    const int64_t row = unit/a.n_blocks;
    const int64_t i0  = unit%a.n_blocks*a.block;

    const int64_t i1 = row%a.ne1;
    const int64_t i2 = row/a.ne1%a.ne2;
    const int64_t i3 = row/a.ne1/a.ne2;
    const float * x  = (const float *) (a.x + i1*a.nb1 + i2*a.nb2 + i3*a.nb3);
    float       * y  = (float *)       (a.y + i1*a.mb1 + i2*a.mb2 + i3*a.mb3);

    const int64_t end   = i0 + a.block < a.n_channels ? i0 + a.block : a.n_channels; // of what is rounded
    const int64_t limit = i0 + a.block < a.ne0        ? i0 + a.block : a.ne0;

    // for magnitudes the order of the bits is the order of the values
    uint32_t amax = 0;
    for (int64_t i = i0 + lane; i < end; i += 32) {
        const uint32_t mag = __float_as_uint(x[i]) & 0x7FFFFFFFu;
        amax = mag < 0x7F800000u && mag > amax ? mag : amax;
    }
    amax = dsv4_warp_max(amax);

    // The smallest power of two that is not below the quotient, itself rounded to float32 as the definition says. Its
    // exponent lies in -126 .. 126, so that it and its inverse are normal.
    constexpr float floor    = is_e4m3 ? 1e-4f : 0x6p-126f;
    constexpr float qmax_inv = is_e4m3 ? 1.0f/448.0f : 1.0f/6.0f;
    const uint32_t  quotient = __float_as_uint(__fmul_rn(fmaxf(__uint_as_float(amax), floor), qmax_inv));
    const uint32_t  exponent = (quotient >> 23) + ((quotient & 0x7FFFFFu) != 0);
    const float     scale    = __uint_as_float(exponent << 23);
    const float     inverse  = __uint_as_float((254 - exponent) << 23);

    for (int64_t i = i0 + lane; i < limit; i += 32) {
        const float v = x[i];
        const bool  is_copied = i >= end || v != v;
        y[i] = is_copied ? v : __fmul_rn(round_to_format<is_e4m3>(__fmul_rn(v, inverse)), scale);
    }
}

void dsv4_cuda_act_quant(const dsv4_act_quant_args & args, cudaStream_t stream) {
    const int64_t n_units = args.n_rows*args.n_blocks;
    if (n_units == 0) {
        return;
    }
    const dim3 grid((uint32_t) ((n_units + N_WARPS - 1)/N_WARPS));
    if (args.is_e4m3) {
        dsv4_launch(act_quant<true>, grid, dim3(32*N_WARPS), stream, args);
    } else {
        dsv4_launch(act_quant<false>, grid, dim3(32*N_WARPS), stream, args);
    }
}
