// File type 41, which two writers claim: native files say MOSTLY_F8_E4M3_MXFP4 with it, upstream's say MOSTLY_Q2_0. In
// memory the native one is 41 and Q2_0 is 42, in files both are 41. Owns the translation of general.file_type and the
// choice of tensor types when the quantiser makes the native mix. Leaves tensor type 42 to native/ggml/gguf-type42.h.
//
// Called from llama-model-loader.cpp (constructor) and llama-quant.cpp (tensor type, output file's metadata).

#pragma once

#include "ggml.h"
#include "llama.h"

#include <cstdint>

// file_type: the value in the file; n_f8: how many of the model's tensors are F8_E4M3_B128, which decides what 41
// means. Values that no writer uses today are kept apart from ours; dsv4_ftype_to_file gives them back unchanged.
llama_ftype dsv4_ftype_from_file(uint32_t file_type, uint32_t n_f8);
uint32_t    dsv4_ftype_to_file(llama_ftype ftype);

// Type of a 2D or 3D weight in a MOSTLY_F8_E4M3_MXFP4 file, as in the released checkpoint: routed experts MXFP4;
// embedding, head, compressors and indexer.proj BF16; hyper-connections and positional parameters as they are; the
// rest F8_E4M3_B128. BF16 also where a row is not a multiple of the block.
ggml_type dsv4_ftype41_tensor_type(const ggml_tensor * tensor, bool is_embd_or_output);
