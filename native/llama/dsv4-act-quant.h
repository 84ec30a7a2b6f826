// What DeepSeek-V4 rounds: the levels of llama_act_quant, where their steps go in the graph, and their mark in saved
// states. Owns those decisions; leaves the rounding itself to native/ggml/act-quant.h.
//
// Called from llama-context.cpp (the level of a context, its states), models/deepseek4.cpp (rows that are kept, indexer
// queries) and llama-graph.cpp (inputs of products). Every function leaves other models as they are.

#pragma once

#include "llama.h"

struct ggml_tensor;
struct llama_cparams;
struct llama_model;
struct llm_graph_context;
class  llama_io_read_i;
class  llama_io_write_i;

// --- the level ---

// What llama_context_default_params() says; LLAMA_ACT_QUANT_CACHE unless it was set. Of the process: programs that make
// contexts without knowing the field follow it.
enum llama_act_quant dsv4_act_quant_default();
void                 dsv4_act_quant_set_default(enum llama_act_quant level);

// "none", "cache", "full", or nullptr
const char * dsv4_act_quant_name(int32_t level);

// The level of a new context: LLAMA_ACT_QUANT_NONE for other models. Throws std::runtime_error for an unknown level.
enum llama_act_quant dsv4_act_quant_level(const llama_model & model, enum llama_act_quant level);

// --- saved states ---

// Before the memory's own data. Reading throws std::runtime_error, with nothing changed, if the state is of another
// level or does not say.
void dsv4_act_quant_state_write(const llama_model & model, const llama_cparams & cparams, llama_io_write_i & io);
void dsv4_act_quant_state_read (const llama_model & model, const llama_cparams & cparams, llama_io_read_i  & io);

// --- graph ---

// A finished KV row (D, ...), after its norm and rope and before any rotation for the cache: all but the rope channels,
// FP8 in blocks of 64, from level cache on.
ggml_tensor * dsv4_act_quant_kv(const llm_graph_context & graph, ggml_tensor * row);

// Indexer queries or rows (D_i, ...), after the Hadamard transform: FP4 in blocks of 32, from level cache on.
ggml_tensor * dsv4_act_quant_index(const llm_graph_context & graph, ggml_tensor * x);

// The input of a product with w: FP8 in blocks of 128 at level full, where the released model's w is FP8 or FP4 (by its
// role: a file may hold it in another type). One rounding serves all products that share the input.
ggml_tensor * dsv4_act_quant_input(const llm_graph_context & graph, const ggml_tensor * w, ggml_tensor * x);

// Whether a routed expert's weight multiplies the input of its down projection, so that it is rounded with it, instead
// of the output: at level full.
bool dsv4_act_quant_weight_before_down(const llm_graph_context & graph);
