// Do the captured parts of a layer add up to its states, at some rows and channels? One call per layer of every forward pass.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "rows.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

inline float dot(const float* a, const float* b, int64_t n) {
    vec x = {}, y = {};
    int64_t c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) {
        x += load(a + c) * load(b + c);
        y += load(a + c + LANES) * load(b + c + LANES);
    }
    float rest = 0.f;
    for (; c < n; ++c) rest += a[c] * b[c];
    return sum(x + y) + rest;
}

// four rows of a[., n] with b
inline vec4 dot4(const float* a, int64_t row, const float* b, int64_t n) {
    vec w = {}, x = {}, y = {}, z = {};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) {
        const vec v = load(b + c);
        w += load(a + c) * v;
        x += load(a + row + c) * v;
        y += load(a + 2 * row + c) * v;
        z += load(a + 3 * row + c) * v;
    }
    vec4 total = sums(w, x, y, z);
    for (; c < n; ++c) total += vec4{a[c], a[row + c], a[2 * row + c], a[3 * row + c]} * b[c];
    return total;
}

// the larger of the two; NaN stays
inline double worse(double a, double b) { return b > a || b != b ? b : a; }

// Largest |sum_j alpha_hij v_hj - z_ih| of the heads that share the key-value head, relative to its largest value.
float weights_error(const Conservation& p) {
    const Alpha& a = p.alpha;
    const float* v = p.v + p.kv_head * p.v_head;
    double largest_value = 0.;
    for (int64_t j = 0; j < p.tokens; ++j) {
        vec most = {};
        int64_t c = 0;
        float rest = 0.f;
        for (; c + LANES <= p.d_v; c += LANES) most = vmax(most, vabs(load(v + j * p.v_row + c)));
        for (; c < p.d_v; ++c) rest = std::max(rest, std::fabs(v[j * p.v_row + c]));
        largest_value = std::max<double>(largest_value, std::max(rest, largest(most)));
    }
    std::vector<float> alpha(p.tokens), z(p.d_v);
    double worst = 0.;
    for (int64_t r = 0; r < p.n_rows; ++r) {
        const int64_t i = p.rows[r], end = a.mask ? p.tokens : i + 1;
        const int64_t first = !a.mask && a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
        for (int64_t h = p.kv_head * p.group; h < (p.kv_head + 1) * p.group; ++h) {
            const float* q = a.q + h * a.q_head + i * a.q_row;
            const float* k = a.k + p.kv_head * a.k_head;
            const float* mask = a.mask ? a.mask + h * a.mask_head + i * a.mask_query : nullptr;
            float high = a.sinks ? a.sinks[h] : -std::numeric_limits<float>::infinity(), poison = 0.f;
            for (int64_t j = first; j < end; ++j) {
                float score = dot(q, k + j * a.k_row, a.d_qk) * a.scale;
                if (a.softcap > 0.f) score = a.softcap * std::tanh(score / a.softcap);
                poison += score * 0.f;
                if (mask) score += mask[j];
                alpha[j] = score;
                high = std::max(high, score);
            }
            float total = a.sinks ? std::exp(a.sinks[h] - high) : 0.f;
            std::fill(z.begin(), z.end(), 0.f);
            for (int64_t j = first; j < end; ++j) total += alpha[j] = std::exp(alpha[j] - high);
            for (int64_t j = first; j < end; ++j) {
                const float weight = alpha[j] / total, *value = v + j * p.v_row;
                int64_t c = 0;
                for (; c + LANES <= p.d_v; c += LANES) store(&z[c], load(&z[c]) + weight * load(value + c));
                for (; c < p.d_v; ++c) z[c] += weight * value[c];
            }
            const float* given = p.mixed + i * p.mixed_row + h * p.d_v;
            for (int64_t c = 0; c < p.d_v; ++c) worst = worse(worst, std::fabs(z[c] - given[c]) + poison);
        }
    }
    return static_cast<float>(worst / std::max(largest_value, 1e-30));
}

// What attention adds [row, channel], from what the attention function returned.
std::vector<float> attention_adds(const Conservation& p) {
    const int64_t width = p.heads * p.d_v, padded = round_up(p.n_rows, 4);
    std::vector<float> x(padded * width), out(p.n_rows * p.n_channels);
    for (int64_t r = 0; r < p.n_rows; ++r) {
        const float *from = p.mixed + p.rows[r] * p.mixed_row, *gate = p.gate ? p.gate + p.rows[r] * width : nullptr;
        for (int64_t c = 0; c < width; ++c) x[r * width + c] = from[c] * (gate ? gate[c] : 1.f) * (p.in_scale ? p.in_scale[c] : 1.f);
    }
    for (int64_t n = 0; n < p.n_channels; ++n) {
        const int64_t d = p.channels[n];
        const float constant = p.bias ? p.bias[d] : 0.f, by = p.scale * (p.out_scale ? p.out_scale[d] : 1.f);
        for (int64_t r = 0; r < p.n_rows; r += 4) {
            const vec4 found = dot4(&x[r * width], width, p.w_o + (p.w_is_sampled ? n : d) * p.w_row, width);
            for (int64_t m = r; m < std::min(r + 4, p.n_rows); ++m) {
                const float scale = p.row_scale ? p.row_scale[p.rows[m]] : 1.f;
                out[m * p.n_channels + n] = (p.bias_is_scaled ? (found[m - r] + constant) * scale : found[m - r] * scale + constant) * by;
            }
        }
    }
    return out;
}

// Largest |sum of parts - state| / (|state| + sum |part|) over rows; channels count in units of their size in the state.
float missing(const Conservation& p, const float* state, std::initializer_list<const float*> parts, const std::vector<float>* more) {
    std::vector<double> unit(p.n_channels);
    double most = 0.;
    for (int64_t n = 0; n < p.n_channels; ++n) {
        for (int64_t r = 0; r < p.n_rows; ++r) {
            const double y = state[p.rows[r] * p.d_model + p.channels[n]];
            unit[n] += y * y;
        }
        unit[n] = std::sqrt(unit[n] / double(p.n_rows));
        most = worse(most, unit[n]);
    }
    for (double& u : unit) u = 1. / std::max({u, most * p.smallest, 1e-30});
    double worst = most != most ? most : 0.;
    for (int64_t r = 0; r < p.n_rows; ++r) {
        const int64_t at = p.rows[r] * p.d_model;
        double off = 0., size = 0.;
        std::vector<double> norms(parts.size() + 2);
        for (int64_t n = 0; n < p.n_channels; ++n) {
            const double y = state[at + p.channels[n]] * unit[n];
            double total = -y;
            size_t m = 0;
            norms[m++] += y * y;
            const auto add = [&](double x) {
                total += x;
                norms[m++] += x * x;
            };
            for (const float* part : parts)
                if (part) add(part[at + p.channels[n]] * unit[n]);
            if (more) add((*more)[r * p.n_channels + n] * unit[n]);
            off += total * total;
        }
        for (const double norm : norms) size += std::sqrt(norm);
        worst = worse(worst, std::sqrt(off) / std::max(size, 1e-30));
    }
    return static_cast<float>(worst);
}

}  // namespace

void conservation(const Conservation& p, float* errors) {
    const std::vector<float> adds = attention_adds(p);
    const float* after = p.resid_mid ? p.resid_mid : p.resid_post;
    errors[0] = weights_error(p);
    errors[1] = missing(p, after, {p.residual, p.mixer_out, p.through ? nullptr : p.ffn_out}, &adds);
    errors[2] = p.through ? missing(p, p.resid_post, {p.through, p.ffn_out}, nullptr) : 0.f;
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
