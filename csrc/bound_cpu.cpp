// Sign bounds of all sub-edges and lists of those above a cut, on the CPU.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "certified_block.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

void bound_rows(RowBlock& x, int64_t i0, const Bound& b, std::vector<Edge>& edges) {
    const Certified& p = x.p;
    x.start(i0);
    float cut[ROWS];
    for (int r = 0; r < x.rows; ++r) cut[r] = std::numeric_limits<float>::max();
    const auto nothing = [](int, int32_t, float, float) {};
    for (int64_t h = 0; h < p.heads; ++h) {
        x.weights(h);
        x.scan(h, 0, x.rows, cut, true, nothing);
        for (int r = 0; r < x.rows; ++r) {
            const Rest& rest = x.rest[r * p.heads + h];
            b.upper[(i0 + r) * p.heads + h] = rest.w[0] + rest.w[1] + rest.w[2];
            b.flow[(i0 + r) * p.heads + h] = x.flow[r * p.heads + h];
        }
    }
    if (!b.cut) return;
    float zero[ROWS] = {};
    for (int64_t h = 0; h < p.heads; ++h)
        x.scan(h, 0, x.rows, zero, false, [&](int r, int32_t key, float, float w) {
            if (w > b.cut[i0 + r] || (b.pair_cut && x.pair[r * x.stride + key] > b.pair_cut[i0 + r]))
                edges.push_back({int32_t(i0 + r), key, int32_t(h), w});
        });
}

}  // namespace

void bound(const Bound& b, std::vector<Edge>& edges) {
    const int threads = thread_count(b.layer.threads);
    const Layer layer(b.layer, threads);
    std::vector<std::vector<Edge>> listed(layer.blocks());
    for_row_blocks(layer, threads, [&](RowBlock& x, int64_t i0, int64_t n) { bound_rows(x, i0, b, listed[n]); });
    join(listed, edges);
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
