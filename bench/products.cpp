// Speed of the CPU products that decode and prefill consist of: bytes of weights per second for one activation row,
// multiply-adds per second for many. Beside each kernel stands what the unpatched engine has for the same weights
// (products without a wish for precision take its 8-bit path) and the plain reading speed of the same bytes, measured in
// turns in the same run, because machines are noisy. Build and run: see bench/README.md.

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <thread>
#include <vector>

static double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// CPU time of all threads: on a machine that others use too, it says more than the clock on the wall. Threads that wait
// for each other count as working.
static double cpu_s() {
    return (double) std::clock()/CLOCKS_PER_SEC;
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size()/2];
}

// Sums all 64-bit words with n_threads threads; what memory gives without any arithmetic.
static volatile uint64_t g_sink;
static void read_all(const uint8_t * p, size_t size, int n_threads) {
    std::vector<std::thread> threads;
    for (int t = 0; t < n_threads; t++) {
        threads.emplace_back([=] {
            const uint64_t * q   = (const uint64_t *) (p + size/n_threads*t/64*64);
            const size_t     n   = size/n_threads/8/8*8;
            uint64_t sum[8] = { 0 };
            for (size_t i = 0; i < n; i += 8) {
                for (int j = 0; j < 8; j++) {
                    sum[j] += q[i + j];
                }
            }
            g_sink = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
        });
    }
    for (std::thread & t : threads) {
        t.join();
    }
}

struct product {
    std::string     name;
    ggml_context  * ctx;
    ggml_cgraph   * gf;
    ggml_cplan      plan;
    std::vector<uint8_t> work;
    size_t          n_bytes; // of weights
    double          n_madds;
    std::vector<double> times_s;
    std::vector<double> cpu_times_s;

    void run() {
        plan.work_data = work.data();
        ggml_graph_compute(gf, &plan);
    }
};

static product make(
        const char * name, ggml_context * ctx, ggml_tensor * w, int64_t n_cols, ggml_prec prec, ggml_threadpool * pool,
        int n_threads) {
    ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, w->ne[0], n_cols);
    for (int64_t i = 0; i < ggml_nelements(x); i++) {
        ((float *) x->data)[i] = (float) (i*2654435761u % 1000)/500.0f - 1.0f;
    }
    ggml_tensor * y = ggml_mul_mat(ctx, w, x);
    ggml_prec_set_src(y, prec, 1);
    product p;
    p.name = name;
    p.ctx  = ctx;
    p.gf   = ggml_new_graph(ctx);
    ggml_build_forward_expand(p.gf, y);
    p.plan = ggml_graph_plan(p.gf, n_threads, pool);
    p.work.resize(p.plan.work_size);
    p.n_bytes = ggml_nbytes(w);
    p.n_madds = (double) ggml_nelements(w)*n_cols;
    return p;
}

int main(int argc, char ** argv) {
    const int     n_threads = argc > 1 ? atoi(argv[1]) : 1;
    const int64_t n_cols    = argc > 2 ? atoll(argv[2]) : 1;
    const int     n_rounds  = argc > 3 ? atoi(argv[3]) : 9;
    const int64_t k = 4096;
    const int64_t m = n_cols == 1 ? 65536 : 2048; // decode: far larger than the caches

    ggml_cpu_init();
    ggml_init_params params = { (size_t) 3 << 30, nullptr, false };
    ggml_context * ctx = ggml_init(params);
    ggml_threadpool_params pool_params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool * pool = ggml_threadpool_new(&pool_params);

    const auto weights = [&](ggml_type type) {
        ggml_tensor * w = ggml_new_tensor_2d(ctx, type, k, m);
        std::vector<float> row(k);
        std::vector<uint8_t> data(ggml_row_size(type, k));
        uint32_t state = 1;
        for (int64_t i = 0; i < 64; i++) { // 64 different rows, repeated
            for (float & v : row) {
                float sum = 0.0f; // roughly normal, as weights are
                for (int j = 0; j < 4; j++) {
                    state = state*1664525u + 1013904223u;
                    sum  += (float) (state >> 8)/(1 << 24) - 0.5f;
                }
                v = sum;
            }
            ggml_quantize_chunk(type, row.data(), data.data(), 0, 1, k, nullptr);
            for (int64_t r = i; r < m; r += 64) {
                memcpy((char *) w->data + r*w->nb[1], data.data(), data.size());
            }
        }
        return w;
    };
    ggml_tensor * f8 = weights(GGML_TYPE_F8_E4M3_B128);
    ggml_tensor * mx = weights(GGML_TYPE_MXFP4);
    ggml_tensor * q8 = weights(GGML_TYPE_Q8_0);
    ggml_tensor * bf = weights(GGML_TYPE_BF16);

    std::vector<product> products = {
        make("F8_E4M3_B128, inputs F32",             ctx, f8, n_cols, GGML_PREC_BF16,      pool, n_threads),
        make("MXFP4, inputs F32",                    ctx, mx, n_cols, GGML_PREC_BF16,      pool, n_threads),
        make("BF16, inputs F32",                     ctx, bf, n_cols, GGML_PREC_F32,       pool, n_threads),
        make("upstream: MXFP4, inputs Q8_0",         ctx, mx, n_cols, GGML_PREC_UNDEFINED, pool, n_threads),
        make("upstream: Q8_0, inputs Q8_0",          ctx, q8, n_cols, GGML_PREC_UNDEFINED, pool, n_threads),
        make("upstream: BF16, inputs BF16",          ctx, bf, n_cols, GGML_PREC_UNDEFINED, pool, n_threads),
    };
    std::vector<double> read_s, read_cpu_s;
    for (int round = 0; round < n_rounds; round++) {
        for (product & p : products) {
            const double start     = now_s();
            const double cpu_start = cpu_s();
            p.run();
            p.times_s.push_back(now_s() - start);
            p.cpu_times_s.push_back(cpu_s() - cpu_start);
        }
        const double start     = now_s();
        const double cpu_start = cpu_s();
        read_all((const uint8_t *) f8->data, ggml_nbytes(f8), n_threads);
        read_s.push_back(now_s() - start);
        read_cpu_s.push_back(cpu_s() - cpu_start);
    }
    const double read_gbs = (double) ggml_nbytes(f8)/median(read_s)/1e9;
    const double read_cpu_gbs = (double) ggml_nbytes(f8)/median(read_cpu_s)/1e9;
    std::printf("%d threads, %d columns, k = %d, medians of %d\n", n_threads, (int) n_cols, (int) k, n_rounds);
    std::printf("%-30s %8s %7s %10s %9s | a second of CPU time: %7s %7s %10s\n",
        "", "GB/s", "of read", "Gmadd/s", "ms", "GB", "of read", "Gmadd");
    std::printf("%-30s %8.1f %43s %15.1f\n", "plain read", read_gbs, "|", read_cpu_gbs);
    for (const product & p : products) {
        const double t = median(p.times_s), u = median(p.cpu_times_s);
        std::printf("%-30s %8.1f %5.0f %% %10.1f %9.2f | %29.1f %5.0f %% %10.1f\n", p.name.c_str(),
            p.n_bytes/t/1e9, 100*p.n_bytes/t/1e9/read_gbs, p.n_madds/t/1e9, 1e3*t,
            p.n_bytes/u/1e9, 100*p.n_bytes/u/1e9/read_cpu_gbs, p.n_madds/u/1e9);
    }
    ggml_threadpool_free(pool);
    ggml_free(ctx);
    return 0;
}
