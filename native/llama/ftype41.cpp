// general.file_type 41 in both directions, and the type mix behind it; see ftype41.h.

#include "ftype41.h"

#include <cstring>

// as it stands in files, for both claimants
static constexpr uint32_t FILE_TYPE_41 = 41;

static_assert(LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4 == FILE_TYPE_41 && LLAMA_FTYPE_MOSTLY_Q2_0 == FILE_TYPE_41 + 1,
        "41 must be the last file type of upstream's; move Q2_0 to the next free one after a bump");

llama_ftype dsv4_ftype_from_file(uint32_t file_type, uint32_t n_f8) {
    const uint32_t flags = file_type & LLAMA_FTYPE_GUESSED;
    const uint32_t value = file_type & ~uint32_t(LLAMA_FTYPE_GUESSED);
    if (value == FILE_TYPE_41) {
        return llama_ftype((n_f8 > 0 ? LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4 : LLAMA_FTYPE_MOSTLY_Q2_0) | flags);
    }
    // one up, so that a future upstream type is "unknown" here and not taken for our Q2_0
    return llama_ftype((value < FILE_TYPE_41 ? value : value + 1) | flags);
}

uint32_t dsv4_ftype_to_file(llama_ftype ftype) {
    const uint32_t flags = uint32_t(ftype) & LLAMA_FTYPE_GUESSED;
    const uint32_t value = uint32_t(ftype) & ~uint32_t(LLAMA_FTYPE_GUESSED);
    return (value <= FILE_TYPE_41 ? value : value - 1) | flags;
}

ggml_type dsv4_ftype41_tensor_type(const ggml_tensor * tensor, bool is_embd_or_output) {
    const auto has = [tensor](const char * part) { return std::strstr(tensor->name, part) != nullptr; };

    if (has("hc_") || has("_ape")) {
        return tensor->type;
    }
    if (is_embd_or_output || has("compress") || has("indexer.proj")) {
        return GGML_TYPE_BF16;
    }
    const ggml_type type = has("_exps") ? GGML_TYPE_MXFP4 : GGML_TYPE_F8_E4M3_B128;
    return tensor->ne[0] % ggml_blck_size(type) == 0 ? type : GGML_TYPE_BF16;
}
