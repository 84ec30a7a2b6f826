// The rounding of activations, for Python: the operation by itself, and the level that new contexts start with.

#include "error.h"

#include "act-quant.h"
#include "dsv4-act-quant.h"
#include "ggml-cpu.h"

#include <vector>

static_assert(int(PYL_ACT_QUANT_E4M3) == int(GGML_ACT_QUANT_E4M3) && int(PYL_ACT_QUANT_E2M1) == int(GGML_ACT_QUANT_E2M1),
    "the formats have other numbers");

int32_t pyl_act_quant_set_default(int32_t level) {
    return pyl_guard([&]() -> int32_t {
        if (!dsv4_act_quant_name(level)) {
            pyl_set_error("no such level of rounding");
            return PYL_ERROR_ARGUMENT;
        }
        dsv4_act_quant_set_default(static_cast<llama_act_quant>(level));
        return PYL_OK;
    });
}

int32_t pyl_act_quant(int32_t format, int64_t block, int64_t n_channels, const float * x, float * y, int64_t n_rows,
        int64_t n_per_row, int32_t n_threads) {
    return pyl_guard([&]() -> int32_t {
        if ((format != GGML_ACT_QUANT_E4M3 && format != GGML_ACT_QUANT_E2M1) || block < 1 || block > INT32_MAX ||
            n_rows < 1 || n_per_row < 1 || n_channels < 0 || n_channels > n_per_row || n_channels > INT32_MAX ||
            n_threads < 1) {
            pyl_set_error("format, block, range of channels, shape or number of threads is out of range");
            return PYL_ERROR_ARGUMENT;
        }
        // the tensors lie over the caller's arrays: nothing is allocated but their descriptions
        const ggml_init_params init = { 4*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
        ggml_context * ctx = ggml_init(init);
        ggml_tensor  * in  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_per_row, n_rows);
        ggml_tensor  * out = ggml_act_quant(ctx, in, static_cast<ggml_act_quant_format>(format), block, n_channels);
        in->data  = const_cast<float *>(x); // only read
        out->data = y;

        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, out);
        std::vector<uint8_t> work;
        ggml_cplan plan = ggml_graph_plan(graph, n_threads, nullptr);
        work.resize(plan.work_size);
        plan.work_data = work.data();
        const ggml_status status = ggml_graph_compute(graph, &plan);
        ggml_free(ctx);
        if (status != GGML_STATUS_SUCCESS) {
            pyl_set_error("the computation failed");
            return PYL_ERROR;
        }
        return PYL_OK;
    });
}
