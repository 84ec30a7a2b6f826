// Between upstream's CUDA backend and our operations: stream, pool and the architecture of the code that runs.

#include "dsv4-cuda.h"

#include "dsv4-ops.h"
#include "dsv4-rows.cuh"

static int compiled_cc(int device) {
    return ggml_cuda_highest_compiled_arch(ggml_cuda_info().devices[device].cc);
}

bool dsv4_cuda_compute_forward(ggml_backend_cuda_context & ctx, ggml_tensor * op) {
    if (!dsv4_cuda_supports(op)) {
        return false;
    }
    const int cc = compiled_cc(ctx.device);
    ggml_cuda_pool_alloc<char> work(ctx.pool());
    const int64_t size = dsv4_cuda_work_size(op, cc);
    if (size > 0) {
        work.alloc(size);
    }
    dsv4_cuda_compute(op, work.get(), cc, ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    return true;
}

static void to_numbers(
        const void * x, void * y, dsv4_number to, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
        int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream) {
    const int64_t size = to == DSV4_F32 ? 4 : 2;

    dsv4_rows_args a = {};
    a.src = (const uint8_t *) x;
    a.dst = (uint8_t *) y;
    a.ne0 = a.de0 = ne00;
    a.ne1 = a.de1 = ne01;
    a.ne2 = a.de2 = ne02;
    a.ne3 = ne03;
    a.sb1 = 129*s01; a.sb2 = 129*s02; a.sb3 = 129*s03;
    a.db1 = size*ne00; a.db2 = a.db1*ne01; a.db3 = a.db2*ne02;
    dsv4_cuda_dequantize_rows(a, to, compiled_cc(ggml_cuda_get_device()), stream);
}

void dsv4_cuda_f8_to_f32(const void * x, float * y, int64_t k, cudaStream_t stream) {
    to_numbers(x, y, DSV4_F32, k, 1, 1, 1, 0, 0, 0, stream);
}

void dsv4_cuda_f8_to_f16(const void * x, half * y, int64_t k, cudaStream_t stream) {
    to_numbers(x, y, DSV4_F16, k, 1, 1, 1, 0, 0, 0, stream);
}

void dsv4_cuda_f8_to_bf16(const void * x, nv_bfloat16 * y, int64_t k, cudaStream_t stream) {
    to_numbers(x, y, DSV4_BF16, k, 1, 1, 1, 0, 0, 0, stream);
}

void dsv4_cuda_f8_to_f32_nc(
        const void * x, float * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
        int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream) {
    to_numbers(x, y, DSV4_F32, ne00, ne01, ne02, ne03, s01, s02, s03, stream);
}

void dsv4_cuda_f8_to_f16_nc(
        const void * x, half * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
        int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream) {
    to_numbers(x, y, DSV4_F16, ne00, ne01, ne02, ne03, s01, s02, s03, stream);
}

void dsv4_cuda_f8_to_bf16_nc(
        const void * x, nv_bfloat16 * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03,
        int64_t s01, int64_t s02, int64_t s03, cudaStream_t stream) {
    to_numbers(x, y, DSV4_BF16, ne00, ne01, ne02, ne03, s01, s02, s03, stream);
}
