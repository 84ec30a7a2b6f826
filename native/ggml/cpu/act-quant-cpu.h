// The CPU's ACT_QUANT, compiled with the instruction set of the CPU backend; the operation is described in
// ../act-quant.h. Called from ggml-cpu.c (ggml_compute_forward).

#pragma once

#include "../act-quant.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void dsv4_compute_forward_act_quant(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// As dsv4_act_quant_row_ref, bit for bit, in loops without branches that compilers vectorise.
void dsv4_act_quant_row(enum ggml_act_quant_format format, int64_t block, const float * x, float * y, int64_t n);

#ifdef __cplusplus
}
#endif
