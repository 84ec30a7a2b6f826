// One TCP connection between a worker and its client: signs of life, time limits, and who is at the other end. The
// hooks of patches/ggml-rpc-*.patch call it; what is said over the connection is upstream's ggml-rpc.cpp.
//
// A graph may take minutes, so silence alone says nothing. While a worker is at work on a command it sends a beat (the
// eight bytes of DSV4_RPC_BEAT in place of a response's size) every second, and a client waits for as long as beats come.

#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

struct ggml_backend;
struct socket_t;

#define DSV4_RPC_BEAT        UINT64_MAX
#define DSV4_RPC_N_IDENTITY  24 // RPC_CONN_CAPS_SIZE
#define DSV4_RPC_BUSY        "pyllama\0serves another " // in place of an identity: try again later

struct dsv4_rpc_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The last reason why a worker could not be used, and how many there have been: upstream turns exceptions into log lines
// while it loads.
int64_t     dsv4_rpc_n_failures(void);
std::string dsv4_rpc_last_failure(void);

// "worker HOST:PORT ..." as an exception. Without text: the reason of this thread's last failed send or recv.
[[noreturn]] void  dsv4_rpc_fail(const std::string & endpoint, const std::string & what);
std::exception_ptr dsv4_rpc_failure(const std::string & endpoint);

// What both ends say of themselves when they meet: that they are ours, and the patch series. Zeros in stock llama.cpp.
void dsv4_rpc_identity(uint8_t * out); // DSV4_RPC_N_IDENTITY bytes

// Client: throws unless the worker has answered, with the same protocol and the same identity.
void dsv4_rpc_check_worker(const std::string & endpoint, bool is_answered, const uint8_t * version, const uint8_t * identity);

// Worker: whether the client is of the same build; says so in the log if not.
bool dsv4_rpc_check_client(const uint8_t * identity);

// Worker: whether [data, data + size) lies in a buffer; the numbers are the client's.
inline bool dsv4_rpc_is_inside(uint64_t data, uint64_t size, uint64_t buffer, uint64_t buffer_size) {
    return data >= buffer && data - buffer <= buffer_size && size <= buffer_size - (data - buffer);
}

// Upstream's, in ggml-rpc.cpp: answers one client until it leaves.
void rpc_serve_client(const std::vector<ggml_backend *> & backends, const char * cache_dir, std::shared_ptr<socket_t> sock);

// The next size of a response; beats before it are left out.
bool dsv4_rpc_recv_size(socket_t & sock, uint64_t & size);

enum dsv4_link_role {
    DSV4_LINK_NONE   = 0,
    DSV4_LINK_CLIENT = 1, // the other end must show signs of life
    DSV4_LINK_WORKER = 2, // this end shows them
};

class dsv4_link {
  public:
    dsv4_link(int fd, dsv4_link_role role);
    ~dsv4_link() { stop(); }

    void stop(); // before the descriptor is closed

    // A descriptor; negative on failure. The host is a name, an IPv4 address or an IPv6 address, with brackets or without.
    static int connect(const char * host, int port); // within a time limit, to the first of its addresses that answers
    static int listen(const char * host, int port);  // errno says why not

    bool send(const void * data, size_t size);
    bool recv(void * data, size_t size);
    bool end_message(); // what was sent since the last call is complete

  private:
    int  fd;
    bool is_client;

    // worker
    std::thread             beat;
    std::mutex              mutex;
    std::condition_variable changed;
    bool                    is_over    = false;
    bool                    is_waiting = false; // for the client
    bool                    is_sending = false;

    void run_beat();
};
