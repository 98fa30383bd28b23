// CPU kernels. This file is compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
//
// proximity(z, y) = max(|y|_1 - |z - y|_1, 0) and, termwise with w = sign(y) z,
//     |y|_1 - |z - y|_1 = sum_d w_d - 2 sum_d max(0, w_d - |y_d|).
// The first sum is alpha * <v, g> with g = W_O sign(y): a dot product of length d_v, not d_model. The second has a term only
// where w_d exceeds |y_d|, so where |y_d| < alpha * max_d |u_d|: the channels of y are bucketed by magnitude once per row, and
// only that prefix is visited (1 to 10 channels of 576 per sub-edge on real activations). Nothing is approximated.
#include "rows.h"

#include <memory>

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

// sum_d max(0, w_d - |y_d|), w = alpha sign(y) u, for the NR keys of one panel; `reach` is the largest alpha * max_d |u_d| among them
inline void overshoot(const Magnitudes& order, int64_t i, int64_t d_model, vec a0, vec a1, const float* u, float reach, vec& out0, vec& out1) {
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

// Memory of one call. A small one is kept for the thread's next call: many short texts would otherwise spend their time on fresh pages.
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
void head_rows(const AttentionProximity& p, const Magnitudes& order, const Head& head, int64_t h, int64_t i0, int rows, float* s) {
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
void row_block(const AttentionProximity& p, const Magnitudes& order, const std::vector<Head>& heads, int64_t i0, float* s, std::vector<Edge>& edges) {
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
        for (int64_t j = 0; j < p.keys; ++j)  // a sub-edge above the floor lies in a pair above the floor
            if (pair[j] * scale > p.floor)
                for (int64_t h = 0; h < p.heads; ++h) {
                    const float importance = s[(h * ROWS + r) * stride + j] * scale;
                    if (importance > 0.f) edges.push_back({int32_t(i), int32_t(j), int32_t(h), importance});
                }
    }
}

// u and reach of the NR keys from j on, for one head.
void panel_of(const AttentionProximity& p, const Head& head, int64_t h, int64_t j) {
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

void attention(const AttentionProximity& p, std::vector<Edge>& edges) {
    const int threads = thread_count(p.threads);
    const Magnitudes order(p.y, p.queries, p.d_model, threads);
    const int64_t padded = round_up(p.keys, NR), kv_heads = p.heads / p.group, d_qk = p.alpha.pattern ? 0 : p.alpha.d_qk;
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
        for (int64_t n = 0; n < p.heads * (padded / NR); ++n) panel_of(p, heads[n % p.heads], n % p.heads, n / p.heads * NR);
    }
    const int64_t blocks = (p.queries + ROWS - 1) / ROWS;
    std::vector<std::vector<Edge>> found(blocks);
    Failure failure;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> s;
        failure.guard([&] { s.resize(p.heads * ROWS * padded); });
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = blocks - 1; b >= 0; --b) failure.guard([&] { row_block(p, order, heads, b * ROWS, s.data(), found[b]); });
    }
    failure.rethrow();
    for (auto& f : found) edges.insert(edges.end(), f.begin(), f.end());
    scratch.release_if_large();
}

// proximity of z to y
inline float proximity(const float* z, const float* y, int64_t d) {
    vec acc = {};
    float total = 0.f;
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        const vec yc = load(y + c), w = flip(load(z + c), yc);
        acc += vmin(w, 2.f * vabs(yc) - w);
    }
    for (; c < d; ++c) {
        const float w = std::signbit(y[c]) ? -z[c] : z[c];
        total += std::min(w, 2.f * std::fabs(y[c]) - w);
    }
    total += sum(acc);
    return total < 0.f ? 0.f : total;  // NaN stays NaN
}

void parts(const float* part, const float* whole, float* out, int64_t rows, int64_t part_rows, int64_t d, int threads) {
#pragma omp parallel for num_threads(thread_count(threads)) schedule(static)
    for (int64_t n = 0; n < rows; ++n) out[n] = proximity(part + (n % part_rows) * d, whole + n * d, d);
}

void components(const float* output, int64_t stride, int64_t count, const float* whole, float* out, int64_t rows, int64_t d, int threads) {
#pragma omp parallel for num_threads(thread_count(threads)) schedule(static)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t f = 0; f < count; ++f) out[n * count + f] = proximity(output + n * stride + f * d, whole + n * d, d);
}

// Only channels with |y_d| < |activation| * max_d |w_d| can take anything off the bound.
void rank1(const float* activation, const float* w, const float* whole, float* near, int64_t rows, int64_t parts, int64_t d, int threads) {
    threads = thread_count(threads);
    const Magnitudes order(whole, rows, d, threads);
    std::vector<float> reach(parts);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < parts; ++n)
            for (int64_t c = 0; c < d; ++c) reach[n] = std::max(reach[n], std::fabs(w[n * d + c]));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t* channel = order.channel.data() + i * d;
            const float* y = order.sorted.data() + i * d;
            for (int64_t n = 0; n < parts; ++n) {
                float& out = near[i * parts + n];
                const float a = activation[i * parts + n];
                if (!(out > 0.f)) {
                    out = 0.f;
                    continue;
                }
                const int32_t count = order.prefix(i, std::fabs(a) * reach[n] * (1.f + 1e-6f));
                float over = 0.f;
                for (int32_t c = 0; c < count; ++c) {
                    const float z = a * w[n * d + channel[c]];
                    over += std::max(0.f, (std::signbit(y[c]) ? -z : z) - std::fabs(y[c]));
                }
                out = std::max(0.f, out - 2.f * over);
            }
        }
    }
}

// What compiler options that define no macro may have changed (clang's -fassociative-math), or null.
const char* arithmetic() {
    volatile float big = 1e8f, one = 1.f, zero = 0.f, minus = -0.f;  // nothing is known while compiling
    const float b = big, o = one, z = zero, m = minus;
    if ((b + o) - b != 0.f) return "sums are reordered";
    const vec rounded = (splat(o) / 4.f + 12582912.f) - 12582912.f;  // as in vexp
    if (rounded[0] != 0.f) return "sums are reordered";
    if (std::signbit(m + 0.f) || !std::signbit(z * -o)) return "the sign of zero is lost";
    for (float n = o; n < 20.f; n += o)
        if (n / 3.f != static_cast<float>(double(n) / double(o + o + o))) return "divisions are replaced by approximations";
    const float nothing = z / z, most = o / z;
    if (nothing == nothing || !(most > std::numeric_limits<float>::max())) return "infinity and NaN are not kept";
    return nullptr;
}

}  // namespace

void certified(const Certified&, std::vector<Edge>&, Counts&);
void bound(const Bound&, std::vector<Edge>&);
void pairs(const Certified&, const int32_t*, const int32_t*, const int32_t*, float*, int64_t);
void conservation(const Conservation&, float*);

}  // namespace FLOWROUTES_ISA

#define FLOWROUTES_JOIN_(a, b) a##b
#define FLOWROUTES_JOIN(a, b) FLOWROUTES_JOIN_(a, b)
#define FLOWROUTES_TEXT_(a) #a
#define FLOWROUTES_TEXT(a) FLOWROUTES_TEXT_(a)
const Kernels& FLOWROUTES_JOIN(kernels_, FLOWROUTES_ISA)() {
    using namespace FLOWROUTES_ISA;
    static const Kernels table{
        FLOWROUTES_TEXT(FLOWROUTES_ISA), arithmetic, certified, bound, pairs, attention, rank1, parts, components, conservation};
    return table;
}

}  // namespace flowroutes
