// Bounds and evaluations of a few rows of a certified layer. Compiled once per instruction set, with FLOWROUTES_ISA
// naming the namespace.
#pragma once
#include "certified_layer.h"

#include <optional>

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

constexpr size_t AHEAD = 4;         // evaluations before which their numbers are fetched
constexpr int SEGMENT = 256;        // keys whose bounds are held at a time
constexpr float WELL_ABOVE = 10.f;  // sums over heads above this many floors are known to the tolerance

// A sub-edge of one row block that has been evaluated.
struct Evaluated {
    int32_t key, head;
    float value;
};

// What is known of one row and head beyond its evaluated sub-edges: sums of w and of alpha |v| by class of alpha |v|.
struct Rest {
    float w[3], t[2];
};

class RowBlock {
  public:
    RowBlock(const Layer& layer) : l(layer), p(layer.p), stride(layer.padded), height(layer.height) {
        alpha = Pool::shared().take(p.heads * height * stride, l.few());
        pair.resize(height * stride);
        rest.resize(height * p.heads);
        sum_evaluated.resize(height * p.heads);
        flow.resize(height * p.heads);
        gated.resize(p.d_v);
        known.resize(stride);
        whole.resize(stride);
        slopes.resize(2 * p.heads);
        if (!l.coarse) return;
        passing.resize(p.d_model + 4);
        passing_y.resize(p.d_model + 4);
    }

    void start(int64_t first) {
        i0 = first;
        rows = static_cast<int>(std::min<int64_t>(height, p.queries - i0));
        at_hand = -1;
        std::fill(pair.begin(), pair.end(), 0.f);
        std::fill(rest.begin(), rest.end(), Rest{});
        std::fill(sum_evaluated.begin(), sum_evaluated.end(), 0.f);
        for (int r = 0; r < rows; ++r) {
            evaluated[r].clear();
            reserve[r].clear();
            others[r] = 0.f;
            for (int64_t n = 0; n < p.n_others; ++n) others[r] += p.others[n * p.queries + i0 + r];
            if (!p.whole_norm) classes(r);
        }
    }

    // attention weights of one head into the buffer
    void weights(int64_t h) {
        float* a = alpha.get() + h * height * stride;
        visible = attention_rows(p.alpha, p.keys, h, p.group, i0, rows, l.k[h / p.group].get(), a, stride);
        for (int r = 0; r < rows; ++r) {
            if (p.row_scale)
                for (int64_t j = 0; j < visible; ++j) a[r * stride + j] *= p.row_scale[i0 + r];
            std::fill(a + r * stride + std::min(stride, round_up(visible, NR)), a + (r + 1) * stride, 0.f);
        }
    }

    // Bounds of rows [from, to) of one head. Sub-edges not yet evaluated: listed when above cut[r], else summed into
    // `rest`. The first time, bounds are also added to the pair sums.
    template <class List>
    void scan(int64_t h, int from, int to, const float* cut, bool first, List&& list) {
        const int64_t kv = h / p.group;
        const float* g = p.g + ((i0 + from) * p.heads + h) * p.d_v;
        const int64_t g_row = p.heads * p.d_v;
        const float* length = l.length.data() + kv * stride;
        float b[ROWS * SEGMENT];
        for (int r = from; r < to; ++r) {
            rest[r * p.heads + h] = {};
            if (first) flow[r * p.heads + h] = 0.f;
        }
        const int64_t end = round_up(std::min<int64_t>(p.keys, reach(to)), NR);
        for (int64_t j0 = begin(from); j0 < end; j0 += SEGMENT) {
            const int64_t j1 = std::min<int64_t>(end, j0 + SEGMENT);
            for (int r = from; r < to && !l.packed; ++r)
                dots_of_rows(g + (r - from) * g_row, p.v + kv * p.v_head + j0 * p.v_row, p.v_row,
                             std::min(j1, l.seen) - j0, j1 - j0, p.d_v, b + r * SEGMENT);
            for (int64_t j = j0; j < j1 && l.packed; j += NR)
                for (int r = from; r < to; r += MR)
                    tile(g + (r - from) * g_row, g_row, std::min(MR, to - r), l.v[kv].get() + j * p.d_v, p.d_v,
                         b + r * SEGMENT + (j - j0), SEGMENT);
            for (int r = from; r < to; ++r) {
                const float* a = alpha.get() + (h * height + r) * stride;
                float* pairs = pair.data() + r * stride;
                const vec limit = splat(cut[r]), small = splat(class_end[r][0] * inverse(h)),
                          medium = splat(class_end[r][1] * inverse(h));
                vec w0 = {}, w1 = {}, w2 = {}, t0 = {}, t1 = {}, signed_sum = {};
                for (int64_t j = j0; j < j1; j += LANES) {
                    const vec weight = load(a + j), f = weight * load(b + r * SEGMENT + (j - j0));
                    const vec w = vmax(f, vec{});  // an evaluated sub-edge carries its weight negated
                    if (first) {
                        signed_sum += f;
                        store(pairs + j, load(pairs + j) + w);
                    }
                    const ivec open = weight > vec{};
                    const vec left = open ? w : vec{};
                    const ivec above = left > limit;
                    for (uint32_t lanes = mask(above); lanes; lanes &= lanes - 1) {
                        const int lane = __builtin_ctz(lanes);
                        list(r, static_cast<int32_t>(j + lane), weight[lane], w[lane]);
                    }
                    const vec low = above ? vec{} : left;
                    const vec t = low > vec{} ? weight * load(length + j) : vec{};
                    w0 += t <= small ? low : vec{};
                    t0 += t <= small ? t : vec{};
                    const ivec middle = (t > small) & (t <= medium);
                    w1 += middle ? low : vec{};
                    t1 += middle ? t : vec{};
                    w2 += t > medium ? low : vec{};
                }
                Rest& x = rest[r * p.heads + h];
                x.w[0] += sum(w0);
                x.w[1] += sum(w1);
                x.w[2] += sum(w2);
                x.t[0] += sum(t0);
                x.t[1] += sum(t1);
                if (first) flow[r * p.heads + h] += sum(signed_sum);
            }
        }
    }

    static float past(float w, vec4 over) { return std::max(0.f, w - 2.f * (over[0] + over[1] + over[2] + over[3])); }

    // what the evaluations of one row and head share
    void aim(int r, int64_t h) {
        const int64_t i = i0 + r;
        for (int c = 0; c < WIDE; ++c) {
            const int32_t d = l.wide[h * WIDE + c];
            wide_channel[c] = std::max(d, 0);
            wide_y[c] = d < 0 ? std::numeric_limits<float>::infinity() : p.y[i * p.d_model + d];
            wide_width[c] = d < 0 ? 0.f : l.width[h * p.d_model + d];
        }
    }

    // exact proximity of one sub-edge with bound w, after aim(r, h)
    float exact(int r, int64_t h, int32_t key, float weight, float w) {
        const int64_t i = i0 + r, kv = h / p.group;
        const float* value = p.v + kv * p.v_head + key * p.v_row;
        if (l.coarse) return screened(i, h, key, value, weight, w);
        float t = weight * l.length[kv * stride + key] * (1.f + 1e-5f);
        if (p.gate) {
            const float* gate = p.gate + (i * p.heads + h) * p.d_v;
            for (int64_t c = 0; c < p.d_v; ++c) gated[c] = value[c] * gate[c];
            value = gated.data();
            t = weight * Layer::norm(value, p.d_v);
        }
        const int bucket = l.order.bucket(i, t * l.common[h]);
        const int32_t n = l.order.end[i * BUCKETS + bucket];
        const int32_t* channel = l.order.channel.data() + i * p.d_model;
        const float* y = l.order.sorted.data() + i * p.d_model;
        const float* w_o = p.w_o + h * p.d_v;
        vec4 over = {};
        int32_t c = 0;
        for (; c + 4 <= n; c += 4) over += overshoot(value, w_o, channel + c, load4(y + c), weight);
        int32_t last[WIDE + 8], m = 0;
        float last_y[WIDE + 8];
        for (; c < n; ++c, ++m) {
            last[m] = channel[c];
            last_y[m] = y[c];
        }
        for (int x = 0; x < WIDE; ++x) {  // the few channels that are wider than `common`, unless the prefix holds them
            last[m] = wide_channel[x];
            last_y[m] = wide_y[x];
            m += t * wide_width[x] > std::fabs(wide_y[x]) && l.order.bucket(i, std::fabs(wide_y[x])) > bucket;
        }
        for (int x = m; x < m + 3; ++x) {  // whole groups of four: a channel of infinite |y| adds nothing
            last[x] = 0;
            last_y[x] = std::numeric_limits<float>::infinity();
        }
        for (int x = 0; x < m; x += 4) over += overshoot(value, w_o, last + x, load4(last_y + x), weight);
        return past(w, over);
    }

    // u of a sub-edge that will be evaluated soon
    void fetch(int64_t h, int32_t key) const {
        if (!l.coarse) return;
        const int8_t* u = l.coarse + (h * stride + key) * p.d_model;
        for (int64_t c = 0; c < p.d_model; c += 64) __builtin_prefetch(u + c);
    }

    // the same where u is known in steps: those channels alone whose part can pass |y_d|
    float screened(int64_t i, int64_t h, int32_t key, const float* value, float weight, float w) {
        const int64_t place = h * stride + key;
        const float a = weight * l.step[place] * (1.f + 1e-5f);
        const int32_t n = l.order.prefix(i, 128.f * a);
        const int32_t* channel = l.order.channel.data() + i * p.d_model;
        const float* y = l.order.sorted.data() + i * p.d_model;
        const int8_t* u = l.coarse + place * p.d_model;
        int32_t* some = passing.data();
        float* some_y = passing_y.data();
        int32_t m = 0;
        for (int32_t c = 0; c < n; c += LANES) {
            const vec of = load(y + c);
            uint32_t lanes = mask((flip(gather(u, channel + c), of) + 1.f) * a > vabs(of));
            if (n - c < LANES) lanes &= (1u << (n - c)) - 1;
            for (; lanes; lanes &= lanes - 1) {
                const int32_t x = c + __builtin_ctz(lanes);
                some[m] = channel[x];
                some_y[m++] = y[x];
            }
        }
        for (int32_t x = m; x < m + 3; ++x) {  // whole groups of four: a channel of infinite |y| adds nothing
            some[x] = 0;
            some_y[x] = std::numeric_limits<float>::infinity();
        }
        const float* w_o = p.w_o + h * p.d_v;
        vec4 over = {};
        for (int32_t x = 0; x < m; x += 4) over += overshoot(value, w_o, some + x, load4(some_y + x), weight);
        return past(w, over);
    }

    // evaluates a sub-edge and takes it out of the open ones
    void evaluate(int r, int64_t h, int32_t key, float weight, float w) {
        const float value = exact(r, h, key, weight, w);
        float& kept = alpha[(h * height + r) * stride + key];
        kept = -std::fabs(kept);
        sum_evaluated[r * p.heads + h] += value;
        pair[r * stride + key] += value - w;
        if (r == at_hand) known[key] += value;
        evaluated[r].push_back({key, static_cast<int32_t>(h), value});
    }

    // Evaluates all heads of the given keys.
    void complete(int r, const std::vector<int32_t>& keys) {
        for (int64_t h = 0; h < p.heads; ++h) {
            const int64_t kv = h / p.group;
            const float* weights = alpha.get() + (h * height + r) * stride;
            const float* g = p.g + ((i0 + r) * p.heads + h) * p.d_v;
            aim(r, h);
            for (const int32_t key : keys) {
                const float weight = weights[key];
                if (!(weight > 0.f)) continue;
                const float w = weight * dot(g, p.v + kv * p.v_head + key * p.v_row, p.d_v);
                if (!(w > 0.f)) continue;
                account(r, h, key, weight, w, -1.f);
                evaluate(r, h, key, weight, w);
            }
        }
        for (const int32_t key : keys) whole[key] = 1;
    }

    // Makes a row the one at hand: sums of its evaluated sub-edges over heads, slopes of its chords.
    void focus(int r) {
        std::fill(known.begin(), known.end(), 0.f);
        std::fill(whole.begin(), whole.end(), 0);
        for (const Evaluated& e : evaluated[r]) known[e.key] += e.value;
        for (int64_t h = 0; h < p.heads; ++h)
            for (int c = 0; c < 2; ++c) slopes[2 * h + c] = slope(r, h, c);
        at_hand = r;
    }
    void all_known() { std::fill(whole.begin(), whole.end(), 1); }

    // what the unevaluated heads of a pair can add to known[key]
    float open(int r, int64_t key) const {
        return whole[key] ? 0.f : std::max(0.f, pair[r * stride + key] - known[key]);
    }

    // Keys whose sum over heads is not known well enough: at a threshold, or within the tolerance where it is well
    // above the floor.
    void unclear(int r, float low, float high, std::vector<int32_t>& keys) const {
        keys.clear();
        const float* row = pair.data() + r * stride;
        // pairs above `from` for sure or not, and not above `to` for sure
        const auto add = [&](float from, float to, float slack) {
            for (int64_t j = 0; j < stride; j += LANES)
                if (any((load(row + j) > splat(from)) & (load(&known[j]) <= splat(to))))
                    for (int64_t key = j; key < j + LANES; ++key)
                        if (row[key] > from && known[key] <= to && open(r, key) > slack * row[key])
                            keys.push_back(static_cast<int32_t>(key));
        };
        add(WELL_ABOVE * p.floor * low, std::numeric_limits<float>::max(), 2.f * p.tolerance);
        for (int64_t n = 0; n < p.n_thresholds; ++n) add(p.thresholds[n] * low, p.thresholds[n] * high, 0.f);
        std::sort(keys.begin(), keys.end());
        keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    }

    // Puts a sub-edge among the open ones (sign = 1) or takes it out (-1).
    void account(int r, int64_t h, int32_t key, float weight, float w, float sign) {
        Rest& x = rest[r * p.heads + h];
        const float t = weight * l.length[h / p.group * stride + key];
        const int c = t <= class_end[r][0] * inverse(h) ? 0 : t <= class_end[r][1] * inverse(h) ? 1 : 2;
        x.w[c] = std::max(0.f, x.w[c] + sign * w);
        if (c < 2) x.t[c] = std::max(0.f, x.t[c] + sign * t);
    }

    // Evaluates the sub-edges of a head whose bound is above cut[r]; row by row, so that the channels a row needs stay
    // in the cache. Those above a smaller one are kept for evaluate_reserve().
    void evaluate_above(int64_t h, int from, int to, const float* cut, const float* reserve_cut, bool first) {
        for (int r = from; r < to; ++r) above[r].clear();
        scan(h, from, to, reserve_cut, first, [&](int r, int32_t key, float weight, float w) {
            (w > cut[r] ? above : reserve)[r].push_back({key, static_cast<int32_t>(h), weight, w});
        });
        for (int r = from; r < to; ++r) {
            aim(r, h);
            const std::vector<Open>& now = above[r];
            for (size_t n = 0; n < now.size(); ++n) {
                if (n + AHEAD < now.size()) fetch(h, now[n + AHEAD].key);
                evaluate(r, h, now[n].key, now[n].weight, now[n].w);
            }
            for (size_t n = reserve[r].size(); n > 0 && reserve[r][n - 1].head == h; --n) {
                const Open& e = reserve[r][n - 1];
                account(r, h, e.key, e.weight, e.w, 1.f);
            }
        }
    }

    void forget_reserve(int r) { reserve[r].clear(); }

    void evaluate_reserve(int r, float cut) {
        int32_t aimed = -1;
        for (Open& e : reserve[r]) {
            if (!(e.w > cut)) continue;
            if (alpha[(e.head * height + r) * stride + e.key] > 0.f) {
                if (e.head != aimed) aim(r, aimed = e.head);
                account(r, e.head, e.key, e.weight, e.w, -1.f);
                evaluate(r, e.head, e.key, e.weight, e.w);
            }
            e.w = 0.f;
        }
    }

    // bounds of a head's sum over keys, for the row at hand
    void head_bounds(int r, int64_t h, float& low, float& high) {
        const Rest& x = rest[r * p.heads + h];
        low = high = sum_evaluated[r * p.heads + h];
        high += x.w[0] + x.w[1] + x.w[2];
        for (int c = 0; c < 2; ++c)
            if (x.w[c] > 0.f) low += std::max(0.f, x.w[c] - 2.f * x.t[c] * slopes[2 * h + c]);
    }

    void row_bounds(int r, float& low, float& high) {
        double a = others[r], b = others[r];
        for (int64_t h = 0; h < p.heads; ++h) {
            float x, y;
            head_bounds(r, h, x, y);
            a += x;
            b += y;
        }
        low = static_cast<float>(a);
        high = static_cast<float>(b);
    }

    // is anything in this row above some threshold for one end of the normaliser's interval and not for the other?
    bool ambiguous(int r, float low, float high) const {
        if (!(high > low)) return false;
        for (int64_t n = 0; n < p.n_thresholds; ++n) {
            const float a = p.thresholds[n] * low, b = p.thresholds[n] * high;
            const auto inside = [a, b](float x) { return x > a && x <= b; };
            for (const Evaluated& e : evaluated[r])
                if (inside(e.value)) return true;
            for (int64_t x = 0; x < p.n_others; ++x)
                if (inside(p.others[x * p.queries + i0 + r])) return true;
            const float* row = pair.data() + r * stride;
            for (int64_t j = 0; j < stride; j += LANES)
                if (any((load(row + j) > splat(a)) & (load(&known[j]) <= splat(b)))) return true;
        }
        return false;
    }

    int64_t begin(int row) const {
        if (p.alpha.window <= 0 || !p.alpha.causal()) return 0;
        // whole segments: sums in the same order whatever rows are beside
        return std::max<int64_t>(0, p.alpha.position(i0 + row) + 1 - p.alpha.window) / SEGMENT * SEGMENT;
    }
    int64_t reach(int to) const { return p.alpha.causal() ? p.alpha.position(i0 + to - 1) + 1 : p.keys; }

    const Layer& l;
    const Certified& p;
    const int64_t stride;
    int64_t i0 = 0, visible = 0;
    int rows = 0;
    const int height;         // rows at most
    Pool::Buffer alpha;       // [head, height, stride]; negative: evaluated
    std::vector<float> pair;  // [height, stride]: sums over heads of proximities where known, else of bounds
    std::vector<Rest> rest;   // [height, head]
    std::vector<float> sum_evaluated, flow;  // [height, head]
    std::vector<float> share;                // [head, height, stride]: signed flow
    std::vector<Evaluated> evaluated[ROWS];
    int at_hand = -1;           // row that focus() was called for
    std::vector<float> slopes;  // [head, 2], of the row at hand
    std::vector<float> known;   // [stride], of the row at hand: sums over heads of the evaluated sub-edges
    std::vector<char> whole;    // [stride], of the row at hand: all heads of this key are evaluated
    float others[ROWS];
    std::vector<int32_t> keys;  // scratch of refine()

  private:
    static bool any(ivec x) { return mask(x) != 0; }

    // max(0, w_d - |y_d|) of four channels
    vec4 overshoot(const float* value, const float* w_o, const int32_t* channel, vec4 y, float weight) const {
        const vec4 z = weight * dots(value, w_o + channel[0] * p.w_row, w_o + channel[1] * p.w_row,
                                     w_o + channel[2] * p.w_row, w_o + channel[3] * p.w_row, p.d_v);
        const auto bits = reinterpret_cast<ivec4>(y);
        const vec4 w = reinterpret_cast<vec4>(reinterpret_cast<ivec4>(z) ^ (bits & INT32_MIN));
        const vec4 excess = w - reinterpret_cast<vec4>(bits & INT32_MAX);
        return excess > vec4{} ? excess : vec4{};
    }

    float inverse(int64_t h) const { return l.widest[h] > 0.f ? 1.f / l.widest[h] : std::numeric_limits<float>::max(); }

    // Classes of alpha |v|, in units of 1 / widest[h]: up to the few smallest channels of y, and up to some more.
    void classes(int r) {
        const int64_t i = i0 + r, d = p.d_model;
        const float* y = l.order.sorted.data() + i * d;
        class_end[r][0] = p.gate ? 0.f : std::fabs(y[std::min<int64_t>(d - 1, d / 96)]);
        class_end[r][1] = p.gate ? 0.f : std::fabs(y[std::min<int64_t>(d - 1, d / 16)]);
        class_end[r][1] = std::max(class_end[r][1], class_end[r][0]);
    }

    // F(t) / t at the end t of class c: the slope of its chord from 0
    float slope(int r, int64_t h, int c) const {
        const float t = class_end[r][c] * inverse(h) * (1.f + 1e-5f);
        if (!(t > 0.f)) return std::numeric_limits<float>::max();
        const int64_t i = i0 + r;
        const int32_t n = l.order.prefix(i, t * l.widest[h]);
        const int32_t* channel = l.order.channel.data() + i * p.d_model;
        const float* y = l.order.sorted.data() + i * p.d_model;
        float total = 0.f;
        for (int32_t x = 0; x < n; ++x)
            total += std::max(0.f, t * l.width[h * p.d_model + channel[x]] - std::fabs(y[x]));
        return total / t;
    }

    struct Open {
        int32_t key, head;
        float weight, w;
    };
    float class_end[ROWS][2];
    std::vector<Open> above[ROWS], reserve[ROWS];
    std::vector<float> gated, passing_y;
    std::vector<int32_t> passing;
    int32_t wide_channel[WIDE];
    float wide_y[WIDE], wide_width[WIDE];
};

// Calls work(row block, first row, slot) for all row blocks, a RowBlock per thread; blocks with most keys first.
template <class Work>
void for_row_blocks(const Layer& layer, int threads, Work&& work) {
    const int64_t blocks = layer.blocks();
    Failure failure;
#pragma omp parallel num_threads(threads)
    {
        std::optional<RowBlock> x;
        failure.guard([&] { x.emplace(layer); });
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = blocks - 1; b >= 0; --b) failure.guard([&] { work(*x, b * layer.height, b); });
    }
    failure.rethrow();
}

inline void join(const std::vector<std::vector<Edge>>& listed, std::vector<Edge>& edges) {
    size_t total = 0;
    for (const auto& f : listed) total += f.size();
    edges.reserve(total);
    for (const auto& f : listed) edges.insert(edges.end(), f.begin(), f.end());
}

}  // namespace
}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
