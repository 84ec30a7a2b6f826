#include "dsv4-experts.h"

#include "dsv4-paging.h"
#include "ggml.h"

#include <algorithm>
#include <map>
#include <vector>

void dsv4_join_experts(const ggml_cgraph * graph) {
    if (!dsv4_paging_is_on()) {
        return;
    }
    std::map<const ggml_tensor *, std::vector<const ggml_tensor *>> weights; // by the tensor of chosen experts
    for (int i = 0; i < ggml_graph_n_nodes(const_cast<ggml_cgraph *>(graph)); i++) {
        const ggml_tensor * node = ggml_graph_node(const_cast<ggml_cgraph *>(graph), i);
        if (node->op == GGML_OP_MUL_MAT_ID && node->src[0]->data) {
            weights[node->src[2]].push_back(node->src[0]);
        }
    }
    for (const auto & [ids, of_layer] : weights) {
        dsv4_paging_join(of_layer.data(), (int) std::min<size_t>(of_layer.size(), DSV4_PAGING_MATRICES));
    }
}
