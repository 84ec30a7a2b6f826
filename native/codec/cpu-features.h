// Which of the instruction sets that the engine was built for this CPU lacks. Lives beside the codecs because their
// module is built for any x86-64 and can be loaded before the engine's, which cannot.

#pragma once

#include <sstream>
#include <string>
#include <vector>

#ifndef PYLLAMA_DSV4_CPU_FEATURES
#define PYLLAMA_DSV4_CPU_FEATURES "" // names as compilers spell them, separated by spaces
#endif

inline bool cpu_has(const std::string & feature) {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
    // the argument must be a literal
#define PYL_CPU_HAS(name) if (feature == name) { return __builtin_cpu_supports(name) != 0; }
    PYL_CPU_HAS("avx")
    PYL_CPU_HAS("avx2")
    PYL_CPU_HAS("fma")
    PYL_CPU_HAS("bmi2")
    PYL_CPU_HAS("avx512f")
    PYL_CPU_HAS("avx512bw")
    PYL_CPU_HAS("avx512cd")
    PYL_CPU_HAS("avx512dq")
    PYL_CPU_HAS("avx512vl")
    PYL_CPU_HAS("avx512vbmi")
    PYL_CPU_HAS("avx512vnni")
    PYL_CPU_HAS("avx512bf16")
#undef PYL_CPU_HAS
#endif
    (void) feature;
    return false;
}

inline std::vector<std::string> missing_cpu_features() {
    std::vector<std::string> missing;
    std::istringstream names(PYLLAMA_DSV4_CPU_FEATURES);
    for (std::string name; names >> name; ) {
        if (!cpu_has(name)) {
            missing.push_back(name);
        }
    }
    return missing;
}
