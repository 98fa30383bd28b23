// CUDA kernels of all sub-edges of a range of heads.
#pragma once
#include "tiles_cuda.h"

namespace flowroutes::cuda {

constexpr int DENSE_STAGES = 2;

// One 64 x 64 tile of one head, three instructions per channel and sub-edge: fma, |y| - |.|, add.
__global__ void __launch_bounds__(THREADS, 4) dense_tile(DenseProximity p) {
    const Place at;
    const int64_t i0 = int64_t(blockIdx.y) * TILE, j0 = int64_t(blockIdx.x) * TILE, offset = p.keys - p.queries;
    const int64_t i = i0 + at.row, j = j0 + at.column;
    const int rows = static_cast<int>(min(int64_t(TILE), p.queries - i0)),
              columns = static_cast<int>(min(int64_t(TILE), p.keys - j0));
    const bool hidden = p.causal && j0 > i0 + rows - 1 + offset;
    unsigned char* memory = shared_memory();
    float c[8][4] = {};
    if (!hidden) {
        const float* u = p.u + blockIdx.z * p.u_head + j0 * p.u_row;
        const float* y = p.y + i0 * p.y_row;
        const int64_t bytes = p.d_model * 4;
        const int steps = static_cast<int>(ceil_div(bytes, SLICE));
        auto load = [&](int step) {
            unsigned char* to = memory + step % DENSE_STAGES * 2 * STAGE;
            load_stage(to, y, p.y_row * 4, rows, int64_t(step) * SLICE, bytes);
            load_stage(to + STAGE, u, p.u_row * 4, columns, int64_t(step) * SLICE, bytes);
            copy_commit();
        };
        load(0);
        float alpha[8][4];
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const bool seen = at.row + 8 * r < rows && at.column + 16 * n < columns &&
                                  !(p.causal && j + 16 * n > i + 8 * r + offset);
                alpha[r][n] = seen ? p.alpha[blockIdx.z * p.alpha_head + (i + 8 * r) * p.alpha_query + j + 16 * n]
                                   : 0.f;
            }
        for (int step = 0; step < steps; ++step) {
            copy_wait<0>();
            __syncthreads();  // this step's stage is complete, and nobody reads the other one any more
            if (step + 1 < steps) load(step + 1);
            const unsigned char* y_rows = memory + step % DENSE_STAGES * 2 * STAGE + at.row * PITCH;
            const unsigned char* u_rows = memory + (step % DENSE_STAGES * 2 + 1) * STAGE + at.column * PITCH;
#pragma unroll 1
            for (int k = 0; k < SLICE; k += 16) {
                float4 b[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) b[n] = *reinterpret_cast<const float4*>(u_rows + n * 16 * PITCH + k);
#pragma unroll
                for (int r = 0; r < 8; ++r) {
                    const float4 a = *reinterpret_cast<const float4*>(y_rows + r * 8 * PITCH + k);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        c[r][n] += fabsf(a.x) - fabsf(fmaf(alpha[r][n], b[n].x, -a.x));
                        c[r][n] += fabsf(a.y) - fabsf(fmaf(alpha[r][n], b[n].y, -a.y));
                        c[r][n] += fabsf(a.z) - fabsf(fmaf(alpha[r][n], b[n].z, -a.z));
                        c[r][n] += fabsf(a.w) - fabsf(fmaf(alpha[r][n], b[n].w, -a.w));
                    }
                }
            }
        }
    }
    float sum[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        sum[r] = 0.f;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (c[r][n] < 0.f) c[r][n] = 0.f;
            sum[r] += c[r][n];  // rows and columns past the end are zero
            if (p.out && at.row + 8 * r < rows && at.column + 16 * n < columns)
                p.out[blockIdx.z * p.out_head + (i + 8 * r) * p.out_query + j + 16 * n] = c[r][n];
        }
    }
    if (!p.by_head) return;
    __syncthreads();
    float* sums = reinterpret_cast<float*>(memory);
    sum_columns(at, sum, sums);
    __syncthreads();
    if (threadIdx.x < rows)
        p.partial[(int64_t(blockIdx.x) * p.heads + blockIdx.z) * p.queries + i0 + threadIdx.x] = sums[threadIdx.x] +
                                                                                                 sums[64 + threadIdx.x];
}

__global__ void __launch_bounds__(THREADS) dense_total(DenseProximity p) {
    const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= p.heads * p.queries) return;
    float total = 0.f;
    for (int64_t tile = 0; tile < ceil_div(p.keys, TILE); ++tile) total += p.partial[tile * p.heads * p.queries + n];
    p.by_head[n % p.queries * p.by_head_query + n / p.queries] = total;
}

}  // namespace flowroutes::cuda
