// CUDA kernel of whole parts.
#pragma once
#include "tiles_cuda.h"

namespace flowroutes::cuda {

// A warp per row
__global__ void __launch_bounds__(THREADS) parts_rows(PartProximity p) {
    const int64_t n = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
    if (n >= p.rows) return;
    const float *z = p.part + n % p.part_rows * p.d_model, *y = p.whole + n * p.d_model;
    float sum = 0.f;
#pragma unroll 4
    for (int64_t d = threadIdx.x % 32; d < p.d_model; d += 32) sum += term(z[d], y[d]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += from_lane_xor(sum, mask);
    if (threadIdx.x % 32 == 0) p.out[n] = sum < 0.f ? 0.f : sum;
}

}  // namespace flowroutes::cuda
