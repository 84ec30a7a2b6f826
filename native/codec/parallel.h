// Splitting a loop over independent items between threads. Owns the split, the threads' lifetime and their
// floating-point environment; leaves the loop body, which must not throw, to its caller. No pool: threads live for
// one call, so nothing is left behind for a fork to break.

#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dsv4_codec {

// Rounding to nearest with subnormals kept, for the lifetime of the object. Both are state of the calling thread,
// inherited by the threads it starts, and libraries built with -ffast-math switch subnormals off when loaded.
class default_fp_env {
public:
    default_fp_env() {
        std::fegetenv(&saved);
        std::fesetenv(FE_DFL_ENV);
    }
    ~default_fp_env() { std::fesetenv(&saved); }

    default_fp_env(const default_fp_env &) = delete;
    default_fp_env & operator=(const default_fp_env &) = delete;

private:
    std::fenv_t saved;
};

// Below this many bytes read and written per thread, starting one costs more than it saves.
constexpr int64_t MIN_BYTES_PER_THREAD = 256*1024;

// Calls fn(begin, end) on ranges that together cover 0 .. n_items, from up to n_threads threads (0 = one per core).
template <typename F>
void parallel_ranges(int64_t n_items, int64_t bytes_per_item, int n_threads, const F & fn) {
    const auto run = [&fn](int64_t begin, int64_t end) {
        const default_fp_env env;
        fn(begin, end);
    };

    int64_t n = n_threads > 0 ? n_threads : (int64_t) std::thread::hardware_concurrency(); // 0 if unknown
    const int64_t n_useful = n_items*bytes_per_item/MIN_BYTES_PER_THREAD;
    n = n < n_useful ? n : n_useful;
    n = n < n_items  ? n : n_items;
    if (n <= 1) {
        run(0, n_items);
        return;
    }

    std::vector<std::thread> threads;
    threads.reserve((size_t) n);
    int64_t begin = 0;
    for (int64_t i = 0; i < n - 1; i++) {
        const int64_t end = begin + (n_items - begin)/(n - i);
        try {
            threads.emplace_back(run, begin, end);
        } catch (const std::system_error &) {
            break; // no thread to be had (a limit of the system): the rest is done here
        }
        begin = end;
    }
    run(begin, n_items);
    for (std::thread & thread : threads) {
        thread.join();
    }
}

// The smallest of the indexes that several threads report; -1 while there is none.
class first_index {
public:
    void report(int64_t i) {
        int64_t old = index.load(std::memory_order_relaxed);
        while ((old < 0 || i < old) && !index.compare_exchange_weak(old, i, std::memory_order_relaxed)) {
        }
    }
    int64_t get() const { return index.load(std::memory_order_relaxed); }

private:
    std::atomic<int64_t> index { -1 };
};

// How often something was seen in one range, and the first index it was seen at; -1 while it was not.
struct counter {
    int64_t n     = 0;
    int64_t first = -1;

    void add(int64_t times, int64_t i) {
        first = first < 0 && times != 0 ? i : first;
        n += times;
    }
    void merge(const counter & other) {
        if (other.first >= 0 && (first < 0 || other.first < first)) {
            first = other.first;
        }
        n += other.n;
    }
};

} // namespace dsv4_codec
