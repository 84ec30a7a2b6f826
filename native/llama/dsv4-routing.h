// The sum of a token's routing weights in DeepSeek-V4, which its experts are divided by.

#pragma once

#include "llama-arch.h"

// The least sum that is divided by. DeepSeek-V4 divides by the sum whatever it is, and experts that the token's id
// selects may all have small weights: only 0/0 is kept out, since weights above zero are larger than 1e-23. Other
// models keep `least`.
static inline float dsv4_routing_sum_min(llm_arch arch, float least) {
    return arch == LLM_ARCH_DEEPSEEK4 ? 1e-30f : least;
}
