"""What heads write: right singular vectors of W_V W_O on the unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowroutes_fast.capture.hooks import unwrap
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.models.tokens import token_texts
from flowroutes_fast.models.weights import effective_weight

TOGETHER = 16  # heads whose vectors meet the unembedding at a time: it is read once for all of them


@dataclass
class Concepts:
    """``table``: ``layer, head, rank, sign, sigma, share, tokens``; tokens are a list of texts, the strongest first.

    ``sigma`` is the singular value, ``share`` its square over the sum of all of this head's.
    """

    table: pd.DataFrame

    def search(self, text: str, heads: list[tuple[int, int]] | None = None) -> pd.DataFrame:
        """Rows with a top token that contains ``text`` (any case), of these heads alone if given."""
        found = self.table[[any(text.lower() in token.lower() for token in tokens) for tokens in self.table["tokens"]]]
        return (
            found if heads is None else found[[key in heads for key in zip(found["layer"], found["head"], strict=True)]]
        )

    def of(self, layer: int, head: int) -> pd.DataFrame:
        return self.table[(self.table["layer"] == layer) & (self.table["head"] == head)]


def concepts(
    model: Any,
    tokenizer: Any,
    *,
    rank: int = 5,
    top: int = 10,
    heads: list[tuple[int, int]] | None = None,
    progress: bool = False,
) -> Concepts:
    """Singular value decomposition of every head's W_OV = W_V W_O = U Σ Vᵀ, and the tokens its right singular vectors
    promote.

    W_OV is never formed: with W_V = Q_V R_V and W_Oᵀ = Q_O R_O (d_model × d_head), R_V R_Oᵀ (d_head × d_head) has the
    same singular values, and V = Q_O V'. Each vector, with both signs, goes through the final norm's gain and the
    unembedding. Gains of norms after attention are part of W_O; norms before it are not part of W_V.

    Args:
        rank: singular vectors per head. top: tokens per vector. heads: ``(layer, head)`` pairs; None for all.

    Raises:
        ValueError: a model without an unembedding, or without plain value projections (latent attention); a head that
            is not there.
    """
    model = unwrap(model)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError("concepts need an unembedding; this model has none")
    for name, value in (("rank", rank), ("top", top)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    blocks = blocks_of(model)
    wanted = None if heads is None else set(heads)
    with torch.no_grad():
        unembedding = effective_weight(head, -1)  # [token, d_model]
        gain, centred = _gain(_final_norm(model), unembedding)
        rows: list[dict[str, Any]] = []
        seen: set[tuple[int, int]] = set()
        for block in tqdm(blocks, desc="layers", disable=not progress):
            if block.attention is None or (wanted is not None and not any(layer == block.index for layer, _ in wanted)):
                continue
            found = [f for f in _decomposed(block, rank) if wanted is None or (block.index, f[0]) in wanted]
            seen |= {(block.index, index) for index, _, _ in found}
            for first in range(0, len(found), TOGETHER):
                some = found[first : first + TOGETHER]
                vectors = torch.stack([v for _, _, v in some])
                logits = ((vectors - vectors.mean(-1, keepdim=True) if centred else vectors) * gain) @ unembedding.T
                for (index, sigma, _), one in zip(some, logits, strict=True):
                    rows += _tokens(block.index, index, sigma, one, tokenizer, rank, top)
    if wanted is not None and wanted - seen:
        layer, index = min(wanted - seen)
        raise ValueError(f"there is no head L{layer}H{index} in this model, or it has no attention weights")
    return Concepts(pd.DataFrame(rows))


def _decomposed(block: Block, rank: int) -> Any:
    """Per head: its number, all singular values, and the first right singular vectors ``[rank, d_model]``."""
    if block.values is None or block.output is None:
        raise ValueError(
            f"layer {block.index} of this {block.family.name} model has no plain value projection (latent attention)"
        )
    read = effective_weight(block.values, block.index).T  # [d_model, out]
    attention: Any = block.attention
    w_v = block.family.value_of(attention, read[None])[0]  # [kv_head, d_model, d_head]
    count = effective_weight(block.output, block.index).shape[1] // w_v.shape[-1]
    w_o = block.w_o(count)
    if block.post_norm is not None:
        w_o = w_o * _gain(block.post_norm, w_o)[0]
    group = count // len(w_v)
    q_v, r_v = torch.linalg.qr(w_v)
    q_o, r_o = torch.linalg.qr(w_o.transpose(1, 2))
    del q_v
    _, sigma, v = torch.linalg.svd(r_v.repeat_interleave(group, 0) @ r_o.transpose(1, 2))
    first = v[:, :rank] @ q_o.transpose(1, 2)
    return zip(range(count), sigma, first, strict=True)


def _tokens(
    layer: int, head: int, sigma: Tensor, logits: Tensor, tokenizer: Any, rank: int, top: int
) -> list[dict[str, Any]]:
    """Rows of a head, of ``logits [rank, token]``."""
    share = sigma.square() / sigma.square().sum()
    found = []
    for place in range(min(rank, len(sigma))):
        for sign in (1, -1):
            best = (sign * logits[place]).topk(min(top, logits.shape[-1])).indices.tolist()
            tokens = token_texts(tokenizer, best)
            row = {
                "layer": layer,
                "head": head,
                "rank": place,
                "sign": sign,
                "sigma": float(sigma[place]),
                "share": float(share[place]),
            }
            found.append(row | {"tokens": tokens})
    return found


def _final_norm(model: Any) -> nn.Module | None:
    """The norm before the unembedding: the last one outside the layers."""
    inside = {id(m) for block in blocks_of(model) for m in block.module.modules()}
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]
    return norms[-1] if norms else None


def _gain(norm: nn.Module | None, like: Tensor) -> tuple[Tensor, bool]:
    """What a norm multiplies channels by (up to one factor), and whether it subtracts the mean: found by asking it."""
    width = like.shape[-1]
    if norm is None:
        return torch.ones(width, device=like.device), False
    weight = next((p for p in norm.parameters() if not p.is_meta), like)
    ones = torch.ones(1, width, dtype=weight.dtype, device=weight.device)
    signs = ones * (1 - 2 * (torch.arange(width, device=ones.device) % 2))
    with torch.no_grad():
        gain = (norm(signs) - norm(-signs))[0].float() / 2 * signs[0].float()
        centred = bool(torch.allclose(norm(ones), norm(-ones), atol=1e-3 * float(gain.abs().max())))
    return gain.to(like.device), centred
