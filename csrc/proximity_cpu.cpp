// CPU kernels. This file is compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
//
// proximity(z, y) = max(|y|_1 - |z - y|_1, 0) and, termwise with w = sign(y) z,
//     |y|_1 - |z - y|_1 = sum_d w_d - 2 sum_d max(0, w_d - |y_d|).
// The first sum is alpha * <v, g> with g = W_O sign(y): a dot product of length d_v, not d_model. The second has a term only
// where w_d exceeds |y_d|, so where |y_d| < alpha * max_d |u_d|: the channels of y are bucketed by magnitude once per row, and
// only that prefix is visited (1 to 10 channels of 576 per sub-edge on real activations). Nothing is approximated.
#include "proximity.h"
#include "simd.h"

#include <algorithm>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

constexpr int MR = 6;               // rows of a register tile
constexpr int NR = 2 * LANES;       // its columns
constexpr int ROWS = 4 * MR;        // queries that a thread works on together
constexpr int BUCKETS = 64;         // magnitude classes of |y|, two per factor of two

int thread_count(int asked) {
#ifdef _OPENMP
    return asked > 0 ? asked : omp_get_max_threads();
#else
    (void)asked;
    return 1;
#endif
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// rows [n, d] -> panels [ceil(n / NR)][d][NR], zero padded
void pack(const float* rows, int64_t stride, int64_t n, int64_t d, float* panels) {
    for (int64_t p = 0; p < n; p += NR) {
        float* out = panels + p * d;
        const int64_t width = std::min<int64_t>(NR, n - p);
        for (int64_t c = 0; c < d; ++c)
            for (int64_t r = 0; r < NR; ++r) out[c * NR + r] = r < width ? rows[(p + r) * stride + c] : 0.f;
    }
}

// out[r, 0:NR] = <a_r, panel column>, for up to MR rows; rows past `rows` repeat the last one
inline void tile(const float* a, int64_t a_row, int rows, const float* panel, int64_t d, float* out, int64_t out_row) {
    const float* row[MR];
    for (int r = 0; r < MR; ++r) row[r] = a + std::min(r, rows - 1) * a_row;
    vec acc[MR][2] = {};
    for (int64_t c = 0; c < d; ++c) {
        const vec b0 = load(panel + c * NR), b1 = load(panel + c * NR + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) {
            const vec x = splat(row[r][c]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
    for (int r = 0; r < rows; ++r) {
        store(out + r * out_row, acc[r][0]);
        store(out + r * out_row + LANES, acc[r][1]);
    }
}

// Channels of one row in ascending classes of |y|. end[b]: how many channels lie in class b or below.
struct Magnitudes {
    std::vector<int32_t> channel, end;  // [queries, d_model], [queries, BUCKETS]
    std::vector<float> sorted;          // [queries, d_model]: y of those channels
    std::vector<int32_t> base;          // [queries]: class number of the first bucket
    std::vector<float> smallest;        // [queries]

    static int32_t magnitude_class(float a) {
        int32_t bits;
        std::memcpy(&bits, &a, 4);
        return bits >> 22;
    }

    Magnitudes(const float* y, int64_t queries, int64_t d, int threads)
        : channel(queries * d), end(queries * BUCKETS), sorted(queries * d), base(queries), smallest(queries) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < queries; ++i) {
            const float* row = y + i * d;
            float low = std::numeric_limits<float>::infinity(), high = 0.f;
            for (int64_t c = 0; c < d; ++c) {
                const float a = std::fabs(row[c]);
                low = std::min(low, a);
                high = std::max(high, a);
            }
            smallest[i] = low;
            base[i] = magnitude_class(high) - (BUCKETS - 1);
            int32_t* ends = end.data() + i * BUCKETS;
            int32_t* out = channel.data() + i * d;
            std::fill(ends, ends + BUCKETS, 0);
            for (int64_t c = 0; c < d; ++c) ++ends[bucket(i, std::fabs(row[c]))];
            int32_t start[BUCKETS], total = 0;
            for (int b = 0; b < BUCKETS; ++b) {
                start[b] = total;
                total += ends[b];
                ends[b] = total;
            }
            for (int64_t c = 0; c < d; ++c) {
                const int32_t at = start[bucket(i, std::fabs(row[c]))]++;
                out[at] = static_cast<int32_t>(c);
                sorted[i * d + at] = row[c];
            }
        }
    }

    int bucket(int64_t i, float a) const { return std::clamp(magnitude_class(a) - base[i], 0, BUCKETS - 1); }
    // number of leading channels that hold every channel with |y| <= a
    int32_t prefix(int64_t i, float a) const { return end[i * BUCKETS + bucket(i, a)]; }
};

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

// Rows i0..i0+rows of alpha for one head, into s[rows, stride]; returns how many leading keys can be visible.
int64_t attention_rows(const AttentionProximity& p, int64_t head, int64_t i0, int rows, const float* k_panels, float* s, int64_t stride) {
    const Alpha& a = p.alpha;
    if (a.pattern) {
        for (int r = 0; r < rows; ++r) {
            const float* from = a.pattern + head * a.pattern_head + (i0 + r) * a.pattern_query;
            std::copy(from, from + p.keys, s + r * stride);
            std::fill(s + r * stride + p.keys, s + (r + 1) * stride, 0.f);
        }
        return p.keys;
    }
    const int64_t visible = a.mask ? p.keys : std::min<int64_t>(p.keys, i0 + rows + a.offset);
    const int64_t padded = round_up(visible, NR);
    const float* q = a.q + head * a.q_head + i0 * a.q_row;
    for (int64_t j = 0; j < padded; j += NR)
        for (int r = 0; r < rows; r += MR)
            tile(q + r * a.q_row, a.q_row, std::min(MR, rows - r), k_panels + j * a.d_qk, a.d_qk, s + r * stride + j, stride);
    for (int r = 0; r < rows; ++r) {
        float* row = s + r * stride;
        const int64_t last = a.mask ? p.keys : std::min<int64_t>(p.keys, i0 + r + a.offset + 1);
        const int64_t first = !a.mask && a.window > 0 ? std::max<int64_t>(0, last - a.window) : 0;
        std::fill(row, row + first, -std::numeric_limits<float>::infinity());
        std::fill(row + last, row + padded, -std::numeric_limits<float>::infinity());
        const float* mask = a.mask ? a.mask + head * a.mask_head + (i0 + r) * a.mask_query : nullptr;
        if (a.softcap > 0.f)
            for (int64_t j = first; j < last; ++j) row[j] = a.softcap * std::tanh(row[j] * a.scale / a.softcap);
        else
            for (int64_t j = first; j < last; ++j) row[j] *= a.scale;
        if (mask)
            for (int64_t j = first; j < last; ++j) row[j] += mask[j];
        float high = a.sinks ? a.sinks[head] : -std::numeric_limits<float>::infinity();
        for (int64_t j = first; j < last; ++j) high = std::max(high, row[j]);
        if (high == -std::numeric_limits<float>::infinity() || (mask && high < -1e30f)) {  // a row that sees nothing
            std::fill(row, row + padded, 0.f);
            continue;
        }
        vec total = {};
        for (int64_t j = 0; j < padded; j += LANES) {
            const vec e = vexp(load(row + j) - high);
            store(row + j, e);
            total += e;
        }
        const float scale = 1.f / (sum(total) + (a.sinks ? std::exp(a.sinks[head] - high) : 0.f));
        for (int64_t j = 0; j < padded; j += LANES) store(row + j, load(row + j) * scale);
    }
    return visible;
}

struct Head {
    std::vector<float> k, v;      // panels [key / NR][d][NR] of keys and values
    std::vector<float> u, reach;  // panels [key / NR][d_model][NR] of u[j] = v[j] W_O, and max_d |u[j, d]|
};

// a masked panel: nothing to do, and s already holds its zero proximities
bool all_zero(const float* s, int rows, int64_t stride) {
    vec any = {};
    for (int r = 0; r < rows; ++r) any = vmax(any, vmax(load(s + r * stride), load(s + r * stride + LANES)));
    return !(sum(any) > 0.f);
}

// Turns s[rows, keys] from alpha into proximities, for one head; adds their sum over keys to by_head.
void head_rows(const AttentionProximity& p, const Magnitudes& order, const Head& head, int64_t h, int64_t i0, int rows, float* s) {
    const int64_t stride = round_up(p.keys, NR);
    const int64_t visible = attention_rows(p, h, i0, rows, head.k.data(), s, stride);
    const float* g = p.g + (i0 * p.heads + h) * p.d_v;
    const int64_t g_row = p.heads * p.d_v;
    float total[ROWS] = {};
    float bound[ROWS * NR];
    for (int64_t j = 0; j < visible; j += NR) {
        if (all_zero(s + j, rows, stride)) continue;
        for (int r = 0; r < rows; r += MR)
            tile(g + r * g_row, g_row, std::min(MR, rows - r), head.v.data() + j * p.d_v, p.d_v, bound + r * NR, NR);
        const vec reach0 = load(head.reach.data() + j), reach1 = load(head.reach.data() + j + LANES);
        for (int r = 0; r < rows; ++r) {
            const int64_t i = i0 + r;
            float* alpha = s + r * stride + j;
            const vec a0 = load(alpha), a1 = load(alpha + LANES);
            vec w0 = vmax(a0 * load(bound + r * NR), vec{}), w1 = vmax(a1 * load(bound + r * NR + LANES), vec{});
            const vec need0 = w0 > vec{} ? a0 * reach0 : vec{}, need1 = w1 > vec{} ? a1 * reach1 : vec{};
            const float reach = largest(vmax(need0, need1));
            if (reach > order.smallest[i]) {
                vec over0, over1;
                overshoot(order, i, p.d_model, a0, a1, head.u.data() + j * p.d_model, reach, over0, over1);
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

Head prepare(const AttentionProximity& p, int64_t h) {
    Head head;
    const int64_t kv = h / p.group, padded = round_up(p.keys, NR);
    if (!p.alpha.pattern) {
        head.k.resize(padded * p.alpha.d_qk);
        pack(p.alpha.k + kv * p.alpha.k_head, p.alpha.k_row, p.keys, p.alpha.d_qk, head.k.data());
    }
    head.v.resize(padded * p.d_v);
    pack(p.v + kv * p.v_head, p.v_row, p.keys, p.d_v, head.v.data());
    head.u.resize(padded * p.d_model);
    head.reach.resize(padded);
    const float* w = p.w_o + h * p.d_v;
    for (int64_t j = 0; j < padded; j += NR) {
        float* u = head.u.data() + j * p.d_model;
        vec high0 = {}, high1 = {};
        for (int64_t d = 0; d < p.d_model; d += MR) {
            const int rows = static_cast<int>(std::min<int64_t>(MR, p.d_model - d));
            tile(w + d * p.w_row, p.w_row, rows, head.v.data() + j * p.d_v, p.d_v, u + d * NR, NR);
            for (int r = 0; r < rows; ++r) {
                high0 = vmax(high0, vabs(load(u + (d + r) * NR)));
                high1 = vmax(high1, vabs(load(u + (d + r) * NR + LANES)));
            }
        }
        store(&head.reach[j], high0);
        store(&head.reach[j + LANES], high1);
    }
    return head;
}

void attention(const AttentionProximity& p, std::vector<Edge>& edges) {
    const int threads = thread_count(p.threads);
    const Magnitudes order(p.y, p.queries, p.d_model, threads);
    std::vector<Head> heads(p.heads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t h = 0; h < p.heads; ++h) heads[h] = prepare(p, h);
    const int64_t blocks = (p.queries + ROWS - 1) / ROWS;
    std::vector<std::vector<Edge>> found(blocks);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> s(p.heads * ROWS * round_up(p.keys, NR));
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = blocks - 1; b >= 0; --b) row_block(p, order, heads, b * ROWS, s.data(), found[b]);
    }
    for (auto& f : found) edges.insert(edges.end(), f.begin(), f.end());
}

void parts(const float* part, const float* whole, float* out, int64_t rows, int64_t part_rows, int64_t d, int threads) {
#pragma omp parallel for num_threads(thread_count(threads)) schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
        const float *z = part + (n % part_rows) * d, *y = whole + n * d;
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
        out[n] = std::max(0.f, total + sum(acc));
    }
}

}  // namespace
}  // namespace FLOWROUTES_ISA

#define FLOWROUTES_JOIN_(a, b) a##b
#define FLOWROUTES_JOIN(a, b) FLOWROUTES_JOIN_(a, b)
#define FLOWROUTES_TEXT_(a) #a
#define FLOWROUTES_TEXT(a) FLOWROUTES_TEXT_(a)
const Kernels& FLOWROUTES_JOIN(kernels_, FLOWROUTES_ISA)() {
    static const Kernels table{FLOWROUTES_TEXT(FLOWROUTES_ISA), FLOWROUTES_ISA::attention, FLOWROUTES_ISA::parts};
    return table;
}

}  // namespace flowroutes
