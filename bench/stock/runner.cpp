// Runs work on a model as it is told, one line each, so that two engines can take turns: "prefill N" or "decode N" on
// standard input, "wall-seconds cpu-seconds" on standard output. Uses nothing but llama.h of the unpatched pin.

#include "llama.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

static double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int main(int argc, char ** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: %s MODEL THREADS CONTEXT BATCH\n", argv[0]);
        return 1;
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    const double load_start_s = now_s();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    llama_context_params params = llama_context_default_params();
    params.n_threads = params.n_threads_batch = atoi(argv[2]);
    params.n_ctx     = atoi(argv[3]);
    params.n_batch   = params.n_ubatch = atoi(argv[4]);
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::printf("loaded %.3f\n", now_s() - load_start_s);
    std::fflush(stdout);

    char kind[16];
    int  n;
    while (std::scanf("%15s %d", kind, &n) == 2) {
        llama_memory_clear(llama_get_memory(ctx), true);
        std::vector<llama_token> ids(n);
        unsigned state = 1;
        for (llama_token & id : ids) {
            state = state*1664525u + 1013904223u;
            id = (llama_token) ((state >> 8) % (unsigned) n_vocab);
        }
        const int          step      = strcmp(kind, "prefill") == 0 ? (int) params.n_batch : 1;
        const double       start_s   = now_s();
        const std::clock_t cpu_start = std::clock();
        for (int i = 0; i < n; i += step) {
            const int n_now = n - i < step ? n - i : step;
            if (llama_decode(ctx, llama_batch_get_one(ids.data() + i, n_now)) != 0) {
                std::fprintf(stderr, "llama_decode failed at token %d\n", i);
                return 1;
            }
        }
        llama_synchronize(ctx);
        std::printf("%.6f %.6f\n", now_s() - start_s, (double) (std::clock() - cpu_start)/CLOCKS_PER_SEC);
        std::fflush(stdout);
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
