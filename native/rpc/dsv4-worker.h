// A worker: lends this machine's memory and cores to one client after the other over TCP.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dsv4_worker_options {
    std::string  host;               // an IPv4 address
    int          port = 0;           // 0 takes a free one
    const char * cache_dir = nullptr; // weights that were sent are kept there; nullptr keeps none
    size_t       n_threads = 1;
};

// What others may look at while the worker runs.
struct dsv4_worker_watch {
    std::function<bool()>     is_over;   // polled several times a second
    std::function<void(int)>  on_port;   // listening
    std::function<void(bool)> on_client; // one has come; one has left
};

// Returns when is_over says so. Throws std::runtime_error when the port cannot be had.
void dsv4_worker_run(const dsv4_worker_options & options, const dsv4_worker_watch & watch);
