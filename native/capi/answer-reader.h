// Reads a generated answer as it comes: content, reasoning and tool calls, without a piece of markup in any of them.
//
// Owns what a stream needs on top of upstream's parser, which reads a whole text: pieces of any size give the same
// result, time is linear in the length of the answer, and what does not follow the format does no harm. The format
// itself is the parser's, which upstream builds from the template. Internal to native/capi.
#pragma once

#include "chat.h"

#include <string>
#include <vector>

struct pyl_answer_delta {
    struct call {
        size_t      index;
        bool        is_new;
        std::string name;      // of a new call
        std::string arguments; // JSON text, appended to what came before
    };

    std::string       content;
    std::string       reasoning_content;
    std::vector<call> calls;

    void append(const pyl_answer_delta & next);
};

class pyl_answer_reader {
  public:
    // is_text: content and reasoning are free text between the markers of DeepSeek's format. Otherwise, as with
    // answers that must be JSON, long stretches come in larger deltas.
    pyl_answer_reader(common_chat_parser_params params, bool is_text);

    // Whole UTF-8 characters. Text that may be the beginning of markup is held back.
    pyl_answer_delta push(const std::string & piece);

    // The end of the answer: gives what was held back. `complete`: the answer follows the format.
    pyl_answer_delta finish(bool & complete);

    // The sum of all deltas.
    const common_chat_msg & message() const { return total; }

  private:
    bool read(const std::string & upto, common_peg_parse_flags flags, common_chat_msg & out) const;
    bool read_whole(common_chat_msg & out) const;
    void read_on(common_chat_msg & out);
    void cut_text();

    pyl_answer_delta say(const common_chat_msg & now);

    common_chat_parser_params params;
    bool                      is_text;

    std::string     text;              // the answer so far; a letter stands for stretches that were cut out
    common_chat_msg said;              // what has been said of `text`
    common_chat_msg total;             // what has been said of the answer
    size_t          n_read    = 0;     // bytes of `text` that follow the format
    bool            is_broken = false; // the rest does not, whatever comes
};
