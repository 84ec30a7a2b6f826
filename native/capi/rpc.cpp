// Several machines behind status codes: devices of workers, and being one.

#include "error.h"

#include "dsv4-link.h"
#include "dsv4-worker.h"
#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <string>

const char * pyl_rpc_version(void) {
    static const std::string version = std::to_string(RPC_PROTO_MAJOR_VERSION) + "." +
            std::to_string(RPC_PROTO_MINOR_VERSION) + "." + std::to_string(RPC_PROTO_PATCH_VERSION);
    return version.c_str();
}

void pyl_rpc_identity(uint8_t * out) {
    dsv4_rpc_identity(out);
}

int32_t pyl_devices(const char * endpoint, ggml_backend_dev_t * devices, uint64_t * n_bytes, int32_t n_max) {
    return pyl_guard([&]() -> int32_t {
        int32_t n = 0;
        const auto add = [&](ggml_backend_dev_t device) {
            size_t n_free = 0, n_total = 0;
            ggml_backend_dev_memory(device, &n_free, &n_total);
            if (n < n_max) {
                devices[n] = device;
                n_bytes[n] = n_free;
                n++;
            }
        };
        if (!endpoint) {
            for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
                ggml_backend_dev_t device = ggml_backend_dev_get(i);
                if (ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_GPU) {
                    add(device);
                }
            }
            return n;
        }
        ggml_backend_reg_t reg = ggml_backend_rpc_add_server(endpoint);
        if (!reg) {
            dsv4_rpc_fail(endpoint, "lends no device");
        }
        for (size_t i = 0; i < ggml_backend_reg_dev_count(reg); ++i) {
            add(ggml_backend_reg_dev_get(reg, i));
        }
        return n;
    });
}

void pyl_rpc_register(void) {
    if (!ggml_backend_reg_by_name("RPC")) {
        ggml_backend_register(ggml_backend_rpc_reg());
    }
}

int32_t pyl_rpc_serve(const char * host, int32_t port, const char * cache_dir, int32_t n_threads,
        struct pyl_worker * worker) {
    return pyl_guard([&]() -> int32_t {
        dsv4_worker_options options;
        options.host      = host;
        options.port      = port;
        options.cache_dir = cache_dir;
        options.n_threads = n_threads;
        dsv4_worker_watch watch;
        watch.is_over   = [&] { return __atomic_load_n(&worker->cancel, __ATOMIC_RELAXED) != 0; };
        watch.on_port   = [&](int number) { __atomic_store_n(&worker->port, number, __ATOMIC_RELAXED); };
        watch.on_client = [&](bool is_there) {
            __atomic_store_n(&worker->is_busy, int32_t(is_there), __ATOMIC_RELAXED);
            if (is_there) {
                __atomic_add_fetch(&worker->n_clients, 1, __ATOMIC_RELAXED);
            }
        };
        dsv4_worker_run(options, watch);
        return PYL_OK;
    });
}
