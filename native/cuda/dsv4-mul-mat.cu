// Many columns: tiles of 128 rows and 64 or 16 columns on tensor cores. Weights are decoded to BF16 on their way into shared
// memory, where their codes are exact; scales multiply the sums of their groups in float32, so that no scale can leave
// BF16's range. Activations are split into BF16 terms whose sum is the float32 number: three of 8 bits hold its 24.
//
// MUL_MAT_ID first sorts the slots by expert; a tile then has columns of one expert.

#include "dsv4-mul-mat.cuh"
#include "dsv4-weights.cuh"

static constexpr int N_THREADS = 256;
static constexpr int BM = 128; // rows of a tile
static constexpr int BK = 64;  // weights of a row that are in shared memory at a time
static constexpr int STRIDE = BK/2 + 4; // words of a row there: the 8 rows of a step lie in different banks

static constexpr int MAX_EXPERTS = 1024;

// --- MUL_MAT_ID: slots by expert ---

struct tile {
    int32_t expert; // n_experts: slots whose expert does not exist
    int32_t first;  // in the sorted slots
    int32_t n_cols;
};

// Work memory, one after the other.
struct sorted {
    int32_t * n_tiles;
    int32_t * slots; // (n_slots)
    tile    * tiles; // (max_tiles)
};

static int64_t max_tiles(const dsv4_mul_args & a, int bn) {
    const int64_t n_slots = a.n_used*a.n_tokens;
    return n_slots/bn + (a.n_experts + 1 < n_slots ? a.n_experts + 1 : n_slots);
}

static __host__ __device__ sorted make_sorted(void * work, int64_t n_slots) {
    int32_t * p = (int32_t *) work;
    return { p, p + 4, (tile *) (p + 4 + n_slots) };
}

struct sort_state {
    int32_t count[MAX_EXPERTS + 1];
    int32_t first[MAX_EXPERTS + 1];
    int32_t n_slots[N_THREADS]; // of a thread's experts; then of those before and with them
    int32_t n_tiles[N_THREADS];
};

// One block. Within an expert the order of the slots is not fixed; no sum depends on it.
static __global__ void __launch_bounds__(N_THREADS) sort_slots(const dsv4_mul_args a, void * work, int bn) {
    DSV4_SHARED(sort_state, s);
    const int64_t n_slots   = a.n_used*a.n_tokens;
    const int     n_buckets = (int) a.n_experts + 1;
    const sorted  out       = make_sorted(work, n_slots);

    for (int e = threadIdx.x; e < n_buckets; e += N_THREADS) {
        s.count[e] = 0;
    }
    __syncthreads();
    for (int64_t slot = threadIdx.x; slot < n_slots; slot += N_THREADS) {
        const int32_t e = dsv4_expert_of_slot(a, slot);
        atomicAdd(&s.count[e >= 0 && e < a.n_experts ? e : a.n_experts], 1);
    }
    __syncthreads();

    // a thread's experts are neighbours; sums over threads by doubling
    const int n_own = (n_buckets + N_THREADS - 1)/N_THREADS;
    const int e0    = threadIdx.x*n_own;
    const int e1    = e0 + n_own < n_buckets ? e0 + n_own : n_buckets;
    int own_slots = 0;
    int own_tiles = 0;
    for (int e = e0; e < e1; e++) {
        own_slots += s.count[e];
        own_tiles += (s.count[e] + bn - 1)/bn;
    }
    s.n_slots[threadIdx.x] = own_slots;
    s.n_tiles[threadIdx.x] = own_tiles;
    __syncthreads();
    for (int step = 1; step < N_THREADS; step *= 2) {
        const bool has = (int) threadIdx.x >= step;
        const int  ds  = has ? s.n_slots[threadIdx.x - step] : 0;
        const int  dt  = has ? s.n_tiles[threadIdx.x - step] : 0;
        __syncthreads();
        s.n_slots[threadIdx.x] += ds;
        s.n_tiles[threadIdx.x] += dt;
        __syncthreads();
    }
    int first  = s.n_slots[threadIdx.x] - own_slots;
    int i_tile = s.n_tiles[threadIdx.x] - own_tiles;
    for (int e = e0; e < e1; e++) {
        s.first[e] = first;
        for (int c = 0; c < s.count[e]; c += bn) {
            out.tiles[i_tile++] = { e, first + c, s.count[e] - c < bn ? s.count[e] - c : bn };
        }
        first += s.count[e];
    }
    if (threadIdx.x == N_THREADS - 1) {
        *out.n_tiles = s.n_tiles[threadIdx.x];
    }
    __syncthreads();
    for (int64_t slot = threadIdx.x; slot < n_slots; slot += N_THREADS) {
        const int32_t e = dsv4_expert_of_slot(a, slot);
        out.slots[atomicAdd(&s.first[e >= 0 && e < a.n_experts ? e : a.n_experts], 1)] = (int32_t) slot;
    }
}

// --- the product ---

template <int BN, int N_TERMS>
struct tiles {
    uint32_t a[BM][STRIDE];          // pairs of weights
    uint32_t b[N_TERMS][BN][STRIDE]; // pairs of activations: the leading bits, the next, the rest
    float    scale[2][BM];           // of the groups in BK weights
    const float * x[BN];
    float       * y[BN];             // null: no column
};

// The upper halves of two float32.
static __device__ __forceinline__ uint32_t pack_upper(float x0, float x1) {
    return __float_as_uint(x0) >> 16 | (__float_as_uint(x1) & 0xFFFF0000u);
}

// The next term: the leading 8 bits of x, which is left with the rest.
static __device__ __forceinline__ float take_term(float & x) {
    const uint32_t bits = __float_as_uint(x);
    const float    term = __uint_as_float(bits & 0xFFFF0000u);
    if ((bits & 0x7F800000u) == 0x7F800000u) { // infinite or NaN: all of it, and no rest
        x = 0.0f;
        return (bits & 0x7FFFFFu) != 0 ? __uint_as_float(0x7FC00000u) : term;
    }
    x -= term;
    return term;
}

template <typename W, bool has_cvt, int BN, int N_TERMS>
static __global__ void __launch_bounds__(N_THREADS) mul_mat(const dsv4_mul_args a, void * work) {
    if (!DSV4_HAS_BF16_MMA) {
        return; // never launched there
    }
    using tiles_t = tiles<BN, N_TERMS>;
    DSV4_SHARED(tiles_t, s);

    constexpr int WARPS_N = BN == 64 ? 2 : 1;
    constexpr int WARPS_M = N_THREADS/32/WARPS_N;
    constexpr int MT = BM/WARPS_M/16; // tiles of 16 x 8 of a warp
    constexpr int NT = BN/WARPS_N/8;

    constexpr int LANES_A  = BK/W::UNIT;        // that read a row
    constexpr int ROWS_A   = N_THREADS/LANES_A; // that are read at a time
    constexpr int PASSES_A = BM/ROWS_A;
    constexpr int COLS_B   = N_THREADS/(BK/4);
    constexpr int PASSES_B = BN/COLS_B;

    constexpr int N_GROUPS = W::GROUP > 0 && W::GROUP < BK ? BK/W::GROUP : 1;
    constexpr int STEPS    = BK/16/N_GROUPS; // of 16 weights in a group

    const int tid  = threadIdx.x;
    const int lane = tid % 32;
    const int warp = tid / 32;

    // which rows, which columns, which matrix
    const uint8_t * w = a.w;
    int64_t row0;
    int     n_cols;
    bool    has_weights = true;
    if (a.ids) {
        const sorted in = make_sorted(work, a.n_used*a.n_tokens);
        if ((int) blockIdx.y >= *in.n_tiles) {
            return;
        }
        const tile t = in.tiles[blockIdx.y];
        row0        = (int64_t) blockIdx.x*BM;
        n_cols      = t.n_cols;
        has_weights = t.expert < a.n_experts;
        w += has_weights ? t.expert*a.wb2 : 0;
        if (tid < BN) {
            const int64_t slot = tid < n_cols ? in.slots[t.first + tid] : 0;
            s.x[tid] = dsv4_x_of_slot(a, slot);
            s.y[tid] = tid < n_cols ? dsv4_y_of_slot(a, slot) : nullptr;
        }
    } else {
        const int64_t col0 = (int64_t) blockIdx.x*BN;
        const int64_t i2   = blockIdx.z%a.ne2;
        const int64_t i3   = blockIdx.z/a.ne2;
        row0   = (int64_t) blockIdx.y*BM;
        n_cols = (int) (a.n_cols - col0 < BN ? a.n_cols - col0 : BN);
        w += i2/a.r2*a.wb2 + i3/a.r3*a.wb3;
        if (tid < BN) {
            const int64_t col = col0 + (tid < n_cols ? tid : 0);
            s.x[tid] = (const float *) (a.x + col*a.xb1 + i2*a.xb2 + i3*a.xb3);
            s.y[tid] = tid < n_cols ? (float *) (a.y + col*a.yb1 + i2*a.yb2 + i3*a.yb3) : nullptr;
        }
    }
    __syncthreads();

    // what this thread brings into shared memory: unit or 4 activations i_k of rows and columns i_row, i_col + pass
    const int unit_a = tid%LANES_A;
    const int k_b    = tid%(BK/4)*4;
    const int row_a  = tid/LANES_A;
    const int col_b  = tid/(BK/4);
    const int row_s  = tid%BM;   // its scale
    const int i_s    = tid/BM;

    typename W::raw raw[PASSES_A];
    float4 x[PASSES_B];
    float  scale = 0.0f;

    const auto row_of = [&](int r) -> const uint8_t * {
        return w + (row0 + r < a.n_rows ? row0 + r : a.n_rows - 1)*a.wb1; // rows behind the last are dropped
    };
    const auto fetch = [&](int64_t k) {
#pragma unroll
        for (int p = 0; p < PASSES_A; p++) {
            const int u = (int) (k/W::UNIT) + unit_a;
            raw[p] = u*W::UNIT < a.n ? W::load(row_of(row_a + p*ROWS_A), u) : typename W::raw{};
        }
        if (W::GROUP > 0 && i_s < N_GROUPS) {
            const int u = (int) (k/W::UNIT) + i_s*W::GROUP/W::UNIT;
            scale = u*W::UNIT < a.n ? W::scale(row_of(row_s), u) : 0.0f;
        }
#pragma unroll
        for (int p = 0; p < PASSES_B; p++) {
            const int c = col_b + p*COLS_B;
            x[p] = c < n_cols && k + k_b < a.n ? dsv4_load_f32x4(s.x[c] + k + k_b, a.x_is_aligned)
                                               : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    };
    const auto put = [&]() {
#pragma unroll
        for (int p = 0; p < PASSES_A; p++) {
            float weights[W::UNIT];
            W::template decode<has_cvt>(raw[p], weights);
            uint32_t * row = s.a[row_a + p*ROWS_A];
#pragma unroll
            for (int part = 0; part < W::UNIT; part += 4) {
                uint32_t * pair = row + (W::k0(unit_a) + 4*part)/2;
                pair[0] = pack_upper(weights[part + 0], weights[part + 1]);
                pair[1] = pack_upper(weights[part + 2], weights[part + 3]);
            }
        }
        if (W::GROUP > 0 && i_s < N_GROUPS) {
            s.scale[i_s][row_s] = scale;
        }
#pragma unroll
        for (int p = 0; p < PASSES_B; p++) {
            float rest[4] = { x[p].x, x[p].y, x[p].z, x[p].w };
#pragma unroll
            for (int t = 0; t < N_TERMS; t++) {
                float term[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    term[i] = take_term(rest[i]);
                }
                uint32_t * pair = s.b[t][col_b + p*COLS_B] + k_b/2;
                pair[0] = pack_upper(term[0], term[1]);
                pair[1] = pack_upper(term[2], term[3]);
            }
        }
    };

    const int m0 = warp/WARPS_N*MT*16 + lane/4; // first row and column of this lane's share
    const int n0 = warp%WARPS_N*NT*8;
    const int t4 = lane%4;

    float sum[MT][NT][4] = {};

    fetch(0);
    for (int64_t k = 0; k < a.n; k += BK) {
        put();
        __syncthreads();
        if (k + BK < a.n) {
            fetch(k + BK); // arrives while the tensor cores work
        }
#pragma unroll 1
        for (int g = 0; g < N_GROUPS; g++) { // not unrolled: registers
            float group[MT][NT][4] = {};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const int word = (g*STEPS + step)*8 + t4;
                uint32_t fa[MT][4];
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    fa[m][0] = s.a[m0 + m*16 + 0][word + 0];
                    fa[m][1] = s.a[m0 + m*16 + 8][word + 0];
                    fa[m][2] = s.a[m0 + m*16 + 0][word + 4];
                    fa[m][3] = s.a[m0 + m*16 + 8][word + 4];
                }
#pragma unroll
                for (int t = N_TERMS - 1; t >= 0; t--) { // small terms first
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        const uint32_t * col = s.b[t][n0 + n*8 + lane/4];
                        const uint32_t fb[2] = { col[word + 0], col[word + 4] };
#pragma unroll
                        for (int m = 0; m < MT; m++) {
                            dsv4_mma_bf16(group[m][n], fa[m], fb);
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const float d0 = W::GROUP > 0 ? s.scale[g][m0 + m*16 + 0] : 1.0f;
                const float d1 = W::GROUP > 0 ? s.scale[g][m0 + m*16 + 8] : 1.0f;
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    sum[m][n][0] = fmaf(d0, group[m][n][0], sum[m][n][0]);
                    sum[m][n][1] = fmaf(d0, group[m][n][1], sum[m][n][1]);
                    sum[m][n][2] = fmaf(d1, group[m][n][2], sum[m][n][2]);
                    sum[m][n][3] = fmaf(d1, group[m][n][3], sum[m][n][3]);
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t row = row0 + m0 + m*16 + i/2*8;
                float * y = s.y[n0 + n*8 + 2*t4 + i%2];
                if (y && row < a.n_rows) {
                    y[row] = has_weights ? sum[m][n][i] : __uint_as_float(0x7FC00000u);
                }
            }
        }
    }
}

// 16 columns where tiles of 64 would be mostly empty
static int tile_cols(const dsv4_mul_args & a) {
    const int64_t n_cols = a.ids ? a.n_used*a.n_tokens/a.n_experts : a.n_cols;
    return n_cols <= 32 && (a.ids || n_cols <= 16) ? 16 : 64;
}

int64_t dsv4_cuda_mul_mat_work_size(const dsv4_mul_args & args) {
    if (!args.ids) {
        return 0;
    }
    return 16 + args.n_used*args.n_tokens*(int64_t) sizeof(int32_t) + max_tiles(args, tile_cols(args))*(int64_t) sizeof(tile);
}

template <typename W, bool has_cvt, int BN>
static void launch(const dsv4_mul_args & args, bool is_bf16, void * work, cudaStream_t stream) {
    const int64_t row_tiles = (args.n_rows + BM - 1)/BM;

    dim3 grid((uint32_t) ((args.n_cols + BN - 1)/BN), (uint32_t) row_tiles, (uint32_t) (args.ne2*args.ne3));
    if (args.ids) {
        grid = dim3((uint32_t) row_tiles, (uint32_t) max_tiles(args, BN));
        dsv4_launch(sort_slots, dim3(1), dim3(N_THREADS), stream, args, work, BN);
    }
    if (is_bf16) {
        dsv4_launch(mul_mat<W, has_cvt, BN, 1>, grid, dim3(N_THREADS), stream, args, work);
    } else {
        dsv4_launch(mul_mat<W, has_cvt, BN, 3>, grid, dim3(N_THREADS), stream, args, work);
    }
}

template <typename W, bool has_cvt>
static void launch_cols(const dsv4_mul_args & args, bool is_bf16, void * work, cudaStream_t stream) {
    if (tile_cols(args) == 16) {
        launch<W, has_cvt, 16>(args, is_bf16, work, stream);
    } else {
        launch<W, has_cvt, 64>(args, is_bf16, work, stream);
    }
}

void dsv4_cuda_mul_mat(
        const dsv4_mul_args & args, dsv4_weights type, bool is_bf16, void * work, int cc, cudaStream_t stream) {
    switch (type) {
        case DSV4_WEIGHTS_F8:
            if (cc >= 890) {
                launch_cols<dsv4_weights_f8, true>(args, is_bf16, work, stream);
            } else {
                launch_cols<dsv4_weights_f8, false>(args, is_bf16, work, stream);
            }
            break;
        case DSV4_WEIGHTS_MXFP4: launch_cols<dsv4_weights_mxfp4, false>(args, is_bf16, work, stream); break;
        case DSV4_WEIGHTS_BF16:  launch_cols<dsv4_weights_bf16,  false>(args, is_bf16, work, stream); break;
    }
}
