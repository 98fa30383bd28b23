"""TransformerLens: :func:`flowroutes_fast.trace` takes a ``TransformerBridge``, a ``HookedTransformer`` (3.x) and an
``ActivationCache``.

A bridge has put its own modules into a transformers model; for a trace the original ones come back, so attention needs
no kept weights. A ``HookedTransformer``, a bridge whose hooks or processed weights change what its transformers model
computes, and a cache are read through hook points, one layer at a time; there every layer's parts are added up and
compared with its states.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from flowroutes_fast.capture.conservation import check_finite
from flowroutes_fast.capture.hooks import Layer, _evaluation_mode, _lock, rows_of, span_of, undisturbed, unwrap
from flowroutes_fast.integrations import require
from flowroutes_fast.integrations.read_rows import ReadRows
from flowroutes_fast.models.tokens import token_texts
from flowroutes_fast.results.lazy import LazyTrace
from flowroutes_fast.results.trace import Trace
from flowroutes_fast.tracing.importances import LayerImportances, conservation_error, importances
from flowroutes_fast.tracing.options import Options, names, taken
from flowroutes_fast.tracing.prompts import read_prompts, refuse_inputs
from flowroutes_fast.tracing.trace import (
    _TOLERANCE,
    _everywhere,
    _positions,
    _record,
    keeps_dense,
    model_name,
    most_probable,
)
from flowroutes_fast.tracing.trace import trace as trace_model

AT_LEAST, BELOW = "3.9", "5"
PROBE = 8  # tokens on which a bridge and its transformers model are compared
_SAME = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
Found = dict[str, Tensor]  # role -> activation [batch, ...] of one layer
_compared: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def trace(model: Any, tokenizer: Any, text: Any, **options: Any) -> Any:
    """:func:`flowroutes_fast.trace` of a TransformerLens model or cache.

    Args:
        model: a ``TransformerBridge``, ``HookedTransformer`` or ``ActivationCache``. A bridge with hooks of the user's,
            or with processed weights that its transformers model does not have, is traced as it runs, through its hook
            points; without such, its transformers model is, bit for bit as without the bridge. A cache is read and no
            model runs; with ``lazy=True`` the rows that are asked for are read, while the cache's activations and the
            model stay as they are.
        tokenizer: None for the model's own, which then prepends what ``model.to_tokens`` prepends (a BOS token, by
            default).
        text: as for :func:`flowroutes_fast.trace`. For a cache: what it was made from, or None to call tokens by their
            positions.
        options: as for :func:`flowroutes_fast.trace`; ``resume`` where the transformers model is traced. With a cache
            of a padded batch ``attention_mask`` says where the tokens are.

    Raises:
        ValueError: those of :func:`flowroutes_fast.trace`; a cache without the entries that are needed; parts that do
            not add up to the states, because of hooks or of weights that were processed after a cache was made;
            attention that is not causal.
        ImportError: a version of TransformerLens that is not supported.
    """
    _library()
    given = {
        "attention_mask": None,
        "positions": None,
        "progress": False,
        "resume": None,
        "lazy": False,
    }
    asked = taken(
        {name: options[name] for name in options if name not in (*given, "memory", "past_key_values")}, "trace"
    )
    given |= {"options": asked.check()} | {name: options[name] for name in options if name not in names()}
    refused = [name for name in ("lazy", "memory", "past_key_values") if options.get(name)]
    if hasattr(model, "cache_dict"):
        if refused and refused != ["lazy"]:
            raise ValueError(f"{refused[-1]}= is for models that run: a cache has all activations, trace it without")
        return _of_cache(model, tokenizer, text, given)
    kind = type(model).__name__
    if not {"TransformerBridge", "HookedTransformer"} & {base.__name__ for base in type(model).__mro__}:
        raise ValueError(
            f"a {kind} of TransformerLens cannot be traced: give a TransformerBridge, a HookedTransformer or an "
            f"ActivationCache"
        )
    own = getattr(model, "tokenizer", None)
    tokenizer = _OwnTokenizer(model) if tokenizer is None and own is not None else tokenizer
    if kind != "HookedTransformer" and _as_its_original(model):
        with transformers_model(model) as module:
            found = trace_model(module, tokenizer, text, **options)
        for one in found if isinstance(found, list) else [found]:
            if one.refine is not None:
                one.refine = _refiner(one.refine, weakref.ref(model))
            if isinstance(one, LazyTrace):
                one.source.around = _around(weakref.ref(model))
        return found
    if refused:
        raise ValueError(
            f"{refused[0]}= needs the transformers model inside a TransformerBridge, without hooks or processed "
            f"weights of its own: this "
            f"{kind} is read through its hook points: trace it without, or give its cache (run_with_cache(..., "
            f"names_filter=hooks_for(model)))"
        )
    return _through_hooks(model, tokenizer, text, given)


@contextmanager
def transformers_model(bridge: Any) -> Iterator[PreTrainedModel]:
    """The transformers model of a bridge with its own modules in place, for everything else here that takes a model;
    the bridge's afterwards.

    Raises:
        ValueError: a bridge around something else. ImportError: a version of TransformerLens that is not supported.
    """
    _library()
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    root = unwrap(getattr(bridge, "original_model", None))
    if not isinstance(root, PreTrainedModel):
        raise ValueError(f"this {type(bridge).__name__} has no transformers model inside but {type(root).__name__}")
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    seen: set[int] = set()

    def restore(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for name, child in list(module._modules.items()):
            original: Any = child
            while isinstance(original, GeneralizedComponent) and original.original_component is not None:
                original = original.original_component
            if original is not child:
                replaced.append((module, name, child))  # type: ignore[arg-type]
                module._modules[name] = original
            if original is not None:
                restore(original)

    with _lock:
        try:
            restore(root)
            yield root
        finally:
            for module, name, child in reversed(replaced):
                module._modules[name] = child


def hooks_for(model: Any, neurons: bool = False) -> list[str]:
    """Hook points that a trace from a cache needs: ``model.run_with_cache(tokens, names_filter=hooks_for(model))``."""
    return [name for layer in range(model.cfg.n_layers) for name in _names(model, layer, neurons).values()]


def stack_head_results(
    cache: Any,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: Any = None,
    apply_ln: bool = False,
) -> Any:
    """What ``cache.stack_head_results`` returns, ``[layer * head (+ 1), batch, pos, d_model]``, written in place and
    kept nowhere else.

    z W_O goes head by head into the result (peak: the result itself); the cache gains no ``hook_result`` entries.
    Without gradients.

    Args:
        layer: heads of the layers before it; -1, None or n_layers for all.
        return_labels: also return ``["L0H0", ...]``. incl_remainder: a last row with the rest of the residual stream.
        pos_slice: positions, as TransformerLens slices them. apply_ln: with the layer norm of ``layer`` applied.

    Raises:
        ValueError: a layer that is not there, a cache without its ``hook_z``. ImportError: a version of TransformerLens
            that is not supported.
    """
    _library()
    from transformer_lens.utilities import Slice

    cut = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
    model, layer = cache.model, cache.model.cfg.n_layers if layer is None or layer == -1 else layer
    if not 0 <= layer <= model.cfg.n_layers:
        raise ValueError(f"layer must be -1 or from 0 to {model.cfg.n_layers}, got {layer}")
    if missing := [name for i in range(layer) if (name := f"blocks.{i}.attn.hook_z") not in cache.cache_dict]:
        raise ValueError(
            f"the cache has no {_listed(missing)}: give run_with_cache a names_filter that lets "
            f"attn.hook_z pass, or none"
        )
    labels: list[str] = []
    with torch.no_grad():
        # views [..., head, d_head]
        mixed = [cut.apply(cache.cache_dict[f"blocks.{i}.attn.hook_z"], dim=-3) for i in range(layer)]
        heads = [z.shape[-2] for z in mixed]
        if not mixed and not incl_remainder:
            shape = cut.apply(cache["hook_embed"], dim=-2)
            stacked = shape.new_zeros(0, *shape.shape)
        elif not mixed:
            stacked, labels = cut.apply(cache[("resid_post", layer - 1)], dim=-2)[None], ["remainder"]
        else:
            weights = model.blocks[0].attn.W_O
            stacked = torch.empty(
                sum(heads) + incl_remainder,
                *mixed[0].shape[:-2],
                weights.shape[-1],
                device=mixed[0].device,
                dtype=torch.promote_types(mixed[0].dtype, weights.dtype),
            )
            flat, first = stacked.view(len(stacked), -1, stacked.shape[-1]), 0
            for i, z in enumerate(mixed):
                attention, part = model.blocks[i].attn, flat[first : first + heads[i]]
                torch.bmm(
                    z.flatten(0, -3).transpose(0, 1).to(flat.dtype) if z.dim() > 2 else z[:, None].to(flat.dtype),
                    attention.W_O.to(flat.dtype),
                    out=part,
                )
                if (scale := getattr(attention, "_result_contribution_scale", 1.0)) != 1:
                    part *= scale
                labels += [f"L{i}H{head}" for head in range(heads[i])]
                first += heads[i]
            if incl_remainder:
                torch.sum(stacked[:-1], 0, out=stacked[-1])
                torch.sub(cut.apply(cache[("resid_post", layer - 1)], dim=-2), stacked[-1], out=stacked[-1])
                labels.append("remainder")
        if apply_ln:
            stacked = cache.apply_ln_to_stack(stacked, layer, pos_slice=cut)
    return (stacked, labels) if return_labels else stacked


def _library() -> None:
    require("transformer_lens", "transformer-lens", at_least=AT_LEAST, below=BELOW)


class _OwnTokenizer:
    """A TransformerLens model's way from text to ids and back."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.model.to_tokens(text)[0].tolist()}

    def decode(self, ids: list[int]) -> str:
        return self.model.tokenizer.decode(ids)


def _as_its_original(bridge: Any) -> bool:
    """Whether the transformers model inside a bridge computes what the bridge computes, and nothing hooks into it."""
    original = unwrap(getattr(bridge, "original_model", None))
    if not isinstance(original, PreTrainedModel) or any(_users_hooks(module) for module in bridge.modules()):
        return False
    state = (getattr(bridge, "compatibility_mode", False), getattr(bridge, "_weights_processed", False))
    if (known := _compared.get(bridge)) is not None and known[0] == state:
        return known[1]
    embedding: Any = original.get_input_embeddings().weight
    ids = (torch.arange(1, PROBE + 1, device=embedding.device) % embedding.shape[0])[None]
    with torch.no_grad(), _evaluation_mode(bridge):
        theirs = bridge(ids, return_type="logits").float()
        with transformers_model(bridge) as module, _evaluation_mode(module):
            ours = module(input_ids=ids, use_cache=False).logits.float()
    same = float((theirs - ours).abs().max() / ours.abs().max()) <= _SAME.get(embedding.dtype, 1e-4)
    _compared[bridge] = (state, same)
    return same


def _users_hooks(module: nn.Module) -> bool:
    """Forward hooks that are not the bridge's own wiring."""
    return any(
        not (handle.is_permanent and "_wire_symbolic_hooks" in getattr(handle.user_hook, "__qualname__", ""))
        for handle in getattr(module, "fwd_hooks", ())
    )


def _refiner(refine: Any, bridge: weakref.ref[Any]) -> Any:
    """A trace's second run, with the transformers model's own modules in place."""

    def again(rows: dict[int, np.ndarray]) -> Any:
        if (alive := bridge()) is None:
            return refine(rows)
        with transformers_model(alive):
            return refine(rows)

    return again


def _around(bridge: weakref.ref[Any]) -> Callable[[], AbstractContextManager[Any]]:
    """What holds while rows of a lazy trace run again."""

    def around() -> AbstractContextManager[Any]:
        return nullcontext() if (alive := bridge()) is None else transformers_model(alive)

    return around


class _Block:
    """What the importances of a layer ask of its block, read from ``model.blocks[index]``."""

    def __init__(self, model: Any, index: int, kv_heads: int) -> None:
        self.index, self.kv_heads, self.module = index, kv_heads, model.blocks[index]
        self.family = SimpleNamespace(name=str(getattr(model.cfg, "model_name", "") or "TransformerLens"))
        self.parallel = "mid" not in _names(model, index, False)
        self.shape = "parallel" if self.parallel else "sequential"
        self.post_norm = _post_norm(self.module, model.cfg, 1)

    def w_o(self, heads: int) -> Tensor:
        weight = self.module.attn.W_O
        if weight.dim() != 3 or len(weight) != heads:
            raise ValueError(
                f"layer {self.index}: W_O is not [head, d_head, d_model] but {list(weight.shape)} (quantised weights "
                f"are not read)"
            )
        return weight.detach().float()

    def value_bias(self) -> Tensor | None:
        bias = getattr(self.module.attn, "b_V", None)
        if bias is None:
            return None
        bias = bias.detach().float().reshape(-1, self.module.attn.W_O.shape[1])
        return bias[:: len(bias) // self.kv_heads]  # grouped heads share theirs

    @property
    def output_bias(self) -> Tensor | None:
        bias = getattr(self.module.attn, "b_O", None)
        return None if bias is None else bias.detach().float()

    def w_down(self) -> Tensor:
        return self.module.mlp.W_out.detach().float()

    @property
    def down_bias(self) -> Tensor | None:
        bias = getattr(self.module.mlp, "b_out", None)
        return None if bias is None else bias.detach().float()


def _post_norm(block: Any, cfg: Any, which: int) -> Any:
    """The norm after attention (1) or after the FFN (2), before it is added to the state."""
    name = (
        f"ln{which}"
        if "olmo" in str(getattr(cfg, "original_architecture", "")).lower() and _is_post(block)
        else f"ln{which}_post"
    )
    found = getattr(block, name, None)
    return found if hasattr(found, "hook_scale") else None


def _is_post(block: Any) -> bool:
    """An OLMo 2 or 3 block of a HookedTransformer: its norms stand behind, under the names of those before."""
    from transformer_lens import utilities

    architectures = getattr(utilities, "architectures", None)
    return getattr(getattr(block, "cfg", None), "original_architecture", None) in getattr(
        architectures, "POST_NORM_ARCHITECTURES", ()
    )


def _names(model: Any, layer: int, neurons: bool) -> dict[str, str]:
    """Role -> hook point of one layer. ``ValueError`` for a layer without attention weights."""
    names, block, prefix = model.hook_dict, model.blocks[layer], f"blocks.{layer}."
    wanted = {
        "pre": "hook_resid_pre",
        "value": "attn.hook_v",
        "pattern": "attn.hook_pattern",
        "post": "hook_resid_post",
    }
    optional = {"mid": "hook_resid_mid", "mlp": "hook_mlp_out"} | ({"neurons": "mlp.hook_post"} if neurons else {})
    if missing := [prefix + name for name in wanted.values() if prefix + name not in names]:
        raise ValueError(f"layer {layer} has no {_listed(missing)}: its attention cannot be read through hooks")
    if getattr(model.cfg, "attn_only", False):
        optional = {}
    wanted |= {role: name for role, name in optional.items() if prefix + name in names}
    for which, role in ((1, "norm"), (2, "ffn norm")):
        if (norm := _post_norm(block, model.cfg, which)) is not None:
            name = next(name for name in (f"ln{which}_post", f"ln{which}") if getattr(block, name, None) is norm)
            wanted[role] = f"{name}.hook_scale"
    return {role: prefix + name for role, name in wanted.items()}


def _gain(norm: Any) -> Tensor | None:
    """What a norm multiplies the scaled state with, ``[d_model]`` float32."""
    original = getattr(norm, "original_component", None)
    if original is not None:
        weight = next(original.parameters())
        return original(torch.ones(1, len(weight), dtype=weight.dtype, device=weight.device))[0].detach().float()
    weight = getattr(norm, "w", None)
    return None if weight is None else weight.detach().float()


def _sequence(index: int, found: Found, item: int, span: slice) -> Found:
    """One sequence of what the hooks of a layer gave."""
    queries, keys = found["pattern"].shape[-2:]
    if not queries == keys == found["pre"].shape[1] == found["value"].shape[1]:
        raise ValueError(
            f"layer {index}: attention weights of {queries} queries to {keys} keys: cache all positions (no pos_slice)"
        )
    return {role: t[item, :, span, span] if role == "pattern" else t[item, span] for role, t in found.items()}


def _layer(model: Any, index: int, found: Found, rows: Tensor | None = None) -> Layer:
    """A sequence's layer as a captured one, at some rows or all. ``ValueError`` for attention that is not causal."""
    tokens = len(found["pre"])
    rows = torch.arange(tokens) if rows is None else rows
    here: Any = slice(None) if len(rows) == tokens else rows.to(found["pre"].device)

    def row(role: str) -> Tensor:
        return found[role][here]

    pattern = found["pattern"][:, here].float()
    width = model.blocks[index].attn.W_O.shape[-2]
    value = found["value"].reshape(tokens, -1, width).transpose(0, 1)
    if bool((pattern * (torch.arange(tokens) > rows[:, None]).to(pattern.device)).any()):
        raise ValueError(f"layer {index}: attention looks ahead; routes are those of causal models")
    block: Any = _Block(model, index, len(value))
    pre, post, mid = row("pre"), row("post"), None if block.parallel else row("mid")
    added = row("mlp") if "mlp" in found else torch.zeros_like(post)
    scale = getattr(block.module.attn, "_result_contribution_scale", 1.0)
    layer = Layer(
        block,
        pattern.new_zeros(*pattern.shape[:2], 1),
        pattern.new_zeros(len(value), tokens, 1),
        value,
        1.0,
        pattern.log(),
        0.0,
        0,
        None,
        residual=pre,
        resid_mid=mid,
        through=mid,
        ffn_out=added,
        resid_post=post,
        scale=float(scale),
        neurons=row("neurons") if "neurons" in found else None,
    )  # type: ignore[arg-type]
    if "norm" in found:
        layer.row_scale, layer.out_scale = 1 / row("norm")[..., 0].float(), _gain(block.post_norm)
        layer.out_scale = torch.ones_like(post[0], dtype=torch.float32) if layer.out_scale is None else layer.out_scale
    if "ffn norm" in found:
        layer.neuron_rows = 1 / row("ffn norm")[..., 0].float()
        layer.neuron_gain = _gain(_post_norm(block.module, model.cfg, 2))
    return layer


def _checked(layer: Layer, advice: str) -> Layer:
    """``ValueError`` where the parts of a layer do not add up."""
    check_finite(layer)
    error, dtype = conservation_error(layer), layer.resid_post.dtype
    if not error <= _TOLERANCE.get(dtype, 1e-5):
        raise ValueError(
            f"layer {layer.index}: what heads (pattern · v · W_O), b_O and the FFN add misses the residual states by "
            f"{error:.1e} relative "
            f"(allowed for {dtype}: {_TOLERANCE.get(dtype, 1e-5):.0e}): {advice}"
        )
    return layer


Run = Callable[
    [int, Callable[[int, Found, int, slice], None]], "Tensor | None"
]  # prompt, what to do with each of its layers -> last logits


def _traces(
    model: Any,
    prompts: list[list[int]],
    texts: list[list[str]],
    tokenizer: Any,
    given: dict[str, Any],
    run: Run,
    again: Any,
) -> list:
    """Traces of prompts whose layers ``run`` hands on; ``again(prompt)`` runs one of them for a second time, or is
    None.
    """
    cfg, positions = model.cfg, given["positions"]
    if given["resume"] is not None:
        raise ValueError(
            "resume= keeps the finished layers of a transformers model; what is read through "
            "TransformerLens' hooks has none"
        )
    rows = [_positions(positions, len(ids)) for ids in prompts]
    elements = cfg.n_layers * cfg.n_heads * sum(len(ids) ** 2 for ids in prompts)
    wanted = replace(given["options"], dense=keeps_dense(given["options"], positions, given["lazy"], elements))
    if given["lazy"] and positions is not None:
        raise ValueError("lazy=True evaluates rows when they are asked for: leave out positions= and dense=True")
    options = wanted.on(model.blocks[0].attn.W_O.device)
    advice = given["advice"]

    def evaluated(
        n: int, run: Run, exact: dict[int, np.ndarray] | None = None, step: Any = None
    ) -> tuple[Any, Tensor | None, float]:
        results: list[LayerImportances] = []
        seconds = 0.0

        def on_layer(index: int, found: Found, item: int, span: slice) -> None:
            nonlocal seconds
            start = time.perf_counter()
            if exact is None or index in exact:
                layer = _checked(_layer(model, index, _sequence(index, found, item, span)), advice)
                whole = None if exact is None else torch.isin(rows[n], torch.from_numpy(exact[index]))
                chosen = options if exact is None else replace(options, neurons=False)
                results.append(
                    _everywhere(importances(rows_of(layer, rows[n]), chosen, whole), rows[n], len(prompts[n]))
                )
            seconds += time.perf_counter() - start
            if step is not None:
                step()

        logits = run(n, on_layer)
        return results, logits, seconds

    def refiner(n: int) -> Any:
        def refine(chosen: dict[int, np.ndarray]) -> Any:
            rerun = again()
            return None if rerun is None else dict(zip(sorted(chosen), evaluated(n, rerun, chosen)[0], strict=True))

        return refine if options.precision == "certified" else None

    traces: list[Trace] = []
    for n, ids in enumerate(prompts):
        if given["lazy"]:
            traces.append(_on_demand(model, ids, texts[n], options, partial(run, n), advice))
            continue
        start = time.perf_counter()
        with tqdm(total=cfg.n_layers, desc="layers", unit="layer", disable=not given["progress"]) as bar:
            found, logits, ours = evaluated(n, run, step=bar.update)
        if len(found) != cfg.n_layers:
            raise ValueError(f"{len(found)} layers were captured but the model has {cfg.n_layers}")
        traces.append(
            _record(
                found,
                options,
                tokens=texts[n],
                token_ids=ids,
                model=_called(model),
                mixers=[""] * cfg.n_layers,
                floor=0.0 if options.dense else options.floor,
                prediction=most_probable(logits, tokenizer),
                timings={"total": time.perf_counter() - start, "importances": ours},
                refine=refiner(n),
            )
        )
    return traces


def _on_demand(model: Any, ids: list[int], text: list[str], options: Options, run: Any, advice: str) -> LazyTrace:
    """A trace whose rows are read from the activations that ``run`` hands on when they are asked for."""
    kept: list[Found] = []
    start = time.perf_counter()
    run(lambda index, found, item, span: kept.append(_sequence(index, found, item, span)))
    source = ReadRows(
        model,
        kept,
        lambda model, index, rows: _layer(model, index, kept[index], rows),
        partial(_checked, advice=advice),
        options,
    )
    return LazyTrace(
        source,
        max(len(found["pattern"]) for found in kept),
        options.neurons,
        tokens=text,
        token_ids=ids,
        model=_called(model),
        mixers=[""] * len(kept),
        shapes=["sequential" if "mid" in found else "parallel" for found in kept],
        floor=options.floor,
        precision=options.precision,
        measure=options.measure,
        backend=options.backend,
        bias=options.bias,
        tolerance=options.tolerance,
        thresholds=options.thresholds,
        timings={"total": time.perf_counter() - start, "importances": 0.0},
    )


def _called(model: Any) -> str:
    """The model's name, for a bridge that of its transformers model."""
    original = unwrap(getattr(model, "original_model", None))
    return model_name(original) if isinstance(original, PreTrainedModel) else str(getattr(model.cfg, "model_name", ""))


def _sizes(cfg: Any) -> Any:
    """What the checks of a prompt ask of a model: how many tokens there are, and how many fit."""
    config = SimpleNamespace(max_position_embeddings=cfg.n_ctx)
    weight = torch.empty(cfg.d_vocab, 0, dtype=torch.float32, device="cpu")
    return SimpleNamespace(
        config=config, get_input_embeddings=lambda: SimpleNamespace(weight=weight), forward=lambda input_ids: None
    )


def _through_hooks(model: Any, tokenizer: Any, text: Any, given: dict[str, Any]) -> Any:
    """Traces of a model that runs prompt by prompt, read through its hook points."""
    read = refuse_inputs(read_prompts(_sizes(model.cfg), tokenizer, text, given["attention_mask"]))
    prompts, several = read.ids, read.several
    texts = [token_texts(tokenizer, ids) for ids in prompts]
    weak = weakref.ref(model)

    def runner(model: Any) -> Run:
        def run(n: int, on_layer: Any) -> Tensor:
            kept: Found = {}
            hooks = []
            for layer in range(model.cfg.n_layers):
                for role, name in _names(model, layer, given["options"].neurons).items():
                    hooks.append(
                        (
                            name,
                            _keeper(
                                kept, role, partial(on_layer, layer, kept, 0, slice(None)) if role == "post" else None
                            ),
                        )
                    )
            ids = torch.tensor([prompts[n]], device=model.blocks[0].attn.W_O.device)
            with undisturbed(model), torch.no_grad(), model.hooks(fwd_hooks=hooks):
                return model(ids, return_type="logits", attention_mask=torch.ones_like(ids))[0, -1]

        return run

    given["advice"] = (
        "a hook changes this forward pass (model.reset_hooks() takes hooks away), or this architecture adds something "
        "that its hook points "
        "do not show; a transformers model of the same weights can be traced itself"
    )
    traces = _traces(
        model,
        prompts,
        texts,
        tokenizer,
        given,
        runner(model),
        lambda: None if (alive := weak()) is None else runner(alive),
    )
    return traces if several else traces[0]


def _keeper(kept: Found, role: str, done: Callable[[], None] | None) -> Callable[..., None]:
    owner = threading.get_ident()

    def keep(activation: Tensor, hook: Any) -> None:
        if threading.get_ident() != owner:  # another thread runs the same model
            return
        kept[role] = activation
        if done is not None:
            done()
            kept.clear()

    return keep


def _of_cache(cache: Any, tokenizer: Any, text: Any, given: dict[str, Any]) -> Any:
    """Traces from an activation cache; no model runs."""
    model = cache.model
    if model is None:
        raise ValueError("the cache has lost its model (cache.model is None), whose W_O is needed: put it back")
    names = [_names(model, layer, given["options"].neurons) for layer in range(model.cfg.n_layers)]
    for before, after in itertools.pairwise(names):
        if after["pre"] not in cache.cache_dict and before["post"] in cache.cache_dict:
            after["pre"] = before["post"]  # the same state
    if missing := [name for layer in names for name in layer.values() if name not in cache.cache_dict]:
        raise ValueError(
            f"the cache has no {_listed(missing)}: add them to names_filter, for which "
            f"flowroutes_fast.integrations.transformer_lens."
            f"hooks_for(model{', neurons=True' if given['options'].neurons else ''}) lists what is needed"
        )
    batched = cache.has_batch_dim
    batch, tokens = (cache.cache_dict[names[0]["pre"]] if batched else cache.cache_dict[names[0]["pre"]][None]).shape[
        :2
    ]
    mask = given["attention_mask"]
    mask = torch.ones(batch, tokens) if mask is None else torch.atleast_2d(torch.as_tensor(mask))
    if tuple(mask.shape) != (batch, tokens):
        raise ValueError(f"the attention mask has shape {list(mask.shape)}, the cache holds {[batch, tokens]}")
    spans = [span_of(row) for row in mask]
    prompts, texts, several = _cached_tokens(model, tokenizer, text, spans, mask)
    weak = weakref.ref(cache)

    def runner(cache: Any) -> Run:
        def run(n: int, on_layer: Any) -> None:
            for layer, roles in enumerate(names):
                found = {role: cache.cache_dict[name] for role, name in roles.items()}
                on_layer(layer, found if batched else {role: t[None] for role, t in found.items()}, n, spans[n])

        return run

    given["advice"] = (
        "the cache does not belong to the model's present weights (processed after the cache was made? "
        "fold_value_biases, "
        "center_writing_weights and refactor_factored_attn_matrices change W_O and b_O), hooks changed activations "
        "while it was made, or "
        "it was padded (give attention_mask), or this architecture adds something that its hook points do not show; "
        "make a new cache with the "
        "model as it is, or trace the model"
    )
    with torch.no_grad():
        traces = _traces(
            model,
            prompts,
            texts,
            tokenizer,
            given,
            runner(cache),
            lambda: None if (alive := weak()) is None else runner(alive),
        )
    return traces if several else traces[0]


def _cached_tokens(
    model: Any, tokenizer: Any, text: Any, spans: Sequence[slice], mask: Tensor
) -> tuple[list[list[int]], list[list[str]], bool]:
    """Ids and texts of what a cache was made from, and whether it was a batch."""
    lengths = [span.stop - span.start for span in spans]
    if text is None:
        return [[-1] * n for n in lengths], [[str(p) for p in range(n)] for n in lengths], len(spans) > 1
    if tokenizer is None and getattr(model, "tokenizer", None) is not None:
        tokenizer = _OwnTokenizer(model)
    whole = (
        [len(ids) for ids in text]
        if isinstance(text, (list, tuple)) and text and isinstance(text[0], (list, tuple))
        else []
    )
    several = len(whole) > 0 or (isinstance(text, Tensor) and text.dim() == 2)
    read = refuse_inputs(
        read_prompts(_sizes(model.cfg), tokenizer, text, mask if several and not bool(mask.all()) else None)
    )
    prompts, several = read.ids, read.several
    if [len(ids) for ids in prompts] != lengths:
        raise ValueError(
            f"the text has {[len(ids) for ids in prompts]} tokens but the cache was made from {lengths}: give what it "
            f"was made from, "
            "with its BOS token (ids are the safest)"
        )
    return prompts, [token_texts(tokenizer, ids) for ids in prompts], several


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
