// Launchers of the CUDA kernels: they check what the kernels rely on, then choose one.
#ifdef __CUDACC__
#include "primitives_cuda.h"  // elsewhere the tests' emulation was included before
#endif
#include "dense_cuda.h"
#include "pairs_cuda.h"
#include "parts_cuda.h"

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace flowroutes::cuda {
namespace {

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

bool whole_pieces(const void* p, int64_t element, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && a * element % 16 == 0 && b * element % 16 == 0 &&
           c * element % 16 == 0;
}

dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
    require(x <= std::numeric_limits<int32_t>::max() && y <= 65535 && z <= 65535, "too many rows for one launch");
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <class T, bool GATED>
void pairs_of(const PairProximity& p) {
    const dim3 blocks = grid(ceil_div(p.pairs, PAIR_TILE) + p.heads,
                             p.splits);  // no head has more than one tile that is not full
    const size_t shared = PairLayout<T, GATED>::total(p.d_v);
    if constexpr (sizeof(T) == 4) launch("pairs", pairs_float<GATED>, blocks, THREADS, shared, p, p.device, p.stream);
    else launch("pairs", pairs_matrix<T, GATED>, blocks, THREADS, shared, p, p.device, p.stream);
    if (p.splits > 1) launch("pairs", pairs_total, grid(ceil_div(p.pairs, THREADS)), THREADS, 0, p, p.device, p.stream);
}

template <class T>
void pairs_of(const PairProximity& p) {
    require(whole_pieces(p.v, sizeof(T), p.v_head, p.v_row, p.d_v), "rows of v must be 16-byte pieces");
    require(whole_pieces(p.w_o, sizeof(T), p.w_head, p.w_row), "rows of w_o must be 16-byte pieces");
    p.gate ? pairs_of<T, true>(p) : pairs_of<T, false>(p);
}

}  // namespace

void pairs(const PairProximity& p) {
    require(p.heads > 0 && p.group > 0 && p.heads % p.group == 0 && p.d_v > 0 && p.d_model > 0,
            "pairs: sizes must be positive");
    require(p.pairs >= 0 && p.pairs <= std::numeric_limits<int32_t>::max() - PAIR_TILE,
            "pairs: too many for one launch");
    if (p.pairs == 0) return;
    require(p.query && p.key && p.head_start && p.tile_start && p.alpha && p.v && p.w_o && p.y && p.out,
            "pairs: a pointer is missing");
    require(p.splits >= 1 && (p.splits == 1 || p.partial), "pairs: splits need scratch memory");
    require(whole_pieces(p.y, 4, p.y_row), "rows of y must be 16-byte pieces");
    switch (p.type) {
        case Type::float32: return pairs_of<float>(p);
        case Type::bfloat16: return pairs_of<__nv_bfloat16>(p);
        case Type::float16: return pairs_of<__half>(p);
    }
    throw std::invalid_argument("pairs: unknown type");
}

void dense(const DenseProximity& p) {
    require(p.heads >= 0 && p.queries >= 0 && p.keys >= 0 && p.d_model > 0, "dense: sizes must not be negative");
    if (p.heads == 0 || p.queries == 0 || p.keys == 0) return;
    require(p.alpha && p.u && p.y && (p.out || p.by_head), "dense: a pointer is missing");
    require(!p.by_head || p.partial, "dense: sums by head need scratch memory");
    require(whole_pieces(p.u, 4, p.u_head, p.u_row, p.d_model) && whole_pieces(p.y, 4, p.y_row),
            "rows of u and y must be 16-byte pieces");
    const dim3 tiles = grid(ceil_div(p.keys, TILE), ceil_div(p.queries, TILE), p.heads);
    launch("dense", dense_tile, tiles, THREADS, 2 * DENSE_STAGES * STAGE, p, p.device, p.stream);
    if (p.by_head)
        launch("dense", dense_total, grid(ceil_div(p.heads * p.queries, THREADS)), THREADS, 0, p, p.device, p.stream);
}

void parts(const PartProximity& p) {
    require(p.rows >= 0 && p.part_rows >= 0 && p.d_model > 0, "parts: sizes must not be negative");
    if (p.rows == 0) return;
    require(p.part_rows > 0 && p.part && p.whole && p.out, "parts: a pointer is missing");
    launch("parts", parts_rows, grid(ceil_div(p.rows, THREADS / 32)), THREADS, 0, p, p.device, p.stream);
}

int device_count() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "looking for devices");
    return count;
}

}  // namespace flowroutes::cuda
