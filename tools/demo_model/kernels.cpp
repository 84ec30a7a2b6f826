// The passes over memory that training spends its time on beside matrix products: hyper-connections, normalisation
// and rotation of heads, rounding of activations, the gated unit of the experts, exponentials of attention scores.
// Each has a forward and a backward function over dense float32 arrays. What they compute is defined by ``model.py``'s
// use of them and checked against plain PyTorch by tests/parity/test_demo_model.py. Vectors of 16; one thread.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));

namespace {

constexpr int S = 4;              // streams
constexpr int Z = S * (S + 2);    // coefficients of a token
constexpr int MAX_ITERATIONS = 32;

inline v16 load(const float * p) { return *reinterpret_cast<const v16 *>(p); }
inline void store(float * p, v16 x) { *reinterpret_cast<v16 *>(p) = x; }
inline v16 all(float x) { return x - v16{}; }
inline i16 alli(int32_t x) { return x - i16{}; }
inline v16 pick(i16 mask, v16 a, v16 b) { return (v16) ((mask & (i16) a) | (~mask & (i16) b)); }
inline v16 vmin(v16 a, v16 b) { return pick(a < b, a, b); }
inline v16 vmax(v16 a, v16 b) { return pick(a > b, a, b); }
inline v16 vabs(v16 a) { return (v16) ((i16) a & alli(0x7fffffff)); }

inline float sum(v16 x) {
    float s = 0;
    for (int i = 0; i < 16; i++) s += x[i];
    return s;
}

inline float largest(v16 x) {
    float m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// relative error below 3e-7
inline v16 vexp(v16 x) {
    x = vmin(vmax(x, all(-87.0f)), all(88.0f));
    const v16 magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const v16 shifted = x * 1.44269504f + magic;
    const v16 n = shifted - magic;
    const v16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    v16 p = all(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const i16 power = (((i16) shifted - (i16) magic) + 127) << 23;
    return p * (v16) power;
}

inline v16 sigmoid(v16 x) { return 1.0f / (1.0f + vexp(-x)); }

inline float power_of(int byte) {
    const uint32_t bits = (uint32_t) byte << 23;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// nearest E4M3 value of |y| <= 448, halves to even
inline v16 nearest_e4m3(v16 y) {
    const i16 bits = (i16) y;
    const i16 rounded = (bits + 0x7ffff + ((bits >> 20) & 1)) & alli((int32_t) 0xfff00000);
    const v16 magic = all(24576.0f);  // 1.5 * 2^14: the spacing there is 2^-9
    const v16 small = (v16) (((i16) ((vabs(y) + magic) - magic)) | (bits & alli(INT32_MIN)));
    return pick(vabs(y) < all(0x1p-6f), small, (v16) rounded);
}

inline v16 nearest_e2m1(v16 y) {
    const v16 a = vabs(y);
    const v16 magic = all(12582912.0f);
    const v16 r1 = ((a * 2 + magic) - magic) * 0.5f;
    const v16 r2 = (a + magic) - magic;
    const v16 r4 = ((a * 0.5f + magic) - magic) * 2;
    const v16 r = pick(a < all(2), r1, pick(a < all(4), r2, r4));
    return (v16) ((i16) r | ((i16) y & alli(INT32_MIN)));
}

// blocks of `block` channels with one power-of-two scale each
inline void round_row(const float * x, float * out, int n, int block, bool is_f8) {
    const float floor = is_f8 ? 1e-4f : 6 * 0x1p-126f;
    const float reciprocal = is_f8 ? (float) (1.0 / 448) : (float) (1.0 / 6);
    for (int b = 0; b < n; b += block) {
        v16 m = v16{};
        for (int c = b; c < b + block; c += 16) m = vmax(m, vabs(load(x + c)));
        const float amax = largest(m);
        const float q = (amax > floor ? amax : floor) * reciprocal;
        int32_t bits;
        memcpy(&bits, &q, 4);
        const int byte = (bits >> 23) + ((bits & 0x7fffff) != 0);
        const float down = power_of(254 - byte), up = power_of(byte);
        for (int c = b; c < b + block; c += 16) {
            const v16 y = load(x + c) * down;
            store(out + c, (is_f8 ? nearest_e4m3(y) : nearest_e2m1(y)) * up);
        }
    }
}

inline v16 swapped(v16 x) {
    return __builtin_shuffle(x, i16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
}

struct Sinkhorn {
    v16 softmax[S][S];
    v16 y[2 * MAX_ITERATIONS][S][S];
    v16 inverse[2 * MAX_ITERATIONS][S];

    // x[source][destination]; returns the last y
    void forward(const v16 (&x)[S][S], int64_t n_iterations, float eps) {
        v16 m[S][S];
        for (int i = 0; i < S; i++) {
            v16 top = vmax(vmax(x[i][0], x[i][1]), vmax(x[i][2], x[i][3]));
            v16 total = v16{};
            for (int j = 0; j < S; j++) total += m[i][j] = vexp(x[i][j] - top);
            for (int j = 0; j < S; j++) m[i][j] = (softmax[i][j] = m[i][j] / total) + eps;
        }
        for (int64_t k = 1; k < 2 * n_iterations; k++) {
            const bool is_over_sources = k % 2;
            for (int a = 0; a < S; a++) {
                v16 total = all(eps);
                for (int b = 0; b < S; b++) total += is_over_sources ? m[b][a] : m[a][b];
                const v16 f = inverse[k][a] = 1.0f / total;
                for (int b = 0; b < S; b++) (is_over_sources ? m[b][a] : m[a][b]) *= f;
            }
            memcpy(y[k], m, sizeof m);
        }
    }

    // gradient of the last y -> gradient of x, in place
    void backward(v16 (&g)[S][S], int64_t n_iterations) const {
        for (int64_t k = 2 * n_iterations - 1; k >= 1; k--) {
            const bool is_over_sources = k % 2;
            for (int a = 0; a < S; a++) {
                v16 dot = v16{};
                for (int b = 0; b < S; b++) {
                    dot += is_over_sources ? g[b][a] * y[k][b][a] : g[a][b] * y[k][a][b];
                }
                for (int b = 0; b < S; b++) {
                    v16 & e = is_over_sources ? g[b][a] : g[a][b];
                    e = (e - dot) * inverse[k][a];
                }
            }
        }
        for (int i = 0; i < S; i++) {
            v16 dot = v16{};
            for (int j = 0; j < S; j++) dot += g[i][j] * softmax[i][j];
            for (int j = 0; j < S; j++) g[i][j] = softmax[i][j] * (g[i][j] - dot);
        }
    }
};

}  // namespace

extern "C" {

// --- hyper-connections: s (N, S, D) --------------------------------------------------------------------------------

// new stream j = post[j] y + sum over i of mix[i][j] s[i]
void leave(int64_t N, int64_t D, const float * y, const float * s, const float * post, const float * mix, float * out) {
    for (int64_t n = 0; n < N; n++, y += D, s += S * D, post += S, mix += S * S, out += S * D) {
        for (int64_t c = 0; c < D; c += 16) {
            v16 v[S];
            for (int i = 0; i < S; i++) v[i] = load(s + i * D + c);
            for (int j = 0; j < S; j++) {
                v16 o = post[j] * load(y + c);
                for (int i = 0; i < S; i++) o += mix[i * S + j] * v[i];
                store(out + j * D + c, o);
            }
        }
    }
}

void leave_back(
        int64_t N, int64_t D, const float * y, const float * s, const float * post, const float * mix, const float * g,
        float * dy, float * ds, float * dpost, float * dmix) {
    for (int64_t n = 0; n < N; n++) {
        v16 gp[S] = {}, gm[S][S] = {};
        for (int64_t c = 0; c < D; c += 16) {
            v16 v[S], w[S];
            for (int j = 0; j < S; j++) {
                v[j] = load(s + j * D + c);
                w[j] = load(g + j * D + c);
            }
            const v16 yc = load(y + c);
            v16 d = v16{};
            for (int j = 0; j < S; j++) {
                d += post[j] * w[j];
                gp[j] += w[j] * yc;
            }
            store(dy + c, d);
            for (int i = 0; i < S; i++) {
                v16 e = v16{};
                for (int j = 0; j < S; j++) {
                    e += mix[i * S + j] * w[j];
                    gm[i][j] += w[j] * v[i];
                }
                store(ds + i * D + c, e);
            }
        }
        for (int j = 0; j < S; j++) dpost[j] = sum(gp[j]);
        for (int i = 0; i < S; i++) {
            for (int j = 0; j < S; j++) dmix[i * S + j] = sum(gm[i][j]);
        }
        y += D, s += S * D, post += S, mix += S * S, g += S * D, dy += D, ds += S * D, dpost += S, dmix += S * S;
    }
}

// z (N, Z) = streams times the projection -> x (N, D) normalised input, post, mix; pre, r and ru serve the way back
void enter(
        int64_t N, int64_t D, int64_t n_iterations, float rms_eps, float eps, const float * s, const float * z,
        const float * scale, const float * base, const float * w,
        float * x, float * post, float * mix, float * pre, float * r, float * ru) {
    static Sinkhorn sinkhorn;
    for (int64_t first = 0; first < N; first += 16) {
        for (int t = 0; t < 16; t++) {
            const float * row = s + (first + t) * S * D;
            v16 total = v16{};
            for (int64_t c = 0; c < S * D; c += 16) total += load(row + c) * load(row + c);
            r[first + t] = 1 / std::sqrt(sum(total) / (S * D) + rms_eps);
        }
        v16 m[S][S];
        for (int k = 0; k < Z; k++) {
            v16 a;
            for (int t = 0; t < 16; t++) a[t] = z[(first + t) * Z + k] * r[first + t];
            a = a * scale[k < S ? 0 : k < 2 * S ? 1 : 2] + base[k];
            if (k < 2 * S) {
                const v16 b = k < S ? sigmoid(a) + eps : 2.0f * sigmoid(a);
                for (int t = 0; t < 16; t++) (k < S ? pre : post)[(first + t) * S + k % S] = b[t];
            } else {
                m[(k - 2 * S) / S][k % S] = a;
            }
        }
        sinkhorn.forward(m, n_iterations, eps);
        for (int k = 0; k < S * S; k++) {
            const v16 b = sinkhorn.y[2 * n_iterations - 1][k / S][k % S];
            for (int t = 0; t < 16; t++) mix[(first + t) * S * S + k] = b[t];
        }
        for (int64_t n = first; n < first + 16; n++) {
            v16 total = v16{};
            for (int64_t c = 0; c < D; c += 16) {
                v16 u = v16{};
                for (int i = 0; i < S; i++) u += pre[n * S + i] * load(s + (n * S + i) * D + c);
                total += u * u;
                store(x + n * D + c, u);
            }
            ru[n] = 1 / std::sqrt(sum(total) / D + rms_eps);
            for (int64_t c = 0; c < D; c += 16) store(x + n * D + c, load(x + n * D + c) * ru[n] * load(w + c));
        }
    }
}

// ds lacks what flows through z; dscale, dbase and dw are added to
void enter_back(
        int64_t N, int64_t D, int64_t n_iterations, float rms_eps, float eps, const float * s, const float * z,
        const float * scale, const float * base, const float * w, const float * pre, const float * r, const float * ru,
        const float * gx, const float * gpost, const float * gmix,
        float * ds, float * dz, float * dscale, float * dbase, float * dw) {
    (void) rms_eps;
    static Sinkhorn sinkhorn;
    static float u[8192], gpre[16][S];
    v16 tscale[3] = {}, tbase[Z] = {};
    for (int64_t first = 0; first < N; first += 16) {
        for (int64_t n = first; n < first + 16; n++) {
            v16 dot = v16{};
            for (int64_t c = 0; c < D; c += 16) {
                v16 a = v16{};
                for (int i = 0; i < S; i++) a += pre[n * S + i] * load(s + (n * S + i) * D + c);
                store(u + c, a);
                const v16 g = load(gx + n * D + c);
                dot += g * load(w + c) * a;
                store(dw + c, load(dw + c) + g * a * ru[n]);
            }
            const float back = sum(dot) * ru[n] * ru[n] * ru[n] / D;
            v16 gp[S] = {};
            for (int64_t c = 0; c < D; c += 16) {
                const v16 gu = load(gx + n * D + c) * load(w + c) * ru[n] - back * load(u + c);
                for (int i = 0; i < S; i++) {
                    gp[i] += gu * load(s + (n * S + i) * D + c);
                    store(ds + (n * S + i) * D + c, pre[n * S + i] * gu);
                }
            }
            for (int i = 0; i < S; i++) gpre[n - first][i] = sum(gp[i]);
        }
        v16 scaled[Z], g[Z], m[S][S], gm[S][S];
        for (int k = 0; k < Z; k++) {
            for (int t = 0; t < 16; t++) scaled[k][t] = z[(first + t) * Z + k] * r[first + t];
        }
        for (int k = 0; k < 2 * S; k++) {
            v16 over;
            for (int t = 0; t < 16; t++) over[t] = k < S ? gpre[t][k] : gpost[(first + t) * S + k - S];
            const v16 p = sigmoid(scaled[k] * scale[k < S ? 0 : 1] + base[k]);
            g[k] = over * p * (1.0f - p) * (k < S ? 1.0f : 2.0f);
        }
        for (int k = 0; k < S * S; k++) {
            m[k / S][k % S] = scaled[2 * S + k] * scale[2] + base[2 * S + k];
            for (int t = 0; t < 16; t++) gm[k / S][k % S][t] = gmix[(first + t) * S * S + k];
        }
        sinkhorn.forward(m, n_iterations, eps);
        sinkhorn.backward(gm, n_iterations);
        for (int k = 0; k < S * S; k++) g[2 * S + k] = gm[k / S][k % S];
        v16 dr = v16{};
        for (int k = 0; k < Z; k++) {
            const int part = k < S ? 0 : k < 2 * S ? 1 : 2;
            tbase[k] += g[k];
            tscale[part] += g[k] * scaled[k];
            const v16 gs = g[k] * scale[part];
            for (int t = 0; t < 16; t++) {
                dr[t] += gs[t] * z[(first + t) * Z + k];
                dz[(first + t) * Z + k] = gs[t] * r[first + t];
            }
        }
        for (int t = 0; t < 16; t++) {
            const int64_t n = first + t;
            const float f = -dr[t] * r[n] * r[n] * r[n] / (S * D);
            for (int64_t c = n * S * D; c < (n + 1) * S * D; c += 16) store(ds + c, load(ds + c) + f * load(s + c));
        }
    }
    for (int k = 0; k < Z; k++) dbase[k] += sum(tbase[k]);
    for (int k = 0; k < 3; k++) dscale[k] += sum(tscale[k]);
}

// --- normalisation and rotation: x (N, H, D), cosines and signed sines (period, n_rot) by token modulo period ----------

// rotation(x / rms(x) * w) * factor; direction -1 turns back; rs is null: no normalisation
void head(
        int64_t N, int64_t H, int64_t D, int64_t n_rot, int64_t period, float eps, float factor, float direction,
        const float * x, const float * w, const float * cosine, const float * sine, float * out, float * rs) {
    for (int64_t n = 0; n < N; n++) {
        const float * co = cosine + n % period * n_rot, * si = sine + n % period * n_rot;
        for (int64_t h = 0; h < H; h++, x += D, out += D) {
            float f = factor;
            if (rs) {
                v16 total = v16{};
                for (int64_t c = 0; c < D; c += 16) total += load(x + c) * load(x + c);
                *rs = 1 / std::sqrt(sum(total) / D + eps);
                f *= *rs++;
            }
            for (int64_t c = 0; c < D; c += 16) {
                v16 a = load(x + c) * f;
                if (w) a *= load(w + c);
                if (c >= D - n_rot) {
                    const int64_t k = c - (D - n_rot);
                    a = a * load(co + k) + swapped(a) * load(si + k) * direction;
                }
                store(out + c, a);
            }
        }
    }
}

void head_back(
        int64_t N, int64_t H, int64_t D, int64_t n_rot, int64_t period, float factor,
        const float * x, const float * w, const float * cosine, const float * sine, const float * rs, const float * g,
        float * dx, float * dw) {
    for (int64_t n = 0; n < N; n++) {
        const float * co = cosine + n % period * n_rot, * si = sine + n % period * n_rot;
        for (int64_t h = 0; h < H; h++, x += D, g += D, dx += D) {
            const float r = *rs++;
            v16 dot = v16{};
            for (int64_t c = 0; c < D; c += 16) {
                v16 a = load(g + c) * factor;
                if (c >= D - n_rot) {
                    const int64_t k = c - (D - n_rot);
                    a = a * load(co + k) - swapped(a) * load(si + k);
                }
                if (dw) {
                    store(dw + c, load(dw + c) + a * load(x + c) * r);
                    a *= load(w + c);
                }
                dot += a * load(x + c);
                store(dx + c, a);
            }
            const float back = sum(dot) * r * r / D;
            for (int64_t c = 0; c < D; c += 16) store(dx + c, (load(dx + c) - back * load(x + c)) * r);
        }
    }
}

// --- rounding: the first n_rounded of each row of n channels ----------------------------------------------------------

void round_rows(int64_t N, int64_t n, int64_t n_rounded, int64_t block, int64_t is_f8, const float * x, float * out) {
    for (int64_t i = 0; i < N; i++, x += n, out += n) {
        round_row(x, out, (int) n_rounded, (int) block, is_f8 != 0);
        if (out != x) memcpy(out + n_rounded, x + n_rounded, (n - n_rounded) * sizeof(float));
    }
}

// --- gated unit of ab (N, 2 F): silu(min(a, limit)) clamp(b, -limit, limit) weight, rounded if asked for --------------

void gate(
        int64_t N, int64_t F, float limit, int64_t is_rounded, const float * ab, const float * weight, float * out) {
    for (int64_t n = 0; n < N; n++, ab += 2 * F, out += F) {
        const float * a = ab, * b = ab + F;
        const float f = weight ? weight[n] : 1.0f;
        for (int64_t c = 0; c < F; c += 16) {
            const v16 p = vmin(load(a + c), all(limit));
            const v16 q = vmax(vmin(load(b + c), all(limit)), all(-limit));
            store(out + c, p * sigmoid(p) * q * f);
        }
        if (is_rounded) round_row(out, out, (int) F, 128, true);
    }
}

void gate_back(
        int64_t N, int64_t F, float limit, const float * ab, const float * weight, const float * g,
        float * dab, float * dweight) {
    for (int64_t n = 0; n < N; n++, ab += 2 * F, g += F, dab += 2 * F) {
        const float * a = ab, * b = ab + F;
        float * da = dab, * db = dab + F;
        const float f = weight ? weight[n] : 1.0f;
        v16 total = v16{};
        for (int64_t c = 0; c < F; c += 16) {
            const v16 p = vmin(load(a + c), all(limit));
            const v16 q = vmax(vmin(load(b + c), all(limit)), all(-limit));
            const v16 gc = load(g + c), k = sigmoid(p), silu = p * k;
            total += gc * silu * q;
            const v16 ga = gc * q * f * (k + silu * (1.0f - k)), gb = gc * silu * f;
            store(da + c, pick(load(a + c) > all(limit), v16{}, ga));
            store(db + c, pick(vabs(load(b + c)) > all(limit), v16{}, gb));
        }
        if (dweight) dweight[n] = sum(total);
    }
}

// --- attention: scores (N, R); low and high by row modulo period bound the columns that are seen ------------------------

// in place; total (N)
void exp_seen(
        int64_t N, int64_t R, int64_t period, const int32_t * low, const int32_t * high, float * e, float * total) {
    for (int64_t n = 0; n < N; n++, e += R) {
        const int64_t lo = low[n % period], hi = high[n % period];
        v16 t = v16{};
        int64_t c = 0;
        i16 column = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (; c + 16 <= R; c += 16, column += 16) {
            v16 x = v16{};
            if (c < hi && c + 16 > lo) {
                const i16 seen = (column >= alli((int32_t) lo)) & (column < alli((int32_t) hi));
                x = pick(seen, vexp(load(e + c)), v16{});
            }
            t += x;
            store(e + c, x);
        }
        float rest = 0;
        for (; c < R; c++) {
            e[c] = c >= lo && c < hi ? std::exp(e[c]) : 0;
            rest += e[c];
        }
        total[n] = sum(t) + rest;
    }
}

// g = e (g + gtotal)
void exp_back(int64_t N, int64_t R, const float * e, const float * gtotal, float * g) {
    for (int64_t n = 0; n < N; n++, e += R, g += R) {
        int64_t c = 0;
        for (; c + 16 <= R; c += 16) store(g + c, load(e + c) * (load(g + c) + gtotal[n]));
        for (; c < R; c++) g[c] = e[c] * (g[c] + gtotal[n]);
    }
}

}  // extern "C"
