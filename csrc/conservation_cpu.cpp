// Do the captured parts of a layer add up to its states, at some rows and channels? One call per layer of every forward
// pass. Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "rows.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

// <a row, b row>: four rows a with two b
struct Tile {
    vec4 first, second;
};
inline Tile tile(const float* const* a, const float* b, const float* c, int64_t n) {
    vec x[4] = {}, y[4] = {};
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES) {
        const vec u = load(b + at), v = load(c + at);
        for (int r = 0; r < 4; ++r) {
            const vec w = load(a[r] + at);
            x[r] += w * u;
            y[r] += w * v;
        }
    }
    Tile total{sums(x[0], x[1], x[2], x[3]), sums(y[0], y[1], y[2], y[3])};
    for (; at < n; ++at) {
        const vec4 w{a[0][at], a[1][at], a[2][at], a[3][at]};
        total.first += w * b[at];
        total.second += w * c[at];
    }
    return total;
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

inline float dot(const float* a, const float* b, int64_t n) {
    vec x = {};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) x += load(a + c) * load(b + c);
    float rest = 0.f;
    for (; c < n; ++c) rest += a[c] * b[c];
    return sum(x) + rest;
}

// z[0:n] = sum_j weight[j] v_j
inline void mix(const float* weight, const float* v, int64_t row, int64_t count, int64_t n, float* z) {
    int64_t c = 0;
    for (; c + 4 * LANES <= n; c += 4 * LANES) {
        vec sum[4] = {};
        for (int64_t j = 0; j < count; ++j)
            for (int l = 0; l < 4; ++l) sum[l] += weight[j] * load(v + j * row + c + l * LANES);
        for (int l = 0; l < 4; ++l) store(z + c + l * LANES, sum[l]);
    }
    for (; c + LANES <= n; c += LANES) {
        vec sum = {};
        for (int64_t j = 0; j < count; ++j) sum += weight[j] * load(v + j * row + c);
        store(z + c, sum);
    }
    for (; c < n; ++c) {
        float sum = 0.f;
        for (int64_t j = 0; j < count; ++j) sum += weight[j] * v[j * row + c];
        z[c] = sum;
    }
}

// numbers of float32 in float64, half a vector at a time
typedef double wide __attribute__((vector_size(LANES * 4)));
typedef float half __attribute__((vector_size(LANES * 2)));
constexpr int WIDE = LANES / 2;
inline wide widen(const float* p) {
    half x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, wide);
}
inline double total(wide x) {
    double all = 0.;
    for (int n = 0; n < WIDE; ++n) all += x[n];
    return all;
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
    constexpr float none = -std::numeric_limits<float>::infinity();
    std::vector<float> alpha(p.tokens + LANES), z(p.d_v);
    double worst = 0.;
    for (int64_t r = 0; r < p.n_rows; ++r) {
        const int64_t i = p.rows[r], end = a.mask ? p.tokens : i + 1;
        const int64_t first = !a.mask && a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0, seen = end - first;
        for (int64_t h = p.kv_head * p.group; h < (p.kv_head + 1) * p.group; ++h) {
            const float *q = a.q + h * a.q_head + i * a.q_row, *k = a.k + p.kv_head * a.k_head + first * a.k_row;
            int64_t j = 0;
            for (; j + 4 <= seen; j += 4) {
                const vec4 score = dot4(k + j * a.k_row, a.k_row, q, a.d_qk) * a.scale;
                std::memcpy(&alpha[j], &score, sizeof score);
            }
            for (; j < seen; ++j) alpha[j] = dot(q, k + j * a.k_row, a.d_qk) * a.scale;
            if (a.softcap > 0.f)
                for (j = 0; j < seen; ++j) alpha[j] = a.softcap * std::tanh(alpha[j] / a.softcap);
            std::fill(&alpha[seen], &alpha[seen] + LANES, 0.f);
            vec poison = {}, top = splat(none);  // NaN that no maximum or exponential may swallow
            for (j = 0; j < seen; j += LANES) poison += load(&alpha[j]) * 0.f;
            if (const float* mask = a.mask ? a.mask + h * a.mask_head + i * a.mask_query : nullptr)
                for (j = 0; j < seen; ++j) {
                    alpha[j] += mask[j];
                    if (mask[j] != mask[j]) poison += mask[j];
                }
            std::fill(&alpha[seen], &alpha[seen] + LANES, none);
            for (j = 0; j < seen; j += LANES) top = vmax(top, load(&alpha[j]));
            const float high = std::max(largest(top), a.sinks ? a.sinks[h] : none);
            if (!(high > none)) return std::numeric_limits<float>::quiet_NaN();
            vec sums = {};
            for (j = 0; j < seen; j += LANES) {
                const vec e = vexp(load(&alpha[j]) - high);
                store(&alpha[j], e);
                sums += e;
            }
            const float by = 1.f / (sum(sums) + (a.sinks ? std::exp(a.sinks[h] - high) : 0.f)), wrong = sum(poison);
            mix(alpha.data(), v + first * p.v_row, p.v_row, seen, p.d_v, z.data());
            const float* given = p.mixed + i * p.mixed_row + h * p.d_v;
            for (int64_t c = 0; c < p.d_v; ++c) worst = worse(worst, std::fabs(z[c] * by - given[c]) + wrong);
        }
    }
    return static_cast<float>(worst / std::max(largest_value, 1e-30));
}

// Some numbers of each part [row, channel], the channels padded with zeros.
struct Sample {
    const Conservation& p;
    int64_t padded = round_up(p.n_channels, WIDE);
    std::vector<float> memory = std::vector<float>(8 * p.n_rows * padded);
    int64_t used = 0;

    float* place() { return memory.data() + used++ * p.n_rows * padded; }
    const float* of(const float* part) {
        if (!part) return nullptr;
        float* out = place();
        for (int64_t r = 0; r < p.n_rows; ++r)
            for (int64_t n = 0; n < p.n_channels; ++n)
                out[r * padded + n] = part[p.rows[r] * p.d_model + p.channels[n]];
        return out;
    }
};

// What attention adds, from what the attention function returned.
const float* attention_adds(const Conservation& p, Sample& sample) {
    const int64_t width = p.heads * p.d_v;
    std::vector<float> scaled(p.gate || p.in_scale ? p.n_rows * width : 0);
    std::vector<const float*> x(round_up(p.n_rows, 4));
    for (int64_t r = 0; r < p.n_rows; ++r) {
        x[r] = p.mixed + p.rows[r] * p.mixed_row;
        if (scaled.empty()) continue;
        const float* gate = p.gate ? p.gate + p.rows[r] * width : nullptr;
        for (int64_t c = 0; c < width; ++c)
            scaled[r * width + c] = x[r][c] * (gate ? gate[c] : 1.f) * (p.in_scale ? p.in_scale[c] : 1.f);
        x[r] = &scaled[r * width];
    }
    std::fill(x.begin() + p.n_rows, x.end(), x[0]);
    float* out = sample.place();
    const auto put = [&](int64_t n, int64_t r, vec4 found) {
        const int64_t d = p.channels[n];
        const float constant = p.bias ? p.bias[d] : 0.f, by = p.scale * (p.out_scale ? p.out_scale[d] : 1.f);
        for (int64_t m = r; m < std::min(r + 4, p.n_rows); ++m) {
            const float scale = p.row_scale ? p.row_scale[p.rows[m]] : 1.f;
            out[m * sample.padded + n] = (p.bias_is_scaled ? (found[m - r] + constant) * scale
                                                           : found[m - r] * scale + constant) *
                                         by;
        }
    };
    const auto weight = [&](int64_t n) { return p.w_o + (p.w_is_sampled ? n : p.channels[n]) * p.w_row; };
    for (int64_t n = 0; n < p.n_channels; n += 2) {
        const int64_t next = std::min(n + 1, p.n_channels - 1);
        for (int64_t r = 0; r < p.n_rows; r += 4) {
            const Tile found = tile(&x[r], weight(n), weight(next), width);
            put(n, r, found.first);
            put(next, r, found.second);
        }
    }
    return out;
}

// Largest |sum of parts - state| / (|state| + sum |part|) over rows; channels count in units of their size in the
// state.
float missing(const Conservation& p, int64_t padded, const float* state, std::initializer_list<const float*> parts) {
    std::vector<double> unit(padded);
    double most = 0.;
    for (int64_t r = 0; r < p.n_rows; ++r)
        for (int64_t n = 0; n < padded; ++n) {
            const double y = state[r * padded + n];
            unit[n] += y * y;
        }
    for (int64_t n = 0; n < p.n_channels; ++n) {
        unit[n] = std::sqrt(unit[n] / double(p.n_rows));
        most = worse(most, unit[n]);
    }
    for (int64_t n = 0; n < p.n_channels; ++n) unit[n] = 1. / std::max({unit[n], most * p.smallest, 1e-30});
    double worst = most != most ? most : 0.;
    for (int64_t at = 0; at < p.n_rows * padded; at += padded) {
        wide off = {}, norm = {};
        const auto in_units = [&](const float* part, int64_t n) {
            wide u;
            std::memcpy(&u, &unit[n], sizeof u);
            return widen(part + at + n) * u;
        };
        for (int64_t n = 0; n < padded; n += WIDE) {
            const wide y = in_units(state, n);
            norm += y * y;
            wide left = -y;
            for (const float* part : parts)
                if (part) left += in_units(part, n);
            off += left * left;
        }
        double size = std::sqrt(total(norm));
        for (const float* part : parts) {
            if (!part) continue;
            norm = wide{};
            for (int64_t n = 0; n < padded; n += WIDE) {
                const wide y = in_units(part, n);
                norm += y * y;
            }
            size += std::sqrt(total(norm));
        }
        worst = worse(worst, std::sqrt(total(off)) / std::max(size, 1e-30));
    }
    return static_cast<float>(worst);
}

}  // namespace

void conservation(const Conservation& p, float* errors) {
    Sample sample{p};
    const int64_t padded = sample.padded;
    const float *mid = sample.of(p.resid_mid), *ffn = sample.of(p.ffn_out), *post = sample.of(p.resid_post);
    const float* through = p.through == p.resid_mid ? mid : sample.of(p.through);
    const float *adds = attention_adds(p, sample), *residual = sample.of(p.residual), *mixer = sample.of(p.mixer_out);
    errors[0] = weights_error(p);
    errors[1] = missing(p, padded, mid ? mid : post, {adds, residual, mixer, through ? nullptr : ffn});
    errors[2] = through ? missing(p, padded, post, {through, ffn}) : 0.f;
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
