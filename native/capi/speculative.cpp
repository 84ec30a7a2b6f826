// Speculative decoding: upstream's drafting beside a context, behind status codes. What upstream asserts about a pair of
// models is checked here first.

#include "error.h"

#include "common.h"
#include "llama-ext.h"
#include "speculative.h"

#include <algorithm>
#include <stdexcept>
#include <string>

struct pyl_draft {
    llama_context *        target;
    llama_context *        context;
    pyl_monitor *          monitor;
    common_speculative_ptr spec;
    common_batch           batch;
    llama_tokens           prompt; // upstream wants one for drafting from n-grams; stays empty
    llama_tokens           result;
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
        made->spec.reset(common_speculative_init(params, 1));
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

int32_t pyl_draft_process(struct pyl_draft * draft, const int32_t * tokens, int32_t n_tokens, int32_t pos) {
    return pyl_guard([&]() -> int32_t {
        draft->batch.clear();
        for (int32_t i = 0; i < n_tokens; ++i) {
            draft->batch.add(tokens[i], pos + i, 0, false);
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

int32_t pyl_draft_propose(struct pyl_draft * draft, int32_t token, int32_t pos, int32_t n_max, int32_t * out) {
    return pyl_guard([&]() -> int32_t {
        draft->result.clear();
        common_speculative_get_draft_params(draft->spec.get(), 0) = {
            /*.drafting =*/ true,
            /*.n_max    =*/ n_max,
            /*.pos0     =*/ pos,
            /*.id_last  =*/ token,
            /*.prompt   =*/ &draft->prompt,
            /*.result   =*/ &draft->result,
        };
        common_speculative_draft(draft->spec.get());
        if (!llama_memory_seq_rm(llama_get_memory(draft->context), 0, pos, -1)) {
            pyl_set_error("the draft model's cache cannot drop its tail");
            return PYL_ERROR;
        }
        const int32_t n = std::min(n_max, int32_t(draft->result.size()));
        std::copy(draft->result.begin(), draft->result.begin() + n, out);
        return n;
    });
}

int32_t pyl_draft_accept(struct pyl_draft * draft, int32_t n_accepted, int32_t pos) {
    return pyl_guard([&]() -> int32_t {
        common_speculative_accept(draft->spec.get(), 0, n_accepted);
        if (!llama_memory_seq_rm(llama_get_memory(draft->target), 0, pos, -1) ||
            !llama_memory_seq_rm(llama_get_memory(draft->context), 0, pos, -1)) {
            pyl_set_error("the cache cannot drop the tokens of a rejected draft");
            return PYL_ERROR;
        }
        return PYL_OK;
    });
}

void pyl_draft_clear(struct pyl_draft * draft) {
    llama_memory_clear(llama_get_memory(draft->context), true);
}
