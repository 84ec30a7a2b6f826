// Levels of rounding for DeepSeek-V4; see dsv4-act-quant.h.

#include "dsv4-act-quant.h"

#include "act-quant.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

static std::atomic<enum llama_act_quant> g_default{LLAMA_ACT_QUANT_CACHE};

static constexpr uint32_t STATE_MAGIC = 0x51413456; // "V4AQ"

static constexpr int64_t BLOCK_KV    = 64;
static constexpr int64_t BLOCK_INDEX = 32;
static constexpr int64_t BLOCK_INPUT = 128;

// --- the level ---

enum llama_act_quant dsv4_act_quant_default() {
    return g_default;
}

void dsv4_act_quant_set_default(enum llama_act_quant level) {
    g_default = level;
}

const char * dsv4_act_quant_name(int32_t level) {
    switch (level) {
        case LLAMA_ACT_QUANT_NONE:  return "none";
        case LLAMA_ACT_QUANT_CACHE: return "cache";
        case LLAMA_ACT_QUANT_FULL:  return "full";
        default:                    return nullptr;
    }
}

enum llama_act_quant dsv4_act_quant_level(const llama_model & model, enum llama_act_quant level) {
    if (!dsv4_act_quant_name(level)) {
        throw std::runtime_error("act_quant = " + std::to_string(int(level)) + " is no level of rounding");
    }
    return model.arch == LLM_ARCH_DEEPSEEK4 ? level : LLAMA_ACT_QUANT_NONE;
}

// --- saved states ---

void dsv4_act_quant_state_write(const llama_model & model, const llama_cparams & cparams, llama_io_write_i & io) {
    if (model.arch != LLM_ARCH_DEEPSEEK4) {
        return;
    }
    const uint32_t mark[2] = { STATE_MAGIC, uint32_t(cparams.act_quant) };
    io.write(mark, sizeof(mark));
}

void dsv4_act_quant_state_read(const llama_model & model, const llama_cparams & cparams, llama_io_read_i & io) {
    if (model.arch != LLM_ARCH_DEEPSEEK4) {
        return;
    }
    uint32_t mark[2];
    io.read(mark, sizeof(mark));

    const char * saved = mark[0] == STATE_MAGIC ? dsv4_act_quant_name(int32_t(mark[1])) : nullptr;
    const char * own   = dsv4_act_quant_name(cparams.act_quant);
    if (!saved) {
        throw std::runtime_error("the state does not say how its rows were rounded: it is damaged or of another program");
    }
    if (std::strcmp(saved, own) != 0) {
        throw std::runtime_error(std::string("the state was saved at act_quant = ") + saved + ", this context runs at " + own +
            "; use a context of the state's level, or evaluate the tokens again");
    }
}

// --- graph ---

static bool is_at(const llm_graph_context & graph, enum llama_act_quant level) {
    return graph.arch == LLM_ARCH_DEEPSEEK4 && graph.cparams.act_quant >= level;
}

static ggml_tensor * act_quant(
        const llm_graph_context & graph, ggml_tensor * x, enum ggml_act_quant_format format, int64_t block, int64_t n_channels) {
    ggml_tensor * y = ggml_act_quant(graph.ctx0, x, format, block, n_channels);
    ggml_format_name(y, "%s_q", x->name);
    return y;
}

ggml_tensor * dsv4_act_quant_kv(const llm_graph_context & graph, ggml_tensor * row) {
    if (!is_at(graph, LLAMA_ACT_QUANT_CACHE)) {
        return row;
    }
    return act_quant(graph, row, GGML_ACT_QUANT_E4M3, BLOCK_KV, row->ne[0] - graph.hparams.n_rot());
}

ggml_tensor * dsv4_act_quant_index(const llm_graph_context & graph, ggml_tensor * x) {
    if (!is_at(graph, LLAMA_ACT_QUANT_CACHE)) {
        return x;
    }
    return act_quant(graph, x, GGML_ACT_QUANT_E2M1, BLOCK_INDEX, x->ne[0]);
}

// Weights that are FP8 or FP4 in the released model and take part in products as such. attn_output_a is FP8 too, but
// its input stays as it is; the graph multiplies with it directly.
static bool is_rounded_role(const char * name) {
    static const char * const roles[] = {
        "attn_q_a.weight",       "attn_q_b.weight",       "attn_kv.weight",        "attn_output_b.weight",
        "indexer.attn_q_b.weight",
        "ffn_gate_exps.weight",  "ffn_up_exps.weight",    "ffn_down_exps.weight",
        "ffn_gate_shexp.weight", "ffn_up_shexp.weight",   "ffn_down_shexp.weight",
        "nextn.eh_proj.weight",
    };
    if (std::strncmp(name, "blk.", 4) != 0) {
        return false;
    }
    const char * role = name + 4 + std::strspn(name + 4, "0123456789");
    return *role == '.' && std::any_of(std::begin(roles), std::end(roles), [&](const char * known) {
        return std::strcmp(role + 1, known) == 0;
    });
}

ggml_tensor * dsv4_act_quant_input(const llm_graph_context & graph, const ggml_tensor * w, ggml_tensor * x) {
    if (!is_at(graph, LLAMA_ACT_QUANT_FULL) || !is_rounded_role(w->name)) {
        return x;
    }
    // routed experts take the same rows as the shared one, reshaped: round what both were made of
    if (x->op == GGML_OP_RESHAPE && x->src[0]->ne[0] == x->ne[0]) {
        ggml_tensor * y = dsv4_act_quant_input(graph, w, x->src[0]);
        return ggml_reshape_4d(graph.ctx0, y, x->ne[0], x->ne[1], x->ne[2], x->ne[3]);
    }
    ggml_tensor * & y = graph.act_quant_inputs[x];
    if (!y) {
        y = act_quant(graph, x, GGML_ACT_QUANT_E4M3, BLOCK_INPUT, x->ne[0]);
    }
    return y;
}

bool dsv4_act_quant_weight_before_down(const llm_graph_context & graph) {
    return is_at(graph, LLAMA_ACT_QUANT_FULL);
}
