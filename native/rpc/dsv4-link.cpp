#include "dsv4-link.h"

#include "ggml-impl.h"
#include "ggml-rpc.h"
#include "transport.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 // macOS; Python ignores SIGPIPE
#endif

namespace {

constexpr int    CONNECT_MS  = 5000;
constexpr int    N_SILENT_S  = 7; // seven beats lost
constexpr size_t N_CHUNK_MAX = size_t(1) << 30;

constexpr char IDENTITY[DSV4_RPC_N_IDENTITY + 1] = "pyllama\0" DSV4_RPC_SERIES;

static_assert(sizeof(DSV4_RPC_SERIES) - 1 == DSV4_RPC_N_IDENTITY - 8, "a series digest has 16 hex digits");

thread_local std::string t_reason;

std::mutex  g_mutex;
std::string g_last_failure;
int64_t     g_n_failures;

dsv4_rpc_error make_error(const std::string & endpoint, const std::string & what) {
    std::string text = "worker " + endpoint + " " + what;
    std::lock_guard<std::mutex> lock(g_mutex);
    g_last_failure = text;
    g_n_failures++;
    return dsv4_rpc_error(text);
}

bool is_timeout(int error) {
    return error == EAGAIN || error == EWOULDBLOCK;
}

std::string silence() {
    return "gave no sign of life for " + std::to_string(N_SILENT_S) + " s";
}

// what the peer says of its patches, for a message
std::string series_of(const uint8_t * identity) {
    if (memcmp(identity, IDENTITY, 8) != 0) {
        return "";
    }
    std::string text(reinterpret_cast<const char *>(identity) + 8, DSV4_RPC_N_IDENTITY - 8);
    const bool is_plain = std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 127; });
    return is_plain ? text : "unreadable";
}

} // namespace

int64_t dsv4_rpc_n_failures(void) {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_n_failures;
}

std::string dsv4_rpc_last_failure(void) {
    std::lock_guard<std::mutex> lock(g_mutex);
    return g_last_failure;
}

void dsv4_rpc_fail(const std::string & endpoint, const std::string & what) {
    throw make_error(endpoint, !what.empty() ? what : t_reason.empty() ? "cannot be found: no such host" : t_reason);
}

std::exception_ptr dsv4_rpc_failure(const std::string & endpoint) {
    return std::make_exception_ptr(make_error(endpoint, t_reason.empty() ? "gave an answer of another length" : t_reason));
}

void dsv4_rpc_identity(uint8_t * out) {
    memcpy(out, IDENTITY, DSV4_RPC_N_IDENTITY);
}

void dsv4_rpc_check_worker(const std::string & endpoint, bool is_answered, const uint8_t * version, const uint8_t * identity) {
    if (!is_answered) {
        dsv4_rpc_fail(endpoint, t_reason.empty() ? "gave a greeting of another length: it is another program, or llama.cpp's"
                : t_reason + " when greeted: it is busy, hangs, or is another program");
    }
    if (version[0] != RPC_PROTO_MAJOR_VERSION || version[1] > RPC_PROTO_MINOR_VERSION) {
        dsv4_rpc_fail(endpoint, "speaks protocol " + std::to_string(version[0]) + "." + std::to_string(version[1]) + "." +
                std::to_string(version[2]) + " and not " + std::to_string(RPC_PROTO_MAJOR_VERSION) + "." +
                std::to_string(RPC_PROTO_MINOR_VERSION) + "." + std::to_string(RPC_PROTO_PATCH_VERSION) + ": it is stock llama.cpp's, or of another build");
    }
    if (memcmp(identity, DSV4_RPC_BUSY, DSV4_RPC_N_IDENTITY) == 0) {
        dsv4_rpc_fail(endpoint, "serves another client");
    }
    if (memcmp(identity, IDENTITY, DSV4_RPC_N_IDENTITY) != 0) {
        const std::string series = series_of(identity);
        dsv4_rpc_fail(endpoint, series.empty() ? "is not a worker of pyllama-dsv4"
                : "has patch series " + series + " and not " + DSV4_RPC_SERIES);
    }
}

bool dsv4_rpc_check_client(const uint8_t * identity) {
    if (memcmp(identity, IDENTITY, DSV4_RPC_N_IDENTITY) == 0) {
        return true;
    }
    const std::string series = series_of(identity);
    GGML_LOG_WARN("refused a client: %s\n", series.empty() ? "it is stock llama.cpp, or another program"
            : ("it has patch series " + series + " and not " + DSV4_RPC_SERIES).c_str());
    return false;
}

bool dsv4_rpc_recv_size(socket_t & sock, uint64_t & size) {
    do {
        if (!sock.recv_data(&size, sizeof(size))) {
            return false;
        }
    } while (size == DSV4_RPC_BEAT);
    return true;
}

dsv4_link::dsv4_link(int fd, dsv4_link_role role) : fd(fd), is_client(role == DSV4_LINK_CLIENT) {
    if (role == DSV4_LINK_CLIENT) {
        const struct timeval second = { 1, 0 }; // waiting is counted in these
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second));
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &second, sizeof(second));
    } else if (role == DSV4_LINK_WORKER) {
        // a client whose machine has vanished must not occupy the worker
        const int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
#ifdef TCP_KEEPIDLE
        const int idle_s = 10, interval_s = 5, n_probes = 3;
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE,  &idle_s,     sizeof(idle_s));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT,   &n_probes,   sizeof(n_probes));
#endif
        beat = std::thread([this] { run_beat(); });
    }
}

void dsv4_link::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        is_over = true;
    }
    changed.notify_all();
    if (beat.joinable()) {
        beat.join();
    }
}

namespace {

using addresses = std::unique_ptr<struct addrinfo, decltype(&freeaddrinfo)>;

addresses resolve(std::string host, int port, int flags) {
    if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
        host = host.substr(1, host.size() - 2);
    }
    struct addrinfo hints = {};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags    = flags | AI_NUMERICSERV;
    struct addrinfo * found = nullptr;
    const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
    if (error != 0) {
        t_reason = std::string("cannot be found: ") + gai_strerror(error);
        found    = nullptr;
        errno    = EADDRNOTAVAIL;
    }
    return addresses(found, freeaddrinfo);
}

// 0, or the error
int connect_within(int fd, const struct addrinfo & address, int limit_ms) {
    const int flags = fcntl(fd, F_GETFL, 0);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    int error = ::connect(fd, address.ai_addr, address.ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
        struct pollfd entry = { fd, POLLOUT, 0 };
        socklen_t n_error = sizeof(error);
        const int n = poll(&entry, 1, limit_ms);
        if (n <= 0 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n_error) != 0) {
            error = n == 0 ? ETIMEDOUT : errno;
        }
    }
    fcntl(fd, F_SETFL, flags);
    return error;
}

} // namespace

int dsv4_link::connect(const char * host, int port) {
    t_reason.clear();
    const auto found = resolve(host, port, 0);
    int n_left = 0;
    for (auto * address = found.get(); address; address = address->ai_next) {
        n_left++;
    }
    int left_ms = CONNECT_MS;
    for (auto * address = found.get(); address; address = address->ai_next) {
        const int limit_ms = left_ms / n_left--; // a silent address leaves time for those behind it
        const auto start   = std::chrono::steady_clock::now();
        const int fd       = socket(address->ai_family, address->ai_socktype, address->ai_protocol);
        const int on       = 1;
        const int error    = fd < 0 ? errno : connect_within(fd, *address, limit_ms);
        if (error == 0) {
            t_reason.clear();
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
            return fd;
        }
        t_reason = std::string("cannot be reached: ") + strerror(error);
        if (fd >= 0) {
            close(fd);
        }
        left_ms -= int(std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count());
        left_ms  = std::max(left_ms, 1);
    }
    return -1;
}

int dsv4_link::listen(const char * host, int port) {
    const auto found = resolve(host, port, AI_PASSIVE);
    for (auto * address = found.get(); address; address = address->ai_next) {
        const int fd = socket(address->ai_family, address->ai_socktype, address->ai_protocol);
        const int on = 1;
        if (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) == 0 &&
                bind(fd, address->ai_addr, address->ai_addrlen) == 0 && ::listen(fd, 1) == 0) {
            return fd;
        }
        const int error = errno;
        if (fd >= 0) {
            close(fd);
        }
        errno = error;
    }
    return -1;
}

void dsv4_link::run_beat() {
    std::unique_lock<std::mutex> lock(mutex);
    while (!changed.wait_for(lock, std::chrono::seconds(1), [this] { return is_over; })) {
        if (is_waiting || is_sending) {
            continue;
        }
        const uint64_t word = DSV4_RPC_BEAT;
        const ssize_t n = ::send(fd, &word, sizeof(word), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0 && size_t(n) != sizeof(word)) {
            shutdown(fd, SHUT_RDWR); // half a beat: the stream cannot be read any more
        }
    }
}

bool dsv4_link::send(const void * data, size_t size) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        is_sending = true;
    }
    const char * p = static_cast<const char *>(data);
    int n_silent = 0;
    int n_unread = 0; // beats that came while the other end takes nothing
    while (size > 0) {
        const ssize_t n = ::send(fd, p, std::min(size, N_CHUNK_MAX), MSG_NOSIGNAL);
        if (n > 0) {
            p        += n;
            size     -= size_t(n);
            n_silent  = 0;
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && is_timeout(errno) && is_client) {
            int n_now = 0;
            ioctl(fd, FIONREAD, &n_now);
            n_silent = n_now > n_unread ? 0 : n_silent + 1;
            n_unread = n_now;
            if (n_silent >= N_SILENT_S) {
                t_reason = silence();
                return false;
            }
        } else {
            t_reason = std::string("ended the connection: ") + strerror(errno);
            return false;
        }
    }
    return true;
}

bool dsv4_link::recv(void * data, size_t size) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        is_waiting = true;
    }
    t_reason.clear();
    char * p = static_cast<char *>(data);
    int n_silent = 0;
    while (size > 0) {
        const ssize_t n = ::recv(fd, p, std::min(size, N_CHUNK_MAX), 0);
        if (n > 0) {
            p        += n;
            size     -= size_t(n);
            n_silent  = 0;
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && is_timeout(errno) && is_client && ++n_silent < N_SILENT_S) {
            continue;
        } else {
            t_reason = n == 0 ? "ended the connection"
                : is_timeout(errno) ? silence() : std::string("ended the connection: ") + strerror(errno);
            return false;
        }
    }
    std::lock_guard<std::mutex> lock(mutex);
    is_waiting = false;
    return true;
}

bool dsv4_link::end_message() {
    std::lock_guard<std::mutex> lock(mutex);
    is_sending = false;
    return true;
}
