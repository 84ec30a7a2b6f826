// The log ring: ggml's threads write lines, Python drains them. A Python callback on those threads would need the
// interpreter lock in the middle of a computation.

#include "pyllama.h"

#include "log.h" // upstream's common

#include <cstring>
#include <deque>
#include <mutex>
#include <string>

namespace {

constexpr size_t N_LINES_MAX = 4096;

struct log_line {
    int32_t     level;
    std::string text;
};

std::mutex           g_mutex;
std::deque<log_line> g_lines;
log_line             g_partial = { GGML_LOG_LEVEL_NONE, "" };

void push(log_line && line) {
    if (g_lines.size() >= N_LINES_MAX) {
        g_lines.pop_front();
    }
    g_lines.push_back(std::move(line));
}

void on_log(enum ggml_log_level level, const char * text, void *) {
    std::lock_guard<std::mutex> lock(g_mutex);
    if (level != GGML_LOG_LEVEL_CONT) {
        if (!g_partial.text.empty()) {
            push(std::move(g_partial));
        }
        g_partial = { level, "" };
    }
    for (const char * p = text; *p;) {
        const char * end = strchr(p, '\n');
        g_partial.text.append(p, end ? end - p : strlen(p));
        if (!end) {
            return;
        }
        if (!g_partial.text.empty()) {
            push({ g_partial.level, g_partial.text });
        }
        g_partial.text.clear();
        p = end + 1;
    }
}

} // namespace

void pyl_log_init(void) {
    llama_log_set(on_log, nullptr);
    // common has a log of its own, which writes to stdout and stderr from a thread. What it has to say about chats is
    // in exceptions and results; the server sets the level it wants.
    common_log_set_verbosity_thold(LOG_LEVEL_OUTPUT - 1);
}

int32_t pyl_log_next(char * buf, int32_t size, int32_t * level) {
    std::lock_guard<std::mutex> lock(g_mutex);
    if (g_lines.empty() || size < 1) {
        return -1;
    }
    const log_line & line = g_lines.front();
    const size_t n = std::min(line.text.size(), size_t(size) - 1);
    memcpy(buf, line.text.data(), n);
    buf[n] = '\0';
    *level = line.level;
    g_lines.pop_front();
    return int32_t(n);
}
