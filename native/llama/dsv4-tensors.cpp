#include "dsv4-tensors.h"

#include "dsv4-refusal.h"

#include <string>
#include <unordered_set>
#include <vector>

namespace {

enum type_class {
    TYPE_F32,    // read element by element: norms, sinks, biases, hyper-connection scales
    TYPE_I32,    // expert ids
    TYPE_WEIGHT, // a factor of a product or a table of rows: any type with a decoder
};

// sizes of one layer that the rows below refer to
struct layer_dims {
    layer_dims(const dsv4_hparams & hp, int64_t il) :
        ratio(hp.compress_ratios[il]), is_hash(il < hp.n_hash_layer),
        d(hp.n_embd), heads(hp.n_head), head(hp.head_dim), q(hp.n_head*hp.head_dim), q_lora(hp.q_lora_rank),
        o_in(q/hp.o_groups), o_groups(hp.o_groups), o_rank(hp.o_lora_rank), o_mid(hp.o_groups*hp.o_lora_rank),
        pooled(hp.head_dim*(ratio == 4 ? 2 : 1)),
        ix_heads(hp.indexer_n_head), ix_head(hp.indexer_head_dim), ix_pooled(2*hp.indexer_head_dim),
        ff(hp.n_ff_exp), ff_shared(hp.n_ff_exp*hp.n_expert_shared), experts(hp.n_expert), used(hp.n_expert_used),
        vocab(hp.n_vocab), hc(hp.hc_count), hc_in(hp.hc_count*hp.n_embd), hc_mix(hp.hc_count*(hp.hc_count + 2)) {
    }

    int64_t ratio;
    bool    is_hash;
    int64_t d, heads, head, q, q_lora;
    int64_t o_in, o_groups, o_rank, o_mid;
    int64_t pooled; // width of a compressor's projections: windows of ratio 4 overlap by one
    int64_t ix_heads, ix_head, ix_pooled;
    int64_t ff, ff_shared, experts, used;
    int64_t vocab;
    int64_t hc, hc_in, hc_mix;
};

using dims_fn = std::vector<int64_t> (*)(const layer_dims &);
using cond_fn = bool (*)(const layer_dims &);

struct row {
    const char * name; // upstream's, without "blk.N."
    type_class   type;
    cond_fn      present;
    dims_fn      dims;
};

bool always    (const layer_dims &)     { return true; }
bool compressed(const layer_dims & s)   { return s.ratio != 0; }
bool indexed   (const layer_dims & s)   { return s.ratio == 4; }
bool hashed    (const layer_dims & s)   { return s.is_hash; }
bool biased    (const layer_dims & s)   { return !s.is_hash; }

using S = const layer_dims &;
using D = std::vector<int64_t>;

// in the native file's order
const row LAYER_ROWS[] = {
    { "attn_sinks.weight",                TYPE_F32,    always,     [](S s) { return D { s.heads }; } },
    { "attn_compressor_ape.weight",       TYPE_WEIGHT, compressed, [](S s) { return D { s.pooled, s.ratio }; } },
    { "attn_compressor_norm.weight",      TYPE_F32,    compressed, [](S s) { return D { s.head }; } },
    { "attn_compressor_gate.weight",      TYPE_WEIGHT, compressed, [](S s) { return D { s.d, s.pooled }; } },
    { "attn_compressor_kv.weight",        TYPE_WEIGHT, compressed, [](S s) { return D { s.d, s.pooled }; } },
    { "indexer_compressor_ape.weight",    TYPE_WEIGHT, indexed,    [](S s) { return D { s.ix_pooled, 4 }; } },
    { "indexer_compressor_norm.weight",   TYPE_F32,    indexed,    [](S s) { return D { s.ix_head }; } },
    { "indexer_compressor_gate.weight",   TYPE_WEIGHT, indexed,    [](S s) { return D { s.d, s.ix_pooled }; } },
    { "indexer_compressor_kv.weight",     TYPE_WEIGHT, indexed,    [](S s) { return D { s.d, s.ix_pooled }; } },
    { "indexer.proj.weight",              TYPE_WEIGHT, indexed,    [](S s) { return D { s.d, s.ix_heads }; } },
    { "indexer.attn_q_b.weight",          TYPE_WEIGHT, indexed,    [](S s) { return D { s.q_lora, s.ix_heads*s.ix_head }; } },
    { "attn_kv_a_norm.weight",            TYPE_F32,    always,     [](S s) { return D { s.head }; } },
    { "attn_q_a_norm.weight",             TYPE_F32,    always,     [](S s) { return D { s.q_lora }; } },
    { "attn_kv.weight",                   TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.head }; } },
    { "attn_output_a.weight",             TYPE_WEIGHT, always,     [](S s) { return D { s.o_in, s.o_mid }; } },
    { "attn_output_b.weight",             TYPE_WEIGHT, always,     [](S s) { return D { s.o_mid, s.d }; } },
    { "attn_q_a.weight",                  TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.q_lora }; } },
    { "attn_q_b.weight",                  TYPE_WEIGHT, always,     [](S s) { return D { s.q_lora, s.q }; } },
    { "attn_norm.weight",                 TYPE_F32,    always,     [](S s) { return D { s.d }; } },
    { "ffn_down_exps.weight",             TYPE_WEIGHT, always,     [](S s) { return D { s.ff, s.d, s.experts }; } },
    { "ffn_gate_exps.weight",             TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.ff, s.experts }; } },
    { "ffn_up_exps.weight",               TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.ff, s.experts }; } },
    { "ffn_gate_tid2eid.weight",          TYPE_I32,    hashed,     [](S s) { return D { s.used, s.vocab }; } },
    { "exp_probs_b.bias",                 TYPE_F32,    biased,     [](S s) { return D { s.experts }; } },
    { "ffn_gate_inp.weight",              TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.experts }; } },
    { "ffn_gate_shexp.weight",            TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.ff_shared }; } },
    { "ffn_down_shexp.weight",            TYPE_WEIGHT, always,     [](S s) { return D { s.ff_shared, s.d }; } },
    { "ffn_up_shexp.weight",              TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.ff_shared }; } },
    { "ffn_norm.weight",                  TYPE_F32,    always,     [](S s) { return D { s.d }; } },
    { "hc_attn_base.weight",              TYPE_F32,    always,     [](S s) { return D { s.hc_mix }; } },
    { "hc_attn_fn.weight",                TYPE_WEIGHT, always,     [](S s) { return D { s.hc_in, s.hc_mix }; } },
    { "hc_attn_scale.weight",             TYPE_F32,    always,     [](S)   { return D { 3 }; } },
    { "hc_ffn_base.weight",               TYPE_F32,    always,     [](S s) { return D { s.hc_mix }; } },
    { "hc_ffn_fn.weight",                 TYPE_WEIGHT, always,     [](S s) { return D { s.hc_in, s.hc_mix }; } },
    { "hc_ffn_scale.weight",              TYPE_F32,    always,     [](S)   { return D { 3 }; } },
};

const row TOP_ROWS_FIRST[] = {
    { "token_embd.weight",                TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.vocab }; } },
};

const row TOP_ROWS_LAST[] = {
    { "output_hc_base.weight",            TYPE_F32,    always,     [](S s) { return D { s.hc }; } },
    { "output_hc_fn.weight",              TYPE_WEIGHT, always,     [](S s) { return D { s.hc_in, s.hc }; } },
    { "output_hc_scale.weight",           TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "output.weight",                    TYPE_WEIGHT, always,     [](S s) { return D { s.d, s.vocab }; } },
    { "output_norm.weight",               TYPE_F32,    always,     [](S s) { return D { s.d }; } },
};

// tensors that upstream's loader takes when a file has them
const row OPTIONAL_LAYER_ROWS[] = {
    { "exp_probs_b_vl.bias",              TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
    { "ffn_gate_shexp.scale",             TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "ffn_down_shexp.scale",             TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "ffn_up_shexp.scale",               TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "ffn_gate_shexp.input_scale",       TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "ffn_down_shexp.input_scale",       TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "ffn_up_shexp.input_scale",         TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "ffn_gate_exps.scale",              TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
    { "ffn_down_exps.scale",              TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
    { "ffn_up_exps.scale",                TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
    { "ffn_gate_exps.input_scale",        TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
    { "ffn_down_exps.input_scale",        TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
    { "ffn_up_exps.input_scale",          TYPE_F32,    always,     [](S s) { return D { s.experts }; } },
};

const row OPTIONAL_TOP_ROWS[] = { // upstream reads them for an NVFP4 head only
    { "output.scale",                     TYPE_F32,    always,     [](S)   { return D { 1 }; } },
    { "output.input_scale",               TYPE_F32,    always,     [](S)   { return D { 1 }; } },
};

const char * type_class_str(type_class type) {
    switch (type) {
        case TYPE_F32: return "f32";
        case TYPE_I32: return "i32";
        default:       return "f32, f16, bf16 or a quantised type that the engine can decode";
    }
}

// whether the CPU can multiply with such a weight and gather its rows
bool is_weight_type(enum ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

bool is_of(type_class cls, enum ggml_type type) {
    switch (cls) {
        case TYPE_F32: return type == GGML_TYPE_F32;
        case TYPE_I32: return type == GGML_TYPE_I32;
        default:       return is_weight_type(type);
    }
}

struct checker {
    const dsv4_header &             header;
    std::unordered_set<std::string> known; // upstream names that were checked

    [[noreturn]] void refuse(const dsv4_tensor & t, const char * what,
            const std::string & found, const std::string & expected) const {
        throw dsv4_refusal(DSV4_TENSOR_SHAPE, { header.path, t.name, "", what, found, expected,
            "The file does not match its own metadata: convert it again" });
    }

    static bool same_dims(const dsv4_tensor & t, const D & dims) {
        for (size_t i = 0; i < GGML_MAX_DIMS; ++i) {
            if (t.ne[i] != (i < dims.size() ? dims[i] : 1)) {
                return false;
            }
        }
        return true;
    }

    void compare(const dsv4_tensor & t, const row & r, const layer_dims & sizes) const {
        const D dims = r.dims(sizes);
        bool ok = same_dims(t, dims);
        if (!ok && std::string(r.name) == "attn_output_a.weight") {
            // upstream's own saver writes the per-group view
            ok = same_dims(t, { dims[0], sizes.o_rank, sizes.o_groups });
        }
        if (!ok) {
            refuse(t, "a tensor has wrong dimensions", dsv4_dims_str(t.ne), dsv4_dims_str(dims.data(), dims.size()));
        }
        if (!is_of(r.type, t.type)) {
            refuse(t, "a tensor has a type that the engine cannot use there", ggml_type_name(t.type), type_class_str(r.type));
        }
    }

    void require(const row & r, const std::string & prefix, const layer_dims & sizes) {
        if (!r.present(sizes)) {
            return;
        }
        const std::string   name = prefix + r.name;
        const dsv4_tensor * t    = header.find(name);
        if (!t) {
            const D dims = r.dims(sizes);
            throw dsv4_refusal(DSV4_MISSING_TENSOR, { header.path, header.spelled(name), "",
                "a tensor that the model needs is absent", "no such tensor", dsv4_dims_str(dims.data(), dims.size()),
                "The file is incomplete: download or convert it again" });
        }
        compare(*t, r, sizes);
        known.insert(name);
    }
};

} // namespace

void dsv4_check_tensors(const dsv4_header & header, const dsv4_hparams & hp) {
    checker          c { header, {} };
    const layer_dims top(hp, 0);

    for (const row & r : TOP_ROWS_FIRST) {
        c.require(r, "", top);
    }
    for (int64_t il = 0; il < hp.n_layer; ++il) {
        const layer_dims sizes(hp, il);
        for (const row & r : LAYER_ROWS) {
            c.require(r, "blk." + std::to_string(il) + ".", sizes);
        }
    }
    for (const row & r : TOP_ROWS_LAST) {
        c.require(r, "", top);
    }

    std::unordered_map<std::string, std::pair<const row *, int64_t>> optional;
    for (int64_t il = 0; il < hp.n_layer; ++il) {
        for (const row & r : OPTIONAL_LAYER_ROWS) {
            optional.emplace("blk." + std::to_string(il) + "." + r.name, std::make_pair(&r, il));
        }
    }
    if (header.find("output.weight")->type == GGML_TYPE_NVFP4) {
        for (const row & r : OPTIONAL_TOP_ROWS) {
            optional.emplace(r.name, std::make_pair(&r, int64_t(0)));
        }
    }

    for (const dsv4_tensor & t : header.tensors) {
        const std::string name = dsv4_native_to_upstream(t.name);
        if (c.known.count(name)) {
            continue;
        }
        const auto it = optional.find(name);
        if (it == optional.end()) {
            throw dsv4_refusal(DSV4_UNSUPPORTED, { header.path, t.name, "",
                "the file has a tensor that DeepSeek-V4 does not have", dsv4_dims_str(t.ne), "",
                "It belongs to a variant that this engine does not run" });
        }
        c.compare(t, *it->second.first, layer_dims(hp, it->second.second));
    }
}
