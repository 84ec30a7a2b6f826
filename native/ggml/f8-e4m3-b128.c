// Rows of F8_E4M3_B128: decode, encode, validate. Owns nothing else; see f8-e4m3-b128.h for the format.

#include "f8-e4m3-b128.h"

#include "ggml-impl.h"

#include <assert.h>

void dsv4_f8_e4m3_b128_dequantize_row(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_F8_E4M3_B128 == 0);
    const block_f8_e4m3_b128 * b = (const block_f8_e4m3_b128 *) x;

    for (int64_t i = 0; i < k / QK_F8_E4M3_B128; i++) {
        const float d = dsv4_e8m0_to_f32(b[i].e);
        for (int j = 0; j < QK_F8_E4M3_B128; j++) {
            y[i*QK_F8_E4M3_B128 + j] = dsv4_e4m3_to_f32(b[i].qs[j]) * d;
        }
    }
}

void dsv4_f8_e4m3_b128_quantize_row_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_F8_E4M3_B128 == 0);
    block_f8_e4m3_b128 * b = (block_f8_e4m3_b128 *) y;

    for (int64_t i = 0; i < k / QK_F8_E4M3_B128; i++) {
        const float * xi = x + i*QK_F8_E4M3_B128;

        // bits of the largest finite |x|; for magnitudes the order of the bits is the order of the values
        uint32_t amax = 0;
        for (int j = 0; j < QK_F8_E4M3_B128; j++) {
            uint32_t mag;
            memcpy(&mag, &xi[j], sizeof(mag));
            mag &= 0x7FFFFFFFu;
            mag  = mag < 0x7F800000u ? mag : 0;
            amax = mag > amax ? mag : amax;
        }

        // The smallest e with amax <= 448 * 2^(e-127). 448 = 1.75 * 2^8: the exponent less 8, plus one if the mantissa
        // exceeds .75. In integers, because a rounded log2 would give one more for some amax = 448 * 2^n.
        int e = (int) (amax >> 23) - 8 + ((amax & 0x007FFFFFu) > 0x00600000u);
        e = e < 0 ? 0 : e;

        // e <= 247: the factor is normal, the product exact or too small for any code but 0
        const uint32_t inv_bits = (uint32_t) (254 - e) << 23;
        float inv;
        memcpy(&inv, &inv_bits, sizeof(inv));

        b[i].e = (uint8_t) e;
        for (int j = 0; j < QK_F8_E4M3_B128; j++) {
            b[i].qs[j] = dsv4_e4m3_from_f32(xi[j] * inv);
        }
    }
}

size_t dsv4_f8_e4m3_b128_quantize(
        const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    GGML_UNUSED(imatrix); // the scale is a power of two fixed by the largest value: there is nothing to weigh
    const size_t row_size = (size_t) (n_per_row / QK_F8_E4M3_B128) * sizeof(block_f8_e4m3_b128);

    for (int64_t i = 0; i < nrows; i++) {
        dsv4_f8_e4m3_b128_quantize_row_ref(src + i*n_per_row, (char *) dst + i*row_size, n_per_row);
    }
    return nrows*row_size;
}

bool dsv4_f8_e4m3_b128_validate(const void * data, size_t nb) {
    const block_f8_e4m3_b128 * b = (const block_f8_e4m3_b128 *) data;

    for (size_t i = 0; i < nb; i++) {
        if (b[i].e == 255) {
            GGML_LOG_ERROR("%s: the scale of block %zu is NaN (E8M0 255)\n", __func__, i);
            return false;
        }
        int n_nan = 0;
        for (int j = 0; j < QK_F8_E4M3_B128; j++) {
            n_nan += (b[i].qs[j] & 0x7F) == 0x7F;
        }
        if (n_nan > 0) {
            GGML_LOG_ERROR("%s: %d of 128 codes of block %zu are NaN (E4M3FN 0x7F or 0xFF)\n", __func__, n_nan, i);
            return false;
        }
    }
    return true;
}
