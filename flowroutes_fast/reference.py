"""The method in plain PyTorch, without cleverness: the oracle of the tests, and the backend that always works.

Equations are those of Ferrando & Voita, "Information Flow Routes" (arXiv 2403.00824). Every function computes in the
dtype of its inputs (fp64 in, fp64 out).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


def proximity(part: Tensor, whole: Tensor, distance_norm: float = 1) -> Tensor:
    """max(‖y‖ − ‖z − y‖, 0) over the last dimension (equation 4), broadcasting.

    For the L1 norm it is summed termwise, Σ_d min(w_d, 2|y_d| − w_d) with w = sign(y)·z: the difference of two large
    norms would cancel.
    """
    if distance_norm == 1:
        sign = torch.copysign(torch.ones_like(whole), whole)
        w = sign * part
        return torch.minimum(w, 2 * whole.abs() - w).sum(-1).clamp_min(0)
    norm = torch.linalg.vector_norm
    return (norm(whole, distance_norm, dim=-1) - norm(part - whole, distance_norm, dim=-1)).clamp_min(0)


def attention_pattern(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention weights α ``[head, query, key]`` from ``query [head, query, d]`` and ``key [kv_head, key, d]``.

    ``mask`` is additive, ``[query, key]`` or ``[head, query, key]``; None means causal, limited to ``window`` keys if positive.
    ``sinks [head]`` adds one logit to every softmax denominator.
    """
    group = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(group, 0).transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        n_query, n_key = scores.shape[-2:]
        age = (torch.arange(n_query)[:, None] + n_key - n_query) - torch.arange(n_key)
        hidden = (age < 0) | ((age >= window) if window else torch.zeros((), dtype=torch.bool))
        scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
    else:
        scores = scores + mask.to(scores.dtype)
    if sinks is None:
        return scores.softmax(-1)
    extended = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return extended.softmax(-1)[..., :-1]


def attention_proximity(pattern: Tensor, value: Tensor, w_o: Tensor, whole: Tensor, distance_norm: float = 1) -> Tensor:
    """Proximity of every sub-edge z = α[h,i,j]·v[h,j]·W_O[h] to y_i (equations 3 and 4).

    ``pattern [head, query, key]``, ``value [kv_head, key, d_head]``, ``w_o [head, d_head, d_model]``, ``whole [query, d_model]``
    -> ``[head, query, key]``. Queries are taken in chunks so that no more than 64 MB of terms exist at once.
    """
    n_head, n_query, n_key = pattern.shape
    group = n_head // value.shape[0]
    out = pattern.new_empty(pattern.shape)
    chunk = max(1, CHUNK_BYTES // (n_key * whole.shape[-1] * whole.element_size()))
    for head in range(n_head):
        u = value[head // group] @ w_o[head]
        for i in range(0, n_query, chunk):
            z = pattern[head, i : i + chunk, :, None] * u
            out[head, i : i + chunk] = proximity(z, whole[i : i + chunk, None], distance_norm)
    return out
