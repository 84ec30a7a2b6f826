#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE // mincore
#endif

#include "dsv4-paging.h"

#ifndef _WIN32

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_LAYERS = 512, MINCORE_PAGES = 1024 };

struct layer {
    const char * data[DSV4_PAGING_MATRICES]; // NULL: fewer matrices
    size_t       matrix_bytes[DSV4_PAGING_MATRICES];
    int32_t      early[DSV4_PAGING_AHEAD]; // experts that are announced and not used yet
    int          n_early;
};

static atomic_bool      g_is_on;
static atomic_llong     g_n_bytes;
static atomic_llong     g_n_bytes_missing;
static pthread_mutex_t  g_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct layer     g_layers[MAX_LAYERS]; // of all models; the oldest are forgotten
static int              g_n_layers;           // ever joined

void dsv4_paging_set(bool is_on) {
    atomic_store(&g_is_on, is_on);
}

bool dsv4_paging_is_on(void) {
    return atomic_load_explicit(&g_is_on, memory_order_relaxed);
}

struct dsv4_paging_counts dsv4_paging_get_counts(void) {
    return (struct dsv4_paging_counts) { atomic_load(&g_n_bytes), atomic_load(&g_n_bytes_missing) };
}

// The whole pages that a range touches.
static char * to_pages(const char * data, size_t * n_bytes) {
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = (uintptr_t) data/page*page;
    *n_bytes = ((uintptr_t) data + *n_bytes + page - 1)/page*page - begin;
    return (char *) begin;
}

static void count(char * begin, size_t n_bytes) {
    const size_t page = (size_t) sysconf(_SC_PAGESIZE);
    size_t n_missing = 0;
    for (size_t at = 0; at < n_bytes; at += MINCORE_PAGES*page) {
        unsigned char is_resident[MINCORE_PAGES];
        const size_t n = n_bytes - at < MINCORE_PAGES*page ? n_bytes - at : MINCORE_PAGES*page;
        if (mincore(begin + at, n, (void *) is_resident) != 0) { // its type differs between systems
            return;
        }
        for (size_t i = 0; i < n/page; i++) {
            n_missing += !(is_resident[i] & 1);
        }
    }
    atomic_fetch_add(&g_n_bytes, (long long) n_bytes);
    atomic_fetch_add(&g_n_bytes_missing, (long long) (n_missing*page));
}

static void announce(const char * data, size_t n_bytes) {
    char * begin = to_pages(data, &n_bytes);
    count(begin, n_bytes);
    // what fails here (memory that is not a file's, a model that was freed) is read when it is touched
    madvise(begin, n_bytes, MADV_WILLNEED);
}

static struct layer * layer_of(const struct ggml_tensor * w) { // the mutex is held
    for (int i = 0; i < g_n_layers && i < MAX_LAYERS; i++) {
        for (int j = 0; j < DSV4_PAGING_MATRICES; j++) {
            if (g_layers[i].data[j] == w->data) {
                return &g_layers[i];
            }
        }
    }
    return NULL;
}

void dsv4_paging_join(const struct ggml_tensor * const * weights, int n) {
    struct layer layer = { 0 };
    for (int i = 0; i < n; i++) {
        layer.data[i]         = weights[i]->data;
        layer.matrix_bytes[i] = weights[i]->nb[2];
    }
    pthread_mutex_lock(&g_mutex);
    const struct layer * known = layer_of(weights[0]);
    const bool is_known = known && memcmp(known->data, layer.data, sizeof(layer.data)) == 0;
    if (!is_known) {
        g_layers[g_n_layers++ % MAX_LAYERS] = layer;
    }
    pthread_mutex_unlock(&g_mutex);

    for (int i = 0; i < n && !is_known; i++) {
        size_t n_bytes = ggml_nbytes(weights[i]);
        char * begin   = to_pages(weights[i]->data, &n_bytes);
        madvise(begin, n_bytes, MADV_RANDOM);
    }
}

static void announce_expert(const struct layer * layer, int32_t expert) {
    for (int i = 0; i < DSV4_PAGING_MATRICES && layer->data[i]; i++) {
        announce(layer->data[i] + (size_t) expert*layer->matrix_bytes[i], layer->matrix_bytes[i]);
    }
}

// Takes an expert off the list of those that were announced early.
static bool was_early(struct layer * layer, int32_t expert) {
    for (int i = 0; i < layer->n_early; i++) {
        if (layer->early[i] == expert) {
            layer->early[i] = layer->early[--layer->n_early];
            return true;
        }
    }
    return false;
}

void dsv4_paging_announce(const struct ggml_tensor * w, int32_t expert, int32_t n_chosen) {
    struct layer layer = { .data = { w->data }, .matrix_bytes = { w->nb[2] } };
    if (n_chosen <= DSV4_PAGING_AHEAD) {
        pthread_mutex_lock(&g_mutex);
        struct layer * known = layer_of(w);
        if (known) {
            layer = *known;
            if (known->data[0] != w->data || was_early(known, expert)) {
                layer.data[0] = NULL; // was announced with the first, or early
            }
        }
        pthread_mutex_unlock(&g_mutex);
    }
    announce_expert(&layer, expert);
}

void dsv4_paging_announce_early(const struct ggml_tensor * w, const int32_t * experts, int n) {
    struct layer layer = { 0 };
    pthread_mutex_lock(&g_mutex);
    struct layer * known = layer_of(w);
    if (known) {
        memcpy(known->early, experts, n*sizeof(*experts));
        known->n_early = n;
        layer = *known;
    }
    pthread_mutex_unlock(&g_mutex);
    for (int i = 0; i < n; i++) {
        announce_expert(&layer, experts[i]);
    }
}

#else

void dsv4_paging_set(bool is_on) {
    (void) is_on;
}

bool dsv4_paging_is_on(void) {
    return false;
}

void dsv4_paging_join(const struct ggml_tensor * const * weights, int n) {
    (void) weights; (void) n;
}

void dsv4_paging_announce(const struct ggml_tensor * w, int32_t expert, int32_t n_chosen) {
    (void) w; (void) expert; (void) n_chosen;
}

void dsv4_paging_announce_early(const struct ggml_tensor * w, const int32_t * experts, int n) {
    (void) w; (void) experts; (void) n;
}

struct dsv4_paging_counts dsv4_paging_get_counts(void) {
    return (struct dsv4_paging_counts) { 0, 0 };
}

#endif
