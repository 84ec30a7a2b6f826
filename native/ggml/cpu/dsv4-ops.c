#include "dsv4-ops.h"

#include "dsv4-hc-post.h"
#include "dsv4-product.h"

#include "ggml-cpu-impl.h"

bool dsv4_compute(struct ggml_compute_params * params, struct ggml_tensor * op) {
    if (params->use_ref) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return dsv4_product_compute(params, op);
        case GGML_OP_DSV4_HC_POST:
            return dsv4_hc_post_compute(params, op);
        default:
            return false;
    }
}
