// Exact proximities of listed sub-edges on the CPU.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "certified_block.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {

void pairs(const Certified& p, const int32_t* query, const int32_t* key, const int32_t* head, float* value, int64_t n) {
    const int threads = thread_count(p.threads);
    const Layer layer(p, threads);
    std::vector<std::vector<int64_t>> listed(layer.blocks());
    for (int64_t e = 0; e < n; ++e) listed[query[e] / layer.height].push_back(e);
    for_row_blocks(layer, threads, [&](RowBlock& x, int64_t i0, int64_t b) {
        if (listed[b].empty()) return;
        x.start(i0);
        std::sort(listed[b].begin(), listed[b].end(), [&](int64_t a, int64_t c) { return head[a] < head[c]; });
        int64_t current = -1;
        for (const int64_t e : listed[b]) {
            const int64_t h = head[e];
            if (h != current) x.weights(current = h);
            const int r = static_cast<int>(query[e] - i0);
            const float weight = x.alpha[(h * x.height + r) * x.stride + key[e]];
            x.aim(r, h);
            const float* v = p.v + h / p.group * p.v_head + key[e] * p.v_row;
            const float w = weight * dot(p.g + (int64_t(query[e]) * p.heads + h) * p.d_v, v, p.d_v);
            value[e] = w > 0.f ? x.exact(r, h, key[e], weight, w) : 0.f;
        }
    });
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
