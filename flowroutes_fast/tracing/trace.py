"""``trace()``: a model and a text in, the importances of one forward pass out."""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowroutes_fast.capture.hooks import Layer, capture, last_logits, rows_of, unwrap
from flowroutes_fast.loading.streaming import Stream, parse_memory, stream_of
from flowroutes_fast.models.families import Block, blocks_of, rotary_regime, text_config
from flowroutes_fast.models.heads import predicts
from flowroutes_fast.models.modules import modules_of, name_of
from flowroutes_fast.models.tokens import token_texts
from flowroutes_fast.models.weights import check_adapters, state_of
from flowroutes_fast.ops.intervals import Counts
from flowroutes_fast.results.lazy import LazyTrace
from flowroutes_fast.results.trace import Refine, Trace
from flowroutes_fast.results.trace_file import ARRAYS
from flowroutes_fast.system.ambient import in_neutral, uncompiled
from flowroutes_fast.tracing import layer_by_layer as by_layer
from flowroutes_fast.tracing.adapters import adapter_of
from flowroutes_fast.tracing.importances import LayerImportances, importances
from flowroutes_fast.tracing.layer_by_layer import Store, identity_of
from flowroutes_fast.tracing.memory import check_memory, working_memory
from flowroutes_fast.tracing.on_demand import CachedStates, States
from flowroutes_fast.tracing.options import Options, shown, taken
from flowroutes_fast.tracing.prompts import Prompts, digests, read_prompts
from flowroutes_fast.tracing.workers import check_threads, run_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flowroutes_fast.tracing.options import EvaluationOptions
    from flowroutes_fast.tracing.typed import OneText, Texts, TraceOptions

DENSE_LIMIT = 10**9  # bytes: dense importances are kept by default while all layers fit
SIDE_BY_SIDE = 256 * 2**20  # bytes that all workers together may hold of u = v W_O
PREDICTIONS = 10
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
Exact = dict[int, np.ndarray]
_EVALUATED = {*ARRAYS, "work", "dense", "sparse", "neuron_parts", "refine", "lazy"}  # of a trace's fields


@overload
def trace(
    model: Any, tokenizer: Any, text: OneText, *, lazy: Literal[True], **options: Unpack[TraceOptions]
) -> LazyTrace: ...
@overload
def trace(
    model: Any, tokenizer: Any, text: OneText, *, lazy: Literal[False] = ..., **options: Unpack[TraceOptions]
) -> Trace: ...
@overload
def trace(
    model: Any, tokenizer: Any, text: Texts, *, lazy: Literal[True], **options: Unpack[TraceOptions]
) -> list[LazyTrace]: ...
@overload
def trace(
    model: Any, tokenizer: Any, text: Texts, *, lazy: Literal[False] = ..., **options: Unpack[TraceOptions]
) -> list[Trace]: ...
@overload
def trace(model: Any, tokenizer: Any, text: Any, *, lazy: bool = ..., **options: Unpack[TraceOptions]) -> Any: ...
@shown()
@uncompiled
@in_neutral
def trace(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    *,
    attention_mask: Any = None,
    positions: Sequence[int] | None = None,
    progress: bool = False,
    resume: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    memory: int | str | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> Any:
    """Importances of every sub-edge, residual connection and FFN of one forward pass.

    Args:
        model: a transformers decoder; it comes back unchanged (attention implementation, hooks, training mode). Or a
            model or activation cache of TransformerLens, a model of nnsight or nnterp (see
            :mod:`flowroutes_fast.integrations`).
        tokenizer: its tokenizer; may be None when ``text`` is given as ids.
        text: a prompt, or token ids ``[token]`` (list or integer tensor): one :class:`Trace`. Several prompts, ids
            ``[batch, token]``, lists of ids, or what a tokenizer returned: a list of traces from one padded forward
            pass, each as if its prompt ran alone. A generated text is traced as prompt and continuation together;
            ``trace.route(position=k)`` explains token k + 1.
        attention_mask: for ids ``[batch, token]``: 1 for tokens, 0 for padding on the left or on the right.
        positions: positions whose states are explained (negative from the end); None for all. The other rows are NaN,
            cost nothing, and routes that reach them are refused; heads, edges and neurons of these positions need no
            more.
        progress: show a bar over the layers (a streamed model takes its time).
        resume: a new folder in which every finished layer is kept. The same call after a kill goes on from the last
            finished layer, and after the end returns the result at once; remove the folder when the result is saved
            (the command line does). It goes on only with the same weights, options and prompts, by content.
        lazy: evaluate nothing yet: the pass keeps what rows are evaluated from, and the returned :class:`LazyTrace`
            evaluates those that a route, ``edges(layer, positions=...)`` or an index reaches, each once, with the
            figures that a full trace has. The model must stay as it is, and alive.
        memory: lazy: most bytes that may be kept, as a number or ``"2GiB"``. States are kept by reference while they
            fit (None: up to 2 GiB and a quarter of the free memory), else block inputs, keys and values alone, from
            which the rows that are reached run again, in main memory or on disk.
        options: those of :class:`flowroutes_fast.Options`: ``precision``, ``measure``, ``backend``, ``floor``,
            ``thresholds``, ``tolerance``, ``dense``, ``bias``, ``neurons``, ``threads``.
        past_key_values: lazy: the cache of transformers that the model filled over these ids (one prompt, with its last
            token), used instead of running the prompt again; positions that a route reaches run once more.

    Raises:
        ValueError: empty or too long a prompt, ids outside the vocabulary, an unknown option, family or backend, a
            model whose captured parts do not add up to its states, NaN in the activations (the layer is named).
        TypeError: text of a wrong type. OSError: weights that cannot be read, a folder that cannot be written to.
    """
    asked = {name: value for name, value in locals().items() if name not in ("model", "tokenizer", "text", "options")}
    if (adapter := adapter_of(model)) is not None:
        return adapter.trace(model, tokenizer, text, **asked, **options)
    wanted = taken(options, "trace", beside=asked).check()
    check_threads(wanted.threads)
    model = unwrap(model)
    blocks = check_model(model)
    given = read_prompts(model, tokenizer, text, attention_mask)
    rows = [_positions(positions, len(ids)) for ids in given.ids]
    heads = len(blocks) * int(getattr(text_config(model), "num_attention_heads", 1))
    dense = keeps_dense(wanted, positions, lazy, heads * sum(len(ids) ** 2 for ids in given.ids))
    chosen = replace(wanted, dense=dense).on(_device(model))
    # few rows: no table of all
    needed = chosen if positions is None else replace(chosen, precision="certified", neurons=False)
    # mixers and pooled heads see padding
    alone = any(block.mixer is not None for block in blocks) or predicts(model) != "tokens"
    groups = _groups(model, [len(ids) for ids in given.ids], needed, alone)
    _check_use(model, given, asked)
    if past_key_values is not None:
        return _from_cache(model, tokenizer, given.ids[0], chosen, past_key_values)
    check_memory(model, max(map(len, given.ids)), chosen if lazy else needed, batch=max(map(len, groups)), lazy=lazy)
    if lazy:
        return _lazily(model, blocks, tokenizer, given, groups, chosen, memory, progress)
    return _fully(model, blocks, tokenizer, given, groups, rows, chosen, resume, progress)


def keeps_dense(options: Options, positions: Sequence[int] | None, lazy: bool, elements: int) -> bool:
    """Are importances of all sub-edges kept? ``elements``: how many there are."""
    if lazy and options.dense:
        raise ValueError("dense importances are those of all rows: leave out lazy=True or dense=True")
    if options.precision == "certified" or lazy:
        return False
    if options.dense and positions is not None:
        raise ValueError("dense importances are kept for all positions or none: leave out dense=True or positions")
    if options.dense is None:
        return positions is None and elements * 4 < DENSE_LIMIT
    return bool(options.dense)


def _check_use(model: nn.Module, given: Prompts, asked: dict[str, Any]) -> None:
    """``ValueError`` for options that do not go together, or not with this model or these prompts."""
    lazy, resume, streamed = asked["lazy"], asked["resume"], stream_of(model) is not None
    if asked["past_key_values"] is not None and (not lazy or given.several or given.inputs):
        raise ValueError("past_key_values belongs to lazy=True and one prompt of ids alone")
    if asked["memory"] is not None and not lazy:
        raise ValueError("memory says what a lazy trace may keep: it belongs to lazy=True")
    if lazy and (resume is not None or asked["positions"] is not None):
        raise ValueError("lazy=True evaluates rows when they are asked for: leave out resume= and positions=")
    if lazy and streamed:
        raise ValueError(
            "lazy=True needs the weights in memory when rows are evaluated: load the model whole, or trace it without "
            "lazy=True"
        )
    if given.inputs and (resume is not None or streamed):
        raise ValueError(
            f"{', '.join(map(repr, given.inputs))} cannot be used with a streamed model or with resume=: "
            f"load the model whole"
        )


def _fully(
    model: nn.Module,
    blocks: list[Block],
    tokenizer: Any,
    given: Prompts,
    groups: list[list[int]],
    rows: list[Tensor],
    options: Options,
    resume: Any,
    progress: bool,
) -> Any:
    """All rows that are asked for, evaluated: a trace per prompt."""
    prompts = given.ids
    results: list[list[LayerImportances]] = [[] for _ in prompts]
    outputs: list[Tensor | None] = [None] * len(prompts)
    total, ours = 0.0, 0.0
    store, stream = None, stream_of(model)
    if resume is not None:
        settings = {"rows": [r.tolist() for r in rows], "groups": groups, "options": options, "dtype": _dtype_of(model)}
        store = Store(resume, identity_of(model, prompts, stream.feed if stream else None, **settings))
    streamed = store is not None or stream is not None
    try:
        for together in [groups] if streamed else [[group] for group in groups]:
            start = time.perf_counter()
            members = sorted(i for group in together for i in group)
            with tqdm(total=len(blocks), desc="layers", unit="layer", disable=not progress) as bar:
                found, seconds = _run(
                    model,
                    [prompts[i] for i in members],
                    [rows[i] for i in members],
                    options,
                    step=bar.update,
                    store=store,
                    groups=[[members.index(i) for i in group] for group in together] if streamed else None,
                    inputs=given.inputs,
                )
            total, ours = total + time.perf_counter() - start, ours + seconds
            for i, (layers, logits) in zip(members, found, strict=True):
                results[i], outputs[i] = layers, logits
    except BaseException:
        if store is not None:
            store.close()
        raise
    if store is not None:
        store.finish()
    weak, inputs = weakref.ref(model), given.inputs
    mixers = [type(b.mixer).__name__ if b.mixer is not None else "" for b in blocks]
    traces = [
        _record(
            layers,
            options,
            tokens=token_texts(tokenizer, ids),
            token_ids=ids,
            model=model_name(model),
            mixers=mixers,
            floor=0.0 if options.dense else options.floor,
            prediction=_prediction(logits, tokenizer, model),
            chat=chat,
            timings={"total": total, "importances": ours},
            inputs=digests(inputs),
            refine=_refiner(weak, ids, row, replace(options, neurons=False), inputs)
            if options.precision == "certified"
            else None,
        )
        for layers, ids, row, logits, chat in zip(results, prompts, rows, outputs, given.chats, strict=True)
    ]
    return traces if given.several else traces[0]


def check_model(model: nn.Module) -> list[Block]:
    """The layers of a model that can be traced.

    Raises:
        ValueError: a family that is not known, weights that are not there, adapters that act outside the forward pass.
    """
    if "transformer_lens" in sys.modules and any(
        type(module).__module__.startswith("transformer_lens") for module in modules_of(model)
    ):
        raise ValueError(
            "TransformerLens has put its own modules into this transformers model: give its TransformerBridge instead"
        )
    blocks = blocks_of(model)
    check_weights(model)
    check_adapters(model)
    return blocks


def options_of(model: nn.Module, **options: Unpack[EvaluationOptions]) -> Options:
    """Options of :func:`trace`, checked, for this model."""
    wanted = taken(options, "trace").check()
    check_threads(wanted.threads)
    return wanted.on(_device(model))


def pass_facts(
    model: nn.Module,
    blocks: list[Block],
    tokenizer: Any,
    ids: list[int],
    options: Options,
    logits: Tensor | None,
    seconds: float,
) -> dict[str, Any]:
    """What a lazy trace says of its pass."""
    return {
        "tokens": token_texts(tokenizer, ids),
        "token_ids": ids,
        "model": model_name(model),
        "floor": options.floor,
        "mixers": [type(b.mixer).__name__ if b.mixer is not None else "" for b in blocks],
        "shapes": [b.shape for b in blocks],
        "prediction": _prediction(logits, tokenizer, model),
        "timings": {"total": seconds, "importances": 0.0},
        "precision": options.precision,
        "measure": options.measure,
        "backend": options.backend,
        "bias": options.bias,
        "tolerance": options.tolerance,
        "thresholds": options.thresholds,
    }


def lazy_trace(states: States, options: Options, known: dict[str, Any]) -> LazyTrace:
    return LazyTrace(states, max((kept.n_heads for kept in states.layers), default=0), options.neurons, **known)


def by_measure(found: LazyTrace, measure: str) -> LazyTrace:
    """The lazy trace of the same pass by another measure, from the same states: no forward pass, nothing evaluated
    yet.
    """
    states = found.source
    assert isinstance(states, States)
    wanted = () if measure == "signed" else found.thresholds
    options = replace(states.options, measure=measure, thresholds=wanted)
    known = {f.name: getattr(found, f.name) for f in fields(Trace) if f.name not in _EVALUATED}
    return lazy_trace(states.by(options), options, known | {"measure": measure, "thresholds": wanted})


def _from_cache(model: nn.Module, tokenizer: Any, ids: list[int], options: Options, cache: Any) -> LazyTrace:
    start = time.perf_counter()
    states = CachedStates(model, options, ids, cache)
    logits = last_logits(states.output, [len(ids) - 1], [len(ids) - 1]).get(0)
    return lazy_trace(
        states, options, pass_facts(model, states.blocks, tokenizer, ids, options, logits, time.perf_counter() - start)
    )


def _lazily(
    model: nn.Module,
    blocks: list[Block],
    tokenizer: Any,
    given: Prompts,
    groups: list[list[int]],
    options: Options,
    memory: int | str | None,
    progress: bool,
) -> Any:
    """One forward pass whose layers are kept: a lazy trace per prompt."""
    budget = None if memory is None else parse_memory(memory)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    device = _device(model) if device.type == "meta" else device
    traces: list[Trace | None] = [None] * len(given.ids)
    for members in groups:
        prompts, start = [given.ids[i] for i in members], time.perf_counter()
        states = [States(model, options, len(blocks), budget, len(given.ids)) for _ in members]
        group = by_layer.group_of(prompts, list(range(len(prompts))), device)
        lasts = sorted({len(ids) - 1 for ids in prompts})
        with tqdm(total=len(blocks), desc="layers", unit="layer", disable=not progress) as bar:

            def on_item(item: int, layer: Layer, states: list[States] = states, bar: Any = bar) -> None:
                states[item].keep(layer)
                bar.update(item == 0)

            output = capture(
                model,
                group.ids,
                neurons=options.neurons,
                attention_mask=group.mask,
                on_item=on_item,
                logits_to_keep=1 if group.mask is None else torch.tensor(lasts, device=device),
                inputs=given.inputs,
            )
        logits = last_logits(output, lasts, [len(ids) - 1 for ids in prompts])
        total = time.perf_counter() - start
        for at, i in enumerate(members):
            known = pass_facts(model, blocks, tokenizer, prompts[at], options, logits.get(at), total)
            traces[i] = lazy_trace(
                states[at], options, known | {"inputs": digests(given.inputs), "chat": given.chats[i]}
            )
    return traces if given.several else traces[0]


def _run(
    model: nn.Module,
    prompts: list[list[int]],
    rows: list[Tensor],
    options: Options,
    exact: Exact | None = None,
    step: Any = None,
    store: Store | None = None,
    groups: list[list[int]] | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> tuple[list[tuple[list[LayerImportances], Tensor | None]], float]:
    """One forward pass over prompts, padded on the right: per prompt its layers and last logits; and the seconds that
    were ours.

    ``exact``: {layer: which query positions to evaluate whole}; other layers are left out. ``groups``: prompts that are
    padded together, all groups going through the layers side by side; always so for streamed models. ``inputs``: what
    else the model is given.
    """
    stream, seconds = stream_of(model), 0.0
    if stream is not None and groups is None:
        groups = [list(range(len(prompts)))]

    def evaluate(item: int, layer: Layer, options: Options) -> LayerImportances | None:
        if exact is not None and layer.index not in exact:
            return None
        whole = None if exact is None else torch.isin(rows[item], torch.from_numpy(exact[layer.index]))
        return _everywhere(importances(rows_of(layer, rows[item]), options, whole), rows[item], len(prompts[item]))

    def of(item: int, layer: Layer) -> LayerImportances | None:
        nonlocal seconds
        start = time.perf_counter()
        found = evaluate(item, layer, options)
        seconds += time.perf_counter() - start
        return found

    device = stream.feed.device if stream is not None else model.get_input_embeddings().weight.device  # type: ignore[operator]
    device = _device(model) if device.type == "meta" else device
    if groups is not None:
        found = by_layer.run(
            model,
            prompts,
            groups,
            of,
            neurons=options.neurons,
            feed=stream.feed if stream else None,
            device=device,
            step=step,
            store=store,
            budget=_room_for_states(stream),
        )
        return found, seconds
    group = by_layer.group_of(prompts, list(range(len(prompts))), device)
    lasts = sorted({len(ids) - 1 for ids in prompts})
    results: list[list[LayerImportances]] = [[] for _ in prompts]

    workers, single = workers_for(model, options, [len(ids) for ids in prompts])
    waiting: list[tuple[int, Layer, Options]] = []

    def on_item(item: int, layer: Layer) -> None:
        nonlocal seconds
        waiting.append((item, layer, single))
        if item < len(prompts) - 1:
            return
        start = time.perf_counter()
        for (at, *_), result in zip(waiting, run_all(evaluate, waiting, workers), strict=True):
            if result is not None:
                results[at].append(result)
        waiting.clear()
        seconds += time.perf_counter() - start
        if step is not None:
            step()

    output = capture(
        model,
        group.ids,
        neurons=options.neurons,
        attention_mask=group.mask,
        on_item=on_item,
        logits_to_keep=1 if group.mask is None else torch.tensor(lasts, device=device),
        inputs=inputs,
    )
    logits = last_logits(output, lasts, [len(ids) - 1 for ids in prompts])
    return [(found, logits.get(i)) for i, found in enumerate(results)], seconds


def workers_for(model: nn.Module, options: Options, lengths: list[int]) -> tuple[int, Options]:
    """How many threads evaluate a batch's prompts side by side, and the options of each."""
    threads = options.threads or torch.get_num_threads()
    if (
        options.backend != "cpu"
        or len(lengths) < 2
        or threads < 2
        or any(hasattr(module, "_hf_hook") for module in modules_of(model))
    ):
        return 1, options  # weights of offloaded modules come in for one reader at a time
    config = text_config(model)
    each = 4 * int(getattr(config, "num_attention_heads", 1)) * int(getattr(config, "hidden_size", 1)) * max(lengths)
    workers = max(1, min(threads, len(lengths), SIDE_BY_SIDE // each))
    return workers, replace(options, threads=threads // workers)


def _groups(model: nn.Module, lengths: list[int], options: Options, alone: bool) -> list[list[int]]:
    """Which prompts run together: those that the model treats alike at their lengths, and (streamed, where memory
    is short) as many as fit.
    """
    if alone:
        return [[i] for i in range(len(lengths))]
    alike: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        alike.setdefault(rotary_regime(text_config(model), length), []).append(i)
    return [group for members in alike.values() for group in _fitting(model, members, lengths, options)]


def _fitting(model: nn.Module, everyone: list[int], lengths: list[int], options: Options) -> list[list[int]]:
    stream = stream_of(model)
    if stream is None or stream.budget is None:
        return [everyone]
    room = stream.budget - stream.weights

    def fits(members: list[int]) -> bool:
        return (
            len(members) == 1 or working_memory(model, max(lengths[i] for i in members), options, len(members)) <= room
        )

    if fits(everyone):
        return [everyone]
    groups: list[list[int]] = []
    for i in sorted(everyone, key=lambda i: -lengths[i]):
        if groups and fits([*groups[-1], i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _room_for_states(stream: Stream | None) -> float:
    """Bytes of residual states that may wait in memory: half of what the weights leave."""
    return float("inf") if stream is None or stream.budget is None else max(0, stream.budget - stream.weights) / 2


def _everywhere(found: LayerImportances, rows: Tensor, tokens: int) -> LayerImportances:
    """Importances of some rows at their places among all positions, NaN elsewhere."""
    if len(rows) == tokens:
        return found
    for name in (
        "low",
        "high",
        "heads",
        "heads_low",
        "heads_high",
        "attention_residual",
        "bias",
        "mixer",
        "ffn",
        "ffn_residual",
    ):
        part = getattr(found, name)
        whole = part.new_full((tokens, *part.shape[1:]), float("nan"))
        whole[rows] = part
        setattr(found, name, whole)

    def moved(index: Tensor) -> Tensor:
        return torch.cat([rows[index[0].long()].to(index.dtype)[None], index[1:]])

    found.edges = (moved(found.edges[0]), found.edges[1])
    if found.neurons is not None:
        parts = found.neurons
        low, high = (t.new_full((tokens,), float("nan")) for t in (parts.low, parts.high))
        low[rows], high[rows] = parts.low, parts.high
        found.neurons = replace(parts, index=moved(parts.index), low=low, high=high)
    return found


def _record(results: list[LayerImportances], options: Options, **known: Any) -> Trace:
    counts = [r.counts for r in results]
    return Trace(
        shapes=[r.shape for r in results],
        heads=_heads_of(results, "heads"),
        heads_low=_heads_of(results, "heads_low"),
        heads_high=_heads_of(results, "heads_high"),
        normaliser_low=torch.stack([r.low for r in results]),
        normaliser_high=torch.stack([r.high for r in results]),
        attention_residual=torch.stack([r.attention_residual for r in results]),
        attention_bias=torch.stack([r.bias for r in results]),
        mixer=torch.stack([r.mixer for r in results]),
        ffn=torch.stack([r.ffn for r in results]),
        ffn_residual=torch.stack([r.ffn_residual for r in results]),
        precision=options.precision,
        measure=options.measure,
        backend=options.backend,
        bias=options.bias,
        tolerance=options.tolerance,
        thresholds=options.thresholds,
        work={name: sum(getattr(c, name) for c in counts) for name in Counts.__dataclass_fields__},
        dense=_same_heads([r.dense for r in results]) if options.dense else None,  # type: ignore[misc]
        sparse=None if options.dense else [r.edges for r in results],
        neuron_parts=[r.neurons for r in results] if options.neurons else None,  # type: ignore[misc]
        **known,
    )


def model_name(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or model.config.model_type)


def _dtype_of(model: nn.Module) -> torch.dtype:
    stream = stream_of(model)
    return stream.dtype if stream is not None else next(p.dtype for p in model.parameters() if p.is_floating_point())


def _device(model: nn.Module) -> torch.device:
    """Where the first weights are that are anywhere."""
    if (stream := stream_of(model)) is not None:
        return stream.feed.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def check_weights(model: nn.Module) -> None:
    """``ValueError`` for a model without (all of) its weights; those that accelerate loads on demand are there."""
    for module in modules_of(model):
        missing = [n for n, p in module._parameters.items() if p is not None and p.is_meta]
        if missing and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"the model has no weights for {name_of(module, model)}.{missing[0]} (it is on the meta device): load "
                f"it whole, or with device_map="
            )


def _positions(positions: Sequence[int] | None, tokens: int) -> Tensor:
    if positions is None:
        return torch.arange(tokens)
    chosen = [positions] if isinstance(positions, int) else [int(p) for p in positions]
    if not chosen:
        raise ValueError("positions is empty: there is nothing to explain")
    for p in chosen:
        if not -tokens <= p < tokens:
            raise ValueError(f"position {p} is out of range: the prompt has {tokens} tokens")
    return torch.tensor(sorted({p % tokens for p in chosen}))


def _stack(rows: list[Tensor]) -> Tensor:
    """``[query, head]`` of every layer as one tensor; layers with fewer heads are filled with zeros."""
    most = max(r.shape[1] for r in rows)
    return torch.stack([torch.nn.functional.pad(r, (0, most - r.shape[1])) for r in rows])


def _heads_of(results: list[LayerImportances], name: str) -> Tensor:
    heads = _stack([getattr(r, name) for r in results])
    heads[torch.stack([r.low for r in results]).isnan()] = float("nan")
    return heads


def _same_heads(dense: list[Tensor]) -> list[Tensor]:
    most = max(d.shape[0] for d in dense)
    return [torch.nn.functional.pad(d, (0, 0, 0, 0, 0, most - d.shape[0])) for d in dense]


def _refiner(
    model: weakref.ref[nn.Module], ids: list[int], positions: Tensor, options: Options, inputs: dict[str, Tensor]
) -> Refine:
    """A function that runs the model again and evaluates the given rows whole: ``{layer: [query]}`` in, ``{layer:
    ...}`` out.

    It returns None once the model is gone; ``ValueError`` if it has changed.
    """

    traced = state_of(model())  # type: ignore[arg-type]

    @in_neutral
    def refine(rows: dict[int, np.ndarray]) -> dict[int, LayerImportances] | None:
        alive = model()
        if alive is None:
            return None
        if state_of(alive) != traced:
            raise ValueError(
                "the model has changed since it was traced (its weights, or which adapters act): trace again"
            )
        ((found, _),), _ = _run(alive, [ids], [positions], options, rows, inputs=inputs)
        return dict(zip(sorted(rows), found, strict=True))

    return refine


def _prediction(logits: Tensor | None, tokenizer: Any, model: Any) -> list[tuple[str, float]]:
    """Most probable next tokens, or classes of a classifier; nothing for a model that predicts neither."""
    if logits is None or predicts(model) == "numbers":
        return []
    independent = getattr(model.config, "problem_type", None) == "multi_label_classification"
    if predicts(model) == "tokens":
        return most_probable(logits, tokenizer)
    scores = logits.float().sigmoid() if independent else logits.float().softmax(-1)
    top = scores.topk(min(PREDICTIONS, logits.shape[-1]))
    return [
        (str(model.config.id2label.get(i, i)), p)
        for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def most_probable(logits: Tensor | None, tokenizer: Any) -> list[tuple[str, float]]:
    """The most probable next tokens, from logits ``[vocabulary]``."""
    if logits is None:
        return []
    top = logits.float().softmax(-1).topk(min(PREDICTIONS, logits.shape[-1]))
    return list(zip(token_texts(tokenizer, top.indices.tolist()), top.values.tolist(), strict=True))
