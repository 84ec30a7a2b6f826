// Experts that memory cannot hold, for Python.

#include "error.h"

#include "dsv4-paging.h"

void pyl_paging_set(bool is_on) {
    dsv4_paging_set(is_on);
}

void pyl_paging_counts(int64_t * n_bytes, int64_t * n_bytes_missing) {
    const dsv4_paging_counts counts = dsv4_paging_get_counts();
    *n_bytes         = counts.n_bytes;
    *n_bytes_missing = counts.n_bytes_missing;
}
