// Loading, evaluating and sampling behind status codes. Preconditions that upstream asserts are checked here or in
// Python, because an assert ends the process.

#include "error.h"

#include "common.h"
#include "ggml-backend.h"
#include "llama-arch.h"
#include "llama-ext.h"

#include <climits>
#include <cmath>
#include <vector>

namespace {

thread_local std::string t_error;

bool is_cancelled(const pyl_monitor * monitor) {
    return monitor && __atomic_load_n(&monitor->cancel, __ATOMIC_RELAXED) != 0;
}

bool on_load_progress(float progress, void * data) {
    auto * monitor = static_cast<pyl_monitor *>(data);
    __atomic_store(&monitor->progress, &progress, __ATOMIC_RELAXED);
    return !is_cancelled(monitor);
}

bool on_abort_poll(void * data) {
    return is_cancelled(static_cast<pyl_monitor *>(data));
}

// Batch of one sequence; the arrays outlive the call that uses `view`.
struct seq_batch {
    std::vector<llama_pos>      pos;
    std::vector<int32_t>        n_seq_id;
    std::vector<llama_seq_id>   ids;
    std::vector<llama_seq_id *> seq_id;
    std::vector<int8_t>         outputs;
    llama_batch                 view = {};

    seq_batch(const int32_t * tokens, int32_t n, int32_t pos0, int32_t seq, pyl_outputs mode) :
        pos(n), n_seq_id(n, 1), ids(1, seq), seq_id(n + 1, nullptr), outputs(n, mode == PYL_OUTPUTS_ALL) {
        for (int32_t i = 0; i < n; ++i) {
            pos[i]    = pos0 + i;
            seq_id[i] = ids.data();
        }
        if (mode == PYL_OUTPUTS_LAST) {
            outputs[n - 1] = 1;
        }
        view.n_tokens = n;
        view.token    = const_cast<llama_token *>(tokens); // llama_decode does not write through it
        view.pos      = pos.data();
        view.n_seq_id = n_seq_id.data();
        view.seq_id   = seq_id.data();
        view.logits   = outputs.data();
    }
};

} // namespace

void pyl_set_error(const std::string & text) {
    t_error = text;
}

const char * pyl_last_error(void) {
    return t_error.c_str();
}

const char * pyl_build_backends(void) {
    thread_local std::string names;
    names.clear();
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        names += (i ? " " : "") + std::string(ggml_backend_reg_name(ggml_backend_reg_get(i)));
    }
    return names.c_str();
}

bool pyl_knows_architecture(const char * name) {
    return pyl_guard([&] { return int32_t(llm_arch_from_string(name) != LLM_ARCH_UNKNOWN); }) == 1;
}

struct llama_model * pyl_model_load(const char * path, struct llama_model_params params, struct pyl_monitor * monitor) {
    llama_model * model = nullptr;
    pyl_guard([&] {
        if (monitor) {
            params.progress_callback           = on_load_progress;
            params.progress_callback_user_data = monitor;
        }
        model = llama_model_load_from_file(path, params);
        if (!model) {
            pyl_set_error(is_cancelled(monitor) ? "cancelled" : "the engine could not load the model");
        }
        return PYL_OK;
    });
    return model;
}

struct llama_context * pyl_context_init(
        struct llama_model * model, struct llama_context_params params, struct pyl_monitor * monitor) {
    llama_context * ctx = nullptr;
    pyl_guard([&] {
        if (monitor) {
            params.abort_callback      = on_abort_poll;
            params.abort_callback_data = monitor;
        }
        ctx = llama_init_from_model(model, params);
        if (!ctx) {
            pyl_set_error("the engine could not create a context");
        }
        return PYL_OK;
    });
    return ctx;
}

int32_t pyl_decode(struct llama_context * ctx, const int32_t * tokens, int32_t n_tokens, int32_t pos, int32_t seq_id,
        enum pyl_outputs outputs) {
    return pyl_guard([&]() -> int32_t {
        if (n_tokens < 1 || n_tokens > int32_t(llama_n_batch(ctx)) || pos < 0 ||
            seq_id < 0 || seq_id >= int32_t(llama_n_seq_max(ctx))) {
            pyl_set_error("batch size, position or sequence id out of range");
            return PYL_ERROR_ARGUMENT;
        }
        seq_batch batch(tokens, n_tokens, pos, seq_id, outputs);
        switch (llama_decode(ctx, batch.view)) {
            case  0: llama_synchronize(ctx); return PYL_OK;
            case  1: pyl_set_error("no room in the KV cache for this batch"); return PYL_CONTEXT_FULL;
            case  2: pyl_set_error("cancelled"); return PYL_CANCELLED;
            case -1: pyl_set_error("the batch is invalid (token id or position)"); return PYL_ERROR_ARGUMENT;
            default: pyl_set_error("the computation failed"); return PYL_ERROR;
        }
    });
}

int32_t pyl_logits_copy(struct llama_context * ctx, int32_t i, float * out, int32_t n_vocab) {
    return pyl_guard([&]() -> int32_t {
        const float * logits = llama_get_logits_ith(ctx, i);
        if (!logits) {
            pyl_set_error("no logits were computed for this position");
            return PYL_ERROR_ARGUMENT;
        }
        std::copy(logits, logits + n_vocab, out);
        return PYL_OK;
    });
}

int32_t pyl_sample(struct llama_sampler * chain, const float * logits, int32_t n_vocab, llama_token_data * scratch) {
    return pyl_guard([&]() -> int32_t {
        bool any_finite = false;
        for (int32_t i = 0; i < n_vocab; ++i) {
            if (std::isnan(logits[i])) {
                pyl_set_error("the logits contain NaN");
                return PYL_ERROR_ARGUMENT;
            }
            any_finite |= std::isfinite(logits[i]);
            scratch[i] = { i, logits[i], 0.0f };
        }
        if (!any_finite) {
            pyl_set_error("no logit is finite");
            return PYL_ERROR_ARGUMENT;
        }
        llama_token_data_array candidates = { scratch, size_t(n_vocab), -1, false };
        llama_sampler_apply(chain, &candidates);
        if (candidates.selected < 0 || candidates.selected >= int64_t(candidates.size)) {
            pyl_set_error("the sampler chain selected no token");
            return PYL_ERROR;
        }
        const llama_token id = candidates.data[candidates.selected].id;
        llama_sampler_accept(chain, id);
        return id;
    });
}

int32_t pyl_memory_breakdown(const struct llama_context * ctx, struct pyl_memory * out, int32_t n_max) {
    return pyl_guard([&]() -> int32_t {
        int32_t n = 0;
        for (const auto & [buft, data] : llama_get_memory_breakdown(ctx)) {
            if (n == n_max) {
                break;
            }
            pyl_memory & memory = out[n++];
            snprintf(memory.name, sizeof(memory.name), "%s", ggml_backend_buft_name(buft));
            memory.is_host = ggml_backend_buft_is_host(buft);
            memory.weights = data.model;
            memory.cache   = data.context;
            memory.compute = data.compute;
        }
        return n;
    });
}

int32_t pyl_n_cores(void) {
    int32_t n = 1;
    pyl_guard([&] {
        n = common_cpu_get_num_physical_cores();
        return PYL_OK;
    });
    return n;
}
