// The precision of the inputs of products in DeepSeek-V4's graphs.

#pragma once

struct ggml_cgraph;
struct llama_model;

// In a graph of a deepseek4 model, asks every product with MXFP4, FP8 or BF16 weights for its inputs as they are: BF16 or
// better beside quantised weights (FP8-rounded activations are exact in BF16; 8 bits would lose more than the weights
// do), F32 beside BF16 weights (compressors, indexer weights, head: F32 in the model's definition). Graphs of other
// architectures are left alone.
void dsv4_keep_inputs(const llama_model & model, ggml_cgraph * graph);
