#include "dsv4-dialect.h"

#include "dsv4-check.h"
#include "dsv4-quant.h"
#include "dsv4-refusal.h"
#include "dsv4-template.h"

#include "llama-impl.h"
#include "llama-model-loader.h"

#include "gguf.h"

static const char * const KEY_TEMPLATE = "tokenizer.chat_template";

// Not for the quantiser: what it writes is for every reader.
static void extend_template(gguf_context * metadata) {
    const int64_t id = gguf_find_key(metadata, KEY_TEMPLATE);
    if (id >= 0 && !dsv4_current_quant_job()) {
        const std::string extended = dsv4_extend_template(gguf_get_val_str(metadata, id));
        gguf_set_val_str(metadata, KEY_TEMPLATE, extended.c_str());
    }
}

static void rename_tensors(llama_model_loader & ml, size_t & n_renamed) {
    decltype(ml.weights_map) renamed;
    while (!ml.weights_map.empty()) {
        auto node = ml.weights_map.extract(ml.weights_map.begin());
        const std::string name = dsv4_native_to_upstream(node.key());
        if (name != node.key()) {
            ggml_set_name(node.mapped().tensor, name.c_str());
            node.key() = name;
            n_renamed++;
        }
        renamed.insert(std::move(node));
    }
    ml.weights_map = std::move(renamed);
}

// Expert ids select rows of the expert stack; upstream asserts their range while it computes.
static void check_expert_ids(llama_model_loader & ml, const std::string & path) {
    int64_t n_expert = 0;
    for (const auto & [name, w] : ml.weights_map) {
        if (w.tensor->type != GGML_TYPE_I32) {
            continue;
        }
        if (n_expert == 0) {
            n_expert = gguf_get_val_u32(ml.metadata, gguf_find_key(ml.metadata, "deepseek4.expert_count"));
        }
        std::vector<int32_t> ids(ggml_nelements(w.tensor));
        const auto & file = ml.files.at(w.idx);
        file->seek(w.offs, SEEK_SET);
        file->read_raw(ids.data(), ids.size()*sizeof(ids[0]));
        for (size_t i = 0; i < ids.size(); ++i) {
            if (ids[i] < 0 || ids[i] >= n_expert) {
                throw dsv4_refusal(DSV4_FORMAT, { path, name, "", "a token is routed to an expert that does not exist",
                    std::to_string(ids[i]) + " for token " + std::to_string(i/w.tensor->ne[0]),
                    "0.." + std::to_string(n_expert - 1), "The file is damaged: fetch it again" });
            }
        }
    }
}

void dsv4_dialect_apply(llama_model_loader & ml, const std::string & fname, const std::vector<std::string> & splits) {
    const std::string & arch = ml.get_arch_name();
    if (arch == "deepseek41") {
        dsv4_refuse_architecture(fname, arch);
    }
    if (arch != "deepseek4" || ml.files.empty()) { // no files: a model built by a program, in upstream's names
        return;
    }

    dsv4_header header;
    header.path = fname;
    header.keys = ml.metadata;

    dsv4_type42_check type42;
    type42.path = fname;
    type42.add(ml.metadata, ml.files[0]->size());
    dsv4_check_alignment(fname, ml.metadata);
    dsv4_add_tensors(header, ml.metadata);
    for (size_t i = 1; i < ml.files.size(); ++i) {
        // the loader keeps the tensors of further shards, but not what the stride rule needs
        gguf_context_ptr gguf { gguf_init_from_file(splits.at(i).c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }) };
        if (!gguf) {
            throw dsv4_refusal(DSV4_MODEL_FILE, { splits[i], "", "", "cannot read a shard again", "", "", "" });
        }
        type42.path = splits[i];
        type42.add(gguf.get(), ml.files[i]->size());
        dsv4_check_alignment(splits[i], gguf.get());
        dsv4_add_tensors(header, gguf.get());
    }

    if (header.tensors.empty() && gguf_find_key(ml.metadata, "deepseek4.block_count") < 0) {
        return; // a bare vocabulary: the loader itself refuses it as a model
    }

    dsv4_derived derived;
    if (header.tensors.empty()) {
        dsv4_read_hparams(header, derived); // a vocabulary with hyper-parameters
        return;
    }
    dsv4_check_model(header, /*is_mtp_accepted =*/ true, derived);
    check_expert_ids(ml, fname);

    dsv4_quant_job * job = dsv4_current_quant_job();
    if (job) {
        job->input = header.is_native ? DSV4_FORM_NATIVE : DSV4_FORM_UPSTREAM;
    }
    if (!header.is_native) {
        extend_template(ml.metadata);
        return;
    }

    size_t n_renamed = 0;
    rename_tensors(ml, n_renamed);

    const int64_t id = gguf_find_key(ml.metadata, KEY_TEMPLATE);
    const bool has_vocab         = gguf_find_key(ml.metadata, "tokenizer.ggml.tokens") >= 0;
    // the native writer's short template has no tools, no thinking and no separator before past answers
    const bool replaces_template = id < 0 ? has_vocab : !dsv4_is_v4_template(gguf_get_val_str(ml.metadata, id));
    if (job) {
        for (const auto & [name, value] : derived) {
            GGML_UNUSED(value);
            job->derived.push_back(name);
        }
        if (id >= 0) {
            job->chat_template = gguf_get_val_str(ml.metadata, id);
        } else if (replaces_template) {
            job->derived.push_back(KEY_TEMPLATE);
        }
    }
    if (replaces_template) {
        derived.emplace_back(KEY_TEMPLATE, std::string(dsv4_chat_template));
    }
    dsv4_set_derived(ml.metadata, derived);
    extend_template(ml.metadata);

    LLAMA_LOG_INFO("%s: native dialect: %zu tensors renamed, %zu keys derived%s\n", __func__,
            n_renamed, derived.size() - (replaces_template ? 1 : 0), replaces_template ? ", chat template replaced" : "");
    for (const auto & [name, value] : derived) {
        GGML_UNUSED(value);
        LLAMA_LOG_DEBUG("%s: - derived %s\n", __func__, name.c_str());
    }
}
