// Text to ids and back, behind status codes.

#include "error.h"

#include "llama-vocab.h"

#include <algorithm>
#include <climits>
#include <vector>

int32_t pyl_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_bytes, int32_t * ids, int32_t n_max,
        bool parse_special) {
    int32_t n = INT32_MIN;
    pyl_guard([&]() -> int32_t {
        if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) { // upstream asserts
            pyl_set_error("the file has no vocabulary");
            return PYL_ERROR_ARGUMENT;
        }
        // BOS and EOS are the caller's. Without parse_special nothing is looked for in the text: upstream would still
        // match user-defined tokens, and <think> in a user's text is not the model's <think>.
        const std::vector<llama_token> found =
            vocab->tokenize(std::string(text, n_bytes), false, parse_special, parse_special);
        n = int32_t(found.size());
        if (n > n_max) {
            n = -n;
        } else {
            std::copy(found.begin(), found.end(), ids);
        }
        return PYL_OK;
    });
    return n;
}

int32_t pyl_token_bytes(const struct llama_vocab * vocab, int32_t id, char * buf, int32_t size) {
    int32_t n = INT32_MIN;
    pyl_guard([&]() -> int32_t {
        if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE || id < 0 || id >= llama_vocab_n_tokens(vocab)) {
            pyl_set_error("no such token");
            return PYL_ERROR_ARGUMENT;
        }
        n = llama_token_to_piece(vocab, id, buf, size, 0, true);
        return PYL_OK;
    });
    return n;
}
