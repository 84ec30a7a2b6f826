// Metadata keys of DeepSeek-V4: which must be there, which values the engine can run, and how the keys that the
// native dialect leaves out follow from its tensors. Owns nothing of a key's meaning beyond that.

#pragma once

#include "dsv4-header.h"

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

// The dimensions that the tensor table refers to, in llama.cpp's terms.
struct dsv4_hparams {
    int64_t n_layer         = 0;
    int64_t n_embd          = 0;
    int64_t n_head          = 0;
    int64_t head_dim        = 0;
    int64_t n_rot           = 0;
    int64_t q_lora_rank     = 0;
    int64_t o_groups        = 0;
    int64_t o_lora_rank     = 0;
    int64_t indexer_n_head  = 0;
    int64_t indexer_head_dim = 0;
    int64_t n_ff_exp        = 0;
    int64_t n_expert        = 0;
    int64_t n_expert_used   = 0;
    int64_t n_expert_shared = 0;
    int64_t n_hash_layer    = 0;
    int64_t n_layer_nextn   = 0;
    int64_t hc_count        = 0;
    int64_t n_vocab         = 0;

    std::vector<int32_t> compress_ratios; // at least n_layer entries, each 0, 4 or 128
};

using dsv4_value = std::variant<uint32_t, float, std::string, std::vector<int32_t>, std::vector<float>>;

// Keys to add to the metadata of a native file, in the order of derivation.
using dsv4_derived = std::vector<std::pair<std::string, dsv4_value>>;

// Check all keys and return what they say; `derived` receives the keys that were absent and follow from the tensors.
// Throws dsv4_refusal for the first key that is missing, of the wrong type, or out of the range that the engine can
// run: every value that upstream would assert on is refused here.
dsv4_hparams dsv4_read_hparams(const dsv4_header & header, dsv4_derived & derived);

// The part of it that concerns the tokenizer; returns the number of tokens.
int64_t dsv4_read_vocab(const dsv4_header & header);

// {"deepseek4.expert_gating_func": 4, ...}
std::string dsv4_derived_json(const dsv4_derived & derived);

// Copy `derived` into the metadata.
void dsv4_set_derived(struct gguf_context * metadata, const dsv4_derived & derived);
