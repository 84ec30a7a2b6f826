#include "dsv4-load.h"

#include "llama-mmap.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>

static std::atomic<bool> g_mmap_prefetch { false };

bool dsv4_mmap_prefetch(void) {
    return g_mmap_prefetch;
}

void dsv4_set_mmap_prefetch(bool enabled) {
    g_mmap_prefetch = enabled;
}

bool dsv4_may_repack(const llama_model & model) {
    return model.arch != LLM_ARCH_DEEPSEEK4;
}

bool dsv4_read_in_pieces(llama_file & file, void * to, size_t n_bytes, const std::function<bool(size_t)> & go_on) {
    constexpr size_t PIECE = 16 << 20; // a tenth of a second where a disk is slow
    for (size_t n_done = 0; n_done < n_bytes;) {
        if (n_done > 0 && !go_on(n_done)) { // the loader asked before the first
            return false;
        }
        const size_t n = std::min(PIECE, n_bytes - n_done);
        file.read_raw(static_cast<char *>(to) + n_done, n);
        n_done += n;
    }
    return true;
}
