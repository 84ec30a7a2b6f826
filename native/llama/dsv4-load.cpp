#include "dsv4-load.h"

#include "llama-model.h"

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
