// Products of FP8, MXFP4 and BF16 weights: kernels and graph operations against double arithmetic on ggml's own decoded values.

#include "check.h"

#include "../ggml/cpu/dsv4-kernels.h"
#include "../ggml/cpu/dsv4-product.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static constexpr ggml_type F8    = GGML_TYPE_F8_E4M3_B128;
static constexpr ggml_type MXFP4 = GGML_TYPE_MXFP4;
static constexpr ggml_type BF16  = GGML_TYPE_BF16;

static std::mt19937 rng(11);

// Rows with any code but NaN and scales of middling size.
static void fill_weights(ggml_type type, uint8_t * p, size_t size) {
    if (type == BF16) {
        for (size_t i = 0; i < size; i += sizeof(ggml_bf16_t)) {
            const ggml_bf16_t x = ggml_fp32_to_bf16(std::normal_distribution<float>()(rng));
            memcpy(p + i, &x, sizeof(x));
        }
        return;
    }
    const size_t block = ggml_type_size(type);
    for (size_t i = 0; i < size; i++) {
        const uint8_t b = (uint8_t) rng();
        p[i] = i % block == 0 ? (uint8_t) (115 + b % 20) : type == F8 && (b & 0x7F) == 0x7F ? 0 : b;
    }
}

static std::vector<float> decoded(ggml_type type, const void * data, int64_t n) {
    std::vector<float> y(n);
    ggml_get_type_traits(type)->to_float(data, y.data(), n);
    return y;
}

static std::vector<float> normal_row(int64_t n) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    return x;
}

// Rounding of the sums only: the inputs enter as they are. With inputs rounded to BF16 the error is 2^-9 of a term,
// about 2^-9/sqrt(k) of sum_abs, several times the bound.
static void check_dot(float got, const float * w, const float * x, int64_t k, const char * what) {
    double want = 0.0, sum_abs = 0.0;
    for (int64_t i = 0; i < k; i++) {
        want    += (double) w[i]*x[i];
        sum_abs += fabs((double) w[i]*x[i]);
    }
    const double bound = (double) (8 + k/128)*0x1p-24*sum_abs;
    CHECK(fabs(got - want) <= bound, "%s, k = %d: %.9g instead of %.9g", what, (int) k, got, want);
}

// --- kernels ---

static std::vector<float> panel(const dsv4_kernels * kernels, const std::vector<float> & x) {
    std::vector<float> y(dsv4_n_groups(x.size())*DSV4_GROUP);
    for (size_t i = 0; i < y.size(); i++) {
        const size_t from = i/DSV4_GROUP*DSV4_GROUP + kernels->order[i % DSV4_GROUP];
        y[i] = from < x.size() ? x[from] : 0.0f;
    }
    return y;
}

// every code under every scale, through decode, against ggml's own row function
static void test_decode(const dsv4_kernels * kernels, ggml_type type) {
    const int64_t blck  = ggml_blck_size(type);
    const int64_t n     = type == F8 ? 256 : 128;
    const size_t  block = ggml_type_size(type);
    for (int e = 0; e < 256; e++) {
        std::vector<uint8_t> row(ggml_row_size(type, n));
        for (size_t i = 0; i < row.size(); i++) {
            row[i] = i % block == 0 ? (uint8_t) e : (uint8_t) (type == F8 ? i - i/block - 1 : rng());
        }
        std::vector<float> w(n), d(n/DSV4_GROUP*DSV4_LANES);
        kernels->decode(n, row.data(), w.data(), d.data());
        const std::vector<float> want = decoded(type, row.data(), n);
        for (int64_t i = 0; i < n; i++) {
            const int64_t at  = i/DSV4_GROUP*DSV4_GROUP + kernels->order[i % DSV4_GROUP];
            const float   got = w[i]*d[i/DSV4_GROUP*DSV4_LANES + i % DSV4_LANES];
            // ggml multiplies MXFP4 codes under scale 255 by 2^128, where the format says NaN
            const bool is_nan = std::isnan(want[at]) || (type == MXFP4 && e == 255);
            CHECK(is_nan ? std::isnan(got) : got == want[at],
                "%s, e = %d, value %d of block %d: %g instead of %g",
                ggml_type_name(type), e, (int) (at % blck), (int) (at/blck), got, want[at]);
        }
    }
}

static void test_dot(const dsv4_kernels * kernels, ggml_type type, int64_t n) {
    const int64_t n_groups = dsv4_n_groups(n);
    const size_t row_bytes = ggml_row_size(type, n);

    std::vector<uint8_t> rows(DSV4_ROWS*row_bytes);
    fill_weights(type, rows.data(), rows.size());
    std::vector<float> w(DSV4_ROWS*n_groups*DSV4_GROUP), d(DSV4_ROWS*n_groups*DSV4_LANES);
    for (int r = 0; r < DSV4_ROWS; r++) {
        kernels->decode(n, rows.data() + r*row_bytes, w.data() + r*n_groups*DSV4_GROUP, d.data() + r*n_groups*DSV4_LANES);
    }

    std::vector<std::vector<float>> x, y;
    const float * columns[DSV4_COLS];
    for (int c = 0; c < DSV4_COLS; c++) {
        x.push_back(normal_row(n));
        y.push_back(panel(kernels, x[c]));
        columns[c] = y[c].data();
    }
    for (int n_cols = 1; n_cols <= DSV4_COLS; n_cols++) {
        std::vector<float> sum(n_cols*DSV4_ROWS*DSV4_LANES, 0.0f);
        kernels->tile(n_groups, w.data(), d.data(), columns, n_cols, sum.data());
        for (int c = 0; c < n_cols; c++) {
            float rows_of_tile[DSV4_ROWS];
            kernels->sum_rows(sum.data() + c*DSV4_ROWS*DSV4_LANES, rows_of_tile);
            for (int r = 0; r < DSV4_ROWS; r++) {
                float one;
                kernels->dot(n, rows.data() + r*row_bytes, columns[c], &one);
                check_dot(one, decoded(type, rows.data() + r*row_bytes, n).data(), x[c].data(), n, "dot");
                float lanes[DSV4_LANES];
                memcpy(lanes, sum.data() + (c*DSV4_ROWS + r)*DSV4_LANES, sizeof(lanes));
                const float s = dsv4_sum_lanes(lanes);
                CHECK(memcmp(rows_of_tile + r, &s, 4) == 0, "sum of row %d: %.9g instead of %.9g", r, rows_of_tile[r], s);
                CHECK(memcmp(&one, &s, 4) == 0, "row %d, column %d of %d: %.9g alone, %.9g in a tile", r, c, n_cols, one, s);
            }
        }
    }
}

// A row's bytes may begin anywhere: FP8 blocks of 129 bytes and MXFP4 blocks of 17 follow each other in a mapped file. The
// allocation ends with the row, for tools that watch what is read.
static void test_alignment(const dsv4_kernels * kernels, ggml_type type) {
    const int64_t n = 512;
    std::vector<uint8_t> row(ggml_row_size(type, n));
    fill_weights(type, row.data(), row.size());
    const std::vector<float> y = panel(kernels, normal_row(n));
    float want;
    kernels->dot(n, row.data(), y.data(), &want);
    for (size_t shift = 0; shift < 64; shift += type == BF16 ? 2 : 1) {
        std::vector<uint8_t> moved(shift + row.size());
        memcpy(moved.data() + shift, row.data(), row.size());
        float got;
        kernels->dot(n, moved.data() + shift, y.data(), &got);
        CHECK(memcmp(&got, &want, 4) == 0, "%s moved by %d bytes: %g instead of %g", ggml_type_name(type), (int) shift, got, want);
    }
}

// A NaN code or scale makes its row NaN and no other, whichever way a kernel goes for it.
static void test_nan(const dsv4_kernels * kernels, ggml_type type) {
    const int64_t n = 256;
    const std::vector<float> y = panel(kernels, normal_row(n));
    std::vector<uint8_t> row(ggml_row_size(type, n));
    for (size_t i = 0; i < row.size(); i++) {
        const bool is_scale = i % ggml_type_size(type) == 0;
        if (type == MXFP4 && !is_scale) {
            continue;
        }
        for (uint8_t code : { 0x7F, 0xFF }) {
            fill_weights(type, row.data(), row.size());
            row[i] = is_scale ? 0xFF : code;
            float got;
            kernels->dot(n, row.data(), y.data(), &got);
            CHECK(std::isnan(got), "%s, byte %d is %02X: %g", ggml_type_name(type), (int) i, row[i], got);
        }
    }
}

// --- operations ---

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
        if (type == GGML_TYPE_F32) {
            const std::vector<float> x = normal_row(ggml_nelements(t));
            memcpy(t->data, x.data(), ggml_nbytes(t));
        } else if (type != GGML_TYPE_I32) {
            fill_weights(type, (uint8_t *) t->data, ggml_nbytes(t));
        }
        return t;
    }

    void compute(ggml_tensor * out, int n_threads) {
        ggml_cgraph * gf = ggml_new_graph(ctx);
        ggml_build_forward_expand(gf, out);
        CHECK(ggml_graph_compute_with_ctx(ctx, gf, n_threads) == GGML_STATUS_SUCCESS, "graph");
    }
};

static ggml_tensor * exact(ggml_tensor * product) {
    ggml_prec_set_src(product, product->src[0]->type == BF16 ? GGML_PREC_F32 : GGML_PREC_BF16, 1);
    return product;
}

static void test_mul_mat(ggml_type type, int64_t k, int64_t m, int64_t n, int n_threads) {
    graph g;
    ggml_tensor * w = g.make(type, { k, m });
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, n });
    ggml_tensor * y = exact(ggml_mul_mat(g.ctx, w, x)); // (m, n)
    g.compute(y, n_threads);
    const std::vector<float> wf = decoded(type, w->data, k*m);
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            check_dot(((float *) y->data)[j*m + i], wf.data() + i*k, (float *) x->data + j*k, k, "mul_mat");
        }
    }
    // one column at a time: the same bits
    for (int64_t j = 0; j < n; j++) {
        ggml_tensor * one = exact(ggml_mul_mat(g.ctx, w, ggml_view_1d(g.ctx, x, k, j*x->nb[1])));
        g.compute(one, 1);
        CHECK(memcmp(one->data, (char *) y->data + j*y->nb[1], m*sizeof(float)) == 0, "column %d of %d alone", (int) j, (int) n);
    }
}

// wo_a: one projection per group of heads; x permuted, and weights shared by two batches
static void test_mul_mat_batched(ggml_type type) {
    const int64_t k = 256, m = 5, n = 3, n_groups = 4, n_batches = 2;
    graph g;
    ggml_tensor * w = g.make(type, { k, m, n_groups });
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, n_groups, n, n_batches });
    ggml_tensor * y = exact(ggml_mul_mat(g.ctx, w, ggml_permute(g.ctx, x, 0, 2, 1, 3))); // (m, n, n_groups, n_batches)
    g.compute(y, 2);
    const std::vector<float> wf = decoded(type, w->data, ggml_nelements(w));
    for (int64_t b = 0; b < n_batches; b++) {
        for (int64_t h = 0; h < n_groups; h++) {
            for (int64_t j = 0; j < n; j++) {
                for (int64_t i = 0; i < m; i++) {
                    check_dot(((float *) y->data)[((b*n_groups + h)*n + j)*m + i], wf.data() + (h*m + i)*k,
                        (float *) x->data + ((b*n + j)*n_groups + h)*k, k, "batched");
                }
            }
        }
    }
}

// n_x: activations per token, 1 for w1 and w3 (shared), n_used for w2
static void test_mul_mat_id(ggml_type type, int64_t k, int64_t n_x, int64_t n_tokens, int n_threads) {
    const int64_t m = 39, n_expert = 6, n_used = 2;
    graph g;
    ggml_tensor * w = g.make(type, { k, m, n_expert });
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, n_x, n_tokens });
    ggml_tensor * ids = g.make(GGML_TYPE_I32, { n_used, n_tokens });
    int32_t * id = (int32_t *) ids->data;
    for (int64_t i = 0; i < n_used*n_tokens; i++) {
        id[i] = (int32_t) (i % 2 == 0 ? rng() % 2 : 3 + rng() % 3); // expert 2 is never used
    }
    ggml_tensor * y = exact(ggml_mul_mat_id(g.ctx, w, x, ids)); // (m, n_used, n_tokens)
    g.compute(y, n_threads);
    const std::vector<float> wf = decoded(type, w->data, ggml_nelements(w));
    for (int64_t i = 0; i < n_used*n_tokens; i++) {
        const float * xi = (float *) x->data + (i/n_used*n_x + i % n_used % n_x)*k;
        for (int64_t r = 0; r < m; r++) {
            check_dot(((float *) y->data)[i*m + r], wf.data() + (id[i]*m + r)*k, xi, k, "mul_mat_id");
        }
    }
}

// A damaged routing table names an expert that does not exist: its result is NaN, the others are right.
static void test_expert_out_of_range() {
    const int64_t k = 128, m = 4;
    graph g;
    ggml_tensor * w = g.make(MXFP4, { k, m, 3 });
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, 1, 2 });
    ggml_tensor * ids = g.make(GGML_TYPE_I32, { 2, 2 });
    const int32_t values[4] = { 3, 2, -1, 0 };
    memcpy(ids->data, values, sizeof(values));
    ggml_tensor * y = exact(ggml_mul_mat_id(g.ctx, w, x, ids));
    g.compute(y, 2);
    for (int i = 0; i < 4; i++) {
        for (int64_t r = 0; r < m; r++) {
            CHECK(std::isnan(((float *) y->data)[i*m + r]) == (i % 2 == 0), "slot %d", i);
        }
    }
}

// Other models keep ggml's 8-bit inputs; ours do not disturb the reference mode.
static void test_what_is_left_alone() {
    const int64_t k = 256, m = 8;
    graph g;
    ggml_tensor * w = g.make(MXFP4, { k, m });
    ggml_tensor * x = g.make(GGML_TYPE_F32, { k, 1 });
    ggml_tensor * plain = ggml_mul_mat(g.ctx, w, x);
    CHECK(dsv4_product_work_size(2, plain) == 0, "MXFP4 without a wish for precision");
    ggml_tensor * q8 = ggml_mul_mat(g.ctx, w, x);
    ggml_prec_set_src(q8, GGML_PREC_Q8, 1);
    CHECK(dsv4_product_work_size(2, q8) == 0, "MXFP4 with 8 bits");
    CHECK(dsv4_product_work_size(2, exact(ggml_mul_mat(g.ctx, w, x))) > 0, "MXFP4 with BF16");
    CHECK(dsv4_product_work_size(2, ggml_mul_mat(g.ctx, g.make(F8, { k, m }), x)) > 0, "FP8");
    CHECK(dsv4_product_work_size(2, ggml_mul_mat(g.ctx, g.make(GGML_TYPE_F32, { k, m }), x)) == 0, "F32");

    ggml_tensor * bf16 = ggml_mul_mat(g.ctx, g.make(BF16, { k, m }), x);
    CHECK(dsv4_product_work_size(2, bf16) == 0, "BF16 without a wish for precision");
    ggml_prec_set_src(bf16, GGML_PREC_BF16, 1);
    CHECK(dsv4_product_work_size(2, bf16) == 0, "BF16 with BF16");
    CHECK(dsv4_product_work_size(2, exact(bf16)) > 0, "BF16 with F32");

    g.compute(plain, 1);
    const std::vector<float> wf = decoded(MXFP4, w->data, k*m);
    double error = 0.0, power = 0.0;
    for (int64_t i = 0; i < m; i++) {
        double want = 0.0;
        for (int64_t j = 0; j < k; j++) {
            want += (double) wf[i*k + j]*((float *) x->data)[j];
        }
        error += pow(((float *) plain->data)[i] - want, 2);
        power += want*want;
    }
    CHECK(error/power > 1e-7 && error/power < 1e-3, "NMSE of 8-bit inputs is %g", error/power);
}

int main() {
    ggml_cpu_init();
    for (const ggml_type type : { F8, MXFP4, BF16 }) {
        const struct { const char * name; const dsv4_kernels * kernels; } sets[] = {
            { "portable", dsv4_kernels_portable(type) }, { "AVX2", dsv4_kernels_avx2(type) },
            { "AVX-512 VBMI", dsv4_kernels_avx512(type) }, { "NEON", dsv4_kernels_neon(type) },
        };
        for (const auto & set : sets) {
            const dsv4_kernels * kernels = set.kernels;
            std::printf("%s, %s: %s\n", ggml_type_name(type), set.name, kernels ? "tested" : "not on this machine");
            if (!kernels) {
                continue;
            }
            if (type != BF16) {
                test_decode(kernels, type);
                test_nan(kernels, type);
            }
            test_alignment(kernels, type);
            for (int64_t n : { 128, 256, 1024, 4096 }) {
                test_dot(kernels, type, n);
            }
            if (type == MXFP4) {
                for (int64_t n : { 32, 64, 160, 224, 992 }) {
                    test_dot(kernels, type, n);
                }
            }
            if (type == BF16) {
                for (int64_t n : { 1, 31, 129, 1000 }) {
                    test_dot(kernels, type, n);
                }
            }
        }
        for (int n_threads : { 1, 2, 3 }) {
            test_mul_mat(type,  128,  1,  1, n_threads);
            test_mul_mat(type,  256, 33,  1, n_threads);
            test_mul_mat(type, 1024, 18, 17, n_threads);
            test_mul_mat(type, 4096,  3,  5, n_threads);
            test_mul_mat(type, 1152, 67, 101, n_threads);
            test_mul_mat_id(type, 384, 1,  1, n_threads);
            test_mul_mat_id(type, 384, 2,  1, n_threads);
            test_mul_mat_id(type, 256, 1, 29, n_threads);
            test_mul_mat_id(type, 256, 2, 29, n_threads);
        }
        test_mul_mat_batched(type);
    }
    test_mul_mat(MXFP4, 96, 5, 6, 2);
    test_mul_mat(BF16, 100, 5, 6, 2);
    test_expert_out_of_range();
    test_what_is_left_alone();
    return check_result("test-native-products");
}
