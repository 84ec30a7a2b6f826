#include "dsv4-worker.h"
#include "dsv4-link.h"

#include "ggml-backend.h"
#include "ggml-impl.h"
#include "ggml-rpc.h"
#include "transport.h"

#include <arpa/inet.h>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <poll.h>
#include <stdexcept>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr int POLL_MS = 100;
constexpr int LEAVE_MS = 2000; // a client that reconnects may be quicker than the end of its old connection

using backend_ptr = std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)>;

// GPUs if there are any, else the CPU.
std::vector<backend_ptr> make_backends(size_t n_threads) {
    std::vector<ggml_backend_dev_t> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        const auto type = ggml_backend_dev_type(device);
        if (type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) {
            devices.push_back(device);
        }
    }
    if (devices.empty()) {
        devices.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    }
    std::vector<backend_ptr> backends;
    for (ggml_backend_dev_t device : devices) {
        backends.emplace_back(ggml_backend_dev_init(device, nullptr), ggml_backend_free);
        if (!backends.back()) {
            throw std::runtime_error(std::string("the device ") + ggml_backend_dev_name(device) + " cannot be used");
        }
        auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads");
        if (set_n_threads) {
            set_n_threads(backends.back().get(), int(n_threads));
        }
    }
    return backends;
}

int port_of(int fd) {
    struct sockaddr_storage address = {};
    socklen_t n_bytes = sizeof(address);
    if (getsockname(fd, reinterpret_cast<struct sockaddr *>(&address), &n_bytes) != 0) {
        throw std::runtime_error(std::string("listening failed: ") + strerror(errno));
    }
    return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<struct sockaddr_in6 &>(address).sin6_port
                                               : reinterpret_cast<struct sockaddr_in &>(address).sin_port);
}

// Greets a client as a worker does, but with DSV4_RPC_BUSY.
void refuse(socket_t & client) {
    const struct timeval second = { 1, 0 };
    setsockopt(client.dsv4_fd(), SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second));
    char greeting[1 + sizeof(uint64_t) + DSV4_RPC_N_IDENTITY];
    if (!client.recv_data(greeting, sizeof(greeting))) {
        return; // unread bytes would make close() drop the answer
    }
    struct {
        uint64_t n_bytes = 4 + DSV4_RPC_N_IDENTITY;
        uint8_t  version[4] = { RPC_PROTO_MAJOR_VERSION, RPC_PROTO_MINOR_VERSION, RPC_PROTO_PATCH_VERSION, 0 };
        uint8_t  identity[DSV4_RPC_N_IDENTITY];
    } answer;
    static_assert(sizeof(answer) == 8 + 4 + DSV4_RPC_N_IDENTITY + 4, "only padding at the end");
    memcpy(answer.identity, DSV4_RPC_BUSY, DSV4_RPC_N_IDENTITY);
    client.send_data(&answer, 8 + 4 + DSV4_RPC_N_IDENTITY);
    client.flush();
}

// The one client that is being served, in a thread of its own: this one looks at who else comes.
class serving {
  public:
    serving(std::vector<ggml_backend_t> backends, const char * cache_dir, const dsv4_worker_watch & watch) :
        backends(std::move(backends)), cache_dir(cache_dir), watch(watch) {}

    ~serving() { end(); }

    bool is_busy() const { return is_running; }

    void start(socket_ptr socket) {
        end();
        client     = std::move(socket);
        is_running = true;
        watch.on_client(true);
        thread = std::thread([this, socket = client]() mutable {
            try {
                rpc_serve_client(backends, cache_dir, std::move(socket));
            } catch (const std::exception & err) {
                GGML_LOG_ERROR("a client was dropped: %s\n", err.what());
            }
            is_running = false;
        });
    }

    // Take note that the client has left. True once for each client.
    bool take_end() {
        if (!thread.joinable() || is_running) {
            return false;
        }
        end();
        return true;
    }

  private:
    std::vector<ggml_backend_t> backends;
    const char *                cache_dir;
    const dsv4_worker_watch &   watch;
    socket_ptr                  client;
    std::thread                 thread;
    std::atomic<bool>           is_running { false };

    void end() {
        if (!thread.joinable()) {
            return;
        }
        if (is_running) {
            shutdown(client->dsv4_fd(), SHUT_RDWR);
        }
        thread.join();
        client = nullptr;
        watch.on_client(false);
    }
};

} // namespace

void dsv4_worker_run(const dsv4_worker_options & options, const dsv4_worker_watch & watch) {
    auto backends = make_backends(options.n_threads);
    errno = 0;
    auto listener = socket_t::create_server(options.host.c_str(), options.port);
    if (!listener) {
        throw std::runtime_error(strerror(errno));
    }
    std::vector<ggml_backend_t> views;
    for (const auto & backend : backends) {
        views.push_back(backend.get());
    }
    serving client(views, options.cache_dir, watch);
    watch.on_port(port_of(listener->dsv4_fd()));
    while (!watch.is_over()) {
        client.take_end();
        struct pollfd entry = { listener->dsv4_fd(), POLLIN, 0 };
        if (poll(&entry, 1, POLL_MS) <= 0) {
            continue;
        }
        auto next = listener->accept();
        if (!next) {
            continue; // it has left already
        }
        for (int ms = 0; client.is_busy() && ms < LEAVE_MS && !watch.is_over(); ms += 10) {
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
        if (client.is_busy()) {
            refuse(*next);
        } else {
            client.start(std::move(next));
        }
    }
}
