// What of a model lies on which device: tensors by name, layers by share, or what upstream finds to fit.

#include "error.h"

#include "fit.h"
#include "ggml-backend.h"
#include "llama.h"

#include <list>
#include <map>
#include <string>
#include <vector>

struct pyl_placement {
    std::list<std::string> patterns;
    std::vector<llama_model_tensor_buft_override> overrides; // the last is a terminator, once applied
    std::vector<float> split;                                // of llama_max_devices(), once set
};

struct pyl_placement * pyl_placement_init(void) {
    pyl_placement * placement = nullptr;
    pyl_guard([&] {
        placement = new pyl_placement();
        return PYL_OK;
    });
    return placement;
}

void pyl_placement_free(struct pyl_placement * placement) {
    delete placement;
}

int32_t pyl_placement_override(struct pyl_placement * placement, const char * pattern, const char * buffer) {
    return pyl_guard([&]() -> int32_t {
        std::map<std::string, ggml_backend_buffer_type_t> known;
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            if (ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(ggml_backend_dev_get(i))) {
                known[ggml_backend_buft_name(type)] = type;
            }
        }
        const auto found = known.find(buffer);
        if (found == known.end()) {
            std::string names;
            for (const auto & it : known) {
                names += (names.empty() ? "" : ", ") + it.first;
            }
            pyl_set_error("there is no buffer " + std::string(buffer) + "; there are: " + names);
            return PYL_ERROR_ARGUMENT;
        }
        placement->patterns.emplace_back(pattern);
        placement->overrides.push_back({ placement->patterns.back().c_str(), found->second });
        return PYL_OK;
    });
}

int32_t pyl_placement_split(struct pyl_placement * placement, const float * shares, int32_t n) {
    return pyl_guard([&]() -> int32_t {
        if (n < 0 || size_t(n) > llama_max_devices()) {
            pyl_set_error("at most " + std::to_string(llama_max_devices()) + " shares can be given");
            return PYL_ERROR_ARGUMENT;
        }
        placement->split.assign(llama_max_devices(), 0.0f);
        std::copy(shares, shares + n, placement->split.begin());
        return PYL_OK;
    });
}

void pyl_placement_apply(struct pyl_placement * placement, struct llama_model_params * params) {
    if (!placement->overrides.empty()) {
        if (placement->overrides.back().pattern) {
            placement->overrides.push_back({ nullptr, nullptr });
        }
        params->tensor_buft_overrides = placement->overrides.data();
    }
    if (!placement->split.empty()) {
        params->tensor_split = placement->split.data();
    }
}

int32_t pyl_placement_fit(struct pyl_placement * placement, const char * path, uint64_t margin_bytes,
        struct llama_model_params * params, struct llama_context_params * context) {
    return pyl_guard([&]() -> int32_t {
        placement->split.assign(llama_max_devices(), 0.0f);
        placement->overrides.assign(llama_max_tensor_buft_overrides(), { nullptr, nullptr });
        std::vector<size_t> margins(llama_max_devices(), margin_bytes);
        const auto status = common_fit_params(path, params, context, placement->split.data(), placement->overrides.data(),
            margins.data(), context->n_ctx, nullptr, GGML_LOG_LEVEL_ERROR);
        if (status == COMMON_PARAMS_FIT_STATUS_ERROR) {
            pyl_set_error("the memory that the model needs could not be measured");
            return PYL_ERROR;
        }
        return status == COMMON_PARAMS_FIT_STATUS_SUCCESS ? 1 : 0;
    });
}
