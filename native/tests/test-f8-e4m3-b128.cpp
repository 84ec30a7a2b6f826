// F8_E4M3_B128 against the format's definition in double arithmetic, over all codes and scales, and against the
// package's other implementation, native/codec. Graph operations are in test-f8-e4m3-b128-ops.cpp.

#include "check.h"

#include "../codec/f8-e4m3-b128.h"
#include "../ggml/f8-e4m3-b128.h"
#include "f8-e4m3-b128-cpu.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

static constexpr int QK = 128;
static constexpr int BYTES = 129;

static uint32_t bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

static float float_of(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

// the definition, without bit tricks
static double code_value(int code) {
    const int e = (code >> 3) & 15;
    const int m = code & 7;
    double v;
    if ((code & 0x7F) == 0x7F) {
        v = NAN;
    } else if (e == 0) {
        v = ldexp(m, -9);
    } else {
        v = ldexp(1.0 + m/8.0, e - 7);
    }
    return code & 0x80 ? -v : v;
}

static double scale_value(int e) {
    return e == 255 ? NAN : ldexp(1.0, e - 127);
}

static bool same(float got, double want) {
    return std::isnan(want) ? std::isnan(got) : bits_of(got) == bits_of((float) want);
}

// nearest code by search, ties to the even code, saturating
static int nearest_code(float x) {
    const double a = fabs((double) x);
    int best = 0;
    for (int c = 1; c < 0x7F; c++) {
        const double d = fabs(a - code_value(c)), db = fabs(a - code_value(best));
        if (d < db || (d == db && c % 2 == 0)) {
            best = c;
        }
    }
    return best | (std::signbit(x) ? 0x80 : 0);
}

static int smallest_scale(double amax) {
    int e = 0;
    while (amax > 448.0*scale_value(e)) {
        e++;
    }
    return e;
}

static void test_decode() {
    // two blocks hold all 256 codes
    const auto to_float = ggml_get_type_traits(GGML_TYPE_F8_E4M3_B128)->to_float;
    std::vector<uint8_t> row(2*BYTES + 8);
    std::vector<float> y(2*QK), y_codec(2*QK);
    for (int e = 0; e < 256; e++) {
        // every address modulo 8
        uint8_t * p = row.data() + e % 8;
        for (int b = 0; b < 2; b++) {
            p[b*BYTES] = (uint8_t) e;
            for (int k = 0; k < QK; k++) {
                p[b*BYTES + 1 + k] = (uint8_t) (b*QK + k);
            }
        }
        to_float(p, y.data(), 2*QK);
        dsv4_codec::f8_e4m3_b128_decode_row(p, y_codec.data(), 2);
        for (int c = 0; c < 256; c++) {
            const double want = code_value(c)*scale_value(e);
            CHECK(same(y[c], want), "code 0x%02x, scale %d: %a instead of %a", c, e, y[c], want);
            CHECK(same(y_codec[c], want), "codec: code 0x%02x, scale %d: %a instead of %a", c, e, y_codec[c], want);
        }
    }
}

static void check_encode(float x) {
    const int got = dsv4_e4m3_from_f32(x);
    CHECK(got == nearest_code(x), "%a: code 0x%02x instead of 0x%02x", x, got, nearest_code(x));
}

static void test_encode_single() {
    for (int c = 0; c < 0x7E; c++) {
        const float lo = (float) code_value(c);
        const float mid = (float) ((code_value(c) + code_value(c + 1))/2);
        for (float x : { lo, mid, nextafterf(mid, 0.0f), nextafterf(mid, 1e9f), nextafterf(lo, 1e9f) }) {
            check_encode(x);
            check_encode(-x);
        }
    }
    for (float x : { 448.0f, 463.99f, 464.0f, 465.0f, 1e30f, FLT_MAX, INFINITY, FLT_MIN, 1e-40f, 0x1p-149f, 0x1p-10f, 0x1.8p-9f }) {
        check_encode(x);
        check_encode(-x);
    }
    CHECK(dsv4_e4m3_from_f32(float_of(0x7FC00000u)) == 0x7F, "NaN");
    CHECK(dsv4_e4m3_from_f32(float_of(0xFFC00000u)) == 0xFF, "-NaN");
    CHECK(dsv4_e4m3_from_f32(float_of(0x7F800001u)) == 0x7F, "NaN with a small payload");
    for (int c = 0; c < 256; c++) {
        CHECK(dsv4_e4m3_from_f32(dsv4_e4m3_to_f32((uint8_t) c)) == c, "code 0x%02x does not survive", c);
    }
}

static int scale_of(std::vector<float> & x) {
    uint8_t block[BYTES];
    dsv4_f8_e4m3_b128_quantize_row_ref(x.data(), block, QK);
    return block[0];
}

static void test_scale() {
    std::vector<float> x(QK);
    auto with_amax = [&](float amax) {
        std::fill(x.begin(), x.end(), 0.0f);
        x[77] = -amax;
        return scale_of(x);
    };

    CHECK(with_amax(0.0f) == 0, "zero row");
    for (int k = -127; k <= 119; k++) {
        const float amax = (float) ldexp(448.0, k); // exact
        CHECK(with_amax(amax) == k + 127, "amax 448*2^%d: scale %d", k, with_amax(amax));
        CHECK(with_amax(nextafterf(amax, 0.0f)) == smallest_scale(nextafterf(amax, 0.0f)), "below 448*2^%d", k);
        CHECK(with_amax(nextafterf(amax, FLT_MAX)) == smallest_scale(nextafterf(amax, FLT_MAX)), "above 448*2^%d", k);
    }
    for (float amax : { 0x1p-149f, FLT_MIN, FLT_MAX, 1.0f, 1e-4f, 0.15625f }) {
        CHECK(with_amax(amax) == smallest_scale(amax), "amax %a: scale %d", amax, with_amax(amax));
    }

    // what is not finite has no say in the scale
    std::fill(x.begin(), x.end(), 1.0f);
    const int e = scale_of(x);
    x[3] = INFINITY;
    x[4] = -INFINITY;
    x[5] = NAN;
    uint8_t block[BYTES];
    dsv4_f8_e4m3_b128_quantize_row_ref(x.data(), block, QK);
    CHECK(block[0] == e, "scale %d with infinities, %d without", block[0], e);
    CHECK(block[4] == 0x7E && block[5] == 0xFE && (block[6] & 0x7F) == 0x7F, "codes %02x %02x %02x", block[4], block[5], block[6]);
}

static void test_encode_rows() {
    std::mt19937 rng(1);
    std::vector<float> x(QK), y(QK);
    std::vector<uint8_t> got(BYTES + 8), codec(BYTES);

    for (int iter = 0; iter < 4000; iter++) {
        // any bit pattern; then rows of one magnitude, so that most codes are not 0; then sixteenths, many of them ties
        for (float & v : x) {
            if (iter < 1000) {
                v = float_of((uint32_t) rng());
            } else if (iter < 3000) {
                v = (float) ldexp(((int) (rng() % 20001) - 10000)/10000.0, (int) (iter % 250) - 125);
            } else {
                v = (float) ldexp((int) (rng() % 14337) - 7168, (int) (iter % 100) - 50);
            }
        }
        uint8_t * p = got.data() + iter % 8;
        dsv4_f8_e4m3_b128_quantize_row_ref(x.data(), p, QK);
        dsv4_codec::f8_e4m3_b128_encode_row(x.data(), codec.data(), 1);
        CHECK(memcmp(p, codec.data(), BYTES) == 0, "round %d: other bytes than native/codec", iter);

        double amax = 0.0;
        for (float v : x) {
            amax = std::isfinite(v) ? std::max(amax, fabs((double) v)) : amax;
        }
        const int e = smallest_scale(amax);
        CHECK(p[0] == e, "round %d: scale %d instead of %d", iter, p[0], e);
        for (int k = 0; k < QK; k++) {
            if (std::isfinite(x[k])) {
                const int want = nearest_code((float) (x[k]/scale_value(e)));
                CHECK(p[1 + k] == want, "round %d: %a / 2^%d: 0x%02x instead of 0x%02x", iter, x[k], e - 127, p[1 + k], want);
            }
        }
    }

    // decoded rows are reproduced exactly as values, though a smaller scale may be chosen
    for (int e = 8; e < 247; e++) {
        for (uint8_t & b : codec) {
            b = (uint8_t) rng();
            b = (b & 0x7F) == 0x7F ? 0x55 : b;
        }
        codec[0] = (uint8_t) e;
        dsv4_f8_e4m3_b128_dequantize_row(codec.data(), x.data(), QK);
        dsv4_f8_e4m3_b128_quantize_row_ref(x.data(), got.data(), QK);
        dsv4_f8_e4m3_b128_dequantize_row(got.data(), y.data(), QK);
        CHECK(memcmp(x.data(), y.data(), QK*4) == 0, "values of scale %d do not survive", e);
    }
}

static void test_chunks() {
    const int64_t nrows = 5, n_per_row = 3*QK;
    const size_t row_size = ggml_row_size(GGML_TYPE_F8_E4M3_B128, n_per_row);
    CHECK(row_size == 3*BYTES, "row size %zu", row_size);
    CHECK(ggml_blck_size(GGML_TYPE_F8_E4M3_B128) == QK, "block size");
    CHECK(ggml_is_quantized(GGML_TYPE_F8_E4M3_B128), "is quantized");
    CHECK(std::string(ggml_type_name(GGML_TYPE_F8_E4M3_B128)) == "f8_e4m3_b128", "name");
    CHECK(ggml_ftype_to_ggml_type(GGML_FTYPE_MOSTLY_F8_E4M3_B128) == GGML_TYPE_F8_E4M3_B128, "ftype");
    CHECK(ggml_get_type_traits_cpu(GGML_TYPE_F8_E4M3_B128)->vec_dot_type == GGML_TYPE_BF16, "vec_dot_type");

    std::mt19937 rng(2);
    std::normal_distribution<float> normal;
    std::vector<float> x(nrows*n_per_row), imatrix(n_per_row, 2.0f);
    for (float & v : x) {
        v = normal(rng);
    }
    std::vector<uint8_t> whole(nrows*row_size), parts(nrows*row_size);
    dsv4_f8_e4m3_b128_quantize_row_ref(x.data(), whole.data(), nrows*n_per_row);
    for (int64_t i = 0; i < nrows; i += 2) {
        ggml_quantize_chunk(GGML_TYPE_F8_E4M3_B128, x.data(), parts.data(), i*n_per_row, std::min<int64_t>(2, nrows - i), n_per_row,
            i == 0 ? nullptr : imatrix.data());
    }
    CHECK(whole == parts, "chunks differ from whole rows");
    const size_t n_bytes = dsv4_f8_e4m3_b128_quantize(x.data(), parts.data(), nrows, n_per_row, imatrix.data());
    CHECK(n_bytes == whole.size() && whole == parts, "%zu bytes for all rows at once", n_bytes);
}

static void test_validate() {
    std::vector<uint8_t> rows(3*BYTES + 1, 0x7E);
    uint8_t * p = rows.data() + 1;
    for (int b = 0; b < 3; b++) {
        p[b*BYTES] = (uint8_t) (b*127); // 0, 127, 254
    }
    auto valid = [&]() { return ggml_validate_row_data(GGML_TYPE_F8_E4M3_B128, p, 3*BYTES); };

    CHECK(valid(), "all values are good");
    CHECK(!ggml_validate_row_data(GGML_TYPE_F8_E4M3_B128, p, 3*BYTES - 1), "not a whole number of blocks");
    for (int i = 0; i < 3*BYTES; i++) {
        const uint8_t old = p[i];
        for (int v = 0; v < 256; v++) {
            p[i] = (uint8_t) v;
            const bool want = i % BYTES == 0 ? v != 255 : (v & 0x7F) != 0x7F;
            CHECK(valid() == want, "byte %d = 0x%02x: valid() is %d", i, v, valid());
        }
        p[i] = old;
    }
}

static void test_vec_dot() {
    const auto vec_dot = ggml_get_type_traits_cpu(GGML_TYPE_F8_E4M3_B128)->vec_dot;
    std::mt19937 rng(3);

    // one code at a time: exact, for all codes, scales and positions modulo the vector width
    {
        uint8_t block[BYTES + 1];
        std::vector<ggml_bf16_t> y(QK);
        for (int e = 0; e < 256; e++) {
            for (int c = 0; c < 256; c++) {
                const int k = (c + e) % QK;
                memset(block, 0, sizeof(block));
                block[1] = (uint8_t) e;
                block[2 + k] = (uint8_t) c;
                y[k].bits = 0xC000; // -2
                float s = 1.0f;
                vec_dot(QK, &s, 0, block + 1, 0, y.data(), 0, 1);
                y[k].bits = 0;
                // the sum has no -0
                const double want = -2.0*code_value(c)*scale_value(e) + 0.0;
                CHECK(same(s, want), "code 0x%02x, scale %d: %a instead of %a", c, e, s, want);
            }
        }
    }

    for (int n = QK; n <= 64*QK; n = n < 8*QK ? n + QK : 2*n) {
        for (int offset = 0; offset < 8; offset++) {
            std::vector<uint8_t> x(n/QK*BYTES + offset);
            std::vector<ggml_bf16_t> y(n);
            for (uint8_t & b : x) {
                b = (uint8_t) rng();
                b = (b & 0x7F) == 0x7F ? 0 : b;
            }
            for (int i = 0; i < n/QK; i++) {
                x[offset + i*BYTES] = (uint8_t) (110 + rng() % 20);
            }
            for (ggml_bf16_t & h : y) {
                h = ggml_fp32_to_bf16((float) ((int) (rng() % 2001) - 1000)/100.0f);
            }
            double want = 0.0, sum_abs = 0.0;
            for (int k = 0; k < n; k++) {
                const uint8_t * b = x.data() + offset + k/QK*BYTES;
                const double p = code_value(b[1 + k % QK])*scale_value(b[0])*ggml_bf16_to_fp32(y[k]);
                want += p;
                sum_abs += fabs(p);
            }
            float s = NAN;
            vec_dot(n, &s, 0, x.data() + offset, 0, y.data(), 0, 1);
            // products are exact; 3 additions in a block, one per block, 5 across the 32 lanes, each within half an ulp
            const double bound = (3 + n/QK + 5)*0x1p-24*sum_abs;
            CHECK(fabs(s - want) <= bound, "n = %d, offset %d: %.9g instead of %.9g, bound %.3g", n, offset, s, want, bound);
        }
    }
}

int main() {
    ggml_cpu_init();
    // several hundred rows are refused on purpose, each with a log line
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    test_decode();
    test_encode_single();
    test_scale();
    test_encode_rows();
    test_chunks();
    test_validate();
    test_vec_dot();
    return check_result("test-f8-e4m3-b128");
}
