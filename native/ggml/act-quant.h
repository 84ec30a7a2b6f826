// ggml_act_quant: round activations to FP8 (E4M3) or FP4 (E2M1) and straight back, with one power-of-two scale per
// block of consecutive channels. Owns the operation and its readable scalar reference. Leaves the CPU's fast path to
// cpu/act-quant-cpu.h, and what is rounded where to native/llama/dsv4-act-quant.h.
//
// For each block: s = 2^ceil(log2(max(amax, floor) / qmax)), y = s * round(clamp(x / s, -qmax, qmax)), to nearest, ties
// to even, subnormals and the sign of zero kept. amax is the largest finite |x|; infinities saturate, NaN stays NaN and
// touches no other channel. Where s * round(..) exceeds float32 (|x| of 2^128 less one step), the result is infinite.

#pragma once

#include "ggml.h"

#if defined(__FAST_MATH__)
#error "FP8 needs IEEE arithmetic, subnormals and NaN are part of it: compile without -ffast-math"
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_act_quant_format {
    GGML_ACT_QUANT_E4M3 = 0, // qmax 448, floor 1e-4
    GGML_ACT_QUANT_E2M1 = 1, // qmax   6, floor 6 * 2^-126
};

// What the operation's parameters (op_params, int32 each) mean; the backends read it with dsv4_act_quant_get_params.
struct dsv4_act_quant_params {
    int32_t format;     // enum ggml_act_quant_format
    int32_t block;      // channels per scale
    int32_t n_channels; // [0, n_channels) are rounded, the rest of a row is copied
};

// a: F32 (ne0, ...), rows contiguous, rows apart as they like. Returns a contiguous F32 tensor of the same shape.
// n_channels need not be a multiple of block: the last block is then shorter.
GGML_API struct ggml_tensor * ggml_act_quant(
        struct ggml_context * ctx, struct ggml_tensor * a, enum ggml_act_quant_format format, int64_t block,
        int64_t n_channels);

GGML_API struct dsv4_act_quant_params dsv4_act_quant_get_params(const struct ggml_tensor * op);

// One row of n channels, by the book; x and y may be the same.
GGML_API void dsv4_act_quant_row_ref(
        enum ggml_act_quant_format format, int64_t block, const float * x, float * y, int64_t n);

#ifdef __cplusplus
}
#endif
