// The CUDA kernels of native/cuda, run on the CPU by cuda-host.h and compared with the scalar references: every code and
// scale, odd sizes, tails, strides, alignments, one to eight columns and many. Built twice, the second time with
// AddressSanitizer and UndefinedBehaviorSanitizer.

#include "../check.h"

#include "cuda-host.h"
#include "dsv4-ops.h"
#include "dsv4-rope.cuh"

#include "act-quant.h"
#include "f8-e4m3-b128.h"
#include "ggml-impl.h"
#include "ggml.h"
#include "rope-angle.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

static constexpr ggml_type F32   = GGML_TYPE_F32;
static constexpr ggml_type F16   = GGML_TYPE_F16;
static constexpr ggml_type F8    = GGML_TYPE_F8_E4M3_B128;
static constexpr ggml_type MXFP4 = GGML_TYPE_MXFP4;
static constexpr ggml_type BF16  = GGML_TYPE_BF16;

static constexpr int TURING = 750, AMPERE = 800, ADA = 890;

static std::mt19937 rng(5);

static bool same_bits(float a, float b) {
    return (std::isnan(a) && std::isnan(b)) || memcmp(&a, &b, sizeof(a)) == 0;
}

// --- tensors: each has memory of its own, of its size and not more, so that AddressSanitizer sees its ends ---

struct graph {
    ggml_context * ctx;
    std::vector<std::unique_ptr<uint8_t[]>> memory;

    graph() : ctx(ggml_init({ 256*1024, nullptr, true })) {}
    ~graph() { ggml_free(ctx); }
    graph(const graph &) = delete;
    graph & operator=(const graph &) = delete;

    // At an address of the given remainder by 16. GPUs read whole words: sizes are multiples of 4 from there.
    void place(ggml_tensor * t, size_t offset = 0) {
        const size_t size = GGML_PAD(offset + ggml_nbytes(t), 4);
        memory.emplace_back(new uint8_t[size]);
        memset(memory.back().get(), 0xFF, size);
        t->data = memory.back().get() + offset;
    }
    ggml_tensor * make(ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1, size_t offset = 0) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, type, ne0, ne1, ne2, ne3);
        place(t, offset);
        return t;
    }
    // A view has its data where its source has; everything else gets memory.
    ggml_tensor * out(ggml_tensor * op, size_t offset = 0) {
        if (op->view_src) {
            op->data = (char *) op->view_src->data + op->view_offs;
        } else {
            place(op, offset);
        }
        return op;
    }
};

static void run(ggml_tensor * op, int cc) {
    CHECK(dsv4_cuda_supports(op), "%s is not supported", ggml_op_desc(op));
    const int64_t size = dsv4_cuda_work_size(op, cc);
    std::unique_ptr<uint8_t[]> work(new uint8_t[size]);
    memset(work.get(), 0xFF, size);
    dsv4_cuda_compute(op, work.get(), cc, nullptr);
}

// Any code but NaN, scales of middling size.
static void fill_weights(ggml_tensor * t) {
    uint8_t * p = (uint8_t *) t->data;
    const size_t size = ggml_nbytes(t);
    if (t->type == BF16) {
        for (size_t i = 0; i < size/2; i++) {
            const ggml_bf16_t x = ggml_fp32_to_bf16(std::normal_distribution<float>()(rng));
            memcpy(p + 2*i, &x, 2);
        }
        return;
    }
    const size_t block = ggml_type_size(t->type);
    for (size_t i = 0; i < size; i++) {
        const uint8_t b = (uint8_t) rng();
        p[i] = i%block == 0 ? (uint8_t) (115 + b%20) : t->type == F8 && (b & 0x7F) == 0x7F ? 0 : b;
    }
}

static void fill_normal(ggml_tensor * t) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        const float x = normal(rng);
        memcpy((char *) t->data + i*sizeof(float), &x, sizeof(x));
    }
}

static std::vector<float> row_of(const ggml_tensor * t, int64_t i1, int64_t i2, int64_t i3) {
    const char * p = (const char *) t->data + i1*t->nb[1] + i2*t->nb[2] + i3*t->nb[3];
    std::vector<float> y(t->ne[0]);
    if (t->type == F32) {
        memcpy(y.data(), p, y.size()*sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(p, y.data(), t->ne[0]);
    }
    return y;
}

// 512 rows of 128: every code under every scale
static void fill_all_codes(uint8_t * p, bool has_nan) {
    for (int row = 0; row < 512; row++) {
        p[row*129] = (uint8_t) (row/2);
        for (int i = 0; i < 128; i++) {
            const uint8_t code = (uint8_t) (row%2*128 + i);
            p[row*129 + 1 + i] = !has_nan && (code & 0x7F) == 0x7F ? 0 : code;
        }
    }
}

// --- the machine itself ---

static void diverging_barrier() {
    if (threadIdx.x != 3) {
        __syncthreads();
    }
}

static void diverging_shuffle() {
    if (threadIdx.x < 8) {
        dsv4_shfl_xor(1.0f, 1);
    } else {
        dsv4_shfl_xor(1.0f, 2);
    }
}

static void reduce(float * out) {
    DSV4_SHARED(float, first);
    const float sum = dsv4_warp_sum((float) threadIdx.x);
    if (threadIdx.x == 0) {
        *out = first; // before anyone has written
    }
    __syncthreads();
    first = sum;
    __syncthreads();
    out[1 + blockIdx.x*64 + threadIdx.x] = sum;
}

static bool dies(void (*kernel)()) {
    std::fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        if (!std::freopen("/dev/null", "w", stderr)) {
            _exit(1);
        }
        dsv4_launch(kernel, dim3(1), dim3(64), nullptr);
        _exit(0);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

static void test_machine() {
    float out[129];
    dsv4_launch(reduce, dim3(2), dim3(64), nullptr, &out[0]);
    CHECK(std::isnan(out[0]), "shared memory starts as %g", out[0]);
    for (int i = 0; i < 128; i++) {
        CHECK(out[1 + i] == (i/32%2 ? 1520.0f : 496.0f), "thread %d has the sum %g", i, out[1 + i]);
    }
    CHECK(dies(diverging_barrier), "a barrier that a thread misses passes");
    CHECK(dies(diverging_shuffle), "lanes in different shuffles pass");
}

// --- rows ---

static void test_all_codes() {
    graph g;
    std::vector<float> want(512*128);
    for (int cc : { TURING, ADA }) {
        for (ggml_type type : { F32, F16, BF16 }) {
            for (size_t offset : { 0, 1, 2, 3 }) { // of the blocks; then of the destination
                ggml_tensor * src = g.make(F8, 128, 512, 1, 1, offset);
                fill_all_codes((uint8_t *) src->data, true);
                dsv4_f8_e4m3_b128_dequantize_row(src->data, want.data(), 512*128);
                ggml_tensor * dst = g.make(type, 128, 512, 1, 1, offset*ggml_type_size(type));
                ggml_tensor * cpy = g.out(ggml_cpy(g.ctx, src, dst));
                run(cpy, cc);
                for (size_t i = 0; i < want.size(); i++) {
                    if (type == F32) {
                        CHECK(same_bits(((float *) dst->data)[i], want[i]), "code %zu of scale %zu: %g instead of %g",
                            i%256, i/256, ((float *) dst->data)[i], want[i]);
                        continue;
                    }
                    const uint16_t got = ((uint16_t *) dst->data)[i];
                    const uint16_t ref = type == F16 ? ggml_fp32_to_fp16(want[i]) : ggml_fp32_to_bf16(want[i]).bits;
                    const uint16_t inf = type == F16 ? 0x7C00 : 0x7F80;
                    CHECK(got == ref || ((got & 0x7FFF) > inf && (ref & 0x7FFF) > inf), "code %zu of scale %zu as %s: %04x, not %04x",
                        i%256, i/256, ggml_type_name(type), got, ref);
                }
            }
        }
    }
}

static void test_cpy_strides() {
    for (int cc : { TURING, ADA }) {
        graph g;
        ggml_tensor * whole = g.make(F8, 384, 3, 5, 2);
        fill_weights(whole);
        ggml_tensor * part = g.out(ggml_view_4d(g.ctx, whole, 256, 2, 5, 2, whole->nb[1], whole->nb[2], whole->nb[3],
            whole->nb[1] + 129));                                            // neither the first block nor the first row
        ggml_tensor * src  = g.out(ggml_permute(g.ctx, part, 0, 2, 1, 3)); // 256, 5, 2, 2
        ggml_tensor * dst  = g.make(F32, 40, 128, 1, 1);                   // the same weights in other rows
        run(g.out(ggml_cpy(g.ctx, src, dst)), cc);
        for (int64_t i3 = 0, at = 0; i3 < 2; i3++) {
            for (int64_t i2 = 0; i2 < 2; i2++) {
                for (int64_t i1 = 0; i1 < 5; i1++) {
                    for (float want : row_of(src, i1, i2, i3)) {
                        const float got = ((float *) dst->data)[at++];
                        CHECK(same_bits(got, want), "copied weight %d: %g instead of %g", (int) at - 1, got, want);
                    }
                }
            }
        }
    }
}

static void test_get_rows() {
    for (int cc : { TURING, ADA }) {
        graph g;
        ggml_tensor * src = g.make(F8, 384, 7, 2, 3);
        fill_weights(src);
        ggml_tensor * all_ids = g.make(GGML_TYPE_I32, 6, 2, 3);
        for (int i = 0; i < 36; i++) {
            ((int32_t *) all_ids->data)[i] = i == 8 ? 7 : i == 20 ? -1 : (int32_t) (rng()%7);
        }
        ggml_tensor * ids = g.out(ggml_view_3d(g.ctx, all_ids, 5, 2, 3, all_ids->nb[1], all_ids->nb[2], 0));
        ggml_tensor * dst = g.out(ggml_get_rows(g.ctx, src, ids));
        run(dst, cc);
        for (int64_t i3 = 0; i3 < 3; i3++) {
            for (int64_t i2 = 0; i2 < 2; i2++) {
                for (int64_t i1 = 0; i1 < 5; i1++) {
                    const int32_t id = ((int32_t *) all_ids->data)[i1 + 6*i2 + 12*i3];
                    const bool here  = id >= 0 && id < 7;
                    const std::vector<float> want = here ? row_of(src, id, i2, i3) : std::vector<float>(384, NAN);
                    const std::vector<float> got  = row_of(dst, i1, i2, i3);
                    CHECK(std::equal(got.begin(), got.end(), want.begin(), same_bits), "row %d", id);
                }
            }
        }
    }
}

// numbers that decide: largest values around 448 * 2^n, ties, infinities, NaN, subnormals
static float special(int i) {
    static const float values[] = {
        0.0f, -0.0f, 448.0f, 448.00003f, 447.99997f, -464.0f, 0x1p-9f, 0x1.8p-10f, 0x1p-10f, 0x1.000002p-10f, 17.0f, 18.0f, 19.0f,
        INFINITY, -INFINITY, NAN, 0x1p-149f, -0x1p-130f, 3.4e38f, -3.4e38f, 1e-4f, 6.0f, 0.25f, 0.75f, 1.25f, 2.5f, 3.5f, 5.0f,
    };
    return values[i%(sizeof(values)/sizeof(values[0]))];
}

static float any_float() {
    switch (rng()%8) {
        case 0:  return special((int) (rng()%1000));
        case 1:  return __uint_as_float((uint32_t) rng());
        default: return std::ldexp(std::normal_distribution<float>()(rng), (int) (rng()%40) - 20);
    }
}

static void test_quantize() {
    graph g;
    ggml_tensor * x = g.make(F32, 256, 3, 70);
    for (int64_t i = 0; i < ggml_nelements(x); i++) {
        // rows of one magnitude too, where the largest value decides more codes than infinities do
        const int64_t row = i/256;
        ((float *) x->data)[i] = row%2 ? any_float() : std::ldexp(special((int) (rng()%13)), (int) (row%280) - 140);
    }
    ggml_tensor * src = g.out(ggml_permute(g.ctx, x, 0, 2, 1, 3)); // 256, 70, 3
    ggml_tensor * dst = g.make(F8, 128, 420, 1, 1, 3);             // the same blocks in other rows
    run(g.out(ggml_cpy(g.ctx, src, dst)), ADA);
    std::vector<uint8_t> want(2*129);
    for (int64_t row = 0; row < 210; row++) {
        dsv4_f8_e4m3_b128_quantize_row_ref((const float *) ((char *) src->data + row%70*src->nb[1] + row/70*src->nb[2]), want.data(), 256);
        CHECK(memcmp(want.data(), (uint8_t *) dst->data + row*258, 258) == 0, "row %d", (int) row);
    }
}

// --- ACT_QUANT ---

static void test_act_quant() {
    for (ggml_act_quant_format format : { GGML_ACT_QUANT_E4M3, GGML_ACT_QUANT_E2M1 }) {
        for (int64_t block : { 1, 7, 32, 64, 128 }) {
            for (int64_t n_channels : { 0, 1, 63, 64, 200, 211 }) {
                if (block < 32 && n_channels % 100 != 0) {
                    continue; // a warp for each block: slow here
                }
                graph g;
                ggml_tensor * whole = g.make(F32, 230, 3, 4, 2);
                for (int64_t i = 0; i < ggml_nelements(whole); i++) {
                    ((float *) whole->data)[i] = any_float();
                }
                ggml_tensor * part = g.out(ggml_view_4d(g.ctx, whole, 211, 3, 4, 2, whole->nb[1], whole->nb[2], whole->nb[3], 12));
                ggml_tensor * x = g.out(ggml_permute(g.ctx, part, 0, 2, 1, 3));
                ggml_tensor * y = g.out(ggml_act_quant(g.ctx, x, format, block, n_channels));
                run(y, ADA);
                for (int64_t i3 = 0; i3 < 2; i3++) {
                    for (int64_t i2 = 0; i2 < 3; i2++) {
                        for (int64_t i1 = 0; i1 < 4; i1++) {
                            std::vector<float> want = row_of(x, i1, i2, i3);
                            dsv4_act_quant_row_ref(format, block, want.data(), want.data(), n_channels);
                            const std::vector<float> got = row_of(y, i1, i2, i3);
                            for (int i = 0; i < 211; i++) {
                                CHECK(same_bits(got[i], want[i]), "format %d, block %d, %d channels: channel %d is %a, not %a",
                                    format, (int) block, (int) n_channels, i, got[i], want[i]);
                            }
                        }
                    }
                }
            }
        }
    }
}

// every exponent of the largest value, and every step between two of them at one exponent
static void test_act_quant_scales() {
    for (ggml_act_quant_format format : { GGML_ACT_QUANT_E4M3, GGML_ACT_QUANT_E2M1 }) {
        graph g;
        ggml_tensor * x = g.make(F32, 32, 254 + 2048);
        for (int row = 0; row < 254 + 2048; row++) {
            float * p = (float *) x->data + 32*row;
            p[0] = row < 254 ? __uint_as_float((uint32_t) (row + 1) << 23 | (rng() & 0x7FFFFF))
                             : __uint_as_float(0x3F800000u + (uint32_t) (row - 254)*4096);
            for (int i = 1; i < 32; i++) {
                p[i] = p[0]*std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng);
            }
        }
        ggml_tensor * y = g.out(ggml_act_quant(g.ctx, x, format, 32, 32));
        run(y, TURING);
        for (int row = 0; row < 254 + 2048; row++) {
            std::vector<float> want = row_of(x, row, 0, 0);
            dsv4_act_quant_row_ref(format, 32, want.data(), want.data(), 32);
            const std::vector<float> got = row_of(y, row, 0, 0);
            CHECK(std::equal(got.begin(), got.end(), want.begin(), same_bits), "format %d, row %d", format, row);
        }
    }
}

// --- products ---

// Rounding of the sums only: the inputs enter as they are. With inputs rounded to BF16 the error would be several times
// the bound.
static void check_dot(float got, const std::vector<float> & w, const std::vector<float> & x, const char * what) {
    double want = 0.0, sum_abs = 0.0;
    for (size_t i = 0; i < w.size(); i++) {
        want    += (double) w[i]*x[i];
        sum_abs += std::fabs((double) w[i]*x[i]);
    }
    const double bound = (double) (8 + w.size()/64)*0x1p-24*sum_abs;
    CHECK(std::fabs(got - want) <= bound, "%s: %.9g instead of %.9g", what, got, want);
}

struct shape {
    int64_t k, m, n, w2, w3, r2, r3;
};

static std::string name_of(ggml_type type, const shape & s, int cc) {
    char text[200];
    std::snprintf(text, sizeof(text), "%s, k %d, rows %d, columns %d, matrices %d x %d for %d x %d, cc %d", ggml_type_name(type),
        (int) s.k, (int) s.m, (int) s.n, (int) (s.w2*s.r2), (int) (s.w3*s.r3), (int) s.w2, (int) s.w3, cc);
    return text;
}

static void test_product(ggml_type type, shape s, int cc, int kind, size_t offset) {
    graph g;
    ggml_tensor * w = g.make(type, s.k, s.m, s.w2, s.w3, type == BF16 ? 8*offset : offset);
    fill_weights(w);
    ggml_tensor * x;
    if (kind == 1) { // rows of another tensor, at odd places
        ggml_tensor * whole = g.make(F32, s.k + 3, s.n + 1, s.w2*s.r2, s.w3*s.r3);
        fill_normal(whole);
        x = g.out(ggml_view_4d(g.ctx, whole, s.k, s.n, s.w2*s.r2, s.w3*s.r3, whole->nb[1], whole->nb[2], whole->nb[3], 4));
    } else if (kind == 2) { // heads between the columns
        ggml_tensor * whole = g.make(F32, s.k, s.w2*s.r2, s.n, s.w3*s.r3);
        fill_normal(whole);
        x = g.out(ggml_permute(g.ctx, whole, 0, 2, 1, 3));
    } else {
        x = g.make(F32, s.k, s.n, s.w2*s.r2, s.w3*s.r3);
        fill_normal(x);
    }
    ggml_tensor * y = g.out(ggml_mul_mat(g.ctx, w, x));
    ggml_prec_set_src(y, type == BF16 ? GGML_PREC_F32 : GGML_PREC_BF16, 1);
    run(y, cc);

    const std::string what = name_of(type, s, cc);
    for (int64_t i3 = 0; i3 < y->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < y->ne[2]; i2++) {
            for (int64_t i = 0; i < s.m; i++) {
                const std::vector<float> wi = row_of(w, i, i2/s.r2, i3/s.r3);
                for (int64_t j = 0; j < s.n; j++) {
                    check_dot(row_of(y, j, i2, i3)[i], wi, row_of(x, j, i2, i3), what.c_str());
                }
            }
        }
    }
}

static void test_products() {
    for (ggml_type type : { F8, MXFP4, BF16 }) {
        const std::vector<int64_t> ks = type == F8 ? std::vector<int64_t>{ 128, 256, 640, 1152 } :
            type == MXFP4 ? std::vector<int64_t>{ 32, 96, 288, 1088 } : std::vector<int64_t>{ 4, 68, 100, 516 };
        for (int cc : { TURING, AMPERE, ADA }) {
            if (cc == ADA && type != F8) {
                continue;
            }
            // few columns; Ampere's are Turing's
            for (int64_t n = 1; n <= 8 && cc != AMPERE; n++) {
                for (int64_t m : { 1, 2, 3, 7 }) {
                    test_product(type, { ks[(n + m)%4], m, n, 1, 1, 1, 1 }, cc, (int) (n%3), (size_t) (m%4));
                }
            }
            for (int64_t k : ks) {
                test_product(type, { k, 3, 2, 2, 2, 2, 1 }, cc, 1, 1);
                test_product(type, { k, 3, 1, 3, 1, 1, 2 }, cc, 2, 2);
            }
            // many; in tiles of 16 and of 64, full and not
            for (int64_t n : { 9, 16, 17, 65 }) {
                test_product(type, { ks[n%4], n == 16 && cc != TURING ? 130 : 9, n, 1, 1, 1, 1 }, cc, (int) (n%3), (size_t) (n%4));
            }
            test_product(type, { ks[1], 3, 20, 2, 2, 2, 1 }, cc, 2, 3);
        }
    }
}

// What a column gives must not depend on how many others there are.
static void test_alone_and_together() {
    for (ggml_type type : { F8, MXFP4, BF16 }) {
        graph g;
        ggml_tensor * w = g.make(type, 640, 9);
        ggml_tensor * x = g.make(F32, 640, 8);
        fill_weights(w);
        fill_normal(x);
        std::vector<float> together;
        for (int64_t n : { 8, 7, 6, 5, 4, 3, 2, 1 }) {
            ggml_tensor * xn = g.out(ggml_view_2d(g.ctx, x, 640, n, x->nb[1], 0));
            ggml_tensor * y  = g.out(ggml_mul_mat(g.ctx, w, xn));
            ggml_prec_set_src(y, GGML_PREC_F32, 1);
            run(y, ADA);
            if (n == 8) {
                together.assign((float *) y->data, (float *) y->data + 9*8);
            }
            CHECK(memcmp(together.data(), y->data, 9*n*sizeof(float)) == 0, "%s: %d columns differ from 8", ggml_type_name(type), (int) n);
        }
    }
}

// With one activation of 1 a sum is the weight itself: every scale with some codes, every code with some scales.
static void test_products_of_codes(const std::vector<uint8_t> & scales, int64_t n_passes, int64_t n, int cc) {
    graph g;
    const int64_t n_rows = 2*(int64_t) scales.size();
    ggml_tensor * w = g.make(F8, 128, n_rows);
    std::vector<uint8_t> all(512*129);
    fill_all_codes(all.data(), false);
    for (int64_t row = 0; row < n_rows; row++) {
        memcpy((uint8_t *) w->data + row*129, &all[(2*scales[row/2] + row%2)*129], 129);
    }
    for (int64_t k0 = 0; k0 < n*n_passes; k0 += n) {
        ggml_tensor * x = g.make(F32, 128, n);
        memset(x->data, 0, ggml_nbytes(x));
        for (int64_t j = 0; j < n; j++) {
            ((float *) x->data)[128*j + k0 + j] = 1.0f;
        }
        ggml_tensor * y = g.out(ggml_mul_mat(g.ctx, w, x));
        run(y, cc);
        for (int64_t row = 0; row < n_rows; row++) {
            const std::vector<float> want = row_of(w, row, 0, 0);
            for (int64_t j = 0; j < n; j++) {
                const float got = ((float *) y->data)[n_rows*j + row];
                CHECK(got == want[k0 + j] || (std::isnan(got) && std::isnan(want[k0 + j])),
                    "cc %d, scale %d: %a instead of %a", cc, (int) scales[row/2], got, want[k0 + j]);
            }
        }
    }
}

static void test_products_of_all_codes() {
    std::vector<uint8_t> scales(256);
    for (int i = 0; i < 256; i++) {
        scales[i] = (uint8_t) i;
    }
    for (int cc : { TURING, ADA }) {
        test_products_of_codes(scales, 1, 1, cc);
        test_products_of_codes({ 0, 1, 127, 247, 254, 255 }, 16, 8, cc);
    }
    for (int cc : { AMPERE, ADA }) {
        test_products_of_codes(scales, 1, 16, cc);
        test_products_of_codes({ 0, 1, 127, 247, 254, 255 }, 8, 16, cc);
    }
    // FP4: 16 codes, 256 scales
    for (int64_t n : { 2, 16 }) {
        graph g;
        ggml_tensor * w = g.make(MXFP4, 32, 256);
        for (int row = 0; row < 256; row++) {
            uint8_t * p = (uint8_t *) w->data + 17*row;
            p[0] = (uint8_t) row;
            for (int i = 0; i < 16; i++) {
                p[1 + i] = (uint8_t) (i | (15 - i) << 4);
            }
        }
        for (int64_t k0 = 0; k0 < 32; k0 += n) {
            ggml_tensor * x = g.make(F32, 32, n);
            memset(x->data, 0, ggml_nbytes(x));
            for (int64_t j = 0; j < n; j++) {
                ((float *) x->data)[32*j + k0 + j] = 1.0f;
            }
            ggml_tensor * y = g.out(ggml_mul_mat(g.ctx, w, x));
            ggml_prec_set_src(y, GGML_PREC_BF16, 1);
            run(y, AMPERE);
            static const float values[16] = { 0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6 };
            for (int64_t row = 0; row < 256; row++) {
                for (int64_t j = 0; j < n; j++) {
                    const int64_t k    = k0 + j;
                    const float   want = row == 255 ? NAN : std::ldexp(values[k < 16 ? k : 31 - k], (int) row - 127);
                    const float   got  = ((float *) y->data)[256*j + row];
                    CHECK(got == want || (std::isnan(got) && std::isnan(want)), "FP4, scale %d: %a instead of %a", (int) row, got, want);
                }
            }
        }
    }
}

// NaN weights and infinite activations are seen where they are, and nowhere else.
static void test_products_of_non_finite() {
    for (int64_t n : { 3, 20 }) {
        graph g;
        ggml_tensor * w = g.make(F8, 256, 40);
        ggml_tensor * x = g.make(F32, 256, n);
        fill_weights(w);
        fill_normal(x);
        for (int64_t i = 0; i < 40*258; i++) {
            uint8_t & code = ((uint8_t *) w->data)[i];
            code = i%129 && (code & 0x7F) == 0 ? 0x38 : code; // no zeros: 0 * inf is NaN
        }
        ((uint8_t *) w->data)[7*258 + 130] = 0xFF;
        ((float *) x->data)[256*1 + 9]  = INFINITY;
        ((float *) x->data)[256*2 + 77] = __uint_as_float(0x7F800001u); // a NaN whose leading 16 bits are infinity's
        ggml_tensor * y = g.out(ggml_mul_mat(g.ctx, w, x));
        run(y, ADA);
        for (int64_t i = 0; i < 40; i++) {
            for (int64_t j = 0; j < n; j++) {
                const float got = ((float *) y->data)[40*j + i];
                const bool right = i == 7 || j == 2 ? std::isnan(got) : j == 1 ? std::isinf(got) : std::isfinite(got);
                CHECK(right, "%d columns, row %d, column %d: %g", (int) n, (int) i, (int) j, got);
            }
        }
    }
}

// Activations of ACT_QUANT need one term instead of three: same sums.
static void test_bf16_exact() {
    graph g;
    ggml_tensor * w = g.make(F8, 256, 40);
    ggml_tensor * x = g.make(F32, 256, 20);
    fill_weights(w);
    fill_normal(x);
    ggml_tensor * q = g.out(ggml_act_quant(g.ctx, x, GGML_ACT_QUANT_E4M3, 128, 256));
    run(q, ADA);
    ggml_tensor * y  = g.out(ggml_mul_mat(g.ctx, w, q));
    ggml_tensor * qr = g.out(ggml_reshape_3d(g.ctx, q, 256, 1, 20));
    CHECK(dsv4_cuda_is_bf16_exact(q) && dsv4_cuda_is_bf16_exact(qr), "ACT_QUANT is not recognised");
    CHECK(!dsv4_cuda_is_bf16_exact(x), "an input is taken for BF16");
    CHECK(!dsv4_cuda_is_bf16_exact(ggml_act_quant(g.ctx, x, GGML_ACT_QUANT_E4M3, 64, 192)), "channels that are copied are taken for BF16");
    run(y, ADA);
    for (int64_t i = 0; i < 40; i++) {
        for (int64_t j = 0; j < 20; j++) {
            check_dot(row_of(y, j, 0, 0)[i], row_of(w, i, 0, 0), row_of(q, j, 0, 0), "ACT_QUANT's");
        }
    }
}

static void test_product_id(ggml_type type, int64_t k, int64_t m, int64_t n_experts, int64_t n_used, int64_t n_tokens, bool is_shared, int cc) {
    graph g;
    ggml_tensor * w = g.make(type, k, m, n_experts);
    ggml_tensor * x = g.make(F32, k, is_shared ? 1 : n_used, n_tokens);
    fill_weights(w);
    fill_normal(x);
    ggml_tensor * all_ids = g.make(GGML_TYPE_I32, n_used + 2, n_tokens);
    for (int64_t i = 0; i < ggml_nelements(all_ids); i++) {
        // an expert that many slots share, and now and then one that does not exist
        const uint32_t r = rng()%16;
        ((int32_t *) all_ids->data)[i] = (int32_t) (r == 0 ? (i%2 ? -1 : n_experts) : r < 6 ? 0 : rng()%n_experts);
    }
    ggml_tensor * ids = g.out(ggml_view_2d(g.ctx, all_ids, n_used, n_tokens, all_ids->nb[1], 4));
    ggml_tensor * y = g.out(ggml_mul_mat_id(g.ctx, w, x, ids));
    ggml_prec_set_src(y, type == BF16 ? GGML_PREC_F32 : GGML_PREC_BF16, 1);
    run(y, cc);

    const std::string what = name_of(type, { k, m, n_tokens, n_experts, 1, n_used, 1 }, cc);
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t u = 0; u < n_used; u++) {
            const int32_t e = ((int32_t *) all_ids->data)[t*(n_used + 2) + 1 + u];
            const std::vector<float> got = row_of(y, u, t, 0);
            const std::vector<float> xs  = row_of(x, is_shared ? 0 : u, t, 0);
            for (int64_t i = 0; i < m; i++) {
                if (e < 0 || e >= n_experts) {
                    CHECK(std::isnan(got[i]), "%s: expert %d does not exist, but gives %g", what.c_str(), e, got[i]);
                } else {
                    check_dot(got[i], row_of(w, i, e, 0), xs, what.c_str());
                }
            }
        }
    }
}

static void test_products_id() {
    for (ggml_type type : { F8, MXFP4, BF16 }) {
        const int64_t k = type == F8 ? 384 : type == MXFP4 ? 160 : 100;
        for (int cc : { TURING, AMPERE }) {
            test_product_id(type, k, 3, 5, 2, 1, true,  cc);
            test_product_id(type, k, 4, 7, 6, 8, false, cc);
            test_product_id(type, k, 5, 3, 1, 9, true,  cc);
            test_product_id(type, k, 3, 300, 6, 12, false, cc);
        }
        test_product_id(type, k, 131, 2, 3, 25, false, AMPERE); // tiles of 64 columns
        test_product_id(type, k, 3, 1, 1, 70, true, AMPERE);
        test_product_id(type, k, 1, 1024, 2, 10, true, AMPERE);
    }
}

// Whoever is not ours must be left to upstream.
static void test_declines() {
    graph g;
    ggml_tensor * w = g.make(MXFP4, 64, 4);
    ggml_tensor * x = g.make(F32, 64, 2);
    ggml_tensor * y = ggml_mul_mat(g.ctx, w, x);
    CHECK(!dsv4_cuda_supports(y), "MXFP4 of other models is taken");
    ggml_prec_set_src(y, GGML_PREC_Q8, 1);
    CHECK(!dsv4_cuda_supports(y), "MXFP4 with inputs of 8 bits is taken");
    CHECK(!dsv4_cuda_supports(ggml_mul_mat(g.ctx, g.make(BF16, 64, 4), x)), "BF16 of other models is taken");
    CHECK(!dsv4_cuda_supports(ggml_mul_mat(g.ctx, g.make(GGML_TYPE_Q8_0, 64, 4), x)), "Q8_0 is taken");
    CHECK(!dsv4_cuda_supports(ggml_mul_mat(g.ctx, g.make(F8, 128, 4), g.make(F16, 128, 2))), "F16 activations are taken");
    CHECK(!dsv4_cuda_supports(ggml_get_rows(g.ctx, g.make(F16, 64, 4), g.make(GGML_TYPE_I32, 2))), "F16 rows are taken");
}

// --- rotary positions ---

static void test_rope() {
    for (float base : { 10000.0f, 160000.0f, 1e6f }) {
        for (int n_dims : { 64, 128 }) {
            const double log2_step = -std::log2((double) base)/n_dims;
            for (int i = 0; i < n_dims; i += 2) {
                for (float position : { 0.0f, 1.0f, 3.0f, 65535.0f, 1048575.0f }) {
                    const float want = dsv4_rope_angle(position, base, (int64_t) i, (int64_t) n_dims);
                    const float got  = dsv4_rope_angle(position, log2_step, i);
                    CHECK(got == want, "position %g, base %g, pair %d: %.9g instead of %.9g", position, base, i, got, want);
                }
            }
        }
    }
    double worst = 0.0;
    for (int i = 0; i < 400000; i++) {
        const float theta = std::ldexp(std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng), (int) (rng()%22));
        worst = std::max(worst, std::fabs(dsv4_sinf(theta) - std::sin((double) theta)));
        worst = std::max(worst, std::fabs(dsv4_cosf(theta) - std::cos((double) theta)));
    }
    CHECK(worst < 1.2e-7, "sines are off by %g", worst);
}

int main() {
#define RUN(name)                                                                                       \
    do {                                                                                                \
        const clock_t start = clock();                                                                  \
        test_##name();                                                                                  \
        std::printf("%-24s %6.2f s of CPU\n", #name, (double) (clock() - start)/CLOCKS_PER_SEC);        \
        std::fflush(stdout);                                                                            \
    } while (0)
    RUN(machine);
    RUN(all_codes);
    RUN(cpy_strides);
    RUN(get_rows);
    RUN(quantize);
    RUN(act_quant);
    RUN(act_quant_scales);
    RUN(products);
    RUN(alone_and_together);
    RUN(products_of_all_codes);
    RUN(products_of_non_finite);
    RUN(bf16_exact);
    RUN(products_id);
    RUN(declines);
    RUN(rope);
#undef RUN
    std::printf("%lld CUDA threads were run\n", (long long) dsv4_host_n_threads());
    return check_result("test-cuda-kernels");
}
