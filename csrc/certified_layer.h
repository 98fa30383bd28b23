// What the row blocks of a certified layer share: packed keys and values, and the norms that bound a channel's part.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#pragma once
#include "rows.h"

#include <numeric>

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

constexpr int WIDE = 8;        // channels per head whose |W_O[h, :, d]| is kept apart, so that outliers do not loosen the rest

struct Layer {
    const Certified& p;
    Magnitudes order;
    int64_t padded;                           // keys, rounded up to whole panels
    std::vector<std::vector<float>> k, v;     // [kv_head]: panels [key / NR][d][NR]
    std::vector<float> length;                // [kv_head, padded]: |v_j|
    std::vector<float> width, widest, common; // [head, d_model], [head]: |W_O[h, :, d]|, its largest, its largest without the wide ones
    std::vector<int32_t> wide;                // [head, WIDE]: channels of the largest, -1 where there are fewer

    explicit Layer(const Certified& problem, int threads)
        : p(problem), order(problem.y, problem.queries, problem.d_model, threads), padded(round_up(problem.keys, NR)) {
        const int64_t kv_heads = p.heads / p.group;
        k.resize(kv_heads);
        v.resize(kv_heads);
        length.assign(kv_heads * padded, 0.f);
        width.resize(p.heads * p.d_model);
        widest.resize(p.heads);
        common.resize(p.heads);
        wide.assign(p.heads * WIDE, -1);
        Failure failure;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) nowait
            for (int64_t kv = 0; kv < kv_heads; ++kv) failure.guard([&] { pack_head(kv); });
#pragma omp for schedule(static)
            for (int64_t h = 0; h < p.heads; ++h) failure.guard([&] { measure(h); });
        }
        failure.rethrow();
    }

    // keys, values and lengths of one kv head
    void pack_head(int64_t kv) {
        if (!p.alpha.pattern) {
            k[kv].resize(padded * p.alpha.d_qk);
            pack(p.alpha.k + kv * p.alpha.k_head, p.alpha.k_row, p.keys, p.alpha.d_qk, k[kv].data());
        }
        v[kv].resize(padded * p.d_v);
        pack(p.v + kv * p.v_head, p.v_row, p.keys, p.d_v, v[kv].data());
        for (int64_t j = 0; j < p.keys; ++j) length[kv * padded + j] = norm(p.v + kv * p.v_head + j * p.v_row, p.d_v);
    }

    // widths of one head's channels
    void measure(int64_t h) {
        float* w = width.data() + h * p.d_model;
        for (int64_t d = 0; d < p.d_model; ++d) w[d] = norm(p.w_o + d * p.w_row + h * p.d_v, p.d_v);
        std::vector<int32_t> order(p.d_model);
        std::iota(order.begin(), order.end(), 0);
        const int64_t n = p.d_model > 4 * WIDE ? WIDE : 0;
        std::partial_sort(order.begin(), order.begin() + n + 1, order.end(), [w](int32_t a, int32_t b) { return w[a] > w[b]; });
        std::copy(order.begin(), order.begin() + n, wide.begin() + h * WIDE);
        widest[h] = w[order[0]];
        common[h] = w[order[n]];
    }

    static float norm(const float* x, int64_t n) {  // an upper bound in spite of rounding and underflow
        float total = 0.f, most = 0.f;
        for (int64_t c = 0; c < n; ++c) {
            total += x[c] * x[c];
            most = std::max(most, std::fabs(x[c]));
        }
        return (most < 1e-15f ? most * std::sqrt(float(n)) : std::sqrt(total)) * (1.f + 1e-5f) + std::numeric_limits<float>::denorm_min();
    }
};

float dot(const float* a, const float* b, int64_t n) {
    vec acc = {};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) acc += load(a + c) * load(b + c);
    float total = sum(acc);
    for (; c < n; ++c) total += a[c] * b[c];
    return total;
}

}  // namespace
}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
