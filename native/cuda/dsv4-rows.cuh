// Rows of F8_E4M3_B128 on the GPU: to float32, float16 and BF16 and back from float32. One kernel serves conversion, GET_ROWS
// and CPY: it walks over the rows of the source's or the index's shape and writes where the destination's shape says.

#pragma once

#include "dsv4-device.cuh"

enum dsv4_number {
    DSV4_F32,
    DSV4_F16,
    DSV4_BF16,
};

struct dsv4_rows_args {
    const uint8_t * src;
    uint8_t       * dst;
    const int32_t * ids;                  // GET_ROWS: row of src for row i1 of (i2, i3); else null, and row i1 it is
    int64_t ne0, ne1, ne2, ne3;           // rows that are walked over; ne0 in weights, a multiple of 128
    int64_t n_src_rows;                   // GET_ROWS: ids beyond give NaN
    int64_t sb1, sb2, sb3;                // src, bytes
    int64_t is1, is2, is3;                // ids, elements
    int64_t de0, de1, de2;                // dst's shape, weights in the same order; de0 a multiple of 4 (of 128 to FP8)
    int64_t db1, db2, db3;                // dst, bytes
};

void dsv4_cuda_dequantize_rows(const dsv4_rows_args & args, dsv4_number to, int cc, cudaStream_t stream);
void dsv4_cuda_quantize_rows(const dsv4_rows_args & args, cudaStream_t stream);
