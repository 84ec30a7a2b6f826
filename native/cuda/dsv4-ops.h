// Operations of ggml on a GPU that are ours: which they are, and how tensors become the kernels' arguments. Owns no kernel
// and knows nothing of upstream's CUDA backend, so that tests run it on the CPU; what connects it to that backend is
// dsv4-cuda.cu.
//
// Ours are: MUL_MAT and MUL_MAT_ID with F8_E4M3_B128 weights, with MXFP4 and BF16 weights where the graph asks for inputs
// as they are (ggml_prec_set_src: BF16 or better, and F32); GET_ROWS and CPY of F8_E4M3_B128; ACT_QUANT.

#pragma once

#include "dsv4-device.cuh"

#include "ggml.h"

// Asks for types, shapes and strides only: tensors need no memory yet.
bool dsv4_cuda_supports(const ggml_tensor * op);

// Bytes of device memory that the operation needs besides its tensors.
int64_t dsv4_cuda_work_size(const ggml_tensor * op, int cc);

// op: dsv4_cuda_supports(op). cc: 100*major + 10*minor of the code that runs, not of the device.
void dsv4_cuda_compute(const ggml_tensor * op, void * work, int cc, cudaStream_t stream);

// Activations known to be exact in BF16: all of their channels come from ACT_QUANT.
bool dsv4_cuda_is_bf16_exact(const ggml_tensor * x);
