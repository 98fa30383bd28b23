// Every native operation without Python, for the sanitizers: on odd shapes, from two threads at once, and with each allocation failing in turn.
// Build and run: make test-sanitizers.
#include "../csrc/proximity.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
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

struct Case {
    Shape n;
    int threads;
    std::vector<float> q, k, v, g, w, y, mask, gate, base, low, high, head_low, head_high, dense, near, activation;
    std::vector<int32_t> index;
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

    Case(const Shape& shape, int threads) : n(shape), threads(threads) {
        q = numbers(n.heads * n.queries * n.d_qk);
        k = numbers(n.kv * n.keys * n.d_qk);
        v = numbers(n.kv * n.keys * n.d_v);
        g = numbers(n.queries * n.heads * n.d_v);
        w = numbers(n.d_model * n.heads * n.d_v);
        y = numbers(n.queries * n.d_model);
        for (size_t i = 0; i < y.size(); i += 5) y[i] = i % 2 ? -0.f : 1e-41f;
        mask = numbers(n.queries * n.keys);
        gate = numbers(n.queries * n.heads * n.d_v);
        base.assign(n.queries, 1.f);
        low = high = base;
        head_low.assign(n.queries * n.heads, 0.f);
        head_high = head_low;
        dense.assign(n.heads * n.queries * n.keys, 0.f);
        for (int32_t i = 0; i < n.queries; ++i) index.push_back(n.queries - 1 - i);
        for (int32_t i = 0; i < n.queries; ++i) index.push_back(i % n.keys);
        for (int32_t i = 0; i < n.queries; ++i) index.push_back(i % n.heads);
        activation = numbers(n.queries * n.heads);
        near.assign(n.queries * n.heads, 1.f);
    }

    template <class P>
    P layer() const {
        P p;
        p.alpha.q = q.data(), p.alpha.q_head = n.queries * n.d_qk, p.alpha.q_row = n.d_qk;
        p.alpha.k = k.data(), p.alpha.k_head = n.keys * n.d_qk, p.alpha.k_row = n.d_qk;
        p.alpha.d_qk = n.d_qk, p.alpha.window = n.window, p.alpha.offset = n.keys - n.queries;
        if (n.mask) p.alpha.mask = mask.data(), p.alpha.mask_query = n.keys, p.alpha.softcap = 3.f;
        p.queries = n.queries, p.keys = n.keys, p.heads = n.heads, p.group = n.heads / n.kv, p.d_v = n.d_v, p.d_model = n.d_model;
        p.v = v.data(), p.v_head = n.keys * n.d_v, p.v_row = n.d_v, p.g = g.data(), p.w_o = w.data(), p.w_row = n.heads * n.d_v, p.y = y.data();
        p.threads = threads;
        return p;
    }

    void run(const Kernels& kernels, int operation) {
        std::vector<Edge> edges;
        Counts counts;
        auto c = layer<Certified>();
        if (n.gate) c.gate = gate.data(), c.row_scale = base.data();
        c.others = base.data(), c.n_others = 1, c.low = low.data(), c.high = high.data();
        c.head_low = head_low.data(), c.head_high = head_high.data();
        const float threshold = 0.01f;
        c.thresholds = &threshold, c.n_thresholds = 1, c.capacity = 64;
        switch (operation) {
            case 0: {
                auto p = layer<AttentionProximity>();
                p.by_head = head_low.data(), p.normaliser = low.data(), p.dense = dense.data(), p.floor = 0.f, p.base = base.data();
                return kernels.attention(p, edges);
            }
            case 1: return kernels.certified(c, edges, counts);
            case 2: c.whole_norm = base.data(); return kernels.certified(c, edges, counts);
            case 3: {
                Bound b;
                b.layer = c, b.upper = head_low.data(), b.flow = head_high.data(), b.cut = base.data(), b.pair_cut = base.data();
                return kernels.bound(b, edges);
            }
            case 4: return kernels.pairs(c, index.data(), &index[n.queries], &index[2 * n.queries], low.data(), n.queries);
            case 5: return kernels.rank1(activation.data(), w.data(), g.data(), near.data(), n.queries, n.heads, n.d_v, threads);
            case 6: return kernels.parts(y.data(), y.data(), low.data(), n.queries, 1, n.d_model, threads);
            case 7: {
                Conservation p;
                p.alpha.q = q.data(), p.alpha.q_head = n.queries * n.d_qk, p.alpha.q_row = n.d_qk, p.alpha.softcap = n.mask ? 3.f : 0.f;
                p.alpha.k = k.data(), p.alpha.k_head = n.keys * n.d_qk, p.alpha.k_row = n.d_qk;
                p.alpha.d_qk = n.d_qk, p.alpha.window = n.window, p.alpha.sinks = n.mask ? base.data() : nullptr;
                p.tokens = n.queries, p.heads = n.heads, p.group = n.heads / n.kv, p.d_v = n.d_v, p.d_model = n.d_model, p.kv_head = n.kv - 1;
                p.v = v.data(), p.v_head = n.keys * n.d_v, p.v_row = n.d_v, p.mixed = g.data(), p.mixed_row = n.heads * n.d_v;
                p.w_o = w.data(), p.w_row = n.heads * n.d_v, p.residual = p.ffn_out = p.resid_post = y.data();
                if (n.mask && n.queries == n.keys) p.alpha.mask = mask.data(), p.alpha.mask_query = n.keys;
                if (n.mask) p.resid_mid = p.through = p.mixer_out = y.data();
                if (n.gate) p.gate = gate.data(), p.row_scale = base.data(), p.bias = p.out_scale = y.data(), p.in_scale = g.data();
                std::vector<int64_t> rows{0, n.queries / 2, n.queries - 1}, channels{n.d_model - 1, 0};
                p.rows = rows.data(), p.n_rows = 3, p.channels = channels.data(), p.n_channels = 2;
                float errors[3];
                return kernels.conservation(p, errors);
            }
            default: return kernels.components(g.data(), n.heads * n.d_v, n.heads, g.data(), head_low.data(), n.queries, n.d_v, threads);
        }
    }
};
constexpr int OPERATIONS = 9;

const Shape SHAPES[] = {{1, 1, 1, 1, 1, 1, 1, 0, false, false}, {3, 1, 5, 9, 7, 5, 33, 0, true, false}, {6, 2, 61, 83, 17, 20, 67, 9, false, false},
                        {4, 4, 50, 50, 8, 16, 130, 0, true, true}, {2, 1, 25, 25, 3, 3, 9, 0, false, true}};

int main() {
    std::vector<const Kernels*> all{&kernels_baseline()};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&kernels_avx2());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) all.push_back(&kernels_avx512());
#endif
    long runs = 0, failures = 0;
    for (const Kernels* kernels : all)
        for (const Shape& shape : SHAPES)
            for (int operation = 0; operation < OPERATIONS; ++operation) {
#ifdef FAILING_ALLOCATIONS
                for (long allowed = 0;; ++allowed) {
                    Case one(shape, 2);
                    left = allowed;
                    try {
                        one.run(*kernels, operation);
                        left = -1;
                        break;
                    } catch (const std::bad_alloc&) {
                        left = -1;
                        ++failures;
                    }
                    if (allowed > 40) allowed += allowed / 8;
                }
                ++runs;
#else
                Case a(shape, 1), b(shape, 1);  // one thread each: ThreadSanitizer does not know libgomp's barriers
                std::thread other([&] { a.run(*kernels, operation); });
                b.run(*kernels, operation);
                other.join();
                runs += 2;
#endif
            }
    std::printf("%ld runs, %ld failed allocations, %zu instruction sets: nothing found\n", runs, failures, all.size());
}
