#include "prompt-parts.h"

#include "chat.h"
#include "dsv4-template.h"

#include <algorithm>
#include <stdexcept>

std::vector<dsv4_prompt_part> pyl_prompt_parts(const common_chat_params & params) {
    std::vector<dsv4_prompt_part> parts;
    std::string text;
    for (const auto & part : params.prompt_parts.parts) {
        if (!part.val.empty()) {
            parts.push_back({ part.val, part.is_input });
            text += part.val;
        }
    }
    // some handlers of foreign templates rewrite the prompt after rendering. Cutting off BOS or EOS, which upstream
    // does for a vocabulary that adds them itself, leaves a piece of the text.
    if (text.find(params.prompt) == std::string::npos) {
        throw std::runtime_error("the handler of this template changes the rendered prompt, "
                                 "so message text cannot be told from template text");
    }
    return parts;
}

// A vocabulary without one of these tokens would have it spelled in letters, which the model was not trained on.
static void check_added_tokens(const dsv4_prompt_tokenizer & tokenizer, const std::vector<dsv4_prompt_part> & parts) {
    for (const auto & token : dsv4_added_tokens()) {
        const bool is_used = std::any_of(parts.begin(), parts.end(), [&](const dsv4_prompt_part & part) {
            return !part.is_input && part.text.find(token) != std::string::npos;
        });
        if (is_used && !tokenizer.has(token)) {
            throw std::invalid_argument("the vocabulary of this model has no token " + token +
                                        ", which a role or task of this conversation needs");
        }
    }
}

std::vector<llama_token> pyl_prompt_tokens(const llama_vocab * vocab, const dsv4_prompt_tokenizer & tokenizer,
        const std::vector<dsv4_prompt_part> & parts) {
    check_added_tokens(tokenizer, parts);
    auto tokens = tokenizer.tokenize(parts);
    const llama_token bos = llama_vocab_bos(vocab);
    if (llama_vocab_get_add_bos(vocab) && (tokens.empty() || tokens[0] != bos)) {
        tokens.insert(tokens.begin(), bos); // a template that leaves BOS to the tokeniser
    }
    return tokens;
}
