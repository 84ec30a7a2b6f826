// ACT_QUANT on the GPU: a warp rounds a block of channels. The definition is in native/ggml/act-quant.h; every bit of a
// result that is not NaN is the reference's.

#pragma once

#include "dsv4-device.cuh"

struct dsv4_act_quant_args {
    const char * x;
    char       * y;
    int64_t ne0, ne1, ne2;    // of x; ne3 is in n_rows
    int64_t n_rows;
    int64_t nb1, nb2, nb3;    // x, bytes
    int64_t mb1, mb2, mb3;    // y, bytes
    int32_t block, n_channels;
    int32_t n_blocks;         // of a row, with those that are only copied
    bool    is_e4m3;
};

void dsv4_cuda_act_quant(const dsv4_act_quant_args & args, cudaStream_t stream);
