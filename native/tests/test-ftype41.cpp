// File type 41 in files and in memory, its name, and the types that the quantiser gives to the tensors of V4.

#include "check.h"

#include "ftype41.h"
#include "ggml.h"
#include "llama.h"

#include <string>

static void test_ids() {
    CHECK(dsv4_ftype_from_file(41, 0) == LLAMA_FTYPE_MOSTLY_Q2_0, "41 without FP8 tensors is stock's");
    CHECK(dsv4_ftype_from_file(41, 365) == LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4, "41 with FP8 tensors");
    CHECK(dsv4_ftype_to_file(LLAMA_FTYPE_MOSTLY_Q2_0) == 41, "Q2_0 is written as 41");
    CHECK(dsv4_ftype_to_file(LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4) == 41, "F8_E4M3_MXFP4 is written as 41");

    // every other value survives and is not taken for one of ours
    for (uint32_t value = 0; value < 100; value++) {
        for (uint32_t flags : { 0u, uint32_t(LLAMA_FTYPE_GUESSED) }) {
            for (uint32_t n_f8 : { 0u, 1u }) {
                const llama_ftype ftype = dsv4_ftype_from_file(value | flags, n_f8);
                CHECK(dsv4_ftype_to_file(ftype) == (value | flags), "file type %u comes back as %u", value | flags, dsv4_ftype_to_file(ftype));
                const bool ours = (ftype & ~LLAMA_FTYPE_GUESSED) == LLAMA_FTYPE_MOSTLY_Q2_0 ||
                                  (ftype & ~LLAMA_FTYPE_GUESSED) == LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4;
                CHECK(ours == (value == 41), "file type %u", value);
            }
        }
    }
}

static void test_names() {
    CHECK(std::string(llama_ftype_name(dsv4_ftype_from_file(41, 1))) == "F8_E4M3_MXFP4", "%s", llama_ftype_name(dsv4_ftype_from_file(41, 1)));
    CHECK(std::string(llama_ftype_name(dsv4_ftype_from_file(41, 0))) == "Q2_0", "%s", llama_ftype_name(dsv4_ftype_from_file(41, 0)));
    CHECK(std::string(llama_ftype_name(dsv4_ftype_from_file(42, 1))).find("unknown") == 0, "%s", llama_ftype_name(dsv4_ftype_from_file(42, 1)));
    const llama_ftype guessed = llama_ftype(LLAMA_FTYPE_MOSTLY_F8_E4M3_MXFP4 | LLAMA_FTYPE_GUESSED);
    CHECK(std::string(llama_ftype_name(guessed)) == "(guessed) F8_E4M3_MXFP4", "%s", llama_ftype_name(guessed));
}

static ggml_type chosen(const char * name, int64_t ne0, ggml_type type = GGML_TYPE_F32, bool is_embd_or_output = false) {
    ggml_tensor t = {};
    t.type  = type;
    t.ne[0] = ne0;
    ggml_set_name(&t, name);
    return dsv4_ftype41_tensor_type(&t, is_embd_or_output);
}

// the released checkpoint's types under upstream's names
static void test_tensor_types() {
    for (const char * name : { "attn_kv", "attn_output_a", "attn_output_b", "attn_q_a", "attn_q_b", "indexer.attn_q_b",
                               "ffn_gate_shexp", "ffn_down_shexp", "ffn_up_shexp" }) {
        const std::string full = std::string("blk.2.") + name + ".weight";
        CHECK(chosen(full.c_str(), 4096) == GGML_TYPE_F8_E4M3_B128, "%s", name);
        CHECK(chosen(full.c_str(), 4096 + 64) == GGML_TYPE_BF16, "%s with an odd row", name);
    }
    for (const char * name : { "ffn_gate_exps", "ffn_down_exps", "ffn_up_exps" }) {
        const std::string full = std::string("blk.2.") + name + ".weight";
        CHECK(chosen(full.c_str(), 2048) == GGML_TYPE_MXFP4, "%s", name);
        CHECK(chosen(full.c_str(), 2048 + 32) == GGML_TYPE_MXFP4, "%s", name);
        CHECK(chosen(full.c_str(), 2048 + 16) == GGML_TYPE_BF16, "%s with an odd row", name);
    }
    for (const char * name : { "attn_compressor_kv", "attn_compressor_gate", "indexer_compressor_kv", "indexer_compressor_gate", "indexer.proj" }) {
        CHECK(chosen((std::string("blk.2.") + name + ".weight").c_str(), 4096) == GGML_TYPE_BF16, "%s", name);
    }
    for (const char * name : { "blk.2.hc_attn_fn.weight", "output_hc_fn.weight", "blk.2.attn_compressor_ape.weight", "blk.2.indexer_compressor_ape.weight" }) {
        CHECK(chosen(name, 4096, GGML_TYPE_F32) == GGML_TYPE_F32, "%s", name);
        CHECK(chosen(name, 4096, GGML_TYPE_F16) == GGML_TYPE_F16, "%s", name);
    }
    CHECK(chosen("token_embd.weight", 4096, GGML_TYPE_F16, true) == GGML_TYPE_BF16, "embedding");
    CHECK(chosen("output.weight", 4096, GGML_TYPE_F16, true) == GGML_TYPE_BF16, "head");
}

int main() {
    test_ids();
    test_names();
    test_tensor_types();
    return check_result("test-ftype41");
}
