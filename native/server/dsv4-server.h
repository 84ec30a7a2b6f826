// What upstream's server asks of us. Each function is called by one hook of patches/server-*.patch.

#pragma once

#include "llama.h"

#include <string>
#include <vector>

class common_json;
struct common_chat_params;
struct common_chat_parser_params;
struct common_chat_templates;
struct common_chat_templates_inputs;

// Before a request is read: refuses JSON that is nested so deeply that walking it would overflow the stack.
// Throws std::invalid_argument, which the client gets as an error 400.
void dsv4_server_check_body(const std::string & body);

// Before the template is applied: tools are shown to the model as the client sent them, quick tasks are added, and the
// client cannot replace what the template gets from the request or the vocabulary. Throws std::invalid_argument.
void dsv4_server_chat_inputs(const common_json & body, const common_chat_templates * templates,
        common_chat_templates_inputs & inputs);

// After it: adds to what the request becomes the parts of the prompt and the answers in it that are remembered, and has
// the sampled ids kept.
void dsv4_server_chat_prompt(const common_chat_templates * templates, const common_chat_templates_inputs & inputs,
        common_chat_params & params, common_json & data);

// When an answer has come to its end: remember the ids that were sampled for it.
void dsv4_server_keep_answer(const std::string & text, const std::vector<llama_token> & ids,
        const common_chat_parser_params & parser);

// Token ids of a chat's prompt. data is what the request became, with what dsv4_server_chat_prompt added.
std::vector<llama_token> dsv4_server_prompt_tokens(const llama_vocab * vocab, const common_json & data);

// An error as Anthropic's API has it: {"type": "error", "error": {"type", "message"}}, from one with "code" and "message".
common_json dsv4_server_anthropic_error(const common_json & error);

// The same as an event of OpenAI's responses API: {"event", "data"}.
common_json dsv4_server_responses_error(const common_json & error);

// Before an error is sent: for clients of Anthropic's API in their format, and for all where the HTTP library has written
// none. Returns the body's type.
const char * dsv4_server_error_body(const std::string & path, int status, std::string & body);

// Counts the requests that are being answered or wait for it. Each has one, for as long as its answer lasts.
class dsv4_server_ticket {
  public:
    dsv4_server_ticket() = default;
    ~dsv4_server_ticket();
    dsv4_server_ticket(const dsv4_server_ticket &) = delete;
    dsv4_server_ticket & operator=(const dsv4_server_ticket &) = delete;

    // Count this request from now on. Returns why it is one too many; empty if it is not.
    std::string take();

  private:
    bool is_taken = false;
};

// How many requests there may be at once; the others are refused.
void dsv4_server_set_requests_max(int n);

// From now on llama_server_terminate() ends the server.
void dsv4_server_loaded(void);

// During the load: whether a signal has asked for the end.
bool dsv4_server_is_ending(void);
