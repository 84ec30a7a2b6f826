// What our kernels ask of the machine: bits, warps, conversions, the tensor core's step, launching. Owns every intrinsic
// and every line of PTX, so that the kernels themselves are plain C++. native/tests/cuda-host/cuda-host.h offers the same
// names on the CPU, where tests run the kernels' source.

#pragma once

#include <stdint.h>

#if defined(DSV4_CUDA_HOST)

#include "cuda-host.h"

#else

#include <cuda_runtime.h>

// Shared memory of a block under a name: one object of the type.
#define DSV4_SHARED(type, name) __shared__ type name

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define DSV4_HAS_FP8_CVT 1
#else
#define DSV4_HAS_FP8_CVT 0
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DSV4_HAS_BF16_MMA 1
#else
#define DSV4_HAS_BF16_MMA 0
#endif

template <typename... P, typename... A>
static void dsv4_launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, A... args) {
    kernel<<<grid, block, 0, stream>>>(args...);
}

static __device__ __forceinline__ float dsv4_shfl_xor(float x, int lane_mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask);
}

static __device__ __forceinline__ uint32_t dsv4_shfl_xor(uint32_t x, int lane_mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask);
}

// Two E4M3 codes to two floats, exact; NaN becomes NaN.
static __device__ __forceinline__ void dsv4_cvt_e4m3x2(uint32_t codes, float & x0, float & x1) {
#if DSV4_HAS_FP8_CVT
    uint32_t h;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"((uint16_t) codes));
    asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi; }" : "=f"(x0), "=f"(x1) : "r"(h));
#else
    x0 = x1 = (float) codes; // not reached
#endif
}

// float32 to the bits of float16, to nearest, ties to even
static __device__ __forceinline__ uint16_t dsv4_f32_to_f16(float x) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

// d += a * b for tiles of 16x16, 16x8: BF16 factors, float32 sums. PTX m16n8k16: with g = lane/4 and t = lane%4,
// a holds rows g, g + 8 (a0, a1) at k = 2t, 2t + 1, then the same at k + 8 (a2, a3); b holds column g at those k;
// d holds columns 2t, 2t + 1 of row g, then of row g + 8.
static __device__ __forceinline__ void dsv4_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if DSV4_HAS_BF16_MMA
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    d[0] = d[1] = d[2] = d[3] = (float) (a[0] + b[0]); // not reached
#endif
}

#endif // DSV4_CUDA_HOST

// --- the same on both ---

static __device__ __forceinline__ float dsv4_warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        x += dsv4_shfl_xor(x, mask);
    }
    return x;
}

static __device__ __forceinline__ uint32_t dsv4_warp_max(uint32_t x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = dsv4_shfl_xor(x, mask);
        x = other > x ? other : x;
    }
    return x;
}

// The 4 bytes from p on, p at any address: two aligned words and a shift. Both words hold a byte that is asked for, so
// that nothing is read which another allocation could own.
static __device__ __forceinline__ uint32_t dsv4_load_u32(const uint8_t * p) {
    const uintptr_t first = (uintptr_t) p & ~(uintptr_t) 3;
    const uintptr_t last  = (uintptr_t) (p + 3) & ~(uintptr_t) 3;
    return __funnelshift_r(*(const uint32_t *) first, *(const uint32_t *) last, 8*((uint32_t) (uintptr_t) p & 3));
}

static __device__ __forceinline__ float4 dsv4_load_f32x4(const float * p, bool is_aligned) {
    return is_aligned ? *(const float4 *) p : make_float4(p[0], p[1], p[2], p[3]);
}

// float32 to the bits of BF16, to nearest, ties to even; NaN keeps its sign and turns quiet
static __device__ __forceinline__ uint16_t dsv4_f32_to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        return (uint16_t) (bits >> 16 | 64);
    }
    return (uint16_t) ((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
