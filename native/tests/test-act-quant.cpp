// ACT_QUANT against a table of all codes and an exact scale, bit by bit: every BF16 number under every scale, every
// edge between two scales, ties, subnormals, zeros, NaN and infinities; then the operation in a graph, over layouts,
// ranges of channels and threads. The scalar reference and the CPU's fast path are both held against the table.

#include "act-quant-cpu.h"
#include "act-quant.h"
#include "check.h"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

static float bf16(uint32_t code) {
    return from_bits(code << 16);
}

// --- the table ---

struct oracle {
    ggml_act_quant_format format;
    double                floor;
    int                   min_scale; // exponents of the scales that F32 numbers can need
    int                   max_scale;
    std::vector<double>   codes;     // values >= 0 in the order of their codes

    double qmax() const {
        return codes.back();
    }

    // smallest e with max(amax, floor) <= qmax * 2^e; doubles hold all of it exactly
    int scale(double amax) const {
        const double top = std::max(amax, floor);
        int e = std::ilogb(top / qmax()) - 2;
        while (std::ldexp(qmax(), e) < top) {
            e++;
        }
        return e;
    }

    double nearest(double mag) const {
        const size_t i = std::lower_bound(codes.begin(), codes.end(), mag) - codes.begin();
        if (i == codes.size()) {
            return qmax();
        }
        if (i == 0) {
            return codes[0];
        }
        const double below = mag - codes[i - 1];
        const double above = codes[i] - mag;
        const bool   up    = above < below || (above == below && i % 2 == 0); // a tie goes to the even code
        return codes[up ? i : i - 1];
    }

    void row(int64_t block, const float * x, float * y, int64_t n) const {
        for (int64_t i0 = 0; i0 < n; i0 += block) {
            const int64_t i1 = std::min(i0 + block, n);
            double amax = 0;
            for (int64_t i = i0; i < i1; i++) {
                amax = std::isfinite(x[i]) ? std::max(amax, std::fabs(double(x[i]))) : amax;
            }
            const int e = scale(amax);
            for (int64_t i = i0; i < i1; i++) {
                y[i] = std::isnan(x[i]) ? x[i] :
                    float(std::copysign(std::ldexp(nearest(std::ldexp(std::fabs(double(x[i])), -e)), e), double(x[i])));
            }
        }
    }
};

static oracle make_e4m3() {
    oracle o = { GGML_ACT_QUANT_E4M3, double(1e-4f), -22, 120, {} };
    for (int code = 0; code < 127; code++) {
        const int exponent = code >> 3;
        const int mantissa = code & 7;
        o.codes.push_back(exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9));
    }
    return o;
}

static oracle make_e2m1() {
    return { GGML_ACT_QUANT_E2M1, std::ldexp(6, -126), -126, 126, { 0, 0.5, 1, 1.5, 2, 3, 4, 6 } };
}

// --- rows ---

static void check_row(const oracle & o, int64_t block, const std::vector<float> & x, const char * what) {
    const int64_t n = (int64_t) x.size();
    std::vector<float> expected(n);
    std::vector<float> ref(n);
    std::vector<float> fast(n);
    o.row(block, x.data(), expected.data(), n);
    dsv4_act_quant_row_ref(o.format, block, x.data(), ref.data(), n);
    dsv4_act_quant_row(o.format, block, x.data(), fast.data(), n);

    for (int64_t i = 0; i < n; i++) {
        // a NaN keeps its sign; its other bits mean nothing
        const bool is_nan = std::isnan(x[i]);
        CHECK(is_nan ? std::isnan(ref[i])  && std::signbit(ref[i])  == std::signbit(x[i]) : bits_of(ref[i])  == bits_of(expected[i]),
            "%s, reference, format %d, block %d, channel %d of %d: %a -> %a, expected %a",
            what, o.format, int(block), int(i), int(n), x[i], ref[i], expected[i]);
        CHECK(is_nan ? std::isnan(fast[i]) && std::signbit(fast[i]) == std::signbit(x[i]) : bits_of(fast[i]) == bits_of(expected[i]),
            "%s, fast, format %d, block %d, channel %d of %d: %a -> %a, expected %a",
            what, o.format, int(block), int(i), int(n), x[i], fast[i], expected[i]);
    }
}

// Every BF16 number that fits under a scale, beside the largest number of that scale.
static void test_bf16_under_every_scale(const oracle & o, int64_t block) {
    for (int e = o.min_scale; e <= o.max_scale; e++) {
        const double largest = std::min(std::ldexp(o.qmax(), e), double(FLT_MAX));
        const float  top     = float(largest);
        std::vector<float> x;
        for (uint32_t code = 0; code < 0x10000; code++) {
            if (std::isfinite(bf16(code)) && std::fabs(bf16(code)) <= top) {
                if (x.size() % block == 0) {
                    x.push_back(top);
                }
                x.push_back(bf16(code));
            }
        }
        check_row(o, block, x, "BF16 under one scale");
    }
}

// All bit patterns, as they come and shuffled; non-finite numbers among finite ones.
static void test_all_bf16(const oracle & o) {
    std::vector<float> x;
    for (uint32_t code = 0; code < 0x10000; code++) {
        x.push_back(bf16(code));
    }
    for (int64_t block : { 1, 7, 32, 48, 64, 128, 200 }) {
        check_row(o, block, x, "all BF16 in order");
    }
    std::mt19937 rng(1);
    std::shuffle(x.begin(), x.end(), rng);
    for (int64_t block : { 32, 64, 128 }) {
        check_row(o, block, x, "all BF16 shuffled");
    }
}

// The largest number of a block at, and next to, every edge between two scales; then every mantissa of one binade.
static void test_scale_edges(const oracle & o) {
    std::vector<float> x;
    for (int e = -140; e <= 127; e++) {
        for (double factor : { 1.0, o.qmax(), 0.75 }) {
            const double edge = std::ldexp(factor, e);
            if (edge > double(FLT_MAX)) {
                continue;
            }
            float below = float(edge);
            float above = float(edge);
            for (int i = 0; i < 4; i++) {
                x.push_back(below);
                x.push_back(-above);
                below = std::nextafterf(below, 0.0f);
                above = std::nextafterf(above, FLT_MAX);
            }
        }
    }
    x.push_back(FLT_MAX);
    check_row(o, 1, x, "scale edge");

    x.clear();
    for (uint32_t mantissa = 0; mantissa < (1u << 23); mantissa++) {
        x.push_back(from_bits((130u << 23) | mantissa));
    }
    check_row(o, 1, x, "every mantissa");
}

static void test_small_numbers(const oracle & o) {
    std::vector<float> x = { 0.0f, -0.0f, FLT_TRUE_MIN, -FLT_TRUE_MIN, FLT_MIN, -FLT_MIN, std::nextafterf(FLT_MIN, 0.0f) };
    for (int e = -149; e < -90; e++) {
        for (float factor : { 1.0f, 1.25f, 1.5f, 1.75f, -1.0f, -1.5f }) {
            x.push_back(std::ldexp(factor, e));
        }
    }
    for (int64_t block : { 1, 4, 32, 64, 128 }) {
        check_row(o, block, x, "subnormals");
    }
    check_row(o, 64, std::vector<float>(64, -0.0f), "zeros");
}

// Midpoints between neighbouring codes, and the numbers next to them, under several scales.
static void test_ties(const oracle & o) {
    for (int e : { o.min_scale, -3, 0, 7, 100 }) {
        std::vector<float> x;
        for (size_t i = 1; i < o.codes.size(); i++) {
            const float tie = float(std::ldexp((o.codes[i - 1] + o.codes[i]) / 2, e));
            for (float v : { tie, -tie, std::nextafterf(tie, 0.0f), std::nextafterf(tie, FLT_MAX) }) {
                if (x.size() % 32 == 0) {
                    x.push_back(float(std::ldexp(o.qmax(), e)));
                }
                x.push_back(v);
            }
        }
        check_row(o, 32, x, "ties");
    }
}

static void test_nan_touches_nothing_else(const oracle & o) {
    std::vector<float> x(64);
    for (int i = 0; i < 64; i++) {
        x[i] = 0.37f*float(i - 20);
    }
    std::vector<float> clean(64);
    std::vector<float> y(64);
    dsv4_act_quant_row(o.format, 64, x.data(), clean.data(), 64);
    x[20] = NAN;
    x[22] = -INFINITY;
    dsv4_act_quant_row(o.format, 64, x.data(), y.data(), 64);
    for (int i = 0; i < 64; i++) {
        if (i != 20 && i != 22) {
            CHECK(bits_of(y[i]) == bits_of(clean[i]), "channel %d: %g, %g without the NaN", i, y[i], clean[i]);
        }
    }
    CHECK(std::isnan(y[20]), "%g", y[20]);
    CHECK(std::isfinite(y[22]) && y[22] < 0, "%g", y[22]);
}

// --- the operation ---

struct layout {
    const char * name;
    int64_t      ne[4];
    int          kind; // 0 contiguous, 1 part of longer rows, 2 permuted rows
};

static void test_graph(const oracle & o, int64_t block, int64_t n_channels, const layout & l, int n_threads) {
    ggml_init_params init = { 64u << 20, nullptr, false };
    ggml_context * ctx = ggml_init(init);

    const int64_t * ne = l.ne;
    ggml_tensor * a = nullptr;
    ggml_tensor * x = nullptr;
    if (l.kind == 0) {
        a = x = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, ne);
    } else if (l.kind == 1) {
        a = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0] + 24, ne[1] + 1, ne[2], ne[3]);
        x = ggml_view_4d(ctx, a, ne[0], ne[1], ne[2], ne[3], a->nb[1], a->nb[2], a->nb[3], a->nb[1] + 8*sizeof(float));
    } else {
        a = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, ne[0], ne[3], ne[1], ne[2]);
        x = ggml_permute(ctx, a, 0, 3, 1, 2);
    }

    std::mt19937 rng(7);
    float * data = (float *) a->data;
    for (int64_t i = 0; i < ggml_nelements(a); i++) {
        data[i] = from_bits((rng() & 0x80FFFFFFu) | ((100u + rng()%40) << 23));
    }
    if (n_channels < ne[0] && ggml_nelements(a) > 0) {
        data[ggml_nelements(a) - 1] = from_bits(0xFF812345u); // a signalling NaN that must be copied as it is
    }
    const std::vector<float> before(data, data + ggml_nelements(a));

    ggml_tensor * y = ggml_act_quant(ctx, x, o.format, block, n_channels);
    CHECK(ggml_is_contiguous(y) && ggml_are_same_shape(x, y) && y->type == GGML_TYPE_F32, "%s", l.name);
    CHECK(std::strcmp(ggml_op_name(y->op), "ACT_QUANT") == 0, "%s", ggml_op_name(y->op));

    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, y);
    CHECK(ggml_graph_compute_with_ctx(ctx, gf, n_threads) == GGML_STATUS_SUCCESS, "%s", l.name);
    CHECK(std::memcmp(before.data(), data, before.size()*sizeof(float)) == 0, "%s: the input changed", l.name);

    std::vector<float> expected(ne[0]);
    for (int64_t i3 = 0; i3 < ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < ne[1]; i1++) {
                const float * in  = (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]);
                const float * out = (const float *) ((const char *) y->data + i1*y->nb[1] + i2*y->nb[2] + i3*y->nb[3]);
                o.row(block, in, expected.data(), n_channels);
                std::memcpy(expected.data() + n_channels, in + n_channels, (ne[0] - n_channels)*sizeof(float));
                CHECK(std::memcmp(out, expected.data(), ne[0]*sizeof(float)) == 0,
                    "%s, format %d, block %d, %d channels, row %d %d %d, %d threads", l.name, o.format, int(block),
                    int(n_channels), int(i1), int(i2), int(i3), n_threads);
            }
        }
    }
    ggml_free(ctx);
}

static void test_graphs(const oracle & o) {
    const layout layouts[] = {
        { "contiguous",       { 512,  1, 5, 1 }, 0 },
        { "heads",            { 128, 64, 3, 2 }, 0 },
        { "part of rows",     { 512,  3, 4, 2 }, 1 },
        { "permuted",         { 192,  2, 3, 5 }, 2 },
        { "one row",          { 4096, 1, 1, 1 }, 0 },
        { "no row",           { 128,  1, 0, 1 }, 0 },
        { "shorter than a block", { 40, 3, 1, 1 }, 0 },
    };
    for (const layout & l : layouts) {
        for (int64_t n_rest : { 0, 64, 13 }) {
            const int64_t n_channels = std::max<int64_t>(0, l.ne[0] - n_rest);
            for (int64_t block : { 32, 64, 128, 100 }) {
                for (int n_threads : { 1, 3 }) {
                    test_graph(o, block, n_channels, l, n_threads);
                }
            }
        }
    }
}

int main() {
    const oracle e4m3 = make_e4m3();
    const oracle e2m1 = make_e2m1();
    CHECK(e4m3.qmax() == 448.0 && e2m1.qmax() == 6.0, "%g %g", e4m3.qmax(), e2m1.qmax());

    test_bf16_under_every_scale(e4m3, 64);
    test_bf16_under_every_scale(e2m1, 32);
    for (const oracle * o : { &e4m3, &e2m1 }) {
        test_all_bf16(*o);
        test_scale_edges(*o);
        test_small_numbers(*o);
        test_ties(*o);
        test_nan_touches_nothing_else(*o);
        test_graphs(*o);
    }
    return check_result("test-act-quant");
}
