// Every native operation without Python, for the sanitizers and for other processors: on odd shapes, from two threads at once, and with each
// allocation failing in turn; its figures against their definitions in double. Build and run: make test-sanitizers, make test-arm64.
#include "../csrc/kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <new>
#include <thread>

using namespace flowroutes;

#ifdef FAILING_ALLOCATIONS
static std::atomic<long> left{-1};  // allocations until one fails; negative: none does
void* operator new(size_t size) {
    if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
    if (void* p = std::malloc(size ? size : 1)) return p;
    throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
#endif

struct Shape {
    int64_t heads, kv, queries, keys, d_qk, d_v, d_model, window;
    bool gate, mask;
};

struct Inputs {
    Shape n;
    std::vector<float> q, k, v, g, gated, w, y, mask, gate, base, scale, activation, near;
    std::vector<double> prox, gate_prox, flow, gate_flow;  // [head, query, key]: proximity and signed flow; also with gate and row_scale
    std::vector<float> mixed, residual, ffn, after;  // of a layer whose parts add up, for `conservation`
    uint32_t state = 7;

    float number() {
        state = state * 1664525u + 1013904223u;
        return float(state >> 8) / float(1 << 23) - 1.f;
    }
    std::vector<float> numbers(int64_t size) {
        std::vector<float> out(size);
        for (float& x : out) x = number();
        return out;
    }

    explicit Inputs(const Shape& shape) : n(shape) {
        q = numbers(n.heads * n.queries * n.d_qk);
        k = numbers(n.kv * n.keys * n.d_qk);
        v = numbers(n.kv * n.keys * n.d_v);
        w = numbers(n.d_model * n.heads * n.d_v);
        y = numbers(n.queries * n.d_model);
        for (size_t i = 0; i < y.size(); i += 5) y[i] = i % 2 ? -0.f : 1e-41f;
        mask = numbers(n.queries * n.keys);
        gate = numbers(n.queries * n.heads * n.d_v);
        base.assign(n.queries, 1.f);
        scale = numbers(n.queries);
        for (float& x : scale) x = 1.5f + x;
        activation = numbers(n.queries * n.heads);
        for (int64_t i = 0; i < n.queries; ++i)
            for (int64_t h = 0; h < n.heads; ++h)
                for (int64_t c = 0; c < n.d_v; ++c) {
                    double total = 0.;
                    for (int64_t d = 0; d < n.d_model; ++d) total += sign(y[i * n.d_model + d]) * w[(d * n.heads + h) * n.d_v + c];
                    g.push_back(float(total));
                    gated.push_back(float(total * gate[g.size() - 1]));
                }
        for (int64_t i = 0; i < n.queries; ++i)
            for (int64_t h = 0; h < n.heads; ++h) {
                double bound = 0.;
                for (int64_t d = 0; d < n.d_v; ++d) bound += sign(g[i * n.d_v + d]) * activation[i * n.heads + h] * w[h * n.d_v + d];
                near.push_back(float(std::max(bound, 0.)));
            }
        define(prox, flow, false);
        define(gate_prox, gate_flow, true);
        conserve();
    }

    static double sign(float x) { return std::signbit(x) ? -1. : 1.; }

    // attention weights of one row over `keys` keys
    std::vector<double> weights(int64_t h, int64_t i, int64_t keys, bool masked, double sink) const {
        const int64_t last = masked ? keys : std::min(keys, i + keys - n.queries + 1);
        const int64_t first = !masked && n.window ? std::max<int64_t>(0, last - n.window) : 0;
        std::vector<double> alpha(keys, 0.);
        double total = sink;
        for (int64_t j = first; j < last; ++j) {
            double score = 0.;
            for (int64_t c = 0; c < n.d_qk; ++c)
                score += double(q[(h * n.queries + i) * n.d_qk + c]) * k[(h * n.kv / n.heads * n.keys + j) * n.d_qk + c];
            if (n.mask) score = 3. * std::tanh(score / 3.);
            if (masked) score += mask[i * n.keys + j];
            total += alpha[j] = std::exp(score);
        }
        for (double& a : alpha) a /= total;
        return alpha;
    }

    void define(std::vector<double>& to, std::vector<double>& signs, bool with_gate) const {
        for (int64_t h = 0; h < n.heads; ++h)
            for (int64_t i = 0; i < n.queries; ++i) {
                const std::vector<double> alpha = weights(h, i, n.keys, n.mask, 0.);
                for (int64_t j = 0; j < n.keys; ++j) {
                    double near_y = 0., along_y = 0.;
                    for (int64_t d = 0; d < n.d_model && alpha[j] > 0.; ++d) {
                        double z = 0.;
                        for (int64_t c = 0; c < n.d_v; ++c)
                            z += double(v[(h * n.kv / n.heads * n.keys + j) * n.d_v + c]) * w[(d * n.heads + h) * n.d_v + c] *
                                 (with_gate ? gate[(i * n.heads + h) * n.d_v + c] : 1.f);
                        z *= alpha[j] * (with_gate ? scale[i] : 1.f);
                        const float whole = y[i * n.d_model + d];
                        near_y += std::fabs(whole) - std::fabs(z - whole);
                        along_y += sign(whole) * z;
                    }
                    to.push_back(std::max(near_y, 0.));
                    signs.push_back(along_y);
                }
            }
    }

    // A layer over `queries` tokens: what attention mixes and adds, and the states around it.
    void conserve() {
        const int64_t width = n.heads * n.d_v;
        mixed.assign(n.queries * width, 0.f);
        for (int64_t h = 0; h < n.heads; ++h)
            for (int64_t i = 0; i < n.queries; ++i) {
                const bool masked = n.mask && n.queries == n.keys;
                const std::vector<double> alpha = weights(h, i, n.queries, masked, n.mask ? std::exp(1.) : 0.);
                for (int64_t c = 0; c < n.d_v; ++c) {
                    double total = 0.;
                    for (int64_t j = 0; j < n.queries; ++j) total += alpha[j] * v[(h * n.kv / n.heads * n.keys + j) * n.d_v + c];
                    mixed[i * width + h * n.d_v + c] = float(total);
                }
            }
        residual = numbers(y.size());
        ffn = numbers(y.size());
        for (int64_t i = 0; i < n.queries; ++i)
            for (int64_t d = 0; d < n.d_model; ++d) {
                double adds = 0.;
                for (int64_t c = 0; c < width; ++c)
                    adds += double(mixed[i * width + c]) * w[d * width + c] * (n.gate ? double(gate[i * width + c]) * g[c] : 1.);
                if (n.gate) adds = (adds * scale[i] + y[d] * (n.mask ? scale[i] : 1.f)) * y[d];
                const int64_t at = i * n.d_model + d;
                after.push_back(float(residual[at] + (n.mask ? y[at] : ffn[at]) + adds));
            }
    }
};

// One run of one operation on them, and what is wrong with its figures.
struct Case {
    const Inputs& in;
    const Shape& n;
    int threads;
    std::vector<float> low, high, head_low, head_high, dense, near, value, post;
    std::vector<int32_t> index;
    std::vector<Edge> edges;
    float errors[3] = {}, off[3] = {};

    Case(const Inputs& inputs, int threads) : in(inputs), n(inputs.n), threads(threads), near(inputs.near) {
        low.assign(n.queries, 1.f);
        high = low;
        head_low.assign(n.queries * n.heads, 0.f);
        head_high = head_low;
        dense.assign(n.heads * n.queries * n.keys, 0.f);
        for (int32_t i = 0; i < n.queries; ++i) index.push_back(n.queries - 1 - i);
        for (int32_t i = 0; i < n.queries; ++i) index.push_back(i % n.keys);
        for (int32_t i = 0; i < n.queries; ++i) index.push_back(i % n.heads);
        value.assign(n.queries, 0.f);
        post = in.residual;
        for (size_t x = 0; x < post.size(); ++x) post[x] += in.ffn[x];
    }

    template <class P>
    P layer() const {
        P p;
        p.alpha.q = in.q.data(), p.alpha.q_head = n.queries * n.d_qk, p.alpha.q_row = n.d_qk;
        p.alpha.k = in.k.data(), p.alpha.k_head = n.keys * n.d_qk, p.alpha.k_row = n.d_qk;
        p.alpha.d_qk = n.d_qk, p.alpha.window = n.window, p.alpha.offset = n.keys - n.queries;
        if (n.mask) p.alpha.mask = in.mask.data(), p.alpha.mask_query = n.keys, p.alpha.softcap = 3.f;
        p.queries = n.queries, p.keys = n.keys, p.heads = n.heads, p.group = n.heads / n.kv, p.d_v = n.d_v, p.d_model = n.d_model;
        p.v = in.v.data(), p.v_head = n.keys * n.d_v, p.v_row = n.d_v, p.g = in.g.data(), p.w_o = in.w.data(), p.w_row = n.heads * n.d_v;
        p.y = in.y.data(), p.threads = threads;
        return p;
    }

    Conservation conserved() const {
        Conservation p;
        p.alpha.q = in.q.data(), p.alpha.q_head = n.queries * n.d_qk, p.alpha.q_row = n.d_qk, p.alpha.softcap = n.mask ? 3.f : 0.f;
        p.alpha.k = in.k.data(), p.alpha.k_head = n.keys * n.d_qk, p.alpha.k_row = n.d_qk;
        p.alpha.d_qk = n.d_qk, p.alpha.window = n.window, p.alpha.sinks = n.mask ? ones() : nullptr;
        p.tokens = n.queries, p.heads = n.heads, p.group = n.heads / n.kv, p.d_v = n.d_v, p.d_model = n.d_model, p.kv_head = n.kv - 1;
        p.v = in.v.data(), p.v_head = n.keys * n.d_v, p.v_row = n.d_v, p.mixed = in.mixed.data(), p.mixed_row = n.heads * n.d_v;
        p.w_o = in.w.data(), p.w_row = n.heads * n.d_v, p.residual = in.residual.data(), p.ffn_out = in.ffn.data();
        p.resid_post = in.after.data();
        if (n.mask && n.queries == n.keys) p.alpha.mask = in.mask.data(), p.alpha.mask_query = n.keys;
        if (n.mask) p.resid_mid = in.after.data(), p.mixer_out = in.y.data(), p.through = in.residual.data(), p.resid_post = post.data();
        if (n.gate) p.gate = in.gate.data(), p.row_scale = in.scale.data(), p.bias = p.out_scale = in.y.data(), p.in_scale = in.g.data();
        p.bias_is_scaled = n.mask;
        return p;
    }
    static const float* ones() {
        static const float one[] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f};  // [head]
        return one;
    }

    void run(const Kernels& kernels, int operation) {
        Counts counts;
        auto c = layer<Certified>();
        if (n.gate) c.gate = in.gate.data(), c.row_scale = in.scale.data(), c.g = in.gated.data();
        c.others = in.base.data(), c.n_others = 1, c.low = low.data(), c.high = high.data();
        c.head_low = head_low.data(), c.head_high = head_high.data();
        const float threshold = 0.01f;
        c.thresholds = &threshold, c.n_thresholds = 1, c.capacity = 64;
        switch (operation) {
            case 0: {
                auto p = layer<Dense>();
                p.by_head = head_low.data(), p.normaliser = low.data(), p.dense = dense.data(), p.floor = 0.f, p.base = in.base.data();
                return kernels.dense(p, edges);
            }
            case 1: return kernels.certified(c, edges, counts);
            case 2: c.whole_norm = in.base.data(); return kernels.certified(c, edges, counts);
            case 3: {
                Bound b;
                b.layer = c, b.upper = head_low.data(), b.flow = head_high.data(), b.cut = in.base.data();
                b.pair_cut = n.gate ? nullptr : in.base.data();
                return kernels.bound(b, edges);
            }
            case 4: return kernels.pairs(c, index.data(), &index[n.queries], &index[2 * n.queries], value.data(), n.queries);
            case 5: return kernels.rank1(in.activation.data(), in.w.data(), in.g.data(), near.data(), n.queries, n.heads, n.d_v, threads);
            case 6: return kernels.parts(in.w.data(), in.y.data(), low.data(), n.queries, 1, n.d_model, threads);
            case 7: {
                Conservation p = conserved();
                std::vector<int64_t> rows{0, n.queries / 2, n.queries - 1}, channels{n.d_model - 1, 0};
                p.rows = rows.data(), p.n_rows = 3, p.channels = channels.data(), p.n_channels = 2;
                kernels.conservation(p, errors);
                std::vector<float> more = in.mixed, state = in.after, last = n.mask ? post : in.after;
                more.back() += 0.1f, state.back() += 0.1f, last.back() += 0.1f;
                p.mixed = more.data(), p.resid_post = last.data();
                if (n.mask) p.resid_mid = state.data();
                return kernels.conservation(p, off);
            }
            default:
                return kernels.components(in.g.data(), n.heads * n.d_v, n.heads, in.g.data(), head_low.data(), n.queries, n.d_v, threads);
        }
    }

    static double proximity(const float* z, double factor, const float* whole, int64_t d) {
        double total = 0.;
        for (int64_t c = 0; c < d; ++c) total += std::fabs(whole[c]) - std::fabs(factor * z[c] - whole[c]);
        return std::max(total, 0.);
    }

    double worst = 0.;  // error in units of what may be rounded
    void same(double found, double wanted, double unit) { at_most(std::fabs(found - wanted), 0., unit); }
    void at_most(double found, double limit, double unit) {
        const double error = (found - limit) / unit;
        worst = error <= worst ? worst : std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    }

    // Largest error of what run() wrote, in units of the states' norms.
    double error(int operation) {
        const bool with_gate = n.gate && operation >= 1 && operation <= 4;
        const std::vector<double>&prox = with_gate ? in.gate_prox : in.prox, &flow = with_gate ? in.gate_flow : in.flow;
        const auto at = [&](int64_t h, int64_t i, int64_t j) { return (h * n.queries + i) * n.keys + j; };
        std::vector<double> listed(prox.size(), std::numeric_limits<double>::quiet_NaN()), unit(n.queries, 1e-30), totals(n.queries, 1.);
        for (const Edge& e : edges)
            if (e.head >= 0) listed[at(e.head, e.query, e.key)] = e.value;
        for (int64_t i = 0; i < n.queries; ++i) {
            for (int64_t d = 0; d < n.d_model; ++d) unit[i] += std::fabs(in.y[i * n.d_model + d]);
            for (int64_t h = 0; h < n.heads; ++h)
                for (int64_t j = 0; j < n.keys; ++j) unit[i] += std::fabs(flow[at(h, i, j)]), totals[i] += prox[at(h, i, j)];
        }
        for (int64_t i = 0; i < n.queries; ++i) {
            const double norm = operation == 0 ? low[i] : 1.;
            if (operation == 0) same(low[i], totals[i], unit[i]);
            if (operation == 1) at_most(low[i], totals[i], unit[i]), at_most(totals[i], high[i], unit[i]);
            if (operation == 4) same(value[n.queries - 1 - i], prox[at((n.queries - 1 - i) % n.heads, i, (n.queries - 1 - i) % n.keys)], unit[i]);
            if (operation == 6) same(low[i], proximity(in.w.data(), 1., &in.y[i * n.d_model], n.d_model), unit[i] + double(n.d_model));
            for (int64_t h = 0; h < n.heads; ++h) {
                const float first = head_low[i * n.heads + h], second = head_high[i * n.heads + h];
                double sum = 0., sum_flow = 0., positive = 0.;
                for (int64_t j = 0; j < n.keys; ++j) {
                    const int64_t here = at(h, i, j);
                    const double f = flow[here], wanted = operation >= 2 ? (operation == 3 ? std::max(f, 0.) : f) : prox[here];
                    sum += prox[here], sum_flow += f, positive += std::max(f, 0.);
                    if (operation == 0) same(dense[here] * norm, prox[here], unit[i]);
                    if (!std::isnan(listed[here])) same(listed[here] * norm, wanted, unit[i]);
                    const bool needed = operation == 1 ? prox[here] > 1.1e-3 * totals[i] : operation == 2 ? std::fabs(f) > 1.1e-3 : f > 1.001;
                    if (operation >= 1 && operation <= 3 && needed) at_most(std::isnan(listed[here]), 0., 1.);
                }
                if (operation == 0) same(first * norm, sum, unit[i]);
                if (operation == 1) at_most(first, sum, unit[i]), at_most(sum, second, unit[i]);
                if (operation == 2) same(first, sum_flow, unit[i]), same(second, sum_flow, unit[i]);
                if (operation == 3) same(first, positive, unit[i]), same(second, sum_flow, unit[i]);
                const float *whole = &in.g[i * n.d_v], *part = &in.g[(i * n.heads + h) * n.d_v];
                double width = 1.;
                for (int64_t d = 0; d < n.d_v; ++d) width += std::fabs(whole[d]) + std::fabs(part[d]) + 1.;
                if (operation == 5) same(near[i * n.heads + h], proximity(&in.w[h * n.d_v], in.activation[i * n.heads + h], whole, n.d_v), width);
                if (operation == 8) same(first, proximity(part, 1., whole, n.d_v), width);
            }
        }
        if (operation == 7) {
            for (const float e : errors) at_most(e, 0., 1.);
            at_most(1e-3, off[0], 1.), at_most(1e-3, off[1], 1.);  // what does not add up is told
            if (n.mask) at_most(1e-3, off[2], 1.);
        }
        return worst;
    }
};
constexpr double TOLERANCE = 1e-5;
constexpr int OPERATIONS = 9;

const Shape SHAPES[] = {{1, 1, 1, 1, 1, 1, 1, 0, false, false}, {3, 1, 5, 9, 7, 5, 33, 0, true, false}, {6, 2, 61, 83, 17, 20, 67, 9, false, false},
                        {4, 4, 50, 50, 8, 16, 130, 0, true, true}, {2, 1, 25, 25, 3, 3, 9, 0, false, true}};

const char* OPERATION[] = {"attention", "certified", "signed", "bound", "pairs", "rank1", "parts", "conservation", "components"};

int main() {
    std::vector<const Kernels*> all{&kernels_baseline()};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&kernels_avx2());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) all.push_back(&kernels_avx512());
#endif
    long runs = 0, failures = 0;
    double worst = 0.;
    bool wrong = false;
    const auto check = [&](Case& one, const Kernels& kernels, int operation) {
        const double error = one.error(operation);
        worst = std::max(worst, error);
        ++runs;
        if (error <= TOLERANCE) return;
        wrong = true;
        const Shape& n = one.n;
        std::printf("%s, %s, %lld heads, %lld queries, %lld keys: differs from double by %.1e of the states' norm\n", OPERATION[operation],
                    kernels.isa, (long long)n.heads, (long long)n.queries, (long long)n.keys, error);
    };
    for (const Kernels* kernels : all)
        if (const char* said = kernels->arithmetic()) wrong = true, std::printf("%s: %s\n", kernels->isa, said);
    for (const Shape& shape : SHAPES) {
        const Inputs inputs(shape);
        for (const Kernels* kernels : all)
            for (int operation = 0; operation < OPERATIONS; ++operation) {
#ifdef FAILING_ALLOCATIONS
                for (long allowed = 0;; ++allowed) {
                    Case one(inputs, 2);
                    left = allowed;
                    try {
                        one.run(*kernels, operation);
                        left = -1;
                        check(one, *kernels, operation);
                        break;
                    } catch (const std::bad_alloc&) {
                        left = -1;
                        ++failures;
                    }
                    if (allowed > 40) allowed += allowed / 8;
                }
#else
                Case a(inputs, 1), b(inputs, 1);  // one thread each: ThreadSanitizer does not know libgomp's barriers
                std::thread other([&] { a.run(*kernels, operation); });
                b.run(*kernels, operation);
                other.join();
                check(a, *kernels, operation);
                check(b, *kernels, operation);
#endif
            }
    }
    std::printf("%ld runs, %ld failed allocations, %zu instruction sets, largest error %.1e: %s\n", runs, failures, all.size(), worst,
                wrong ? "wrong" : "nothing found");
    return wrong;
}
