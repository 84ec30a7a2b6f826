#include "dsv4-experts.h"

#include "dsv4-paging.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama-batch.h"

#include <algorithm>
#include <map>
#include <vector>

static bool is_in_host_memory(const ggml_tensor * t) {
    return t->data && t->buffer && ggml_backend_buffer_is_host(t->buffer);
}

// The experts that a table of (n_used, n_vocab) ids gives to the tokens: none if they are many, or if it gives none to one of them.
static std::vector<int32_t> experts_of(const ggml_tensor * table, const llama_ubatch & ubatch) {
    std::vector<int32_t> experts;
    if (!ubatch.token || ubatch.n_tokens*table->ne[0] > DSV4_PAGING_AHEAD) {
        return experts;
    }
    const auto * ids = static_cast<const int32_t *>(table->data);
    for (uint32_t t = 0; t < ubatch.n_tokens; t++) {
        const llama_token token = ubatch.token[t];
        if (token < 0 || token >= table->ne[1]) {
            return {};
        }
        for (int64_t i = 0; i < table->ne[0]; i++) {
            const int32_t expert = ids[token*table->ne[0] + i];
            if (std::find(experts.begin(), experts.end(), expert) == experts.end()) {
                experts.push_back(expert);
            }
        }
    }
    return experts;
}

void dsv4_page_experts(const ggml_cgraph * graph, const llama_ubatch & ubatch) {
    if (!dsv4_paging_is_on()) {
        return;
    }
    auto * gf = const_cast<ggml_cgraph *>(graph);
    std::map<const ggml_tensor *, std::vector<const ggml_tensor *>> weights; // by the tensor of chosen experts
    for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
        const ggml_tensor * node = ggml_graph_node(gf, i);
        if (node->op == GGML_OP_MUL_MAT_ID && is_in_host_memory(node->src[0])) {
            weights[node->src[2]].push_back(node->src[0]);
        }
    }
    for (const auto & [ids, of_layer] : weights) {
        dsv4_paging_join(of_layer.data(), (int) std::min<size_t>(of_layer.size(), DSV4_PAGING_MATRICES));
        const ggml_tensor * table = ids->op == GGML_OP_GET_ROWS ? ids->src[0] : nullptr;
        if (table && table->type == GGML_TYPE_I32 && ggml_is_contiguous(table) && is_in_host_memory(table)) {
            const std::vector<int32_t> experts = experts_of(table, ubatch);
            dsv4_paging_announce_early(of_layer[0], experts.data(), (int) experts.size());
        }
    }
}
