// Products of the weights of native files with float32 activations that are not rounded: MUL_MAT and MUL_MAT_ID of
// F8_E4M3_B128 always, of MXFP4 and BF16 where the graph asks for it (ggml_prec_set_src: BF16 or better, and F32). ggml
// would round the inputs of FP8 and BF16 weights to BF16 and those of MXFP4 to 8 bits. Owns threads, batches and experts; sums are in dsv4-kernels.h.
//
// Called from ggml-cpu.c (work size) and dsv4-ops.c.

#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Bytes of work memory for op, 0 if it is none of ours. The caller takes the maximum with what ggml wants, because the
// reference mode does not come here.
size_t dsv4_product_work_size(int n_threads, const struct ggml_tensor * op);

// Computes op with all threads of params, or returns false: not ours.
bool dsv4_product_compute(struct ggml_compute_params * params, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
