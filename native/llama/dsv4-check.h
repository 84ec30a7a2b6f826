// Check a model file without loading it: everything that a load would refuse, and everything that a load would
// assert on, as a verdict. Order and kinds of the checks equal those of pyllama_dsv4/header.py.

#pragma once

#include "dsv4-header.h"
#include "dsv4-hparams.h"

#include <string>

// Open the file and, if it is split, its other shards; check them in this order, and stop at the first refusal:
// the GGUF parser's own checks, file bounds, meaning of type 42, architecture, dialect, keys, tensors.
// verdict_json receives {"ok": true, "dialect": "native", "derived": {"key": value, ...}} or a refusal
// (dsv4-refusal.h). Returns 0 or 1. Throws only std::bad_alloc.
int dsv4_check_file(const char * path, std::string & verdict_json);

// The checks from the dialect on, for a header whose architecture is deepseek4. Throws dsv4_refusal.
// is_mtp_accepted: pass over the tensors of a file with prediction layers, which only upstream's draft path can use.
void dsv4_check_model(dsv4_header & header, bool is_mtp_accepted, dsv4_derived & derived);

// Type-42 tensors of one model: none unresolved, all of one meaning. Throws dsv4_refusal.
struct dsv4_type42_check {
    std::string path;
    std::string first;      // the first type-42 tensor and what it is
    int         meaning = 0;

    // tensors of the next shard
    void add(const struct gguf_context * gguf, uint64_t n_file_bytes);
};

// Refuse an architecture that is not DeepSeek-V4's, with a word on V4.1. Throws dsv4_refusal.
void dsv4_refuse_architecture(const std::string & path, const std::string & found);

// Refuse a shard whose alignment the engine asserts on. Throws dsv4_refusal.
void dsv4_check_alignment(const std::string & path, const struct gguf_context * gguf);

void dsv4_add_tensors(dsv4_header & header, const struct gguf_context * gguf);
