// DSV4_HC_POST on rows in memory: out[d] = x*post[d] + sum over s of residual[s]*comb[d, s], for the hc residual streams of
// a token. ggml finds out the place of every number by dividing; here a piece of all streams stays in the nearest cache
// while all outputs are computed from it. Same sums in the same order.

#pragma once

#include "ggml.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Returns false for tensors that it leaves to ggml: other types, rows that are not contiguous.
bool dsv4_hc_post_compute(const struct ggml_compute_params * params, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
