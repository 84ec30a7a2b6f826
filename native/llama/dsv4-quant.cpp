#include "dsv4-quant.h"

#include <ostream>
#include <stdexcept>

static const char * const KEY_TEMPLATE = "tokenizer.chat_template";

static thread_local dsv4_quant_job * t_job = nullptr;

dsv4_quant_scope::dsv4_quant_scope(dsv4_quant_job & job) {
    t_job = &job;
}

dsv4_quant_scope::~dsv4_quant_scope() {
    t_job = nullptr;
}

dsv4_quant_job * dsv4_current_quant_job(void) {
    return t_job;
}

bool dsv4_quant_allows(const std::string & name) {
    return name.find("hc_") == std::string::npos && name.find("_ape.") == std::string::npos;
}

static std::string output_name(const char * name) {
    return t_job && t_job->output() == DSV4_FORM_NATIVE ? dsv4_upstream_to_native(name) : name;
}

void dsv4_quant_keys(struct gguf_context * metadata) {
    if (t_job) {
        gguf_remove_key(metadata, "general.alignment"); // tensors are padded to the default, whatever the input says
    }
    if (!t_job || t_job->input != DSV4_FORM_NATIVE || t_job->output() != DSV4_FORM_NATIVE) {
        return; // upstream's dialect has what the loader derived; a native file may have it too
    }
    for (const auto & key : t_job->derived) {
        gguf_remove_key(metadata, key.c_str());
    }
    if (t_job->chat_template) {
        gguf_set_val_str(metadata, KEY_TEMPLATE, t_job->chat_template->c_str());
    }
}

const struct ggml_tensor * dsv4_quant_renamed(const struct ggml_tensor * tensor) {
    if (!t_job) {
        return tensor;
    }
    static thread_local ggml_tensor copy;
    copy = *tensor;
    ggml_set_name(&copy, output_name(tensor->name).c_str());
    return &copy;
}

void dsv4_quant_note(std::string & name, const struct ggml_tensor * tensor, ggml_type type_out) {
    if (!t_job) {
        return;
    }
    name = output_name(tensor->name);
    t_job->tensors.push_back({ name, tensor->type, type_out, ggml_nbytes(tensor),
        size_t(ggml_nrows(tensor))*ggml_row_size(type_out, tensor->ne[0]) });
}

void dsv4_quant_begin(const struct gguf_context * metadata) {
    if (!t_job) {
        return;
    }
    t_job->n_bytes_file = gguf_get_meta_size(metadata);
    for (const auto & tensor : t_job->tensors) {
        t_job->n_bytes_file += GGML_PAD(tensor.n_bytes_out, GGUF_DEFAULT_ALIGNMENT);
    }
}

void dsv4_quant_wrote(const std::ostream & out, size_t n_bytes) {
    if (!t_job) {
        return;
    }
    if (!out) { // a full disk sets badbit, upstream's stream throws for failbit: when it is closed
        throw std::runtime_error("the output cannot be written");
    }
    t_job->n_bytes_done += n_bytes;
    if (t_job->on_progress && !t_job->on_progress(double(t_job->n_bytes_done)/double(t_job->n_bytes_file))) {
        throw std::runtime_error("cancelled");
    }
}
