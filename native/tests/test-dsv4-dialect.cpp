// Opening DeepSeek-V4 files: names and keys of the native dialect, the chat template, refusals, files of other models,
// and mapping. Files are written here byte by byte, with a hole for the data, and opened by upstream's loader.

#include "check.h"

#include "dsv4-check.h"
#include "dsv4-dialect.h"
#include "dsv4-load.h"
#include "dsv4-names.h"
#include "dsv4-refusal.h"
#include "dsv4-template.h"

#include "ggml.h"
#include "gguf.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "llama.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <variant>

namespace fs = std::filesystem;

static fs::path g_folder; // for all files; removed at the end

// --- files ---

static const int32_t T_F32   = GGML_TYPE_F32;
static const int32_t T_I32   = GGML_TYPE_I32;
static const int32_t T_BF16  = GGML_TYPE_BF16;
static const int32_t T_MXFP4 = GGML_TYPE_MXFP4;
static const int32_t T_Q8_0  = GGML_TYPE_Q8_0;
static const int32_t T_42    = 42;

using value = std::variant<uint32_t, int32_t, uint16_t, float, bool, std::string,
    std::vector<int32_t>, std::vector<float>, std::vector<std::string>>;

struct tensor {
    std::string          name;
    int32_t              type;         // id in the file
    std::vector<int64_t> ne;
    int                  stride = 129; // of type 42: bytes per 128 values

    int64_t n() const {
        int64_t n = 1;
        for (int64_t d : ne) {
            n *= d;
        }
        return n;
    }

    uint64_t n_bytes() const {
        return type == T_42 ? n()*stride/128 : n()/ggml_blck_size(ggml_type(type))*ggml_type_size(ggml_type(type));
    }
};

struct file_spec {
    std::vector<std::pair<std::string, value>> keys;
    std::vector<tensor>                        tensors;

    file_spec & set(const std::string & key, const value & v) {
        for (auto & [name, old] : keys) {
            if (name == key) {
                old = v;
                return *this;
            }
        }
        keys.emplace_back(key, v);
        return *this;
    }

    file_spec & drop(const std::string & part) {
        std::vector<std::pair<std::string, value>> kept;
        for (const auto & entry : keys) {
            if (entry.first.find(part) == std::string::npos) {
                kept.push_back(entry);
            }
        }
        keys = kept;
        return *this;
    }

    tensor & at(const std::string & name) {
        for (tensor & t : tensors) {
            if (t.name == name) {
                return t;
            }
        }
        throw std::out_of_range(name);
    }

    file_spec & remove(const std::string & name) {
        for (size_t i = 0; i < tensors.size(); ++i) {
            if (tensors[i].name == name) {
                tensors.erase(tensors.begin() + i);
                return *this;
            }
        }
        throw std::out_of_range(name);
    }
};

struct byte_writer {
    std::string data;

    template <typename T> void put(T v) { data.append((const char *) &v, sizeof(v)); }

    void text(const std::string & s) {
        put(uint64_t(s.size()));
        data += s;
    }

    void operator()(uint32_t v)             { put(int32_t(GGUF_TYPE_UINT32));  put(v); }
    void operator()(int32_t v)              { put(int32_t(GGUF_TYPE_INT32));   put(v); }
    void operator()(uint16_t v)             { put(int32_t(GGUF_TYPE_UINT16));  put(v); }
    void operator()(float v)                { put(int32_t(GGUF_TYPE_FLOAT32)); put(v); }
    void operator()(bool v)                 { put(int32_t(GGUF_TYPE_BOOL));    put(int8_t(v)); }
    void operator()(const std::string & v)  { put(int32_t(GGUF_TYPE_STRING));  text(v); }

    void array(enum gguf_type type, size_t n) {
        put(int32_t(GGUF_TYPE_ARRAY));
        put(int32_t(type));
        put(uint64_t(n));
    }

    void operator()(const std::vector<int32_t> & v)     { array(GGUF_TYPE_INT32,   v.size()); for (auto x : v) { put(x); } }
    void operator()(const std::vector<float> & v)       { array(GGUF_TYPE_FLOAT32, v.size()); for (auto x : v) { put(x); } }
    void operator()(const std::vector<std::string> & v) { array(GGUF_TYPE_STRING,  v.size()); for (auto & x : v) { text(x); } }
};

// Returns the path. cut: bytes missing at the end.
static std::string write_file(const file_spec & f, const std::string & name = "model.gguf", uint64_t cut = 0) {
    byte_writer w;
    w.data = "GGUF";
    w.put(uint32_t(3));
    w.put(uint64_t(f.tensors.size()));
    w.put(uint64_t(f.keys.size()));
    for (const auto & [key, v] : f.keys) {
        w.text(key);
        std::visit(w, v);
    }
    uint64_t size = 0;
    for (const tensor & t : f.tensors) {
        w.text(t.name);
        w.put(uint32_t(t.ne.size()));
        for (int64_t d : t.ne) {
            w.put(d);
        }
        w.put(t.type);
        w.put(size);
        size += GGML_PAD(t.n_bytes(), 32);
    }
    w.data.resize(GGML_PAD(w.data.size(), 32));

    const fs::path path = g_folder/name;
    std::ofstream(path, std::ios::binary) << w.data;
    fs::resize_file(path, w.data.size() + size - cut);
    return path.string();
}

// --- DeepSeek-V4 in small ---

static const int64_t N_VOCAB = 32;

// native dialect, layers of the given ratios, the first one routed by token id
static file_spec native_model(const std::vector<int32_t> & ratios = { 0, 4, 128 }, bool with_vocab = false) {
    const int64_t d = 256, heads = 2, head = 256, q_lora = 128, groups = 2, rank = 64, ix_heads = 4, ix_head = 128;
    const int64_t ff = 128, experts = 4, used = 2;
    const uint32_t n_layer = ratios.size();

    file_spec f;
    f.keys = {
        { "general.architecture",                     std::string("deepseek4") },
        { "general.name",                             std::string("small") },
        { "deepseek4.block_count",                    n_layer },
        { "deepseek4.context_length",                 uint32_t(4096) },
        { "deepseek4.embedding_length",               uint32_t(d) },
        { "deepseek4.attention.head_count",           uint32_t(heads) },
        { "deepseek4.attention.head_count_kv",        uint32_t(1) },
        { "deepseek4.rope.scaling.type",              std::string("yarn") },
        { "deepseek4.rope.scaling.factor",            8.0f },
        { "deepseek4.rope.scaling.original_context_length", uint32_t(1024) },
        { "deepseek4.rope.scaling.yarn_beta_fast",    32.0f },
        { "deepseek4.rope.scaling.yarn_beta_slow",    1.0f },
        { "deepseek4.rope.freq_base",                 10000.0f },
        { "deepseek4.attention.layer_norm_rms_epsilon", 1e-6f },
        { "deepseek4.expert_used_count",              uint32_t(used) },
        { "deepseek4.attention.key_length",           uint32_t(head) },
        { "deepseek4.attention.value_length",         uint32_t(head) },
        { "general.file_type",                        uint32_t(41) },
        { "deepseek4.vocab_size",                     uint32_t(N_VOCAB) },
        { "deepseek4.attention.q_lora_rank",          uint32_t(q_lora) },
        { "deepseek4.rope.dimension_count",           uint32_t(64) },
        { "deepseek4.attention.sliding_window",       uint32_t(128) },
        { "deepseek4.rope.freq_base_swa",             150000.0f },
        { "deepseek4.leading_dense_block_count",      uint32_t(0) },
        { "deepseek4.expert_feed_forward_length",     uint32_t(ff) },
        { "deepseek4.expert_count",                   uint32_t(experts) },
        { "deepseek4.expert_shared_count",            uint32_t(1) },
        { "deepseek4.expert_weights_scale",           1.5f },
        { "deepseek4.expert_weights_norm",            true },
        { "deepseek4.swiglu_clamp_exp",               std::vector<float>(n_layer, 10.0f) },
        { "deepseek4.attention.indexer.head_count",   uint32_t(ix_heads) },
        { "deepseek4.attention.indexer.key_length",   uint32_t(ix_head) },
        { "deepseek4.attention.indexer.top_k",        uint32_t(8) },
        { "general.quantization_version",             uint32_t(2) },
    };
    if (with_vocab) {
        std::vector<std::string> tokens;
        for (int64_t i = 0; i < N_VOCAB; ++i) {
            tokens.push_back("t" + std::to_string(i));
        }
        f.set("tokenizer.ggml.model", std::string("gpt2"));
        f.set("tokenizer.ggml.pre", std::string("joyai-llm"));
        f.set("tokenizer.ggml.tokens", tokens);
        f.set("tokenizer.ggml.merges", std::vector<std::string> { "t 1" });
        f.set("tokenizer.ggml.bos_token_id", uint32_t(0));
        f.set("tokenizer.ggml.eos_token_id", uint32_t(1));
        f.set("tokenizer.chat_template", std::string("{{ bos_token }}{{ messages[0].content }}"));
    } else {
        f.set("tokenizer.ggml.model", std::string("none"));
    }

    const auto add = [&](const std::string & name, int32_t type, std::vector<int64_t> ne) {
        f.tensors.push_back({ name, type, std::move(ne) });
    };
    add("token_embd.weight", T_BF16, { d, N_VOCAB });
    for (uint32_t il = 0; il < n_layer; ++il) {
        const std::string p      = "blk." + std::to_string(il) + ".";
        const int64_t     ratio  = ratios[il];
        const int64_t     pooled = head*(ratio == 4 ? 2 : 1);
        add(p + "attn_sinks", T_F32, { heads });
        if (ratio) {
            add(p + "attn_compress_ape",          T_F32,  { pooled, ratio });
            add(p + "attn_compress_norm.weight",  T_F32,  { head });
            add(p + "attn_compress_gate.weight",  T_BF16, { d, pooled });
            add(p + "attn_compress_kv.weight",    T_BF16, { d, pooled });
        }
        if (ratio == 4) {
            add(p + "indexer.compress_ape",         T_F32,  { 2*ix_head, 4 });
            add(p + "indexer.compress_norm.weight", T_F32,  { ix_head });
            add(p + "indexer.compress_gate.weight", T_BF16, { d, 2*ix_head });
            add(p + "indexer.compress_kv.weight",   T_BF16, { d, 2*ix_head });
            add(p + "indexer.proj.weight",          T_BF16, { d, ix_heads });
            add(p + "indexer.attn_q_b.weight",      T_42,   { q_lora, ix_heads*ix_head });
        }
        add(p + "attn_kv_a_norm.weight", T_F32,   { head });
        add(p + "attn_q_a_norm.weight",  T_F32,   { q_lora });
        add(p + "attn_kv_latent.weight", T_42,    { d, head });
        add(p + "attn_output_a.weight",  T_42,    { heads*head/groups, groups*rank });
        add(p + "attn_output_b.weight",  T_42,    { groups*rank, d });
        add(p + "attn_q_a.weight",       T_42,    { d, q_lora });
        add(p + "attn_q_b.weight",       T_42,    { q_lora, heads*head });
        add(p + "attn_norm.weight",      T_F32,   { d });
        add(p + "ffn_down_exps.weight",  T_MXFP4, { ff, d, experts });
        add(p + "ffn_gate_exps.weight",  T_MXFP4, { d, ff, experts });
        add(p + "ffn_up_exps.weight",    T_MXFP4, { d, ff, experts });
        if (il == 0) {
            add(p + "ffn_gate_tid2eid",  T_I32,   { used, N_VOCAB });
        } else {
            add(p + "exp_probs_b",       T_F32,   { experts });
        }
        add(p + "ffn_gate_inp.weight",   T_F32,   { d, experts });
        add(p + "ffn_gate_shexp.weight", T_42,    { d, ff });
        add(p + "ffn_down_shexp.weight", T_42,    { ff, d });
        add(p + "ffn_up_shexp.weight",   T_42,    { d, ff });
        add(p + "ffn_norm.weight",       T_F32,   { d });
        for (const char * part : { "attn", "ffn" }) {
            const std::string hc = p + "hc_" + part;
            add(hc + "_base",  T_F32, { 24 });
            add(hc + "_fn",    T_F32, { 4*d, 24 });
            add(hc + "_scale", T_F32, { 3 });
        }
    }
    add("hc_head_base",       T_F32,  { 4 });
    add("hc_head_fn",         T_F32,  { 4*d, 4 });
    add("hc_head_scale",      T_F32,  { 1 });
    add("output.weight",      T_BF16, { d, N_VOCAB });
    add("output_norm.weight", T_F32,  { d });
    return f;
}

// the keys that upstream requires and the native dialect leaves out
static file_spec & add_upstream_keys(file_spec & f) {
    f.set("deepseek4.attention.output_group_count",         uint32_t(2));
    f.set("deepseek4.attention.output_lora_rank",           uint32_t(64));
    f.set("deepseek4.attention.compress_rope_freq_base",    123456.0f);
    f.set("deepseek4.attention.compress_ratios",            std::vector<int32_t> { 0, 4, 128, 0 });
    f.set("deepseek4.hyper_connection.count",               uint32_t(4));
    f.set("deepseek4.hyper_connection.sinkhorn_iterations", uint32_t(7));
    f.set("deepseek4.hyper_connection.epsilon",             1e-5f);
    f.set("deepseek4.hash_layer_count",                     uint32_t(1));
    f.set("deepseek4.expert_gating_func",                   uint32_t(4));
    f.set("deepseek4.swiglu_clamp_shexp",                   5.0f);
    return f;
}

static file_spec upstream_model(bool with_vocab = false) {
    file_spec f = native_model({ 0, 4, 128 }, with_vocab);
    add_upstream_keys(f);
    for (tensor & t : f.tensors) {
        t.name = dsv4_native_to_upstream(t.name);
        t.type = t.type == T_42 ? T_Q8_0 : t.type;
    }
    return f;
}

// --- opening ---

struct loader {
    std::vector<std::string>            splits;
    std::unique_ptr<llama_model_loader> ml;

    explicit loader(const std::string & path) {
        ml = std::make_unique<llama_model_loader>(nullptr, nullptr, nullptr, path, splits, nullptr, LLAMA_LOAD_MODE_MMAP,
            /*check_tensors =*/ false, /*no_alloc =*/ false, /*load_mtp =*/ false, nullptr, nullptr);
    }

    int64_t id(const std::string & key) const { return gguf_find_key(ml->metadata, key.c_str()); }
    bool    has(const std::string & key) const { return id(key) >= 0; }

    uint32_t    u32(const std::string & key) const { return has(key) ? gguf_get_val_u32(ml->metadata, id(key)) : UINT32_MAX; }
    float       f32(const std::string & key) const { return has(key) ? gguf_get_val_f32(ml->metadata, id(key)) : -1.0f; }
    std::string str(const std::string & key) const { return has(key) ? gguf_get_val_str(ml->metadata, id(key)) : "(none)"; }

    template <typename T> std::vector<T> arr(const std::string & key) const {
        if (!has(key)) {
            return {};
        }
        const T * data = (const T *) gguf_get_arr_data(ml->metadata, id(key));
        return std::vector<T>(data, data + gguf_get_arr_n(ml->metadata, id(key)));
    }
};

// "Kind tensor key" of a refusal, or "ok"
static std::string refusal_by_loader(const std::string & path) {
    try {
        loader l(path);
        return "ok";
    } catch (const dsv4_refusal & refusal) {
        CHECK(std::string(refusal.what()).find(refusal.facts.path) == 0, "the message names no file: %s", refusal.what());
        return std::string(dsv4_kind_name(refusal.kind)) + " " + refusal.facts.tensor + " " + refusal.facts.key;
    } catch (const std::exception & err) {
        return std::string("other: ") + err.what();
    }
}

static std::string json_field(const std::string & json, const std::string & name) {
    const std::string start = "\"" + name + "\": \"";
    const size_t i = json.find(start);
    return i == std::string::npos ? "" : json.substr(i + start.size(), json.find('"', i + start.size()) - i - start.size());
}

static std::string refusal_by_check(const std::string & path) {
    std::string json;
    if (dsv4_check_file(path.c_str(), json) == 0) {
        return "ok";
    }
    return json_field(json, "kind") + " " + json_field(json, "tensor") + " " + json_field(json, "key");
}

static void check_refused(const char * what, const std::string & path, const std::string & expected) {
    const std::string by_check  = refusal_by_check(path);
    const std::string by_loader = refusal_by_loader(path);
    CHECK(by_check  == expected, "%s: the check says '%s', not '%s'",  what, by_check.c_str(),  expected.c_str());
    CHECK(by_loader == expected, "%s: the loader says '%s', not '%s'", what, by_loader.c_str(), expected.c_str());
}

static void check_refused(const char * what, const file_spec & f, const std::string & expected) {
    check_refused(what, write_file(f), expected);
}

struct model {
    llama_model * m = nullptr;

    explicit model(const std::string & path) {
        llama_model_params params = llama_model_default_params();
        params.use_extra_bufts = false;
        m = llama_model_load_from_file(path.c_str(), params);
    }
    ~model() { llama_model_free(m); }
    model(const model &) = delete;
};

// --- tests ---

// All names of the published file, from a list that was not made by this code.
static void test_names() {
    const char * list = "tests/data/flash-tensors.tsv"; // tests run in the source folder
    std::ifstream file(list);
    CHECK(file.good(), "cannot read %s", list);

    std::set<std::string> natives;
    std::set<std::string> upstreams;
    size_t n_renamed = 0;
    for (std::string line; std::getline(file, line); ) {
        if (line.empty() || line[0] == '#') {
            continue;
        }
        std::vector<std::string> cells;
        std::stringstream row(line);
        for (std::string cell; std::getline(row, cell, '\t'); ) {
            cells.push_back(cell);
        }
        const bool is_layer = !cells[2].empty();
        const int  first = is_layer ? std::stoi(cells[2]) : 0;
        const int  last  = is_layer ? std::stoi(cells[3]) : 0;
        const int  step  = is_layer ? std::stoi(cells[4]) : 1;
        for (int il = first; il <= last; il += step) {
            const auto name = [&](const std::string & pattern) {
                return is_layer ? "blk." + std::to_string(il) + pattern.substr(strlen("blk.N")) : pattern;
            };
            const std::string native   = name(cells[0]);
            const std::string upstream = name(cells[1]);
            natives.insert(native);
            upstreams.insert(upstream);
            CHECK(dsv4_native_to_upstream(native) == upstream, "%s", native.c_str());
            CHECK(dsv4_upstream_to_native(upstream) == native, "%s", upstream.c_str());
            if (native == upstream) {
                CHECK(dsv4_name_form(native) == DSV4_FORM_BOTH, "%s", native.c_str());
            } else {
                CHECK(dsv4_name_form(native)   == DSV4_FORM_NATIVE,   "%s", native.c_str());
                CHECK(dsv4_name_form(upstream) == DSV4_FORM_UPSTREAM, "%s", upstream.c_str());
                n_renamed++;
            }
        }
    }
    CHECK(natives.size() == 1328 && upstreams.size() == 1328, "%zu native and %zu upstream names", natives.size(), upstreams.size());
    CHECK(n_renamed == 638, "%zu names differ", n_renamed);

    for (const char * name : { "", "blk.", "attn_sinks", ".attn_sinks", "blk.attn_sinks", "blk..attn_sinks", "blk.x.attn_sinks",
                               "blk.1attn_sinks", "blk.1.attn_sink", "blk.1.hc_head_fn", "xblk.1.attn_sinks", "blk.1.2.attn_sinks" }) {
        CHECK(dsv4_name_form(name) == DSV4_FORM_BOTH && dsv4_native_to_upstream(name) == name &&
              dsv4_upstream_to_native(name) == name, "'%s'", name);
    }
}

static void check_derived(const loader & l) {
    CHECK(l.u32("deepseek4.attention.output_group_count") == 2, "%u", l.u32("deepseek4.attention.output_group_count"));
    CHECK(l.u32("deepseek4.attention.output_lora_rank") == 64, "%u", l.u32("deepseek4.attention.output_lora_rank"));
    CHECK(l.f32("deepseek4.attention.compress_rope_freq_base") == 150000.0f, "%f", l.f32("deepseek4.attention.compress_rope_freq_base"));
    CHECK(l.arr<int32_t>("deepseek4.attention.compress_ratios") == (std::vector<int32_t> { 0, 4, 128 }), "ratios");
    CHECK(l.u32("deepseek4.hyper_connection.count") == 4, "%u", l.u32("deepseek4.hyper_connection.count"));
    CHECK(l.u32("deepseek4.hyper_connection.sinkhorn_iterations") == 20, "%u", l.u32("deepseek4.hyper_connection.sinkhorn_iterations"));
    CHECK(l.f32("deepseek4.hyper_connection.epsilon") == 1e-6f, "%g", l.f32("deepseek4.hyper_connection.epsilon"));
    CHECK(l.u32("deepseek4.hash_layer_count") == 1, "%u", l.u32("deepseek4.hash_layer_count"));
    CHECK(l.u32("deepseek4.expert_gating_func") == 4, "%u", l.u32("deepseek4.expert_gating_func"));
    CHECK(l.arr<float>("deepseek4.swiglu_clamp_shexp") == std::vector<float>(3, 10.0f), "clamp");
}

static void test_native_file() {
    const file_spec f = native_model();
    const std::string path = write_file(f);
    CHECK(refusal_by_check(path) == "ok", "%s", refusal_by_check(path).c_str());

    loader l(path);
    check_derived(l);
    CHECK(l.f32("deepseek4.rope.scaling.factor") == 8.0f, "%f", l.f32("deepseek4.rope.scaling.factor"));
    CHECK(l.ml->n_tensors == int(f.tensors.size()), "%d tensors", l.ml->n_tensors);
    CHECK(l.ml->n_kv == int(f.keys.size()) + 10, "%d keys", l.ml->n_kv);
    uint64_t offset = 0;
    for (const tensor & t : f.tensors) {
        const std::string name = dsv4_native_to_upstream(t.name);
        const auto * w = l.ml->get_weight(name.c_str());
        CHECK(w && ggml_get_name(w->tensor) == name, "%s", name.c_str());
        CHECK(w && w->offs % 32 == 0 && (offset == 0 || w->offs > offset), "%s has moved", name.c_str());
        CHECK(w && (t.type != T_42 || w->tensor->type == GGML_TYPE_F8_E4M3_B128), "%s", name.c_str());
        offset = w ? w->offs : offset;
        CHECK(name == t.name || !l.ml->get_weight(t.name.c_str()), "%s is still there", t.name.c_str());
    }

    model m(path);
    CHECK(m.m, "the model does not load");
    CHECK(m.m && llama_vocab_n_tokens(llama_model_get_vocab(m.m)) == N_VOCAB, "size of the absent vocabulary");
    CHECK(m.m && m.m->hparams.dsv4_compress_ratios[1] == 4 && m.m->hparams.dsv4_compress_ratios[2] == 128, "ratios");
}

// The published file has the rope.scaling group, its sibling does not.
static void test_without_rope_scaling() {
    file_spec f = native_model();
    f.drop(".rope.scaling.");
    {
        loader l(write_file(f));
        check_derived(l);
        CHECK(l.str("deepseek4.rope.scaling.type") == "yarn", "%s", l.str("deepseek4.rope.scaling.type").c_str());
        CHECK(l.f32("deepseek4.rope.scaling.factor") == 16.0f, "factor");
        CHECK(l.u32("deepseek4.rope.scaling.original_context_length") == 65536, "context");
        CHECK(l.f32("deepseek4.rope.scaling.yarn_beta_fast") == 32.0f, "fast");
        CHECK(l.f32("deepseek4.rope.scaling.yarn_beta_slow") == 1.0f, "slow");
    }
    // only as a group
    f.set("deepseek4.rope.scaling.yarn_beta_slow", 2.0f);
    loader l(write_file(f));
    CHECK(!l.has("deepseek4.rope.scaling.type") && !l.has("deepseek4.rope.scaling.factor"), "completed a group");
    CHECK(l.f32("deepseek4.rope.scaling.yarn_beta_slow") == 2.0f, "overwritten");

    file_spec no_base = native_model();
    loader l2(write_file(no_base.drop(".rope.freq_base_swa")));
    CHECK(l2.f32("deepseek4.attention.compress_rope_freq_base") == 160000.0f, "default base");
}

static void test_present_keys_stay() {
    file_spec f = native_model();
    add_upstream_keys(f);
    loader l(write_file(f));
    CHECK(l.ml->n_kv == int(f.keys.size()), "%d keys", l.ml->n_kv);
    CHECK(l.u32("deepseek4.hyper_connection.sinkhorn_iterations") == 7, "iterations");
    CHECK(l.f32("deepseek4.hyper_connection.epsilon") == 1e-5f, "epsilon");
    CHECK(l.f32("deepseek4.attention.compress_rope_freq_base") == 123456.0f, "base");
    CHECK(l.arr<int32_t>("deepseek4.attention.compress_ratios").size() == 4, "ratios");
    CHECK(l.f32("deepseek4.swiglu_clamp_shexp") == 5.0f, "clamp");
}

// Names and keys do not depend on the types of the weights.
static void test_other_types_in_the_native_dialect() {
    for (int32_t type : { T_Q8_0, T_BF16, T_F32, int32_t(GGML_TYPE_Q4_0) }) {
        file_spec f = native_model();
        for (tensor & t : f.tensors) {
            t.type = t.type == T_42 ? type : t.type;
        }
        loader l(write_file(f));
        check_derived(l);
        CHECK(l.ml->get_weight("blk.1.attn_kv.weight"), "type %d", type);
    }
    // stock Q2_0 has id 42 too
    file_spec f = native_model();
    for (tensor & t : f.tensors) {
        t.stride = 36;
    }
    loader l(write_file(f));
    check_derived(l);
    const auto * w = l.ml->get_weight("blk.1.attn_kv.weight");
    CHECK(w && w->tensor->type == GGML_TYPE_Q2_0, "type %s", w ? ggml_type_name(w->tensor->type) : "?");
}

static void test_chat_template() {
    const std::string key = "tokenizer.chat_template";
    const std::string v4  = dsv4_chat_template;
    CHECK(v4.find("dsml_token") != std::string::npos && v4.size() > 5000, "the compiled-in template has %zu bytes", v4.size());
    const std::string extended = dsv4_extend_template(v4);
    CHECK(dsv4_is_extended_template(extended) && !dsv4_is_extended_template(v4), "DeepSeek's other roles are added");
    CHECK(dsv4_extend_template(extended) == extended, "they are added once");

    file_spec f = native_model({ 0, 4, 128 }, true);
    CHECK(loader(write_file(f)).str(key) == extended, "the writer's short template is kept");

    f.set(key, std::string("{% set dsml_token = '|DSML|' %}mine"));
    CHECK(loader(write_file(f)).str(key) == "{% set dsml_token = '|DSML|' %}mine", "a V4 template is replaced");

    f.drop(key);
    CHECK(loader(write_file(f)).str(key) == extended, "no template is given");

    CHECK(!loader(write_file(native_model())).has(key), "a template without a vocabulary");

    file_spec up = upstream_model(true);
    CHECK(loader(write_file(up)).str(key) != extended, "an upstream file's template is replaced");
}

static void check_untouched(const char * what, const file_spec & f) {
    loader l(write_file(f));
    CHECK(l.ml->n_kv == int(f.keys.size()), "%s: %d keys", what, l.ml->n_kv);
    for (const tensor & t : f.tensors) {
        const auto * w = l.ml->get_weight(t.name.c_str());
        CHECK(w && ggml_get_name(w->tensor) == t.name, "%s: %s", what, t.name.c_str());
    }
}

static void test_files_that_are_not_native() {
    check_untouched("upstream dialect", upstream_model());

    // upstream's own saver writes the grouped view
    file_spec grouped = upstream_model();
    for (int il = 0; il < 3; ++il) {
        grouped.at("blk." + std::to_string(il) + ".attn_output_a.weight").ne = { 256, 64, 2 };
    }
    check_untouched("grouped output", grouped);

    // whatever the tensors are called, and however incomplete
    file_spec other = native_model();
    other.set("general.architecture", std::string("llama"));
    check_untouched("another architecture", other);
    other.tensors.resize(20);
    other.drop("deepseek4.");
    check_untouched("another architecture, incomplete", other);

    // a bare vocabulary is read by tools
    file_spec vocab;
    vocab.set("general.architecture", std::string("deepseek4"));
    vocab.set("tokenizer.ggml.model", std::string("none"));
    check_untouched("bare vocabulary", vocab);
}

static void test_refused_names_and_tensors() {
    file_spec f = native_model();
    f.at("blk.1.hc_attn_fn").name = "blk.1.hc_attn_fn.weight";
    check_refused("mixed names", f, "DialectError blk.1.hc_attn_fn.weight ");

    check_refused("no norm", native_model().remove("blk.2.ffn_norm.weight"), "MissingTensorError blk.2.ffn_norm.weight ");
    check_refused("no bias", native_model().remove("blk.1.exp_probs_b"), "MissingTensorError blk.1.exp_probs_b ");
    check_refused("no source of a key", native_model().remove("hc_head_base"), "MissingTensorError hc_head_base ");
    check_refused("no positional table", native_model().remove("blk.1.attn_compress_ape"), "MissingTensorError blk.1.attn_compress_ape ");
    check_refused("no tensor, upstream's name", upstream_model().remove("blk.0.hc_ffn_fn.weight"), "MissingTensorError blk.0.hc_ffn_fn.weight ");

    const auto with_dims = [](const char * name, std::vector<int64_t> ne) {
        file_spec g = native_model();
        g.at(name).ne = std::move(ne);
        return g;
    };
    check_refused("dims", with_dims("blk.0.attn_q_b.weight", { 256, 512 }), "TensorShapeError blk.0.attn_q_b.weight ");
    check_refused("one dimension more", with_dims("blk.0.attn_norm.weight", { 256, 2 }), "TensorShapeError blk.0.attn_norm.weight ");
    check_refused("no elements", with_dims("blk.1.exp_probs_b", { 0 }), "TensorShapeError blk.1.exp_probs_b ");
    check_refused("groups", with_dims("blk.0.attn_output_a.weight", { 384, 256 }), "TensorShapeError blk.0.attn_output_a.weight ");
    check_refused("ratio", with_dims("blk.2.attn_compress_ape", { 256, 64 }), "TensorShapeError blk.2.attn_compress_ape ");
    check_refused("streams", with_dims("hc_head_base", { 3 }), "TensorShapeError hc_head_base ");

    const auto with_type = [](const char * name, int32_t type) {
        file_spec g = native_model();
        g.at(name).type = type;
        return g;
    };
    check_refused("ids as floats", with_type("blk.0.ffn_gate_tid2eid", T_F32), "TensorShapeError blk.0.ffn_gate_tid2eid ");
    check_refused("norm in BF16", with_type("blk.0.attn_norm.weight", T_BF16), "TensorShapeError blk.0.attn_norm.weight ");
    check_refused("weight in I32", with_type("blk.0.attn_kv_latent.weight", T_I32), "TensorShapeError blk.0.attn_kv_latent.weight ");
    check_refused("weight in Q8_1", with_type("blk.0.attn_kv_latent.weight", GGML_TYPE_Q8_1), "TensorShapeError blk.0.attn_kv_latent.weight ");

    file_spec extra = native_model();
    extra.tensors.push_back({ "blk.0.engram.weight", T_F32, { 4 } });
    check_refused("unknown tensor", extra, "UnsupportedModelError blk.0.engram.weight ");

    file_spec bias = native_model();
    bias.tensors.push_back({ "blk.0.exp_probs_b_vl.bias", T_F32, { 4 } });
    CHECK(refusal_by_check(write_file(bias)) == "ok", "the vision variant's bias");

    file_spec mtp = upstream_model();
    mtp.set("deepseek4.nextn_predict_layers", uint32_t(1));
    mtp.tensors.push_back({ "blk.2.nextn.eh_proj.weight", T_F32, { 512, 256 } });
    CHECK(refusal_by_check(write_file(mtp)) == "UnsupportedModelError blk.2.nextn.eh_proj.weight ", "%s", refusal_by_check(write_file(mtp)).c_str());
    CHECK(refusal_by_loader(write_file(mtp)) == "ok", "prediction layers are upstream's business");
}

static void test_refused_keys() {
    const std::string p = "deepseek4.";
    const auto with = [&](const std::string & key, const value & v) {
        file_spec f = native_model();
        return f.set(p + key, v);
    };
    const auto without = [&](const std::string & key) {
        file_spec f = native_model();
        return f.drop(p + key);
    };
    check_refused("V4.1", native_model().set("general.architecture", std::string("deepseek41")), "UnsupportedModelError  general.architecture");
    CHECK(refusal_by_check(write_file(native_model().set("general.architecture", std::string("llama")))) ==
        "UnsupportedModelError  general.architecture", "another architecture");

    check_refused("no layers key", without("block_count"), "MissingKeyError  deepseek4.block_count");
    check_refused("no indexer", without("attention.indexer.top_k"), "MissingKeyError  deepseek4.attention.indexer.top_k");
    check_refused("u16", with("block_count", uint16_t(3)), "MissingKeyError  deepseek4.block_count");
    check_refused("upstream file without groups", upstream_model().drop("output_group_count"), "MissingKeyError  deepseek4.attention.output_group_count");

    // each of these ends in an assert or a division by zero in upstream's loader or graph
    for (const auto & [key, v] : std::vector<std::pair<std::string, value>> {
            { "block_count",                              uint32_t(0) },
            { "block_count",                              uint32_t(513) },
            { "attention.head_count",                     uint32_t(0) },
            { "attention.head_count_kv",                  uint32_t(2) },
            { "attention.output_group_count",             uint32_t(0) },
            { "attention.output_group_count",             uint32_t(3) },
            { "attention.layer_norm_rms_epsilon",         -1.0f },
            { "rope.scaling.type",                        std::string("spiral") },
            { "rope.dimension_count",                     uint32_t(63) },
            { "rope.dimension_count",                     uint32_t(512) },
            { "attention.indexer.key_length",             uint32_t(96) },
            { "expert_count",                             uint32_t(1) },
            { "expert_count",                             uint32_t(1025) },
            { "expert_group_count",                       uint32_t(4) },
            { "expert_used_count",                        uint32_t(0) },
            { "swiglu_clamp_exp",                         std::vector<float>(2, 1.0f) },
            { "attention.compress_ratios",                std::vector<int32_t> { 0, 4 } },
            { "attention.compress_ratios",                std::vector<int32_t>(513, 0) },
            { "attention.compress_ratios",                std::vector<int32_t> { 0, 4, 7 } },
            { "hyper_connection.count",                   uint32_t(3) },
            { "hyper_connection.sinkhorn_iterations",     uint32_t(0) },
            { "hash_layer_count",                         uint32_t(4) },
            { "expert_gating_func",                       uint32_t(2) },
            { "nextn_predict_layers",                     uint32_t(4) },
            { "attention.key_length_swa",                 uint32_t(64) },
            { "attention.causal",                         false } }) {
        check_refused(key.c_str(), with(key, v), "FormatError  deepseek4." + key);
    }

    file_spec vocab = native_model({ 0, 4, 128 }, true);
    std::vector<std::string> tokens(N_VOCAB, "same");
    check_refused("equal tokens", vocab.set("tokenizer.ggml.tokens", tokens), "FormatError  tokenizer.ggml.tokens");
    vocab = native_model({ 0, 4, 128 }, true);
    check_refused("end of text", vocab.set("tokenizer.ggml.eos_token_id", uint32_t(N_VOCAB)), "FormatError  tokenizer.ggml.eos_token_id");
    check_refused("flag as a number", vocab.set("tokenizer.ggml.eos_token_id", uint32_t(1)).set("tokenizer.ggml.add_bos_token", 1.0f),
        "MissingKeyError  tokenizer.ggml.add_bos_token");

    file_spec tight = native_model();
    tight.set("general.alignment", uint32_t(16));
    tight.tensors.resize(1); // of several, the padding to 32 that is written here would be too much
    check_refused("alignment", tight, "FormatError  general.alignment");
}

static void test_refused_type_42() {
    file_spec f = native_model();
    f.at("blk.1.attn_q_a.weight").stride = 36;
    check_refused("mixed meanings", f, "Type42Error blk.1.attn_q_a.weight ");

    const auto all = [](int stride) {
        file_spec g = native_model();
        for (tensor & t : g.tensors) {
            t.stride = stride;
        }
        return write_file(g);
    };
    CHECK(refusal_by_check(all(34)) == "Type42Error blk.0.attn_kv_latent.weight ", "%s", refusal_by_check(all(34)).c_str());
    CHECK(refusal_by_check(all(100)) == "Type42Error blk.0.attn_kv_latent.weight ", "%s", refusal_by_check(all(100)).c_str());
    CHECK(refusal_by_loader(all(34)).find("other: ") == 0, "%s", refusal_by_loader(all(34)).c_str());

    // the parser accepts data missing at the end
    const std::string cut = write_file(native_model(), "model.gguf", 1000);
    CHECK(refusal_by_check(cut) == "TruncatedFileError output_norm.weight ", "%s", refusal_by_check(cut).c_str());
    CHECK(refusal_by_loader(cut).find("other: ") == 0, "%s", refusal_by_loader(cut).c_str());
}

static void test_unreadable_files() {
    CHECK(refusal_by_check((g_folder/"absent.gguf").string()) == "ModelNotFoundError  ", "absent");
    CHECK(refusal_by_check(g_folder.string()) == "ModelFileError  ", "folder");
    const std::string path = (g_folder/"bytes.gguf").string();
    for (const auto & [bytes, kind] : { std::make_pair("", "NotGGUFError"), std::make_pair("GG", "NotGGUFError"),
            std::make_pair("PK\3\4 and so on", "NotGGUFError"), std::make_pair("GGUF\3", "TruncatedFileError") }) {
        std::ofstream(path, std::ios::binary) << bytes;
        CHECK(refusal_by_check(path) == std::string(kind) + "  ", "'%s': %s", bytes, refusal_by_check(path).c_str());
    }
}

static std::string write_shards(const std::string & stem, file_spec f, const std::function<void(file_spec &, file_spec &)> & change) {
    file_spec second;
    second.tensors.assign(f.tensors.begin() + 20, f.tensors.end());
    f.tensors.resize(20);
    for (file_spec * s : { &f, &second }) {
        s->set("split.count", uint16_t(2));
        s->set("split.tensors.count", int32_t(f.tensors.size() + second.tensors.size()));
        s->set("split.no", uint16_t(s == &second));
    }
    change(f, second);
    write_file(second, stem + "-00002-of-00002.gguf");
    return write_file(f, stem + "-00001-of-00002.gguf");
}

static void test_shards() {
    const file_spec whole = native_model();
    {
        const std::string path = write_shards("ok", whole, [](file_spec &, file_spec &) {});
        CHECK(refusal_by_check(path) == "ok", "%s", refusal_by_check(path).c_str());
        loader l(path);
        check_derived(l);
        CHECK(l.ml->n_tensors == int(whole.tensors.size()), "%d tensors", l.ml->n_tensors);
        CHECK(l.ml->get_weight("output_hc_fn.weight") && l.ml->get_weight("output_hc_fn.weight")->idx == 1, "second shard");
    }
    check_refused("mixed across shards", write_shards("mixed", whole, [](file_spec &, file_spec & second) {
        for (tensor & t : second.tensors) {
            t.stride = 36;
        }
    }), "Type42Error blk.1.indexer.attn_q_b.weight ");

    // an assert in upstream
    const std::string typed = write_shards("typed", whole, [](file_spec &, file_spec & second) { second.set("split.no", uint32_t(1)); });
    CHECK(refusal_by_check(typed) == "MissingKeyError  split.no", "%s", refusal_by_check(typed).c_str());
    CHECK(refusal_by_loader(typed).find("other: missing key split.no") == 0, "%s", refusal_by_loader(typed).c_str());

    const std::string number = write_shards("number", whole, [](file_spec &, file_spec & second) { second.set("split.no", uint16_t(2)); });
    CHECK(refusal_by_check(number) == "FormatError  split.no", "%s", refusal_by_check(number).c_str());

    const std::string absent = write_shards("absent", whole, [](file_spec &, file_spec &) {});
    fs::remove(g_folder/"absent-00002-of-00002.gguf");
    CHECK(refusal_by_check(absent) == "ModelNotFoundError  ", "%s", refusal_by_check(absent).c_str());

    const std::string twice = write_shards("twice", whole, [](file_spec & first, file_spec & second) { second.tensors[0] = first.tensors[0]; });
    CHECK(refusal_by_check(twice) == "FormatError token_embd.weight ", "%s", refusal_by_check(twice).c_str());
}

// Damage that no header shows: upstream asserts on it while it computes.
static void test_expert_ids() {
    const std::string path = write_file(native_model());
    loader l(path);
    const uint64_t offs = l.ml->get_weight("blk.0.ffn_gate_tid2eid.weight")->offs;
    for (int32_t id : { 4, -1, INT32_MAX }) {
        {
            std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
            file.seekp(offs + (N_VOCAB*2 - 1)*sizeof(id));
            file.write((const char *) &id, sizeof(id));
        }
        const std::string found = refusal_by_loader(path);
        CHECK(found == "FormatError blk.0.ffn_gate_tid2eid ", "id %d: %s", id, found.c_str());
    }
}

static void test_message_and_json() {
    file_spec f = native_model();
    f.tensors.push_back({ "\xC3\xA9 \xEF\xBD\x9C \xFF \xED\xA0\x80 \"\\\n", T_F32, { 4 } });
    const std::string path = write_file(f);
    std::string json;
    CHECK(dsv4_check_file(path.c_str(), json) == 1, "accepted");
    CHECK(json.find("\"tensor\": \"\xC3\xA9 \xEF\xBD\x9C \\udcff \\udced\\udca0\\udc80 \\u0022\\u005c\\u000a\"") != std::string::npos, "%s", json.c_str());
    CHECK(json.find("\"key\": null") != std::string::npos && json.find("{\"ok\": false") == 0, "%s", json.c_str());

    CHECK(dsv4_check_file(write_file(native_model()).c_str(), json) == 0, "refused: %s", json.c_str());
    CHECK(json.find("{\"ok\": true, \"dialect\": \"native\"") == 0, "%s", json.c_str());
    CHECK(json.find("\"deepseek4.attention.compress_ratios\": [0, 4, 128]") != std::string::npos, "%s", json.c_str());

    const std::string text = dsv4_refusal(DSV4_TENSOR_SHAPE, { "file", "T", "K", "what", "F", "E", "Hint" }).what();
    CHECK(text == "file: what (tensor 'T', key 'K'); found F, expected E. Hint", "%s", text.c_str());
}

// From a native file the quantiser writes the names that all readers know.
static void test_quantiser() {
    const std::string in  = write_file(native_model(), "in.gguf");
    const std::string out = (g_folder/"out.gguf").string();
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.only_copy = true;
    params.nthread   = 1;
    CHECK(llama_model_quantize(in.c_str(), out.c_str(), &params) == 0, "failed");
    std::string json;
    CHECK(dsv4_check_file(out.c_str(), json) == 0 && json.find("\"dialect\": \"upstream\"") != std::string::npos, "%s", json.c_str());
}

// Upstream divides by zero for an indexer cache without layers.
static void test_models_without_some_ratio() {
    for (const std::vector<int32_t> & ratios : { std::vector<int32_t> { 0 }, { 4 }, { 128 }, { 0, 128 } }) {
        model m(write_file(native_model(ratios)));
        llama_context_params params = llama_context_default_params();
        params.n_ctx     = 256;
        params.n_threads = params.n_threads_batch = 1;
        llama_context * ctx = m.m ? llama_init_from_model(m.m, params) : nullptr;
        CHECK(ctx, "ratio %d", ratios[0]);
        llama_token token = 1;
        CHECK(ctx && llama_decode(ctx, llama_batch_get_one(&token, 1)) == 0, "ratio %d", ratios[0]);
        llama_free(ctx);
    }
}

#ifdef __linux__
// resident bytes of the mapping of a file
static size_t resident_bytes(const std::string & path) {
    std::ifstream maps("/proc/self/smaps");
    size_t kb = 0;
    bool is_ours = false;
    for (std::string line; std::getline(maps, line); ) {
        if (line.find(" kB") == std::string::npos && line.find("VmFlags") == std::string::npos && line.find('-') != std::string::npos) {
            is_ours = line.find(path) != std::string::npos;
        } else if (is_ours && line.compare(0, 4, "Rss:") == 0) {
            kb += std::stoul(line.substr(4));
        }
    }
    return kb*1024;
}

static void test_mapping() {
    const std::string path = write_file(native_model(), "mapped.gguf");
    const size_t size = fs::file_size(path);

    CHECK(!dsv4_mmap_prefetch(), "prefetching is on by default");
    {
        model m(path);
        CHECK(m.m && resident_bytes(path) < size/4, "%zu of %zu bytes were read by loading", resident_bytes(path), size);
    }
    dsv4_set_mmap_prefetch(true);
    {
        model m(path);
        CHECK(m.m && resident_bytes(path) > size/2, "%zu of %zu bytes: this test sees nothing", resident_bytes(path), size);
    }
    dsv4_set_mmap_prefetch(false);
}
#endif

int main() {
    std::string name = (fs::temp_directory_path()/"test-dsv4-dialect-XXXXXX").string();
    if (!mkdtemp(name.data())) {
        std::perror("mkdtemp");
        return 1;
    }
    g_folder = name;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    const std::pair<const char *, void (*)()> tests[] = {
        { "names",                             test_names },
        { "native file",                       test_native_file },
        { "without rope.scaling",              test_without_rope_scaling },
        { "present keys stay",                 test_present_keys_stay },
        { "other types in the native dialect", test_other_types_in_the_native_dialect },
        { "chat template",                     test_chat_template },
        { "files that are not native",         test_files_that_are_not_native },
        { "refused names and tensors",         test_refused_names_and_tensors },
        { "refused keys",                      test_refused_keys },
        { "refused type 42",                   test_refused_type_42 },
        { "unreadable files",                  test_unreadable_files },
        { "shards",                            test_shards },
        { "expert ids",                        test_expert_ids },
        { "message and JSON",                  test_message_and_json },
        { "quantiser",                         test_quantiser },
        { "models without some ratio",         test_models_without_some_ratio },
#ifdef __linux__
        { "mapping",                           test_mapping },
#endif
    };
    for (const auto & [title, test] : tests) {
        try {
            test();
        } catch (const std::exception & err) {
            CHECK(false, "%s threw: %s", title, err.what());
        }
    }

    fs::remove_all(g_folder);
    return check_result("test-dsv4-dialect");
}
