"""Importances of one captured layer: every part of the state after attention, and of the state after the FFN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowroutes_fast import reference
from flowroutes_fast.capture import Layer

BIAS_MODES = ("part", "value", "exclude")


@dataclass
class LayerImportances:
    """Importances of one layer, float32 on the CPU. In a parallel block there is one node and ``ffn_residual`` is NaN."""

    shape: str
    dense: Tensor | None  # [head, query, key]
    edges: tuple[Tensor, Tensor]  # index [3, n] (query, key, head; int32) and importance [n]
    heads: Tensor  # [query, head]
    attention_residual: Tensor  # [query]
    bias: Tensor  # [query]
    ffn: Tensor  # [query]
    ffn_residual: Tensor  # [query]


@dataclass
class Parts:
    """The decomposition of one node: sub-edges from (query, key, value, W_O), the residual, and a constant part or None."""

    value: Tensor  # [kv_head, key, d_head] float32
    w_o: Tensor  # [head, d_head, d_model] float32
    whole: Tensor  # [token, d_model] float32
    residual: Tensor  # [token, d_model] float32
    constant: Tensor | None  # [d_model] float32


def parts_of(layer: Layer, bias: str = "part") -> Parts:
    """Split the state after attention (parallel block: after the block) into its parts.

    ``bias="part"`` takes b_V out of the values and b_O + Σ_h b_V[h] W_O[h] as one part without a source token (attention rows
    sum to 1); ``"value"`` leaves b_V inside each sub-edge, b_O stays a part; ``"exclude"`` drops the constant part.
    """
    block = layer.block
    w_o = block.w_o(layer.query.shape[0])
    value = layer.value.float()
    constant = block.output_bias
    value_bias = block.value_bias(value.shape[0], value.shape[-1]) if bias != "value" and layer.sinks is None else None
    if value_bias is not None:
        value = value - value_bias[:, None]
        per_head = value_bias.repeat_interleave(w_o.shape[0] // value.shape[0], 0)
        through = torch.einsum("hd,hdm->m", per_head, w_o)
        constant = through if constant is None else constant + through
    whole = layer.resid_post if layer.resid_mid is None else layer.resid_mid
    return Parts(value, w_o, whole.float(), layer.resid_pre.float(), None if bias == "exclude" else constant)


def importances(layer: Layer, *, backend: str, dense: bool, floor: float, bias: str, threads: int) -> LayerImportances:
    """Exact importances of one layer (equation 5). ``ValueError`` naming the layer if an activation is NaN or infinite."""
    for name in ("resid_pre", "resid_mid", "ffn_out", "resid_post", "value"):
        tensor = getattr(layer, name)
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"layer {layer.index}: {name} holds NaN or infinite numbers; nothing can be said about this forward pass")
    parts = parts_of(layer, bias)
    ops = torch.ops.flowroutes
    residual = ops.part_proximity(parts.residual, parts.whole, backend, threads)
    constant = torch.zeros_like(residual)
    if parts.constant is not None:
        constant = ops.part_proximity(parts.constant[None], parts.whole, backend, threads)
    parallel = layer.resid_mid is None
    ffn = ops.part_proximity(layer.ffn_out.float(), layer.resid_post.float(), backend, threads)
    base = residual + constant + ffn if parallel else residual + constant
    attention, heads, normaliser, index, edge = ops.attention_layer(
        layer.query.float(), layer.key.float(), parts.value, parts.w_o, parts.whole, base, layer.mask, layer.sinks,
        layer.scaling, layer.softcap, layer.window, dense, -1.0 if dense else floor, backend, threads,
    )  # fmt: skip
    if parallel:
        ffn_share, ffn_residual = _divide(ffn, normaliser), torch.full_like(ffn, float("nan"))
    else:
        through = ops.part_proximity(layer.resid_mid.float(), layer.resid_post.float(), backend, threads)  # type: ignore[union-attr]
        ffn_share, ffn_residual = _divide(ffn, ffn + through), _divide(through, ffn + through)
    on_cpu = [t.cpu() for t in (heads, _divide(residual, normaliser), _divide(constant, normaliser), ffn_share, ffn_residual)]
    return LayerImportances(layer.block.shape, attention.cpu() if dense else None, (index.cpu(), edge.cpu()), *on_cpu)


def _divide(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total, 0)


def conservation_error(layer: Layer, bias: str = "part") -> float:
    """Largest |Σ parts − state| over both nodes of a layer, relative to the state's largest magnitude."""
    parts = parts_of(layer, bias)
    if bias == "exclude":
        raise ValueError("the parts do not add up when the bias part is excluded")
    pattern = reference.attention_pattern(
        layer.query.float(),
        layer.key.float(),
        scaling=layer.scaling,
        mask=layer.mask,
        softcap=layer.softcap,
        window=layer.window,
        sinks=layer.sinks,
    )
    group = parts.w_o.shape[0] // parts.value.shape[0]
    mixed = pattern @ parts.value.repeat_interleave(group, 0)  # [head, query, d_head]
    total = torch.einsum("hqd,hdm->qm", mixed, parts.w_o) + parts.residual
    if parts.constant is not None:
        total = total + parts.constant
    post = layer.resid_post.float()
    if layer.resid_mid is None:
        return _relative(total + layer.ffn_out.float(), post)
    return max(_relative(total, parts.whole), _relative(layer.resid_mid.float() + layer.ffn_out.float(), post))


def _relative(found: Tensor, state: Tensor) -> float:
    return float((found - state).abs().max() / state.abs().max().clamp_min(1e-30))
