// What upstream's quantiser does not do by itself: keep the dialect of a native file, say beforehand what it will write,
// report progress, stop when asked, and notice a full disk. Owns the state of one run and the hooks that fill and read
// it. Leaves the choice of types to upstream and ftype41.h, the names to dsv4-names.h.
//
// Without a job in the calling thread every hook does what upstream's line did.

#pragma once

#include "dsv4-names.h"

#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <functional>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

struct dsv4_quant_tensor {
    std::string name; // in the output
    ggml_type   type_in;
    ggml_type   type_out;
    size_t      n_bytes_in;
    size_t      n_bytes_out;
};

struct dsv4_quant_job {
    dsv4_form                   dialect = DSV4_FORM_BOTH; // of the output; BOTH keeps the input's
    std::function<bool(double)> on_progress;              // fraction done; false cancels

    // filled by the dialect hook of the loader; both empty for other models
    dsv4_form                  input = DSV4_FORM_BOTH;
    std::vector<std::string>   derived;       // keys that the input lacks
    std::optional<std::string> chat_template; // the input's own

    // filled before the first tensor is written
    std::vector<dsv4_quant_tensor> tensors;
    size_t n_bytes_file = 0; // size of the output
    size_t n_bytes_done = 0;

    dsv4_form output() const { return dialect == DSV4_FORM_BOTH ? input : dialect; }
};

// Make `job` that of the calling thread as long as this lives.
struct dsv4_quant_scope {
    explicit dsv4_quant_scope(dsv4_quant_job & job);
    ~dsv4_quant_scope();
};

// The job of the calling thread, or nullptr.
dsv4_quant_job * dsv4_current_quant_job(void);

// --- called from llama-quant.cpp ---

// Whether a tensor of DeepSeek-V4 may be quantised: not what the checkpoint has in F32, the parameters of the
// hyper-connections and the positional tables of the compressors. They are 0.1 % of the model.
bool dsv4_quant_allows(const std::string & name);

// Give the output the keys of its dialect. metadata: the input's keys as the loader left them.
void dsv4_quant_keys(struct gguf_context * metadata);

// The tensor under its name in the output; valid until the next call in this thread.
const struct ggml_tensor * dsv4_quant_renamed(const struct ggml_tensor * tensor);

// Note what becomes of a tensor; `name` becomes that in the output.
void dsv4_quant_note(std::string & name, const struct ggml_tensor * tensor, ggml_type type_out);

// All tensors are noted and in `metadata`.
void dsv4_quant_begin(const struct gguf_context * metadata);

// n_bytes more were written. Throws when the stream is bad, or the job is cancelled.
void dsv4_quant_wrote(const std::ostream & out, size_t n_bytes);
