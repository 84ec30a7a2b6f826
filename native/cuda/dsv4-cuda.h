// Called by upstream's CUDA backend, where patches/ggml-cuda-*.patch say so. Each is false, or null, for whatever is not ours.

#pragma once

#include "ggml-cuda/common.cuh"
#include "ggml-cuda/convert.cuh"

// ggml-cuda.cu, supports_op, fusion and the question of synchronisation: is it ours?
bool dsv4_cuda_supports(const ggml_tensor * op);

// ggml-cuda.cu, ggml_cuda_compute_forward and ggml_cuda_mul_mat: compute it, if it is ours.
bool dsv4_cuda_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op);

// convert.cu: F8_E4M3_B128, k weights or rows apart by s01, s02, s03 blocks
void dsv4_cuda_f8_to_f32 (const void * x, float       * y, int64_t k, cudaStream_t stream);
void dsv4_cuda_f8_to_f16 (const void * x, half        * y, int64_t k, cudaStream_t stream);
void dsv4_cuda_f8_to_bf16(const void * x, nv_bfloat16 * y, int64_t k, cudaStream_t stream);
void dsv4_cuda_f8_to_f32_nc (const void * x, float       * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
    int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream);
void dsv4_cuda_f8_to_f16_nc (const void * x, half        * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
    int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream);
void dsv4_cuda_f8_to_bf16_nc(const void * x, nv_bfloat16 * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
    int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream);
