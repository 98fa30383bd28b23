// Bindings of the CUDA kernels. Arguments arrive checked (flowroutes_fast/ops/cuda.py) in a dict; pointers arrive as
// integers.
#pragma once
#include "bindings_fields.h"
#include "kernels_cuda.h"

namespace flowroutes::cuda {

inline void bind(pybind11::module_& m) {
    using pybind11::dict;
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("cuda_devices", &device_count, release());
    m.def("cuda_pairs", [](const dict& d) {
        PairProximity p;
        static Names names;
        Fields{d, names}("device", p.device)("stream", p.stream)("type", p.type)("pairs", p.pairs)("heads", p.heads)(
            "group", p.group)("d_v", p.d_v)("d_model", p.d_model)("query", p.query)("key", p.key)("order", p.order)(
            "head_start", p.head_start)("tile_start", p.tile_start)("alpha", p.alpha)("v", p.v)("v_head", p.v_head)(
            "v_row", p.v_row)("w_o", p.w_o)("w_head", p.w_head)("w_row", p.w_row)("y", p.y)("y_row", p.y_row)(
            "splits", p.splits)("partial", p.partial)("out", p.out)
            .optional("gate", p.gate)
            .optional("gate_query", p.gate_query)
            .optional("gate_head", p.gate_head)
            .done();
        pybind11::gil_scoped_release unlocked;
        pairs(p);
    });
    m.def("cuda_dense", [](const dict& d) {
        DenseProximity p;
        static Names names;
        Fields{d, names}("device", p.device)("stream", p.stream)("heads", p.heads)("queries", p.queries)(
            "keys", p.keys)("d_model", p.d_model)("alpha", p.alpha)("alpha_head", p.alpha_head)(
            "alpha_query", p.alpha_query)("u", p.u)("u_head", p.u_head)("u_row", p.u_row)("y", p.y)("y_row", p.y_row)(
            "causal", p.causal)("out", p.out)("out_head", p.out_head)("out_query", p.out_query)
            .optional("partial", p.partial)
            .optional("by_head", p.by_head)
            .optional("by_head_query", p.by_head_query)
            .done();
        pybind11::gil_scoped_release unlocked;
        dense(p);
    });
    m.def("cuda_parts", [](const dict& d) {
        PartProximity p;
        static Names names;
        Fields{d, names}("device", p.device)("stream", p.stream)("rows", p.rows)("part_rows", p.part_rows)(
            "d_model", p.d_model)("part", p.part)("whole", p.whole)("out", p.out)
            .done();
        pybind11::gil_scoped_release unlocked;
        parts(p);
    });
}

}  // namespace flowroutes::cuda
