#include "answers.h"

#include "prompt-tokens.h"

#include "chat.h"
#include "json.h"

#include <algorithm>

using tokens = std::vector<llama_token>;

struct dsv4_answers::raw_answer {
    std::string               text;
    tokens                    ids;
    common_chat_parser_params parser;
};

dsv4_answers::dsv4_answers() = default;
dsv4_answers::~dsv4_answers() = default;

// --- what a message says ---

// JSON with the members of objects in order: clients may read and write arguments again
static std::string canonical(const common_json & value) {
    if (value.is_object()) {
        std::map<std::string, std::string> members;
        for (const auto & [key, member] : value.items()) {
            members[key] = canonical(member);
        }
        std::string out = "{";
        for (const auto & [key, text] : members) {
            out += common_json(key).dump() + ":" + text + ",";
        }
        return out + "}";
    }
    if (value.is_array()) {
        std::string out = "[";
        for (const auto & member : value) {
            out += canonical(member) + ",";
        }
        return out + "]";
    }
    return value.dump();
}

// Without reasoning; "" if it says nothing, or if its arguments are no JSON.
static std::string visible_key(const common_chat_msg & msg) {
    const std::string content = msg.render_content("");
    if (content.empty() && msg.tool_calls.empty()) {
        return "";
    }
    std::string key = common_json(content).dump();
    for (const auto & call : msg.tool_calls) {
        const auto arguments = common_json::parse_no_throw(call.arguments);
        if (arguments.is_discarded()) {
            return "";
        }
        key += common_json(call.name).dump() + canonical(arguments);
    }
    return key;
}

static std::string full_key(const std::string & visible, const common_chat_msg & msg) {
    return visible + "\n" + msg.reasoning_content; // JSON text has no line break
}

// --- remembering ---

void dsv4_answers::keep(const std::string & text, const tokens & ids, const common_chat_parser_params & parser) {
    std::lock_guard<std::mutex> lock(mutex);
    unread.push_back({ text, ids, parser });
    if (unread.size() > N_ANSWERS_MAX) {
        unread.pop_front();
    }
}

void dsv4_answers::put(const std::string & key, const dsv4_answer & answer) {
    if (answers.count(key)) {
        order.erase(std::find(order.begin(), order.end(), key));
    }
    answers[key] = answer;
    order.push_back(key);
    if (order.size() > 2 * N_ANSWERS_MAX) { // each has two keys
        answers.erase(order.front());
        order.pop_front();
    }
}

static bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

void dsv4_answers::read(const raw_answer & raw) {
    common_chat_msg msg;
    try {
        msg = common_chat_parse(raw.text, false, raw.parser);
    } catch (const std::exception &) {
        return; // the client got it in other words
    }
    const std::string visible = visible_key(msg);
    if (visible.empty()) {
        return;
    }
    const dsv4_answer answer = { raw.ids, ends_with(raw.parser.generation_prompt, "<think>") };
    put(visible, answer);
    put(full_key(visible, msg), answer);
}

// --- finding ---

static common_json answer_json(const std::map<std::string, dsv4_answer> & answers, const std::string & key) {
    const auto it = answers.find(key);
    if (key.empty() || it == answers.end()) {
        return nullptr;
    }
    return common_json {{"ids", it->second.ids}, {"has_reasoning", it->second.has_reasoning}};
}

common_json dsv4_answers::find(const std::vector<common_chat_msg> & messages) {
    common_json found = common_json::array();
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < messages.size(); i++) {
        const auto & msg = messages[i];
        if (msg.role != "assistant") {
            continue;
        }
        for (; !unread.empty(); unread.pop_front()) {
            read(unread.front());
        }
        const std::string visible = visible_key(msg);
        found.push_back(common_json {
            {"visible",           answer_json(answers, visible)},
            {"full",              answer_json(answers, visible.empty() ? "" : full_key(visible, msg))},
            {"is_after_reminder", i > 0 && messages[i - 1].role == "latest_reminder"},
        });
    }
    return found;
}

// --- putting back ---

namespace {

// Ids of the tokens that enclose an answer; LLAMA_TOKEN_NULL for those that the vocabulary has not.
struct marks {
    llama_token end, think, think_end, reminder;
    tokens      tasks;

    marks(const llama_vocab * vocab, const dsv4_prompt_tokenizer & tokenizer) : end(llama_vocab_eos(vocab)) {
        const auto id = [&](const std::string & text) {
            const tokens ids = tokenizer.tokenize({ { text, false } });
            return ids.size() == 1 ? ids[0] : LLAMA_TOKEN_NULL;
        };
        think     = id("<think>");
        think_end = id("</think>");
        reminder  = id("<｜latest_reminder｜>");
        for (const char * name : { "action", "query", "authority", "domain", "title", "read_url" }) {
            if (const llama_token task = id("<｜" + std::string(name) + "｜>"); task != LLAMA_TOKEN_NULL) {
                tasks.push_back(task);
            }
        }
    }
};

// index of the last of these ids in [0, n) of the span; -1 if there is none
int last(const tokens & span, size_t n, const tokens & wanted) {
    for (int i = int(n) - 1; i >= 0; i--) {
        if (std::find(wanted.begin(), wanted.end(), span[i]) != wanted.end()) {
            return i;
        }
    }
    return -1;
}

// The parts of a remembered answer. False if there is none, or if it did not come to the end of its reasoning.
bool take(const common_json & answer, const marks & marks, tokens & reasoning, tokens & visible) {
    if (answer.is_null()) {
        return false;
    }
    tokens ids = answer.at("ids").get<tokens>();
    ids.erase(std::find(ids.begin(), ids.end(), marks.end), ids.end());
    auto begin = ids.begin();
    if (answer.at("has_reasoning").get<bool>()) {
        begin = std::find(ids.begin(), ids.end(), marks.think_end);
        if (begin == ids.end()) {
            return false;
        }
        ++begin;
    }
    reasoning.assign(ids.begin(), begin);
    visible.assign(begin, ids.end());
    return true;
}

tokens join(const tokens & span, int n, const tokens & reasoning, const tokens & visible) {
    tokens out(span.begin(), span.begin() + n);
    out.insert(out.end(), reasoning.begin(), reasoning.end());
    out.insert(out.end(), visible.begin(), visible.end());
    return out;
}

// span: from the end of an answer to that of the next one, which found is about
tokens replaced(const tokens & span, const marks & marks, const common_json & found) {
    const int at_end  = last(span, span.size(), { marks.think_end });
    const int at_task = last(span, span.size(), marks.tasks);
    if (std::max(at_end, at_task) < 0) {
        return span;
    }
    tokens reasoning, visible;
    if (at_task < at_end) {
        const int at_think = last(span, at_end, { marks.think });
        // in a kept reasoning nothing stands between its marks but itself
        if (at_think >= 0 && !found.at("is_after_reminder").get<bool>() &&
                take(found.at("full"), marks, reasoning, visible) && !reasoning.empty()) {
            return join(span, at_think + 1, reasoning, visible);
        }
        if (last(span, span.size(), { marks.reminder }) > at_end) {
            return span; // the reminder's text has no end mark
        }
    }
    return take(found.at("visible"), marks, reasoning, visible) ? join(span, std::max(at_end, at_task) + 1, {}, visible)
                                                                : span;
}

} // namespace

tokens dsv4_put_back(const llama_vocab * vocab, const dsv4_prompt_tokenizer & tokenizer, const tokens & ids,
        const common_json & found) {
    const marks marks(vocab, tokenizer);
    if (found.empty() || size_t(std::count(ids.begin(), ids.end(), marks.end)) != found.size()) {
        return ids; // nothing to put back, or a format in which answers have other ends
    }
    tokens out;
    auto begin = ids.begin();
    for (size_t i = 0; i < found.size(); i++) {
        const auto end = std::find(begin + (i > 0), ids.end(), marks.end);
        const tokens span = replaced(tokens(begin, end), marks, found.at(i));
        out.insert(out.end(), span.begin(), span.end());
        begin = end;
    }
    out.insert(out.end(), begin, ids.end());
    return out;
}
