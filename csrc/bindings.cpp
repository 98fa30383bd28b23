// This file, bindings_fields.h and bindings_cuda.h alone know pybind11. Tensors arrive checked
// (flowroutes_fast/ops/native.py), as integers.
#include "bindings_fields.h"
#include "few_rows.h"
#include "kernels.h"
#ifdef FLOWROUTES_CUDA
#include "bindings_cuda.h"
#endif

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>

namespace py = pybind11;
using namespace flowroutes;

namespace {

// those that this processor runs, the fastest first
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found;
#if defined(FLOWROUTES_AVX2) || defined(FLOWROUTES_AVX512)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef FLOWROUTES_AVX512
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found.push_back(&kernels_avx512());
#endif
#ifdef FLOWROUTES_AVX2
    if (avx2) found.push_back(&kernels_avx2());
#endif
    found.push_back(&kernels_baseline());
    return found;
}

const Kernels& kernels(const std::string& isa) {
    static const std::vector<const Kernels*> found = available();
    for (const Kernels* k : found)
        if (isa == "auto" || isa == k->isa) return *k;
    throw std::invalid_argument("instruction set '" + isa + "' is not available on this processor");
}

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// Runs the work, with MemoryError where it has none.
template <class Work>
void locked(Work&& work) {
    try {
        work();
    } catch (const std::bad_alloc&) {
        PyErr_SetString(PyExc_MemoryError,
                        "the native kernel cannot allocate its memory: trace fewer tokens at a time, or free some");
        throw py::error_already_set();
    }
}

// The same without the interpreter's lock.
template <class Work>
void unlocked(Work&& work) {
    locked([&] {
        py::gil_scoped_release release;
        work();
    });
}

void weights(Fields& f, Alpha& a) {
    f.optional("pattern", a.pattern)
        .optional("pattern_head", a.pattern_head)
        .optional("pattern_query", a.pattern_query);
    f.optional("q", a.q).optional("q_head", a.q_head).optional("q_row", a.q_row);
    f.optional("k", a.k).optional("k_head", a.k_head).optional("k_row", a.k_row);
    f.optional("d_qk", a.d_qk).optional("scale", a.scale).optional("softcap", a.softcap);
    f.optional("mask", a.mask).optional("mask_head", a.mask_head).optional("mask_query", a.mask_query);
    f.optional("window", a.window)
        .optional("offset", a.offset)
        .optional("sinks", a.sinks)
        .optional("positions", a.positions);
    require(a.pattern || (a.q && a.k && a.d_qk > 0), "either 'pattern' or 'q', 'k' and 'd_qk' must be given");
}

// what every problem over one layer shares
template <class P>
void layer(Fields& f, P& p, bool with_g = true) {
    weights(f, p.alpha);
    if (with_g) f("g", p.g);
    f("queries", p.queries)("keys", p.keys)("heads", p.heads)("group", p.group)("d_v", p.d_v)("d_model", p.d_model);
    f("v", p.v)("v_head", p.v_head)("v_row", p.v_row)("w_o", p.w_o)("w_row", p.w_row)("y", p.y);
    f.optional("threads", p.threads);
    require(p.queries >= 0 && p.keys > 0 && p.heads > 0 && p.d_v > 0 && p.d_model > 0,
            "keys, heads, d_v and d_model must be positive");
    require(p.group > 0 && p.heads % p.group == 0, "'group' must divide 'heads'");
    require(p.queries <= INT32_MAX && p.keys <= INT32_MAX && p.d_model <= INT32_MAX,
            "queries, keys and d_model must fit 32 bits");
    require(p.v && (p.g || !with_g) && p.w_o && p.y, "'v', 'g', 'w_o' and 'y' must not be null");
    require(!p.alpha.causal() || p.alpha.positions || p.alpha.offset >= 0,
            "causal attention needs a key for every query");
    for (int64_t i = 0; p.alpha.positions && i < p.queries; ++i)
        require(p.alpha.positions[i] > (i ? p.alpha.positions[i - 1] : -1) && p.alpha.positions[i] < p.keys,
                "'positions' must rise and be among the keys");
}

void certified_layer(Fields& f, Certified& p, bool with_g = true) {
    layer(f, p, with_g);
    f.optional("row_scale", p.row_scale).optional("gate", p.gate);
}

// (index [3, n]: query, key, head; value [n])
py::tuple table(const std::vector<Edge>& edges) {
    const auto n = static_cast<py::ssize_t>(edges.size());
    py::array_t<int32_t> index({py::ssize_t(3), n});
    py::array_t<float> value(n);
    int32_t* at = index.mutable_data();
    float* v = value.mutable_data();
    for (py::ssize_t i = 0; i < n; ++i) {
        at[i] = edges[i].query;
        at[n + i] = edges[i].key;
        at[2 * n + i] = edges[i].head;
        v[i] = edges[i].value;
    }
    return py::make_tuple(index, value);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of flowroutes_fast.";
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
#ifdef FLOWROUTES_CUDA
    m.attr("cuda") = true;
    cuda::bind(m);
#else
    m.attr("cuda") = false;
#endif
    for (const Kernels* k : available())
        if (const char* wrong = k->arithmetic())
            throw std::runtime_error(std::string("compiled with options that change arithmetic (") + k->isa + ": " +
                                     wrong +
                                     "): take -ffast-math, -fassociative-math and the like out of CFLAGS and CXXFLAGS");
    m.def("isa", [](const std::string& asked) { return kernels(asked).isa; }, py::arg("isa") = "auto");
    m.def("instruction_sets", [] {
        py::list names;
        for (const Kernels* k : available()) names.append(k->isa);
        return names;
    });
    m.def(
        "dense",
        [](const py::dict& arguments, const std::string& isa) {
            Dense p;
            static Names names;
            Fields f(arguments, names);
            layer(f, p);
            f("by_head", p.by_head)("normaliser", p.normaliser)("normalise", p.normalise)("floor", p.floor);
            f.optional("dense", p.dense).optional("base", p.base).done();
            require(p.queries == 0 || (p.by_head && p.normaliser), "'by_head' and 'normaliser' must not be null");
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            unlocked([&] { k.dense(p, edges); });
            return table(edges);
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "certified",
        [](const py::dict& arguments, const std::string& isa) {
            Certified p;
            static Names names;
            Fields f(arguments, names);
            certified_layer(f, p);
            f("others", p.others)("n_others", p.n_others)("thresholds", p.thresholds)("n_thresholds", p.n_thresholds);
            f("floor", p.floor)("cut", p.cut)("capacity", p.capacity)("low", p.low)("high", p.high)(
                "head_low", p.head_low)("head_high", p.head_high);
            f.optional("tolerance", p.tolerance)
                .optional("tolerances", p.tolerances)
                .optional("whole_norm", p.whole_norm)
                .done();
            require(p.queries == 0 || (p.low && p.high && p.head_low && p.head_high), "the outputs must not be null");
            require(p.n_others == 0 || p.queries == 0 || p.others, "'others' must not be null");
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            Counts counts;
            unlocked([&] { k.certified(p, edges, counts); });
            const py::tuple found = table(edges);
            return py::make_tuple(found[0], found[1],
                                  py::make_tuple(counts.bounded, counts.evaluated, counts.refined, counts.exhausted));
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "few_rows",
        [](const py::dict& arguments, const std::string& isa) {
            FewRows p;
            static Names names;
            Fields f(arguments, names);
            certified_layer(f, p.layer, false);
            int64_t stored = 0;
            f("thresholds", p.layer.thresholds)("n_thresholds", p.layer.n_thresholds)("floor", p.layer.floor)(
                "cut", p.layer.cut);
            f("capacity", p.layer.capacity)("tolerance", p.layer.tolerance)("at", p.at)("stored", stored)("table",
                                                                                                          p.table);
            f("residual", p.residual)("residual_row", p.residual_row)("ffn", p.ffn)("ffn_row", p.ffn_row);
            f("parallel", p.parallel)("exact", p.exact);
            f.optional("through", p.through)
                .optional("through_row", p.through_row)
                .optional("post", p.post)
                .optional("constant", p.constant);
            f.optional("probe", p.layer.probe).optional("answer", p.layer.answer).done();
            require(!p.layer.probe || p.layer.answer, "a probe needs an 'answer'");
            require(p.layer.alpha.q && p.layer.alpha.positions, "few rows need queries, keys and 'positions'");
            require(p.layer.queries == 0 || (p.at && p.residual && p.ffn && p.table), "no tensor may be null");
            for (int64_t i = 0; i < p.layer.queries; ++i)
                require(p.at[i] >= 0 && p.at[i] < stored, "'at' must name rows of the stored states");
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            Counts counts;
            unlocked([&] { few_rows(k, p, edges, counts); });
            const py::tuple found = table(edges);
            return py::make_tuple(found[0], found[1],
                                  py::make_tuple(counts.bounded, counts.evaluated, counts.refined, counts.exhausted));
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "bound",
        [](const py::dict& arguments, const std::string& isa) {
            Bound b;
            static Names names;
            Fields f(arguments, names);
            certified_layer(f, b.layer);
            f("upper", b.upper)("flow", b.flow).optional("cuts", b.cut).optional("pair_cuts", b.pair_cut).done();
            require(b.layer.queries == 0 || (b.upper && b.flow), "'upper' and 'flow' must not be null");
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            unlocked([&] { k.bound(b, edges); });
            return table(edges);
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "pairs",
        [](const py::dict& arguments, const std::string& isa) {
            Certified p;
            static Names names;
            Fields f(arguments, names);
            certified_layer(f, p);
            const int32_t* at = nullptr;
            float* value = nullptr;
            int64_t n = 0;
            f("index", at)("value", value)("n", n).done();
            require(n >= 0 && (n == 0 || (at && value)), "'index' and 'value' must not be null");
            const int64_t limits[] = {p.queries, p.keys, p.heads};
            for (int row = 0; row < 3; ++row)
                for (int64_t e = 0; e < n; ++e)
                    if (at[row * n + e] < 0 || at[row * n + e] >= limits[row])
                        throw py::index_error("index[" + std::to_string(row) + "] holds " +
                                              std::to_string(at[row * n + e]) + ", outside 0 to " +
                                              std::to_string(limits[row] - 1));
            const Kernels& k = kernels(isa);
            unlocked([&] { k.pairs(p, at, at + n, at + 2 * n, value, n); });
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "rank1",
        [](const py::dict& arguments, const std::string& isa) {
            const float *activation = nullptr, *w = nullptr, *whole = nullptr;
            float* proximities = nullptr;
            int64_t rows = 0, parts = 0, d_model = 0;
            int threads = 0;
            static Names names;
            Fields f(arguments, names);
            f("activation", activation)("w", w)("whole", whole)("proximities", proximities)("rows", rows)(
                "parts", parts)("d_model", d_model);
            f.optional("threads", threads).done();
            require(rows >= 0 && parts >= 0 && d_model > 0 && d_model <= INT32_MAX, "d_model must be positive");
            require(rows == 0 || parts == 0 || (activation && w && whole && proximities), "no tensor may be null");
            const Kernels& k = kernels(isa);
            unlocked([&] { k.rank1(activation, w, whole, proximities, rows, parts, d_model, threads); });
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "components",
        [](const py::dict& arguments, const std::string& isa) {
            const float *output = nullptr, *whole = nullptr;
            float* out = nullptr;
            int64_t stride = 0, count = 0, rows = 0, d_model = 0;
            int threads = 0;
            static Names names;
            Fields f(arguments, names);
            f("output", output)("stride", stride)("count", count)("whole", whole)("out", out)("rows", rows)("d_model",
                                                                                                            d_model);
            f.optional("threads", threads).done();
            require(rows >= 0 && count >= 0 && d_model > 0, "d_model must be positive");
            require(rows == 0 || count == 0 || (output && whole && out), "no tensor may be null");
            const Kernels& k = kernels(isa);
            unlocked([&] { k.components(output, stride, count, whole, out, rows, d_model, threads); });
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "parts",
        [](const py::dict& arguments, const std::string& isa) {
            const float *part = nullptr, *whole = nullptr;
            float* out = nullptr;
            int64_t rows = 0, part_rows = 0, d_model = 0;
            int threads = 0;
            static Names names;
            Fields f(arguments, names);
            f("part", part)("whole", whole)("out", out)("rows", rows)("part_rows", part_rows)("d_model", d_model);
            f.optional("threads", threads).done();
            require(rows >= 0 && d_model > 0 && (rows == 0 || part_rows > 0), "d_model and part_rows must be positive");
            require(rows == 0 || (part && whole && out), "no tensor may be null");
            const Kernels& k = kernels(isa);
            unlocked([&] { k.parts(part, whole, out, rows, part_rows, d_model, threads); });
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "conservation",
        [](const py::dict& arguments, const std::string& isa) {
            Conservation p;
            static Names names;
            Fields f(arguments, names);
            weights(f, p.alpha);
            f("tokens", p.tokens)("heads", p.heads)("group", p.group)("d_v", p.d_v)("d_model", p.d_model)("kv_head",
                                                                                                          p.kv_head);
            f("v", p.v)("v_head", p.v_head)("v_row", p.v_row)("mixed", p.mixed)("mixed_row", p.mixed_row)("w_o", p.w_o)(
                "w_row", p.w_row);
            f("residual", p.residual)("ffn_out", p.ffn_out)("resid_post", p.resid_post)
                .optional("resid_mid", p.resid_mid);
            f.optional("through", p.through)
                .optional("mixer_out", p.mixer_out)
                .optional("gate", p.gate)
                .optional("in_scale", p.in_scale);
            f.optional("row_scale", p.row_scale).optional("out_scale", p.out_scale).optional("bias", p.bias);
            f.optional("bias_is_scaled", p.bias_is_scaled)
                .optional("w_is_sampled", p.w_is_sampled)("scale_out", p.scale)("smallest", p.smallest);
            f("rows", p.rows)("channels", p.channels)("n_rows", p.n_rows)("n_channels", p.n_channels).done();
            require(p.tokens > 0 && p.heads > 0 && p.d_v > 0 && p.d_model > 0,
                    "tokens, heads, d_v and d_model must be positive");
            require(p.group > 0 && p.heads % p.group == 0, "'group' must divide 'heads'");
            require(p.kv_head >= 0 && p.kv_head < p.heads / p.group, "there is no such 'kv_head'");
            require(p.alpha.q && p.alpha.offset == 0, "attention must be of queries and keys over the same tokens");
            require(p.v && p.mixed && p.w_o && p.residual && p.ffn_out && p.resid_post && p.rows && p.channels,
                    "no tensor may be null");
            require(p.n_rows > 0 && p.n_channels > 0, "there must be rows and channels");
            for (int64_t n = 0; n < p.n_rows; ++n)
                require(p.rows[n] >= 0 && p.rows[n] < p.tokens, "'rows' holds one that there is not");
            for (int64_t n = 0; n < p.n_channels; ++n)
                require(p.channels[n] >= 0 && p.channels[n] < p.d_model, "'channels' holds one that there is not");
            const Kernels& k = kernels(isa);
            float errors[3];
            const auto work = [&] { k.conservation(p, errors); };
            p.tokens > 512 ? unlocked(work) : locked(work);  // of short prompts in some ten microseconds
            return py::make_tuple(errors[0], errors[1], errors[2]);
        },
        py::arg("arguments"), py::arg("isa") = "auto");
}
