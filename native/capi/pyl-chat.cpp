// Strings in, JSON out, around upstream's chat engine: reads requests, formats prompts, and hands answers to
// answer-reader.

#include "pyl-chat.h"

#include "answer-reader.h"
#include "dsv4-template.h"
#include "error.h"
#include "nesting.h"
#include "prompt-messages.h"
#include "prompt-parts.h"

#include "chat.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

using json = common_json;

namespace {

struct bad_request : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Like pyl_guard, with bad requests told from everything else.
template <typename F>
int32_t guard_request(F && fn) {
    return pyl_guard([&]() -> int32_t {
        try {
            fn();
            return PYL_OK;
        } catch (const bad_request & err) {
            pyl_set_error(err.what());
            return PYL_ERROR_ARGUMENT;
        }
    });
}

void set_out(char ** out, const json & value) {
    const std::string text = value.dump_safe();
    char * copy = static_cast<char *>(malloc(text.size() + 1));
    if (!copy) {
        throw std::bad_alloc();
    }
    memcpy(copy, text.c_str(), text.size() + 1);
    *out = copy;
}

json parse_json(const std::string & text, const char * what) {
    if (pyl_json_nesting(text.data(), text.size()) > PYL_N_NESTED_MAX) {
        throw bad_request(
                std::string(what) + ": JSON nested deeper than " + std::to_string(PYL_N_NESTED_MAX) + " levels");
    }
    try {
        return json::parse(text);
    } catch (const common_json_error & err) {
        throw bad_request(std::string(what) + ": " + err.what());
    }
}

// --- request ---

struct request {
    common_chat_templates_inputs inputs;
    std::string                  tool_name; // the one tool that may be called; the prompt shows all

    // is_extended: the template knows the roles of dsv4-template.h
    request(const std::string & text, bool is_extended) : is_extended(is_extended) {
        const json body = parse_json(text, "request");
        if (!body.is_object()) {
            throw bad_request("request: not a JSON object");
        }
        for (const char * key : { "messages", "add_generation_prompt", "thinking" }) {
            if (!body.contains(key)) {
                throw bad_request("request: '" + std::string(key) + "' is missing");
            }
        }
        inputs.parallel_tool_calls = true;
        // reasoning is told from content in both modes: without thinking the prompt ends with </think>
        inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;

        for (const auto & [key, value] : body.items()) {
            try {
                set(key, value);
            } catch (const bad_request &) {
                throw;
            } catch (const std::bad_alloc &) {
                throw;
            } catch (const pyl_no_such_role &) {
                throw;
            } catch (const std::exception & err) {
                throw bad_request("request: '" + key + "': " + err.what());
            }
        }
        if (!tool_name.empty()) {
            auto & tools = inputs.tools;
            tools.erase(std::remove_if(tools.begin(), tools.end(),
                    [&](const common_chat_tool & tool) { return tool.name != tool_name; }), tools.end());
            if (tools.empty()) {
                throw bad_request("request: 'tool_name' names no tool");
            }
        }
        pyl_expect_task(inputs);
    }

  private:
    bool is_extended;

    void set(const std::string & key, const json & value) {
        if (key == "messages") {
            inputs.messages = common_chat_msgs_parse_oaicompat(value);
            try {
                pyl_add_roles(value, is_extended, true, inputs);
            } catch (const std::invalid_argument & err) {
                throw bad_request(std::string("request: ") + err.what());
            }
            for (const auto & msg : inputs.messages) {
                for (const auto & call : msg.tool_calls) {
                    parse_json(call.arguments, "tool call arguments");
                }
            }
            if (inputs.messages.empty()) {
                throw bad_request("request: 'messages' is empty");
            }
        } else if (key == "add_generation_prompt") {
            inputs.add_generation_prompt = value.get<bool>();
        } else if (key == "thinking") {
            inputs.enable_thinking = value.get<bool>();
        } else if (key == "tools") {
            inputs.tools = common_chat_tools_parse_oaicompat(value);
            if (!inputs.tools.empty()) {
                // upstream's own tool type keeps three members and their order; the prompt shows the schema as given
                inputs.chat_template_kwargs["tools"] = value.dump();
            }
        } else if (key == "tool_choice") {
            inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(value.get<std::string>());
        } else if (key == "tool_name") {
            tool_name = value.get<std::string>();
        } else if (key == "parallel_tool_calls") {
            inputs.parallel_tool_calls = value.get<bool>();
        } else if (key == "json_schema") {
            if (!value.is_object()) {
                throw bad_request("request: 'json_schema' is not an object");
            }
            inputs.json_schema = value.dump();
        } else if (key == "template_kwargs") {
            for (const auto & [name, arg] : value.items()) {
                if (name == "messages" || name == "tools" || name == "bos_token" || name == "eos_token") {
                    throw bad_request("request: 'template_kwargs' may not set '" + name + "'");
                }
                inputs.chat_template_kwargs[name] = arg.dump();
            }
        } else {
            throw bad_request("request: unknown member '" + key + "'");
        }
    }
};

// --- answer ---

const char * trigger_type(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:        return "token";
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:         return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:      return "pattern";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: return "pattern_full";
    }
    return "";
}

json parser_state(const common_chat_params & params, const common_chat_templates_inputs & inputs) {
    const auto & preserved = params.preserved_tokens;
    const bool   is_dsml   = std::find(preserved.begin(), preserved.end(), "｜DSML｜") != preserved.end();
    return json{
        { "format",            (int32_t) params.format               },
        { "generation_prompt", params.generation_prompt              },
        { "is_text",           is_dsml && inputs.json_schema.empty() },
        { "parser",            params.parser                         },
    };
}

json delta_json(const pyl_answer_delta & delta) {
    json out = json::object();
    if (!delta.reasoning_content.empty()) {
        out["reasoning_content"] = delta.reasoning_content;
    }
    if (!delta.content.empty()) {
        out["content"] = delta.content;
    }
    if (!delta.calls.empty()) {
        auto & calls = out["tool_calls"] = json::array();
        for (const auto & call : delta.calls) {
            json piece = { { "index", call.index }, { "arguments", call.arguments } };
            if (call.is_new) {
                piece["name"] = call.name;
            }
            calls.push_back(piece);
        }
    }
    return out;
}

json message_json(const common_chat_msg & msg) {
    json calls = json::array();
    for (const auto & call : msg.tool_calls) {
        calls.push_back({ { "name", call.name }, { "arguments", call.arguments } });
    }
    return json{
        { "content",           msg.content           },
        { "reasoning_content", msg.reasoning_content },
        { "tool_calls",        calls                 },
    };
}

} // namespace

struct pyl_chat {
    const llama_vocab *       vocab;
    common_chat_templates_ptr templates;
    dsv4_prompt_tokenizer     tokenizer;
    bool                      is_extended; // the template knows the roles of dsv4-template.h
};

struct pyl_chat_parser {
    pyl_answer_reader reader;
};

struct pyl_chat * pyl_chat_init(const struct llama_model * model, const char * template_text) {
    pyl_chat * chat = nullptr;
    guard_request([&] {
        const llama_vocab * vocab = llama_model_get_vocab(model);
        if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) { // upstream's tokeniser asserts
            throw bad_request("the file has no vocabulary");
        }
        const char * source = template_text ? template_text : llama_model_chat_template(model, nullptr);
        if (!source || !*source) {
            throw bad_request(template_text ? "the chat template is empty" : "the file has no chat template");
        }
        const std::string extended = dsv4_extend_template(source);
        // for the message: common_chat_templates_init rethrows without it
        jinja::lexer lexer;
        const auto lexed = lexer.tokenize(extended);
        jinja::parse_from_tokens(lexed);

        chat = new pyl_chat{ vocab, common_chat_templates_init(model, extended), dsv4_prompt_tokenizer(vocab),
            dsv4_is_extended_template(extended) };
    });
    return chat;
}

void pyl_chat_free(struct pyl_chat * chat) {
    delete chat;
}

int32_t pyl_chat_format(const struct pyl_chat * chat, const char * request_json, char ** out) {
    *out = nullptr;
    return guard_request([&] {
        const request req(request_json, chat->is_extended);
        auto params = common_chat_templates_apply(chat->templates.get(), req.inputs);
        pyl_set_header(chat->is_extended, req.inputs, params);
        const auto parts  = pyl_prompt_parts(params);
        const auto tokens = pyl_prompt_tokens(chat->vocab, chat->tokenizer, parts);

        json j_parts = json::array();
        for (const auto & part : parts) {
            j_parts.push_back({ { "text", part.text }, { "is_input", part.is_input } });
        }
        json j_triggers = json::array();
        for (const auto & trigger : params.grammar_triggers) {
            j_triggers.push_back({ { "type", trigger_type(trigger.type) }, { "value", trigger.value } });
        }
        std::vector<llama_token> preserved;
        for (const auto & text : params.preserved_tokens) {
            const auto ids = chat->tokenizer.tokenize({ { text, false } });
            if (ids.size() == 1) {
                preserved.push_back(ids[0]);
            }
        }
        const auto generation = chat->tokenizer.tokenize({ { params.generation_prompt, false } });
        set_out(out, json{
            { "tokens",            tokens                         },
            { "parts",             j_parts                        },
            { "parser",            parser_state(params, req.inputs) },
            { "grammar",           params.grammar                 },
            { "grammar_lazy",      params.grammar_lazy            },
            { "generation_tokens", generation                     },
            { "grammar_triggers",  j_triggers                     },
            { "preserved_tokens",  preserved                      },
            { "stops",             params.additional_stops        },
            { "supports_thinking", params.supports_thinking       },
        });
    });
}

// --- parser ---

struct pyl_chat_parser * pyl_chat_parser_init(const char * state) {
    pyl_chat_parser * parser = nullptr;
    guard_request([&] {
        const json body = parse_json(state, "parser state");
        common_chat_parser_params params;
        bool is_text = false;
        try {
            params.format            = (common_chat_format) body.at("format").get<int32_t>();
            params.generation_prompt = body.at("generation_prompt").get<std::string>();
            is_text                  = body.at("is_text").get<bool>();
            params.parser.load(body.at("parser").get<std::string>());
        } catch (const common_json_error & err) {
            throw bad_request(std::string("parser state: ") + err.what());
        }
        if (params.format != COMMON_CHAT_FORMAT_PEG_NATIVE) {
            throw bad_request(std::string("parser state: answers in the format '") +
                              common_chat_format_name(params.format) + "' cannot be read");
        }
        parser = new pyl_chat_parser{ pyl_answer_reader(std::move(params), is_text) };
    });
    return parser;
}

void pyl_chat_parser_free(struct pyl_chat_parser * parser) {
    delete parser;
}

int32_t pyl_chat_parser_push(
        struct pyl_chat_parser * parser, const char * text, int32_t n_bytes, bool is_final, char ** out) {
    *out = nullptr;
    return guard_request([&] {
        auto & reader = parser->reader;
        pyl_answer_delta delta = reader.push(std::string(text, n_bytes));
        if (!is_final) {
            set_out(out, json{ { "deltas", delta_json(delta) } });
            return;
        }
        bool complete = false;
        delta.append(reader.finish(complete));
        set_out(out, json{
            { "deltas",   delta_json(delta)              },
            { "message",  message_json(reader.message()) },
            { "complete", complete                       },
        });
    });
}

void pyl_string_free(char * text) {
    free(text);
}
