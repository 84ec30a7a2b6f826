// Dot product of F8_E4M3_B128 weights with BF16 activations. Plain loops in an order that compilers vectorise without
// reassociating: independent sums per lane, added up at the end.

#include "f8-e4m3-b128-cpu.h"

#include <assert.h>

enum { N_LANES = 32 }; // independent sums

static inline float bf16_to_f32(ggml_bf16_t h) {
    const uint32_t bits = (uint32_t) h.bits << 16;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

void dsv4_f8_e4m3_b128_vec_dot_bf16(
        int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx,
        const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(n % QK_F8_E4M3_B128 == 0);
    assert(nrc == 1);
    (void) bs; (void) bx; (void) by; (void) nrc;

    const block_f8_e4m3_b128 * x = (const block_f8_e4m3_b128 *) vx;
    const ggml_bf16_t        * y = (const ggml_bf16_t *) vy;

    float acc[N_LANES] = { 0.0f };

    for (int i = 0; i < n / QK_F8_E4M3_B128; i++) {
        // Products of a code (4 significant bits) and a bf16 (8) are exact in float32. The scale is applied once per
        // block and lane, exactly too unless it underflows.
        float p[QK_F8_E4M3_B128]; // (128) products
        for (int j = 0; j < QK_F8_E4M3_B128; j++) {
            p[j] = dsv4_e4m3_to_f32(x[i].qs[j]) * bf16_to_f32(y[i*QK_F8_E4M3_B128 + j]);
        }
        const float d = dsv4_e8m0_to_f32(x[i].e);
        for (int j = 0; j < N_LANES; j++) {
            acc[j] += d * ((p[j] + p[j + N_LANES]) + (p[j + 2*N_LANES] + p[j + 3*N_LANES]));
        }
    }

    for (int half = N_LANES/2; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) {
            acc[j] += acc[j + half];
        }
    }
    *s = acc[0];
}
