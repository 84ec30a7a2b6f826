// Products of FP8, MXFP4 and BF16 weights with float32 activations that are not rounded: MUL_MAT and MUL_MAT_ID. Owns the
// arguments that both kernels share; dsv4-mul-vec.cu reads weights for few columns, dsv4-mul-mat.cu for many.

#pragma once

#include "dsv4-device.cuh"

enum dsv4_weights {
    DSV4_WEIGHTS_F8,
    DSV4_WEIGHTS_MXFP4,
    DSV4_WEIGHTS_BF16,
};

static constexpr int DSV4_MAX_VEC_COLS = 8;

struct dsv4_mul_args {
    const uint8_t * w;   // (n, n_rows, ..) weights
    const char    * x;   // (n, n_cols, ..) float32
    char          * y;   // (n_rows, n_cols, ..) float32
    const int32_t * ids; // MUL_MAT_ID: (n_used, n_tokens) experts, else null
    int64_t n;           // weights of a row
    int64_t n_rows;
    int64_t n_cols;      // MUL_MAT
    int64_t ne2, ne3;    // MUL_MAT: matrices of x and y
    int64_t r2, r3;      //   matrices of x for one of w
    int64_t wb1, wb2, wb3; // bytes
    int64_t xb1, xb2, xb3;
    int64_t yb1, yb2, yb3;
    int64_t n_experts, n_used, n_tokens; // MUL_MAT_ID
    int64_t x_ne1;       //   activations of a token: n_used, or 1 for all experts alike
    int64_t is0, is1;    //   ids, elements
    bool    x_is_aligned; // every row of x starts at a multiple of 16 bytes
};

// Column (or slot of MUL_MAT_ID: token*n_used + u) addresses.
static __device__ __forceinline__ const float * dsv4_x_of_slot(const dsv4_mul_args & a, int64_t slot) {
    return (const float *) (a.x + slot%a.n_used%a.x_ne1*a.xb1 + slot/a.n_used*a.xb2);
}

static __device__ __forceinline__ float * dsv4_y_of_slot(const dsv4_mul_args & a, int64_t slot) {
    return (float *) (a.y + slot%a.n_used*a.yb1 + slot/a.n_used*a.yb2);
}

static __device__ __forceinline__ int32_t dsv4_expert_of_slot(const dsv4_mul_args & a, int64_t slot) {
    return a.ids[slot%a.n_used*a.is0 + slot/a.n_used*a.is1];
}

// n_cols <= DSV4_MAX_VEC_COLS columns, or all slots of few tokens
void dsv4_cuda_mul_vec(const dsv4_mul_args & args, dsv4_weights type, int cc, cudaStream_t stream);

// Any number of columns or slots, on tensor cores (cc >= 800). is_bf16: the activations are exact in BF16, as ACT_QUANT makes
// them; else they are split into three BF16 terms that sum to them exactly. work: dsv4_cuda_mul_mat_work_size bytes.
void dsv4_cuda_mul_mat(
    const dsv4_mul_args & args, dsv4_weights type, bool is_bf16, void * work, int cc, cudaStream_t stream);
int64_t dsv4_cuda_mul_mat_work_size(const dsv4_mul_args & args);
