"""Importances by differences of norms: clipped at 1e-5, 1e-6 inside the distance, masked pairs counted as parts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pairwise_distance

LEAST = 1e-5


def _check(tensor: Tensor, rank: int) -> None:
    """The tool's functions are type-checked when they run."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != rank:
        raise TypeError(f"a floating point tensor of {rank} dimensions is needed")


def get_contributions(parts: Tensor, whole: Tensor, distance_norm: int = 1) -> Tensor:
    if not isinstance(distance_norm, int):
        raise TypeError("distance_norm must be an int")
    leading = parts.dim() - whole.dim()
    assert leading >= 0
    assert parts.shape[leading:] == whole.shape
    length = torch.norm(whole, p=distance_norm, dim=-1)
    near = (length - pairwise_distance(parts, whole.expand_as(parts), p=distance_norm)).clamp(min=LEAST)
    return near / near.sum(list(range(leading)), keepdim=True)


def get_contributions_with_one_off_part(
    parts: Tensor, one_off: Tensor, whole: Tensor, distance_norm: int = 1
) -> tuple[Tensor, Tensor]:
    assert one_off.shape == whole.shape
    leading = parts.shape[: parts.dim() - whole.dim()]
    together = torch.cat([parts.reshape(-1, *whole.shape), one_off[None]])
    shares = get_contributions(together, whole, distance_norm)
    return shares[:-1].reshape(*leading, *whole.shape[:-1]), shares[-1]


def get_attention_contributions(
    resid_pre: Tensor, resid_mid: Tensor, decomposed_attn: Tensor, distance_norm: int = 1
) -> tuple[Tensor, Tensor]:
    _check(resid_pre, 3)
    _check(resid_mid, 3)
    _check(decomposed_attn, 5)
    by_source = decomposed_attn.permute(2, 3, 0, 1, 4)  # [key, head, batch, query, d_model]
    shares, residual = get_contributions_with_one_off_part(by_source, resid_pre, resid_mid, distance_norm)
    return shares.permute(2, 3, 0, 1), residual


def get_mlp_contributions(
    resid_mid: Tensor, resid_post: Tensor, mlp_out: Tensor, distance_norm: int = 1
) -> tuple[Tensor, Tensor]:
    for state in (resid_mid, resid_post, mlp_out):
        _check(state, 3)
    ffn, residual = get_contributions(torch.stack([mlp_out, resid_mid]), resid_post, distance_norm)
    return ffn, residual


def get_decomposed_mlp_contributions(
    resid_mid: Tensor, resid_post: Tensor, decomposed_mlp_out: Tensor, distance_norm: int = 1
) -> tuple[Tensor, float]:
    _check(resid_mid, 1)
    _check(resid_post, 1)
    _check(decomposed_mlp_out, 2)
    neurons, residual = get_contributions_with_one_off_part(decomposed_mlp_out, resid_mid, resid_post, distance_norm)
    return neurons, float(residual)


def apply_threshold_and_renormalize(threshold: float, c_blocks: Tensor, c_residual: Tensor) -> tuple[Tensor, Tensor]:
    assert c_blocks.shape[: c_residual.dim()] == c_residual.shape
    blocks = torch.where(c_blocks > threshold, c_blocks, 0.0)
    residual = torch.where(c_residual > threshold, c_residual, 0.0)
    block_dims = list(range(c_residual.dim(), c_blocks.dim()))
    total = residual + blocks.sum(block_dims)  # without block dimensions this is the sum of everything, as in the tool
    return blocks / total[(...,) + (None,) * len(block_dims)], residual / total
