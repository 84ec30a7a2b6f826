// Waiting for another thread of the pool without starving it.
//
// Upstream's barrier spins forever. That is right as long as every thread has a core of its own; on a machine where
// something else runs too, the spinning thread keeps the core that the awaited thread needs, until its time slice
// ends, several hundred times a token. Short waits stay a spin; after a few microseconds the core is offered.

#pragma once

#if defined(_WIN32)
#    define WIN32_LEAN_AND_MEAN
#    include <windows.h>
#else
#    include <sched.h>
#endif

#define DSV4_N_SPINS 512 // about 10 us of `pause` on current x86

// Call after each look at the awaited value; n_spins starts at 0.
static inline void dsv4_spin_wait(int * n_spins) {
    if (++*n_spins >= DSV4_N_SPINS) {
        *n_spins = 0;
#if defined(_WIN32)
        SwitchToThread();
#else
        sched_yield();
#endif
    }
}
