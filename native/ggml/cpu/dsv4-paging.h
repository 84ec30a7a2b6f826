// Experts of a mapped file that memory cannot hold. Left alone, the system reads around every page that is missing, which is
// slow where an expert's matrix is scattered in the page cache and wasteful where the next expert was not chosen. Here the
// ranges of the chosen experts are announced as soon as the routing is known, for all matrices of the layer, and nothing is read
// around them; the system's page cache keeps what is used often. Off unless set. Owns the announcements and their counts; the
// decision is the caller's. Does nothing on Windows.

#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DSV4_PAGING_AHEAD    = 8, // experts that are announced before the one at work
    DSV4_PAGING_MATRICES = 3, // of an expert: gate, up, down
};

// For the whole process.
void dsv4_paging_set(bool is_on);
bool dsv4_paging_is_on(void);

// The n <= DSV4_PAGING_MATRICES weights (k, m, n_experts) that one routing chooses from, in the order of their use.
void dsv4_paging_join(const struct ggml_tensor * const * weights, int n);

// Announces one expert of w, of n_chosen that are needed now. Few are announced for all matrices of the layer when the first
// is at work, and not again.
void dsv4_paging_announce(const struct ggml_tensor * w, int32_t expert, int32_t n_chosen);

// Announces n <= DSV4_PAGING_AHEAD different experts of the layer that w joined, for all its matrices, before its turn comes.
// That turn then announces them no more.
void dsv4_paging_announce_early(const struct ggml_tensor * w, const int32_t * experts, int n);

struct dsv4_paging_counts {
    int64_t n_bytes;         // of experts that were announced
    int64_t n_bytes_missing; // of these, not in memory then; the system may hide it for files of other users
};

struct dsv4_paging_counts dsv4_paging_get_counts(void);

#ifdef __cplusplus
}
#endif
