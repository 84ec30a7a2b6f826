#include "dsv4-server.h"

#include "nesting.h"
#include "prompt-parts.h"

#include "chat.h"
#include "json.h"

#include <stdexcept>

void dsv4_server_check_body(const std::string & body) {
    if (pyl_json_nesting(body.data(), body.size()) > PYL_N_NESTED_MAX) {
        throw std::invalid_argument(
                "the request is nested deeper than " + std::to_string(PYL_N_NESTED_MAX) + " levels");
    }
}

void dsv4_server_chat_inputs(const common_json & body, common_chat_templates_inputs & inputs) {
    for (const char * name : { "messages", "tools", "bos_token", "eos_token" }) {
        if (inputs.chat_template_kwargs.count(name)) {
            throw std::invalid_argument(std::string("'chat_template_kwargs' may not set '") + name + "'");
        }
    }
    if (!inputs.tools.empty()) {
        // upstream's own tool type keeps three members and their order; the prompt shows the schema as given
        inputs.chat_template_kwargs["tools"] = body.at("tools").dump();
    }
}

common_json dsv4_server_prompt_parts(const common_chat_params & params) {
    common_json out = common_json::array();
    for (const auto & part : pyl_prompt_parts(params)) {
        out.push_back({ { "text", part.text }, { "is_input", part.is_input } });
    }
    return out;
}

std::vector<llama_token> dsv4_server_prompt_tokens(const llama_vocab * vocab, const common_json & data) {
    std::vector<dsv4_prompt_part> parts;
    for (const auto & part : data.at("prompt_parts")) {
        parts.push_back({ part.at("text").get<std::string>(), part.at("is_input").get<bool>() });
    }
    // made anew for each request: a server that sleeps loads its model, and with it the vocabulary, again
    return pyl_prompt_tokens(vocab, dsv4_prompt_tokenizer(vocab), parts);
}
