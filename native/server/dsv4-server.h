// What upstream's server asks of us. Each function is called by one hook of patches/server-*.patch.

#pragma once

#include "llama.h"

#include <string>
#include <vector>

class common_json;
struct common_chat_params;
struct common_chat_templates_inputs;

// Before a request is read: refuses JSON that is nested so deeply that walking it would overflow the stack.
// Throws std::invalid_argument, which the client gets as an error 400.
void dsv4_server_check_body(const std::string & body);

// Before the template is applied: tools are shown to the model as the client sent them, and the client cannot replace
// what the template gets from the request or the vocabulary, nor ask for quick tasks. Throws std::invalid_argument.
void dsv4_server_chat_inputs(const common_json & body, common_chat_templates_inputs & inputs);

// After it: the parts of the prompt as JSON, which travel with the request to the next function.
common_json dsv4_server_prompt_parts(const common_chat_params & params);

// Token ids of a chat's prompt. data is what the request became, with "prompt_parts".
std::vector<llama_token> dsv4_server_prompt_tokens(const llama_vocab * vocab, const common_json & data);

// An error as Anthropic's API has it: {"type": "error", "error": {"type", "message"}}, from one with "code" and "message".
common_json dsv4_server_anthropic_error(const common_json & error);

// Before an error is sent: for clients of Anthropic's API in their format.
void dsv4_server_error_body(const std::string & path, int status, std::string & body);

// From now on llama_server_terminate() ends the server.
void dsv4_server_loaded(void);

// During the load: whether a signal has asked for the end.
bool dsv4_server_is_ending(void);
