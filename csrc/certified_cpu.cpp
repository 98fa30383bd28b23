// Certified importances on the CPU. Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
//
// Every sub-edge has the bound w = alpha max(<v, g>, 0) >= proximity: a dot product of length d_v. Those above a cut
// are evaluated,
//     proximity = max(w - 2 sum_d max(0, alpha |u_d| - |y_d|), 0)   over channels d where u_d points along y_d,
// and only few channels can contribute, so that u_d is computed in float32 for those alone: where many rows are
// evaluated, those that u in steps of 8 bits does not rule out; else those with |y_d| < alpha |v| |W_O[h, :, d]|
// (Cauchy-Schwarz). The rest is summed into an interval: its upper end is the sum of w; its lower end subtracts 2
// F(alpha |v|), where F(t) = sum_d max(0, t |W_O[h, :, d]| - |y_d|) is convex with F(0) = 0, so that a chord bounds it
// over a whole class of sub-edges.
#include "certified_block.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

constexpr float REFINE = 0.6f;   // factor of the cut from one refinement to the next
constexpr float RESERVE = 0.1f;  // sub-edges above this share of the first cut are remembered for refinement
constexpr float SMALLEST_CUT = 1e-8f;

// Evaluates more of one row until its normaliser is known to the tolerance and nothing is ambiguous at the thresholds.
void refine(RowBlock& x, int r, Counts& counts) {
    const Certified& p = x.p;
    std::vector<int32_t>& keys = x.keys;
    float low, high, share = p.cut;
    bool refined = false;
    const float tolerance = p.tolerances ? p.tolerances[x.i0 + r] : p.tolerance;
    x.focus(r);
    for (;;) {
        x.row_bounds(r, low, high);
        const bool crowded = p.capacity > 0 && int64_t(x.evaluated[r].size()) > p.capacity;
        // evaluate everything, even what cannot change the normaliser
        const bool whole = tolerance == 0.f && share > 0.f;
        if (!crowded && !whole && !(high - low > tolerance * (high + low))) {
            x.unclear(r, low, high, keys);
            if (!keys.empty()) {
                x.complete(r, keys);
                continue;
            }
            if (!x.ambiguous(r, low, high)) break;
        }
        if (share == 0.f) break;
        refined = true;
        share = crowded || whole || share * REFINE < SMALLEST_CUT ? 0.f : share * REFINE;
        float limit[ROWS];
        limit[r] = share * low;
        if (share >= p.cut * RESERVE) {
            x.evaluate_reserve(r, limit[r]);
            continue;
        }
        x.forget_reserve(r);
        for (int64_t h = 0; h < p.heads; ++h) x.evaluate_above(h, r, r + 1, limit, limit, false);
        if (share > 0.f) continue;
        ++counts.exhausted;
        x.all_known();
    }
    counts.refined += refined;
    counts.evaluated += x.evaluated[r].size();
}

// One row block: bounds, evaluation, refinement of single rows, results.
void certify(RowBlock& x, int64_t i0, std::vector<Edge>& edges, Counts& counts) {
    const Certified& p = x.p;
    x.start(i0);
    float cut[ROWS], reserve_cut[ROWS], known[ROWS];
    for (int r = 0; r < x.rows; ++r) known[r] = x.others[r];
    for (int64_t h = 0; h < p.heads; ++h) {
        x.weights(h);
        for (int r = 0; r < x.rows; ++r) {
            cut[r] = p.cut * known[r];
            reserve_cut[r] = RESERVE * cut[r];
        }
        x.evaluate_above(h, 0, x.rows, cut, reserve_cut, true);
        for (int r = 0; r < x.rows; ++r) known[r] += x.sum_evaluated[r * p.heads + h];
    }
    for (int r = 0; r < x.rows; ++r) {
        const int64_t i = i0 + r;
        counts.bounded += std::max<int64_t>(0, std::min(p.keys, x.reach(r + 1)) - x.begin(r)) * p.heads;
        refine(x, r, counts);
        x.row_bounds(r, p.low[i], p.high[i]);
        for (int64_t h = 0; h < p.heads; ++h)
            x.head_bounds(r, h, p.head_low[i * p.heads + h], p.head_high[i * p.heads + h]);
        const float above = p.floor * p.low[i];
        const float* row = x.pair.data() + r * x.stride;
        for (const Evaluated& e : x.evaluated[r])
            if (e.value > 0.f && row[e.key] > above) edges.push_back({int32_t(i), e.key, e.head, e.value});
        for (int64_t j = x.begin(r), end = std::min(x.stride, round_up(x.reach(r + 1), NR)); j < end; j += LANES)
            for (uint32_t lanes = mask(load(row + j) > splat(above)); lanes; lanes &= lanes - 1) {
                const auto key = static_cast<int32_t>(j + __builtin_ctz(lanes));
                if (const float open = x.open(r, key); open > 1e-6f * row[key])
                    edges.push_back({int32_t(i), key, -1, open});
            }
    }
}

// Signed flow of one row block: sums per head, and the sub-edges whose share of |y|_1 passes the floor, alone or summed
// over heads.
void signed_rows(RowBlock& x, int64_t i0, std::vector<Edge>& edges, Counts& counts) {
    const Certified& p = x.p;
    x.start(i0);
    std::vector<float>&share = x.share, &pair = x.pair;
    share.resize(p.heads * x.height * x.stride);
    const int64_t begin = x.begin(0);
    for (int64_t h = 0; h < p.heads; ++h) {
        x.weights(h);
        const int64_t end = round_up(x.visible, NR);
        const float* panels = x.l.v[h / p.group].get();
        for (int r = 0; r < x.rows; r += MR) {
            const int n = std::min(MR, x.rows - r);
            for (int64_t j = begin; j < end; j += NR)
                tile(p.g + ((i0 + r) * p.heads + h) * p.d_v, p.heads * p.d_v, n, panels + j * p.d_v, p.d_v,
                     &share[(h * x.height + r) * x.stride + j], x.stride);
        }
        for (int r = 0; r < x.rows; ++r) {
            const int64_t i = i0 + r;
            const float scale = p.whole_norm[i] > 0.f ? 1.f / p.whole_norm[i] : 0.f;
            float* s = &share[(h * x.height + r) * x.stride];
            const float* a = x.alpha.get() + (h * x.height + r) * x.stride;
            vec total = {};
            for (int64_t j = begin; j < end; j += LANES) {
                const vec f = load(s + j) * load(a + j) * scale;
                store(s + j, f);
                store(&pair[r * x.stride + j], load(&pair[r * x.stride + j]) + f);
                total += f;
            }
            p.head_low[i * p.heads + h] = p.head_high[i * p.heads + h] = sum(total);
        }
    }
    for (int r = 0; r < x.rows; ++r) {
        p.low[i0 + r] = p.high[i0 + r] = p.whole_norm[i0 + r];
        counts.bounded += std::max<int64_t>(0, std::min(p.keys, x.reach(r + 1)) - x.begin(r)) * p.heads;
        const float* sums = &pair[r * x.stride];
        const int64_t end = std::min(x.stride, round_up(x.reach(r + 1), NR));
        for (int64_t h = 0; h < p.heads; ++h) {
            const float* of_head = &share[(h * x.height + r) * x.stride];
            for (int64_t j = x.begin(r); j < end; j += LANES) {
                const vec f = load(of_head + j), least = splat(p.floor);
                const ivec listed = (vabs(f) > least) | ((vabs(load(sums + j)) > least) & (f != vec{}));
                for (uint32_t lanes = mask(listed); lanes; lanes &= lanes - 1) {
                    const int64_t key = j + __builtin_ctz(lanes);
                    edges.push_back({int32_t(i0 + r), int32_t(key), int32_t(h), of_head[key]});
                }
            }
        }
    }
}

}  // namespace

void certified(const Certified& p, std::vector<Edge>& edges, Counts& counts) {
    const int threads = thread_count(p.threads);
    const Layer layer(p, threads, !p.whole_norm);
    const int64_t blocks = layer.blocks();
    std::vector<std::vector<Edge>> listed(blocks);
    std::vector<Counts> counted(blocks);
    for_row_blocks(layer, threads, [&](RowBlock& x, int64_t i0, int64_t b) {
        if (p.whole_norm) signed_rows(x, i0, listed[b], counted[b]);
        else certify(x, i0, listed[b], counted[b]);
    });
    join(listed, edges);
    for (const Counts& c : counted) {
        counts.bounded += c.bounded;
        counts.evaluated += c.evaluated;
        counts.refined += c.refined;
        counts.exhausted += c.exhausted;
    }
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
