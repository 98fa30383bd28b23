"""Bounds, listed pairs and intervals of one layer's sub-edges, on every backend.

``bound`` and ``candidates`` cost an attention-shaped pass over the head's width; ``pairs`` evaluates what is listed. No
backend but ``reference`` stores anything of the size of ``[head, query, key]``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowroutes_fast import ops
from flowroutes_fast.ops import reference
from flowroutes_fast.ops.native import Arguments, edges
from flowroutes_fast.system.ambient import in_neutral, matmul


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's sub-edges z = r_i·α[h,i,j]·(v[h,j] ∘ gate[i,h])·W_O[h] and the state they belong to.

    query ``[head, query, d_qk]``, key ``[kv_head, key, d_qk]``, value ``[kv_head, key, d_head]``, w_o ``[head, d_head,
    d_model]``, whole ``[query, d_model]``; mask additive ``[query, key]`` or ``[head, query, key]``, None for causal,
    limited to ``window`` keys if positive; positions ``[query]`` (int64, rising, on the CPU): where causal queries
    stand among the keys, None for the last ones (the kernels of the CPU alone; :meth:`masked` says the same by a mask);
    sinks ``[head]``: one more logit per row; row_scale ``[query]``: what a linearised norm after attention divides by,
    inverted; gate ``[query, head, d_head]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    w_o: Tensor
    whole: Tensor
    scaling: float
    mask: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float = 0.0
    window: int = 0
    row_scale: Tensor | None = None
    gate: Tensor | None = None
    positions: Tensor | None = None

    @property
    def n_query(self) -> int:
        return self.whole.shape[0]

    @property
    def n_key(self) -> int:
        return self.value.shape[1]

    @property
    def n_head(self) -> int:
        return self.w_o.shape[0]

    def check(self) -> None:
        """Raise ValueError or TypeError where shapes, dtypes or devices do not fit together."""
        if "checked" not in self.__dict__:
            ops.check_layer(
                self.query,
                self.key,
                self.value,
                self.w_o,
                self.whole,
                mask=self.mask,
                sinks=self.sinks,
                row_scale=self.row_scale,
                gate=self.gate,
                softcap=self.softcap,
                window=self.window,
            )
            if self.positions is not None and (self.mask is not None or self.positions.shape != (self.n_query,)):
                raise ValueError(
                    f"positions must be [query = {self.n_query}], without a mask, got {list(self.positions.shape)}"
                )
            self.__dict__["checked"] = True

    @cached_property
    @in_neutral
    def gradient(self) -> Tensor:
        """g[i,h] = W_O[h] sign(y_i) ∘ gate ``[query, head, d_head]``, in float32 (float64 for float64 states): one
        GEMM of o_proj's size.
        """
        dtype = torch.float64 if self.whole.dtype == torch.float64 else torch.float32
        flat = self.w_o.permute(2, 0, 1).reshape(self.w_o.shape[2], -1)  # a view when W_O views a linear layer
        g = _sign_product(self.whole, flat, dtype).view(self.n_query, self.n_head, -1)
        return g if self.gate is None else g * self.gate.to(dtype)

    @cached_property
    @in_neutral
    def pattern(self) -> Tensor:
        """α ``[head, query, key]``; for the reference backend alone."""
        return reference.attention_pattern(
            self.query,
            self.key,
            scaling=self.scaling,
            mask=self.mask,
            softcap=self.softcap,
            window=self.window,
            sinks=self.sinks,
        ).to(self.whole.dtype)

    def masked(self) -> Attention:
        """The same with a mask instead of positions."""
        if self.positions is None:
            return self
        mask = causal_mask(self.positions.to(self.query.device), self.n_key, self.window)
        return replace(self, mask=mask, window=0, positions=None)

    def float(self) -> Attention:
        """Everything in float32, for the native CPU kernels; float64 stays."""
        if self.whole.dtype == torch.float64:
            return self
        names = ("query", "key", "value", "w_o", "whole", "mask", "sinks", "row_scale", "gate")
        tensors: dict[str, Any] = {name: getattr(self, name) for name in names}
        if all(t is None or t.dtype == torch.float32 for t in tensors.values()):
            return self
        cast: dict[str, Any] = {n: None if t is None else t.float() for n, t in tensors.items()}
        return Attention(
            **cast, scaling=self.scaling, softcap=self.softcap, window=self.window, positions=self.positions
        )

    @property
    def triton_options(self) -> dict[str, Any]:
        return {
            "scaling": self.scaling,
            "mask": self.mask,
            "window": self.window,
            "softcap": self.softcap,
            "row_scale": self.row_scale,
        }


def causal_mask(positions: Tensor, n_key: int, window: int = 0) -> Tensor:
    """Additive mask ``[query, key]`` (float32) of causal queries at these positions, limited to ``window`` keys if
    positive.
    """
    age = positions[:, None] - torch.arange(n_key, dtype=positions.dtype, device=positions.device)
    hidden = (age < 0) | (age >= window if window else False)
    return torch.zeros(age.shape, dtype=torch.float32, device=age.device).masked_fill_(hidden, float("-inf"))


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


@dataclass
class Counts:
    """How much work a certificate took: (query, key, head) sub-edges bounded and evaluated, rows refined, rows
    evaluated whole.
    """

    bounded: int = 0
    evaluated: int = 0
    refined: int = 0
    exhausted: int = 0


@dataclass
class Certified:
    """What is known of one layer's sub-edges. Proximities are in units of the state's L1 norm.

    ``low``, ``high`` ``[query]`` bound the normaliser; ``head_low``, ``head_high`` ``[query, head]`` a head's sum over
    keys. ``index [3, n]`` (query, key, head; int32) and ``value [n]``: exact proximities of the evaluated sub-edges of
    every (query, key) pair that may reach the floor; head -1 stands for the pair's other heads, whose sum lies between
    0 and its value. With ``measure="signed"`` everything is a share of ‖y‖₁, signed, and known.
    """

    low: Tensor
    high: Tensor
    head_low: Tensor
    head_high: Tensor
    index: Tensor
    value: Tensor
    counts: Counts = field(default_factory=Counts)


def visible(attention: Attention) -> int:
    """Sub-edges that a layer has: visible (query, key) pairs times heads."""
    if attention.mask is not None:
        seen = (attention.mask > torch.finfo(torch.float32).min / 2).sum()
        return int(seen) * (attention.n_head if attention.mask.dim() == 2 else 1)
    last = torch.arange(attention.n_query, dtype=torch.int64, device="cpu") + attention.n_key - attention.n_query
    position = (last if attention.positions is None else attention.positions) + 1
    reach = position.clamp_max(attention.window) if attention.window else position
    return int(reach.sum()) * attention.n_head


def _sign_product(whole: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """sign(whole) @ weight in ``dtype``; 16-bit weights on a GPU are multiplied as they are and summed in float32
    (signs are exact).
    """
    if whole.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        sign = torch.copysign(torch.ones_like(whole, dtype=weight.dtype), whole.to(weight.dtype))
        try:
            return torch.mm(sign, weight, out_dtype=torch.float32)
        except (TypeError, NotImplementedError):  # a torch without out_dtype
            pass
    return matmul(torch.copysign(torch.ones_like(whole, dtype=dtype), whole), weight.to(dtype))


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

    a = attention
    lse, flow = passes.attention_rows(a.query, a.key, a.value, a.gradient, sinks=a.sinks, **a.triton_options)
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


@in_neutral
def pairs(attention: Attention, bounds: Bounds, index: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Exact proximity of the listed sub-edges ``index [3, n]`` -> ``[n]`` (equations 3 and 4).

    Raises:
        IndexError: on the CPU, an index outside.
    """
    attention.check()
    if index.dim() != 2 or index.shape[0] != 3 or index.is_floating_point():
        raise ValueError(f"index must hold integers [3, n], got {index.dtype} {list(index.shape)}")
    if backend == "reference":
        a = attention.float()
        return reference.pair_proximity(a.pattern, a.value, a.w_o, a.whole, index, row_scale=a.row_scale, gate=a.gate)
    if backend == "cpu":
        arguments = native_arguments(attention.float(), threads)
        arguments["n"] = index.shape[1]
        arguments.take("index", index.to(torch.int32), 3, index.shape[1], dtype=torch.int32)
        value = arguments.make("value", index.shape[1])
        arguments.call("pairs")
        return value
    if backend == "cuda":
        from flowroutes_fast.ops.cuda import pair_proximity as cuda_pairs

        a = attention
        return cuda_pairs(pair_weights(a, bounds, index), a.value, a.w_o.to(a.value.dtype), a.whole, index, a.gate)
    from flowroutes_fast.kernels.pairs import pair_proximity

    return pair_proximity(  # type: ignore[no-any-return]
        attention.query,
        attention.key,
        attention.value,
        attention.w_o,
        attention.whole,
        bounds.lse,
        index,
        gate=attention.gate,
        **attention.triton_options,
    )


@in_neutral
def pair_weights(attention: Attention, bounds: Bounds, index: Tensor, chunk: int = 2**18) -> Tensor:
    """r_i·α of listed sub-edges ``[n]``, from queries, keys and the rows' log-sum-exp."""
    out = []
    group = attention.n_head // attention.value.shape[0]
    for part in index.long().split(chunk, 1):
        i, j, h = part
        score = (attention.query[h, i].float() * attention.key[h // group, j].float()).sum(-1) * attention.scaling
        if attention.softcap:
            score = attention.softcap * torch.tanh(score / attention.softcap)
        if attention.mask is not None:
            score = score + (attention.mask[i, j] if attention.mask.dim() == 2 else attention.mask[h, i, j])
        weight = (score - bounds.lse[h, i]).exp()  # type: ignore[index]
        out.append(weight if attention.row_scale is None else weight * attention.row_scale[i])
    return torch.cat(out) if out else index.new_empty(0, dtype=torch.float32)


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


def native_arguments(attention: Attention, threads: int = 0) -> Arguments:
    """The native kernels' view of a layer. Everything float32 on the CPU."""
    a = attention
    arguments = ops.layer_arguments(a.value, a.w_o, a.whole, a.gradient, threads)
    ops.take_qk(arguments, a.query, a.key, a.mask, a.scaling, a.softcap, a.window, a.sinks)
    arguments.take("positions", a.positions, a.n_query, dtype=torch.int64)
    arguments.take("row_scale", a.row_scale, a.n_query)
    arguments.take("gate", a.gate, a.n_query, a.n_head, a.w_o.shape[1])
    return arguments
