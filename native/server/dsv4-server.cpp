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
    size_t i = 0;
    for (const auto & message : body.at("messages")) {
        if (message.is_object() && message.contains("task")) {
            throw std::invalid_argument("messages[" + std::to_string(i) + "].task: the server has no quick tasks; "
                                        "Llama.create_chat_completion has");
        }
        i++;
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

// Source: Anthropic's API reference, "Errors".
static const char * anthropic_type(int status) {
    switch (status) {
        case 401: return "authentication_error";
        case 403: return "permission_error";
        case 404: return "not_found_error";
        case 413: return "request_too_large";
        case 429: return "rate_limit_error";
        case 503: return "overloaded_error";
        default:  return status < 500 ? "invalid_request_error" : "api_error";
    }
}

common_json dsv4_server_anthropic_error(const common_json & error) {
    const int status = error.contains("code") ? error.at("code").get<int>() : 500;
    const std::string message = error.contains("message") ? error.at("message").get<std::string>() : "unknown error";
    return common_json {
        {"type",  "error"},
        {"error", common_json {{"type", anthropic_type(status)}, {"message", message}}},
    };
}

void dsv4_server_error_body(const std::string & path, int status, std::string & body) {
    if (path.compare(0, 12, "/v1/messages") != 0) {
        return;
    }
    common_json error = common_json {{"code", status}, {"message", "the request failed"}};
    try {
        const common_json given = common_json::parse(body);
        if (given.contains("type")) {
            return; // it is already
        }
        error = common_json {{"code", status}, {"message", given.at("error").at("message").get<std::string>()}};
    } catch (const std::exception &) {
    }
    body = dsv4_server_anthropic_error(error).dump();
}
