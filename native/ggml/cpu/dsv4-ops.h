// Operations of ggml that the CPU backend computes here instead: products of native weights (dsv4-product.h), and mixing
// the residual streams (dsv4-hc-post.h). Called from traits.cpp, before the switch over operations.

#pragma once

#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Computes op with all threads of params, or returns false: not ours, or the reference mode.
bool dsv4_compute(struct ggml_compute_params * params, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
