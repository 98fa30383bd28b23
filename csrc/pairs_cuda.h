// CUDA kernels of listed sub-edges: gather the values of 64 pairs, multiply them by W_O chunk by chunk, meet y in
// registers.
#pragma once
#include "tiles_cuda.h"

namespace flowroutes::cuda {

constexpr int PAIR_STAGES = 3;
constexpr int CHANNELS = 64;  // of d_model, at a time

// Layout of the pairs kernels' shared memory
template <class T, bool GATED>
struct PairLayout {
    static constexpr bool SPLIT = GATED &&
                                  sizeof(T) == 2;  // v * gate as a sum of two 16-bit numbers: it does not fit in one
    static __host__ __device__ int slices(int64_t d_v) { return static_cast<int>(ceil_div(d_v * sizeof(T), SLICE)); }
    static __host__ __device__ int v_pitch(int64_t d_v) { return slices(d_v) * SLICE + 16; }
    static __host__ __device__ int v_bytes(int64_t d_v) { return PAIR_TILE * v_pitch(d_v); }
    static __host__ __device__ int v_at() { return 4 * PAIR_TILE * 4; }  // after pair, query, key and alpha
    static __host__ __device__ int stages_at(int64_t d_v) { return v_at() + (SPLIT ? 2 : 1) * v_bytes(d_v); }
    static __host__ __device__ int total(int64_t d_v) { return stages_at(d_v) + PAIR_STAGES * STAGE; }
};

// A block's share of the pairs kernels: up to PAIR_TILE pairs of one head, a range of chunks of CHANNELS channels.
template <class T, bool GATED>
struct PairBlock {
    using Layout = PairLayout<T, GATED>;
    unsigned char* memory;
    int head, rows, slices, first_chunk, chunks;
    __device__ int* pair() const { return reinterpret_cast<int*>(memory); }
    __device__ int* query() const { return pair() + PAIR_TILE; }
    __device__ int* key() const { return pair() + 2 * PAIR_TILE; }
    __device__ float* alpha() const { return reinterpret_cast<float*>(pair() + 3 * PAIR_TILE); }
    __device__ unsigned char* stage(const PairProximity& p, int step) const {
        return memory + Layout::stages_at(p.d_v) + step % PAIR_STAGES * STAGE;
    }

    __device__ bool find(const PairProximity& p) {
        const int tile = blockIdx.x;
        if (tile >= p.tile_start[p.heads]) return false;
        int low = 0, high = static_cast<int>(p.heads);  // tile_start[low] <= tile < tile_start[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (p.tile_start[middle] <= tile ? low : high) = middle;
        }
        head = low;
        const int first = p.head_start[low] + (tile - p.tile_start[low]) * PAIR_TILE;
        rows = min(PAIR_TILE, p.head_start[low + 1] - first);
        const int all = static_cast<int>(ceil_div(p.d_model, CHANNELS));
        first_chunk = static_cast<int>(int64_t(all) * blockIdx.y / p.splits);
        chunks = static_cast<int>(int64_t(all) * (blockIdx.y + 1) / p.splits) - first_chunk;
        memory = shared_memory();
        slices = Layout::slices(p.d_v);
        if (threadIdx.x < PAIR_TILE) {
            const int row = threadIdx.x, last = min(row, rows - 1);  // rows past the end: another pair's y
            const int at = p.order ? static_cast<int>(p.order[first + last]) : first + last;
            pair()[row] = at;
            query()[row] = p.query[at];
            key()[row] = p.key[at];
            alpha()[row] = p.alpha[at];
        }
        __syncthreads();
        return true;
    }

    // Step s holds slice s % slices of the weights of chunk s / slices. One commit per call, also where nothing is left
    // to load.
    __device__ void load_weights(const PairProximity& p, int step) const {
        if (step < chunks * slices) {
            const int64_t channel = int64_t(first_chunk + step / slices) * CHANNELS;
            const T* from = static_cast<const T*>(p.w_o) + head * p.w_head + channel * p.w_row;
            load_stage(stage(p, step), from, p.w_row * sizeof(T), p.d_model - channel, int64_t(step % slices) * SLICE,
                       p.d_v * sizeof(T));
        }
        copy_commit();
    }

    __device__ void load_values(const PairProximity& p) const {
        constexpr int EACH = 16 / sizeof(T);
        const int pieces = slices * (SLICE / 16), pitch = Layout::v_pitch(p.d_v);
        unsigned char* to = memory + Layout::v_at();
        const T* v = static_cast<const T*>(p.v) + head / p.group * p.v_head;
        for (int piece = threadIdx.x; piece < PAIR_TILE * pieces; piece += THREADS) {
            const int row = piece / pieces, column = piece % pieces;
            const bool valid = row < rows && column * EACH < p.d_v;
            const T* from = valid ? v + key()[row] * p.v_row + column * EACH : v;
            unsigned char* at = to + row * pitch + column * 16;
            if constexpr (!GATED) {
                copy_async(at, from, valid);
            } else {
                alignas(16) T high[EACH], low[EACH];
                const float* gate = p.gate + query()[row] * p.gate_query + head * p.gate_head + column * EACH;
                if (valid) *reinterpret_cast<uint4*>(high) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    const float product = valid ? static_cast<float>(high[i]) * gate[i] : 0.f;
                    high[i] = static_cast<T>(product);
                    low[i] = static_cast<T>(product - static_cast<float>(high[i]));
                }
                *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(high);
                if constexpr (Layout::SPLIT)
                    *reinterpret_cast<uint4*>(at + Layout::v_bytes(p.d_v)) = *reinterpret_cast<const uint4*>(low);
            }
        }
    }

    // sums[2][PAIR_TILE], one row per half of the channels of a chunk
    __device__ void store(const PairProximity& p, const float* sums) const {
        __syncthreads();
        if (threadIdx.x >= rows) return;
        const float total = sums[threadIdx.x] + sums[PAIR_TILE + threadIdx.x];
        const int at = pair()[threadIdx.x];
        if (p.splits == 1) p.out[at] = total < 0.f ? 0.f : total;
        else p.partial[blockIdx.y * p.pairs + at] = total;
    }
};

// 16-bit types: four warps, each 32 pairs x 32 channels of matrix instructions; the products stay in registers and meet
// y there.
template <class T, bool GATED>
__global__ void __launch_bounds__(THREADS, 4) pairs_matrix(PairProximity p) {
    PairBlock<T, GATED> block;
    if (!block.find(p)) return;
    using Layout = PairLayout<T, GATED>;
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 % 2 * 32, column0 = threadIdx.x / 64 * 32;
    block.load_values(p);
    block.load_weights(p, 0);
    block.load_weights(p, 1);

    const int pitch = Layout::v_pitch(p.d_v);
    const unsigned char* a_row = block.memory + Layout::v_at() + (row0 + lane % 16) * pitch + lane / 16 * 16;
    const int b_row = (column0 + lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 16;
    const float* y[2][2];
    float alpha[2][2], sum[2][2] = {};
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + m * 16 + half * 8 + lane / 4;
            y[m][half] = p.y + block.query()[row] * p.y_row + column0 + lane % 4 * 2;
            alpha[m][half] = block.alpha()[row];
        }

    for (int chunk = 0, step = 0; chunk < block.chunks; ++chunk) {
        const int64_t channel = int64_t(block.first_chunk + chunk) * CHANNELS;
        float2 whole[2][2][4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const bool valid = channel + column0 + lane % 4 * 2 + n * 8 < p.d_model;
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    whole[m][half][n] = valid ? *reinterpret_cast<const float2*>(y[m][half] + channel + n * 8)
                                              : float2{0.f, 0.f};
        }
        float c[2][4][4] = {};
        for (int slice = 0; slice < block.slices; ++slice, ++step) {
            copy_wait<1>();
            __syncthreads();  // this step's stage is complete, and nobody reads the previous one any more
            block.load_weights(p, step + 2);
            const unsigned char* stage = block.stage(p, step) + b_row;
            const int64_t left = p.d_v * sizeof(T) - slice * SLICE;
#pragma unroll
            for (int k = 0; k < SLICE; k += 32) {
                if (k >= left) break;
                uint32_t b[2][4];
                load_matrices(b[0], stage + k);
                load_matrices(b[1], stage + 16 * PITCH + k);
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int part = 0; part < (Layout::SPLIT ? 2 : 1); ++part) {
                        uint32_t a[4];
                        load_matrices(a, a_row + part * Layout::v_bytes(p.d_v) + m * 16 * pitch + slice * SLICE + k);
#pragma unroll
                        for (int n = 0; n < 4; ++n)
                            multiply<T>(c[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
                    }
            }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    sum[m][half] += term(alpha[m][half] * c[m][n][half * 2], whole[m][half][n].x);
                    sum[m][half] += term(alpha[m][half] * c[m][n][half * 2 + 1], whole[m][half][n].y);
                }
    }
    copy_wait<0>();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(block.stage(p, 0));
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = sum[m][half];
            total += from_lane_xor(total, 1);
            total += from_lane_xor(total, 2);
            if (lane % 4 == 0) sums[column0 / 32 * PAIR_TILE + row0 + m * 16 + half * 8 + lane / 4] = total;
        }
    block.store(p, sums);
}

// fp32: the same walk with 8 pairs x 4 channels of ordinary fused multiply-adds per thread
template <bool GATED>
__global__ void __launch_bounds__(THREADS, 4) pairs_float(PairProximity p) {
    PairBlock<float, GATED> block;
    if (!block.find(p)) return;
    using Layout = PairLayout<float, GATED>;
    const Place at;
    block.load_values(p);
    block.load_weights(p, 0);
    block.load_weights(p, 1);
    const int pitch = Layout::v_pitch(p.d_v);
    const unsigned char* values = block.memory + Layout::v_at() + at.row * pitch;
    float sum[8] = {};
    for (int chunk = 0, step = 0; chunk < block.chunks; ++chunk) {
        float c[8][4] = {};
        for (int slice = 0; slice < block.slices; ++slice, ++step) {
            copy_wait<1>();
            __syncthreads();
            block.load_weights(p, step + 2);
            const unsigned char* stage = block.stage(p, step) + at.column * PITCH;
#pragma unroll 1
            for (int k = 0; k < SLICE; k += 16) {
                float4 b[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) b[n] = *reinterpret_cast<const float4*>(stage + n * 16 * PITCH + k);
#pragma unroll
                for (int r = 0; r < 8; ++r) {
                    const float4 a = *reinterpret_cast<const float4*>(values + r * 8 * pitch + slice * SLICE + k);
#pragma unroll
                    for (int n = 0; n < 4; ++n)
                        c[r][n] = fmaf(a.x, b[n].x, fmaf(a.y, b[n].y, fmaf(a.z, b[n].z, fmaf(a.w, b[n].w, c[r][n]))));
                }
            }
        }
        const int64_t channel = int64_t(block.first_chunk + chunk) * CHANNELS + at.column;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            const float* y = p.y + block.query()[at.row + 8 * r] * p.y_row + channel;
            const float alpha = block.alpha()[at.row + 8 * r];
#pragma unroll
            for (int n = 0; n < 4; ++n) sum[r] += term(alpha * c[r][n], channel + 16 * n < p.d_model ? y[16 * n] : 0.f);
        }
    }
    copy_wait<0>();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(block.stage(p, 0));
    sum_columns(at, sum, sums);
    block.store(p, sums);
}

__global__ void __launch_bounds__(THREADS) pairs_total(PairProximity p) {
    const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= p.pairs) return;
    float total = 0.f;
    for (int s = 0; s < p.splits; ++s) total += p.partial[s * p.pairs + n];
    p.out[n] = total < 0.f ? 0.f : total;
}

}  // namespace flowroutes::cuda
