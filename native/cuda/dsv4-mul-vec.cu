// Few columns: weights are read once, at the speed of memory. A block of four warps computes a few rows; the warps share out
// the units of the rows, each lane sums its units over the row, and the block adds up.
//
// The order of a sum depends on the shape of the weights only, not on the number of columns: a column gives the same bits
// alone and beside others.

#include "dsv4-mul-mat.cuh"
#include "dsv4-weights.cuh"

static constexpr int N_WARPS = 4; // 128 units at a time: dsv4_cursor counts on it

template <int N_COLS, int N_ROWS>
struct partial_sums {
    float of[N_WARPS][N_ROWS][N_COLS];
};

// is_aligned: of the activations, known beforehand; else a.x_is_aligned tells
template <typename W, bool has_cvt, int N_COLS, int N_ROWS, bool is_aligned>
static __global__ void __launch_bounds__(32*N_WARPS, N_COLS == 1 ? 6 : 4) mul_vec(const dsv4_mul_args a) {
    const int     lane = threadIdx.x % 32;
    const int     warp = threadIdx.x / 32;
    const int64_t row0 = (int64_t) blockIdx.x*N_ROWS;

    // the matrix, or the slot and its expert
    const uint8_t * w = a.w;
    const char    * x;
    char          * y;
    bool has_weights = true;
    if (a.ids) {
        const int64_t slot   = (int64_t) blockIdx.z*gridDim.y + blockIdx.y;
        if (slot >= a.n_used*a.n_tokens) {
            return;
        }
        const int32_t expert = dsv4_expert_of_slot(a, slot);
        has_weights = expert >= 0 && expert < a.n_experts;
        w += has_weights ? expert*a.wb2 : 0;
        x  = (const char *) dsv4_x_of_slot(a, slot);
        y  = (char *)       dsv4_y_of_slot(a, slot);
    } else {
        const int64_t i2 = blockIdx.y;
        const int64_t i3 = blockIdx.z;
        w += i2/a.r2*a.wb2 + i3/a.r3*a.wb3;
        x  = a.x + i2*a.xb2 + i3*a.xb3;
        y  = a.y + i2*a.yb2 + i3*a.yb3;
    }

    const int n_units = (int) (a.n/W::UNIT);
    const int u0      = warp*32 + lane;

    dsv4_cursor<W> rows[N_ROWS];
#pragma unroll
    for (int r = 0; r < N_ROWS; r++) {
        // rows behind the last are computed again and dropped
        rows[r] = dsv4_cursor<W>::at(w + (row0 + r < a.n_rows ? row0 + r : a.n_rows - 1)*a.wb1, u0);
    }
    x += W::k0(u0)*(int64_t) sizeof(float);

    float sum[N_ROWS][N_COLS] = {};
    const int n_steps = (n_units - u0 + 32*N_WARPS - 1)/(32*N_WARPS); // of this lane

    [[maybe_unused]] constexpr int n_unroll = N_COLS > 1 ? 1 : 4; // registers
#pragma unroll n_unroll
    for (int i = 0; i < n_steps; i++) {
        const int64_t offset = (int64_t) i*W::STEP;
        typename W::raw raw[N_ROWS];
        float scale[N_ROWS];
#pragma unroll
        for (int r = 0; r < N_ROWS; r++) {
            raw[r]   = rows[r].load(offset);
            scale[r] = rows[r].scale(offset);
        }
        float weights[N_ROWS][W::UNIT];
#pragma unroll
        for (int r = 0; r < N_ROWS; r++) {
            W::template decode<has_cvt>(raw[r], weights[r]);
        }
#pragma unroll
        for (int c = 0; c < N_COLS; c++) {
            const float * xc = (const float *) (x + c*a.xb1) + (int64_t) i*(32*N_WARPS*W::UNIT);
            float dot[N_ROWS] = {};
#pragma unroll
            for (int part = 0; part < W::UNIT; part += 4) {
                const float4 v = dsv4_load_f32x4(xc + 4*part, is_aligned || a.x_is_aligned);
#pragma unroll
                for (int r = 0; r < N_ROWS; r++) {
                    dot[r] = fmaf(weights[r][part + 0], v.x, dot[r]);
                    dot[r] = fmaf(weights[r][part + 1], v.y, dot[r]);
                    dot[r] = fmaf(weights[r][part + 2], v.z, dot[r]);
                    dot[r] = fmaf(weights[r][part + 3], v.w, dot[r]);
                }
            }
#pragma unroll
            for (int r = 0; r < N_ROWS; r++) {
                sum[r][c] = fmaf(scale[r], dot[r], sum[r][c]);
            }
        }
    }

    using partial_t = partial_sums<N_COLS, N_ROWS>;
    DSV4_SHARED(partial_t, partial);
#pragma unroll
    for (int r = 0; r < N_ROWS; r++) {
#pragma unroll
        for (int c = 0; c < N_COLS; c++) {
            const float s = dsv4_warp_sum(sum[r][c]);
            if (lane == 0) {
                partial.of[warp][r][c] = s;
            }
        }
    }
    __syncthreads();

    const int i = threadIdx.x;
    if (i < N_ROWS*N_COLS && row0 + i%N_ROWS < a.n_rows) {
        const int r = i%N_ROWS;
        const int c = i/N_ROWS;
        const float s = (partial.of[0][r][c] + partial.of[1][r][c]) + (partial.of[2][r][c] + partial.of[3][r][c]);
        // a slot whose expert does not exist (a damaged routing table) gets NaN, which is seen
        ((float *) (y + c*a.yb1))[row0 + r] = has_weights ? s : __uint_as_float(0x7FC00000u);
    }
}

template <typename W, bool has_cvt, int N_COLS>
static void launch(const dsv4_mul_args & args, cudaStream_t stream) {
    // Two rows share the activations that a lane has loaded. Four where several columns would be read twice as often, as
    // far as registers reach.
    constexpr int n_rows = N_COLS == 1 || W::UNIT > 4 ? 2 : 4;
    dim3 grid((uint32_t) ((args.n_rows + n_rows - 1)/n_rows), (uint32_t) args.ne2, (uint32_t) args.ne3);
    if (args.ids) {
        const int64_t n_slots = args.n_used*args.n_tokens;
        grid.y = (uint32_t) (n_slots < 65535 ? n_slots : 65535);
        grid.z = (uint32_t) ((n_slots + grid.y - 1)/grid.y);
    }
    if (N_COLS == 1 && args.x_is_aligned) { // the usual case of decoding without a branch
        dsv4_launch(mul_vec<W, has_cvt, N_COLS, n_rows, N_COLS == 1>, grid, dim3(32*N_WARPS), stream, args);
    } else {
        dsv4_launch(mul_vec<W, has_cvt, N_COLS, n_rows, false>, grid, dim3(32*N_WARPS), stream, args);
    }
}

template <typename W, bool has_cvt>
static void launch_cols(const dsv4_mul_args & args, cudaStream_t stream) {
    switch (args.ids ? 1 : args.n_cols) {
        case 1: launch<W, has_cvt, 1>(args, stream); break;
        case 2: launch<W, has_cvt, 2>(args, stream); break;
        case 3: launch<W, has_cvt, 3>(args, stream); break;
        case 4: launch<W, has_cvt, 4>(args, stream); break;
        case 5: launch<W, has_cvt, 5>(args, stream); break;
        case 6: launch<W, has_cvt, 6>(args, stream); break;
        case 7: launch<W, has_cvt, 7>(args, stream); break;
        case 8: launch<W, has_cvt, 8>(args, stream); break;
    }
}

void dsv4_cuda_mul_vec(const dsv4_mul_args & args, dsv4_weights type, int cc, cudaStream_t stream) {
    // more columns (GPUs without BF16 tensor cores): eight at a time
    dsv4_mul_args part = args;
    for (int64_t c = 0; c < (args.ids ? 1 : args.n_cols); c += DSV4_MAX_VEC_COLS) {
        part.n_cols = args.n_cols - c < DSV4_MAX_VEC_COLS ? args.n_cols - c : DSV4_MAX_VEC_COLS;
        part.x      = args.x + c*args.xb1;
        part.y      = args.y + c*args.yb1;
        switch (type) {
            case DSV4_WEIGHTS_F8:
                if (cc >= 890) {
                    launch_cols<dsv4_weights_f8, true>(part, stream);
                } else {
                    launch_cols<dsv4_weights_f8, false>(part, stream);
                }
                break;
            case DSV4_WEIGHTS_MXFP4: launch_cols<dsv4_weights_mxfp4, false>(part, stream); break;
            case DSV4_WEIGHTS_BF16:  launch_cols<dsv4_weights_bf16,  false>(part, stream); break;
        }
    }
}
