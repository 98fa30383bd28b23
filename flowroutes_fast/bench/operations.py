"""The operations that are timed, by the stem of their files: each a call on one layer, with its error to float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowroutes_fast import ops
from flowroutes_fast.bench.layers import Case
from flowroutes_fast.ops import reference
from flowroutes_fast.ops.attention import Attention
from flowroutes_fast.ops.bound import bound
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.ops.pairs import pairs
from flowroutes_fast.ops.rank1 import rank1_proximity

Call = Callable[[], Any]
PAIRS = 65_536  # listed sub-edges, as many as a certified layer of some thousand tokens evaluates
COMPONENTS = 8


def fresh(case: Case) -> Attention:
    """The layer without what an earlier call kept."""
    case.attention.__dict__.pop("gradient", None)
    return case.attention


def certified_call(case: Case, backend: str, measure: str = "proximity") -> Call:
    thresholds = (0.01, 0.03, 0.04) if measure == "proximity" else ()
    return lambda: certified(
        fresh(case), case.others, floor=1e-3, thresholds=thresholds, backend=backend, measure=measure
    )


def _bound(case: Case, backend: str) -> Call:
    return lambda: bound(fresh(case), backend)


def _dense(case: Case, backend: str) -> Call:
    a = case.attention
    given = [t.float() for t in (a.query, a.key, a.value, a.w_o)]

    def run() -> Any:
        return torch.ops.flowroutes.attention_layer(
            *given, a.whole, case.others[0], None, None, a.scaling, 0.0, 0, True, -1.0, backend
        )

    return run


def listed(case: Case, count: int = PAIRS) -> Tensor:
    """Sub-edges of the last rows ``[3, n]``: as many as asked for, spread over keys and heads."""
    a, g = case.attention, torch.Generator().manual_seed(0)
    query = torch.randint(a.n_query // 2, a.n_query, (count,), generator=g)
    key = (torch.rand(count, generator=g) * (query + a.n_key - a.n_query + 1)).long()
    head = torch.randint(0, a.n_head, (count,), generator=g)
    return torch.stack([query, key, head]).to(a.whole.device, torch.int32)


def _pairs(case: Case, backend: str) -> Call:
    index = listed(case)
    bounds = bound(case.attention, backend)
    return lambda: pairs(case.attention, bounds, index, backend)


def _attention(case: Case, backend: str) -> Call:
    """From stored weights; Triton recomputes them and has no kernel for that."""
    a = case.attention.float()
    pattern = a.pattern[None]
    given = (pattern, a.value.transpose(0, 1)[None], a.w_o, 0.5 * a.whole[None], a.whole[None])
    chosen = "auto" if backend == "triton" else backend
    return lambda: ops.attention_importances(*given, backend=chosen)


def _parts(case: Case, backend: str) -> Call:
    part = 0.5 * case.attention.whole
    return lambda: ops.part_proximity(part, case.attention.whole, backend=backend)


def _outputs(case: Case) -> Tensor:
    whole = case.attention.whole
    return whole[:, None] * torch.linspace(-0.5, 1.5, COMPONENTS, device=whole.device)[:, None]


def _components(case: Case, backend: str) -> Call:
    outputs = _outputs(case)
    return lambda: ops.component_proximity(outputs, case.attention.whole, backend=backend)


def _neurons(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, output weights and sign bounds of as many neurons as the state is wide."""
    whole = case.attention.whole
    g = torch.Generator().manual_seed(0)
    activation = torch.randn(len(whole), whole.shape[1], generator=g).to(whole.device)
    w_down = (torch.randn(whole.shape[1], whole.shape[1], generator=g) / whole.shape[1] ** 0.5).to(whole.device)
    return activation, w_down, (activation * (torch.copysign(torch.ones_like(whole), whole) @ w_down.T)).clamp_min(0)


def _rank1(case: Case, backend: str) -> Call | None:
    if backend != "cpu":
        return None
    activation, w_down, bounds = _neurons(case)
    return lambda: rank1_proximity(activation, w_down, case.attention.whole, bounds)


OPERATIONS: dict[str, Callable[[Case, str], Call | None]] = {
    "attention": _attention,
    "dense": _dense,
    "bound": _bound,
    "pairs": _pairs,
    "parts": _parts,
    "components": _components,
    "certified": certified_call,
    "rank1": _rank1,
}


def error(name: str, case: Case, backend: str, rows: int = 3) -> float:
    """Largest error of an operation in the last rows against float64, in units of the row's ‖y‖₁; intervals must hold
    the truth.
    """
    call = OPERATIONS[name](case, backend)
    if call is None:
        return 0.0
    found, a = call(), case.attention.float()
    last = slice(max(0, a.n_query - rows), None)
    y = a.whole[last].double()
    unit = y.abs().sum(-1)
    if name == "parts":
        return _worst(found[last], reference.proximity(0.5 * y, y), unit)
    if name == "components":
        wanted = torch.stack([reference.proximity(x, y) for x in _outputs(case)[last].double().unbind(1)], 1)
        return _worst(found[last], wanted, unit[:, None])
    if name == "rank1":
        activation, w_down, _ = (t.double() for t in _neurons(case))
        wanted = torch.stack(
            [reference.proximity(x[:, None] * w_down, z) for x, z in zip(activation[last], y, strict=True)]
        )
        return _worst(found[last], wanted, unit[:, None])
    pattern = reference.attention_pattern(a.query.double()[:, last], a.key.double(), scaling=a.scaling)
    proximities = reference.attention_proximity(pattern, a.value.double(), a.w_o.double(), y)
    first = a.n_query - len(y)
    if name == "pairs":
        query, key, head = listed(case).long()
        mine = query >= first
        return _worst(found[mine], proximities[head[mine], query[mine] - first, key[mine]], unit[query[mine] - first])
    if name == "bound":
        flow = reference.sign_flow(pattern, a.value.double(), a.w_o.double(), y)
        return _worst(found.flow[last], flow.sum(-1).T, torch.maximum(unit, flow.abs().sum((0, 2)))[:, None])
    if name == "attention":
        total = proximities.sum((0, 2)) + reference.proximity(0.5 * y, y)
        return _worst(
            found.importances[0, last],
            (proximities / total[:, None]).permute(1, 2, 0),
            torch.ones_like(unit)[:, None, None],
        )
    total = proximities.sum((0, 2)) + case.others[0, last].double()
    if name == "dense":
        return _worst(found[0][:, last], proximities / total[:, None], torch.ones_like(unit)[:, None])
    outside = torch.maximum(found.low[last] - total, total - found.high[last]) / total
    query, key, head = found.index.long()
    mine = (query >= first) & (head >= 0)
    at = (head[mine], query[mine] - first, key[mine])
    return max(float(outside.max()), _worst(found.value[mine], proximities[at], total[at[1]]))


def _worst(found: Tensor, wanted: Tensor, unit: Tensor) -> float:
    difference = ((found.double() - wanted).abs() / unit).cpu()
    return float(difference.max()) if difference.numel() else 0.0
