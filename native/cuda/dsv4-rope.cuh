// Angles of rotary positions and their sines on the GPU, as native/ggml/cpu/rope-angle.h makes them on the CPU: the product of
// the position and a frequency, both float32. Upstream's CUDA code is compiled with -use_fast_math, whose powf, sinf and cosf
// lose more than the rounding of the angle itself at long positions.

#pragma once

// The angle of the pair (i, i + 1), i even. log2_step: -log2(base)/n_dims. The frequency 2^(i*log2_step) by Taylor's series in
// double: 12 operations, since GPUs for games have few units for it; the error is below 2^-38, the result rounded to float32.
static __device__ __forceinline__ float dsv4_rope_angle(float position, double log2_step, int i) {
    const double p = log2_step*i;
    const int    n = (int) (p - 0.5);   // p <= 0: to nearest
    const double x = (p - n)*0.69314718055994530942; // |x| <= 0.35
    double f = 1.0/362880;
    f = __fma_rn(f, x, 1.0/40320);
    f = __fma_rn(f, x, 1.0/5040);
    f = __fma_rn(f, x, 1.0/720);
    f = __fma_rn(f, x, 1.0/120);
    f = __fma_rn(f, x, 1.0/24);
    f = __fma_rn(f, x, 1.0/6);
    f = __fma_rn(f, x, 0.5);
    f = __fma_rn(f, x, 1.0);
    f = __fma_rn(f, x, 1.0);
    // 2^n: n >= -126 for every base and width in use
    return __fmul_rn(position, __fmul_rn((float) f, __uint_as_float((unsigned int) (n + 127) << 23)));
}

// r less k times pi/2, which is given in three parts of 24 bits
static __device__ __forceinline__ float dsv4_less_quarters(float r, float k) {
    r = fmaf(k, -0x1.921fb6p+0f, r);
    r = fmaf(k, 0x1.777a5cp-25f, r);
    return fmaf(k, 0x1.ee59dap-50f, r);
}

// The angle less the nearest multiple of pi/2, which is given as quadrant. Twice: at long positions the first k may be the
// next to the nearest.
static __device__ __forceinline__ float dsv4_reduce_angle(float theta, int & quadrant) {
    const float k0 = rintf(theta*0.636619772f);
    const float r  = dsv4_less_quarters(theta, k0);
    const float k1 = rintf(r*0.636619772f);
    quadrant = ((int) k0 + (int) k1) & 3;
    return dsv4_less_quarters(r, k1);
}

static __device__ __forceinline__ float dsv4_sin_of_quadrant(float r, int quadrant) {
    const float s = r*r;
    float y;
    if (quadrant & 1) { // cosine
        y = fmaf(s, 2.44331571e-5f, -1.38873162e-3f);
        y = fmaf(s, y, 4.16666456e-2f);
        y = fmaf(s, y, -0.5f);
        y = fmaf(s, y, 1.0f);
    } else {
        y = fmaf(s, -1.95152959e-4f, 8.33216087e-3f);
        y = fmaf(s, y, -1.66666546e-1f);
        y = fmaf(s*r, y, r);
    }
    return quadrant & 2 ? -y : y;
}

static __device__ __forceinline__ float dsv4_sinf(float theta) {
    int quadrant;
    const float r = dsv4_reduce_angle(theta, quadrant);
    return dsv4_sin_of_quadrant(r, quadrant);
}

static __device__ __forceinline__ float dsv4_cosf(float theta) {
    int quadrant;
    const float r = dsv4_reduce_angle(theta, quadrant);
    return dsv4_sin_of_quadrant(r, (quadrant + 1) & 3);
}
