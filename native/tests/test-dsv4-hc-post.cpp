// DSV4_HC_POST on rows against double arithmetic: several sizes, threads, with and without mixing, and tensors whose
// rows are not contiguous, which are left to ggml.

#include "check.h"

#include "../ggml/cpu/dsv4-hc-post.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <random>

static std::mt19937 rng(5);

static ggml_tensor * normal(ggml_context * ctx, int64_t n0, int64_t n1, int64_t n2) {
    ggml_tensor * t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n0, n1, n2);
    std::normal_distribution<float> values;
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        ((float *) t->data)[i] = values(rng);
    }
    return t;
}

static double at(const ggml_tensor * t, int64_t i0, int64_t i1, int64_t i2) {
    return *(const float *) ((const char *) t->data + i0*t->nb[0] + i1*t->nb[1] + i2*t->nb[2]);
}

static void test(int64_t n_embd, int64_t hc, int64_t n_tokens, bool mixes, bool is_strided, int n_threads) {
    ggml_context * ctx = ggml_init({ 64*1024*1024, nullptr, false });
    ggml_tensor * x        = normal(ctx, n_embd, n_tokens, 1);
    ggml_tensor * residual = normal(ctx, n_embd, hc, n_tokens);
    ggml_tensor * post     = normal(ctx, hc, n_tokens, 1);
    ggml_tensor * comb     = mixes ? normal(ctx, hc, hc, n_tokens) : nullptr;
    if (is_strided) { // one number in two
        x = ggml_view_2d(ctx, normal(ctx, 2*n_embd, n_tokens, 1), n_embd, n_tokens, 2*n_embd*sizeof(float), 0);
        x->nb[0] = 2*sizeof(float);
    }
    ggml_tensor * out = ggml_dsv4_hc_post(ctx, x, residual, post, comb);
    ggml_cgraph * gf  = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, out);
    CHECK(ggml_graph_compute_with_ctx(ctx, gf, n_threads) == GGML_STATUS_SUCCESS, "graph");

    double worst = 0.0;
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t to = 0; to < hc; to++) {
            for (int64_t i = 0; i < n_embd; i++) {
                double want = at(x, i, t, 0)*at(post, to, t, 0);
                for (int64_t from = 0; from < hc; from++) {
                    want += at(residual, i, from, t)*(mixes ? at(comb, to, from, t) : from == to);
                }
                worst = std::fmax(worst, std::fabs(at(out, i, to, t) - want));
            }
        }
    }
    CHECK(worst < 1e-5, "n_embd %d, hc %d, %d tokens, mixes %d, strided %d, %d threads: %g away",
        (int) n_embd, (int) hc, (int) n_tokens, mixes, is_strided, n_threads, worst);
    ggml_free(ctx);
}

int main() {
    ggml_cpu_init();
    for (int n_threads : { 1, 2, 3 }) {
        for (bool mixes : { true, false }) {
            test(1, 4, 1, mixes, false, n_threads);
            test(512, 4, 1, mixes, false, n_threads);
            test(1111, 4, 3, mixes, false, n_threads);
            test(2048, 3, 17, mixes, false, n_threads);
            test(700, 4, 2, mixes, true, n_threads);
        }
    }
    return check_result("test-dsv4-hc-post");
}
