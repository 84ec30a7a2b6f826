// Loading and evaluating behind status codes. Preconditions that upstream asserts are checked here or in
// Python, because an assert ends the process.

#include "error.h"

#include "common.h"
#include "ggml-backend.h"
#include "llama-arch.h"
#include "llama-ext.h"

#include <algorithm>
#include <vector>

namespace {

thread_local std::string t_error;

bool is_cancelled(const pyl_monitor * monitor) {
    return monitor && __atomic_load_n(&monitor->cancel, __ATOMIC_RELAXED) != 0;
}

// The engine turns exceptions into log lines here and there: what a worker failed with since then, or another reason.
std::string worker_failure(int64_t n_failures_before, const char * otherwise) {
    return dsv4_rpc_n_failures() > n_failures_before ? dsv4_rpc_last_failure() : otherwise;
}

int32_t check_workers(int64_t n_failures_before) {
    if (dsv4_rpc_n_failures() == n_failures_before) {
        return PYL_OK;
    }
    pyl_set_error(dsv4_rpc_last_failure());
    return PYL_ERROR_WORKER;
}

bool on_load_progress(float progress, void * data) {
    auto * monitor = static_cast<pyl_monitor *>(data);
    __atomic_store(&monitor->progress, &progress, __ATOMIC_RELAXED);
    return !is_cancelled(monitor);
}

bool on_abort_poll(void * data) {
    return is_cancelled(static_cast<pyl_monitor *>(data));
}

// The arrays of a batch; they outlive the call that uses `view`.
struct token_batch {
    std::vector<llama_pos>      pos;
    std::vector<int32_t>        n_seq_id;
    std::vector<llama_seq_id>   ids;
    std::vector<llama_seq_id *> seq_id;
    std::vector<int8_t>         outputs;
    llama_batch                 view = {};

    token_batch(const int32_t * tokens, int32_t n) : pos(n), n_seq_id(n, 1), ids(n), seq_id(n + 1, nullptr), outputs(n) {
        for (int32_t i = 0; i < n; ++i) {
            seq_id[i] = &ids[i];
        }
        view.n_tokens = n;
        view.token    = const_cast<llama_token *>(tokens); // llama_decode does not write through it
        view.pos      = pos.data();
        view.n_seq_id = n_seq_id.data();
        view.seq_id   = seq_id.data();
        view.logits   = outputs.data();
    }
};

int32_t decode(llama_context * ctx, const token_batch & batch) {
    switch (llama_decode(ctx, batch.view)) {
        case  0: llama_synchronize(ctx); return PYL_OK;
        case  1: pyl_set_error("no room in the KV cache for this batch"); return PYL_CONTEXT_FULL;
        case  2: pyl_set_error("cancelled"); return PYL_CANCELLED;
        case -1: pyl_set_error("the batch is invalid (token id or position)"); return PYL_ERROR_ARGUMENT;
        default: pyl_set_error("the computation failed"); return PYL_ERROR;
    }
}

bool is_batch_size(const llama_context * ctx, int32_t n_tokens) {
    return n_tokens >= 1 && n_tokens <= int32_t(llama_n_batch(ctx));
}

bool is_place(const llama_context * ctx, int32_t pos, int32_t seq_id) {
    return pos >= 0 && seq_id >= 0 && seq_id < int32_t(llama_n_seq_max(ctx));
}

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
        const int64_t n_failures = dsv4_rpc_n_failures();
        model = llama_model_load_from_file(path, params);
        if (!model) {
            pyl_set_error(is_cancelled(monitor) ? "cancelled" : worker_failure(n_failures, "the engine could not load the model"));
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
        const int64_t n_failures = dsv4_rpc_n_failures();
        ctx = llama_init_from_model(model, params);
        if (!ctx) {
            pyl_set_error(worker_failure(n_failures, "the engine could not create a context"));
        }
        return PYL_OK;
    });
    return ctx;
}

int32_t pyl_decode(struct llama_context * ctx, const int32_t * tokens, int32_t n_tokens, int32_t pos, int32_t seq_id,
        enum pyl_outputs outputs) {
    return pyl_guard([&]() -> int32_t {
        if (!is_batch_size(ctx, n_tokens) || !is_place(ctx, pos, seq_id)) {
            pyl_set_error("batch size, position or sequence id out of range");
            return PYL_ERROR_ARGUMENT;
        }
        token_batch batch(tokens, n_tokens);
        for (int32_t i = 0; i < n_tokens; ++i) {
            batch.pos[i]     = pos + i;
            batch.ids[i]     = seq_id;
            batch.outputs[i] = outputs == PYL_OUTPUTS_ALL || (outputs == PYL_OUTPUTS_LAST && i == n_tokens - 1);
        }
        return decode(ctx, batch);
    });
}

int32_t pyl_decode_one(struct llama_context * ctx, int32_t token, int32_t pos, int32_t seq_id, float * out, int32_t n_vocab) {
    const int32_t status = pyl_decode(ctx, &token, 1, pos, seq_id, PYL_OUTPUTS_LAST);
    return status == PYL_OK ? pyl_logits_copy(ctx, -1, out, n_vocab) : status;
}

int32_t pyl_decode_mixed(struct llama_context * ctx, const int32_t * tokens, const int32_t * pos, const int32_t * seq_id,
        const int8_t * outputs, int32_t n_tokens) {
    return pyl_guard([&]() -> int32_t {
        bool is_valid = is_batch_size(ctx, n_tokens);
        for (int32_t i = 0; i < n_tokens && is_valid; ++i) {
            is_valid = is_place(ctx, pos[i], seq_id[i]);
        }
        if (!is_valid) {
            pyl_set_error("batch size, position or sequence id out of range");
            return PYL_ERROR_ARGUMENT;
        }
        token_batch batch(tokens, n_tokens);
        std::copy(pos, pos + n_tokens, batch.pos.begin());
        std::copy(seq_id, seq_id + n_tokens, batch.ids.begin());
        std::copy(outputs, outputs + n_tokens, batch.outputs.begin());
        return decode(ctx, batch);
    });
}

int32_t pyl_state_seq_save(struct llama_context * ctx, int32_t seq_id, uint8_t * out, uint64_t size, uint64_t * n) {
    return pyl_guard([&]() -> int32_t {
        const int64_t n_failures = dsv4_rpc_n_failures();
        *n = llama_state_seq_get_data(ctx, out, size, seq_id);
        return check_workers(n_failures);
    });
}

int32_t pyl_state_seq_load(struct llama_context * ctx, int32_t seq_id, const uint8_t * data, uint64_t size, uint64_t * n) {
    return pyl_guard([&]() -> int32_t {
        const int64_t n_failures = dsv4_rpc_n_failures();
        *n = llama_state_seq_set_data(ctx, data, size, seq_id);
        return check_workers(n_failures);
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

int32_t pyl_embedding_copy(struct llama_context * ctx, int32_t seq_id, int32_t i, float * out, int32_t n_embd) {
    return pyl_guard([&]() -> int32_t {
        const float * values = seq_id >= 0 ? llama_get_embeddings_seq(ctx, seq_id) : llama_get_embeddings_ith(ctx, i);
        if (!values) {
            pyl_set_error("no embeddings were computed");
            return PYL_ERROR_ARGUMENT;
        }
        std::copy(values, values + n_embd, out);
        return PYL_OK;
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
