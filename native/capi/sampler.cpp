// Choosing tokens: a grammar, if there is one, in front of upstream's sampler chain; and log-probabilities.
//
// Upstream's grammar asserts where a caller goes wrong and recurses over what it parses; both are checked here first.
// A lazy grammar's trigger words are looked for here and not by upstream, which runs a regular expression over the
// whole answer after every token.

#include "error.h"

#include "json-schema-to-grammar.h"
#include "nesting.h"

#include "llama-grammar.h"
#include "llama-vocab.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

constexpr size_t N_BYTES_MAX = 4 << 20; // of a grammar's text
constexpr int    N_PARENS_MAX = 256;    // upstream's parsers recurse over parentheses
constexpr int    N_RULES_MAX = 20000;   // and over chains of rules
constexpr size_t N_WHY_MAX   = 300;

struct grammar_free {
    void operator()(llama_grammar * grammar) const { llama_grammar_free_impl(grammar); }
};

struct seen_token {
    llama_token id;
    std::string piece;
};

int32_t refuse(const std::string & why) {
    pyl_set_error(why.substr(0, N_WHY_MAX)); // upstream quotes the rest of the grammar
    return PYL_ERROR_ARGUMENT;
}

// Deepest nesting of parentheses, wherever they stand: what is in quotes counts too, and a smile or two does no harm.
int n_parens(const char * text) {
    int depth   = 0;
    int deepest = 0;
    for (const char * c = text; *c; ++c) {
        if (*c == '(') {
            deepest = std::max(deepest, ++depth);
        } else if (*c == ')' && depth > 0) {
            --depth;
        }
    }
    return deepest;
}

const char * why_not_parse(const char * text) {
    if (strlen(text) > N_BYTES_MAX) {
        return "the grammar is longer than 4 MiB";
    }
    if (n_parens(text) > N_PARENS_MAX) {
        return "the grammar nests parentheses deeper than 256 levels";
    }
    int n_rules = 0;
    for (const char * at = text; (at = strstr(at, "::=")); at += 3) {
        ++n_rules;
    }
    return n_rules > N_RULES_MAX ? "the grammar has more than 20000 rules" : nullptr;
}

// Like the parser's parse(), which writes what is wrong to stderr instead of saying it.
llama_grammar * read_grammar(const llama_vocab * vocab, const char * text) {
    llama_grammar_parser parser(vocab);
    const char * pos = text;
    while (*pos && strchr(" \t\r\n#", *pos)) {
        pos += *pos == '#' ? strcspn(pos, "\r\n") : 1;
    }
    while (*pos) {
        pos = parser.parse_rule(pos);
    }
    const auto root = parser.symbol_ids.find("root");
    if (root == parser.symbol_ids.end()) {
        throw std::runtime_error("there is no rule 'root'");
    }
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            throw std::runtime_error("the rule '" + name + "' is used, but not defined");
        }
    }
    auto rules = parser.c_rules();
    llama_grammar * grammar = llama_grammar_init_impl(vocab, rules.data(), rules.size(), root->second);
    if (!grammar) {
        throw std::runtime_error("it is left-recursive");
    }
    return grammar;
}

} // namespace

struct pyl_sampler {
    const llama_vocab *                          vocab = nullptr;
    int32_t                                      n_vocab = 0;
    std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)> chain{ nullptr, llama_sampler_free };
    std::unique_ptr<llama_grammar, grammar_free> grammar;
    std::vector<llama_token_data>                candidates;

    // the grammar waits for the token `start`, then for one of the words
    bool                     is_waiting = false;
    llama_token              start      = -1;
    std::vector<std::string> words;
    std::vector<seen_token>  tail; // the newest tokens, as many as the longest word needs

    bool fill(const float * logits) {
        bool any_finite = false;
        candidates.resize(n_vocab);
        for (int32_t i = 0; i < n_vocab; ++i) {
            if (std::isnan(logits[i])) {
                throw std::invalid_argument("the logits contain NaN");
            }
            any_finite |= std::isfinite(logits[i]);
            candidates[i] = { i, logits[i], 0.0f };
        }
        return any_finite;
    }

    llama_token choose(size_t n) {
        llama_token_data_array array = { candidates.data(), n, -1, false };
        llama_sampler_apply(chain.get(), &array);
        if (array.selected < 0 || array.selected >= int64_t(array.size)) {
            throw std::runtime_error("the sampler chain selected no token");
        }
        return array.data[array.selected].id;
    }

    bool allows(llama_token id) const {
        llama_token_data       one   = { id, 1.0f, 0.0f };
        llama_token_data_array array = { &one, 1, -1, false };
        llama_grammar_apply_impl(*grammar, &array);
        return one.logit != -INFINITY;
    }

    bool is_enforced() const { return grammar && !is_waiting; }

    // Keep what the grammar allows; returns the number of candidates.
    size_t keep_allowed() {
        llama_token_data_array array = { candidates.data(), candidates.size(), -1, false };
        llama_grammar_apply_impl(*grammar, &array);
        const auto end = std::remove_if(candidates.begin(), candidates.end(),
                [](const llama_token_data & c) { return c.logit == -INFINITY; });
        return end - candidates.begin();
    }

    // The end of a text is no text; upstream's accept would abort where it is not allowed, so ask `allows` before.
    void accept_grammar(llama_token id) {
        if (!is_waiting) {
            if (!vocab->is_eog(id)) {
                llama_grammar_accept_impl(*grammar, id);
            }
            return;
        }
        if (start >= 0) {
            if (id == start) {
                start      = -1;
                is_waiting = !words.empty();
            }
            return;
        }
        tail.push_back({ id, vocab->token_to_piece(id) });
        std::string text;
        for (const auto & token : tail) {
            text += token.piece;
        }
        size_t first = std::string::npos;
        size_t longest = 0;
        for (const auto & word : words) {
            first   = std::min(first, text.find(word));
            longest = std::max(longest, word.size());
        }
        if (first == std::string::npos) {
            while (text.size() - tail.front().piece.size() >= longest) {
                text.erase(0, tail.front().piece.size());
                tail.erase(tail.begin());
            }
            return;
        }
        is_waiting = false;
        size_t at = 0;
        for (const auto & token : tail) {
            const size_t end = at + token.piece.size();
            if (end > first) {
                llama_grammar_accept_token(*grammar, token.id, token.piece.substr(at < first ? first - at : 0));
            }
            at = end;
        }
        tail.clear();
    }
};

struct pyl_sampler * pyl_sampler_init(const struct llama_vocab * vocab, int32_t n_vocab) {
    pyl_sampler * sampler = nullptr;
    pyl_guard([&] {
        auto made = std::make_unique<pyl_sampler>();
        made->vocab   = vocab;
        made->n_vocab = n_vocab;
        auto params = llama_sampler_chain_default_params();
        params.no_perf = true;
        made->chain.reset(llama_sampler_chain_init(params));
        sampler = made.release();
        return PYL_OK;
    });
    return sampler;
}

void pyl_sampler_free(struct pyl_sampler * sampler) {
    delete sampler;
}

int32_t pyl_sampler_add(struct pyl_sampler * sampler, struct llama_sampler * stage) {
    if (!stage) {
        return refuse("the engine could not make a stage of the sampler chain");
    }
    return pyl_guard([&] {
        llama_sampler_chain_add(sampler->chain.get(), stage);
        return PYL_OK;
    });
}

int32_t pyl_sampler_set_grammar(struct pyl_sampler * sampler, const char * grammar, const char ** words,
        int32_t n_words, int32_t start) {
    return pyl_guard([&]() -> int32_t {
        if (!sampler->vocab || llama_vocab_type(sampler->vocab) == LLAMA_VOCAB_TYPE_NONE) { // upstream asserts
            return refuse("a grammar needs a vocabulary, and the file has none");
        }
        if (const char * why = why_not_parse(grammar)) {
            return refuse(why);
        }
        try {
            sampler->grammar.reset(read_grammar(sampler->vocab, grammar));
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & err) {
            return refuse(err.what());
        }
        sampler->words.assign(words, words + n_words);
        sampler->is_waiting = n_words > 0 || start >= 0;
        sampler->start      = start;
        return PYL_OK;
    });
}

int32_t pyl_sampler_prefill(struct pyl_sampler * sampler, int32_t token) {
    return pyl_guard([&]() -> int32_t {
        if (sampler->is_enforced()) {
            if (!sampler->allows(token)) {
                return refuse("the grammar does not allow the beginning that the prompt gives it");
            }
            sampler->accept_grammar(token);
        }
        return PYL_OK;
    });
}

void pyl_sampler_accept(struct pyl_sampler * sampler, int32_t token) {
    pyl_guard([&] {
        llama_sampler_accept(sampler->chain.get(), token);
        return PYL_OK;
    });
}

int32_t pyl_sampler_sample(struct pyl_sampler * sampler, const float * logits) {
    return pyl_guard([&]() -> int32_t {
        try {
            if (!sampler->fill(logits)) {
                return refuse("no logit is finite");
            }
            llama_token id = sampler->choose(sampler->candidates.size());
            // Asking for one token is far cheaper than for all; mostly the model wants what the grammar allows.
            if (sampler->is_enforced() && (!std::isfinite(logits[id]) || !sampler->allows(id))) {
                sampler->fill(logits);
                const size_t n = sampler->keep_allowed();
                if (n == 0) {
                    pyl_set_error("the grammar allows no token here");
                    return PYL_ERROR;
                }
                id = sampler->choose(n);
            }
            if (sampler->grammar) {
                sampler->accept_grammar(id);
            }
            llama_sampler_accept(sampler->chain.get(), id);
            return id;
        } catch (const std::invalid_argument & err) {
            return refuse(err.what());
        }
    });
}

int32_t pyl_grammar_of_schema(const char * schema, char ** grammar) {
    return pyl_guard([&]() -> int32_t {
        *grammar = nullptr;
        if (pyl_json_nesting(schema, strlen(schema)) > PYL_N_NESTED_MAX || n_parens(schema) > N_PARENS_MAX) {
            return refuse("the schema is nested deeper than 256 levels");
        }
        std::string text;
        try {
            text = json_schema_to_grammar(common_json::parse(schema), true);
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & err) {
            return refuse(err.what());
        }
        *grammar = strdup(text.c_str());
        return *grammar ? PYL_OK : PYL_ERROR_MEMORY;
    });
}

int32_t pyl_logprobs(const float * logits, int32_t n_vocab, int32_t token, int32_t n_top, float * logprob,
        int32_t * top_ids, float * top_logprobs) {
    return pyl_guard([&]() -> int32_t {
        if (token < 0 || token >= n_vocab || n_top < 0 || n_top > n_vocab) {
            return refuse("token or number of alternatives out of range");
        }
        const float max = *std::max_element(logits, logits + n_vocab);
        double sum = 0;
        for (int32_t i = 0; i < n_vocab; ++i) {
            sum += std::exp(logits[i] - max);
        }
        const double log_sum = max + std::log(sum);
        *logprob = float(logits[token] - log_sum);

        // a heap of the best so far with the worst of them in front; equal logits: the lower id is better
        const auto better = [&](int32_t a, int32_t b) {
            return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
        };
        for (int32_t i = 0; i < n_vocab && n_top > 0; ++i) {
            if (i < n_top) {
                top_ids[i] = i;
                std::push_heap(top_ids, top_ids + i + 1, better);
            } else if (better(i, top_ids[0])) {
                std::pop_heap(top_ids, top_ids + n_top, better);
                top_ids[n_top - 1] = i;
                std::push_heap(top_ids, top_ids + n_top, better);
            }
        }
        std::sort_heap(top_ids, top_ids + n_top, better);
        for (int32_t i = 0; i < n_top; ++i) {
            top_logprobs[i] = float(logits[top_ids[i]] - log_sum);
        }
        return PYL_OK;
    });
}
