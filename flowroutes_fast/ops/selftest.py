"""Every native operation on every instruction set of this processor against float64, on small odd shapes: what
``flowroutes doctor`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowroutes_fast import ops
from flowroutes_fast.ops import native, reference
from flowroutes_fast.ops.attention import Attention
from flowroutes_fast.ops.bound import Bounds, bound, candidates
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.ops.neurons import neuron_importances
from flowroutes_fast.ops.pairs import pairs
from flowroutes_fast.system.ambient import in_neutral

TOLERANCE = 1e-5  # of |y|_1

# heads, kv heads, queries, keys, d_qk, d_v, d_model
SHAPES = ((1, 1, 1, 1, 1, 1, 1), (3, 1, 5, 9, 7, 5, 33), (6, 2, 27, 41, 17, 20, 67))


@in_neutral
def self_test() -> dict[str, str | None]:
    """Run it; takes about a second.

    Returns:
        for every ``"operation, instruction set"``, in that order, None or a sentence that says what differs.
    """
    found: dict[str, str | None] = {}
    for isa in native.instruction_sets():
        for name, operation in OPERATIONS.items():
            with native.instruction_set(isa):
                found[f"{name}, {isa}"] = _run(operation)
    return found


def _run(operation: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]) -> str | None:
    worst = 0.0
    try:
        for value, wanted, unit in operation():
            if value.shape != wanted.shape:
                return f"shape {list(value.shape)} instead of {list(wanted.shape)}"
            error = ((value.double() - wanted).abs() / unit).nan_to_num(nan=torch.inf)
            worst = max(worst, float(error.max()) if error.numel() else 0.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (
        f"differs from float64 by {worst:.1e} of the state's norm, more than {TOLERANCE:.0e}"
        if worst > TOLERANCE
        else None
    )


def _layer(shape: tuple[int, ...], **options: Any) -> Attention:
    """A random layer; sinks, gate and row_scale where they are True."""
    heads, kv, queries, keys, d_qk, d_v, d_model = shape
    g = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float32, device="cpu")

    query, key, value, w_o = (
        2 * normal(heads, queries, d_qk),
        normal(kv, keys, d_qk),
        normal(kv, keys, d_v),
        normal(heads, d_v, d_model),
    )
    whole = normal(queries, d_model) * 2
    whole[:, ::5] *= 0.01
    whole[:, 1::7] = -0.0
    extra = {
        "sinks": normal(heads),
        "gate": normal(queries, heads, d_v).sigmoid(),
        "row_scale": normal(queries).abs() + 0.1,
    }
    chosen: dict[str, Any] = {name: extra[name] if value is True else value for name, value in options.items()}
    return Attention(query, key, value, w_o, whole, d_qk**-0.5, **chosen)


def _layers() -> Iterator[tuple[Attention, Attention, Tensor]]:
    """Layers, the same in float64, and what errors are measured in ``[query]``."""
    for shape in SHAPES:
        variants: tuple[dict[str, Any], ...] = (
            {},
            {"window": 4, "softcap": 3.0, "sinks": True},
            {"gate": True, "row_scale": True},
        )
        for options in variants:
            layer = _layer(shape, **options)
            names = ("query", "key", "value", "w_o", "whole", "sinks", "row_scale", "gate")
            tensors = {name: getattr(layer, name) for name in names}
            doubles: dict[str, Any] = {name: None if t is None else t.double() for name, t in tensors.items()}
            exact = replace(layer, **doubles)
            flow = _flow(exact).abs().sum((0, 2))
            yield layer, exact, torch.maximum(exact.whole.abs().sum(-1), flow) + 1e-30


def _flow(a: Attention) -> Tensor:
    return reference.sign_flow(a.pattern, a.value, a.w_o, a.whole, row_scale=a.row_scale, gate=a.gate)


def _proximities(a: Attention) -> Tensor:
    return reference.attention_proximity(a.pattern, a.value, a.w_o, a.whole, row_scale=a.row_scale, gate=a.gate)


def _dense() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for layer, exact, unit in _layers():
        if layer.gate is not None:
            continue
        wanted = _proximities(exact)
        yield (
            torch.ops.flowroutes.attention_proximity(exact.pattern.float(), layer.value, layer.w_o, layer.whole, "cpu"),
            wanted,
            unit[:, None],
        )
        base = torch.ones(layer.n_query, dtype=torch.float32, device="cpu")
        options = (layer.scaling, layer.softcap, layer.window, True, 0.0, "cpu")
        a = layer
        dense, by_head, norm, index, value = torch.ops.flowroutes.attention_layer(
            a.query, a.key, a.value, a.w_o, a.whole, base, None, a.sinks, *options
        )
        total = wanted.sum((0, 2)) + 1
        yield dense * norm[:, None], wanted, unit[:, None]
        yield by_head * norm[:, None], wanted.sum(-1).T, unit[:, None]
        yield norm, total, unit
        listed = torch.zeros_like(dense)
        listed[index[2].long(), index[0].long(), index[1].long()] = value
        yield listed, dense.double(), torch.ones_like(dense)


def _certified() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for layer, exact, unit in _layers():
        proximities, others = _proximities(exact), torch.ones(1, layer.n_query, dtype=torch.float32, device="cpu")
        total = proximities.sum((0, 2)) + 1
        every = certified(layer, others, floor=1e-3, tolerance=0.0)
        yield every.low, total, unit
        yield every.high, total, unit
        yield every.head_low, proximities.sum(-1).T, unit[:, None]
        found = certified(layer, others, floor=1e-3, tolerance=0.05)
        yield torch.minimum(found.low.double(), total), found.low.double(), unit  # the interval holds it
        yield torch.maximum(found.high.double(), total), found.high.double(), unit
        query, key, head = found.index[:, found.index[2] >= 0].long()
        yield found.value[found.index[2] >= 0], proximities[head, query, key], unit[query]
        signed = certified(layer, others, floor=0.0, measure="signed")
        norm = exact.whole.abs().sum(-1)
        scale = torch.where(norm > 0, norm, 1)
        yield (
            signed.head_low * norm[:, None],
            torch.where(norm > 0, _flow(exact).sum(-1), 0).T * (norm / scale)[:, None],
            unit[:, None],
        )


def _few_rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every other row of layers with an FFN after attention, and of parallel blocks."""
    for layer, exact, unit in _layers():
        if layer.gate is not None:
            continue
        at = torch.arange(0, layer.n_query, 2, device="cpu")
        residual, ffn = exact.whole * 0.5, exact.whole.flip(-1)
        proximities = _proximities(exact)
        for parallel in (False, True):
            post = exact.whole if parallel else exact.whole + ffn
            table, dense = _rows_of(layer, at, (residual, ffn, post), parallel)
            parts = [reference.proximity(residual, exact.whole), reference.proximity(ffn, post)]
            past = parts[1] if parallel else reference.proximity(exact.whole, post)
            total = proximities.sum((0, 2)) + parts[0] + past * parallel
            below = total if parallel else parts[1] + past
            wanted = torch.stack(
                [total, total, _share(parts[0], total), 0 * total, 0 * total, _share(parts[1], below)], 1
            )
            one = torch.ones_like(unit)
            yield table[:, :6], wanted[at], torch.stack([unit, unit, one, one, one, one], 1)[at]
            if not parallel:
                yield table[:, 6], _share(past, below)[at], one[at]
            heads = _share(proximities.sum(-1), total).T
            yield table[:, 7:], heads.repeat(1, 3)[at], one[at, None]
            yield dense, _share(proximities, total[:, None])[:, at], one[at, None]


def _share(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total, 0)


def _rows_of(
    layer: Attention, at: Tensor, states: tuple[Tensor, Tensor, Tensor], parallel: bool
) -> tuple[Tensor, Tensor]:
    """What the operation says of rows ``at``: its table and its list of sub-edges, dense ``[head, row, key]``."""
    (heads, queries, d_qk), (kv, keys, d_v) = layer.query.shape, layer.value.shape
    d_model, n = layer.whole.shape[1], len(at)
    whole = native.contiguous(layer.whole[at])
    flat = native.contiguous(layer.w_o.permute(2, 0, 1).reshape(d_model, -1))
    a = native.Arguments(
        queries=n,
        stored=queries,
        keys=keys,
        heads=heads,
        group=heads // kv,
        d_v=d_v,
        d_model=d_model,
        d_qk=d_qk,
        w_row=heads * d_v,
        scale=layer.scaling,
        softcap=layer.softcap,
        window=layer.window,
        floor=1e-6,
        cut=1e-6,
        capacity=keys * heads,
        tolerance=0.0,
        n_thresholds=0,
        thresholds=0,
        threads=1,
        parallel=parallel,
        exact=True,
    )
    residual, ffn, post = (state.float() for state in states)
    a.take_rows("query", native.contiguous(layer.query), (heads, queries, d_qk), ("q_head", "q_row"), where="q")
    a.take_rows("key", layer.key, (kv, keys, d_qk), ("k_head", "k_row"), where="k")
    a.take_rows("value", layer.value, (kv, keys, d_v), ("v_head", "v_row"), where="v")
    a.take_rows("residual", residual, (queries, d_model), ("residual_row",))
    a.take_rows("ffn", ffn, (queries, d_model), ("ffn_row",))
    a.take("w_o", flat, d_model, heads * d_v)
    a.take("sinks", layer.sinks, heads)
    a.take("whole", whole, n, d_model, where="y")
    a.take("positions", at + keys - queries, n, dtype=torch.int64)
    a.take("at", at, n, dtype=torch.int64)
    through = layer.whole if not parallel else None
    if through is not None:
        a.take_rows("through", through, (queries, d_model), ("through_row",))
        a.take("post", native.contiguous(post[at]), n, d_model)
    table = a.make("table", n, 7 + 3 * heads)
    index, value, _ = a.call("few_rows")
    dense = torch.zeros(heads, n, keys, dtype=torch.float32, device="cpu")
    row, key, head = torch.from_numpy(index).long()
    dense[head, row, key] = torch.from_numpy(value)
    return table, dense


def _bound() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for layer, exact, unit in _layers():
        flow = _flow(exact)
        found = bound(layer, "cpu")
        yield found.upper, flow.clamp_min(0).sum(-1).T, unit[:, None]
        yield found.flow, flow.sum(-1).T, unit[:, None]
        nothing = torch.zeros(layer.n_query, dtype=torch.float32, device="cpu")
        listed = candidates(layer, found, nothing, nothing, "cpu")
        dense = torch.zeros_like(flow, dtype=torch.float32)
        query, key, head = listed.index.long()
        dense[head, query, key] = listed.bound
        yield dense, flow.clamp_min(0), unit[:, None]


def _pairs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for layer, exact, unit in _layers():
        proximities = _proximities(exact)
        index = (
            torch.ones_like(proximities[:, :, ::2], dtype=torch.bool).permute(1, 2, 0).nonzero().T.flip(1).contiguous()
        )
        index[1] *= 2
        query, key, head = index
        yield pairs(layer, Bounds(proximities, proximities), index, "cpu"), proximities[head, query, key], unit[query]


def _states(rows: int, width: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * width)
    whole, part = (torch.randn(rows, width, generator=g, dtype=torch.float32, device="cpu") for _ in range(2))
    whole[:, ::5] *= 0.01
    whole[:, 1::7] = -0.0
    return part, whole


def _parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for rows, width in ((1, 1), (5, 33), (27, 67)):
        part, whole = _states(rows, width)
        unit = whole.double().abs().sum(-1) + part.double().abs().sum(-1)
        for some in (part, part[:1]):
            yield (
                torch.ops.flowroutes.part_proximity(some, whole, "cpu"),
                reference.proximity(some.double(), whole.double()),
                unit,
            )


def _components() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for rows, width in ((1, 1), (5, 33), (27, 67)):
        part, whole = _states(rows, width)
        outputs = torch.stack([part, whole, part.flip(0), part + whole], 1)
        for some in (outputs, outputs[:, :3]):
            wanted = reference.proximity(some.double(), whole.double()[:, None])
            unit = some.double().abs().sum((1, 2)) + whole.double().abs().sum(-1)
            yield ops.component_proximity(some, whole, backend="cpu"), wanted, unit[:, None]


def _rank1() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for rows, width in ((1, 1), (5, 33), (27, 67)):
        w_down, whole = _states(rows, width)
        # small: else no part is close, and all that is compared is nothing
        activation = (whole @ w_down.T / (30 * width)).contiguous()
        proximities = reference.proximity(activation.double()[..., None] * w_down.double(), whole.double()[:, None])
        found = neuron_importances(activation, w_down, whole, torch.ones_like(whole[:, 0]), floor=0.0, backend="cpu")
        dense = torch.zeros_like(activation)
        dense[found.index[0].long(), found.index[1].long()] = found.importance * found.low[found.index[0].long()]
        unit = whole.double().abs().sum(-1) + (activation.double()[..., None] * w_down.double()).abs().sum((1, 2))
        yield dense, proximities, unit[:, None]
        yield found.low, proximities.sum(-1) + 1, unit


OPERATIONS = {
    "dense": _dense,
    "certified": _certified,
    "few_rows": _few_rows,
    "bound": _bound,
    "pairs": _pairs,
    "rank1": _rank1,
    "parts": _parts,
    "components": _components,
}
