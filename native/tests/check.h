// The one assertion of the native tests: print what failed and go on, so that one run shows every failure.

#pragma once

#include <cstdio>

static int n_checks = 0;
static int n_failed = 0;

// Stops printing, not counting, after the first failures: an exhaustive loop may fail a million times.
#define CHECK(cond, ...)                                                          \
    do {                                                                          \
        n_checks++;                                                               \
        if (!(cond)) {                                                            \
            n_failed++;                                                           \
            if (n_failed <= 20) {                                                 \
                std::printf("%s:%d: %s is false; ", __FILE__, __LINE__, #cond);   \
                std::printf(__VA_ARGS__);                                         \
                std::printf("\n");                                                \
            }                                                                     \
        }                                                                         \
    } while (0)

static int check_result(const char * name) {
    std::printf("%s: %d of %d checks failed\n", name, n_failed, n_checks);
    return n_failed > 0 || n_checks == 0;
}
