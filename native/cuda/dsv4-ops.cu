#include "dsv4-ops.h"

#include "dsv4-act-quant.cuh"
#include "dsv4-mul-mat.cuh"
#include "dsv4-rows.cuh"

#include "act-quant.h"
#include "f8-e4m3-b128.h"

static constexpr ggml_type F8 = GGML_TYPE_F8_E4M3_B128;

static bool is_plain(const ggml_tensor * t) {
    return t->nb[0] == ggml_type_size(t->type);
}

// --- products ---

static bool has_wanted_inputs(const ggml_tensor * op) {
    int32_t prec; // of src[1], see ggml_prec_set_src
    memcpy(&prec, &op->op_params[3], sizeof(prec));
    switch (op->src[0]->type) {
        case F8:              return true;
        case GGML_TYPE_MXFP4: return prec != GGML_PREC_UNDEFINED && prec <= GGML_PREC_BF16;
        case GGML_TYPE_BF16:  return prec == GGML_PREC_F32;
        default:              return false;
    }
}

static bool are_multiples(const ggml_tensor * t, size_t size) {
    return t->nb[1] % size == 0 && t->nb[2] % size == 0 && t->nb[3] % size == 0;
}

static bool supports_product(const ggml_tensor * op) {
    const ggml_tensor * w   = op->src[0];
    const ggml_tensor * x   = op->src[1];
    const ggml_tensor * ids = op->src[2];
    if (!has_wanted_inputs(op) || x->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 ||
            !is_plain(w) || !is_plain(x) || !is_plain(op) || !are_multiples(x, sizeof(float))) {
        return false;
    }
    if (w->type == GGML_TYPE_BF16 && (w->ne[0] % 4 != 0 || !are_multiples(w, 8) || w->view_offs % 8 != 0)) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT_ID) {
        return ids->type == GGML_TYPE_I32 && w->ne[2] <= 1024 && w->ne[3] == 1 && x->ne[3] == 1 &&
            ids->ne[0]*ids->ne[1] < INT32_MAX;
    }
    return x->ne[2] <= UINT16_MAX && x->ne[3] <= UINT16_MAX && x->ne[2]*x->ne[3] <= UINT16_MAX &&
        (w->ne[1] + 127)/128 <= UINT16_MAX;
}

static dsv4_mul_args make_mul_args(const ggml_tensor * op) {
    const ggml_tensor * w   = op->src[0];
    const ggml_tensor * x   = op->src[1];
    const ggml_tensor * ids = op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : nullptr;

    dsv4_mul_args a = {};
    a.w      = (const uint8_t *) w->data;
    a.x      = (const char *) x->data;
    a.y      = (char *) op->data;
    a.n      = w->ne[0];
    a.n_rows = w->ne[1];
    a.n_cols = x->ne[1];
    a.ne2 = ids ? 1 : x->ne[2];
    a.ne3 = ids ? 1 : x->ne[3];
    a.r2  = ids ? 1 : x->ne[2]/w->ne[2];
    a.r3  = ids ? 1 : x->ne[3]/w->ne[3];
    a.wb1 = w->nb[1];  a.wb2 = w->nb[2];  a.wb3 = w->nb[3];
    a.xb1 = x->nb[1];  a.xb2 = x->nb[2];  a.xb3 = x->nb[3];
    a.yb1 = op->nb[1]; a.yb2 = op->nb[2]; a.yb3 = op->nb[3];
    a.x_is_aligned = (uintptr_t) x->data % 16 == 0 && are_multiples(x, 16);
    if (ids) {
        a.ids       = (const int32_t *) ids->data;
        a.n_experts = w->ne[2];
        a.n_used    = ids->ne[0];
        a.n_tokens  = ids->ne[1];
        a.x_ne1     = x->ne[1];
        a.is0       = ids->nb[0]/sizeof(int32_t);
        a.is1       = ids->nb[1]/sizeof(int32_t);
    }
    return a;
}

static dsv4_weights weights_of(const ggml_tensor * w) {
    return w->type == F8 ? DSV4_WEIGHTS_F8 : w->type == GGML_TYPE_MXFP4 ? DSV4_WEIGHTS_MXFP4 : DSV4_WEIGHTS_BF16;
}

// Reading the weights once for each of a few columns or tokens is cheaper than filling a tile with nothing. Without BF16
// tensor cores it is the only way.
static bool is_for_vec(const dsv4_mul_args & a, int cc) {
    return cc < 800 || (a.ids ? a.n_tokens : a.n_cols) <= DSV4_MAX_VEC_COLS;
}

static bool is_empty(const ggml_tensor * t) {
    return ggml_nelements(t) == 0;
}

bool dsv4_cuda_is_bf16_exact(const ggml_tensor * x) {
    while (x->op == GGML_OP_RESHAPE || x->op == GGML_OP_VIEW || x->op == GGML_OP_PERMUTE || x->op == GGML_OP_CONT) {
        x = x->src[0];
    }
    return x->op == GGML_OP_ACT_QUANT && dsv4_act_quant_get_params(x).n_channels == x->ne[0];
}

// --- rows ---

static bool number_of(ggml_type type, dsv4_number & number) {
    switch (type) {
        case GGML_TYPE_F32:  number = DSV4_F32;  return true;
        case GGML_TYPE_F16:  number = DSV4_F16;  return true;
        case GGML_TYPE_BF16: number = DSV4_BF16; return true;
        default:             return false;
    }
}

static bool supports_get_rows(const ggml_tensor * op) {
    dsv4_number to;
    return op->src[0]->type == F8 && op->src[1]->type == GGML_TYPE_I32 && number_of(op->type, to) &&
        is_plain(op->src[0]) && is_plain(op);
}

static bool supports_cpy(const ggml_tensor * op) {
    const ggml_tensor * src = op->src[0];
    dsv4_number to;
    const bool is_decoding = src->type == F8 && number_of(op->type, to) && op->ne[0] % 4 == 0;
    const bool is_encoding = src->type == GGML_TYPE_F32 && op->type == F8 && src->ne[0] % 128 == 0;
    return (is_decoding || is_encoding) && is_plain(src) && is_plain(op);
}

static dsv4_rows_args make_rows_args(const ggml_tensor * op) {
    const bool is_get = op->op == GGML_OP_GET_ROWS;
    const ggml_tensor * src = op->src[0];
    const ggml_tensor * ids = is_get ? op->src[1] : nullptr;
    const ggml_tensor * walk = is_get ? op : src;

    dsv4_rows_args a = {};
    a.src = (const uint8_t *) src->data;
    a.dst = (uint8_t *) op->data;
    a.ne0 = walk->ne[0]; a.ne1 = walk->ne[1]; a.ne2 = walk->ne[2]; a.ne3 = walk->ne[3];
    a.sb1 = src->nb[1];  a.sb2 = src->nb[2];  a.sb3 = src->nb[3];
    a.de0 = op->ne[0];   a.de1 = op->ne[1];   a.de2 = op->ne[2];
    a.db1 = op->nb[1];   a.db2 = op->nb[2];   a.db3 = op->nb[3];
    if (is_get) {
        a.ids = (const int32_t *) ids->data;
        a.n_src_rows = src->ne[1];
        a.is1 = ids->nb[0]/sizeof(int32_t);
        a.is2 = ids->nb[1]/sizeof(int32_t);
        a.is3 = ids->nb[2]/sizeof(int32_t);
    }
    return a;
}

// --- ACT_QUANT ---

static bool supports_act_quant(const ggml_tensor * op) {
    return op->type == GGML_TYPE_F32 && op->src[0]->type == GGML_TYPE_F32 && is_plain(op->src[0]) && is_plain(op);
}

static dsv4_act_quant_args make_act_quant_args(const ggml_tensor * op) {
    const ggml_tensor * x = op->src[0];
    const dsv4_act_quant_params params = dsv4_act_quant_get_params(op);

    dsv4_act_quant_args a = {};
    a.x = (const char *) x->data;
    a.y = (char *) op->data;
    a.ne0 = x->ne[0]; a.ne1 = x->ne[1]; a.ne2 = x->ne[2];
    a.n_rows = ggml_nrows(x);
    a.nb1 = x->nb[1];  a.nb2 = x->nb[2];  a.nb3 = x->nb[3];
    a.mb1 = op->nb[1]; a.mb2 = op->nb[2]; a.mb3 = op->nb[3];
    a.block      = params.block;
    a.n_channels = params.n_channels;
    a.n_blocks   = (int32_t) ((x->ne[0] + params.block - 1)/params.block);
    a.is_e4m3    = params.format == GGML_ACT_QUANT_E4M3;
    return a;
}

// --- all of them ---

bool dsv4_cuda_supports(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: return supports_product(op);
        case GGML_OP_GET_ROWS:   return supports_get_rows(op);
        case GGML_OP_CPY:        return supports_cpy(op);
        case GGML_OP_ACT_QUANT:  return supports_act_quant(op);
        default:                 return false;
    }
}

int64_t dsv4_cuda_work_size(const ggml_tensor * op, int cc) {
    if (op->op != GGML_OP_MUL_MAT_ID || is_empty(op)) {
        return 0;
    }
    const dsv4_mul_args a = make_mul_args(op);
    return is_for_vec(a, cc) ? 0 : dsv4_cuda_mul_mat_work_size(a);
}

void dsv4_cuda_compute(const ggml_tensor * op, void * work, int cc, cudaStream_t stream) {
    if (is_empty(op)) {
        return;
    }
    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            {
                const dsv4_mul_args a    = make_mul_args(op);
                const dsv4_weights  type = weights_of(op->src[0]);
                if (is_for_vec(a, cc)) {
                    dsv4_cuda_mul_vec(a, type, cc, stream);
                } else {
                    dsv4_cuda_mul_mat(a, type, dsv4_cuda_is_bf16_exact(op->src[1]), work, cc, stream);
                }
            } break;
        case GGML_OP_GET_ROWS:
        case GGML_OP_CPY:
            {
                const dsv4_rows_args a = make_rows_args(op);
                dsv4_number to = DSV4_F32;
                if (number_of(op->type, to)) {
                    dsv4_cuda_dequantize_rows(a, to, cc, stream);
                } else {
                    dsv4_cuda_quantize_rows(a, stream);
                }
            } break;
        case GGML_OP_ACT_QUANT:
            dsv4_cuda_act_quant(make_act_quant_args(op), stream);
            break;
        default:
            GGML_ABORT("%s is not ours", ggml_op_name(op->op));
    }
}
