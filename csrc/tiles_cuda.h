// What the CUDA kernels share. Every block has 128 threads and moves matrix rows through shared memory in stages of 64
// rows of 128 bytes.
#pragma once
#include "kernels_cuda.h"

namespace flowroutes::cuda {

constexpr int THREADS = 128;
constexpr int SLICE = 128;  // bytes of a row in one stage
constexpr int PITCH = SLICE +
                      16;  // distance of rows in a stage: eight rows in a column of 16 bytes touch all banks once
constexpr int STAGE = 64 * PITCH;  // bytes

__host__ __device__ constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// min(w, 2|y| - w) with w = sign(y) z: the proximity's term of one channel
__device__ __forceinline__ float term(float z, float y) {
    const float w = __int_as_float(__float_as_int(z) ^ (__float_as_int(y) & static_cast<int>(0x80000000u)));
    const float other = fmaf(2.f, fabsf(y), -w);
    return w < other ? w : other;  // NaN stays NaN
}

// Start copying bytes [from, from + SLICE) of 64 rows into a stage; rows past `rows` and bytes past `row_bytes` become
// zero.
__device__ __forceinline__ void load_stage(unsigned char* stage, const void* base, int64_t row_stride, int64_t rows,
                                           int64_t from, int64_t row_bytes) {
#pragma unroll 1
    for (int i = 0; i < 64 * (SLICE / 16) / THREADS; ++i) {
        const int piece = threadIdx.x + i * THREADS;
        const int row = piece / (SLICE / 16), byte = piece % (SLICE / 16) * 16;
        const bool valid = row < rows && from + byte < row_bytes;
        copy_async(stage + row * PITCH + byte,
                   static_cast<const unsigned char*>(base) + (valid ? row * row_stride + from + byte : 0), valid);
    }
}

// A thread's place in a 64 x 64 tile of 128 threads: rows row + 8 r, columns column + 16 c. A warp spans 4 rows x 8
// columns of threads.
struct Place {
    int row, column, half;
    __device__ Place()
        : row(threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8),
          column(threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8),
          half(threadIdx.x / 32 % 2) {}
};

// Sum over the columns of the tile: sums[half][row]
__device__ __forceinline__ void sum_columns(const Place& at, const float (&row_sum)[8], float* sums) {
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        float total = row_sum[r];
        total += from_lane_xor(total, 1);
        total += from_lane_xor(total, 2);
        total += from_lane_xor(total, 4);
        if (threadIdx.x % 8 == 0) sums[at.half * 64 + at.row + 8 * r] = total;
    }
}

}  // namespace flowroutes::cuda
