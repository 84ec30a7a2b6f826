// Token ids of a chat prompt whose parts are known to be the template's own text or message text.
//
// Called by native/capi/prompt-parts.cpp. Needs the vocabulary only; how the parts come about (templates, messages) is
// upstream's common/chat.cpp.
#pragma once

#include "llama.h"

#include <array>
#include <string>
#include <utility>
#include <vector>

struct dsv4_prompt_part {
    std::string text;
    bool        is_input; // message text: no token that has a name of its own may come out of it
};

// Finds the named tokens (control, user-defined and unknown tokens, all that upstream cuts out of a text before byte
// pair encoding) in the template's text only. Everything between two of them is encoded in one piece, across the
// borders of parts: "\n\n" of the template and the message after it merge as they do in the reference tokeniser.
// A named token that would begin or end in message text is not one, so the ids equal those of the whole text
// tokenised with special tokens whenever no message contains the text of one.
class dsv4_prompt_tokenizer {
  public:
    // vocab must outlive this object and must not be of type LLAMA_VOCAB_TYPE_NONE
    explicit dsv4_prompt_tokenizer(const llama_vocab * vocab);

    // throws what the vocabulary throws on text that is not UTF-8
    std::vector<llama_token> tokenize(const std::vector<dsv4_prompt_part> & parts) const;

    // Whether the vocabulary has a named token with exactly this text.
    bool has(const std::string & text) const;

  private:
    using named_token = std::pair<std::string, llama_token>;

    const named_token * match(const std::string & text, size_t pos, size_t end) const;

    const llama_vocab * vocab;
    std::array<std::vector<named_token>, 256> named; // by first byte, longest first
};
