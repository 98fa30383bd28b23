"""Activation patching of heads and attention edges: the method that routes are compared with. It needs a second prompt
and a metric.

A head's output before W_O at query i is z[i] = Σ_j α[i, j] v[j]. With the values z', v' of a corrupted prompt, patching
a head puts z' in z's place; patching the edge (i, j) adds α[i, j] (v'[j] − v[j]) to z[i], with α of the clean prompt.
The model goes on from there. Both happen at the input of the module that W_O is (where a norm stands before it, at the
norm's input).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import Layer, capture, forward_options, masked, only_here, prepared, rows_of, unwrap
from flowroutes_fast.loading.streaming import stream_of
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.models.heads import check_predicts_tokens
from flowroutes_fast.models.tokens import single_token
from flowroutes_fast.ops import reference
from flowroutes_fast.system.ambient import in_neutral
from flowroutes_fast.tracing.prompts import token_ids
from flowroutes_fast.tracing.trace import check_weights

WHAT = ("heads", "edges")
METRICS = ("logit_difference", "probability")
DEVIATION = 0.05  # of z: far above rounding in bfloat16, far below another layout of heads
Answer = str | int | Sequence[str] | Sequence[int]


@dataclass
class Patch:
    """What one head's output before W_O becomes at some positions: ``z [position, d_head]`` instead of it, or added
    to it.
    """

    layer: int
    head: int
    positions: Tensor
    z: Tensor
    add: bool = False


@dataclass
class Recorded:
    """One prompt's forward pass. By layer: z ``[token, head, d_head]``, values ``[head, key, d_head]``, and at the
    asked-for queries α ``[head, query, key]`` and the output gate ``[query, head, d_head]`` or None; the logits
    ``[vocabulary]`` after the last token."""

    z: dict[int, Tensor]
    value: dict[int, Tensor]
    pattern: dict[int, Tensor]
    gate: dict[int, Tensor | None]
    logits: Tensor


@in_neutral
def patching(
    model: nn.Module,
    tokenizer: Any,
    clean: Any,
    corrupted: Any,
    answer: Answer,
    wrong: Answer | None = None,
    *,
    what: str = "heads",
    metric: str = "logit_difference",
    positions: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    batch: int = 16,
) -> pd.DataFrame:
    """How far the metric moves from the clean prompt towards the corrupted one if one head, or one attention edge, sees
    the latter.

    Args:
        model, tokenizer: as for :func:`flowroutes_fast.trace`; streamed models are refused. The model comes back
            unchanged.
        clean, corrupted: prompts, or ids ``[token]``, with equally many tokens. Swapped, they ask what a head restores
            instead of breaks.
        answer, wrong: next tokens as texts (with their leading space) or ids, one or several; ``wrong`` may be None
            with ``metric="probability"``.
        what: ``"heads"``: a forward pass per head; ``"edges"``: one per (head, query, key) with a weight that is not 0,
            of which there are many: restrict them.
        metric: ``"logit_difference"``: mean logit of ``answer`` − mean logit of ``wrong``; ``"probability"``: summed
            probability of ``answer`` − that of ``wrong``. Both after the last token.
        positions: heads: where their outputs are replaced, all at once; None: everywhere. Edges: the query positions;
            None: the last.
        layers: these alone; None: all that have attention weights. heads: these (layer, head) alone.
        batch: how many patched copies of the prompt run in one forward pass.

    Returns:
        A table ``layer, head, metric, change, effect`` (edges: ``layer, query, key, head, ...``): the metric of the
        patched run, its change over the clean one, and change / (corrupted − clean): 0 where the patch does nothing, 1
        where it does as much as the whole corrupted prompt, NaN if the prompts do not differ in the metric.
        ``table.attrs``: ``clean`` and ``corrupted`` (metrics), ``forward_passes`` (calls of the model), ``runs``
        (prompts that went through it), ``seconds``.

    Raises:
        ValueError: prompts of different lengths, an answer that is no single token or missing, an unknown option,
            layer, head or family, a layer whose W_O is not a module of its own. IndexError: position out of range.
            TypeError: a text of a wrong type.
    """
    start = time.perf_counter()
    for name, value, known in (("what", what, WHAT), ("metric", metric, METRICS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, known))}")
    if metric == "logit_difference" and wrong is None:
        raise ValueError(
            "metric='logit_difference' needs wrong=: the token that the answer is compared with; or use "
            "metric='probability'"
        )
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    model = unwrap(model)
    blocks = blocks_of(model)
    if stream_of(model) is not None:
        raise ValueError(
            "a streamed model reads its weights from disk for every forward pass, and patching takes "
            "hundreds: load it whole"
        )
    check_weights(model)
    check_predicts_tokens(model)
    ids, other = (token_ids(model, tokenizer, text) for text in (clean, corrupted))
    if len(ids) != len(other):
        raise ValueError(
            f"the prompts have {len(ids)} and {len(other)} tokens: patching puts positions in each other's place, so "
            f"they must agree"
        )
    right, left = (
        _tokens(model, tokenizer, answer, "answer"),
        [] if wrong is None else _tokens(model, tokenizer, wrong, "wrong"),
    )
    rows = _positions(positions, len(ids), what)
    chosen = _chosen(blocks, layers, heads)
    a, b = (record(model, x, chosen, rows) for x in (ids, other))
    asked = _heads(chosen, heads, len(blocks), a)
    table, patches = (_of_edges if what == "edges" else _of_heads)(asked, rows, a, b)

    def score(logits: Tensor) -> list[float]:
        value = logits.float() if metric == "logit_difference" else logits.float().softmax(-1)
        reduce: Callable[..., Tensor] = torch.mean if metric == "logit_difference" else torch.sum
        return (reduce(value[..., right], -1) - (reduce(value[..., left], -1) if left else 0)).tolist()

    found: list[float] = []
    for first in range(0, len(patches), batch):
        found += score(patched_logits(model, ids, [[patch] for patch in patches[first : first + batch]]))
    clean_metric, corrupted_metric = score(torch.stack([a.logits, b.logits]))
    table = table.assign(metric=found)
    table["change"] = table["metric"] - clean_metric
    difference = corrupted_metric - clean_metric
    table["effect"] = table["change"] / difference if difference else float("nan")
    table.attrs = {
        "clean": clean_metric,
        "corrupted": corrupted_metric,
        "forward_passes": 2 + -(-len(patches) // batch),
        "runs": 2 + len(patches),
        "seconds": time.perf_counter() - start,
    }
    return table


def record(model: nn.Module, ids: list[int], layers: Sequence[int], queries: Tensor) -> Recorded:
    """Run the model once; keep what patches of ``layers`` are made of (float tensors as the model computed them)."""
    blocks = blocks_of(model)
    flat: dict[int, Tensor] = {}
    found = Recorded({}, {}, {}, {}, torch.empty(0))

    def keep(layer: Layer) -> None:
        if layer.index not in layers or layer.query is None or layer.key is None or layer.value is None:
            return
        n, few = layer.query.shape[0], masked(rows_of(layer, queries))
        if layer.index not in flat:
            raise ValueError(
                f"layer {layer.index}: nothing went through W_O, so that this {layer.block.family.name} model's heads "
                f"cannot be patched"
            )
        found.z[layer.index] = flat.pop(layer.index).unflatten(-1, (n, -1))
        found.value[layer.index] = layer.value.repeat_interleave(n // layer.value.shape[0], 0)
        found.pattern[layer.index] = reference.attention_pattern(
            few.query,  # type: ignore[arg-type]
            layer.key,  # type: ignore[arg-type]
            scaling=layer.scaling,
            mask=few.mask,
            softcap=layer.softcap,
            window=few.window,
            sinks=layer.sinks,
        )
        found.gate[layer.index] = None if few.gate is None else few.gate.clone()
        _check(found, layer.index, queries)

    def entry(block: Block) -> Callable[[Tensor], None]:
        return lambda z: flat.update({block.index: z.detach().reshape(len(ids), -1).clone()})

    with _hooked([(block, entry(block)) for block in blocks if block.index in layers]):
        output = capture(model, _on_device(model, [ids]), keep, logits_to_keep=1)
    found.logits = output.logits[0, -1]
    return found


def _check(found: Recorded, layer: int, queries: Tensor) -> None:
    """``ValueError`` unless the heads' outputs are what attention weights and values make of them."""
    z = found.z[layer][queries].transpose(0, 1).float()
    gate, made = found.gate[layer], found.pattern[layer].float() @ found.value[layer].float()
    if gate is not None:
        made = made * gate.transpose(0, 1)
    if made.shape != z.shape or not float((made - z).abs().max()) <= DEVIATION * float(z.abs().max()) + 1e-6:
        raise ValueError(
            f"layer {layer}: what enters W_O is not the heads' weighted values, so that its heads cannot be patched"
        )


def patched_logits(model: nn.Module, ids: list[int], copies: Sequence[Sequence[Patch]]) -> Tensor:
    """Logits ``[copy, vocabulary]`` after the last token, of copies of one prompt with patches of their own, in one
    forward pass.
    """
    model = unwrap(model)
    blocks = blocks_of(model)
    at: dict[int, list[tuple[int, Patch]]] = {}
    for copy, patches in enumerate(copies):
        for patch in patches:
            at.setdefault(patch.layer, []).append((copy, patch))

    def entry(block: Block) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            changed = z.clone()
            view = changed.view(len(copies), len(ids), -1)
            for copy, patch in at[block.index]:
                width = patch.z.shape[-1]
                place = (copy, patch.positions.to(z.device), slice(patch.head * width, (patch.head + 1) * width))
                value = patch.z.to(z.device, torch.float32 if patch.add else z.dtype)
                view[place] = (view[place].float() + value).to(z.dtype) if patch.add else value
            return changed

        return change

    with prepared(model, blocks), _hooked([(block, entry(block)) for block in blocks if block.index in at]):
        options = forward_options(model, None, 1, blocks[0].family.last_logits)
        return model(input_ids=_on_device(model, [ids] * len(copies)), **options).logits[:, -1]


@contextmanager
def _hooked(entries: list[tuple[Block, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """While this lasts, what enters W_O (or the norm before it) goes through a function; None leaves it."""
    handles = []

    def hook(function: Callable[[Tensor], Tensor | None]) -> Any:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args:
                new = function(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            name = next(iter(kwargs))
            new = function(kwargs[name])
            return None if new is None else ((), kwargs | {name: new})

        return before

    try:
        for block, function in entries:
            module = block.inner_norm if block.inner_norm is not None else block.output
            handles.append(module.register_forward_pre_hook(only_here(hook(function)), with_kwargs=True))  # type: ignore[union-attr]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_heads(asked: list[tuple[int, int]], rows: Tensor, a: Recorded, b: Recorded) -> tuple[pd.DataFrame, list[Patch]]:
    patches = [Patch(layer, head, rows, b.z[layer][rows, head]) for layer, head in asked]
    return pd.DataFrame(asked, columns=["layer", "head"]), patches


def _of_edges(asked: list[tuple[int, int]], rows: Tensor, a: Recorded, b: Recorded) -> tuple[pd.DataFrame, list[Patch]]:
    index, patches = [], []
    for layer, head in asked:
        moved = (b.value[layer][head] - a.value[layer][head]).float()
        for n, query in enumerate(rows.tolist()):
            gate, weight = a.gate[layer], a.pattern[layer][head, n].float()
            for key in weight.nonzero()[:, 0].tolist():
                delta = weight[key] * moved[key] * (1.0 if gate is None else gate[n, head])
                index.append((layer, query, key, head))
                patches.append(Patch(layer, head, rows[n : n + 1], delta[None], add=True))
    return pd.DataFrame(index, columns=["layer", "query", "key", "head"]), patches


def _chosen(blocks: list[Block], layers: Sequence[int] | None, heads: Sequence[tuple[int, int]] | None) -> list[int]:
    """Indices of the layers to patch."""
    if layers is not None and heads is not None:
        raise ValueError("give layers= or heads=, not both")
    if layers is None and heads is None:
        return [block.index for block in blocks if block.output is not None]
    named = [layer for layer, _ in heads] if heads is not None else list(layers or [])
    if not named:
        raise ValueError(f"{'layers' if heads is None else 'heads'} is empty: there is nothing to patch")
    for layer in named:
        if not -len(blocks) <= layer < len(blocks):
            raise ValueError(f"layer {layer} is out of range: the model has {len(blocks)} layers")
        if blocks[layer].output is None:
            raise ValueError(f"layer {layer} has no attention heads to patch")
    return sorted({layer % len(blocks) for layer in named})


def _heads(
    layers: list[int], heads: Sequence[tuple[int, int]] | None, count: int, found: Recorded
) -> list[tuple[int, int]]:
    if heads is None:
        return [(layer, head) for layer in layers for head in range(found.z[layer].shape[1])]
    pairs = [(int(layer) % count, int(head)) for layer, head in heads]
    for layer, head in pairs:
        if not 0 <= head < found.z[layer].shape[1]:
            raise ValueError(f"layer {layer} has no head {head}: it has {found.z[layer].shape[1]}")
    return pairs


def _tokens(model: nn.Module, tokenizer: Any, given: Answer, name: str) -> list[int]:
    """The ids of one or several next tokens."""
    items: list[Any] = [given] if isinstance(given, (str, int)) else list(given)
    if not items:
        raise ValueError(f"{name} is empty: name the token whose logit counts")
    found = []
    for item in items:
        if isinstance(item, str):
            if tokenizer is None:
                raise TypeError(f"{name} is a text and needs a tokenizer; pass a token id to do without")
            item = single_token(tokenizer, item, name)
        found += token_ids(model, tokenizer, [int(item)])
    return found


def _positions(positions: int | Sequence[int] | None, count: int, what: str) -> Tensor:
    if positions is None:
        return torch.arange(count) if what == "heads" else torch.tensor([count - 1])
    chosen = [positions] if isinstance(positions, int) else [int(p) for p in positions]
    if not chosen:
        raise ValueError("positions is empty: there is nothing to patch")
    for p in chosen:
        if not -count <= p < count:
            raise IndexError(f"position {p} is out of range: the prompts have {count} tokens")
    return torch.tensor(sorted({p % count for p in chosen}))


def _on_device(model: Any, ids: list[list[int]]) -> Tensor:
    return torch.tensor(ids, device=model.get_input_embeddings().weight.device)
