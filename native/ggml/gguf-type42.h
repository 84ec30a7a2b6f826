// What tensor type id 42 means in a given GGUF file. Three writers claim the id: F8_E4M3_B128 (129 bytes per 128
// values), upstream's Q2_0 (36) and PrismML's Q2_0 (34); only the distance to the next tensor tells them apart. In
// memory F8_E4M3_B128 is 42 and Q2_0 is 43, in files both are 42. Owns the translation in both directions, the stride
// rule and the texts of its refusals. Leaves reading to gguf.cpp, which calls the first three functions, and the
// decision to refuse a model to its loader.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

struct gguf_context;

// Writing: the id that stands in files for an in-memory type.
int32_t dsv4_gguf_type_to_file(ggml_type type);

// Reading, first step: t.type holds the id as read. 42 becomes Q2_0 for now, because block and row size are checked
// before all offsets are known; 43, which no file may use, is refused with a log line.
bool dsv4_gguf_type_from_file(ggml_tensor & t);

enum dsv4_type42 {
    DSV4_TYPE42_NONE,  // no claimant fits, or several do and nothing decides
    DSV4_TYPE42_F8,    // F8_E4M3_B128
    DSV4_TYPE42_Q2_0,  // upstream's Q2_0
    DSV4_TYPE42_PRISM, // PrismML's Q2_0, known and not supported
};

// One tensor of one file. The first five fields are given, in the file's order; the rest is the answer.
struct dsv4_type42_tensor {
    std::string name;
    bool        is_42  = false;
    int64_t     ne0    = 0;
    int64_t     n      = 0; // elements
    uint64_t    offset = 0; // in the data section

    uint64_t    avail   = 0;                // bytes to the next tensor; for the last one, to the end of the file
    bool        is_last = false;            // no tensor has a larger offset: avail is only as good as the file size
    uint32_t    fits    = 0;                // bit i: claimant (dsv4_type42) i fits avail
    dsv4_type42 verdict = DSV4_TYPE42_NONE; // for type-42 tensors

    // Sizes of the three claimants beside what is available, for messages.
    std::string describe() const;
};

// Apply the stride rule to all tensors of one file. A claimant of size s fits if s <= avail < s + alignment and its
// block divides ne0. Each type-42 tensor is decided by itself:
//   one claimant fits            that one
//   34 and 36 fit                36 (stock), unless another tensor of the file can only be 34
//   129 and a smaller one fit    (large alignments only) the common verdict of the others, else none
//   none fits                    none; for the last tensor the common verdict of the others
void dsv4_type42_decide(std::vector<dsv4_type42_tensor> & tensors, uint64_t alignment, uint64_t n_data_bytes);

// Reading, second step, after all infos: set the types of the tensors that were read as 42. Where the verdict is none
// the tensor stays Q2_0, as in stock. Returns false, with a log line, for a tensor that has a successor and fits no
// supported claimant: the file's offsets cannot be right then. Never stricter than stock about missing or trailing
// data. `infos` is gguf.cpp's std::vector<gguf_tensor_info>, a type that only gguf.cpp knows.
bool dsv4_gguf_apply_type42(
        const std::vector<ggml_tensor *> & tensors, const std::vector<uint64_t> & offsets,
        uint64_t alignment, uint64_t n_data_bytes);

template <typename infos_t>
bool dsv4_gguf_resolve_type42(infos_t & infos, uint64_t alignment, uint64_t n_data_bytes) {
    std::vector<ggml_tensor *> tensors;
    std::vector<uint64_t>      offsets;
    for (auto & info : infos) {
        tensors.push_back(&info.t);
        offsets.push_back(info.offset);
    }
    return dsv4_gguf_apply_type42(tensors, offsets, alignment, n_data_bytes);
}

// For loaders. All tensors of an opened file with their verdicts, in file order; n_file_bytes is the size of the file
// that `gguf` was read from.
std::vector<dsv4_type42_tensor> dsv4_type42_list(const gguf_context * gguf, uint64_t n_file_bytes);

// Why a model with this type-42 tensor must be refused, or an empty string. That a model may not mix verdicts is for
// its loader to say, which knows all files of the model.
std::string dsv4_type42_reason(const dsv4_type42_tensor & t);

// Bytes of a type-42 tensor as its verdict has it; without one as Q2_0, which is what it is read as.
uint64_t dsv4_type42_size(const dsv4_type42_tensor & t);
