// Upstream's quantiser behind a status, with a report of what it writes.

#include "error.h"

#include "chat.h" // common_json
#include "dsv4-quant.h"
#include "llama-ext.h"

#include <cstring>

using json = common_json;

namespace {

json dialect_json(dsv4_form form) {
    switch (form) {
        case DSV4_FORM_NATIVE:   return "native";
        case DSV4_FORM_UPSTREAM: return "upstream";
        default:                 return nullptr;
    }
}

json report_json(const dsv4_quant_job & job) {
    json tensors = json::array();
    for (const auto & tensor : job.tensors) {
        tensors.push_back({
            { "name",        tensor.name                    },
            { "type_in",     ggml_type_name(tensor.type_in)  },
            { "type_out",    ggml_type_name(tensor.type_out) },
            { "n_bytes_in",  tensor.n_bytes_in              },
            { "n_bytes_out", tensor.n_bytes_out             },
        });
    }
    return {
        { "input_dialect", dialect_json(job.input)                                                   },
        { "dialect",       dialect_json(job.input == DSV4_FORM_BOTH ? job.input : job.output())      },
        { "n_bytes",       job.n_bytes_file                                                          },
        { "tensors",       tensors                                                                   },
    };
}

} // namespace

bool pyl_quantize_knows(enum llama_ftype ftype) {
    return llama_ftype_get_default_type(ftype) != GGML_TYPE_COUNT;
}

int32_t pyl_quantize(const char * path_in, const char * path_out, struct llama_model_quantize_params params,
        enum pyl_dialect dialect, struct pyl_monitor * monitor, char ** report) {
    *report = nullptr;
    return pyl_guard([&]() -> int32_t {
        dsv4_quant_job job;
        job.dialect = dialect == PYL_DIALECT_NATIVE   ? DSV4_FORM_NATIVE
                    : dialect == PYL_DIALECT_UPSTREAM ? DSV4_FORM_UPSTREAM : DSV4_FORM_BOTH;
        bool is_cancelled = false;
        job.on_progress = [&](double fraction) {
            const float progress = float(fraction);
            __atomic_store(&monitor->progress, &progress, __ATOMIC_RELAXED);
            is_cancelled = __atomic_load_n(&monitor->cancel, __ATOMIC_RELAXED) != 0;
            return !is_cancelled;
        };
        dsv4_quant_scope scope(job);
        if (llama_model_quantize(path_in, path_out, &params) != 0) {
            pyl_set_error(is_cancelled ? "cancelled" : ""); // the reason is in the log
            return is_cancelled ? PYL_CANCELLED : PYL_ERROR;
        }
        const std::string text = report_json(job).dump_safe();
        *report = strdup(text.c_str());
        return *report ? PYL_OK : PYL_ERROR_MEMORY;
    });
}
