"""The method in plain PyTorch, without cleverness: the oracle of the tests, and the backend that always works.

Equations are those of Ferrando & Voita, "Information Flow Routes" (arXiv 2403.00824). Every function computes in the
dtype of its inputs (fp64 in, fp64 out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowroutes_fast.system.ambient import matmul, unrounded

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
    return (norm(whole, distance_norm, dim=-1) - norm(part - whole, distance_norm, dim=-1)).clamp_min(0)  # type: ignore[no-any-return]


def signed_share(part: Tensor, whole: Tensor) -> Tensor:
    """Signed flow ⟨sign(y), z⟩ / ‖y‖₁ over the last dimension, broadcasting; over all parts of y it sums to 1 (0
    where y = 0).
    """
    norm = whole.abs().sum(-1)
    return (torch.copysign(torch.ones_like(whole), whole) * part).sum(-1) * torch.where(norm > 0, 1 / norm, 0)


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

    ``mask`` is additive, ``[query, key]`` or ``[head, query, key]``; None means causal, limited to ``window`` keys if
    positive. ``sinks [head]`` adds one logit to every softmax denominator.
    """
    group = query.shape[0] // key.shape[0]
    scores = matmul(query, key.repeat_interleave(group, 0).transpose(-1, -2)) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        n_query, n_key = scores.shape[-2:]
        i, j = (torch.arange(n, dtype=torch.int64, device=scores.device) for n in (n_query, n_key))
        age = (i[:, None] + n_key - n_query) - j
        hidden = (age < 0) | (age >= window) if window else age < 0
        scores = scores.masked_fill(hidden, float("-inf"))
    else:
        scores = scores + mask.to(scores.dtype)
    if sinks is None:
        return scores.softmax(-1)
    extended = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    return extended.softmax(-1)[..., :-1]


def sign_gradient(whole: Tensor, w_o: Tensor, gate: Tensor | None = None) -> Tensor:
    """g[i,h] = W_O[h] sign(y_i) ``[query, head, d_head]``, the sign bit as the sign of zero; times the output gate if
    there is one.

    ⟨sign(y_i), u[h,j]⟩ = ⟨v[h,j], g[i,h]⟩: a dot product over the head's width instead of the model's.
    """
    sign = torch.copysign(torch.ones_like(whole), whole)
    g = unrounded(lambda w_o, sign: torch.einsum("hdm,qm->qhd", w_o, sign), w_o, sign)
    return g if gate is None else g * gate


def sign_flow(
    pattern: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    *,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Signed flow ⟨sign(y_i), z⟩ of every sub-edge ``[head, query, key]``: summed over all parts it is ‖y_i‖₁ exactly.

    Its positive part bounds the proximity from above, since Σ_d min(w_d, 2|y_d| − w_d) ≤ Σ_d w_d.
    """
    group = pattern.shape[0] // value.shape[0]
    g = sign_gradient(whole, w_o, gate)
    flow = pattern * unrounded(lambda v, g: torch.einsum("hkd,qhd->hqk", v, g), value.repeat_interleave(group, 0), g)
    return flow if row_scale is None else flow * row_scale[:, None]


def bound_slack(pattern: Tensor, value: Tensor, g: Tensor, slack: float) -> Tensor:
    """What rounding ``g`` to a relative precision of ``slack`` can add to a sign bound: slack·α·‖v‖₂·‖g‖₂
    (Cauchy–Schwarz).
    """
    group = pattern.shape[0] // value.shape[0]
    length = torch.linalg.vector_norm(value, dim=-1).repeat_interleave(group, 0)  # [head, key]
    return slack * pattern * length[:, None] * torch.linalg.vector_norm(g, dim=-1).T[..., None]  # type: ignore[no-any-return]


def attention_proximity(
    pattern: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    distance_norm: float = 1,
    *,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Proximity of every sub-edge z = r_i·α[h,i,j]·(v[h,j] ∘ gate[i,h])·W_O[h] to y_i (equations 3 and 4).

    ``pattern [head, query, key]``, ``value [kv_head, key, d_head]``, ``w_o [head, d_head, d_model]``, ``whole [query,
    d_model]``, ``row_scale [query]`` (a linearised norm after attention) and ``gate [query, head, d_head]`` (an output
    gate) where the model has them -> ``[head, query, key]``. Queries are taken in chunks so that no more than 64 MB of
    terms exist at once.
    """
    n_head, n_query, n_key = pattern.shape
    group = n_head // value.shape[0]
    out = pattern.new_empty(pattern.shape)
    if row_scale is not None:
        pattern = pattern * row_scale[:, None]
    chunk = max(1, CHUNK_BYTES // (n_key * whole.shape[-1] * whole.element_size()))
    for head in range(n_head):
        v = value[head // group]
        u = matmul(v, w_o[head]) if gate is None else v
        for i in range(0, n_query, chunk):
            rows = slice(i, i + chunk)
            written = u if gate is None else matmul(u * gate[rows, head, None], w_o[head])
            z = pattern[head, rows, :, None] * written
            out[head, rows] = proximity(z, whole[rows, None], distance_norm)
    return out


def pair_proximity(
    pattern: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    index: Tensor,
    *,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Proximity of the sub-edges ``index [3, n]`` (query, key, head) alone -> ``[n]``."""
    query, key, head = index.long()
    group = pattern.shape[0] // value.shape[0]
    out = pattern.new_empty(index.shape[1])
    for h in head.unique().tolist():
        at = (head == h).nonzero()[:, 0]
        for part in at.split(max(1, CHUNK_BYTES // (whole.shape[-1] * whole.element_size()))):
            i, j = query[part], key[part]
            v = value[h // group, j]
            alpha = pattern[h, i, j]
            if gate is not None:
                v = v * gate[i, h]
            if row_scale is not None:
                alpha = alpha * row_scale[i]
            out[part] = proximity(matmul(alpha[:, None] * v, w_o[h]), whole[i])
    return out
