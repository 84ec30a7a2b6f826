// From a formatted chat to its token ids: which part of the rendered prompt is message text, and the BOS in front.
//
// Called by pyl-chat.cpp for Python and by native/server for the server, so that both evaluate the same ids.

#pragma once

#include "prompt-tokens.h"

struct common_chat_params;

// Throws when the handler of a template changes the prompt after rendering it.
std::vector<dsv4_prompt_part> pyl_prompt_parts(const common_chat_params & params);

// The ids of the parts, after BOS where the vocabulary asks for one and the template has none.
std::vector<llama_token> pyl_prompt_tokens(const llama_vocab * vocab, const dsv4_prompt_tokenizer & tokenizer,
        const std::vector<dsv4_prompt_part> & parts);
