#include "dsv4-product.h"

#include "dsv4-kernels.h"
#include "dsv4-paging.h"

#include "ggml-cpu-impl.h"

#include <math.h>
#include <stdint.h>

enum {
    PIECE      = 4,   // groups of a row that are decoded at a time: DSV4_ROWS of them stay in the nearest cache
    BLOCK_COLS = 48,  // columns that pass by decoded weights: those of rows of 4096 stay in the second cache
    MIN_CHUNK  = 16,  // weight rows that a thread takes at a time, multiples of DSV4_ROWS
    MAX_CHUNK  = 64,
};

// floats of a thread's scratch: decoded weights, their scales, the sums of a block of columns
#define N_SCRATCH (DSV4_ROWS*PIECE*(DSV4_GROUP + DSV4_LANES) + BLOCK_COLS*DSV4_ROWS*DSV4_LANES)

// Work memory, one after the other, each part aligned to 64 bytes.
struct work {
    float   * panels;  // (src1 rows, n_groups, 8, 16) activations in the kernels' order
    float   * scratch; // (threads, N_SCRATCH)
    int32_t * first;   // MUL_MAT_ID: (n_experts + 1) where an expert's slots start
    int32_t * slots;   //   (n_used*n_tokens) token*n_used + slot, sorted by expert
    int32_t * active;  //   (n_experts + 1) their number, then the experts that have slots
    size_t    size;
};

struct product {
    const struct ggml_tensor * w;   // src[0]
    const struct ggml_tensor * x;   // src[1]
    const struct ggml_tensor * ids; // src[2] or NULL
    struct ggml_tensor * dst;
    const struct dsv4_kernels * kernels;
    int64_t n;        // weights of a row
    int64_t n_groups;
    int64_t n_x_rows;
};

// A plain array in memory: repacked tensors bring their own operations in extra.
static bool is_plain(const struct ggml_tensor * t) {
    return t->extra == NULL && t->nb[0] == ggml_type_size(t->type);
}

static bool make_product(const struct ggml_tensor * op, struct product * p) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) { // asked for the work size of every operation
        return false;
    }
    const struct ggml_tensor * w = op->src[0];
    const struct ggml_tensor * x = op->src[1];

    const int32_t prec = ggml_get_op_params_i32(op, 3); // of src[1], see ggml_prec_set_src
    switch (w->type) {
        case GGML_TYPE_F8_E4M3_B128:
            break;
        case GGML_TYPE_MXFP4:
            if (prec == GGML_PREC_UNDEFINED || prec > GGML_PREC_BF16) {
                return false;
            }
            break;
        case GGML_TYPE_BF16:
            if (prec != GGML_PREC_F32) {
                return false;
            }
            break;
        default:
            return false;
    }
    if (x->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32 || !is_plain(w) || !is_plain(x) || op->nb[0] != sizeof(float)) {
        return false;
    }
    *p = (struct product) {
        .w        = w,
        .x        = x,
        .ids      = op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : NULL,
        .dst      = NULL,
        .kernels  = dsv4_kernels_for(w->type),
        .n        = w->ne[0],
        .n_groups = dsv4_n_groups(w->ne[0]),
        .n_x_rows = ggml_nrows(x),
    };
    return true;
}

static void * take(char * base, size_t * offset, size_t size) {
    char * part = base + *offset;
    *offset += GGML_PAD(size, 64);
    return part;
}

static struct work make_work(const struct product * p, int n_threads, char * base) {
    struct work work = { 0 };
    const int64_t n_experts = p->ids ? p->w->ne[2] : 0;
    const int64_t n_slots   = p->ids ? p->ids->ne[0]*p->ids->ne[1] : 0;

    work.panels  = take(base, &work.size, sizeof(float)*p->n_x_rows*p->n_groups*DSV4_GROUP);
    work.scratch = take(base, &work.size, sizeof(float)*n_threads*N_SCRATCH);
    work.first   = take(base, &work.size, sizeof(int32_t)*(n_experts + 1));
    work.slots   = take(base, &work.size, sizeof(int32_t)*n_slots);
    work.active  = take(base, &work.size, sizeof(int32_t)*(n_experts + 1));
    return work;
}

static char * align64(void * p) {
    return (char *) GGML_PAD((uintptr_t) p, 64);
}

size_t dsv4_product_work_size(int n_threads, const struct ggml_tensor * op) {
    struct product p;
    return make_product(op, &p) ? make_work(&p, n_threads, NULL).size + 64 : 0;
}

// --- before the barrier ---

// Row i of x, counted through all its dimensions.
static const float * x_row(const struct ggml_tensor * x, int64_t i) {
    const int64_t i1 = i % x->ne[1];
    const int64_t i2 = i / x->ne[1] % x->ne[2];
    const int64_t i3 = i / x->ne[1] / x->ne[2];
    return (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]);
}

static void fill_panels(const struct product * p, float * panels, int ith, int nth) {
    const int64_t n_units = p->n_x_rows*p->n_groups;
    const uint8_t * order = p->kernels->order;
    for (int64_t unit = n_units*ith/nth; unit < n_units*(ith + 1)/nth; unit++) {
        const int64_t g    = unit % p->n_groups;
        const float * x    = x_row(p->x, unit / p->n_groups) + g*DSV4_GROUP;
        float       * y    = panels + unit*DSV4_GROUP;
        const int64_t n    = p->n - g*DSV4_GROUP; // values left in the row
        if (n >= DSV4_GROUP) {
            for (int i = 0; i < DSV4_GROUP; i++) {
                y[i] = x[order[i]];
            }
        } else {
            for (int i = 0; i < DSV4_GROUP; i++) {
                y[i] = order[i] < n ? x[order[i]] : 0.0f;
            }
        }
    }
}

static int32_t expert_of(const struct ggml_tensor * ids, int64_t slot) {
    const int64_t n_used = ids->ne[0];
    return *(const int32_t *) ((const char *) ids->data + slot % n_used*ids->nb[0] + slot / n_used*ids->nb[1]);
}

static float * dst_of(const struct product * p, int64_t slot) {
    const int64_t n_used = p->ids->ne[0];
    return (float *) ((char *) p->dst->data + slot % n_used*p->dst->nb[1] + slot / n_used*p->dst->nb[2]);
}

// Sorts the slots by expert. A slot whose expert does not exist (a damaged routing table) gets NaN, which is seen.
static void sort_slots(const struct product * p, struct work * work) {
    const int64_t n_experts = p->w->ne[2];
    const int64_t n_slots   = p->ids->ne[0]*p->ids->ne[1];

    memset(work->first, 0, sizeof(int32_t)*(n_experts + 1));
    for (int64_t i = 0; i < n_slots; i++) {
        const int32_t e = expert_of(p->ids, i);
        if (e >= 0 && e < n_experts) {
            work->first[e]++;
        } else {
            for (int64_t r = 0; r < p->dst->ne[0]; r++) {
                dst_of(p, i)[r] = NAN;
            }
        }
    }
    int32_t n_active = 0;
    int32_t end      = 0;
    for (int32_t e = 0; e < n_experts; e++) {
        if (work->first[e] > 0) {
            work->active[1 + n_active++] = e;
        }
        end += work->first[e];
        work->first[e] = end; // moved down to the start below
    }
    work->first[n_experts] = end;
    work->active[0] = n_active;
    for (int64_t i = n_slots - 1; i >= 0; i--) {
        const int32_t e = expert_of(p->ids, i);
        if (e >= 0 && e < n_experts) {
            work->slots[--work->first[e]] = (int32_t) i;
        }
    }
}

// --- after it ---

// Rows [row, row_end) of a weight matrix with n_cols activation rows: col(c) gives the panel and the output column.
struct columns {
    const struct product * p;
    const struct work    * work;
    const int32_t        * slots; // MUL_MAT_ID
    int64_t                i2, i3; // MUL_MAT
};

static const float * column_panel(const struct columns * cols, int64_t c) {
    const struct product * p = cols->p;
    int64_t row;
    if (p->ids) {
        const int64_t slot = cols->slots[c];
        row = slot % p->ids->ne[0] % p->x->ne[1] + slot / p->ids->ne[0]*p->x->ne[1];
    } else {
        row = c + (cols->i2 + cols->i3*p->x->ne[2])*p->x->ne[1];
    }
    return cols->work->panels + row*p->n_groups*DSV4_GROUP;
}

static float * column_dst(const struct columns * cols, int64_t c) {
    const struct product * p = cols->p;
    if (p->ids) {
        return dst_of(p, cols->slots[c]);
    }
    return (float *) ((char *) p->dst->data + c*p->dst->nb[1] + cols->i2*p->dst->nb[2] + cols->i3*p->dst->nb[3]);
}

// Where up to BLOCK_COLS columns are. Found once for all weight rows: it takes divisions.
struct block {
    int           n_cols;
    const float * panel[BLOCK_COLS];
    float       * dst[BLOCK_COLS];
};

static void find_block(const struct columns * cols, int64_t first, int64_t n_cols, struct block * block) {
    block->n_cols = (int) MIN(BLOCK_COLS, n_cols - first);
    for (int c = 0; c < block->n_cols; c++) {
        block->panel[c] = column_panel(cols, first + c);
        block->dst[c]   = column_dst(cols, first + c);
    }
}

// n_rows <= DSV4_ROWS weight rows from w on, of which the first is row, with the columns of a block
static void multiply_block(
        const struct product * p, const struct block * block, const char * w, int64_t row, int n_rows, float * scratch) {
    const struct dsv4_kernels * kernels = p->kernels;
    const size_t group_bytes = ggml_row_size(p->w->type, DSV4_GROUP);

    float * scales = scratch + DSV4_ROWS*PIECE*DSV4_GROUP;
    float * sums   = scales  + DSV4_ROWS*PIECE*DSV4_LANES;
    memset(sums, 0, sizeof(float)*block->n_cols*DSV4_ROWS*DSV4_LANES);

    for (int64_t g = 0; g < p->n_groups; g += PIECE) {
        const int64_t n_groups = MIN(PIECE, p->n_groups - g);
        const int64_t n        = MIN(n_groups*DSV4_GROUP, p->n - g*DSV4_GROUP);
        for (int r = 0; r < DSV4_ROWS; r++) {
            // rows behind the last are computed again and dropped
            kernels->decode(n, w + MIN(r, n_rows - 1)*p->w->nb[1] + g*group_bytes,
                scratch + r*n_groups*DSV4_GROUP, scales + r*n_groups*DSV4_LANES);
        }
        for (int c = 0; c < block->n_cols; c += DSV4_COLS) {
            const int n_tile = MIN(DSV4_COLS, block->n_cols - c);
            const float * y[DSV4_COLS];
            for (int i = 0; i < n_tile; i++) {
                y[i] = block->panel[c + i] + g*DSV4_GROUP;
            }
            kernels->tile(n_groups, scratch, scales, y, n_tile, sums + c*DSV4_ROWS*DSV4_LANES);
        }
    }
    for (int c = 0; c < block->n_cols; c++) {
        float s[DSV4_ROWS];
        kernels->sum_rows(sums + c*DSV4_ROWS*DSV4_LANES, s);
        memcpy(block->dst[c] + row, s, n_rows*sizeof(float));
    }
}

static void multiply(
        const struct columns * cols, const char * w, int64_t row, int64_t row_end, int64_t n_cols, float * scratch) {
    const struct product * p = cols->p;
    const size_t row_bytes   = p->w->nb[1];

    if (n_cols == 1) {
        const float * y = column_panel(cols, 0);
        float       * s = column_dst(cols, 0);
        for (; row < row_end; row++) {
            p->kernels->dot(p->n, w + row*row_bytes, y, s + row);
        }
        return;
    }
    for (int64_t c = 0; c < n_cols; c += BLOCK_COLS) {
        struct block block;
        find_block(cols, c, n_cols, &block);
        for (int64_t r = row; r < row_end; r += DSV4_ROWS) {
            multiply_block(p, &block, w + r*row_bytes, r, (int) MIN(DSV4_ROWS, row_end - r), scratch);
        }
    }
}

bool dsv4_product_compute(struct ggml_compute_params * params, struct ggml_tensor * op) {
    struct product p;
    if (!make_product(op, &p)) {
        return false;
    }
    p.dst = op;
    struct work work = make_work(&p, params->nth, align64(params->wdata));
    GGML_ASSERT(params->wsize >= work.size + 64);

    fill_panels(&p, work.panels, params->ith, params->nth);
    if (params->ith == 0) {
        if (p.ids) {
            sort_slots(&p, &work);
            if (dsv4_paging_is_on()) {
                for (int32_t i = 0; i < MIN(work.active[0], DSV4_PAGING_AHEAD); i++) {
                    dsv4_paging_announce(p.w, work.active[1 + i], work.active[0]);
                }
            }
        }
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    float * scratch = work.scratch + (int64_t) params->ith*N_SCRATCH;

    const int64_t n_rows   = p.w->ne[1];
    const int64_t n_mats   = p.ids ? work.active[0] : p.x->ne[2]*p.x->ne[3];
    // a handful of chunks for each thread: few enough to be long streams, enough for none to wait
    const int64_t share    = n_mats*n_rows/(8*params->nth)/MIN_CHUNK*MIN_CHUNK;
    const int64_t chunk    = MAX(MIN_CHUNK, MIN(MAX_CHUNK, share));
    const int64_t n_chunks = (n_rows + chunk - 1)/chunk;

    for (int64_t unit = params->ith; unit < n_mats*n_chunks; unit = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t mat = unit / n_chunks;
        const int64_t row = unit % n_chunks*chunk;

        struct columns cols = { .p = &p, .work = &work };
        const char * w = p.w->data;
        int64_t n_cols;
        if (p.ids) {
            const int32_t expert = work.active[1 + mat];
            if (row == 0 && mat + DSV4_PAGING_AHEAD < n_mats && dsv4_paging_is_on()) {
                dsv4_paging_announce(p.w, work.active[1 + mat + DSV4_PAGING_AHEAD], work.active[0]);
            }
            w         += expert*p.w->nb[2];
            cols.slots = work.slots + work.first[expert];
            n_cols     = work.first[expert + 1] - work.first[expert];
        } else {
            cols.i2 = mat % p.x->ne[2];
            cols.i3 = mat / p.x->ne[2];
            w      += cols.i2/(p.x->ne[2]/p.w->ne[2])*p.w->nb[2] + cols.i3/(p.x->ne[3]/p.w->ne[3])*p.w->nb[3];
            n_cols  = p.x->ne[1];
        }
        multiply(&cols, w, row, MIN(row + chunk, n_rows), n_cols, scratch);
    }
    return true;
}
