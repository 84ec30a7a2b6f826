// The ids that were sampled for an answer, back in the next prompt of its conversation: what pyllama_dsv4/replay.py is for
// the library. Owns the memory of answers and finding their places in a prompt of V4's format.

#pragma once

#include "llama.h"

#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

class common_json;
class dsv4_prompt_tokenizer;
struct common_chat_msg;
struct common_chat_parser_params;

struct dsv4_answer {
    std::vector<llama_token> ids; // sampled; behind the end mark nothing counts
    bool                     has_reasoning = false; // whether it begins with reasoning, up to </think>
};

// Answers by what their messages say, the newest N_ANSWERS_MAX. All functions may be called from any thread.
class dsv4_answers {
  public:
    static constexpr size_t N_ANSWERS_MAX = 256;

    // Remember an answer that came to its end. It is read only when a conversation asks, see find().
    void keep(const std::string & text, const std::vector<llama_token> & ids, const common_chat_parser_params & parser);

    // What is remembered of each answer in a conversation, as JSON: it travels with the request.
    common_json find(const std::vector<common_chat_msg> & messages);

  private:
    struct raw_answer;

    std::mutex                         mutex;
    std::deque<raw_answer>             unread;
    std::map<std::string, dsv4_answer> answers;
    std::deque<std::string>            order; // keys of answers, the oldest first

    void read(const raw_answer & raw);
    void put(const std::string & key, const dsv4_answer & answer);

  public:
    dsv4_answers();
    ~dsv4_answers();
};

// A prompt with the ids of the answers in it that are remembered. found is what find() gave for its messages.
std::vector<llama_token> dsv4_put_back(const llama_vocab * vocab, const dsv4_prompt_tokenizer & tokenizer,
        const std::vector<llama_token> & ids, const common_json & found);
