// Exact proximities of all sub-edges on the CPU.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
//
// proximity(z, y) = max(|y|_1 - |z - y|_1, 0) and, termwise with w = sign(y) z,
//     |y|_1 - |z - y|_1 = sum_d w_d - 2 sum_d max(0, w_d - |y_d|).
// The first sum is alpha * <v, g> with g = W_O sign(y): a dot product of length d_v, not d_model. The second has a term
// only where w_d exceeds |y_d|, so where |y_d| < alpha * max_d |u_d|: the channels of y are bucketed by magnitude once
// per row, and only that prefix is visited (1 to 10 channels of 576 per sub-edge on real activations). Nothing is
// approximated.
#include "rows.h"

#include <memory>

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

// sum_d max(0, w_d - |y_d|), w = alpha sign(y) u, for the NR keys of one panel; `reach` is the largest alpha * max_d
// |u_d| among them
inline void overshoot(const Magnitudes& order, int64_t i, int64_t d_model, vec a0, vec a1, const float* u, float reach,
                      vec& out0, vec& out1) {
    const int32_t n = order.prefix(i, reach);
    const int32_t* channel = order.channel.data() + i * d_model;
    const float* y = order.sorted.data() + i * d_model;
    vec over0 = {}, over1 = {};
    for (int32_t c = 0; c < n; ++c) {
        const float* column = u + int64_t(channel[c]) * NR;
        const vec yc = splat(y[c]), magnitude = vabs(yc);
        over0 += vmax(vec{}, flip(a0 * load(column), yc) - magnitude);
        over1 += vmax(vec{}, flip(a1 * load(column + LANES), yc) - magnitude);
    }
    out0 = over0;
    out1 = over1;
}

struct Head {
    const float *k, *v;  // panels [key / NR][d][NR] of keys and values, shared by the heads of a group
    float *u, *reach;    // panels [key / NR][d_model][NR] of u[j] = v[j] W_O, and max_d |u[j, d]|
};

// Memory of one call. A small one is kept for the thread's next call: many short texts would otherwise spend their time
// on fresh pages.
class Scratch {
    std::unique_ptr<float[]> memory;
    int64_t size = 0;

  public:
    float* of(int64_t floats) {
        if (floats > size) {
            memory.reset(new float[floats]);
            size = floats;
        }
        return memory.get();
    }
    void release_if_large() {
        if (size <= int64_t(1) << 22) return;
        memory.reset();
        size = 0;
    }
};

// Turns s[rows, keys] from alpha into proximities, for one head; adds their sum over keys to by_head.
void head_rows(const Dense& p, const Magnitudes& order, const Head& head, int64_t h, int64_t i0, int rows, float* s) {
    const int64_t stride = round_up(p.keys, NR);
    const int64_t visible = attention_rows(p.alpha, p.keys, h, p.group, i0, rows, head.k, s, stride);
    const float* g = p.g + (i0 * p.heads + h) * p.d_v;
    const int64_t g_row = p.heads * p.d_v;
    float total[ROWS] = {};
    float bound[ROWS * NR];
    for (int64_t j = 0; j < visible; j += NR) {
        if (all_zero(s + j, rows, stride)) continue;
        for (int r = 0; r < rows; r += MR)
            tile(g + r * g_row, g_row, std::min(MR, rows - r), head.v + j * p.d_v, p.d_v, bound + r * NR, NR);
        const vec reach0 = load(head.reach + j), reach1 = load(head.reach + j + LANES);
        for (int r = 0; r < rows; ++r) {
            const int64_t i = i0 + r;
            float* alpha = s + r * stride + j;
            const vec a0 = load(alpha), a1 = load(alpha + LANES);
            vec w0 = vmax(a0 * load(bound + r * NR), vec{}), w1 = vmax(a1 * load(bound + r * NR + LANES), vec{});
            const vec need0 = w0 > vec{} ? a0 * reach0 : vec{}, need1 = w1 > vec{} ? a1 * reach1 : vec{};
            const float reach = largest(vmax(need0, need1));
            if (reach > order.smallest[i]) {
                vec over0, over1;
                overshoot(order, i, p.d_model, a0, a1, head.u + j * p.d_model, reach, over0, over1);
                w0 = vmax(w0 - 2.f * over0, vec{});
                w1 = vmax(w1 - 2.f * over1, vec{});
            }
            total[r] += sum(w0 + w1);
            store(alpha, w0);
            store(alpha + LANES, w1);
        }
    }
    for (int64_t j = round_up(visible, NR); j < stride; j += NR)
        for (int r = 0; r < rows; ++r) std::fill(s + r * stride + j, s + r * stride + j + NR, 0.f);
    for (int r = 0; r < rows; ++r) p.by_head[(i0 + r) * p.heads + h] = total[r];
}

// All heads of ROWS queries: their normaliser, then dense importances or the sub-edges above the floor.
void row_block(const Dense& p, const Magnitudes& order, const std::vector<Head>& heads, int64_t i0, float* s,
               std::vector<Edge>& edges) {
    const int rows = static_cast<int>(std::min<int64_t>(ROWS, p.queries - i0));
    const int64_t stride = round_up(p.keys, NR);
    for (int64_t h = 0; h < p.heads; ++h) head_rows(p, order, heads[h], h, i0, rows, s + h * ROWS * stride);
    std::vector<float> pair(p.floor >= 0.f ? stride : 0);
    for (int r = 0; r < rows; ++r) {
        const int64_t i = i0 + r;
        float* by_head = p.by_head + i * p.heads;
        double total = p.base ? p.base[i] : 0.f;
        for (int64_t h = 0; h < p.heads; ++h) total += by_head[h];
        p.normaliser[i] = static_cast<float>(total);
        const float scale = !p.normalise ? 1.f : total > 0. ? static_cast<float>(1. / total) : 0.f;
        for (int64_t h = 0; h < p.heads; ++h) by_head[h] *= scale;
        if (p.dense)
            for (int64_t h = 0; h < p.heads; ++h) {
                const float* row = s + (h * ROWS + r) * stride;
                float* out = p.dense + (h * p.queries + i) * p.keys;
                for (int64_t j = 0; j < p.keys; ++j) out[j] = row[j] * scale;
            }
        if (p.floor < 0.f) continue;
        std::fill(pair.begin(), pair.end(), 0.f);
        for (int64_t h = 0; h < p.heads; ++h) {
            const float* row = s + (h * ROWS + r) * stride;
            for (int64_t j = 0; j < stride; j += LANES) store(&pair[j], load(&pair[j]) + load(row + j));
        }
        for (int64_t from = 0; from < stride; from += LANES)  // a sub-edge above the floor lies in a pair above it
            for (uint32_t lanes = mask(load(&pair[from]) * scale > splat(p.floor)); lanes; lanes &= lanes - 1) {
                const int64_t j = from + __builtin_ctz(lanes);
                for (int64_t h = 0; h < p.heads; ++h) {
                    const float importance = s[(h * ROWS + r) * stride + j] * scale;
                    if (importance > 0.f) edges.push_back({int32_t(i), int32_t(j), int32_t(h), importance});
                }
            }
    }
}

// u and reach of the NR keys from j on, for one head.
void panel_of(const Dense& p, const Head& head, int64_t h, int64_t j) {
    const float* w = p.w_o + h * p.d_v;
    float* u = head.u + j * p.d_model;
    vec high0 = {}, high1 = {};
    for (int64_t d = 0; d < p.d_model; d += MR) {
        const int rows = static_cast<int>(std::min<int64_t>(MR, p.d_model - d));
        tile(w + d * p.w_row, p.w_row, rows, head.v + j * p.d_v, p.d_v, u + d * NR, NR);
        for (int r = 0; r < rows; ++r) {
            high0 = vmax(high0, vabs(load(u + (d + r) * NR)));
            high1 = vmax(high1, vabs(load(u + (d + r) * NR + LANES)));
        }
    }
    store(head.reach + j, high0);
    store(head.reach + j + LANES, high1);
}

}  // namespace

void dense(const Dense& p, std::vector<Edge>& edges) {
    const int threads = thread_count(p.threads);
    const Magnitudes order(p.y, p.queries, p.d_model, threads);
    const int64_t padded = round_up(p.keys, NR), kv_heads = p.heads / p.group,
                  d_qk = p.alpha.pattern ? 0 : p.alpha.d_qk;
    static thread_local Scratch scratch;
    float* const k = scratch.of(padded * (kv_heads * (d_qk + p.d_v) + p.heads * (p.d_model + 1)));
    float* const v = k + kv_heads * padded * d_qk;
    float* const u = v + kv_heads * padded * p.d_v;
    float* const reach = u + p.heads * padded * p.d_model;
    std::vector<Head> heads(p.heads);
    for (int64_t h = 0; h < p.heads; ++h) {
        const int64_t kv = h / p.group;
        heads[h] = {k + kv * padded * d_qk, v + kv * padded * p.d_v, u + h * padded * p.d_model, reach + h * padded};
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t kv = 0; kv < kv_heads; ++kv) {
            if (d_qk) pack(p.alpha.k + kv * p.alpha.k_head, p.alpha.k_row, p.keys, d_qk, k + kv * padded * d_qk);
            pack(p.v + kv * p.v_head, p.v_row, p.keys, p.d_v, v + kv * padded * p.d_v);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < p.heads * (padded / NR); ++n)
            panel_of(p, heads[n % p.heads], n % p.heads, n / p.heads * NR);
    }
    const int64_t blocks = (p.queries + ROWS - 1) / ROWS;
    std::vector<std::vector<Edge>> listed(blocks);
    Failure failure;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> s;
        failure.guard([&] { s.resize(p.heads * ROWS * padded); });
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = blocks - 1; b >= 0; --b)
            failure.guard([&] { row_block(p, order, heads, b * ROWS, s.data(), listed[b]); });
    }
    failure.rethrow();
    for (auto& f : listed) edges.insert(edges.end(), f.begin(), f.end());
    scratch.release_if_large();
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
