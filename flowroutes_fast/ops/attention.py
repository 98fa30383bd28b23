"""One layer's attention: its tensors, how the kernels are given them, and its sub-edges' importances from stored
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowroutes_fast.ops import native, reference
from flowroutes_fast.ops.arguments import FLOAT, as_tensor, check_layer, check_real, check_threads, result_dtype
from flowroutes_fast.ops.backends import resolve
from flowroutes_fast.system.ambient import in_neutral, matmul


class AttentionImportances(NamedTuple):
    """What :func:`attention_importances` returns."""

    importances: Tensor  # [batch, query, key, head]
    residual: Tensor  # [batch, query]


@in_neutral
def attention_importances(
    pattern: Any,
    value: Any,
    w_o: Any,
    resid_pre: Any,
    resid_mid: Any,
    *,
    distance_norm: float = 1,
    clip: float = 0.0,
    backend: str = "auto",
) -> AttentionImportances:
    """Importance of every sub-edge and of the residual connection for the state after attention (equation 5).

    Equivalent to::

        z = torch.einsum("bhqk,bkhd,hdm->bqkhm", pattern, value.repeat_interleave(group, 2), w_o)  # all that is avoided
        y = resid_mid[:, :, None, None]
        edge = (y.abs().sum(-1) - (z - y).abs().sum(-1)).clamp_min(clip)
        residual = (resid_mid.abs().sum(-1) - (resid_pre - resid_mid).abs().sum(-1)).clamp_min(clip)
        total = edge.sum((2, 3)) + residual
        return edge / total[:, :, None, None], residual / total

    Args:
        pattern: attention weights ``[batch, head, query, key]``.
        value: value vectors ``[batch, key, kv_head, d_head]``; ``kv_head`` divides ``head``.
        w_o: output projection ``[head, d_head, d_model]``.
        resid_pre: states before attention ``[batch, query, d_model]``.
        resid_mid: states after attention ``[batch, query, d_model]``.
        distance_norm: 1 for the paper's L1 norm; other norms are computed by the reference backend.
        clip: lower limit of every proximity, masked pairs included (the reference tool uses 1e-5).
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.

    Returns:
        importances ``[batch, query, key, head]`` and residual ``[batch, query]``, dimensionless, float32 (float64 for
        float64 inputs). Over keys and heads, together with the residual, a row sums to 1 (0 where no part is closer
        than none).

    Raises:
        ValueError: shapes that do not fit, NaN or infinity in a state, an unknown backend.
        TypeError: tensors that are not floating point.
    """
    given = {"pattern": pattern, "value": value, "w_o": w_o, "resid_pre": resid_pre, "resid_mid": resid_mid}
    pattern, value, w_o, resid_pre, resid_mid = (as_tensor(array, name) for name, array in given.items())
    _check_importances(pattern, value, w_o, resid_pre, resid_mid, distance_norm, clip)
    chosen = resolve(backend, resid_mid)
    if backend not in ("auto", "reference") and distance_norm != 1:
        raise ValueError(
            f"backend {chosen!r} computes distance_norm=1 only, not {distance_norm}; use backend='reference'"
        )
    dtype = result_dtype(resid_mid)
    pattern, value, w_o, resid_pre, resid_mid = (
        t.detach().to(dtype) for t in (pattern, value, w_o, resid_pre, resid_mid)
    )
    rows, residuals = [], []
    for b in range(pattern.shape[0]):
        v, y = value[b].transpose(0, 1), resid_mid[b]
        if distance_norm == 1:
            edge = torch.ops.flowroutes.attention_proximity(pattern[b], v, w_o, y, chosen)
            residual = torch.ops.flowroutes.part_proximity(resid_pre[b], y, chosen)
        else:
            edge = reference.attention_proximity(pattern[b], v, w_o, y, distance_norm)
            residual = reference.proximity(resid_pre[b], y, distance_norm)
        edge, residual = edge.clamp_min(clip), residual.clamp_min(clip)
        total = edge.sum((0, 2), dtype=torch.float64).to(dtype) + residual
        scale = torch.where(total > 0, 1 / total, 0)
        rows.append((edge * scale[:, None]).permute(1, 2, 0))
        residuals.append(residual * scale)
    return AttentionImportances(torch.stack(rows), torch.stack(residuals))


def _check_importances(pattern, value, w_o, resid_pre, resid_mid, distance_norm, clip) -> None:  # type: ignore[no-untyped-def]
    named = {"pattern": pattern, "value": value, "w_o": w_o, "resid_pre": resid_pre, "resid_mid": resid_mid}
    rank = {"pattern": 4, "value": 4, "w_o": 3, "resid_pre": 3, "resid_mid": 3}
    for name, tensor in named.items():
        if tensor.dtype not in FLOAT:
            raise TypeError(
                f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}"
            )
        if tensor.dim() != rank[name]:
            raise ValueError(f"{name} must have {rank[name]} dimensions, got shape {tuple(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}")
        if tensor.device != resid_mid.device:
            raise ValueError(
                f"{name} is on {tensor.device} but resid_mid is on {resid_mid.device}: move them to one device"
            )
        check_real(name, tensor)
    batch, head, query, key = pattern.shape
    d_head, d_model = w_o.shape[1:]
    expected = {
        "value": (batch, key, value.shape[2], d_head),
        "w_o": (head, d_head, d_model),
        "resid_pre": (batch, query, d_model),
        "resid_mid": (batch, query, d_model),
    }
    for name, shape in expected.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; with the other shapes it must be {shape}")
    if head % value.shape[2]:
        raise ValueError(
            f"value has {value.shape[2]} key-value heads, which does not divide the pattern's {head} heads"
        )
    for name, tensor in named.items():
        if not torch.compiler.is_compiling() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    if not distance_norm > 0:
        raise ValueError(f"distance_norm must be positive, got {distance_norm}")
    if not 0 <= clip < float("inf"):
        raise ValueError(f"clip must be zero or a positive number, got {clip}")


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
            check_layer(
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


def layer_arguments(value: Tensor, w_o: Tensor, whole: Tensor, g: Tensor, threads: int) -> native.Arguments:
    """What every native operation on one layer takes, float32 on the CPU; where attention weights come from is
    added.
    """
    n_query, (kv, n_key), (n_head, d_v, d_model) = whole.shape[0], value.shape[:2], w_o.shape
    check_threads(threads)
    arguments = native.Arguments(
        queries=n_query,
        keys=n_key,
        heads=n_head,
        group=n_head // kv,
        d_v=d_v,
        d_model=d_model,
        w_row=n_head * d_v,
        threads=threads,
    )
    arguments.take_rows("value", value, (kv, n_key, d_v), ("v_head", "v_row"), where="v")
    arguments.take("g", g, n_query, n_head, d_v)
    arguments.take("w_o", linear(w_o), d_model, n_head * d_v)
    arguments.take("whole", whole, n_query, d_model, where="y")
    return arguments


def linear(w_o: Tensor) -> Tensor:
    """``[head, d_head, d_model]`` as a linear layer stores it ``[d_model, head * d_head]``: no copy when it views
    one.
    """
    return native.contiguous(w_o.permute(2, 0, 1).reshape(w_o.shape[2], -1))


def take_qk(
    arguments: native.Arguments,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> None:
    """Attention weights are recomputed from queries and keys."""
    (n_head, n_query, d_qk), n_key = query.shape, key.shape[1]
    arguments |= {"d_qk": d_qk, "scale": scaling, "softcap": softcap, "window": window, "offset": n_key - n_query}
    arguments.take_rows(
        "query", query, (arguments["heads"], arguments["queries"], d_qk), ("q_head", "q_row"), where="q"
    )
    arguments.take_rows(
        "key", key, (n_head // arguments["group"], arguments["keys"], d_qk), ("k_head", "k_row"), where="k"
    )
    if mask is not None:
        strides = ("mask_head", "mask_query") if mask.dim() == 3 else ("mask_query",)
        arguments.take_rows("mask", mask, (n_head, n_query, n_key)[3 - mask.dim() :], strides)
    arguments.take("sinks", None if sinks is None else sinks.float(), n_head)


def native_arguments(attention: Attention, threads: int = 0) -> native.Arguments:
    """The native kernels' view of a layer. Everything float32 on the CPU."""
    a = attention
    arguments = layer_arguments(a.value, a.w_o, a.whole, a.gradient, threads)
    take_qk(arguments, a.query, a.key, a.mask, a.scaling, a.softcap, a.window, a.sinks)
    arguments.take("positions", a.positions, a.n_query, dtype=torch.int64)
    arguments.take("row_scale", a.row_scale, a.n_query)
    arguments.take("gate", a.gate, a.n_query, a.n_head, a.w_o.shape[1])
    return arguments
