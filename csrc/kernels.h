// Plain parameter structs of the native kernels. Shapes are written [outer, ..., inner]; strides are in elements.
#pragma once
#include <cstdint>
#include <vector>

namespace flowroutes {

// Where the attention weights alpha[head, query, key] come from: a stored pattern, or queries and keys to recompute it
// from.
struct Alpha {
    const float* pattern = nullptr;  // [head, query, key], key stride 1; null: recompute
    int64_t pattern_head = 0, pattern_query = 0;
    const float* q = nullptr;  // [head, query, d_qk], inner stride 1
    int64_t q_head = 0, q_row = 0;
    const float* k = nullptr;  // [kv_head, key, d_qk], inner stride 1
    int64_t k_head = 0, k_row = 0;
    int64_t d_qk = 0;
    float scale = 1.f;
    float softcap = 0.f;          // 0: none
    const float* mask = nullptr;  // additive [query, key] or [head, query, key], key stride 1; null: causal
    int64_t mask_head = 0, mask_query = 0;
    int64_t window = 0;                  // causal case only: keys at distance < window are visible; 0: all
    int64_t offset = 0;                  // causal case only: query i stands at key position i + offset
    const int64_t* positions = nullptr;  // causal case only: [query], rising: where queries stand, if they do not
                                         // follow one another
    const float* sinks = nullptr;        // [head]: one logit more in the softmax denominator; null: none

    int64_t position(int64_t query) const { return positions ? positions[query] : query + offset; }
    bool causal() const { return !mask && !pattern; }
};

struct Edge {
    int32_t query, key, head;
    float value;
};

// Proximity of every sub-edge alpha[h,i,j] * u[h,j] to y_i, summed, normalised, and written densely or above a floor.
struct Dense {
    Alpha alpha;
    int64_t queries = 0, keys = 0, heads = 0, group = 1, d_v = 0, d_model = 0;
    const float* v = nullptr;  // [kv_head, key, d_v], inner stride 1
    int64_t v_head = 0, v_row = 0;
    const float* g = nullptr;    // [query, head, d_v]: W_O[h] sign(y_i)
    const float* w_o = nullptr;  // [d_model, head * d_v], inner stride 1: as a linear layer stores it
    int64_t w_row = 0;
    const float* y = nullptr;     // [query, d_model]
    const float* base = nullptr;  // [query]: proximity of the other parts, or null
    bool normalise = true;        // divide every output by the normaliser
    float* normaliser = nullptr;  // [query]: base + all sub-edges
    float* by_head = nullptr;     // [query, head]: sum over keys
    float* dense = nullptr;       // [head, query, key] or null
    float floor = -1.f;  // >= 0: collect all sub-edges of every (query, key) pair whose sum over heads is above it
    int threads = 0;     // 0: OpenMP's default
};

// Intervals instead of exact values where that is enough: sub-edges are bounded, and evaluated only above a cut.
struct Certified {
    Alpha alpha;
    int64_t queries = 0, keys = 0, heads = 0, group = 1, d_v = 0, d_model = 0;
    const float* v = nullptr;  // [kv_head, key, d_v], inner stride 1
    int64_t v_head = 0, v_row = 0;
    const float* g = nullptr;      // [query, head, d_v]: W_O[h] sign(y_i), times the gate
    float* g_out = nullptr;        // the same memory where g is not given: it is computed while W_O is read
    const float* probe = nullptr;  // [d_model] or null: with g_out, answer[h] = sum_d probe_d W_O[h, :, d]
    float* answer = nullptr;
    const float* w_o = nullptr;  // [d_model, head * d_v], inner stride 1
    int64_t w_row = 0;
    const float* y = nullptr;          // [query, d_model]
    const float* row_scale = nullptr;  // [query]: factor of every alpha in a row, or null
    const float* gate = nullptr;       // [query, head, d_v]: factor of v, or null
    const float* others = nullptr;     // [n_others, query]: proximities of the parts that are no sub-edges
    int64_t n_others = 0;
    const float* whole_norm = nullptr;  // signed flow only: [query], |y|_1; every output is then divided by it
    const float* thresholds = nullptr;  // rows are refined until no sub-edge is ambiguous at these
    int64_t n_thresholds = 0;
    float floor = 1e-3f;  // all sub-edges of (query, key) pairs that may reach it are evaluated and listed
    float cut = 1e-4f;    // single sub-edges are evaluated above this share of what the normaliser is known to reach
    float tolerance = 1e-2f;  // largest (high - low) / (high + low) of a normaliser: the error of its midpoint
    const float* tolerances = nullptr;  // [query]: the same per row, or null
    int64_t capacity = 0;               // sub-edges evaluated per row before it is evaluated whole; 0: no limit
    float* low = nullptr;               // [query]: normaliser bounds
    float* high = nullptr;
    float* head_low = nullptr;  // [query, head]: sums over keys (proximities, or signed flow shares)
    float* head_high = nullptr;
    int threads = 0;
};

struct Counts {
    int64_t bounded = 0, evaluated = 0, refined = 0, exhausted = 0;  // pairs, pairs, rows, rows evaluated whole
};

// Sign bounds alone: the positive and the signed sum of every row and head, and the sub-edges above a cut per row.
struct Bound {
    Certified layer;                  // its inputs; thresholds, floor, tolerance and outputs are not used
    const float* cut = nullptr;       // [query]: sub-edges with a larger bound are listed; null: none
    const float* pair_cut = nullptr;  // [query]: so are all positive ones of a (query, key) pair with a larger sum over
                                      // heads; or null
    float* upper = nullptr;           // [query, head]
    float* flow = nullptr;            // [query, head]
};

// A layer's captured parts and states, all [token, d_model] and contiguous, and what attention was made of: do they add
// up?
struct Conservation {
    Alpha alpha;  // queries and keys
    int64_t tokens = 0, heads = 0, group = 1, d_v = 0, d_model = 0;
    int64_t kv_head = 0;       // the key-value head whose attention weights are computed again
    const float* v = nullptr;  // [kv_head, token, d_v], inner stride 1
    int64_t v_head = 0, v_row = 0;
    const float* mixed = nullptr;  // [token, head * d_v], inner stride 1: what the attention function returned
    int64_t mixed_row = 0;
    const float* w_o = nullptr;  // [d_model, head * d_v], inner stride 1
    int64_t w_row = 0;
    bool w_is_sampled = false;  // w_o [n_channels, head * d_v] has the rows of `channels` alone
    const float* residual = nullptr;
    const float* resid_mid = nullptr;  // null in a parallel block
    const float* through = nullptr;    // null in a parallel block
    const float* ffn_out = nullptr;
    const float* resid_post = nullptr;
    const float* mixer_out = nullptr;   // or null
    const float* gate = nullptr;        // [token, head * d_v] or null
    const float* in_scale = nullptr;    // [head * d_v] or null
    const float* row_scale = nullptr;   // [token] or null
    const float* out_scale = nullptr;   // [d_model] or null
    const float* bias = nullptr;        // [d_model] or null
    bool bias_is_scaled = false;        // by row_scale
    float scale = 1.f, smallest = 0.f;  // sizes of channels are told apart down to this share of the largest
    const int64_t* rows = nullptr;      // [n_rows]: positions looked at, and channels
    const int64_t* channels = nullptr;
    int64_t n_rows = 0, n_channels = 0;
};

struct Kernels {
    const char* isa;
    const char* (*arithmetic)();  // null, or what the compiler was told to do to it
    void (*certified)(const Certified&, std::vector<Edge>&, Counts&);
    void (*bound)(const Bound&, std::vector<Edge>&);
    // value[n] = proximity of sub-edge n; the list is sorted by (query, head) inside blocks of rows by the kernel
    // itself
    void (*pairs)(const Certified&, const int32_t* query, const int32_t* key, const int32_t* head, float* value,
                  int64_t n);
    void (*dense)(const Dense&, std::vector<Edge>&);
    // proximities[i, n]: on entry the sign bound of the rank-1 part activation[i, n] * w[n], on return its proximity to
    // whole[i]; all contiguous
    void (*rank1)(const float* activation, const float* w, const float* whole, float* proximities, int64_t rows,
                  int64_t parts, int64_t d_model, int threads);
    // out[n] = proximity of part[n % part_rows] to whole[n]; rows of d_model, contiguous
    void (*parts)(const float* part, const float* whole, float* out, int64_t rows, int64_t part_rows, int64_t d_model,
                  int threads);
    // out[n, f] = proximity of output[n, f] to whole[n], for the first `count` outputs of each row; `stride` floats
    // from row to row
    void (*components)(const float* output, int64_t stride, int64_t count, const float* whole, float* out, int64_t rows,
                       int64_t d_model, int threads);
    // errors[3]: of the attention weights, of the parts of the state after attention, and of those after the FFN
    void (*conservation)(const Conservation&, float* errors);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();    // where FLOWROUTES_AVX2 is defined: x86-64, and a compiler that knows it
const Kernels& kernels_avx512();  // where FLOWROUTES_AVX512 is defined

}  // namespace flowroutes
