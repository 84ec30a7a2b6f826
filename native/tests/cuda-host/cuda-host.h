// Runs CUDA kernels on the CPU: what dsv4-device.cuh offers on a GPU, as C++. A block is executed by one fiber per CUDA
// thread, which runs until it meets a barrier or an operation of its warp; grids are executed block after block. So the
// source of every kernel is run as it is, with its indices, tails, shared memory, shuffles and barriers, and
// AddressSanitizer sees each access. Owns no kernel and no test.
//
// Stricter than a GPU: every thread of a block must meet every barrier, all lanes of a warp must meet the same operation,
// shared memory starts as NaN in each block, and misaligned accesses stop the test under UndefinedBehaviorSanitizer.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

using std::fmaf;
using std::fmaxf;
using std::fminf;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

typedef void * cudaStream_t;

struct dim3 {
    uint32_t x, y, z;
    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8)  uint2  { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };

static inline uint2  make_uint2(uint32_t x, uint32_t y) { return { x, y }; }
static inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// --- the machine (cuda-host.cpp) ---

void   dsv4_host_run(dim3 grid, dim3 block, const std::function<void()> & kernel);
void * dsv4_host_shared(const char * file, int line, size_t size);
void   dsv4_host_barrier();
// Every lane gives n words and gets those of all 32 lanes: (32, n). kind: all lanes must name the same.
const uint32_t * dsv4_host_exchange(int kind, const uint32_t * words, int n);
int64_t dsv4_host_n_threads(); // run so far

template <typename... P, typename... A>
static void dsv4_launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t, A... args) {
    dsv4_host_run(grid, block, [=]() { kernel(args...); });
}

#define DSV4_SHARED(type, name) type & name = *(type *) dsv4_host_shared(__FILE__, __LINE__, sizeof(type))

static inline void __syncthreads() {
    dsv4_host_barrier();
}

static inline int32_t atomicAdd(int32_t * p, int32_t x) {
    const int32_t old = *p;
    *p += x;
    return old;
}

// --- bits and arithmetic; products and sums must not be contracted by the compiler (-ffp-contract=off) ---

static inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static inline float  __fmul_rn(float x, float y) { return x*y; }
static inline float  __fadd_rn(float x, float y) { return x + y; }
static inline float  __fsub_rn(float x, float y) { return x - y; }
static inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

static inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t shift) {
    return (uint32_t) (((uint64_t) hi << 32 | lo) >> (shift & 31));
}

// --- warps ---

enum { DSV4_HOST_SHFL = 100, DSV4_HOST_MMA = 200 };

static inline uint32_t dsv4_shfl_xor(uint32_t x, int lane_mask) {
    const uint32_t * all = dsv4_host_exchange(DSV4_HOST_SHFL + lane_mask, &x, 1);
    return all[(threadIdx.x % 32) ^ (uint32_t) lane_mask];
}

static inline float dsv4_shfl_xor(float x, int lane_mask) {
    return __uint_as_float(dsv4_shfl_xor(__float_as_uint(x), lane_mask));
}

// --- instructions, by their description in PTX ---

#define DSV4_HAS_BF16_MMA 1

uint16_t dsv4_f32_to_f16(float x);
void     dsv4_cvt_e4m3x2(uint32_t codes, float & x0, float & x1);
void     dsv4_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
