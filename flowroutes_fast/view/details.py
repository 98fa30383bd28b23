"""What the instrument's page shows beside the trace, from one more forward pass: the logit lens, and rows of
attention weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import Layer, capture, only_here, prepared, unwrap
from flowroutes_fast.loading.streaming import stream_of
from flowroutes_fast.models.families import Block, blocks_of, text_config
from flowroutes_fast.models.heads import check_predicts_tokens
from flowroutes_fast.models.tokens import token_texts
from flowroutes_fast.ops.reference import attention_pattern
from flowroutes_fast.system.ambient import in_neutral
from flowroutes_fast.tracing.adapters import adapter_of
from flowroutes_fast.tracing.prompts import check_tokens_alone, token_ids
from flowroutes_fast.tracing.trace import check_weights
from flowroutes_fast.view.text import show_token

if TYPE_CHECKING:
    from flowroutes_fast.results.lazy import LazyTrace
    from flowroutes_fast.results.trace import Trace

TOP_TOKENS = 5
TOP_KEYS = 8
MAX_STATES = 4_000  # of the logit lens
MAX_ROWS = 300_000  # (layer, query, head, key) of attention weights
CHUNK_BYTES = 64 * 2**20
BATCH = 256  # states to which the lens is applied together
_SAMPLE = 8  # tokens that calibrate the lens

Lens = Callable[[Tensor], Tensor]  # states [n, d_model] -> logits [n, vocabulary]


@dataclass
class Details:
    """Per state the most probable next tokens if it were the last one; per head and query the keys with the largest
    attention weights.

    ``state [n]``: (2 · level + after attention) · tokens + position, ascending, where level 0 is the embedding and
    level l + 1 the residual stream after layer l; ``lens_token``, ``lens_probability`` ``[n, k]``, tokens as places in
    ``texts``. ``row [m]``: layer · tokens + query, ascending; ``key``, ``weight`` ``[m, head, k]``. ``lens_missing``
    says why there is no lens; ``partial`` that only some states fit.
    """

    state: np.ndarray
    lens_token: np.ndarray
    lens_probability: np.ndarray
    texts: list[str]
    row: np.ndarray
    key: np.ndarray
    weight: np.ndarray
    partial: bool = False
    lens_missing: str = ""

    def pack(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Put the arrays among those of the page; returns what goes with them in clear."""
        arrays |= {
            "lens_state": self.state.astype(np.uint32),
            "lens_token": self.lens_token.astype(np.uint32),
            "lens_probability": np.round(self.lens_probability * 65535).astype(np.uint16),
            "attention_row": self.row.astype(np.uint32),
            "attention_key": self.key.astype(np.uint32),
            "attention_weight": np.round(self.weight * 65535).astype(np.uint16),
        }
        sizes = {
            "tokens": int(self.lens_token.shape[1]),
            "keys": int(self.key.shape[2]),
            "heads": int(self.key.shape[1]),
        }
        return {"texts": self.texts, "partial": self.partial, "missing": self.lens_missing, **sizes}


@in_neutral
def details(
    model: Any,
    tokenizer: Any,
    trace: Trace,
    *,
    position: int = -1,
    max_states: int = MAX_STATES,
    max_rows: int = MAX_ROWS,
) -> Details:
    """Run the model once more on a trace's tokens and keep what a page can show of every state and head.

    Long prompts have more states than a page should hold; then only those on the route of ``position`` are kept, at the
    lowest threshold at which they fit. Attention weights are kept for the ``TOP_KEYS`` strongest keys of a row; the
    whole pattern is never in memory.

    The model comes back as it was, every module in its own mode; other threads may use it meanwhile.

    Raises:
        ValueError: a trace without token ids, another model's trace, a model that predicts no tokens, a streamed one,
            one of another library.
    """
    if adapter_of(model) is not None or stream_of(unwrap(model)) is not None:
        raise ValueError(
            "the page's details need a transformers model with its weights in memory; pass none to have "
            "the page without them"
        )
    model = unwrap(model)
    check_predicts_tokens(model, needed=False)
    check_weights(model)
    blocks = blocks_of(model)
    if len(blocks) != trace.n_layers:
        raise ValueError(
            f"this trace has {trace.n_layers} layers and the model {len(blocks)}: it is the trace of another model "
            f"({trace.model})"
        )
    check_tokens_alone(trace, "leave out the model to have the page without its details")
    if not trace.token_ids:
        raise ValueError("this trace holds no token ids, so its prompt cannot be run again")
    ids = torch.tensor(
        [token_ids(model, tokenizer, list(trace.token_ids))], device=model.get_input_embeddings().weight.device
    )
    lens, why = _lens(model, blocks, ids)
    states, rows, partial = _wanted(trace, trace._positions(position), max_states, max_rows)
    found = _Collected(lens, tokens := len(trace.tokens), states, rows)
    first: list[Tensor] = []
    watch = blocks[0].module.register_forward_pre_hook(
        only_here(lambda m, args, kwargs: first.append(_given(args, kwargs))), with_kwargs=True
    )
    try:
        capture(model, ids, found.layer)
    finally:
        watch.remove()
    with prepared(model, blocks):
        found.lens(0, first[0][0])
        found.flush()
    if len(found.heads) > 1:  # layers with fewer heads are filled up
        most = max(found.heads)
        found.keys = [np.pad(k, ((0, 0), (0, most - k.shape[1]), (0, 0))) for k in found.keys]
        found.weights = [np.pad(w, ((0, 0), (0, most - w.shape[1]), (0, 0))) for w in found.weights]
    order = np.argsort(state := _joined(found.states, (0,), np.int64), kind="stable")
    token, names = np.unique(_joined(found.tokens, (0, TOP_TOKENS), np.int64)[order], return_inverse=True)
    texts = [show_token(text) for text in token_texts(tokenizer, token)]
    probabilities = _joined(found.probabilities, (0, TOP_TOKENS), np.float32)[order]
    shape = (0, max(found.heads, default=1), 1)
    return Details(
        state[order],
        names.reshape(probabilities.shape),
        probabilities,
        texts,
        np.concatenate([layer * tokens + query for layer, query in found.rows_done])
        if found.rows_done
        else np.zeros(0, np.int64),
        _joined(found.keys, shape, np.int64),
        _joined(found.weights, shape, np.float32),
        partial,
        why,
    )


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], kind: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, kind)


def _given(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class _Collected:
    """Takes layers as they stream by."""

    def __init__(self, lens: Lens | None, tokens: int, states: np.ndarray, rows: np.ndarray) -> None:
        self._lens, self.wanted, self.rows, self.n = lens, states, rows, tokens
        self.states: list[np.ndarray] = []
        self.waiting: list[Tensor] = []
        self.tokens: list[np.ndarray] = []
        self.probabilities: list[np.ndarray] = []
        self.rows_done: list[tuple[int, np.ndarray]] = []
        self.keys: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.heads: set[int] = set()

    def layer(self, layer: Layer) -> None:
        if layer.resid_mid is not None:
            self.lens(2 * layer.index + 1, layer.resid_mid)
        self.lens(2 * layer.index + 2, layer.resid_post)
        queries = np.flatnonzero(self.rows[layer.index])
        if layer.query is not None and layer.key is not None and len(queries):
            self._attention(layer, queries)

    def lens(self, height: int, state: Tensor) -> None:
        positions = np.flatnonzero(self.wanted[height])
        if self._lens is None:
            return
        for some in np.array_split(positions, -(-len(positions) // BATCH) or 1):
            self.states.append(height * self.n + some)
            self.waiting.append(state[torch.from_numpy(some).to(state.device)])
            if sum(map(len, self.waiting)) >= BATCH:
                self.flush()

    def flush(self) -> None:
        """Apply the lens to the states that wait for it, together: the unembedding is read once for all."""
        if self._lens is None or not self.waiting:
            return
        logits = self._lens(torch.cat([some.to(self.waiting[0].device) for some in self.waiting]))
        top = logits.softmax(-1).topk(min(TOP_TOKENS, logits.shape[-1]))
        self.tokens.append(top.indices.cpu().numpy())
        self.probabilities.append(top.values.float().cpu().numpy())
        self.waiting.clear()

    def _attention(self, layer: Layer, queries: np.ndarray) -> None:
        assert layer.query is not None
        assert layer.key is not None
        heads, count = layer.query.shape[0], layer.key.shape[1]
        step = max(1, CHUNK_BYTES // (heads * count * 4))
        keys, weights = [], []
        for first in range(0, len(queries), step):
            at = torch.from_numpy(queries[first : first + step]).to(layer.query.device)
            found, weight = _strongest_keys(layer, at, at, min(TOP_KEYS, self.n))
            keys.append(found)
            weights.append(weight)
        self.heads.add(heads)
        self.rows_done.append((layer.index, queries))
        self.keys.append(np.concatenate(keys))
        self.weights.append(np.concatenate(weights))


def _strongest_keys(layer: Layer, rows: Tensor, positions: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and weights ``[row, head, most]`` of some rows of a layer, which stand at these positions."""
    assert layer.query is not None
    assert layer.key is not None
    if layer.mask is not None:
        mask = layer.mask[..., rows, :].float()
    else:
        age = positions[:, None] - torch.arange(layer.key.shape[1], device=positions.device)
        hidden = (age < 0) | (age >= layer.window if layer.window else torch.zeros_like(age, dtype=torch.bool))
        mask = torch.zeros(age.shape, device=age.device).masked_fill_(hidden, float("-inf"))
    options: dict[str, Any] = {"scaling": layer.scaling, "mask": mask, "softcap": layer.softcap, "sinks": layer.sinks}
    top = attention_pattern(layer.query[:, rows].float(), layer.key.float(), **options).nan_to_num().topk(most)
    return top.indices.permute(1, 0, 2).cpu().numpy(), top.values.permute(1, 0, 2).cpu().numpy()


class Glance:
    """The logit lens and the attention weights of single states of a lazy trace, from what it keeps: its prompt does
    not run again.

    The lens is fitted once, on the first few tokens of the first prompt.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = unwrap(model), tokenizer
        self.fitted: tuple[Lens | None, str] | None = None

    @in_neutral
    def __call__(
        self, trace: LazyTrace, states: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]]
    ) -> dict[str, Any]:
        """What a page shows of ``states`` (height as in :class:`Details`, position) and of ``rows`` (layer, query).

        Returns ``lens``: ``[height, position, [[text, probability], …]]`` of the states that there are, ``attention``:
        ``[layer, query, [[[key, weight], …] of each head]]`` of layers with attention weights, ``missing``: why there
        is no lens. IndexError: out of range.
        """
        tokens = len(trace.tokens)
        for at, position in (*states, *((2 * layer + 1, query) for layer, query in rows)):
            if not (0 <= at <= 2 * trace.n_layers and 0 <= position < tokens):
                raise IndexError(
                    f"state {at} at position {position} is out of range: {trace.n_layers} layers, {tokens} tokens"
                )
        source: Any = trace.source
        with source.session():
            lens, missing = self._lens(trace)
            found = [
                (at, p, state)
                for at, p in states
                if lens is not None and (state := _kept_state(source, at, p)) is not None
            ]
            texts = (
                self._texts(lens, torch.cat([state.cpu() for *_, state in found])) if lens is not None and found else []
            )
            attention = [
                [layer, query, weights]
                for layer, query in rows
                if (weights := _kept_weights(source, layer, query, tokens))
            ]
        return {
            "lens": [[at, p, text] for (at, p, _), text in zip(found, texts, strict=True)],
            "attention": attention,
            "missing": missing,
        }

    def _lens(self, trace: LazyTrace) -> tuple[Lens | None, str]:
        if self.fitted is None:
            check_predicts_tokens(self.model, needed=False)
            ids = torch.tensor([list(trace.token_ids)], device=self.model.get_input_embeddings().weight.device)
            self.fitted = _lens(self.model, blocks_of(self.model), ids)
        return self.fitted

    def _texts(self, lens: Lens, states: Tensor) -> list[list[tuple[str, float]]]:
        with prepared(self.model, blocks_of(self.model)):
            logits = lens(states)
        top = logits.softmax(-1).topk(min(TOP_TOKENS, logits.shape[-1]))
        texts = [[show_token(text) for text in token_texts(self.tokenizer, row)] for row in top.indices.tolist()]
        return [list(zip(row, p, strict=True)) for row, p in zip(texts, top.values.tolist(), strict=True)]


def _kept_state(source: Any, height: int, position: int) -> Tensor | None:
    """A state ``[1, d_model]``; None where there is none: after the attention of a parallel block, an embedding of
    another shape.
    """
    if height == 0:
        state = source.layers[0].spans[0].layer.state
        return None if state is None else state[position][None]
    layer = source.rows((height - 1) // 2, np.array([position]))
    found: Tensor | None = layer.resid_mid if height % 2 else layer.resid_post
    return found


def _kept_weights(source: Any, layer: int, query: int, tokens: int) -> list[list[tuple[int, float]]]:
    found: Layer = source.rows(layer, np.array([query]))
    if found.query is None or found.key is None:
        return []
    device = found.query.device
    keys, weights = _strongest_keys(
        found,
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.tensor([query], device=device),
        min(TOP_KEYS, tokens),
    )
    return [
        [(k, w) for k, w in zip(key, weight, strict=True) if w > 0]
        for key, weight in zip(keys[0].tolist(), weights[0].tolist(), strict=True)
    ]


def _wanted(trace: Trace, positions: list[int], max_states: int, max_rows: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Which states ``[2 · layer + 1, token]`` and attention rows ``[layer, token]`` are kept, and whether some are
    left out.
    """
    layers, tokens, heads = trace.heads.shape
    states, rows = np.ones((2 * layers + 1, tokens), bool), np.ones((layers, tokens), bool)
    per_row = heads * min(TOP_KEYS, tokens)
    for layer, shape in enumerate(trace.shapes):
        states[2 * layer + 1] = shape != "parallel"

    def fits() -> bool:
        return states.sum() <= max_states and rows.sum() * per_row <= max_rows

    if fits():
        return states, rows, False
    for threshold in (0.01, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4):
        states[:], rows[:] = False, False
        states[-1, positions] = True
        edges = _route_edges(trace, positions, threshold) if threshold >= trace.floor else []
        for layer, kind, source, target in edges:
            parallel = trace.shapes[layer] == "parallel"
            after = kind.startswith("ffn") and not parallel
            states[2 * layer + after, source] = True
            states[2 * layer + 2 if after or parallel else 2 * layer + 1, target] = True
            rows[layer, target] |= not after
        if edges and fits():
            break
    return states, rows, True


def _route_edges(trace: Trace, positions: list[int], threshold: float) -> list[tuple[int, str, int, int]]:
    try:
        table = trace.route(positions, threshold).token_edges
    except ValueError:  # decisions are open and the model that was traced is gone
        return []
    return list(zip(*(table[name].tolist() for name in ("layer", "kind", "source", "target")), strict=True))


def _lens(model: Any, blocks: list[Block], ids: Tensor) -> tuple[Lens | None, str]:
    """The model's own way from its last state to logits, as a function of any state; or None and why.

    Whatever the decoder calls after its last block is run again (the last norm, projections), then the unembedding, its
    softcap and scale; checked on a few tokens against the model's logits.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None, "this model has no unembedding"
    owner = next((m for m in model.modules() if any(child is blocks[-1].module for child in _listed(m))), None)
    after: list[nn.Module] = []
    last: list[Tensor] = []
    handles = [
        blocks[-1].module.register_forward_hook(
            only_here(lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out))
        )
    ]
    listed = set(_listed(owner)) if owner is not None else set()
    children = (
        [m for m in owner.children() if m not in listed and not isinstance(m, nn.ModuleList)]
        if owner is not None
        else []
    )
    for child in children:
        handles.append(
            child.register_forward_hook(
                only_here(lambda m, a, out: after.append(m) if last and isinstance(out, Tensor) else None)
            )
        )
    try:
        with prepared(model, blocks):
            logits = model(input_ids=ids[:, :_SAMPLE], use_cache=False).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()
    cap = float(getattr(text_config(model), "final_logit_softcapping", 0) or 0)
    place, kind = head.weight.device, head.weight.dtype

    def plain(states: Tensor) -> Tensor:
        with torch.no_grad():
            x = states.to(place, kind)
            for module in after:
                x = module(x)
            return head(x).float()

    try:
        with prepared(model, blocks):
            ours = plain(last[0][0] if last[0].dim() == 3 else last[0])
        target = cap * torch.atanh((logits / cap).clamp(-1 + 1e-6, 1 - 1e-6)) if cap else logits
        scale = float((ours * target.to(place)).sum() / ours.square().sum())
        error = float((scale * ours - target.to(place)).abs().max() / target.abs().max())
    except (RuntimeError, TypeError, IndexError) as failed:
        return None, f"the logit lens does not fit this model: {type(failed).__name__}"
    if not error < 2e-2:
        return None, f"the logit lens does not fit this model: its logits differ by {error:.0%}"

    def lens(states: Tensor) -> Tensor:
        found = plain(states) * scale
        return cap * torch.tanh(found / cap) if cap else found

    return lens, ""


def _listed(module: nn.Module) -> list[nn.Module]:
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
