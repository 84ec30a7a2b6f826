#include "dsv4-rows.cuh"

#include "dsv4-weights.cuh"

static constexpr int N_THREADS = 256;

struct place {
    int64_t i0, i1, i2, i3;
};

// Where weight i of the order lies in a shape.
static __device__ __forceinline__ place place_of(int64_t i, int64_t ne0, int64_t ne1, int64_t ne2) {
    return { i%ne0, i/ne0%ne1, i/ne0/ne1%ne2, i/ne0/ne1/ne2 };
}

template <dsv4_number to>
static __device__ __forceinline__ void store(uint8_t * y, const float (&v)[4]) {
    if constexpr (to == DSV4_F32) {
        float * f = (float *) y;
        if ((uintptr_t) y % 16 == 0) {
            *(float4 *) f = make_float4(v[0], v[1], v[2], v[3]);
        } else {
            f[0] = v[0]; f[1] = v[1]; f[2] = v[2]; f[3] = v[3];
        }
    } else {
        uint16_t h[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            h[i] = to == DSV4_F16 ? dsv4_f32_to_f16(v[i]) : dsv4_f32_to_bf16(v[i]);
        }
        uint16_t * d = (uint16_t *) y;
        if ((uintptr_t) y % 8 == 0) {
            *(uint2 *) d = make_uint2(h[0] | (uint32_t) h[1] << 16, h[2] | (uint32_t) h[3] << 16);
        } else {
            d[0] = h[0]; d[1] = h[1]; d[2] = h[2]; d[3] = h[3];
        }
    }
}

template <dsv4_number to, bool has_cvt>
static __global__ void __launch_bounds__(N_THREADS) dequantize_rows(const dsv4_rows_args a) {
    using W = dsv4_weights_f8;
    const int64_t n_units = a.ne0*a.ne1*a.ne2*a.ne3/W::UNIT;
    const int64_t step    = (int64_t) gridDim.x*N_THREADS;

    for (int64_t unit = (int64_t) blockIdx.x*N_THREADS + threadIdx.x; unit < n_units; unit += step) {
        const place s = place_of(unit*W::UNIT, a.ne0, a.ne1, a.ne2);
        const int   u = (int) (s.i0/W::UNIT);

        int64_t row  = s.i1;
        bool    here = true;
        if (a.ids) {
            row  = a.ids[s.i1*a.is1 + s.i2*a.is2 + s.i3*a.is3];
            here = row >= 0 && row < a.n_src_rows;
        }
        float w[4];
        if (here) {
            const uint8_t * src = a.src + row*a.sb1 + s.i2*a.sb2 + s.i3*a.sb3;
            const float     d   = W::scale(src, u);
            W::decode<has_cvt>(W::load(src, u), w);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                w[i] *= d;
            }
        } else {
            w[0] = w[1] = w[2] = w[3] = __uint_as_float(0x7FC00000u);
        }
        const place d = place_of(unit*W::UNIT, a.de0, a.de1, a.de2);
        store<to>(a.dst + d.i0*(to == DSV4_F32 ? 4 : 2) + d.i1*a.db1 + d.i2*a.db2 + d.i3*a.db3, w);
    }
}

// A warp a block. The scale in integers, as dsv4_f8_e4m3_b128_quantize_row_ref: a rounded log2 would be one too large for
// some largest values of 448 * 2^n.
static __global__ void __launch_bounds__(N_THREADS) quantize_rows(const dsv4_rows_args a) {
    const int     lane     = threadIdx.x % 32;
    const int64_t n_blocks = a.ne0*a.ne1*a.ne2*a.ne3/128;
    const int64_t block    = (int64_t) blockIdx.x*(N_THREADS/32) + threadIdx.x/32;
    if (block >= n_blocks) {
        return;
    }
    const place s = place_of(block*128, a.ne0, a.ne1, a.ne2);
    const place d = place_of(block*128, a.de0, a.de1, a.de2);

    const float * x = (const float *) (a.src + s.i1*a.sb1 + s.i2*a.sb2 + s.i3*a.sb3) + s.i0;
    uint8_t     * y = a.dst + d.i0/128*129 + d.i1*a.db1 + d.i2*a.db2 + d.i3*a.db3;

    float    v[4];
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[i] = x[32*i + lane];
        const uint32_t mag = __float_as_uint(v[i]) & 0x7FFFFFFFu;
        amax = mag < 0x7F800000u && mag > amax ? mag : amax;
    }
    amax = dsv4_warp_max(amax);

    int e = (int) (amax >> 23) - 8 + ((amax & 0x007FFFFFu) > 0x00600000u);
    e = e < 0 ? 0 : e;
    const float inverse = __uint_as_float((uint32_t) (254 - e) << 23);

    if (lane == 0) {
        y[0] = (uint8_t) e;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t bits = __float_as_uint(__fmul_rn(v[i], inverse));
        const uint32_t mag  = bits & 0x7FFFFFFFu;

        uint32_t code = ((mag + 0x0007FFFFu + (mag >> 20 & 1)) >> 20) - (120u << 3);
        code = mag > 0x43E00000u ? 0x7Eu : code; // 448
        code = mag > 0x7F800000u ? 0x7Fu : code;
        if (mag < 0x3C800000u) { // 2^-6: codes are 2^-9 apart, as float32 from 2^14 on
            code = __float_as_uint(__fadd_rn(__uint_as_float(mag), 0x1p14f)) - 0x46800000u;
        }
        y[1 + 32*i + lane] = (uint8_t) (code | (bits >> 24 & 0x80));
    }
}

void dsv4_cuda_dequantize_rows(const dsv4_rows_args & args, dsv4_number to, int cc, cudaStream_t stream) {
    const int64_t n_units = args.ne0*args.ne1*args.ne2*args.ne3/dsv4_weights_f8::UNIT;
    if (n_units == 0) {
        return;
    }
    const int64_t n_blocks = (n_units + N_THREADS - 1)/N_THREADS;
    const dim3    grid((uint32_t) (n_blocks < 0x7FFFFFFF ? n_blocks : 0x7FFFFFFF));
    const bool    has_cvt = cc >= 890;

#define LAUNCH(to) \
    has_cvt ? dsv4_launch(dequantize_rows<to, true>,  grid, dim3(N_THREADS), stream, args) \
            : dsv4_launch(dequantize_rows<to, false>, grid, dim3(N_THREADS), stream, args)
    switch (to) {
        case DSV4_F32:  LAUNCH(DSV4_F32);  break;
        case DSV4_F16:  LAUNCH(DSV4_F16);  break;
        case DSV4_BF16: LAUNCH(DSV4_BF16); break;
    }
#undef LAUNCH
}

void dsv4_cuda_quantize_rows(const dsv4_rows_args & args, cudaStream_t stream) {
    const int64_t n_blocks = args.ne0*args.ne1*args.ne2*args.ne3/128;
    if (n_blocks == 0) {
        return;
    }
    constexpr int n_warps = N_THREADS/32;
    dsv4_launch(quantize_rows, dim3((uint32_t) ((n_blocks + n_warps - 1)/n_warps)), dim3(N_THREADS), stream, args);
}
