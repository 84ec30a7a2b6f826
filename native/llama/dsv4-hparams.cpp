#include "dsv4-hparams.h"

#include "dsv4-refusal.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <tuple>
#include <unordered_set>

// upstream's limits (llama-hparams.h); larger values end in an assert or write past fixed arrays
static constexpr uint32_t MAX_LAYERS  = 512;
static constexpr uint32_t MAX_EXPERTS = 1024;

// one Sinkhorn iteration is several graph nodes per layer where the fused operation is not available
static constexpr uint32_t MAX_SINKHORN_ITERATIONS = 64;

static const std::string PREFIX = "deepseek4.";

namespace {

bool starts_with(const std::string & text, const std::string & prefix) {
    return text.compare(0, prefix.size(), prefix) == 0;
}

// Typed access to the metadata; every failure is a named refusal.
struct key_reader {
    const dsv4_header & header;

    bool has(const std::string & key) const {
        return gguf_find_key(header.keys, key.c_str()) >= 0;
    }

    std::string type_of(const std::string & key) const {
        const int64_t id = gguf_find_key(header.keys, key.c_str());
        const enum gguf_type type = gguf_get_kv_type(header.keys, id);
        return type == GGUF_TYPE_ARRAY ?
            std::string("array of ") + gguf_type_name(gguf_get_arr_type(header.keys, id)) : gguf_type_name(type);
    }

    [[noreturn]] void refuse(dsv4_kind kind, const std::string & key, const std::string & what,
            const std::string & found, const std::string & expected, const std::string & hint = "") const {
        throw dsv4_refusal(kind, { header.path, "", key, what, found, expected, hint });
    }

    [[noreturn]] void refuse_missing(const std::string & key, const std::string & expected) const {
        refuse(DSV4_MISSING_KEY, key, "a metadata key that the model needs is absent", "no such key", expected,
            "Convert the checkpoint again");
    }

    [[noreturn]] void refuse_type(const std::string & key, const std::string & expected) const {
        refuse(DSV4_MISSING_KEY, key, "a metadata key has the wrong type", type_of(key), expected,
            "Convert the checkpoint again");
    }

    [[noreturn]] void refuse_value(const std::string & key, const std::string & found, const std::string & expected) const {
        refuse(DSV4_FORMAT, key, "a metadata key has a value that the engine cannot run", found, expected);
    }

    // id of the key, or -1 if it is absent and not required
    int64_t find(const std::string & key, enum gguf_type type, bool required) const {
        const int64_t id = gguf_find_key(header.keys, key.c_str());
        if (id < 0) {
            if (required) {
                refuse_missing(key, gguf_type_name(type));
            }
            return -1;
        }
        if (gguf_get_kv_type(header.keys, id) != type) {
            refuse_type(key, gguf_type_name(type));
        }
        return id;
    }

    // id of an array whose element type is one of the two; -1 if absent and not required
    int64_t find_array(const std::string & key, enum gguf_type a, enum gguf_type b, bool required) const {
        const std::string expected = std::string("array of ") + gguf_type_name(a) +
            (a == b ? "" : std::string(" or ") + gguf_type_name(b));
        const int64_t id = gguf_find_key(header.keys, key.c_str());
        if (id < 0) {
            if (required) {
                refuse_missing(key, expected);
            }
            return -1;
        }
        if (gguf_get_kv_type(header.keys, id) != GGUF_TYPE_ARRAY ||
            (gguf_get_arr_type(header.keys, id) != a && gguf_get_arr_type(header.keys, id) != b)) {
            refuse_type(key, expected);
        }
        return id;
    }

    // value of a u32 key within [lo, hi]
    int64_t u32(const std::string & key, int64_t lo, int64_t hi = UINT32_MAX) const {
        const int64_t id    = find(key, GGUF_TYPE_UINT32, true);
        const int64_t value = gguf_get_val_u32(header.keys, id);
        check_range(key, value, lo, hi);
        return value;
    }

    // the same for a key that may be absent
    int64_t u32_or(int64_t absent, const std::string & key, int64_t lo, int64_t hi = UINT32_MAX) const {
        return find(key, GGUF_TYPE_UINT32, false) < 0 ? absent : u32(key, lo, hi);
    }

    void check_range(const std::string & key, int64_t value, int64_t lo, int64_t hi) const {
        if (value < lo || value > hi) {
            refuse_value(key, std::to_string(value),
                lo == hi           ? std::to_string(lo) :
                hi == UINT32_MAX   ? "at least " + std::to_string(lo) :
                                     std::to_string(lo) + ".." + std::to_string(hi));
        }
    }

    // u32, or an array of n_layer equal u32 or i32: the graph has one value for all layers
    int64_t u32_per_layer(const std::string & key, int64_t lo, int64_t hi, int64_t n_layer) const {
        const int64_t id = gguf_find_key(header.keys, key.c_str());
        if (id < 0 || gguf_get_kv_type(header.keys, id) != GGUF_TYPE_ARRAY) {
            return u32(key, lo, hi);
        }
        find_array(key, GGUF_TYPE_UINT32, GGUF_TYPE_INT32, true);
        const size_t n = gguf_get_arr_n(header.keys, id);
        if ((int64_t) n != n_layer) {
            refuse_value(key, std::to_string(n) + " entries", std::to_string(n_layer));
        }
        const auto * data = (const int32_t *) gguf_get_arr_data(header.keys, id);
        for (size_t i = 1; i < n; ++i) {
            if (data[i] != data[0]) {
                refuse_value(key, std::to_string(data[i]) + " for layer " + std::to_string(i),
                    std::to_string(data[0]) + " as for layer 0");
            }
        }
        check_range(key, data[0], lo, hi);
        return data[0];
    }

    enum f32_range { FINITE, NOT_NEGATIVE, POSITIVE };

    void check_f32(const std::string & key, float value, f32_range range) const {
        const bool ok = std::isfinite(value) && (range == FINITE || value > 0.0f || (range == NOT_NEGATIVE && value == 0.0f));
        if (!ok) {
            refuse_value(key, std::to_string(value), range == FINITE ? "a finite number" :
                range == POSITIVE ? "a positive finite number" : "a finite number of at least 0");
        }
    }

    float f32(const std::string & key, f32_range range, bool required = true) const {
        const int64_t id = find(key, GGUF_TYPE_FLOAT32, required);
        if (id < 0) {
            return 0.0f;
        }
        const float value = gguf_get_val_f32(header.keys, id);
        check_f32(key, value, range);
        return value;
    }

    // f32, or an array of exactly n_layer f32
    void f32_per_layer(const std::string & key, int64_t n_layer, bool required) const {
        const int64_t id = gguf_find_key(header.keys, key.c_str());
        if (id < 0 || gguf_get_kv_type(header.keys, id) != GGUF_TYPE_ARRAY) {
            f32(key, FINITE, required);
            return;
        }
        find_array(key, GGUF_TYPE_FLOAT32, GGUF_TYPE_FLOAT32, true);
        const size_t n = gguf_get_arr_n(header.keys, id);
        if ((int64_t) n != n_layer) {
            refuse_value(key, std::to_string(n) + " entries", std::to_string(n_layer));
        }
        const auto * data = (const float *) gguf_get_arr_data(header.keys, id);
        for (size_t i = 0; i < n; ++i) {
            check_f32(key, data[i], FINITE);
        }
    }

    std::string str(const std::string & key, bool required) const {
        const int64_t id = find(key, GGUF_TYPE_STRING, required);
        return id < 0 ? "" : gguf_get_val_str(header.keys, id);
    }
};

// Derivation of absent keys of a native file from its tensors (names in the upstream dialect).
struct key_deriver {
    const dsv4_header & header;
    dsv4_derived      & derived;

    [[noreturn]] void refuse_absent(const std::string & name, const std::string & expected) const {
        throw dsv4_refusal(DSV4_MISSING_TENSOR, { header.path, header.spelled(name), "",
            "a tensor that the model needs is absent", "no such tensor", expected,
            "The file is incomplete: fetch or convert it again" });
    }

    const dsv4_tensor & source(const std::string & name, const std::string & key) const {
        const dsv4_tensor * t = header.find(name);
        if (!t) {
            refuse_absent(name, "the tensor that '" + key + "' follows from");
        }
        return *t;
    }

    // ratio of a layer: the rows of its positional table, 0 if it has no compressor
    int32_t ratio(int64_t il, const std::string & key) const {
        const std::string   layer = "blk." + std::to_string(il) + ".";
        const std::string   name  = layer + "attn_compressor_ape.weight";
        const dsv4_tensor * ape   = header.find(name);
        if (ape) {
            if (ape->ne[1] != 4 && ape->ne[1] != 128) {
                refuse(*ape, key, "a second dimension of 4 or 128");
            }
            return ape->ne[1];
        }
        for (const dsv4_tensor & t : header.tensors) {
            if (starts_with(t.name, layer + "attn_compress_") || starts_with(t.name, layer + "indexer.")) {
                refuse_absent(name, "the table that belongs to '" + t.name + "'");
            }
        }
        return 0;
    }

    // number of layers that route by token id: a run from layer 0
    int64_t hash_layers(int64_t n_layer) const {
        const auto has_table = [&](int64_t il) {
            return header.find("blk." + std::to_string(il) + ".ffn_gate_tid2eid.weight") != nullptr;
        };
        int64_t run = 0;
        while (run < n_layer && has_table(run)) {
            ++run;
        }
        for (int64_t il = run; il < n_layer; ++il) {
            if (has_table(il)) {
                refuse_absent("blk." + std::to_string(run) + ".ffn_gate_tid2eid.weight",
                    "one, since layer " + std::to_string(il) + " has one");
            }
        }
        return run;
    }

    [[noreturn]] void refuse(const dsv4_tensor & t, const std::string & key, const std::string & expected) const {
        throw dsv4_refusal(DSV4_TENSOR_SHAPE, { header.path, t.name, "",
            "cannot derive the absent key '" + key + "' from this tensor", dsv4_dims_str(t.ne), expected, "" });
    }

    void add(const std::string & key, dsv4_value value) const {
        derived.emplace_back(key, std::move(value));
    }
};

} // namespace

int64_t dsv4_read_vocab(const dsv4_header & header) {
    const key_reader     k { header };
    const gguf_context * keys = header.keys;

    const std::string model = k.str("tokenizer.ggml.model", true);
    if (model == "none" || model == "no_vocab") {
        return k.u32(PREFIX + "vocab_size", 1, INT32_MAX);
    }
    if (model != "gpt2" && model != "test") {
        k.refuse(DSV4_UNSUPPORTED, "tokenizer.ggml.model", "DeepSeek-V4 files carry a byte-level BPE vocabulary or none",
            "'" + model + "'", "'gpt2' or 'none'");
    }
    if (model == "gpt2") {
        k.find_array("tokenizer.ggml.merges", GGUF_TYPE_STRING, GGUF_TYPE_STRING, true);
    }

    const std::string key = "tokenizer.ggml.tokens";
    const int64_t     id  = k.find_array(key, GGUF_TYPE_STRING, GGUF_TYPE_STRING, true);
    const size_t      n   = gguf_get_arr_n(keys, id);
    if (n < 1 || n > INT32_MAX) {
        k.refuse_value(key, std::to_string(n) + " entries", "at least 1");
    }
    // upstream asserts that the texts differ; it gives empty ones a text first
    std::unordered_set<std::string> seen;
    seen.reserve(n);
    for (size_t i = 0; i < n; ++i) {
        std::string text = gguf_get_arr_str(keys, id, i);
        if (text.empty()) {
            text = "[EMPTY_" + std::to_string(i) + "]";
        }
        if (!seen.insert(text).second) {
            k.refuse_value(key, "the text of token " + std::to_string(i) + " twice", "texts that differ");
        }
    }

    for (const auto & [name, a, b] : { std::make_tuple("tokenizer.ggml.scores",     GGUF_TYPE_FLOAT32, GGUF_TYPE_INT32),
                                       std::make_tuple("tokenizer.ggml.token_type", GGUF_TYPE_INT32,   GGUF_TYPE_INT32) }) {
        const int64_t other = k.find_array(name, a, b, false);
        if (other >= 0 && gguf_get_arr_n(keys, other) < n) {
            k.refuse_value(name, std::to_string(gguf_get_arr_n(keys, other)) + " entries", "at least " + std::to_string(n));
        }
    }
    k.str("tokenizer.ggml.pre", false);
    for (const char * name : { "bos", "eos", "padding" }) { // out of range, upstream would take another token instead
        k.u32_or(0, std::string("tokenizer.ggml.") + name + "_token_id", 0, n - 1);
    }
    k.find("tokenizer.ggml.add_bos_token", GGUF_TYPE_BOOL, false);
    k.find("tokenizer.ggml.add_eos_token", GGUF_TYPE_BOOL, false);
    return n;
}

dsv4_hparams dsv4_read_hparams(const dsv4_header & header, dsv4_derived & derived) {
    const key_reader  k { header };
    const key_deriver d { header, derived };
    dsv4_hparams      hp;

    const auto key = [](const char * name) { return PREFIX + name; };
    // absent in the file, but the native dialect leaves it out
    const auto derive = [&](const std::string & name) { return header.is_native && !k.has(name); };

    // the order is that of the format description's table; tests in both languages rely on it

    hp.n_layer = k.u32(key("block_count"), 1, MAX_LAYERS);
    k.u32(key("context_length"), 1);
    hp.n_embd  = k.u32(key("embedding_length"), 1, INT32_MAX);
    hp.n_head  = k.u32_per_layer(key("attention.head_count"), 1, INT32_MAX, hp.n_layer);
    k.u32_per_layer(key("attention.head_count_kv"), 1, 1, hp.n_layer); // one latent serves all heads

    const std::string rope_type = key("rope.scaling.type");
    if (k.has(rope_type)) {
        const std::string type = k.str(rope_type, true);
        if (type != "none" && type != "linear" && type != "yarn" && type != "longrope") {
            k.refuse_value(rope_type, "'" + type + "'", "'yarn'");
        }
    }
    k.f32(key("rope.scaling.factor"), key_reader::NOT_NEGATIVE, false);
    k.u32_or(0, key("rope.scaling.original_context_length"), 0);
    k.f32(key("rope.scaling.yarn_beta_fast"), key_reader::FINITE, false);
    k.f32(key("rope.scaling.yarn_beta_slow"), key_reader::FINITE, false);
    if (header.is_native) {
        bool any = false;
        for (const char * name : { "type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow" }) {
            any = any || k.has(key("rope.scaling.") + name);
        }
        if (!any) {
            d.add(rope_type,                                    std::string("yarn"));
            d.add(key("rope.scaling.factor"),                   16.0f);
            d.add(key("rope.scaling.original_context_length"),  uint32_t(65536));
            d.add(key("rope.scaling.yarn_beta_fast"),           32.0f);
            d.add(key("rope.scaling.yarn_beta_slow"),           1.0f);
        }
    }

    k.f32(key("rope.freq_base"), key_reader::POSITIVE, false);
    k.f32(key("attention.layer_norm_rms_epsilon"), key_reader::NOT_NEGATIVE);
    hp.n_expert_used = k.u32_per_layer(key("expert_used_count"), 1, MAX_EXPERTS, hp.n_layer);

    // upstream has defaults for these two and for rope.dimension_count, all of them wrong for V4
    hp.head_dim = k.u32(key("attention.key_length"), 1, INT32_MAX);
    k.u32(key("attention.value_length"), hp.head_dim, hp.head_dim);

    k.u32_or(0, "general.file_type", 0);
    k.str("tokenizer.chat_template", false);
    k.u32_or(0, key("vocab_size"), 0);
    hp.q_lora_rank = k.u32(key("attention.q_lora_rank"), 1, INT32_MAX);

    const std::string rot_key = key("rope.dimension_count");
    hp.n_rot = k.u32(rot_key, 2, hp.head_dim);
    if (hp.n_rot % 2 != 0) {
        k.refuse_value(rot_key, std::to_string(hp.n_rot), "an even number");
    }

    k.u32(key("attention.sliding_window"), 1, INT32_MAX);
    const float rope_freq_base_swa = k.f32(key("rope.freq_base_swa"), key_reader::POSITIVE, false);
    hp.n_ff_exp        = k.u32_per_layer(key("expert_feed_forward_length"), 1, INT32_MAX, hp.n_layer);
    hp.n_expert        = k.u32(key("expert_count"), hp.n_expert_used, MAX_EXPERTS);
    hp.n_expert_shared = k.u32(key("expert_shared_count"), 1, MAX_EXPERTS);
    k.f32(key("expert_weights_scale"), key_reader::FINITE);
    k.find(key("expert_weights_norm"), GGUF_TYPE_BOOL, true);

    const std::string clamp_key = key("swiglu_clamp_exp");
    k.f32_per_layer(clamp_key, hp.n_layer, true);

    hp.indexer_n_head   = k.u32(key("attention.indexer.head_count"), 1, INT32_MAX);
    const std::string indexer_key = key("attention.indexer.key_length");
    hp.indexer_head_dim = k.u32(indexer_key, hp.n_rot, INT32_MAX);
    if (hp.indexer_head_dim % 64 != 0) { // the smallest Hadamard matrix that upstream applies to the rows
        k.refuse_value(indexer_key, std::to_string(hp.indexer_head_dim), "a multiple of 64");
    }
    k.u32(key("attention.indexer.top_k"), 1, INT32_MAX);

    const std::string clamp_shared_key = key("swiglu_clamp_shexp");
    if (derive(clamp_shared_key)) {
        const int64_t id = gguf_find_key(header.keys, clamp_key.c_str());
        if (gguf_get_kv_type(header.keys, id) == GGUF_TYPE_ARRAY) {
            const auto * data = (const float *) gguf_get_arr_data(header.keys, id);
            d.add(clamp_shared_key, std::vector<float>(data, data + gguf_get_arr_n(header.keys, id)));
        } else {
            d.add(clamp_shared_key, gguf_get_val_f32(header.keys, id));
        }
    } else {
        k.f32_per_layer(clamp_shared_key, hp.n_layer, false);
    }

    const std::string groups_key = key("attention.output_group_count");
    const int64_t     q_dim      = hp.n_head*hp.head_dim; // both at most INT32_MAX
    if (derive(groups_key)) {
        const dsv4_tensor & wo_a = d.source("blk.0.attn_output_a.weight", groups_key);
        if (wo_a.ne[0] < 1 || q_dim % wo_a.ne[0] != 0 || hp.n_head % (q_dim/wo_a.ne[0]) != 0) {
            d.refuse(wo_a, groups_key, "a first dimension that splits " + std::to_string(hp.n_head) + " heads of " +
                std::to_string(hp.head_dim) + " into equal groups");
        }
        hp.o_groups = q_dim/wo_a.ne[0];
        d.add(groups_key, uint32_t(hp.o_groups));
    } else {
        hp.o_groups = k.u32(groups_key, 1, hp.n_head);
        if (hp.n_head % hp.o_groups != 0) {
            k.refuse_value(groups_key, std::to_string(hp.o_groups), "a divisor of the " + std::to_string(hp.n_head) + " heads");
        }
    }

    const std::string rank_key = key("attention.output_lora_rank");
    if (derive(rank_key)) {
        const dsv4_tensor & wo_a = d.source("blk.0.attn_output_a.weight", rank_key);
        if (wo_a.ne[1] < 1 || wo_a.ne[1] % hp.o_groups != 0 || wo_a.ne[1]/hp.o_groups > INT32_MAX) {
            d.refuse(wo_a, rank_key, "a second dimension that is a multiple of the " + std::to_string(hp.o_groups) + " groups");
        }
        hp.o_lora_rank = wo_a.ne[1]/hp.o_groups;
        d.add(rank_key, uint32_t(hp.o_lora_rank));
    } else {
        hp.o_lora_rank = k.u32(rank_key, 1, INT32_MAX);
    }

    const std::string compress_base_key = key("attention.compress_rope_freq_base");
    if (derive(compress_base_key)) {
        // despite its name, the native dialect's rope.freq_base_swa is the base of the compressed layers
        d.add(compress_base_key, k.has(key("rope.freq_base_swa")) ? rope_freq_base_swa : 160000.0f);
    } else {
        k.f32(compress_base_key, key_reader::POSITIVE);
    }

    const std::string ratios_key = key("attention.compress_ratios");
    if (derive(ratios_key)) {
        for (int64_t il = 0; il < hp.n_layer; ++il) {
            hp.compress_ratios.push_back(d.ratio(il, ratios_key));
        }
        d.add(ratios_key, hp.compress_ratios);
    } else {
        const int64_t id = k.find_array(ratios_key, GGUF_TYPE_INT32, GGUF_TYPE_UINT32, true);
        const size_t  n  = gguf_get_arr_n(header.keys, id);
        if ((int64_t) n < hp.n_layer || n > MAX_LAYERS) {
            k.refuse_value(ratios_key, std::to_string(n) + " entries",
                std::to_string(hp.n_layer) + ".." + std::to_string(MAX_LAYERS));
        }
        const auto * data = (const int32_t *) gguf_get_arr_data(header.keys, id);
        hp.compress_ratios.assign(data, data + n);
        for (int64_t il = 0; il < hp.n_layer; ++il) {
            if (data[il] != 0 && data[il] != 4 && data[il] != 128) {
                k.refuse_value(ratios_key, std::to_string(data[il]) + " for layer " + std::to_string(il), "0, 4 or 128");
            }
        }
    }

    const std::string hc_key = key("hyper_connection.count");
    if (derive(hc_key)) {
        const dsv4_tensor & base = d.source("output_hc_base.weight", hc_key);
        if (base.ne[0] != 4) {
            d.refuse(base, hc_key, "4");
        }
        hp.hc_count = base.ne[0];
        d.add(hc_key, uint32_t(hp.hc_count));
    } else {
        hp.hc_count = k.u32(hc_key, 4, 4); // the graph is written for four streams
    }

    const std::string sinkhorn_key = key("hyper_connection.sinkhorn_iterations");
    if (derive(sinkhorn_key)) {
        d.add(sinkhorn_key, uint32_t(20));
    } else {
        k.u32(sinkhorn_key, 1, MAX_SINKHORN_ITERATIONS);
    }

    const std::string hc_eps_key = key("hyper_connection.epsilon");
    if (derive(hc_eps_key)) {
        d.add(hc_eps_key, 1e-6f);
    } else {
        k.f32(hc_eps_key, key_reader::NOT_NEGATIVE);
    }

    const std::string hash_key = key("hash_layer_count");
    if (derive(hash_key)) {
        hp.n_hash_layer = d.hash_layers(hp.n_layer);
        d.add(hash_key, uint32_t(hp.n_hash_layer));
    } else {
        hp.n_hash_layer = k.u32(hash_key, 0, hp.n_layer);
    }

    const std::string gating_key = key("expert_gating_func");
    if (derive(gating_key)) {
        d.add(gating_key, uint32_t(4)); // sqrt-softplus
    } else {
        k.u32(gating_key, 4, 4);
    }

    k.u32_or(0, key("embedding_length_out"), 0);
    hp.n_layer_nextn = k.u32_or(0, key("nextn_predict_layers"), 0, hp.n_layer);

    // keys that V4 files do not have, but that upstream's loader reads for every architecture
    const int64_t causal = k.find(key("attention.causal"), GGUF_TYPE_BOOL, false);
    if (causal >= 0 && !gguf_get_val_bool(header.keys, causal)) {
        k.refuse_value(key("attention.causal"), "false", "true");
    }
    for (const auto & [name, value] : { std::make_pair("attention.key_length_swa",   hp.head_dim),
                                        std::make_pair("attention.value_length_swa", hp.head_dim),
                                        std::make_pair("rope.dimension_count_swa",   hp.n_rot) }) {
        k.u32_or(value, key(name), value, value);
    }
    k.u32_or(0, key("expert_group_count"), 0, std::min<int64_t>(1, hp.n_expert - 1));
    if (k.u32_or(0, key("pooling_type"), 0) != UINT32_MAX) { // "unspecified", as upstream's saver writes it
        k.u32_or(0, key("pooling_type"), 0, 0);
    }

    hp.n_vocab = dsv4_read_vocab(header);
    return hp;
}

static std::string json_of(float value) {
    char buf[32];
    snprintf(buf, sizeof(buf), "%.9g", value); // enough digits to read the same number back
    return buf;
}

static std::string json_of(uint32_t value) {
    return std::to_string(value);
}

static std::string json_of(int32_t value) {
    return std::to_string(value);
}

template <typename T>
static std::string json_of(const std::vector<T> & values) {
    std::string text;
    for (const T value : values) {
        text += (text.empty() ? "" : ", ") + json_of(value);
    }
    return "[" + text + "]";
}

static std::string json_of(const std::string & value) {
    return dsv4_json_string(value);
}

std::string dsv4_derived_json(const dsv4_derived & derived) {
    std::string text;
    for (const auto & [key, value] : derived) {
        text += (text.empty() ? "" : ", ") + dsv4_json_string(key) + ": " +
            std::visit([](const auto & v) { return json_of(v); }, value);
    }
    return "{" + text + "}";
}

void dsv4_set_derived(struct gguf_context * metadata, const dsv4_derived & derived) {
    for (const auto & [name, value] : derived) {
        const char * key = name.c_str();
        if (const auto * u32 = std::get_if<uint32_t>(&value)) {
            gguf_set_val_u32(metadata, key, *u32);
        } else if (const auto * f32 = std::get_if<float>(&value)) {
            gguf_set_val_f32(metadata, key, *f32);
        } else if (const auto * text = std::get_if<std::string>(&value)) {
            gguf_set_val_str(metadata, key, text->c_str());
        } else if (const auto * i32s = std::get_if<std::vector<int32_t>>(&value)) {
            gguf_set_arr_data(metadata, key, GGUF_TYPE_INT32, i32s->data(), i32s->size());
        } else if (const auto * f32s = std::get_if<std::vector<float>>(&value)) {
            gguf_set_arr_data(metadata, key, GGUF_TYPE_FLOAT32, f32s->data(), f32s->size());
        }
    }
}
