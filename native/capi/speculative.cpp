// Speculative decoding: upstream's drafting beside a context, behind status codes. What upstream asserts about a pair of
// models is checked here first.

#include "error.h"

#include "common.h"
#include "llama-ext.h"
#include "speculative.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

struct pyl_draft {
    llama_context *           target;
    llama_context *           context;
    pyl_monitor *             monitor;
    common_speculative_ptr    spec;
    common_batch              batch;
    llama_tokens              prompt;  // upstream wants one for drafting from n-grams; stays empty
    std::vector<llama_tokens> results; // of each sequence
};

namespace {

void check_models(const llama_model * target, const llama_model * model, pyl_draft_kind kind) {
    const auto refuse = [](const std::string & what, int64_t found, int64_t expected) {
        throw std::invalid_argument("the draft model does not fit: " + what + " " + std::to_string(found) +
                                    ", the model has " + std::to_string(expected));
    };
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(target));
    if (llama_vocab_n_tokens(llama_model_get_vocab(model)) != n_vocab) {
        refuse("number of tokens", llama_vocab_n_tokens(llama_model_get_vocab(model)), n_vocab);
    }
    if (llama_model_n_embd(model) != llama_model_n_embd(target)) {
        refuse("embedding length", llama_model_n_embd(model), llama_model_n_embd(target));
    }
    if (kind == PYL_DRAFT_MTP) {
        if (llama_model_n_embd_out(model) != llama_model_n_embd_out(target)) {
            refuse("row width", llama_model_n_embd_out(model), llama_model_n_embd_out(target));
        }
        if (llama_model_n_layer_nextn(model) != 1) {
            throw std::invalid_argument("the draft model has no prediction block");
        }
        return;
    }
    if (llama_model_n_embd_out(model) != llama_model_n_embd(model)) {
        throw std::invalid_argument("the draft model says dflash.embedding_length_out, and upstream would read past its "
                                    "rows; convert it again");
    }
    const uint32_t  n_ids = llama_model_target_layer_ids_n(model);
    const int32_t * ids   = llama_model_target_layer_ids(model);
    for (uint32_t i = 0; i < n_ids; ++i) {
        if (ids[i] < 0 || ids[i] > llama_model_n_layer(target)) {
            refuse("a target layer", ids[i], llama_model_n_layer(target));
        }
    }
    if (n_ids == 0 || llama_vocab_mask(llama_model_get_vocab(model)) < 0) {
        throw std::invalid_argument("the draft model names no target layers or no mask token");
    }
}

bool is_sequence(const pyl_draft * draft, int32_t seq_id) {
    if (seq_id >= 0 && seq_id < int32_t(draft->results.size())) {
        return true;
    }
    pyl_set_error("sequence id out of range");
    return false;
}

} // namespace

int32_t pyl_draft_check(const struct llama_model * target, const struct llama_model * model, enum pyl_draft_kind kind) {
    return pyl_guard([&]() -> int32_t {
        check_models(target, model, kind);
        return PYL_OK;
    });
}

struct pyl_draft * pyl_draft_init(struct llama_context * target, struct llama_context * context,
        enum pyl_draft_kind kind, int32_t n_max, struct pyl_monitor * monitor) {
    pyl_draft * draft = nullptr;
    pyl_guard([&] {
        common_params_speculative params;
        params.types = { kind == PYL_DRAFT_MTP    ? COMMON_SPECULATIVE_TYPE_DRAFT_MTP :
                         kind == PYL_DRAFT_DSPARK ? COMMON_SPECULATIVE_TYPE_DRAFT_DSPARK :
                                                    COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH };
        params.draft.n_max            = n_max;
        params.draft.backend_sampling = false; // needs a context that was made for it
        params.draft.ctx_tgt          = target;
        params.draft.ctx_dft          = context;
        auto made = std::make_unique<pyl_draft>();
        made->target  = target;
        made->context = context;
        made->monitor = monitor;
        made->results.resize(llama_n_seq_max(target));
        made->spec.reset(common_speculative_init(params, made->results.size()));
        if (!made->spec) {
            throw std::runtime_error("upstream has no way to draft with this model");
        }
        made->batch = common_batch(target);
        draft = made.release();
        return PYL_OK;
    });
    return draft;
}

void pyl_draft_free(struct pyl_draft * draft) {
    delete draft;
}

int32_t pyl_draft_process(struct pyl_draft * draft, const int32_t * tokens, const int32_t * pos, const int32_t * seq_id,
        int32_t n_tokens) {
    return pyl_guard([&]() -> int32_t {
        draft->batch.clear();
        for (int32_t i = 0; i < n_tokens; ++i) {
            draft->batch.add(tokens[i], pos[i], seq_id[i], false);
        }
        if (common_speculative_process(draft->spec.get(), draft->batch)) {
            llama_synchronize(draft->context);
            return PYL_OK;
        }
        const bool is_cancelled = __atomic_load_n(&draft->monitor->cancel, __ATOMIC_RELAXED) != 0;
        pyl_set_error(is_cancelled ? "cancelled" : "the draft model's computation failed");
        return is_cancelled ? PYL_CANCELLED : PYL_ERROR;
    });
}

int32_t pyl_draft_propose(struct pyl_draft * draft, const struct pyl_draft_request * requests, int32_t n_requests,
        int32_t n_max, int32_t * out, int32_t * n_out) {
    return pyl_guard([&]() -> int32_t {
        for (size_t i = 0; i < draft->results.size(); ++i) { // a proposal that failed half-way leaves it set
            common_speculative_get_draft_params(draft->spec.get(), i).drafting = false;
        }
        for (int32_t i = 0; i < n_requests; ++i) {
            const auto & request = requests[i];
            if (!is_sequence(draft, request.seq_id)) {
                return PYL_ERROR_ARGUMENT;
            }
            draft->results[request.seq_id].clear();
            common_speculative_get_draft_params(draft->spec.get(), request.seq_id) = {
                /*.drafting =*/ true,
                /*.n_max    =*/ request.n_max,
                /*.pos0     =*/ request.pos,
                /*.id_last  =*/ request.token,
                /*.prompt   =*/ &draft->prompt,
                /*.result   =*/ &draft->results[request.seq_id],
            };
        }
        common_speculative_draft(draft->spec.get());
        for (int32_t i = 0; i < n_requests; ++i) {
            const auto & request = requests[i];
            if (!llama_memory_seq_rm(llama_get_memory(draft->context), request.seq_id, request.pos, -1)) {
                pyl_set_error("the draft model's cache cannot drop its tail");
                return PYL_ERROR;
            }
            const auto & result = draft->results[request.seq_id];
            n_out[i] = std::min({ n_max, request.n_max, int32_t(result.size()) });
            std::copy(result.begin(), result.begin() + n_out[i], out + int64_t(i) * n_max);
        }
        return PYL_OK;
    });
}

int32_t pyl_draft_accept(struct pyl_draft * draft, int32_t seq_id, int32_t n_accepted, int32_t pos) {
    return pyl_guard([&]() -> int32_t {
        if (!is_sequence(draft, seq_id)) {
            return PYL_ERROR_ARGUMENT;
        }
        common_speculative_accept(draft->spec.get(), seq_id, n_accepted);
        if (!llama_memory_seq_rm(llama_get_memory(draft->target), seq_id, pos, -1) ||
            !llama_memory_seq_rm(llama_get_memory(draft->context), seq_id, pos, -1)) {
            pyl_set_error("the cache cannot drop the tokens of a rejected draft");
            return PYL_ERROR;
        }
        return PYL_OK;
    });
}

void pyl_draft_clear(struct pyl_draft * draft, int32_t seq_id) {
    if (seq_id < 0) {
        llama_memory_clear(llama_get_memory(draft->context), true);
    } else {
        llama_memory_seq_rm(llama_get_memory(draft->context), seq_id, -1, -1);
    }
}
