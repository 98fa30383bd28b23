// Importances of a few rows of one layer whose activations lie there whole: parts, sub-edges and their division, in one
// call.
#pragma once
#include "kernels.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace flowroutes {

constexpr int64_t
    ROW_SCALARS = 7;  // normaliser low and high, residual, constant, mixer, FFN, the residual past the FFN

struct FewRows {
    Certified layer;  // y of the rows, without g; queries are those of all tokens, alpha.positions the rows' places
                      // among the keys
    const int64_t* at = nullptr;      // [query]: rows of the arrays below, and of the queries
    const float* residual = nullptr;  // [token, d_model], inner stride 1
    int64_t residual_row = 0;
    const float* through = nullptr;  // [token, d_model]; null: y itself, or (parallel) nothing
    int64_t through_row = 0;
    const float* ffn = nullptr;  // [token, d_model]
    int64_t ffn_row = 0;
    const float* post = nullptr;      // [query, d_model], of the rows; null: y
    const float* constant = nullptr;  // [d_model] or null
    bool parallel = false;            // one node: the FFN is a part of y
    bool exact = false;               // every sub-edge is evaluated: the interval is a point
    float* table = nullptr;  // [query, ROW_SCALARS + 3 heads]: the scalars, then heads' importances, lower and upper
                             // bounds
};

inline void few_rows(const Kernels& kernels, const FewRows& p, std::vector<Edge>& edges, Counts& counts) {
    Certified c = p.layer;
    const int64_t n = c.queries, d = c.d_model, heads = c.heads, d_qk = c.alpha.d_qk;
    std::vector<float> query(heads * n * d_qk), parts(5 * n), low(n), high(n), head_low(n * heads),
        head_high(n * heads);
    std::vector<float> g(n * heads * c.d_v);
    c.g = c.g_out = g.data();
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < n; ++i)
            std::copy_n(c.alpha.q + h * c.alpha.q_head + p.at[i] * c.alpha.q_row, d_qk,
                        query.data() + (h * n + i) * d_qk);
    c.alpha.q = query.data();
    c.alpha.q_head = n * d_qk;
    c.alpha.q_row = d_qk;
    // [part][query]: residual, constant, mixer, FFN, past the FFN
    const float* post = p.post ? p.post : c.y;
    const auto proximity = [&](int64_t part, int64_t i, const float* x, const float* whole) {
        kernels.parts(x, whole, &parts[part * n + i], 1, 1, d, 1);
    };
    for (int64_t i = 0; i < n; ++i) {
        proximity(0, i, p.residual + p.at[i] * p.residual_row, c.y + i * d);
        if (p.constant) proximity(1, i, p.constant, c.y + i * d);
        proximity(3, i, p.ffn + p.at[i] * p.ffn_row, post + i * d);
        if (!p.parallel) proximity(4, i, p.through ? p.through + p.at[i] * p.through_row : c.y + i * d, post + i * d);
    }
    c.others = parts.data();
    c.n_others = p.parallel ? 4 : 3;
    c.low = low.data();
    c.high = high.data();
    c.head_low = head_low.data();
    c.head_high = head_high.data();
    kernels.certified(c, edges, counts);
    const auto share = [](float part, float total) { return total > 0.f ? part / total : 0.f; };
    std::vector<float> middle(n);
    for (int64_t i = 0; i < n; ++i) {
        const float top = p.exact ? low[i] : high[i];
        middle[i] = low[i] + (top - low[i]) / 2;
        float* row = p.table + i * (ROW_SCALARS + 3 * heads);
        const float past = parts[4 * n + i], ffn = parts[3 * n + i], total = p.parallel ? middle[i] : ffn + past;
        *row++ = low[i];
        *row++ = top;
        for (int64_t part = 0; part < 3; ++part) *row++ = share(parts[part * n + i], middle[i]);
        *row++ = share(ffn, total);
        *row++ = p.parallel ? std::numeric_limits<float>::quiet_NaN() : share(past, total);
        for (int64_t h = 0; h < heads; ++h) {
            const float a = head_low[i * heads + h], b = p.exact ? a : head_high[i * heads + h];
            row[h] = share((a + b) / 2, middle[i]);
            row[heads + h] = share(a, a + std::max(top - b, 0.f));
            row[2 * heads + h] = share(b, b + std::max(low[i] - a, 0.f));
        }
    }
    for (Edge& e : edges) e.value = share(e.value, middle[e.query]);
}

}  // namespace flowroutes
