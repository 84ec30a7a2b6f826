#include "answer-reader.h"

#include "nesting.h"

#include "chat-peg-parser.h"

namespace {

// The end of a text may be the beginning of markup, and is held back. With this character behind it, it is not: so
// read, a text shows what is held back. U+FFFF is not a character, so no answer ends with it.
const std::string END_MARK = "\xef\xbf\xbf";

bool remove_end_mark(std::string & text) {
    if (!string_ends_with(text, END_MARK)) {
        return false;
    }
    text.resize(text.size() - END_MARK.size());
    return true;
}

// Stands for a stretch of content or reasoning that was cut out; a letter begins no marker.
const std::string CUT = "x";

constexpr size_t N_TEXT_MAX = 512; // bytes of text from which on a stretch is cut out

// Upstream reads a text from its beginning each time. What cannot be cut out is read when it has grown by 1/256.
constexpr size_t GROWTH = 256;

// Whether the JSON value that the text ends in, an argument or the whole answer, is nested so deeply that reading it
// could use up the stack: upstream's parser recurses.
bool is_too_deep(const std::string & text) {
    size_t begin = 0;
    for (const char * before_json : { "string=\"false\">", "```json" }) {
        const size_t pos = text.rfind(before_json);
        if (pos != std::string::npos) {
            begin = std::max(begin, pos + 1);
        }
    }
    return begin > 0 && pyl_json_nesting(text.data() + begin, text.size() - begin) > PYL_N_NESTED_MAX;
}

// Append to `said` what `now` has more, and return it; nothing when `now` does not go on from `said` (what has been
// said cannot be taken back).
std::string grow(std::string & said, const std::string & now) {
    if (now.size() <= said.size() || now.compare(0, said.size(), said) != 0) {
        return "";
    }
    std::string delta = now.substr(said.size());
    said = now;
    return delta;
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

} // namespace

void pyl_answer_delta::append(const pyl_answer_delta & next) {
    content           += next.content;
    reasoning_content += next.reasoning_content;
    calls.insert(calls.end(), next.calls.begin(), next.calls.end());
}

pyl_answer_reader::pyl_answer_reader(common_chat_parser_params params, bool is_text) :
    params(std::move(params)), is_text(is_text) {}

// Upstream's common_chat_parse would not do: it cannot be told that a text is whole, and logs what it cannot read.
bool pyl_answer_reader::read(const std::string & upto, common_peg_parse_flags flags, common_chat_msg & out) const {
    if (is_too_deep(upto)) {
        return false;
    }
    common_peg_parse_context ctx(params.generation_prompt + upto, flags);
    const auto result = params.parser.parse(ctx);
    if (result.fail()) {
        return false;
    }
    out = {};
    common_chat_peg_mapper(out).from_ast(ctx.ast, result);
    return true;
}

// Read all of the text so far; where it stops to follow the format, the longest beginning that does, so that the
// result does not depend on the pieces.
void pyl_answer_reader::read_on(common_chat_msg & out) {
    if (read(text, COMMON_PEG_PARSE_FLAG_LENIENT, out)) {
        n_read = text.size();
        return;
    }
    is_broken = true;
    size_t bad = text.size();
    while (bad - n_read > 1) {
        const size_t n = n_read + (bad - n_read) / 2;
        (read(text.substr(0, n), COMMON_PEG_PARSE_FLAG_LENIENT, out) ? n_read : bad) = n;
    }
    read(text.substr(0, n_read), COMMON_PEG_PARSE_FLAG_LENIENT, out);
}

// Read the text as a whole answer; whether it follows the format. `out` is left as it is when nothing can be read.
bool pyl_answer_reader::read_whole(common_chat_msg & out) const {
    common_chat_msg msg;
    if (read(text + END_MARK, COMMON_PEG_PARSE_FLAG_LENIENT, msg)) {
        const bool ends_in_content = remove_end_mark(msg.content);
        if (ends_in_content || remove_end_mark(msg.reasoning_content)) {
            out = msg;
            return ends_in_content;
        }
    }
    if (read(text, COMMON_PEG_PARSE_FLAG_NONE, out)) {
        return true;
    }
    // the format has nothing behind the calls; a line break there does no harm
    const auto end = text.find_last_not_of(" \n\r\t");
    return end != std::string::npos && read(text.substr(0, end + 1), COMMON_PEG_PARSE_FLAG_NONE, out);
}

// Cut out what has been said of the stretch of content or reasoning that the text ends in. Free text does not change
// how the text behind it is read.
void pyl_answer_reader::cut_text() {
    common_chat_msg msg;
    if (!is_text || text.size() < N_TEXT_MAX || !said.tool_calls.empty() ||
        !read(text + END_MARK, COMMON_PEG_PARSE_FLAG_LENIENT, msg)) {
        return;
    }
    const bool ends_in_content = remove_end_mark(msg.content);
    if (!ends_in_content && !remove_end_mark(msg.reasoning_content)) {
        return;
    }
    const std::string & stretch = ends_in_content ? msg.content  : msg.reasoning_content;
    std::string &       said_of = ends_in_content ? said.content : said.reasoning_content;
    if (said_of.empty() || !string_ends_with(text, stretch) || !string_starts_with(stretch, said_of)) {
        return;
    }
    text    = text.substr(0, text.size() - stretch.size()) + CUT + stretch.substr(said_of.size());
    said_of = CUT;
    n_read  = text.size();
}

pyl_answer_delta pyl_answer_reader::say(const common_chat_msg & now) {
    pyl_answer_delta delta;
    delta.reasoning_content = grow(said.reasoning_content, now.reasoning_content);
    delta.content           = grow(said.content, now.content);
    total.reasoning_content += delta.reasoning_content;
    total.content           += delta.content;
    for (size_t i = 0; i < now.tool_calls.size(); i++) {
        const bool is_new = i == said.tool_calls.size();
        if (is_new) {
            common_chat_tool_call call;
            call.name = now.tool_calls[i].name;
            said.tool_calls.push_back(call);
            total.tool_calls.push_back(call);
        }
        const auto arguments = grow(said.tool_calls[i].arguments, now.tool_calls[i].arguments);
        total.tool_calls[i].arguments += arguments;
        if (is_new || !arguments.empty()) {
            delta.calls.push_back({ i, is_new, is_new ? now.tool_calls[i].name : "", arguments });
        }
    }
    return delta;
}

pyl_answer_delta pyl_answer_reader::push(const std::string & piece) {
    text += piece;
    if (is_broken || (text.size() - n_read) * GROWTH < text.size()) {
        return {};
    }
    common_chat_msg now = said;
    read_on(now);
    const auto delta = say(now);
    if (!is_broken) {
        cut_text();
    }
    return delta;
}

pyl_answer_delta pyl_answer_reader::finish(bool & complete) {
    common_chat_msg now = said;
    if (!is_broken) {
        read_on(now);
    }
    complete = read_whole(now);
    const auto delta = say(now);
    complete = complete && is_same(said, now);
    return delta;
}
