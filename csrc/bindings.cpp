// This file and bindings_cuda.h alone know pybind11. Arguments arrive checked (flowroutes_fast/ops.py); pointers arrive as integers.
#include "proximity.h"
#ifdef FLOWROUTES_CUDA
#include "bindings_cuda.h"
#endif

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;
using namespace flowroutes;

namespace {

const Kernels& kernels(const std::string& isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (isa == "avx512" ? avx512 : (isa == "auto" && avx512)) return kernels_avx512();
    if (isa == "avx2" ? avx2 : (isa == "auto" && avx2)) return kernels_avx2();
#endif
    if (isa == "auto" || isa == "baseline") return kernels_baseline();
    throw std::invalid_argument("instruction set " + isa + " is not available on this processor");
}

template <class T = const float*>
T pointer(const py::dict& d, const char* name) {
    return d.contains(name) ? reinterpret_cast<T>(d[name].cast<uintptr_t>()) : nullptr;
}
template <class T = int64_t>
T number(const py::dict& d, const char* name, T otherwise = 0) {
    return d.contains(name) ? d[name].cast<T>() : otherwise;
}

Alpha weights(const py::dict& d) {
    Alpha a;
    a.pattern = pointer(d, "pattern");
    a.pattern_head = number(d, "pattern_head");
    a.pattern_query = number(d, "pattern_query");
    a.q = pointer(d, "q");
    a.q_head = number(d, "q_head");
    a.q_row = number(d, "q_row");
    a.k = pointer(d, "k");
    a.k_head = number(d, "k_head");
    a.k_row = number(d, "k_row");
    a.d_qk = number(d, "d_qk");
    a.scale = number<float>(d, "scale", 1.f);
    a.softcap = number<float>(d, "softcap");
    a.mask = pointer(d, "mask");
    a.mask_head = number(d, "mask_head");
    a.mask_query = number(d, "mask_query");
    a.window = number(d, "window");
    a.offset = number(d, "offset");
    a.sinks = pointer(d, "sinks");
    return a;
}

// what every problem over one layer shares
template <class P>
void layer(const py::dict& d, P& p) {
    p.alpha = weights(d);
    p.queries = number(d, "queries");
    p.keys = number(d, "keys");
    p.heads = number(d, "heads");
    p.group = number(d, "group", int64_t(1));
    p.d_v = number(d, "d_v");
    p.d_model = number(d, "d_model");
    p.v = pointer(d, "v");
    p.v_head = number(d, "v_head");
    p.v_row = number(d, "v_row");
    p.g = pointer(d, "g");
    p.w_o = pointer(d, "w_o");
    p.w_row = number(d, "w_row");
    p.y = pointer(d, "y");
    p.threads = number<int>(d, "threads");
}

AttentionProximity problem(const py::dict& d) {
    AttentionProximity p;
    layer(d, p);
    p.dense = pointer<float*>(d, "dense");
    p.by_head = pointer<float*>(d, "by_head");
    p.base = pointer(d, "base");
    p.normalise = number<bool>(d, "normalise", true);
    p.normaliser = pointer<float*>(d, "normaliser");
    p.floor = number<float>(d, "floor", -1.f);
    return p;
}

Certified certified_problem(const py::dict& d) {
    Certified p;
    layer(d, p);
    p.row_scale = pointer(d, "row_scale");
    p.gate = pointer(d, "gate");
    p.others = pointer(d, "others");
    p.n_others = number(d, "n_others");
    p.whole_norm = pointer(d, "whole_norm");
    p.thresholds = pointer(d, "thresholds");
    p.n_thresholds = number(d, "n_thresholds");
    p.floor = number<float>(d, "floor", p.floor);
    p.cut = number<float>(d, "cut", p.cut);
    p.tolerance = number<float>(d, "tolerance", p.tolerance);
    p.tolerances = pointer(d, "tolerances");
    p.capacity = number(d, "capacity");
    p.low = pointer<float*>(d, "low");
    p.high = pointer<float*>(d, "high");
    p.head_low = pointer<float*>(d, "head_low");
    p.head_high = pointer<float*>(d, "head_high");
    return p;
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
    m.def("isa", [](const std::string& asked) { return kernels(asked).isa; }, py::arg("isa") = "auto");
    m.def(
        "attention_proximity",
        [](const py::dict& arguments, const std::string& isa) {
            const AttentionProximity p = problem(arguments);
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            {
                py::gil_scoped_release release;
                k.attention(p, edges);
            }
            return table(edges);
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "certified",
        [](const py::dict& arguments, const std::string& isa) {
            const Certified p = certified_problem(arguments);
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            Counts counts;
            {
                py::gil_scoped_release release;
                k.certified(p, edges, counts);
            }
            const py::tuple found = table(edges);
            return py::make_tuple(found[0], found[1], py::make_tuple(counts.bounded, counts.evaluated, counts.refined, counts.exhausted));
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "bound",
        [](const py::dict& arguments, const std::string& isa) {
            Bound b;
            b.layer = certified_problem(arguments);
            b.cut = pointer(arguments, "cuts");
            b.pair_cut = pointer(arguments, "pair_cuts");
            b.upper = pointer<float*>(arguments, "upper");
            b.flow = pointer<float*>(arguments, "flow");
            const Kernels& k = kernels(isa);
            std::vector<Edge> edges;
            {
                py::gil_scoped_release release;
                k.bound(b, edges);
            }
            return table(edges);
        },
        py::arg("arguments"), py::arg("isa") = "auto");
    m.def(
        "pairs",
        [](const py::dict& arguments, uintptr_t index, uintptr_t value, int64_t n, const std::string& isa) {
            const Certified p = certified_problem(arguments);
            const Kernels& k = kernels(isa);
            const auto* at = reinterpret_cast<const int32_t*>(index);
            py::gil_scoped_release release;
            k.pairs(p, at, at + n, at + 2 * n, reinterpret_cast<float*>(value), n);
        },
        py::arg("arguments"), py::arg("index"), py::arg("value"), py::arg("n"), py::arg("isa") = "auto");
    m.def(
        "rank1_proximity",
        [](uintptr_t activation, uintptr_t w, uintptr_t whole, uintptr_t near, int64_t rows, int64_t parts, int64_t d_model, int threads,
           const std::string& isa) {
            const Kernels& k = kernels(isa);
            py::gil_scoped_release release;
            k.rank1(reinterpret_cast<const float*>(activation), reinterpret_cast<const float*>(w), reinterpret_cast<const float*>(whole),
                    reinterpret_cast<float*>(near), rows, parts, d_model, threads);
        },
        py::arg("activation"), py::arg("w"), py::arg("whole"), py::arg("near"), py::arg("rows"), py::arg("parts"), py::arg("d_model"),
        py::arg("threads") = 0, py::arg("isa") = "auto");
    m.def(
        "component_proximity",
        [](uintptr_t output, int64_t stride, int64_t count, uintptr_t whole, uintptr_t out, int64_t rows, int64_t d_model, int threads,
           const std::string& isa) {
            const Kernels& k = kernels(isa);
            py::gil_scoped_release release;
            k.components(reinterpret_cast<const float*>(output), stride, count, reinterpret_cast<const float*>(whole),
                         reinterpret_cast<float*>(out), rows, d_model, threads);
        },
        py::arg("output"), py::arg("stride"), py::arg("count"), py::arg("whole"), py::arg("out"), py::arg("rows"), py::arg("d_model"),
        py::arg("threads") = 0, py::arg("isa") = "auto");
    m.def(
        "part_proximity",
        [](uintptr_t part, uintptr_t whole, uintptr_t out, int64_t rows, int64_t part_rows, int64_t d_model, int threads, const std::string& isa) {
            const Kernels& k = kernels(isa);
            py::gil_scoped_release release;
            k.parts(reinterpret_cast<const float*>(part), reinterpret_cast<const float*>(whole), reinterpret_cast<float*>(out), rows, part_rows,
                    d_model, threads);
        },
        py::arg("part"), py::arg("whole"), py::arg("out"), py::arg("rows"), py::arg("part_rows"), py::arg("d_model"), py::arg("threads") = 0,
        py::arg("isa") = "auto");
}
