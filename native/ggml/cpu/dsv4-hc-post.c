#include "dsv4-hc-post.h"

#include "ggml-cpu-impl.h"

#include <stdint.h>

enum { PIECE = 512 }; // floats of a stream: x, 4 streams and an output of them fill a quarter of the nearest cache

static bool has_float_rows(const struct ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float);
}

static const float * row(const struct ggml_tensor * t, int64_t i1, int64_t i2) {
    return (const float *) ((const char *) t->data + i1*t->nb[1] + i2*t->nb[2]);
}

static float at(const struct ggml_tensor * t, int64_t i0, int64_t i1, int64_t i2) {
    return *(const float *) ((const char *) t->data + i0*t->nb[0] + i1*t->nb[1] + i2*t->nb[2]);
}

bool dsv4_hc_post_compute(const struct ggml_compute_params * params, struct ggml_tensor * op) {
    const struct ggml_tensor * x        = op->src[0]; // (n_embd, n_tokens)
    const struct ggml_tensor * residual = op->src[1]; // (n_embd, hc, n_tokens)
    const struct ggml_tensor * post     = op->src[2]; // (hc, n_tokens)
    const struct ggml_tensor * comb     = op->src[3]; // (hc to, hc from, n_tokens), NULL: every stream keeps its own
    if (!has_float_rows(x) || !has_float_rows(residual) || !has_float_rows(op) || post->type != GGML_TYPE_F32 ||
        (comb && comb->type != GGML_TYPE_F32)) {
        return false;
    }
    const int64_t n_embd   = x->ne[0];
    const int64_t hc       = residual->ne[1];
    const int64_t n_pieces = (n_embd + PIECE - 1)/PIECE;
    const int64_t n_units  = n_pieces*x->ne[1];

    for (int64_t unit = n_units*params->ith/params->nth; unit < n_units*(params->ith + 1)/params->nth; unit++) {
        const int64_t token = unit / n_pieces;
        const int64_t first = unit % n_pieces*PIECE;
        const int64_t n     = MIN(PIECE, n_embd - first);
        const float * xs    = row(x, token, 0) + first;
        for (int64_t to = 0; to < hc; to++) {
            float * restrict out = (float *) ((char *) op->data + to*op->nb[1] + token*op->nb[2]) + first;
            const float p = at(post, to, token, 0);
            for (int64_t i = 0; i < n; i++) {
                out[i] = xs[i]*p;
            }
            for (int64_t from = comb ? 0 : to; from < (comb ? hc : to + 1); from++) {
                const float * r = row(residual, from, token) + first;
                const float   c = comb ? at(comb, to, from, token) : 1.0f;
                for (int64_t i = 0; i < n; i++) {
                    out[i] += r[i]*c;
                }
            }
        }
    }
    return true;
}
