"""A model run on some of its sub-edges: the others are removed, or replaced by their head's mean value.

Attention becomes Σ_j k·α·v_j + Σ_j (1 − k)·α·v̄ with a mask k ``[head, query, key]`` per layer and the head's mean
value v̄ (0 where sub-edges are removed). FFNs, residual connections, norms and biases behind the heads stay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import (
    Layer,
    attention_configs,
    attention_functions,
    capture,
    forward_options,
    undisturbed,
    unwrap,
)
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.models.heads import check_predicts_tokens
from flowroutes_fast.ops.reference import attention_pattern
from flowroutes_fast.system.ambient import neutral
from flowroutes_fast.tracing.prompts import token_ids
from flowroutes_fast.tracing.trace import check_weights

NAME = "flowroutes_ablation"
ATTENTION = ("live", "frozen")
WEIGHTS = ("positions", "attention")
BATCH_TOKENS = 1024  # masks of one prompt run together up to so many tokens
BATCH_WEIGHTS = 2**26  # and so many attention weights of a layer
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class _Job:
    """What one attention module does in the runs under way."""

    # [head, query, key] or [batch, head, query, key], bool, or float for a share; None: everything
    keep: Tensor | None = None
    mean: Tensor | None = None  # [head, d_head]
    pattern: Tensor | None = None  # [head, query, key]: attention weights to use instead of the run's own
    calls: int = 0
    seen: Tensor | None = field(default=None, repr=False)  # [batch, head, query, key]: the weights of the last call


class _Here(threading.local):
    """Jobs of the runs of this thread, by id(attention module)."""

    def __init__(self) -> None:
        self.jobs: dict[int, _Job] = {}


_here = _Here()


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Attention weights ``[batch, head, query, key]`` in float32 at least, as the model's own function computes
    them.
    """
    n_query, n_key = query.shape[-2], key.shape[-2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = options.get("scaling")
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(-1, -2)).to(dtype) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        age = torch.arange(n_key - n_query, n_key, device=scores.device)[:, None] - torch.arange(
            n_key, device=scores.device
        )
        window = options.get("sliding_window") or n_key
        scores = scores.masked_fill((age < 0) | (age >= window), float("-inf"))
    else:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if (sinks := options.get("s_aux")) is None:
        return scores.softmax(-1)
    sinks = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """The attention function of an ablated run."""
    job = _here.jobs[id(module)]
    job.calls += 1
    weights = (
        _weights(query, key, attention_mask, options)
        if job.pattern is None
        else job.pattern[None].expand(len(query), -1, -1, -1)
    )
    job.seen = weights
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if job.keep is None:
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None
    if job.keep.shape[-3] != weights.shape[1]:
        raise ValueError(f"a mask has {job.keep.shape[-3]} heads where the model has {weights.shape[1]}")
    if job.mean is not None and tuple(job.mean.shape) != (value.shape[1], value.shape[3]):
        raise ValueError(
            f"a layer's means have shape {list(job.mean.shape)}; they must be [head, d_head], {list(value.shape[1::2])}"
        )
    kept = weights * job.keep
    out = kept.to(value.dtype) @ value
    if job.mean is not None:
        dropped = (weights - kept).sum(-1, keepdim=True).to(value.dtype)
        out = out + dropped * job.mean.to(value)[:, None]
    return out.transpose(1, 2).contiguous(), None


def attention_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model whose sub-edges can be ablated; ``ValueError`` where attention cannot be replaced."""
    blocks = blocks_of(model)
    for block in blocks:
        if block.attention is None:
            raise ValueError(
                f"layer {block.index} of this {block.family.name} model has no attention weights, so its sub-edges "
                f"cannot be ablated"
            )
        if block.family.hooked:
            raise ValueError(
                f"the attention of {block.family.name} does not go through transformers' attention interface, so its "
                f"sub-edges cannot be ablated"
            )
    check_weights(model)
    check_predicts_tokens(model)
    return blocks


@contextmanager
def _ablating(model: Any, blocks: list[Block], jobs: Sequence[_Job]) -> Iterator[None]:
    """While this lasts, attention is ours; implementation, training mode and compiled modules come back as they
    were.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attention)
    # an additive mask, always: windows and chunks are in it
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    names = dict.fromkeys(attention_configs(model, blocks), NAME)
    before = _here.jobs
    with undisturbed(model), attention_functions(names):
        _here.jobs = before | {id(block.attention): job for block, job in zip(blocks, jobs, strict=True)}
        try:
            yield
        finally:
            _here.jobs = before


def _logits(model: Any, blocks: list[Block], ids: Tensor) -> Tensor:
    """Logits after the last position ``[batch, vocabulary]``, float32."""
    output = model(input_ids=ids, **forward_options(model, None, 1, blocks[0].family.last_logits))
    return output.logits[:, -1].float()


@dataclass
class Clean:
    """The whole model on one prompt: logits after the last position ``[vocabulary]`` and attention weights per
    layer ``[head, query, key]``.
    """

    ids: list[int]
    logits: Tensor
    patterns: list[Tensor]

    @property
    def causal(self) -> Tensor:
        """Which (query, key) pairs can be sub-edges, ``[query, key]``."""
        return torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril()

    @property
    def sub_edges(self) -> int:
        """How many sub-edges the graph of this prompt has."""
        return sum(p.shape[0] for p in self.patterns) * len(self.ids) * (len(self.ids) + 1) // 2


@neutral()
def clean(model: Any, ids: Sequence[int]) -> Clean:
    """Run the whole model, once as it is and once with all sub-edges kept by our attention.

    ``ValueError`` if the two disagree: then this model's attention does something that an ablated run would not do.
    """
    model = unwrap(model)
    blocks = attention_blocks(model)
    ids = token_ids(model, None, torch.as_tensor(ids))
    batch = torch.tensor([ids], device=_device(model))
    jobs = [_Job() for _ in blocks]
    with torch.no_grad():
        with undisturbed(model):
            logits = _logits(model, blocks, batch)[0]
        with _ablating(model, blocks, jobs):
            ours = _logits(model, blocks, batch)[0]
    for block, job in zip(blocks, jobs, strict=True):
        if job.calls != 1 or job.seen is None:
            raise ValueError(f"layer {block.index} called the attention interface {job.calls} times instead of once")
    error = float((ours - logits).abs().max() / logits.abs().max().clamp_min(1))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if not error <= _TOLERANCE.get(dtype, 1e-4):
        raise ValueError(
            f"with all sub-edges kept, the logits of this {blocks[0].family.name} model differ by {error:.1e} "
            f"relative from its own: its "
            "attention does something that an ablated run would not do"
        )
    return Clean(list(ids), logits, [job.seen[0] for job in jobs])  # type: ignore[index]


@neutral()
def kept_logits(
    model: Any,
    ids: Sequence[int],
    keep: Sequence[Tensor],
    *,
    means: Sequence[Tensor] | None = None,
    attention: str = "live",
    patterns: Sequence[Tensor] | None = None,
) -> Tensor:
    """Logits after the last position when only some sub-edges are there.

    Args:
        model: a transformers decoder; it comes back unchanged, also after an exception.
        ids: one prompt, ``[token]``.
        keep: per layer ``[head, query, key]``, or ``[batch, head, query, key]`` for several masks of the same prompt;
            bool, or a share in [0, 1] of the sub-edge that stays.
        means: per layer the mean values ``[head, d_head]`` (see :func:`value_means`) that take a dropped sub-edge's
            place, times its attention weight; None: it is removed.
        attention: ``"live"``: attention weights are those of the ablated run, which is then a run of the model that
            sees nothing but the sub-edges kept; ``"frozen"``: those of the whole model, as the definition of a sub-edge
            holds them constant. Live is the default since frozen weights carry what the dropped sub-edges brought to
            queries and keys.
        patterns: for ``"frozen"``, per layer ``[head, query, key]``; None: they are computed.

    Returns:
        ``[vocabulary]``, or ``[batch, vocabulary]``; float32. With float masks that require it, it has a gradient.

    Raises:
        ValueError: masks or means of a wrong shape, an unknown option, a model whose attention cannot be replaced.
    """
    if attention not in ATTENTION:
        raise ValueError(f"unknown attention {attention!r}: choose 'live' or 'frozen'")
    model = unwrap(model)
    blocks = attention_blocks(model)
    device = _device(model)
    check_masks(keep, len(blocks), len(ids))
    if means is not None and len(means) != len(blocks):
        raise ValueError(f"means hold {len(means)} layers, the model has {len(blocks)}: they belong to another model")
    if attention == "frozen" and patterns is None:
        patterns = clean(model, ids).patterns
    several = keep[0].dim() == 4
    n_masks = len(keep[0]) if several else 1
    together = max(1, min(BATCH_TOKENS // len(ids), BATCH_WEIGHTS // (keep[0].shape[-3] * len(ids) ** 2)))
    found = []
    with torch.set_grad_enabled(any(k.requires_grad for k in keep)):
        for start in range(0, n_masks, together):
            part = slice(start, start + together)
            jobs = [
                _Job(
                    (k[part] if several else k).to(device),
                    None if means is None else means[layer].to(device),
                    patterns[layer].to(device) if attention == "frozen" and patterns is not None else None,
                )
                for layer, k in enumerate(keep)
            ]
            with _ablating(model, blocks, jobs):
                batch = torch.tensor([list(ids)], device=device).expand(min(together, n_masks - start), -1)
                found.append(_logits(model, blocks, batch))
    logits = torch.cat(found)
    return logits if several else logits[0]


@neutral()
def value_means(model: Any, tokenizer: Any, texts: Sequence[Any], *, weights: str = "attention") -> list[Tensor]:
    """The mean value of every head over a corpus: per layer ``[head, d_head]``, float32.

    ``weights="attention"``: every position counts by the attention that a head pays to it from all positions, so that a
    row whose sub-edges are all dropped gets its head's mean output. ``"positions"``: all positions count alike. The two
    differ where heads rest on the first token, whose value is small: the mean over positions then replaces next to
    nothing by something, and a route by importance, which leaves these sub-edges out, looks worse than it is. Texts are
    strings or lists of ids.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}: choose 'positions' or 'attention'")
    if isinstance(texts, str) or not len(texts):
        raise ValueError("value_means needs a list of texts, at least one")
    model = unwrap(model)
    blocks = attention_blocks(model)
    sums: list[Any] = [0.0] * len(blocks)
    counts: list[Any] = [0.0] * len(blocks)
    for text in texts:
        ids = token_ids(model, tokenizer, text)

        def add(layer: Layer) -> None:
            value = layer.value.double()  # type: ignore[union-attr]
            paid = value.new_ones(len(layer.query), value.shape[1])  # type: ignore[arg-type]
            if weights == "attention":
                paid = (
                    attention_pattern(
                        layer.query.float(),  # type: ignore[union-attr]
                        layer.key.float(),  # type: ignore[union-attr]
                        scaling=layer.scaling,
                        mask=layer.mask,
                        softcap=layer.softcap,
                        window=layer.window,
                        sinks=None if layer.sinks is None else layer.sinks.float(),
                    )
                    .sum(1)
                    .double()
                )  # [head, key]
            sums[layer.index] += torch.einsum("hk,hkd->hd", paid, value.repeat_interleave(len(paid) // len(value), 0))
            counts[layer.index] += paid.sum(1, keepdim=True)

        capture(model, torch.tensor([ids], device=_device(model)), add)
    return [(s / c).float().cpu() for s, c in zip(sums, counts, strict=True)]


def check_masks(keep: Sequence[Tensor], layers: int, tokens: int) -> None:
    if len(keep) != layers:
        raise ValueError(f"keep has masks for {len(keep)} layers, the model has {layers}")
    for layer, mask in enumerate(keep):
        if (
            mask.dim() not in (3, 4)
            or tuple(mask.shape[-2:]) != (tokens, tokens)
            or mask.shape[:-3] != keep[0].shape[:-3]
        ):
            raise ValueError(
                f"the mask of layer {layer} has shape {list(mask.shape)}; it must be [head, query, key] "
                f"of {tokens} tokens"
            )


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


Objective = Callable[[Tensor], Tensor]


@neutral()
def mask_gradient(
    model: Any,
    ids: Sequence[int],
    keep: Sequence[Tensor],
    objective: Objective,
    *,
    means: Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Derivative of ``objective(logits)`` by every entry of the masks ``keep`` (per layer ``[head, query, key]``): one
    forward and one backward pass.

    It is, to first order, what a sub-edge contributes to the objective where it is there and its replacement is not.
    """
    masks = [k.detach().float().requires_grad_() for k in keep]
    with torch.enable_grad():
        value = objective(kept_logits(model, ids, masks, means=means, **options))
        return list(torch.autograd.grad(value, masks))
