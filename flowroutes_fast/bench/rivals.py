"""Exact importances in plain PyTorch, as people write them; ``[head, query, key]``, not normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from flowroutes_fast.ops.attention import Attention


def materialised(a: Attention) -> Tensor:
    """A ``[query, key, head, d_model]`` tensor, then two norms: what the published tool does."""
    value = a.value.repeat_interleave(a.n_head // a.value.shape[0], 0)
    z = torch.einsum("hqk,hkd,hdm->qkhm", a.pattern, value, a.w_o)
    y = a.whole[:, None, None]
    return (y.abs().sum(-1) - (z - y).abs().sum(-1)).clamp_min(0).permute(2, 0, 1)


def chunked(a: Attention, queries: int = 32, keys: int = 128) -> Tensor:
    """32 queries × 128 keys at a time, all heads of a chunk together."""
    u = a.value.repeat_interleave(a.n_head // a.value.shape[0], 0) @ a.w_o
    pattern = a.pattern
    edge = torch.zeros_like(pattern)
    for i in range(0, a.n_query, queries):
        y = a.whole[i : i + queries, None]
        for j in range(0, min(i + queries, a.n_key), keys):
            z = pattern[:, i : i + queries, j : j + keys, None] * u[:, None, j : j + keys]
            edge[:, i : i + queries, j : j + keys] = (y.abs().sum(-1) - (y - z).abs().sum(-1)).clamp_min(0)
    return edge


def _tile(pattern: Tensor, u: Tensor, y: Tensor) -> Tensor:
    z = pattern[..., None] * u
    return (y.abs().sum(-1) - (y - z).abs().sum(-1)).clamp_min(0)


def chunked_by_head(a: Attention, tile=_tile) -> Tensor:  # type: ignore[no-untyped-def]
    """The same a head at a time: its temporaries stay in the cache."""
    pattern, group = a.pattern, a.n_head // a.value.shape[0]
    edge = torch.zeros_like(pattern)
    for h in range(a.n_head):
        u = a.value[h // group] @ a.w_o[h]
        for i in range(0, a.n_query, 32):
            y = a.whole[i : i + 32, None]
            for j in range(0, min(i + 32, a.n_key), 128):
                edge[h, i : i + 32, j : j + 128] = tile(pattern[h, i : i + 32, j : j + 128], u[j : j + 128], y)
    return edge


def compiled(a: Attention) -> Tensor:
    """The same with ``torch.compile`` fusing what happens to a tile."""
    return chunked_by_head(a, _compiled_tile())


_cache: list = []


def _compiled_tile():  # type: ignore[no-untyped-def]
    if not _cache:
        _cache.append(torch.compile(_tile, dynamic=False))
    return _cache[0]


RIVALS = {"materialised": materialised, "chunked": chunked, "chunked by head": chunked_by_head, "compiled": compiled}
