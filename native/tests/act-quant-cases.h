// Cases of ACT_QUANT for upstream's test-backend-ops, which includes this file among its own. The comparison is with
// the CPU's scalar reference, and exact: a rounding that differs anywhere differs by a whole step.

#pragma once

#include "act-quant.h"

struct test_act_quant : public test_case {
    const ggml_act_quant_format  format;
    const int64_t                block;
    const int64_t                n_channels;
    const std::array<int64_t, 4> ne;
    const int                    layout; // 0 contiguous, 1 first channels of longer rows, 2 rows permuted

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "ACT_QUANT";
    }

    std::string vars() override {
        const std::string act_quant = format == GGML_ACT_QUANT_E4M3 ? "e4m3" : "e2m1";
        return VARS_TO_STR5(act_quant, block, n_channels, ne, layout);
    }

    double max_nmse_err() override {
        return 0.0;
    }

    test_act_quant(ggml_act_quant_format format, int64_t block, int64_t n_channels, std::array<int64_t, 4> ne, int layout = 0)
        : format(format), block(block), n_channels(n_channels), ne(ne), layout(layout) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * x = nullptr;
        switch (layout) {
            case 0:
                x = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne.data());
                break;
            case 1:
                x = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0] + 32, ne[1], ne[2], ne[3]);
                x = ggml_view_4d(ctx, x, ne[0], ne[1], ne[2], ne[3], x->nb[1], x->nb[2], x->nb[3], 16*sizeof(float));
                break;
            default:
                x = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[2], ne[1], ne[3]);
                x = ggml_permute(ctx, x, 0, 2, 1, 3);
                break;
        }
        return ggml_act_quant(ctx, x, format, block, n_channels);
    }

    // Blocks of magnitudes from far below the smallest scale to far above 1, where all numbers are BF16: ties occur.
    void initialize_tensors(ggml_context * ctx) override {
        std::mt19937 rng(1234);
        std::uniform_int_distribution<uint32_t> exponent(127 - 30, 127 + 20);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->op != GGML_OP_NONE || t->view_src != nullptr) {
                continue;
            }
            std::vector<float> data(ggml_nelements(t));
            uint32_t top = 0;
            for (size_t i = 0; i < data.size(); i++) {
                if (i % 32 == 0) {
                    top = exponent(rng);
                }
                // a value in 16 is zero, of either sign
                const uint32_t e    = rng() % 16 == 0 ? 0 : top - rng() % 14;
                const uint32_t bits = (rng() & 0x80000000u) | (e << 23) | (e ? rng() & 0x007F0000u : 0);
                memcpy(&data[i], &bits, sizeof(bits));
            }
            ggml_backend_tensor_set(t, data.data(), 0, data.size()*sizeof(float));
        }
    }
};

static void add_act_quant_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (int layout : {0, 1, 2}) {
        cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E4M3,  64,  448, { 512,  1, 17, 1}, layout)); // KV rows
        cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E2M1,  32,  128, { 128, 64,  3, 1}, layout)); // indexer
        cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E4M3, 128, 4096, {4096,  5,  2, 2}, layout)); // inputs
        cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E4M3,  64,   32, {  64,  3,  2, 3}, layout)); // short block
        cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E2M1,  48,  100, { 101,  7,  1, 1}, layout));
        cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E4M3,  64,    0, {  64,  2,  1, 1}, layout)); // nothing
    }
    cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E4M3,  64, 448, {512, 1, 1, 1})); // one token
    cases.emplace_back(new test_act_quant(GGML_ACT_QUANT_E2M1,  32, 128, {128, 1, 1, 1}));
}
