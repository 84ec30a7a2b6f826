#include "dsv4-server.h"

#include "answers.h"
#include "dsv4-template.h"
#include "nesting.h"
#include "prompt-messages.h"
#include "prompt-parts.h"

#include "chat.h"
#include "json.h"

#include <atomic>
#include <climits>
#include <stdexcept>

void dsv4_server_check_body(const std::string & body) {
    if (pyl_json_nesting(body.data(), body.size()) > PYL_N_NESTED_MAX) {
        throw std::invalid_argument(
                "the request is nested deeper than " + std::to_string(PYL_N_NESTED_MAX) + " levels");
    }
}

// --- prompts ---

static dsv4_answers & answers() {
    static dsv4_answers instance;
    return instance;
}

static bool is_extended(const common_chat_templates * templates) {
    return dsv4_is_extended_template(common_chat_templates_source(templates));
}

void dsv4_server_chat_inputs(const common_json & body, const common_chat_templates * templates,
        common_chat_templates_inputs & inputs) {
    for (const char * name : { "messages", "tools", "bos_token", "eos_token" }) {
        if (inputs.chat_template_kwargs.count(name)) {
            throw std::invalid_argument(std::string("'chat_template_kwargs' may not set '") + name + "'");
        }
    }
    if (!inputs.tools.empty()) {
        // upstream's own tool type keeps three members and their order; the prompt shows the schema as given
        inputs.chat_template_kwargs["tools"] = body.at("tools").dump();
    }
    const auto developer = inputs.chat_template_kwargs.find("developer_turns");
    const bool is_turn   = developer != inputs.chat_template_kwargs.end() && developer->second == "true";
    try {
        pyl_add_roles(body.at("messages"), is_extended(templates), is_turn, inputs);
    } catch (const pyl_no_such_role & err) {
        throw std::invalid_argument(err.what());
    }
    pyl_expect_task(inputs);
}

void dsv4_server_chat_prompt(const common_chat_templates * templates, const common_chat_templates_inputs & inputs,
        common_chat_params & params, common_json & data) {
    pyl_set_header(is_extended(templates), inputs, params);
    common_json parts = common_json::array();
    for (const auto & part : pyl_prompt_parts(params)) {
        parts.push_back({ { "text", part.text }, { "is_input", part.is_input } });
    }
    data["prompt_parts"]   = parts;
    data["prompt_answers"] = answers().find(inputs.messages);
    data["return_tokens"]  = true; // the server keeps them; answers to chats have no place for them
}

void dsv4_server_keep_answer(const std::string & text, const std::vector<llama_token> & ids,
        const common_chat_parser_params & parser) {
    if (!ids.empty() && !parser.generation_prompt.empty()) {
        answers().keep(text, ids, parser);
    }
}

std::vector<llama_token> dsv4_server_prompt_tokens(const llama_vocab * vocab, const common_json & data) {
    std::vector<dsv4_prompt_part> parts;
    for (const auto & part : data.at("prompt_parts")) {
        parts.push_back({ part.at("text").get<std::string>(), part.at("is_input").get<bool>() });
    }
    // made anew for each request: a server that sleeps loads its model, and with it the vocabulary, again
    const dsv4_prompt_tokenizer tokenizer(vocab);
    return dsv4_put_back(vocab, tokenizer, pyl_prompt_tokens(vocab, tokenizer, parts), data.at("prompt_answers"));
}

// --- errors ---

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

static int status_of(const common_json & error) {
    return error.contains("code") && error.at("code").is_number() ? error.at("code").get<int>() : 500;
}

static std::string message_of(const common_json & error) {
    return error.contains("message") ? error.at("message").get<std::string>() : "unknown error";
}

common_json dsv4_server_anthropic_error(const common_json & error) {
    return common_json {
        {"type",  "error"},
        {"error", common_json {{"type", anthropic_type(status_of(error))}, {"message", message_of(error)}}},
    };
}

// Source: OpenAI's API reference, "Streaming events", error.
common_json dsv4_server_responses_error(const common_json & error) {
    return common_json {
        {"event", "error"},
        {"data",  common_json {
            {"type",            "error"},
            {"code",            status_of(error) < 500 ? "invalid_prompt" : "server_error"},
            {"message",         message_of(error)},
            {"param",           nullptr},
            {"sequence_number", 0},
        }},
    };
}

// What the HTTP library refuses by itself.
static const char * status_text(int status) {
    switch (status) {
        case 400: return "this is no HTTP request that can be read";
        case 413: return "the request is larger than the server takes";
        case 414: return "the address is longer than the server takes";
        case 431: return "the headers are longer than the server takes";
        default:  return "the request failed";
    }
}

const char * dsv4_server_error_body(const std::string & path, int status, std::string & body) {
    const char * type = "application/json; charset=utf-8";
    const bool   is_anthropic = path.compare(0, 12, "/v1/messages") == 0;
    if (body.empty()) {
        const common_json error = common_json {
            {"code",    status},
            {"message", status_text(status)},
            {"type",    status < 500 ? "invalid_request_error" : "server_error"},
        };
        body = (is_anthropic ? dsv4_server_anthropic_error(error) : common_json {{"error", error}}).dump();
        return type;
    }
    if (!is_anthropic) {
        return type;
    }
    common_json error = common_json {{"code", status}, {"message", "the request failed"}};
    try {
        const common_json given = common_json::parse(body);
        if (given.contains("type")) {
            return type; // it is already
        }
        error = common_json {{"code", status}, {"message", given.at("error").at("message").get<std::string>()}};
    } catch (const std::exception &) {
    }
    body = dsv4_server_anthropic_error(error).dump();
    return type;
}

// --- requests at once ---

static std::atomic<int> g_n_requests { 0 };
static std::atomic<int> g_n_requests_max { INT_MAX };

void dsv4_server_set_requests_max(int n) {
    g_n_requests_max = n;
}

dsv4_server_ticket::~dsv4_server_ticket() {
    if (is_taken) {
        --g_n_requests;
    }
}

std::string dsv4_server_ticket::take() {
    const int n_max = g_n_requests_max;
    if (++g_n_requests <= n_max) {
        is_taken = true;
        return "";
    }
    --g_n_requests;
    return "the server is busy: it has " + std::to_string(n_max) + " requests already; try again";
}
