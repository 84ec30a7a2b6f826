// The machine of cuda-host.h: fibers, barriers, shared memory, and three instructions.

#include "cuda-host.h"

#include "ggml-impl.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

static constexpr size_t STACK_BYTES = 256*1024;
static constexpr int    N_LANES     = 32;
static constexpr int    MAX_WORDS   = 6; // an exchange's, of a lane

[[noreturn]] static void fail(const char * what) {
    std::fprintf(stderr, "cuda-host: %s (block %u %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    std::abort();
}

struct fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    bool   is_done = true;
    void * fake_stack = nullptr; // AddressSanitizer's
};

// Met by all of a group; a second meeting may begin while some still leave the first.
struct meeting {
    int     n_there = 0;
    int64_t n_held  = 0;
};

struct warp_state {
    meeting  m;
    int      kind[2];
    uint32_t words[2][N_LANES][MAX_WORDS];
};

static std::vector<std::unique_ptr<fiber>> fibers;
static std::vector<warp_state> warps;
static meeting    block_meeting;
static ucontext_t scheduler;
static fiber *    current    = nullptr;
static int        n_in_block = 0;
static int64_t    n_progress = 0;
static int64_t    n_threads  = 0;
static const std::function<void()> * current_kernel = nullptr;
static std::map<std::tuple<const char *, int, size_t>, std::unique_ptr<char[]>> shared;

#if defined(__SANITIZE_ADDRESS__)
static const void * scheduler_stack = nullptr;
static size_t       scheduler_size  = 0;
#endif

static void to_scheduler(bool is_last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(is_last ? nullptr : &current->fake_stack, scheduler_stack, scheduler_size);
#else
    (void) is_last;
#endif
    fiber * self = current;
    swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    (*current_kernel)();
    current->is_done = true;
    n_progress++;
    to_scheduler(true);
}

static void resume(fiber & f) {
    current = &f;
#if defined(__SANITIZE_ADDRESS__)
    void * own = nullptr;
    __sanitizer_start_switch_fiber(&own, f.stack.get(), STACK_BYTES);
#endif
    swapcontext(&scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

static void meet(meeting & m, int n_all) {
    const int64_t mine = m.n_held;
    n_progress++;
    if (++m.n_there == n_all) {
        m.n_there = 0;
        m.n_held++;
        return;
    }
    while (m.n_held == mine) {
        to_scheduler(false);
    }
}

void dsv4_host_barrier() {
    meet(block_meeting, n_in_block);
}

const uint32_t * dsv4_host_exchange(int kind, const uint32_t * words, int n) {
    const uint32_t lane = threadIdx.x % N_LANES;
    warp_state   & w    = warps[threadIdx.x / N_LANES];
    const int      half = w.m.n_held % 2;

    if (w.m.n_there == 0) {
        w.kind[half] = kind;
    } else if (w.kind[half] != kind) {
        fail("lanes of a warp meet in different operations");
    }
    // packed (32, n), so that the caller can index it
    uint32_t * all = &w.words[half][0][0];
    memcpy(all + lane*n, words, n*sizeof(uint32_t));
    meet(w.m, N_LANES);
    return all;
}

void * dsv4_host_shared(const char * file, int line, size_t size) {
    std::unique_ptr<char[]> & p = shared[{ file, line, size }];
    if (!p) {
        p.reset(new char[size]);
        memset(p.get(), 0xFF, size); // NaN, and indices that hit nothing
    }
    return p.get();
}

int64_t dsv4_host_n_threads() {
    return n_threads;
}

void dsv4_host_run(dim3 grid, dim3 block, const std::function<void()> & kernel) {
    if (block.y != 1 || block.z != 1 || block.x % N_LANES != 0 || grid.x*(uint64_t) grid.y*grid.z == 0 || block.x > 1024 ||
            grid.y > 65535 || grid.z > 65535 || grid.x > 0x7FFFFFFF) {
        std::fprintf(stderr, "cuda-host: no such launch: grid %u %u %u, block %u %u %u\n",
            grid.x, grid.y, grid.z, block.x, block.y, block.z);
        std::abort();
    }
    gridDim  = grid;
    blockDim = block;
    n_in_block     = (int) block.x;
    current_kernel = &kernel;
    while (fibers.size() < block.x) {
        fibers.push_back(std::make_unique<fiber>());
    }
    for (uint32_t z = 0; z < grid.z; z++) {
        for (uint32_t y = 0; y < grid.y; y++) {
            for (uint32_t x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                shared.clear();
                block_meeting = {};
                warps.assign(block.x/N_LANES, {});
                for (uint32_t i = 0; i < block.x; i++) {
                    fiber & f = *fibers[i];
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp   = f.stack.get();
                    f.context.uc_stack.ss_size = STACK_BYTES;
                    f.context.uc_link          = nullptr;
                    makecontext(&f.context, fiber_main, 0);
                    f.is_done = false;
                }
                for (bool is_alive = true; is_alive;) {
                    is_alive = false;
                    const int64_t before = n_progress;
                    for (uint32_t i = 0; i < block.x; i++) {
                        if (!fibers[i]->is_done) {
                            threadIdx = dim3(i);
                            resume(*fibers[i]);
                            is_alive = true;
                        }
                    }
                    if (is_alive && n_progress == before) {
                        fail("threads wait for others that have left or wait elsewhere");
                    }
                }
                n_threads += block.x;
            }
        }
    }
}

// --- instructions ---

uint16_t dsv4_f32_to_f16(float x) {
    return ggml_fp32_to_fp16(x);
}

static float e4m3_value(uint32_t code) {
    const int exponent = code >> 3 & 15;
    const int mantissa = code & 7;
    if ((code & 0x7F) == 0x7F) {
        return NAN;
    }
    const float mag = exponent == 0 ? std::ldexp((float) mantissa, -9) : std::ldexp(8.0f + mantissa, exponent - 10);
    return code & 0x80 ? -mag : mag;
}

void dsv4_cvt_e4m3x2(uint32_t codes, float & x0, float & x1) {
    x0 = e4m3_value(codes & 0xFF);
    x1 = e4m3_value(codes >> 8 & 0xFF);
}

// m16n8k16: see dsv4-device.cuh for who holds what. Sums in double, rounded once; the tensor core's order of summation is
// its own.
void dsv4_mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t own[6] = { a[0], a[1], a[2], a[3], b[0], b[1] };
    const uint32_t * all = dsv4_host_exchange(DSV4_HOST_MMA, own, 6);

    const auto half = [](uint32_t pair, int i) { return __uint_as_float(i ? pair & 0xFFFF0000u : pair << 16); };
    const auto a_at = [&](int row, int k) {
        return half(all[(row%8*4 + k%8/2)*6 + k/8*2 + row/8], k%2);
    };
    const auto b_at = [&](int k, int col) {
        return half(all[(col*4 + k%8/2)*6 + 4 + k/8], k%2);
    };
    const int lane = threadIdx.x % N_LANES;
    float result[4];
    for (int i = 0; i < 4; i++) {
        const int row = lane/4 + i/2*8;
        const int col = lane%4*2 + i%2;
        double sum = d[i];
        for (int k = 0; k < 16; k++) {
            sum += (double) a_at(row, k)*b_at(k, col);
        }
        result[i] = (float) sum;
    }
    memcpy(d, result, sizeof(result));
}
