// Runs CUDA kernels on the host: a fiber per thread of a block, blocks one after another. Stands in for csrc/primitives_cuda.h.
//
// Asynchronous copies happen either at once or not before they are waited for, and each warp runs on to the next __syncthreads before
// another warp starts, in ascending or descending order: a result that depends on either shows a missing wait or barrier. Shared
// memory starts as NaN.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false, waits = false;       // ended; at a __syncthreads
    std::vector<std::vector<Copy>> groups;  // committed, not yet copied
    std::vector<Copy> open;
};

struct Lane {  // what a lane hands to the others of its warp
    const void* row;
    uint32_t a[4], b[2];
    float x;
};

constexpr size_t STACK = 64 * 1024, GUARD = 4096;

inline bool lazy_copies = false, descending = false;
inline std::vector<Fiber> fibers;
inline std::vector<Lane> lanes;
inline std::vector<unsigned char> shared;
inline ucontext_t scheduler;
inline int current = 0;
inline std::function<void()> body;
inline std::exception_ptr failure;
inline uint3 thread_index, block_index;

inline void enter() {
    try {
        body();
    } catch (...) {
        failure = std::current_exception();
    }
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// Every thread of the warp (of the block) that is not done reaches this before any goes on.
inline void warp_barrier() { swapcontext(&fibers[current].context, &scheduler); }
inline void block_barrier() {
    fibers[current].waits = true;
    warp_barrier();
}

inline void run_copies(const std::vector<Copy>& copies) {
    for (const Copy& c : copies) {
        if (c.valid)
            std::memcpy(c.to, c.from, 16);
        else
            std::memset(c.to, 0, 16);
    }
}

inline void run_block(int threads, size_t bytes) {
    fibers.resize(threads);
    lanes.resize(threads);
    shared.assign(bytes + 128 + GUARD, 0xff);
    for (Fiber& f : fibers) {
        if (!f.stack) f.stack = std::make_unique<char[]>(STACK);
        f.done = f.waits = false;
        f.groups.clear();
        f.open.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (int warp = 0; warp < threads / 32; ++warp) {
            for (bool runs = true; runs;) {
                runs = false;
                for (int lane = 0; lane < 32; ++lane) {
                    const int n = warp * 32 + lane;
                    current = descending ? threads - 1 - n : n;
                    Fiber& f = fibers[current];
                    if (f.done || f.waits) continue;
                    thread_index = {static_cast<unsigned>(current), 0, 0};
                    swapcontext(&scheduler, &f.context);
                    runs |= !f.done && !f.waits;
                }
            }
        }
        for (Fiber& f : fibers) {
            left |= f.waits;
            f.waits = false;
        }
    }
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    for (const Fiber& f : fibers)
        if (!f.groups.empty() && f.groups.back().size()) throw std::logic_error("a thread ended with copies under way");
    const size_t start = reinterpret_cast<uintptr_t>(shared.data()) % 128 ? 128 - reinterpret_cast<uintptr_t>(shared.data()) % 128 : 0;
    for (size_t n = start + bytes; n < shared.size(); ++n)
        if (shared[n] != 0xff) throw std::logic_error("shared memory was overrun");
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::block_barrier(); }

namespace flowroutes::cuda {

using std::max;
using std::min;

inline float __int_as_float(int n) {
    float x;
    std::memcpy(&x, &n, 4);
    return x;
}
inline int __float_as_int(float x) {
    int n;
    std::memcpy(&n, &x, 4);
    return n;
}

inline unsigned char* shared_memory() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(emulation::shared.data()) + 127) / 128 * 128);
}

inline void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) throw std::logic_error("copy_async is not aligned");
    if (emulation::lazy_copies)
        emulation::fibers[emulation::current].open.push_back({to, from, valid});
    else
        emulation::run_copies({{to, from, valid}});
}
inline void copy_commit() {
    auto& f = emulation::fibers[emulation::current];
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
template <int PENDING>
void copy_wait() {
    auto& groups = emulation::fibers[emulation::current].groups;
    while (groups.size() > PENDING) {
        emulation::run_copies(groups.front());
        groups.erase(groups.begin());
    }
}

// Every thread of the warp must take part.
template <class Put, class Get>
void exchange(Put put, Get get) {
    const int self = emulation::current;
    put(emulation::lanes[self]);
    emulation::warp_barrier();
    get(&emulation::lanes[self / 32 * 32], self % 32);
    emulation::warp_barrier();
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) throw std::logic_error("load_matrices is not aligned");
    exchange([&](emulation::Lane& own) { own.row = row; },
             [&](const emulation::Lane* warp, int lane) {
                 for (int m = 0; m < 4; ++m) std::memcpy(&r[m], static_cast<const char*>(warp[8 * m + lane / 4].row) + lane % 4 * 4, 4);
             });
}

template <class T>
float element(uint32_t pair, int n) {
    T x;
    std::memcpy(&x, reinterpret_cast<const char*>(&pair) + 2 * n, 2);
    return static_cast<float>(x);
}

// mma.m16n8k16: lane 4g + t holds a[g + 8 (r % 2)][2t + {0, 1} + 8 (r / 2)], b[2t + {0, 1} + 8 r][g] and c[g + 8 (r / 2)][2t + r % 2]
template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    exchange(
        [&](emulation::Lane& own) {
            std::copy(a, a + 4, own.a);
            own.b[0] = b0;
            own.b[1] = b1;
        },
        [&](const emulation::Lane* warp, int lane) {
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4, column = lane % 4 * 2 + r % 2;
                for (int k = 0; k < 16; ++k)
                    c[r] += element<T>(warp[row * 4 + k % 8 / 2].a[r / 2 + k / 8 * 2], k % 2) *
                            element<T>(warp[column * 4 + k % 8 / 2].b[k / 8], k % 2);
            }
        });
}

inline float from_lane_xor(float x, int mask) {
    float other = 0.f;
    exchange([&](emulation::Lane& own) { own.x = x; }, [&](const emulation::Lane* warp, int lane) { other = warp[lane ^ mask].x; });
    return other;
}

using cudaError_t = int;
inline int cudaGetDeviceCount(int* count) { return *count = 0; }
inline void check(int, const char*) {}

template <class P>
void launch(const char*, void (*kernel)(P), dim3 grid, int threads, size_t shared, const P& p, int, void*) {
    emulation::body = [&] { kernel(p); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                emulation::block_index = {x, y, z};
                emulation::run_block(threads, shared);
            }
}

}  // namespace flowroutes::cuda
