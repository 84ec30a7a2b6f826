#include "pyl-chat.h"

#include "error.h"
#include "prompt-tokens.h"

#include "chat.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"

#include <climits>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

using json = common_json;

namespace {

// Upstream's JSON and template code recurses over nested values; a deeper one could use up the stack.
constexpr int N_NESTED_MAX = 256;

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

int nesting(const std::string & text) {
    int  depth     = 0;
    int  deepest   = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (in_string) {
            if (c == '\\') {
                i++;
            } else if (c == '"') {
                in_string = false;
            }
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            deepest = std::max(deepest, ++depth);
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return deepest;
}

json parse_json(const std::string & text, const char * what) {
    if (nesting(text) > N_NESTED_MAX) {
        throw bad_request(std::string(what) + ": JSON nested deeper than " + std::to_string(N_NESTED_MAX) + " levels");
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

    explicit request(const std::string & text) {
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
            } catch (const std::exception & err) {
                throw bad_request("request: '" + key + "': " + err.what());
            }
        }
    }

  private:
    void set(const std::string & key, const json & value) {
        if (key == "messages") {
            inputs.messages = common_chat_msgs_parse_oaicompat(value);
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

std::vector<dsv4_prompt_part> prompt_parts(const common_chat_params & params) {
    std::vector<dsv4_prompt_part> parts;
    std::string text;
    for (const auto & part : params.prompt_parts.parts) {
        if (!part.val.empty()) {
            parts.push_back({ part.val, part.is_input });
            text += part.val;
        }
    }
    // some handlers of foreign templates rewrite the prompt after rendering. Cutting off BOS or EOS, which upstream
    // does for a vocabulary that adds them itself, leaves a piece of the text.
    if (text.find(params.prompt) == std::string::npos) {
        throw std::runtime_error("the handler of this template changes the rendered prompt, "
                                 "so message text cannot be told from template text");
    }
    return parts;
}

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
    return json{
        { "format",            (int32_t) params.format           },
        { "reasoning_format",  (int32_t) inputs.reasoning_format },
        { "generation_prompt", params.generation_prompt          },
        { "parser",            params.parser                     },
    };
}

} // namespace

struct pyl_chat {
    const llama_vocab *       vocab;
    common_chat_templates_ptr templates;
    dsv4_prompt_tokenizer     tokenizer;
};

struct pyl_chat_parser {
    common_chat_parser_params params;
    std::string               text; // all of the answer so far
    common_chat_msg           said; // what the deltas so far add up to
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
        // for the message: common_chat_templates_init rethrows without it
        jinja::lexer lexer;
        const auto lexed = lexer.tokenize(source);
        jinja::parse_from_tokens(lexed);

        chat = new pyl_chat{ vocab, common_chat_templates_init(model, source), dsv4_prompt_tokenizer(vocab) };
    });
    return chat;
}

void pyl_chat_free(struct pyl_chat * chat) {
    delete chat;
}

int32_t pyl_chat_format(const struct pyl_chat * chat, const char * request_json, char ** out) {
    *out = nullptr;
    return guard_request([&] {
        const request req(request_json);
        const auto params = common_chat_templates_apply(chat->templates.get(), req.inputs);
        const auto parts  = prompt_parts(params);

        auto tokens = chat->tokenizer.tokenize(parts);
        const llama_token bos = llama_vocab_bos(chat->vocab);
        if (llama_vocab_get_add_bos(chat->vocab) && (tokens.empty() || tokens[0] != bos)) {
            tokens.insert(tokens.begin(), bos); // a template that leaves BOS to the tokeniser
        }

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
        set_out(out, json{
            { "tokens",            tokens                         },
            { "parts",             j_parts                        },
            { "parser",            parser_state(params, req.inputs) },
            { "grammar",           params.grammar                 },
            { "grammar_lazy",      params.grammar_lazy            },
            { "grammar_triggers",  j_triggers                     },
            { "preserved_tokens",  preserved                      },
            { "stops",             params.additional_stops        },
            { "supports_thinking", params.supports_thinking       },
        });
    });
}

// --- parser ---

namespace {

bool try_parse(const pyl_chat_parser & parser, bool is_partial, common_chat_msg & out) {
    try {
        out = common_chat_parse(parser.text, is_partial, parser.params);
        return true;
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &) {
        return false;
    }
}

// Append to `said` what `now` has more; nothing when it is not a continuation (upstream may see the end of a text
// differently once more of it is there, and what has been said cannot be taken back).
std::string grow(std::string & said, const std::string & now) {
    if (now.size() <= said.size() || now.compare(0, said.size(), said) != 0) {
        return "";
    }
    std::string delta = now.substr(said.size());
    said = now;
    return delta;
}

json message_deltas(common_chat_msg & said, const common_chat_msg & now) {
    json deltas = json::object();
    const auto reasoning = grow(said.reasoning_content, now.reasoning_content);
    if (!reasoning.empty()) {
        deltas["reasoning_content"] = reasoning;
    }
    const auto content = grow(said.content, now.content);
    if (!content.empty()) {
        deltas["content"] = content;
    }
    json calls = json::array();
    for (size_t i = 0; i < now.tool_calls.size(); i++) {
        const bool is_new = i == said.tool_calls.size();
        if (is_new) {
            said.tool_calls.push_back({ now.tool_calls[i].name, "", "" });
        }
        const auto arguments = grow(said.tool_calls[i].arguments, now.tool_calls[i].arguments);
        if (is_new) {
            calls.push_back({ { "index", i }, { "name", now.tool_calls[i].name }, { "arguments", arguments } });
        } else if (!arguments.empty()) {
            calls.push_back({ { "index", i }, { "arguments", arguments } });
        }
    }
    if (!calls.empty()) {
        deltas["tool_calls"] = calls;
    }
    return deltas;
}

bool is_same(const common_chat_msg & a, const common_chat_msg & b) {
    if (a.content != b.content || a.reasoning_content != b.reasoning_content ||
        a.tool_calls.size() != b.tool_calls.size()) {
        return false;
    }
    for (size_t i = 0; i < a.tool_calls.size(); i++) {
        if (a.tool_calls[i].name != b.tool_calls[i].name || a.tool_calls[i].arguments != b.tool_calls[i].arguments) {
            return false;
        }
    }
    return true;
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

struct pyl_chat_parser * pyl_chat_parser_init(const char * state) {
    pyl_chat_parser * parser = nullptr;
    guard_request([&] {
        const json body = parse_json(state, "parser state");
        common_chat_parser_params params;
        try {
            params.format            = (common_chat_format) body.at("format").get<int32_t>();
            params.reasoning_format  = (common_reasoning_format) body.at("reasoning_format").get<int32_t>();
            params.generation_prompt = body.at("generation_prompt").get<std::string>();
            const auto arena = body.at("parser").get<std::string>();
            if (!arena.empty()) {
                params.parser.load(arena);
            }
        } catch (const common_json_error & err) {
            throw bad_request(std::string("parser state: ") + err.what());
        }
        parser = new pyl_chat_parser{ std::move(params), "", {} };
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
        parser->text.append(text, n_bytes);

        // text that does not follow the format stays so, whatever comes; what can be read of it stays said
        common_chat_msg now = parser->said;
        bool complete = try_parse(*parser, !is_final, now);
        if (is_final && !complete) {
            try_parse(*parser, true, now);
        }
        json answer = { { "deltas", message_deltas(parser->said, now) } };
        if (is_final) {
            answer["message"]  = message_json(parser->said);
            answer["complete"] = complete && is_same(parser->said, now);
        }
        set_out(out, answer);
    });
}

void pyl_string_free(char * text) {
    free(text);
}
