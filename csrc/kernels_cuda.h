// Plain parameter structs of the CUDA kernels. All pointers are device pointers, strides are in elements, inner strides
// are 1.
//
// Rows of v, w_o, y and u start at multiples of 16 bytes and hold a multiple of 16 bytes: the caller pads with zeros
// what does not.
#pragma once
#include <cstdint>

namespace flowroutes::cuda {

enum class Type { float32, bfloat16, float16 };

constexpr int PAIR_TILE = 64;  // listed sub-edges that one block works on, all of one head
constexpr int TILE = 64;       // queries and keys of a dense tile

// Exact proximity of listed sub-edges z = alpha * (v[head / group, key] * gate[query, head]) W_O[head] to y[query].
struct PairProximity {
    int device = 0;
    void* stream = nullptr;
    Type type = Type::float32;  // of v and w_o
    int64_t pairs = 0, heads = 0, group = 1, d_v = 0, d_model = 0;
    const int32_t* query = nullptr;       // [pairs]
    const int32_t* key = nullptr;         // [pairs]
    const int64_t* order = nullptr;       // [pairs]: the pairs in ascending order of head; null: they are so already
    const int32_t* head_start = nullptr;  // [heads + 1]: position in that order of the first pair of each head
    const int32_t* tile_start = nullptr;  // [heads + 1]: tiles of PAIR_TILE pairs that all heads before this one need
    const float* alpha = nullptr;         // [pairs]
    const void* v = nullptr;              // [kv_head, key, d_v]
    int64_t v_head = 0, v_row = 0;
    const void* w_o = nullptr;  // [head, d_model, d_v]: a linear layer's weight is that
    int64_t w_head = 0, w_row = 0;
    const float* gate = nullptr;  // [query, head, d_v] or null
    int64_t gate_query = 0, gate_head = 0;
    const float* y = nullptr;  // [query, d_model]
    int64_t y_row = 0;
    int splits = 1;            // the model's width is divided among this many blocks
    float* partial = nullptr;  // [splits, pairs] of scratch memory; may be null for one split
    float* out = nullptr;      // [pairs]
};

// Exact proximity of all sub-edges alpha[h,i,j] * u[h,j] to y[i]. Rounds like |y_d| - |z_d - y_d| in fp32, so to about
// 1e-7 of |y|_1.
struct DenseProximity {
    int device = 0;
    void* stream = nullptr;
    int64_t heads = 0, queries = 0, keys = 0, d_model = 0;
    const float* alpha = nullptr;  // [head, query, key]
    int64_t alpha_head = 0, alpha_query = 0;
    const float* u = nullptr;  // [head, key, d_model]
    int64_t u_head = 0, u_row = 0;
    const float* y = nullptr;  // [query, d_model]
    int64_t y_row = 0;
    bool causal = false;   // query i sees keys up to i + keys - queries; alpha is not read beyond
    float* out = nullptr;  // [head, query, key] or null; may be alpha
    int64_t out_head = 0, out_query = 0;
    float* partial = nullptr;  // [ceil(keys / TILE), head, query] of scratch memory, with by_head only
    float* by_head = nullptr;  // [query, head] or null: sum over keys
    int64_t by_head_query = 0;
};

// out[n] = proximity of part[n % part_rows] to whole[n]; rows of d_model, contiguous
struct PartProximity {
    int device = 0;
    void* stream = nullptr;
    int64_t rows = 0, part_rows = 0, d_model = 0;
    const float* part = nullptr;
    const float* whole = nullptr;
    float* out = nullptr;
};

// They queue work on the stream and return; std::invalid_argument or std::runtime_error with CUDA's words if that
// fails.
void pairs(const PairProximity&);
void dense(const DenseProximity&);
void parts(const PartProximity&);
int device_count();

}  // namespace flowroutes::cuda
