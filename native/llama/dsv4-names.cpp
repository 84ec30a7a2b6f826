#include "dsv4-names.h"

#include <unordered_map>

namespace {

struct rename {
    const char * native;
    const char * upstream;
};

// a leading '.' stands for "blk.N."
constexpr rename RENAMES[] = {
    { "hc_head_base",                   "output_hc_base.weight"            },
    { "hc_head_fn",                     "output_hc_fn.weight"              },
    { "hc_head_scale",                  "output_hc_scale.weight"           },
    { ".attn_sinks",                    ".attn_sinks.weight"               },
    { ".attn_kv_latent.weight",         ".attn_kv.weight"                  },
    { ".attn_compress_ape",             ".attn_compressor_ape.weight"      },
    { ".attn_compress_norm.weight",     ".attn_compressor_norm.weight"     },
    { ".attn_compress_gate.weight",     ".attn_compressor_gate.weight"     },
    { ".attn_compress_kv.weight",       ".attn_compressor_kv.weight"       },
    { ".indexer.compress_ape",          ".indexer_compressor_ape.weight"   },
    { ".indexer.compress_norm.weight",  ".indexer_compressor_norm.weight"  },
    { ".indexer.compress_gate.weight",  ".indexer_compressor_gate.weight"  },
    { ".indexer.compress_kv.weight",    ".indexer_compressor_kv.weight"    },
    { ".exp_probs_b",                   ".exp_probs_b.bias"                },
    { ".ffn_gate_tid2eid",              ".ffn_gate_tid2eid.weight"         },
    { ".hc_attn_base",                  ".hc_attn_base.weight"             },
    { ".hc_attn_fn",                    ".hc_attn_fn.weight"               },
    { ".hc_attn_scale",                 ".hc_attn_scale.weight"            },
    { ".hc_ffn_base",                   ".hc_ffn_base.weight"              },
    { ".hc_ffn_fn",                     ".hc_ffn_fn.weight"                },
    { ".hc_ffn_scale",                  ".hc_ffn_scale.weight"             },
};

using name_map = std::unordered_map<std::string, std::string>;

name_map make_map(bool to_upstream) {
    name_map map;
    for (const auto & r : RENAMES) {
        map.emplace(to_upstream ? r.native : r.upstream, to_upstream ? r.upstream : r.native);
    }
    return map;
}

const name_map & to_upstream() {
    static const name_map map = make_map(true);
    return map;
}

const name_map & to_native() {
    static const name_map map = make_map(false);
    return map;
}

// Position of the '.' that ends "blk.<digits>", or 0 if the name does not start like that.
size_t layer_prefix_len(const std::string & name) {
    if (name.compare(0, 4, "blk.") != 0) {
        return 0;
    }
    size_t i = 4;
    while (i < name.size() && name[i] >= '0' && name[i] <= '9') {
        ++i;
    }
    return i > 4 && i < name.size() && name[i] == '.' ? i : 0;
}

const std::string * find(const name_map & map, const std::string & name, size_t prefix) {
    // a model's own tensor never starts with '.', so the two kinds of keys cannot be confused
    if (prefix == 0 && !name.empty() && name[0] == '.') {
        return nullptr;
    }
    const auto it = map.find(name.substr(prefix));
    return it == map.end() ? nullptr : &it->second;
}

std::string renamed(const name_map & map, const std::string & name) {
    const size_t        prefix = layer_prefix_len(name);
    const std::string * other  = find(map, name, prefix);
    return other ? name.substr(0, prefix) + *other : name;
}

} // namespace

dsv4_form dsv4_name_form(const std::string & name) {
    const size_t prefix = layer_prefix_len(name);
    if (find(to_upstream(), name, prefix)) {
        return DSV4_FORM_NATIVE;
    }
    if (find(to_native(), name, prefix)) {
        return DSV4_FORM_UPSTREAM;
    }
    return DSV4_FORM_BOTH;
}

std::string dsv4_native_to_upstream(const std::string & name) {
    return renamed(to_upstream(), name);
}

std::string dsv4_upstream_to_native(const std::string & name) {
    return renamed(to_native(), name);
}
