"""``trace()``: a model and a text in, the importances of one forward pass out."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowroutes_fast.capture import Layer, capture
from flowroutes_fast.certify import MEASURES, Counts
from flowroutes_fast.estimate import check_memory
from flowroutes_fast.layer import BIAS_MODES, LayerImportances, Options, conservation_error, importances
from flowroutes_fast.models.families import blocks_of, context_length, vocabulary_size
from flowroutes_fast.ops import choose_backend
from flowroutes_fast.record import Settle, Trace

DENSE_LIMIT = 10**9  # bytes: dense importances are kept by default while all layers fit
DEFAULT_FLOOR = 1e-3
DEFAULT_THRESHOLDS = (0.01, 0.03, 0.04)  # those of the paper
PRECISIONS = ("certified", "exact")
PREDICTIONS = 10
CHECK_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_opened: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def trace(
    model: nn.Module,
    tokenizer: Any,
    text: str | list[int] | Tensor,
    *,
    precision: str = "certified",
    measure: str = "proximity",
    backend: str = "auto",
    floor: float = DEFAULT_FLOOR,
    thresholds: Sequence[float] = DEFAULT_THRESHOLDS,
    tolerance: float = 1e-2,
    dense: bool | None = None,
    bias: str = "part",
    neurons: bool = False,
    threads: int = 0,
) -> Trace:
    """Importances of every sub-edge, residual connection and FFN of one forward pass.

    Args:
        model: a transformers decoder; it comes back unchanged (attention implementation, hooks, training mode).
        tokenizer: its tokenizer; may be None when ``text`` is given as ids.
        text: a prompt, or token ids ``[token]`` (list or integer tensor).
        precision: ``"certified"``: every sub-edge is bounded, those that matter are evaluated, and everything carries an interval;
            routes are those of exact importances. ``"exact"``: every sub-edge by the paper's formula, to float32 rounding.
        measure: ``"proximity"``, the paper's; or ``"signed"``: ⟨sign(y), z⟩ / ‖y‖₁, which sums to 1 over all parts, is at least the
            paper's proximity / ‖y‖₁ wherever that is positive, and is negative for parts that push the state away (suppression).
        backend: ``"auto"``, ``"cpu"`` (native), ``"triton"``, ``"cuda"`` or ``"reference"`` (PyTorch).
        floor: importance above which sub-edges are kept; routes can be extracted at any threshold from here on.
        thresholds: certified: rows are refined until no decision at these is open. At other thresholds, a route that meets an open
            decision runs the model once more to settle it.
        tolerance: certified: largest relative error of a normaliser's estimate, and so of every importance.
        dense: exact: keep the importances of all sub-edges; None: while all layers together take less than 1 GB.
        bias: ``"part"``: output and value biases are one part without a source token; ``"value"``: the value bias stays inside the
            sub-edges; ``"exclude"``: the constant part is left out of the normalisation.
        neurons: also split every FFN into its neurons (``trace.neurons(layer)``).
        threads: threads of the native kernels; 0 for OpenMP's default (``OMP_NUM_THREADS``).

    Raises:
        ValueError: empty or too long a prompt, ids outside the vocabulary, an unknown option, family or backend, a model whose
            captured parts do not add up to its states, NaN in the activations (the layer is named).
        TypeError: text of a wrong type.
    """
    _check_options(precision, measure, floor, thresholds, tolerance, dense, bias)
    blocks = blocks_of(model)
    ids = token_ids(model, tokenizer, text)
    backend = choose_backend(backend, torch.empty(0, dtype=torch.float32, device=blocks[0].output.weight.device))  # type: ignore[arg-type]
    check_model(model, ids)
    heads = int(getattr(model.config, "num_attention_heads", 1))  # type: ignore[union-attr]
    if precision == "certified":
        dense = False
    elif dense is None:
        dense = len(blocks) * heads * len(ids) ** 2 * 4 < DENSE_LIMIT
    wanted = tuple(sorted({float(t) for t in thresholds if t >= floor})) if measure == "proximity" else ()
    options = Options(precision, measure, backend, dense, floor, wanted, tolerance, bias, threads, neurons)
    check_memory(model, len(ids), options)
    results: list[LayerImportances] = []
    seconds = [0.0]

    def on_layer(layer: Layer) -> None:
        start = time.perf_counter()
        results.append(importances(layer, options))
        seconds[0] += time.perf_counter() - start

    start = time.perf_counter()
    output = capture(model, _batch(model, ids), on_layer, neurons)
    timings = {"total": time.perf_counter() - start, "importances": seconds[0]}
    counts = [r.counts for r in results]
    return Trace(
        tokens=_token_texts(tokenizer, ids),
        token_ids=ids,
        model=str(getattr(model.config, "_name_or_path", "") or model.config.model_type),  # type: ignore[union-attr]
        shapes=[r.shape for r in results],
        heads=torch.stack([r.heads for r in results]),
        heads_low=torch.stack([r.heads_low for r in results]),
        heads_high=torch.stack([r.heads_high for r in results]),
        normaliser_low=torch.stack([r.low for r in results]),
        normaliser_high=torch.stack([r.high for r in results]),
        attention_residual=torch.stack([r.attention_residual for r in results]),
        attention_bias=torch.stack([r.bias for r in results]),
        ffn=torch.stack([r.ffn for r in results]),
        ffn_residual=torch.stack([r.ffn_residual for r in results]),
        floor=0.0 if dense else floor,
        precision=precision,
        measure=measure,
        backend=backend,
        bias=bias,
        tolerance=tolerance,
        thresholds=wanted,
        work={name: sum(getattr(c, name) for c in counts) for name in Counts.__dataclass_fields__},
        prediction=_prediction(output, tokenizer),
        timings=timings,
        dense=[r.dense for r in results] if dense else None,  # type: ignore[misc]
        sparse=None if dense else [r.edges for r in results],
        neuron_parts=[r.neurons for r in results] if neurons else None,  # type: ignore[misc]
        settle=_settler(weakref.ref(model), ids, replace(options, neurons=False)) if precision == "certified" else None,
    )


def _settler(model: weakref.ref[nn.Module], ids: list[int], options: Options) -> Settle:
    """A function that runs the model again and evaluates the given rows whole: ``{layer: [query]}`` in, ``{layer: ...}`` out.

    It returns None once the model is gone.
    """

    def settle(rows: dict[int, np.ndarray]) -> dict[int, LayerImportances] | None:
        alive = model()
        if alive is None:
            return None
        settled: dict[int, LayerImportances] = {}

        def on_layer(layer: Layer) -> None:
            if layer.index in rows:
                exact = torch.zeros(len(ids), dtype=torch.bool)
                exact[torch.from_numpy(rows[layer.index])] = True
                settled[layer.index] = importances(layer, options, exact)

        capture(alive, _batch(alive, ids), on_layer)
        return settled

    return settle


def _check_options(
    precision: str, measure: str, floor: float, thresholds: Sequence[float], tolerance: float, dense: bool | None, bias: str
) -> None:
    for name, value, known in (("precision", precision, PRECISIONS), ("measure", measure, MEASURES), ("bias mode", bias, BIAS_MODES)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, known))}")
    if measure == "signed" and precision == "exact":
        raise ValueError("measure='signed' is known exactly with precision='certified'; precision='exact' is about proximities")
    if dense and precision == "certified":
        raise ValueError("dense importances need precision='exact'; 'certified' keeps sub-edges above the floor and stores nothing else")
    if not 0 <= floor < 1:
        raise ValueError(f"floor must lie in [0, 1), got {floor}")
    if floor == 0 and precision == "certified":
        raise ValueError("floor must be above 0 with precision='certified'; to have all sub-edges, use precision='exact'")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}")
    for threshold in thresholds:
        if not 0 <= threshold < 1:
            raise ValueError(f"thresholds must lie in [0, 1), got {threshold}")


def token_ids(model: nn.Module, tokenizer: Any, text: str | list[int] | Tensor) -> list[int]:
    """The prompt as ids, checked against the model's vocabulary and context length."""
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("a text needs a tokenizer; pass token ids to trace without one")
        if not text.strip():
            raise ValueError("the text is empty: there is nothing to trace")
        ids = [int(i) for i in tokenizer(text)["input_ids"]]
    else:
        given = torch.as_tensor(text)
        if given.dim() != 1:
            raise ValueError(f"token ids must have shape [token], got {tuple(given.shape)}")
        if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
            raise TypeError(f"token ids must be integers, got {given.dtype}")
        ids = [int(i) for i in given.tolist()]
    if not ids:
        raise ValueError("the text gives no tokens: there is nothing to trace")
    size = vocabulary_size(model)
    for position, token in enumerate(ids):
        if not 0 <= token < size:
            raise ValueError(f"token id {token} at position {position} is outside the model's vocabulary of {size}; is this its tokenizer?")
    limit = context_length(model.config)
    if limit is not None and len(ids) > limit:
        raise ValueError(f"the text has {len(ids)} tokens but the model's context holds {limit}: shorten it")
    return ids


def check_model(model: nn.Module, ids: list[int]) -> None:
    """Once per model: do the captured parts add up to the states? ``ValueError`` if they do not."""
    if model in _opened:
        return
    found: list[tuple[float, int, torch.dtype]] = []
    capture(
        model,
        _batch(model, ids[:CHECK_TOKENS]),
        lambda layer: found.append((conservation_error(layer), layer.index, layer.resid_post.dtype)),
    )
    if len(found) != len(blocks_of(model)):
        raise ValueError(f"{len(found)} layers were captured but the model has {len(blocks_of(model))}")
    error, layer, dtype = max(found, key=lambda item: item[0])
    tolerance = _TOLERANCE.get(dtype, 1e-5)
    if error > tolerance:
        raise ValueError(
            f"layer {layer}: the captured parts miss the residual state by {error:.1e} relative (allowed for {dtype}: {tolerance:.0e}); "
            "this checkpoint does something that its family's adapter does not know, so its routes would be wrong"
        )
    _opened.add(model)


def _batch(model: nn.Module, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)  # type: ignore[operator]


def _token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return [str(i) for i in ids] if tokenizer is None else [tokenizer.decode([i]) for i in ids]


def _prediction(output: Any, tokenizer: Any) -> list[tuple[str, float]]:
    logits = getattr(output, "logits", None)
    if logits is None:
        return []
    top = logits[0, -1].float().softmax(-1).topk(min(PREDICTIONS, logits.shape[-1]))
    return list(zip(_token_texts(tokenizer, top.indices.tolist()), top.values.tolist(), strict=True))
