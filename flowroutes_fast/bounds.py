"""Bounds, listed pairs and intervals of one layer's sub-edges, on every backend.

``bound`` and ``candidates`` cost an attention-shaped pass over the head's width; ``pairs`` evaluates what is listed. No backend but
``reference`` stores anything of the size of ``[head, query, key]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowroutes_fast import native, ops, reference


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's sub-edges z = r_i·α[h,i,j]·(v[h,j] ∘ gate[i,h])·W_O[h] and the state they belong to.

    query ``[head, query, d_qk]``, key ``[kv_head, key, d_qk]``, value ``[kv_head, key, d_head]``, w_o ``[head, d_head, d_model]``, whole
    ``[query, d_model]``; mask additive ``[query, key]`` or ``[head, query, key]``, None for causal, limited to ``window`` keys if
    positive; sinks ``[head]``: one more logit per row; row_scale ``[query]``: what a linearised norm after attention divides by, inverted;
    gate ``[query, head, d_head]``.
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

    @property
    def n_query(self) -> int:
        return self.whole.shape[0]

    @property
    def n_key(self) -> int:
        return self.value.shape[1]

    @property
    def n_head(self) -> int:
        return self.w_o.shape[0]

    @cached_property
    def gradient(self) -> Tensor:
        """g[i,h] = W_O[h] sign(y_i) ∘ gate ``[query, head, d_head]``, in float32 (float64 for float64 states): one GEMM of o_proj's size."""
        dtype = torch.float64 if self.whole.dtype == torch.float64 else torch.float32
        flat = self.w_o.permute(2, 0, 1).reshape(self.w_o.shape[2], -1)  # a view when W_O views a linear layer
        g = _sign_product(self.whole, flat, dtype).view(self.n_query, self.n_head, -1)
        return g if self.gate is None else g * self.gate.to(dtype)

    @cached_property
    def pattern(self) -> Tensor:
        """α ``[head, query, key]``; for the reference backend alone."""
        return reference.attention_pattern(
            self.query, self.key, scaling=self.scaling, mask=self.mask, softcap=self.softcap, window=self.window, sinks=self.sinks
        ).to(self.whole.dtype)

    def float(self) -> Attention:
        """Everything in float32, for the native CPU kernels; float64 stays."""
        if self.whole.dtype == torch.float64:
            return self
        names = ("query", "key", "value", "w_o", "whole", "mask", "sinks", "row_scale", "gate")
        tensors: dict[str, Any] = {name: getattr(self, name) for name in names}
        if all(t is None or t.dtype == torch.float32 for t in tensors.values()):
            return self
        cast: dict[str, Any] = {n: None if t is None else t.float() for n, t in tensors.items()}
        return Attention(**cast, scaling=self.scaling, softcap=self.softcap, window=self.window)

    @property
    def triton_options(self) -> dict[str, Any]:
        return {
            "scaling": self.scaling, "mask": self.mask, "window": self.window, "softcap": self.softcap, "row_scale": self.row_scale,
        }  # fmt: skip


class Bounds(NamedTuple):
    """Sign bounds summed over keys, ``[query, head]``: of their positive parts (with slack), and signed."""

    upper: Tensor
    flow: Tensor
    lse: Tensor | None = None  # log-sum-exp of the attention rows [head, query], where the backend keeps it


@dataclass(frozen=True, eq=False)
class Candidates:
    """Sub-edges whose bound is above a cut: index ``[3, n]`` (query, key, head; int32), bound ``[n]``, how many each row has ``[query]``.

    A row with more than the capacity is listed in part: its count says so.
    """

    index: Tensor
    bound: Tensor
    counts: Tensor


def _sign_product(whole: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """sign(whole) @ weight in ``dtype``; 16-bit weights on a GPU are multiplied as they are and summed in float32 (signs are exact)."""
    if whole.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        sign = torch.copysign(torch.ones_like(whole, dtype=weight.dtype), whole)
        try:
            return torch.mm(sign, weight, out_dtype=torch.float32)
        except (TypeError, NotImplementedError):  # a torch without out_dtype
            pass
    return torch.copysign(torch.ones_like(whole, dtype=dtype), whole) @ weight.to(dtype)


def slack_of(attention: Attention, backend: str) -> float:
    """What the backend's arithmetic may add to ⟨v, g⟩, relative to |v|·|g|: nothing but float32 rounding where operands are float32."""
    if backend not in ("triton", "cuda"):
        return 0.0
    from flowroutes_fast.kernels.bound import required_slack

    return required_slack(attention.value.dtype, attention.value.shape[-1])


def bound(attention: Attention, backend: str, slack: float = 0.0, threads: int = 0) -> Bounds:
    """Sums over keys of every head's sign bounds r·α·max(⟨v, g⟩ + slack·|v||g|, 0) ≥ proximity."""
    if backend == "reference":
        attention = attention.float()
        flow = _flow(attention)
        return Bounds(_positive(attention, flow, slack).sum(-1).T, flow.sum(-1).T)
    if backend == "cpu":
        upper, flow = (torch.empty(attention.n_query, attention.n_head) for _ in range(2))
        arguments, keep = native_arguments(attention.float(), threads)
        native.extension().bound({**arguments, "upper": upper.data_ptr(), "flow": flow.data_ptr()})
        del keep
        return Bounds(upper, flow)
    from flowroutes_fast.kernels.bound import bound_rows

    lse, upper, flow = bound_rows(
        attention.query, attention.key, attention.value, attention.gradient, sinks=attention.sinks, slack=slack, **attention.triton_options
    )
    return Bounds(upper, flow, lse)


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
    """Sub-edges with a bound above ``cut [query]``, and all positive ones of (query, key) pairs whose sum over heads is above ``pair_cut``."""
    if backend == "reference":
        attention = attention.float()
        upper = _positive(attention, _flow(attention), slack)
        found = (upper > cut[:, None]) | ((upper.sum(0) > pair_cut[:, None]) & (upper > 0))
        index = found.permute(1, 2, 0).nonzero().T
        return _limited(index.to(torch.int32), upper[index[2], index[0], index[1]], attention.n_query, capacity)
    if backend == "cpu":
        upper, flow = (torch.empty(attention.n_query, attention.n_head) for _ in range(2))
        arguments, keep = native_arguments(attention.float(), threads)
        cut, pair_cut = cut.float().contiguous(), pair_cut.float().contiguous()
        index, value = native.extension().bound({
            **arguments, "upper": upper.data_ptr(), "flow": flow.data_ptr(), "cuts": cut.data_ptr(), "pair_cuts": pair_cut.data_ptr()
        })  # fmt: skip
        del keep
        return _limited(torch.from_numpy(index), torch.from_numpy(value), attention.n_query, capacity)
    from flowroutes_fast.kernels.bound import bound_candidates, compact

    keys, heads, values, counts = bound_candidates(
        attention.query, attention.key, attention.value, attention.gradient, bounds.lse, cut.float(), pair_cut.float(),
        slack=slack, capacity=capacity or 4096, **attention.triton_options,
    )  # fmt: skip
    index, value = compact(keys, heads, values, counts)
    return Candidates(index, value, counts)


def pairs(attention: Attention, bounds: Bounds, index: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Exact proximity of the listed sub-edges ``index [3, n]`` -> ``[n]`` (equations 3 and 4)."""
    if backend == "reference":
        a = attention.float()
        return reference.pair_proximity(a.pattern, a.value, a.w_o, a.whole, index, row_scale=a.row_scale, gate=a.gate)
    if backend == "cpu":
        value = torch.empty(index.shape[1])
        index = index.to(torch.int32).contiguous()
        arguments, keep = native_arguments(attention.float(), threads)
        native.extension().pairs(arguments, index.data_ptr(), value.data_ptr(), index.shape[1])
        del keep
        return value
    if backend == "cuda":
        from flowroutes_fast.cuda import pair_proximity as cuda_pairs

        a = attention
        return cuda_pairs(pair_weights(a, bounds, index), a.value, a.w_o.to(a.value.dtype), a.whole, index, a.gate)
    from flowroutes_fast.kernels.pairs import pair_proximity

    return pair_proximity(
        attention.query, attention.key, attention.value, attention.w_o, attention.whole, bounds.lse, index,
        gate=attention.gate, **attention.triton_options,
    )  # fmt: skip


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
    order = ((query * (int(key.max()) + 1 if key.numel() else 1) + key) * (int(head.max()) + 1 if head.numel() else 1) + head).argsort()
    index, value, query = index[:, order], value[order], query[order]
    counts = torch.bincount(query, minlength=n_query)
    if capacity:
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        index, value = index[:, place < capacity], value[place < capacity]
    return Candidates(index, value, counts)


def native_arguments(attention: Attention, threads: int = 0) -> tuple[dict[str, Any], list[Tensor]]:
    """The native kernels' view of a layer, and the tensors that must stay alive meanwhile. Everything float32 on the CPU."""
    a = attention
    value, whole, g = ops.rows(a.value), a.whole.contiguous(), a.gradient.contiguous()
    w_rows = a.w_o.permute(2, 0, 1).reshape(a.w_o.shape[2], -1).contiguous()  # [d_model, head * d_head]
    keep = [value, whole, g, w_rows]
    arguments: dict[str, Any] = {
        "queries": a.n_query, "keys": a.n_key, "heads": a.n_head, "group": a.n_head // value.shape[0],
        "d_v": a.w_o.shape[1], "d_model": a.w_o.shape[2], "v_head": value.stride(0), "v_row": value.stride(1), "v": value.data_ptr(),
        "g": g.data_ptr(), "w_o": w_rows.data_ptr(), "w_row": w_rows.stride(0), "y": whole.data_ptr(), "threads": threads,
    }  # fmt: skip
    source = ops.qk_source(a.query, a.key, a.mask, a.scaling, a.softcap, a.window, a.sinks)
    source |= {name: t.contiguous() for name, t in (("row_scale", a.row_scale), ("gate", a.gate)) if t is not None}
    for name, item in source.items():
        if isinstance(item, Tensor):
            keep.append(item)
            item = item.data_ptr()
        arguments[name] = item
    return arguments, keep
