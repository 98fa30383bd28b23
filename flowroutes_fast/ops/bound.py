"""Sign bounds of a layer's sub-edges, and lists of those above a cut.

Both cost an attention-shaped pass over the head's width. No backend but ``reference`` stores anything of the size of
``[head, query, key]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowroutes_fast.ops import reference
from flowroutes_fast.ops.attention import Attention, native_arguments
from flowroutes_fast.ops.native import edges
from flowroutes_fast.system.ambient import in_neutral


class Bounds(NamedTuple):
    """Sign bounds summed over keys, ``[query, head]``: of their positive parts (with slack), and signed."""

    upper: Tensor
    flow: Tensor
    lse: Tensor | None = None  # log-sum-exp of the attention rows [head, query], where the backend keeps it


@dataclass(frozen=True, eq=False)
class Candidates:
    """Sub-edges whose bound is above a cut: index ``[3, n]`` (query, key, head; int32), bound ``[n]``, how many each
    row has ``[query]``.

    A row with more than the capacity is listed in part: its count says so.
    """

    index: Tensor
    bound: Tensor
    counts: Tensor


@in_neutral
def bound(attention: Attention, backend: str, slack: float = 0.0, threads: int = 0) -> Bounds:
    """Sums over keys of every head's sign bounds r·α·max(⟨v, g⟩ + slack·|v||g|, 0) ≥ proximity."""
    attention.check()
    if backend == "reference":
        attention = attention.float()
        flow = _flow(attention)
        return Bounds(_positive(attention, flow, slack).sum(-1).T, flow.sum(-1).T)
    if backend == "cpu":
        arguments = native_arguments(attention.float(), threads)
        upper, flow = (arguments.make(name, attention.n_query, attention.n_head) for name in ("upper", "flow"))
        arguments.call("bound")
        return Bounds(upper, flow)
    from flowroutes_fast.kernels import bound as passes
    from flowroutes_fast.kernels import gradient
    from flowroutes_fast.kernels.attention import attention_rows

    a = attention
    lse, flow = attention_rows(a.query, a.key, a.value, a.gradient, sinks=a.sinks, **a.triton_options)
    g, v = (
        gradient.gradient(a.whole, a.w_o, a.gate),
        gradient.values(a.value, passes.tile_of(a.query, a.value.shape[2]).columns),
    )
    sums = passes.sums_below(a.query, a.key, v, g, lse, torch.zeros_like(lse[0]), **a.triton_options)
    assert flow is not None
    return Bounds(sums[-1], flow, lse)


@in_neutral
def candidates(
    attention: Attention,
    bounds: Bounds,
    cut: Tensor,
    pair_cut: Tensor,
    backend: str,
    slack: float = 0.0,
    capacity: int = 0,
    threads: int = 0,
) -> Candidates:
    """Sub-edges with a bound above ``cut [query]``, and all positive ones of (query, key) pairs whose sum over
    heads is above ``pair_cut``.
    """
    attention.check()
    if backend == "reference":
        attention = attention.float()
        upper = _positive(attention, _flow(attention), slack)
        found = (upper > cut[:, None]) | ((upper.sum(0) > pair_cut[:, None]) & (upper > 0))
        index = found.permute(1, 2, 0).nonzero().T
        return _limited(index.to(torch.int32), upper[index[2], index[0], index[1]], attention.n_query, capacity)
    if backend == "cpu":
        arguments = native_arguments(attention.float(), threads)
        for name in ("upper", "flow"):
            arguments.make(name, attention.n_query, attention.n_head)
        arguments.take("cut", cut.float(), attention.n_query, where="cuts")
        arguments.take("pair_cut", pair_cut.float(), attention.n_query, where="pair_cuts")
        index, value = edges(arguments.call("bound"))
        return _limited(index, value, attention.n_query, capacity)
    raise ValueError(f"backend {backend!r} makes its lists in certified_gpu.py")


def _flow(attention: Attention) -> Tensor:
    a = attention
    return reference.sign_flow(a.pattern, a.value, a.w_o, a.whole, row_scale=a.row_scale, gate=a.gate)


def _positive(attention: Attention, flow: Tensor, slack: float) -> Tensor:
    if not slack:
        return flow.clamp_min(0)
    extra = reference.bound_slack(attention.pattern, attention.value, attention.gradient, slack)
    if attention.row_scale is not None:
        extra = extra * attention.row_scale[:, None]
    return (flow + extra).clamp_min(0)


def _limited(index: Tensor, value: Tensor, n_query: int, capacity: int) -> Candidates:
    """Sorted by (query, key, head), at most ``capacity`` of a row (0: all)."""
    query, key, head = index.long()
    order = (
        (query * (int(key.max()) + 1 if key.numel() else 1) + key) * (int(head.max()) + 1 if head.numel() else 1) + head
    ).argsort()
    index, value, query = index[:, order], value[order], query[order]
    counts = torch.bincount(query, minlength=n_query)
    if capacity:
        place = torch.arange(len(query), dtype=torch.int64, device=query.device) - (counts.cumsum(0) - counts)[query]
        index, value = index[:, place < capacity], value[place < capacity]
    return Candidates(index, value, counts)
