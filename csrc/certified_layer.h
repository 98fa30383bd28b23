// What the row blocks of a certified layer share: packed keys and values, and the norms that bound a channel's part.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#pragma once
#include "rows.h"

#include <memory>
#include <numeric>

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

// Memory for packed keys and values, given back to be taken again: a walk packs every layer once, and fresh pages cost
// more than packing.
class Pool {
  public:
    struct Return {
        int64_t size = 0;
        void operator()(float* memory) const noexcept { Pool::shared().give(memory, size); }
    };
    using Buffer = std::unique_ptr<float[], Return>;

    static Pool& shared() {
        static Pool* pool = new Pool;  // outlives whatever is destroyed at exit
        return *pool;
    }
    // ``keep``: the memory may come from an earlier call, and be kept for a later one
    Buffer take(int64_t size, bool keep) {
        size = std::max<int64_t>(size, 1);
        if (!keep) return Buffer(new float[size], Return{0});
        if (const std::unique_lock<std::mutex> one(lock, std::try_to_lock);
            one) {  // held by nobody in a process that was forked
            for (size_t n = 0; n < kept.size(); ++n)
                if (kept[n].second >= size && kept[n].second <= 2 * size) {
                    const auto found = kept[n];
                    kept.erase(kept.begin() + n);
                    total -= found.second;
                    return Buffer(found.first, Return{found.second});
                }
        }
        return Buffer(new float[size], Return{size});
    }
    void give(float* memory, int64_t size) noexcept {
        if (const std::unique_lock<std::mutex> one(lock, std::try_to_lock);
            one && size && total + size <= MOST && kept.size() < kept.capacity()) {
            kept.emplace_back(memory, size);
            total += size;
            return;
        }
        delete[] memory;
    }

  private:
    Pool() { kept.reserve(64); }
    static constexpr int64_t MOST = 16 << 20;  // floats
    std::mutex lock;
    std::vector<std::pair<float*, int64_t>> kept;
    int64_t total = 0;
};

constexpr int FEW = 64;       // rows of a walk: then fresh pages would cost more than the work
constexpr int PART = 8 * NR;  // keys that are packed at a time
constexpr int WIDE = 8;       // channels per head whose |W_O[h, :, d]| is kept apart: outliers must not loosen the rest
constexpr int64_t SCREEN_BYTES = 64 << 20, SCREEN_KEPT = 16 << 20;  // the latter: kept for the next layer
constexpr int64_t SCREEN_WIDTH = 16384;  // heads times channels: beyond, u costs more than it saves

struct Layer {
    const Certified& p;
    Magnitudes order;
    int64_t seen;                       // keys that some query may see
    int64_t padded;                     // those, rounded up to whole panels
    int height;                         // queries that a thread works on together
    bool packed;                        // else keys and values are read as they are stored
    std::vector<Pool::Buffer> k, v;     // [kv_head]: panels [key / NR][d][NR]
    std::vector<float> length;          // [kv_head, padded]: |v_j|
    std::vector<float> width;           // [head, d_model]: |W_O[h, :, d]|
    std::vector<float> widest, common;  // [head]: its largest, its largest without the wide ones
    std::vector<float> factors;  // [query, d_model]: signs of y, and the probe, where the layer computes g itself
    Pool::Buffer memory;         // of `coarse`
    int8_t* coarse = nullptr;    // [head, padded, d_model]: u = v W_O[h] in steps; null: channels are found by norms
    std::vector<float> step;     // [head, padded]: |u_d| <= (|coarse_d| + 1) step, so that channels are told apart
    std::vector<int32_t> wide;   // [head, WIDE]: channels of the largest, -1 where there are fewer

    // ``screen``: many sub-edges will be evaluated
    explicit Layer(const Certified& problem, int threads, bool screen = false)
        : p(problem),
          order(problem.y, problem.whole_norm ? 0 : problem.queries, problem.d_model, threads),
          seen(p.alpha.causal() && p.queries ? std::min<int64_t>(p.keys, p.alpha.position(p.queries - 1) + 1) : p.keys),
          padded(round_up(seen, NR)),
          height(static_cast<int>(std::clamp<int64_t>((p.queries + threads - 1) / threads, 1, ROWS))),
          packed(p.queries > MR || p.whole_norm) {
        const int64_t kv_heads = p.heads / p.group;
        k.resize(kv_heads);
        v.resize(kv_heads);
        for (int64_t kv = 0; kv < kv_heads && packed; ++kv) {
            if (!p.alpha.pattern) k[kv] = Pool::shared().take(padded * p.alpha.d_qk, few());
            v[kv] = Pool::shared().take(padded * p.d_v, few());
        }
        length.assign(kv_heads * padded, 0.f);
        width.resize(p.heads * p.d_model);
        widest.resize(p.heads);
        common.resize(p.heads);
        wide.assign(p.heads * WIDE, -1);
        if (p.g_out) {
            const int64_t n = p.queries * p.d_model;
            factors.resize(n + (p.probe ? p.d_model : 0));
            for (int64_t i = 0; i < n; ++i) factors[i] = std::copysign(1.f, p.y[i]);
            if (p.probe) std::copy_n(p.probe, p.d_model, factors.data() + n);
        }
        const int64_t parts = (padded + PART - 1) / PART, all = p.heads * padded * p.d_model;
        const bool screened = screen && packed && !p.gate && !p.g_out && all <= SCREEN_BYTES &&
                              p.heads * p.d_model * seen <= SCREEN_WIDTH * p.queries;
        if (screened) {
            memory = Pool::shared().take(all / 4 + 2, all <= SCREEN_KEPT);
            coarse = reinterpret_cast<int8_t*>(memory.get());
            step.assign(p.heads * padded, 0.f);
        }
        Failure failure;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) nowait
            for (int64_t part = 0; part < kv_heads * parts; ++part)
                failure.guard([&] { pack_part(part / parts, part % parts); });
#pragma omp for schedule(static)
            for (int64_t n = 0; n < threads; ++n)
                failure.guard([&] {
                    if (p.g_out) products(p.heads * n / threads, p.heads * (n + 1) / threads);
                    else
                        for (int64_t d = p.d_model * n / threads; d < p.d_model * (n + 1) / threads; ++d)
                            measure(d, 0, p.heads);
                });
#pragma omp for schedule(static)
            for (int64_t h = 0; h < p.heads; ++h) failure.guard([&] { rank(h); });
            if (screened) {
#pragma omp for schedule(static)
                for (int64_t n = 0; n < threads; ++n) failure.guard([&] { screen_part(n, threads); });
            }
        }
        failure.rethrow();
    }

    bool few() const { return p.queries <= FEW; }
    int64_t blocks() const { return (p.queries + height - 1) / height; }

    // some keys, values and lengths of one kv head
    void pack_part(int64_t kv, int64_t part) {
        const int64_t first = part * PART, end = std::min(seen, first + PART), d_qk = p.alpha.d_qk;
        if (packed && !p.alpha.pattern)
            pack(p.alpha.k + kv * p.alpha.k_head + first * p.alpha.k_row, p.alpha.k_row, end - first, d_qk,
                 k[kv].get() + first * d_qk);
        const float* values = p.v + kv * p.v_head;
        if (packed) pack(values + first * p.v_row, p.v_row, end - first, p.d_v, v[kv].get() + first * p.d_v);
        float* lengths = length.data() + kv * padded + first;
        norms(values + first * p.v_row, p.v_row, end - first, p.d_v, [lengths](int64_t j, float x) { lengths[j] = x; });
    }

    // one thread's share of `coarse`: pairs of a head and some keys
    void screen_part(int64_t n, int64_t threads) {
        const int64_t d = p.d_model, row = round_up(d, NR), groups = (seen + ROWS - 1) / ROWS, all = p.heads * groups;
        std::vector<float> w(row * p.d_v), u(ROWS * row);
        std::vector<int32_t> rounded(row);
        int64_t packed_head = -1;
        for (int64_t x = all * n / threads; x < all * (n + 1) / threads; ++x) {
            const int64_t h = x / groups, first = x % groups * ROWS, kv = h / p.group;
            const int count = static_cast<int>(std::min<int64_t>(ROWS, seen - first));
            if (h != packed_head) pack(p.w_o + h * p.d_v, p.w_row, d, p.d_v, w.data());
            packed_head = h;
            const float* values = p.v + kv * p.v_head + first * p.v_row;
            for (int64_t c = 0; c < row; c += NR)
                for (int r = 0; r < count; r += MR)
                    tile(values + r * p.v_row, p.v_row, std::min(MR, count - r), w.data() + c * p.d_v, p.d_v,
                         u.data() + r * row + c, row);
            for (int r = 0; r < count; ++r) {
                const float* from = u.data() + r * row;
                vec most = {};
                for (int64_t c = 0; c < row; c += LANES) most = vmax(most, vabs(load(from + c)));
                // where u is far below |v| |W_O[h, :, d]|, its own rounding must not pass a step
                const float s = std::max({largest(most), 2e-3f * length[kv * padded + first + r] * widest[h], 1e-28f}) /
                                127.f;
                const vec by = splat(1.f / s), shift = splat(12582912.f);  // 1.5 * 2^23: rounds to the nearest integer
                for (int64_t c = 0; c < row; c += LANES) store(u.data() + r * row + c, load(from + c) * by + shift);
                std::memcpy(rounded.data(), from, row * sizeof(float));
                int8_t* out = coarse + (h * padded + first + r) * d;
                for (int64_t c = 0; c < d; ++c) out[c] = static_cast<int8_t>(rounded[c] & 0xff);
                step[h * padded + first + r] = s;
            }
        }
    }

    // widths of a channel, for some heads: W_O is read once, in order
    void measure(int64_t d, int64_t from, int64_t to) {
        norms(p.w_o + d * p.w_row + from * p.d_v, p.d_v, to - from, p.d_v,
              [=](int64_t h, float length) { width[(from + h) * p.d_model + d] = length; });
    }

    // the same of all channels, and while some channels are at hand g[i, h] = sum_d sign(y_d) W_O[h, :, d] of the rows
    // and the answer to the probe; summed CHANNELS at a time, in the same order whatever rows are beside
    void products(int64_t from, int64_t to) {
        constexpr int64_t CHANNELS = 32;
        const int64_t n = (to - from) * p.d_v, row = p.heads * p.d_v, first = from * p.d_v;
        if (!n) return;
        const int64_t sums = p.queries + (p.probe ? 1 : 0);
        std::vector<float> out(sums * n);
        for (int64_t d0 = 0; d0 < p.d_model; d0 += CHANNELS) {
            const int64_t count = std::min(p.d_model - d0, CHANNELS);
            for (int64_t d = d0; d < d0 + count; ++d) measure(d, from, to);
            const float* w = p.w_o + d0 * p.w_row + first;
            for (int64_t c = 0; c < n; c += NR) {
                const int width = static_cast<int>(std::min<int64_t>(NR, n - c));
                for (int64_t i = 0; i < sums; i += MR)
                    add_tile(factors.data() + i * p.d_model + d0, p.d_model,
                             static_cast<int>(std::min<int64_t>(MR, sums - i)), w + c, p.w_row, count, width,
                             out.data() + i * n + c, n);
            }
        }
        for (int64_t i = 0; i < sums; ++i)
            std::copy_n(out.data() + i * n, n, (i < p.queries ? p.g_out + i * row : p.answer) + first);
    }

    // the widest channels of one head
    void rank(int64_t h) {
        const float* w = width.data() + h * p.d_model;
        std::vector<int32_t> order(p.d_model);
        std::iota(order.begin(), order.end(), 0);
        const int64_t n = p.d_model > 4 * WIDE ? WIDE : 0;
        std::partial_sort(order.begin(), order.begin() + n + 1, order.end(),
                          [w](int32_t a, int32_t b) { return w[a] > w[b]; });
        std::copy(order.begin(), order.begin() + n, wide.begin() + h * WIDE);
        widest[h] = w[order[0]];
        common[h] = w[order[n]];
    }

    // out(i, |x_i|) for `count` vectors of n numbers, each an upper bound in spite of rounding and underflow
    template <class Out>
    static void norms(const float* x, int64_t stride, int64_t count, int64_t n, Out&& out) {
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            vec s[4] = {};
            int64_t c = 0;
            for (; c + LANES <= n; c += LANES)
                for (int r = 0; r < 4; ++r) {
                    const vec a = load(x + (i + r) * stride + c);
                    s[r] += a * a;
                }
            vec4 total = sums(s[0], s[1], s[2], s[3]);
            for (; c < n; ++c)
                for (int r = 0; r < 4; ++r) total[r] += x[(i + r) * stride + c] * x[(i + r) * stride + c];
            for (int r = 0; r < 4; ++r)
                out(i + r, total[r] > 1e-28f ? bounded(std::sqrt(total[r])) : norm(x + (i + r) * stride, n));
        }
        for (; i < count; ++i) out(i, norm(x + i * stride, n));
    }
    static float bounded(float length) { return length * (1.f + 1e-5f) + std::numeric_limits<float>::denorm_min(); }
    static float norm(const float* x, int64_t n) {
        float total = 0.f, most = 0.f;
        for (int64_t c = 0; c < n; ++c) {
            total += x[c] * x[c];
            most = std::max(most, std::fabs(x[c]));
        }
        return bounded(most < 1e-15f ? most * std::sqrt(float(n)) : std::sqrt(total));
    }
};

float dot(const float* a, const float* b, int64_t n) {
    vec acc = {};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) acc += load(a + c) * load(b + c);
    float total = sum(acc);
    for (; c < n; ++c) total += a[c] * b[c];
    return total;
}

}  // namespace
}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
