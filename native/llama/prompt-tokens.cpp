#include "prompt-tokens.h"

#include "llama-vocab.h"

#include <algorithm>

dsv4_prompt_tokenizer::dsv4_prompt_tokenizer(const llama_vocab * vocab) : vocab(vocab) {
    const int mask = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED | LLAMA_TOKEN_ATTR_UNKNOWN;

    for (llama_token id = 0; id < (llama_token) vocab->n_tokens(); id++) {
        const auto & data = vocab->get_token_data(id);
        if ((data.attr & mask) && !data.text.empty()) {
            named[(unsigned char) data.text[0]].push_back({ data.text, id });
        }
    }
    for (auto & bucket : named) {
        std::stable_sort(bucket.begin(), bucket.end(), [](const named_token & a, const named_token & b) {
            return a.first.size() > b.first.size();
        });
    }
}

const dsv4_prompt_tokenizer::named_token * dsv4_prompt_tokenizer::match(
        const std::string & text, size_t pos, size_t end) const {
    for (const auto & token : named[(unsigned char) text[pos]]) {
        if (token.first.size() <= end - pos && text.compare(pos, token.first.size(), token.first) == 0) {
            return &token;
        }
    }
    return nullptr;
}

bool dsv4_prompt_tokenizer::has(const std::string & text) const {
    const auto * token = match(text, 0, text.size());
    return token && token->first == text;
}

std::vector<llama_token> dsv4_prompt_tokenizer::tokenize(const std::vector<dsv4_prompt_part> & parts) const {
    std::string text;
    std::vector<std::pair<size_t, size_t>> spans; // [begin, end) of the template's text
    for (const auto & part : parts) {
        const size_t begin = text.size();
        text += part.text;
        if (part.is_input || part.text.empty()) {
            continue;
        }
        // an empty message between two template parts does not keep them apart
        if (!spans.empty() && spans.back().second == begin) {
            spans.back().second = text.size();
        } else {
            spans.push_back({ begin, text.size() });
        }
    }

    std::vector<llama_token> tokens;
    size_t plain = 0; // where the text that belongs to no named token begins

    auto flush = [&](size_t end) {
        if (end > plain) {
            const auto ids = vocab->tokenize(text.substr(plain, end - plain), false, false, false);
            tokens.insert(tokens.end(), ids.begin(), ids.end());
        }
    };

    for (const auto & span : spans) {
        for (size_t pos = span.first; pos < span.second;) {
            const auto * token = match(text, pos, span.second);
            if (!token) {
                pos++;
                continue;
            }
            flush(pos);
            tokens.push_back(token->second);
            pos += token->first.size();
            plain = pos;
        }
    }
    flush(text.size());

    return tokens;
}
