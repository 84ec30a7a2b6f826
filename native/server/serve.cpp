// Runs upstream's server in this process, by function: reads its options, sets our defaults, refuses what we do not
// offer, and ends it on signals. The server itself is upstream's llama_server().

#include "dsv4-server.h"
#include "error.h"

#include "arg.h"
#include "common.h"
#include "log.h"
#include "server-stream.h"

#include <atomic>
#include <clocale>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <poll.h>
#include <stdexcept>
#include <thread>
#include <unistd.h>

// upstream's, in tools/server/server.cpp, which has no header. Without argv it leaves signals and downloads to us.
int  llama_server(common_params & params, int argc, char ** argv);
void llama_server_terminate();

namespace {

struct bad_option : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// --- signals ---

constexpr int LOAD_END_MS = 3000; // what the end of a load may take; there are stages that cannot be cancelled

std::atomic<bool> g_is_loaded { false };
std::atomic<bool> g_is_ending { false };
int               g_wake[2]; // a handler may write to a pipe, and to little else

void on_signal(int number) {
    const unsigned char byte = number;
    (void) !write(g_wake[1], &byte, 1);
}

// Ends the server on SIGINT and SIGTERM: in order, but at once when asked twice, or when a load does not come to its end.
// Signals that the process ignores stay ignored.
class signal_watch {
  public:
    signal_watch() {
        if (pipe(g_wake) != 0) {
            throw std::runtime_error(std::string("no pipe for signals: ") + strerror(errno));
        }
        g_is_loaded = g_is_ending = false;
        thread = std::thread([this] { watch(); });
        for (size_t i = 0; i < 2; i++) {
            struct sigaction action = {};
            sigaction(numbers[i], nullptr, &before[i]);
            if (before[i].sa_handler != SIG_IGN) {
                action.sa_handler = on_signal;
                sigemptyset(&action.sa_mask);
                action.sa_flags = SA_RESTART;
                sigaction(numbers[i], &action, nullptr);
            }
        }
    }

    ~signal_watch() {
        for (size_t i = 0; i < 2; i++) {
            sigaction(numbers[i], &before[i], nullptr);
        }
        on_signal(0);
        thread.join();
        close(g_wake[0]);
        close(g_wake[1]);
    }

    // the first signal that came, or 0
    int number() const { return first; }

  private:
    static constexpr int numbers[2] = { SIGINT, SIGTERM };
    static constexpr int STEP_MS    = 50;

    struct sigaction before[2];
    std::atomic<int> first { 0 };
    std::thread      thread;

    void watch() {
        sigset_t all; // ours is not the thread to run handlers in
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);

        const auto n_steps = [](int ms) { return ms / STEP_MS; };
        bool was_loaded = false;
        int  n_waited   = 0;
        while (true) {
            struct pollfd entry = { g_wake[0], POLLIN, 0 };
            if (poll(&entry, 1, first != 0 ? STEP_MS : -1) > 0) {
                unsigned char byte = 0;
                if (read(g_wake[0], &byte, 1) != 1 || byte == 0) {
                    return;
                }
                if (first != 0) {
                    _exit(128 + byte);
                }
                first       = byte;
                g_is_ending = true;
                was_loaded  = g_is_loaded;
                if (was_loaded) {
                    llama_server_terminate();
                }
            } else if (!was_loaded) {
                if (g_is_loaded) {
                    llama_server_terminate(); // again and again: its loop may not have begun
                } else if (++n_waited > n_steps(LOAD_END_MS)) {
                    _exit(128 + first);
                }
            }
        }
    }
};

constexpr int signal_watch::numbers[2];

// --- options ---

bool is_loopback(const std::string & host) {
    return host == "localhost" || host == "::1" || host.compare(0, 4, "127.") == 0 ||
           (host.size() > 5 && host.compare(host.size() - 5, 5, ".sock") == 0);
}

void read_options(int argc, char ** argv, common_params & params) {
    // the defaults that differ from upstream's; the command line may change them
    params.cors_origins     = ""; // no page of another origin may read answers
    params.endpoint_metrics = true;
    params.swa_full         = false;
    // DeepSeek's own rule: reasoning before the last user message is dropped unless there are tools
    params.default_template_kwargs["preserve_reasoning"] = "false";
    params.preserve_reasoning_specified                  = true;

    const std::string path = argv[2]; // program, -m, file
    if (!common_params_parse(argc, argv, params, LLAMA_EXAMPLE_SERVER)) {
        throw bad_option("the server did not accept its options, see above");
    }
    common_log_set_verbosity_thold(params.verbosity); // silent until now, see pyl_log_init()

    if (params.model.path != path || !params.model.hf_repo.empty() || !params.model.docker_repo.empty() ||
        !params.model.url.empty()) {
        throw bad_option("the server's options name another model than FILE");
    }
    if (!params.models_dir.empty() || !params.models_preset.empty()) {
        throw bad_option("serving several models is not offered: one process serves one file");
    }
    if (!params.mmproj.path.empty() || !params.mmproj.url.empty() || !params.mmproj.hf_repo.empty()) {
        throw bad_option("images and sound are not offered: there, text of messages could become special tokens");
    }
    if (params.model_alias.empty()) { // the name that clients see would be the path
        params.model_alias.insert(std::filesystem::path(path).filename().string());
    }
    if (params.api_keys.empty()) {
        for (const auto & host : params.hostnames) {
            if (!is_loopback(host)) {
                LOG_WRN("security: everybody who can reach %s can use this server: it has no API key\n", host.c_str());
            }
        }
    }
}

} // namespace

void dsv4_server_loaded(void) {
    g_is_loaded = true;
}

bool dsv4_server_is_ending(void) {
    return g_is_ending;
}

int32_t pyl_server_run(int32_t argc, const char * const * argv, int32_t n_requests_max) {
    return pyl_guard([&]() -> int32_t {
        setlocale(LC_NUMERIC, "C");
        common_params params;
        common_init();
        try {
            // upstream's parser takes char **, and reads only
            read_options(argc, const_cast<char **>(argv), params);
        } catch (const bad_option & err) {
            common_log_flush(common_log_main());
            pyl_set_error(err.what());
            return PYL_ERROR_ARGUMENT;
        }
        dsv4_server_set_requests_max(n_requests_max);
        signal_watch watch;
        server_stream_session_manager_start();
        llama_numa_init(params.numa);
        const int status = llama_server(params, 0, nullptr);
        common_log_flush(common_log_main());
        if (watch.number() != 0) {
            return watch.number();
        }
        if (status != 0) {
            pyl_set_error("see the lines above");
            return PYL_ERROR;
        }
        return 0;
    });
}
