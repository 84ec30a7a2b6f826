#include "dsv4-load.h"

#include <atomic>

static std::atomic<bool> g_mmap_prefetch { false };

bool dsv4_mmap_prefetch(void) {
    return g_mmap_prefetch;
}

void dsv4_set_mmap_prefetch(bool enabled) {
    g_mmap_prefetch = enabled;
}
