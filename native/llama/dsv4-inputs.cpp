#include "dsv4-inputs.h"

#include "llama-model.h"

void dsv4_keep_inputs(const llama_model & model, ggml_cgraph * graph) {
    if (model.arch != LLM_ARCH_DEEPSEEK4) {
        return;
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) {
            continue;
        }
        switch (node->src[0]->type) {
            case GGML_TYPE_F8_E4M3_B128:
            case GGML_TYPE_MXFP4:
                ggml_prec_set_src(node, GGML_PREC_BF16, 1);
                break;
            case GGML_TYPE_BF16:
                ggml_prec_set_src(node, GGML_PREC_F32, 1);
                break;
            default:
                break;
        }
    }
}
