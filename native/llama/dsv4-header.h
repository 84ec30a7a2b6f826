// What the headers of a model file (all its shards) say, in one view: the input of every check.
// Owns the view and its look-ups; leaves filling it to dsv4-check (from paths) and dsv4-dialect (from the loader).

#pragma once

#include "dsv4-names.h"

#include "ggml.h"
#include "gguf.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

struct dsv4_tensor {
    std::string    name;              // as spelled in the file
    enum ggml_type type;
    int64_t        ne[GGML_MAX_DIMS]; // trailing ones filled in
};

struct dsv4_header {
    std::string                 path;      // the first shard's; may be empty
    const struct gguf_context * keys = nullptr; // the first shard's
    std::vector<dsv4_tensor>    tensors;   // file order, shard after shard

    // set by index_names()
    bool                                    is_native = false;
    std::unordered_map<std::string, size_t> by_upstream_name;

    // Decide the dialect and build the look-up. Throws dsv4_refusal when both forms occur.
    void index_names();

    // NULL if absent; `name` in the upstream dialect
    const dsv4_tensor * find(const std::string & name) const {
        const auto it = by_upstream_name.find(name);
        return it == by_upstream_name.end() ? nullptr : &tensors[it->second];
    }

    // how this file would spell a tensor of the upstream dialect
    std::string spelled(const std::string & name) const {
        return is_native ? dsv4_upstream_to_native(name) : name;
    }
};

// "4096x512", without trailing ones
std::string dsv4_dims_str(const int64_t * ne, size_t n = GGML_MAX_DIMS);
