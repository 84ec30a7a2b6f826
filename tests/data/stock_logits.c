// Prints the logits that an unpatched llama.cpp computes for a model file, one hexadecimal float per line.
//
//   stock_logits FILE TOKEN...
//
// Exit code 3 if the file does not load. Compiled by tests/parity/test_stock_llama.py, which says against what.

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char ** argv) {
    if (argc < 3) {
        return 2;
    }
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 3;
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx           = 512;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    struct llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    for (int i = 2; i < argc; i++) {
        llama_token token = atoi(argv[i]);
        if (llama_decode(ctx, llama_batch_get_one(&token, 1)) != 0) {
            return 1;
        }
        const float * logits = llama_get_logits_ith(ctx, 0);
        for (int j = 0; j < n_vocab; j++) {
            printf("%a\n", logits[j]);
        }
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
