// Graph operations of the CPU backend on F8_E4M3_B128 tensors, against the decoded weights. Products are tested in
// test-native-products.cpp.

#include "check.h"

#include "../ggml/f8-e4m3-b128.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

static constexpr ggml_type F8 = GGML_TYPE_F8_E4M3_B128;

static std::mt19937 rng(7);

struct graph {
    ggml_context * ctx;

    graph() {
        ggml_init_params params = { 64*1024*1024, nullptr, false };
        ctx = ggml_init(params);
    }
    ~graph() { ggml_free(ctx); }

    ggml_tensor * make(ggml_type type, std::vector<int64_t> ne) {
        ne.resize(4, 1);
        ggml_tensor * t = ggml_new_tensor(ctx, type, 4, ne.data());
        if (type == F8) {
            uint8_t * p = (uint8_t *) t->data;
            for (size_t i = 0; i < ggml_nbytes(t); i++) {
                const uint8_t b = (uint8_t) rng();
                p[i] = i % 129 == 0 ? (uint8_t) (115 + b % 8) : (b & 0x7F) == 0x7F ? 0 : b;
            }
        } else if (type == GGML_TYPE_F32) {
            std::normal_distribution<float> normal;
            for (int64_t i = 0; i < ggml_nelements(t); i++) {
                ((float *) t->data)[i] = normal(rng);
            }
        }
        return t;
    }

    void compute(ggml_tensor * out, int n_threads) {
        ggml_cgraph * gf = ggml_new_graph(ctx);
        ggml_build_forward_expand(gf, out);
        CHECK(ggml_graph_compute_with_ctx(ctx, gf, n_threads) == GGML_STATUS_SUCCESS, "graph");
    }
};

static std::vector<float> decoded(const ggml_tensor * t) {
    std::vector<float> y(ggml_nelements(t));
    dsv4_f8_e4m3_b128_dequantize_row(t->data, y.data(), ggml_nelements(t));
    return y;
}

static void test_get_rows() {
    const int64_t k = 256, n_rows = 11, n_ids = 5;
    graph g;
    ggml_tensor * w = g.make(F8, { k, n_rows });
    ggml_tensor * ids = ggml_new_tensor_1d(g.ctx, GGML_TYPE_I32, n_ids);
    for (int64_t i = 0; i < n_ids; i++) {
        ((int32_t *) ids->data)[i] = (int32_t) (i*7 % n_rows);
    }
    ggml_tensor * y = ggml_get_rows(g.ctx, w, ids);
    g.compute(y, 2);
    const std::vector<float> wf = decoded(w);
    for (int64_t i = 0; i < n_ids; i++) {
        CHECK(memcmp((float *) y->data + i*k, wf.data() + ((int32_t *) ids->data)[i]*k, k*4) == 0, "get_rows %d", (int) i);
    }
}

static void test_copies() {
    const int64_t k = 256, n_rows = 6;
    graph g;
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, n_rows });
    std::vector<uint8_t> want(ggml_row_size(F8, k)*n_rows);
    dsv4_f8_e4m3_b128_quantize_row_ref((float *) x->data, want.data(), k*n_rows);

    ggml_tensor * q = ggml_cpy(g.ctx, x, g.make(F8, { k, n_rows }));
    g.compute(q, 2);
    CHECK(memcmp(q->data, want.data(), want.size()) == 0, "cpy f32 -> f8");

    ggml_tensor * src = g.make(F8, { k, n_rows });
    ggml_tensor * f = ggml_cpy(g.ctx, src, g.make(GGML_TYPE_F32, { k, n_rows }));
    g.compute(f, 2);
    CHECK(memcmp(f->data, decoded(src).data(), ggml_nbytes(f)) == 0, "cpy f8 -> f32");

    ggml_tensor * same = ggml_cpy(g.ctx, src, g.make(F8, { k, n_rows }));
    g.compute(same, 2);
    CHECK(memcmp(same->data, src->data, ggml_nbytes(src)) == 0, "cpy f8 -> f8");

    ggml_tensor * dst = g.make(F8, { k, 2*n_rows });
    const std::vector<uint8_t> before((uint8_t *) dst->data, (uint8_t *) dst->data + ggml_nbytes(dst));
    ggml_tensor * ids = ggml_new_tensor_1d(g.ctx, GGML_TYPE_I64, n_rows);
    for (int64_t i = 0; i < n_rows; i++) {
        ((int64_t *) ids->data)[i] = 2*i + 1;
    }
    ggml_tensor * set = ggml_set_rows(g.ctx, dst, x, ids);
    g.compute(set, 2);
    const size_t row = ggml_row_size(F8, k);
    for (int64_t i = 0; i < 2*n_rows; i++) {
        const uint8_t * expected = i % 2 ? want.data() + i/2*row : before.data() + i*row;
        CHECK(memcmp((uint8_t *) dst->data + i*row, expected, row) == 0, "set_rows, row %d", (int) i);
    }
}

// LoRA merges add float32 to quantised weights
static void test_add() {
    const int64_t k = 128, n_rows = 3;
    graph g;
    ggml_tensor * w = g.make(F8, { k, n_rows });
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, n_rows });
    std::vector<float> sum = decoded(w);
    for (int64_t i = 0; i < k*n_rows; i++) {
        sum[i] += ((float *) x->data)[i];
    }
    std::vector<uint8_t> want(ggml_nbytes(w));
    dsv4_f8_e4m3_b128_quantize_row_ref(sum.data(), want.data(), k*n_rows);
    ggml_tensor * y = ggml_add(g.ctx, w, x);
    g.compute(y, 2);
    CHECK(y->type == F8 && memcmp(y->data, want.data(), want.size()) == 0, "add");
}

static void test_out_prod() {
    const int64_t m = 128, n = 4, k = 5;
    graph g;
    ggml_tensor * a = g.make(F8, { m, k });
    ggml_tensor * b = g.make(GGML_TYPE_F32, { n, k });
    ggml_tensor * y = ggml_out_prod(g.ctx, a, b); // (m, n) = sum over k of a[:, k] b[:, k]^T
    g.compute(y, 2);
    const std::vector<float> af = decoded(a);
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            double want = 0.0, sum_abs = 0.0;
            for (int64_t l = 0; l < k; l++) {
                want    += (double) af[l*m + i]*((float *) b->data)[l*n + j];
                sum_abs += fabs((double) af[l*m + i]*((float *) b->data)[l*n + j]);
            }
            const float got = ((float *) y->data)[j*m + i];
            CHECK(fabs(got - want) <= 8*0x1p-24*sum_abs, "out_prod: %.9g instead of %.9g", got, want);
        }
    }
}

int main() {
    ggml_cpu_init();
    test_get_rows();
    test_copies();
    test_add();
    test_out_prod();
    return check_result("test-f8-e4m3-b128-ops");
}
