// CPU kernels of F8_E4M3_B128, compiled with the instruction set of the CPU backend. Owns the dot product with BF16
// activations; the format and its row functions are in f8-e4m3-b128.h. Called from ggml-cpu.c (type_traits_cpu).

#pragma once

#include "../f8-e4m3-b128.h"

#ifdef __cplusplus
extern "C" {
#endif

// *s = sum over n of x (blocks) * y (bf16), in float32; n a multiple of 128. nrc is 1: bs, bx and by are not used.
void dsv4_f8_e4m3_b128_vec_dot_bf16(
        int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx,
        const void * GGML_RESTRICT vy, size_t by, int nrc);

#ifdef __cplusplus
}
#endif
