"""How activations leave a model: layer by layer, through transformers' attention interface and a few forward hooks.

The model's own attention function (sdpa, flash, eager) stays in use; a wrapper keeps its queries, keys, values and
mask. Each layer is handed on when its block has finished, and then released.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.capture.conservation import Conservation, recomputes
from flowroutes_fast.models.causes import causes, foreign_classes, modes, replaced_functions, written_elsewhere
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.models.modules import modules_of
from flowroutes_fast.models.precision import coarsest_dtype
from flowroutes_fast.ops.attention import causal_mask
from flowroutes_fast.system.ambient import neutral

PREFIX = "flowroutes_capture_"
_lock = threading.RLock()
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]  # held by a thread that the child does not have


class _Here(threading.local):
    """What holds on the tracing thread alone: other threads' passes through the same model go on untouched."""

    def __init__(self) -> None:
        self.implementation: dict[int, str] = {}  # id(config) -> name of its attention function
        self.kept: dict[int, dict[str, Any]] = {}  # id(attention module) -> what its current call leaves
        # masks of this pass, read once for all layers
        self.masks: dict[tuple[Any, ...], tuple[Any, Tensor | None]] = {}
        # id(attention module) -> keys and values that its queries meet instead of their own
        self.stored: dict[int, Stored] = {}
        self.depth = 0  # passes that are watched: a hook of the user's may start one within another


_here = _Here()


@dataclass
class Stored:
    """Keys and values of a whole pass, for some rows of a layer that run again."""

    key: Tensor  # [kv_head, key, d_qk]
    value: Tensor  # [kv_head, key, d_head]
    # additive [query, key] or [head, query, key], for the rows that run; None: causal at ``positions``
    mask: Tensor | None
    positions: Tensor  # [query]
    # called with the rows' own keys and values ``[batch, kv_head, query, d]`` first
    found: Callable[[Tensor, Tensor], None] | None = None


@dataclass
class Call:
    """What a block was called with beside its state, for one sequence of a batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int
    batch: int
    first: int  # where the sequence begins in the padded batch
    tokens: int  # of the padded batch


@dataclass
class Layer:
    """Activations of one layer for one sequence, as the model computed them (its dtype, its device), without padding.

    Every part of a sum is as it was added: ``residual`` and ``through`` are the state as it passes attention and the
    FFN by, ``ffn_out`` and ``mixer_out`` include norms and multipliers. A layer without attention weights has no query,
    key and value.
    """

    block: Block
    query: Tensor | None  # [head, query, d_qk]
    key: Tensor | None  # [kv_head, key, d_qk]
    value: Tensor | None  # [kv_head, key, d_head]
    scaling: float
    mask: Tensor | None  # additive [query, key] or [head, query, key]; None: causal
    softcap: float
    window: int
    sinks: Tensor | None  # [head]
    residual: Tensor  # [token, d_model]
    resid_mid: Tensor | None  # [token, d_model]; None in a parallel block
    through: Tensor | None  # [token, d_model]; None in a parallel block
    ffn_out: Tensor  # [token, d_model]
    resid_post: Tensor  # [token, d_model]
    mixer_out: Tensor | None = None  # [token, d_model]: what a mixer without attention weights adds
    row_scale: Tensor | None = None  # [token]: frozen divisors of norms after attention, inverted
    out_scale: Tensor | None = None  # [d_model]: gain of a norm after attention
    in_scale: Tensor | None = None  # [head * d_head]: gain of a norm before W_O
    gate: Tensor | None = None  # [token, head, d_head]
    scale: float = 1.0  # multiplier of what attention adds
    neurons: Tensor | None = None  # what the FFN's down projection multiplies [token, neuron], if asked for
    neuron_rows: Tensor | None = None  # [token]: frozen divisor of a norm after the FFN, inverted, and multipliers
    neuron_gain: Tensor | None = None  # [d_model]: gain of a norm after the FFN
    # [token, head * d_head]: what the attention function returned, before gates, norms and W_O
    mixed: Tensor | None = None
    attention_function: str = ""  # its name; "" where the attention module gave its weights itself
    weight: Callable[[], Tensor] | None = None  # W_O, read once for all sequences of a batch
    state: Tensor | None = None  # [token, d_model], what entered the block; None where that has another shape
    call: Call | None = None
    # [query], where the rows of a causal layer stand among its keys, None: the last ones
    positions: Tensor | None = None

    def output_weight(self) -> Tensor:
        """W_O ``[head, d_head, d_model]``, float32."""
        return self.block.w_o(self.query.shape[0]) if self.weight is None else self.weight()  # type: ignore[union-attr]

    @property
    def index(self) -> int:
        return self.block.index


ROW_WISE = (  # what a layer has a row of for each token
    "residual",
    "resid_mid",
    "through",
    "ffn_out",
    "resid_post",
    "mixer_out",
    "row_scale",
    "gate",
    "neurons",
    "neuron_rows",
    "mixed",
)


def _wrap(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function that keeps its inputs and calls the one the model would have called."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        homes = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
        eager = next((f for home in homes if (f := getattr(home, "eager_attention_forward", None)) is not None), None)
        original = ALL_ATTENTION_FUNCTIONS.get(implementation, eager) if implementation != "eager" else eager
        if original is None:
            raise RuntimeError(f"{type(module).__name__} has no {implementation!r} attention function")
        kept = _here.kept.get(id(module))
        if (stored := _here.stored.get(id(module))) is not None:
            if stored.found is not None:
                stored.found(key, value)
            found = _attend(original, eager, implementation, module, query, stored, kwargs)
        else:
            found = original(module, query, key, value, attention_mask, **kwargs)
        if kept is not None:
            kept["calls"] = kept.get("calls", 0) + 1
            kept.update(query=query, key=key, value=value, mask=attention_mask, options=kwargs, mixed=found[0])
            kept.update(function=implementation, foreign=written_elsewhere(original), stored=stored)
            if (
                implementation == "eager"
                and query.dtype in (torch.bfloat16, torch.float16)
                and isinstance(found[1], Tensor)
            ):
                kept["weights"] = found[1]  # of scores rounded to few bits: where they are large, no one else has these
        return found

    return attention


def _attend(
    original: Any, eager: Any, name: str, module: nn.Module, query: Tensor, stored: Stored, kwargs: dict[str, Any]
) -> Any:
    """Attention of some rows to stored keys and values, by the model's own function where that takes a mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lowest = torch.finfo(query.dtype).min
    mask = stored.mask
    if mask is None:
        window = int(kwargs.get("sliding_window") or 0)
        mask = causal_mask(stored.positions.to(query.device), stored.key.shape[1], window)
    mask = mask.to(query.device, query.dtype).clamp_min(lowest)
    mask = mask[None] if mask.dim() == 3 else mask[None, None]
    if name not in ("eager", "sdpa"):  # flash and flex take other masks
        plain = not kwargs.get("softcap") and kwargs.get("s_aux") is None
        original = ALL_ATTENTION_FUNCTIONS["sdpa"] if plain or eager is None else eager
    return original(module, query, stored.key[None], stored.value[None], mask, **kwargs)


@contextmanager
def attention_functions(names: dict[int, str]) -> Iterator[None]:
    """On this thread alone the configs ``{id(config): name}`` say these attention functions; the configs themselves
    are not changed.
    """
    from transformers import PreTrainedConfig

    own = PreTrainedConfig.__dict__["_attn_implementation"]
    here = property(lambda config: _here.implementation.get(id(config)) or own.fget(config), own.fset)
    before = _here.implementation
    _here.implementation = {**before, **names}
    PreTrainedConfig._attn_implementation = here  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedConfig._attn_implementation = own  # type: ignore[method-assign]
        _here.implementation = before


def attention_configs(model: Any, blocks: list[Block]) -> dict[int, Any]:
    """The configs that a model's attention modules ask for their attention function, ``{id(config): config}``."""
    return {id(c): c for c in [model.config, *(getattr(b.attention, "config", None) for b in blocks)] if c is not None}


@contextmanager
def _attention_interface(model: Any, blocks: list[Block]) -> Iterator[None]:
    """Route the model's attention calls on this thread through wrappers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    names = {}
    for key, config in attention_configs(model, blocks).items():
        implementation = config._attn_implementation or "eager"
        if blocks[0].family.hooked:  # attention weights are asked of the model itself
            names[key] = "eager"
        elif implementation.startswith(PREFIX):  # a capture within a capture
            names[key] = implementation
        else:
            names[key] = name = PREFIX + implementation
            AttentionInterface.register(name, _wrap(implementation))
            if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
                AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    with attention_functions(names):
        yield


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in modules_of(model) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _as_written() -> Iterator[None]:
    """Whatever torch.compile has made of the model or its parts runs as it was written, so that hooks are called and
    attention is asked for.

    Process-wide while it lasts: compiled functions of other threads run uncompiled meanwhile, with the same results,
    and what they compile waits, so that no hook of ours gets into it.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    lock = getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", nullcontext())
    with lock, torch.compiler.set_stance("force_eager"):
        yield


def only_here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing on other threads than this one."""
    owner = threading.get_ident()

    @functools.wraps(hook)
    def called(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == owner else None

    return called


def unwrap(model: Any) -> Any:
    """The transformers model inside ``torch.compile``, ``DataParallel`` or a PEFT wrapper."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise ValueError(
                    "this adapter learns virtual tokens, which have no text to route from; only adapters of weights "
                    "(LoRA) are traced"
                )
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]  # type: ignore[no-any-return]


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _additive(kept: dict[str, Any], block: Block, item: int, span: slice) -> Tensor | None:
    """The pass's attention mask as an additive one ``[query, key]`` or ``[head, query, key]`` of one sequence; None
    where it is plainly causal.

    Read once for all layers that were given the same mask. ``ValueError`` where a position sees later ones.
    """
    mask, tokens = kept["mask"], kept["query"].shape[-2]
    blockwise = type(mask).__name__ == "BlockMask"
    # none, or flash attention's padding: perhaps windowed
    if not blockwise and not (isinstance(mask, Tensor) and mask.dim() == 4):
        causal = kept["options"].get("is_causal")
        causal = getattr(block.attention, "is_causal", True) if causal is None else causal
        if tokens > 1 and (not causal or (mask is None and kept["function"] in ("eager", "flex_attention"))):
            raise TwoSided(block)
        return None
    if not blockwise and mask.is_inference():
        return _read_mask(mask, block, item, span, tokens, blockwise)
    # a hook may write to it between layers
    key = (id(mask), 0 if blockwise else mask._version, item, span.start, span.stop)
    if key not in _here.masks:
        # the mask stays alive: its id is its own
        _here.masks[key] = (mask, _read_mask(mask, block, item, span, tokens, blockwise))
    return _here.masks[key][1]


def _later_mask(kept: dict[str, Any], item: int) -> Tensor | None:
    """The additive mask of tokens that follow those of a cache ``[query, key]`` or ``[head, query, key]``; None
    where they see all.
    """
    mask = kept["mask"]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    mask = mask[min(item, len(mask) - 1), ..., : kept["key"].shape[-2]]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, float("-inf"))
    return None if not bool(mask.any()) else mask if len(mask) > 1 else mask[0]


def _read_mask(mask: Any, block: Block, item: int, span: slice, tokens: int, blockwise: bool) -> Tensor | None:
    if blockwise:
        from torch.nn.attention.flex_attention import create_mask

        at, heads = torch.tensor(item, device=mask.kv_num_blocks.device), mask.shape[1]
        seen = create_mask(lambda b, h, q, k: mask.mask_mod(at, h, q, k), 1, heads, tokens, tokens, device=at.device)
        mask = seen[0, :, span, span]
    else:
        mask = mask[min(item, mask.shape[0] - 1), :, span, span]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, float("-inf"))
    seen = mask > torch.finfo(mask.dtype).min / 2
    if bool(seen.triu(1).any()):
        raise TwoSided(block)
    if mask.shape[0] > 1:
        return mask  # type: ignore[no-any-return]
    return (
        None
        if torch.equal(seen[0], torch.ones_like(seen[0]).tril()) and bool((mask[0][seen[0]] == 0).all())
        else mask[0]
    )


class TwoSided(ValueError):
    """Attention that sees what comes later."""

    def __init__(self, block: Block) -> None:
        super().__init__(
            f"layer {block.index}: the attention of this {block.family.name} model is two-sided (positions see later "
            f"ones); information flow "
            "routes are defined for decoders, where positions see only what came before"
        )


class RanAgain(ValueError):
    """A block that runs more than once, or on something else than the prompt."""

    def __init__(self, block: Block) -> None:
        super().__init__(
            f"layer {block.index} runs more than once in this forward pass, or on other tokens than the prompt's: a "
            f"hook or replaced forward "
            "that runs the model again cannot be traced; remove it, or let it run a copy of the model"
        )


def _norm_scales(norm: nn.Module, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """A norm at one input as ``after = row[..., None] * gain * before``: row ``[token]`` and gain ``[d]``, float32.

    The gain is what the norm makes of ones (up to a factor that the rows absorb); the rows are fitted over all
    channels.
    """
    gain = norm.forward(torch.ones(1, before.shape[-1], dtype=before.dtype, device=before.device))[0].float()
    scaled = before.float() * gain
    total = scaled.square().sum(-1)
    return torch.where(total > 0, (after.float() * scaled).sum(-1) / total, 0), gain


def _finish(block: Block, kept: dict[str, Any], item: int, span: slice) -> Layer:
    """One sequence of a batch as a Layer."""
    family = block.family

    def row(name: str) -> Tensor:
        return kept[name][item, span]  # type: ignore[no-any-return]

    passed, state = family.state_scale(block.module), kept["state"]
    query = key = value = mask = sinks = mixed = None
    softcap, window, scaling, function = 0.0, 0, 1.0, ""
    if block.attention is not None and family.hooked:
        value = kept["value"][item, :, span]
        n_query, n_key = kept["pattern"].shape[-2:]
        later = n_key > n_query  # tokens that follow those of a cache, which has the values of the others
        pattern = kept["pattern"][item, :, span, slice(None) if later else span].float()
        query = torch.zeros(pattern.shape[0], pattern.shape[1], 1, device=pattern.device)
        key = torch.zeros(value.shape[0], value.shape[1], 1, device=pattern.device)
        mask = pattern.log()
        if bool((pattern.triu(1 + n_key - n_query if later else 1) != 0).any()):
            raise TwoSided(block)
        mixed = row("mixed")
    elif block.attention is not None:
        if kept.get("calls") != 1:
            raise ValueError(
                f"layer {block.index} called the attention interface {kept.get('calls', 0)} times instead of once: "
                "this model computes attention in a way that cannot be captured"
            )
        options = kept["options"]
        # tokens that follow those of a cache
        later = kept["key"].shape[-2] > kept["query"].shape[-2] and kept["stored"] is None
        query, key, value = (
            kept["query"][item, :, span],
            *(kept[n][item, :, slice(None) if later else span] for n in ("key", "value")),
        )
        scaling = options.get("scaling")
        scaling = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        mask = (
            None
            if kept["stored"] is not None
            else _later_mask(kept, item)
            if later
            else _additive(kept, block, item, span)
        )
        mixed, function = row("mixed").flatten(1), kept["function"] + (" (replaced)" if kept["foreign"] else "")
        softcap = float(options.get("softcap") or 0.0)
        window = int(options.get("sliding_window") or 0) if mask is None else 0
        sinks = options.get("s_aux")
    ffn = [kept[f"ffn {n}"][item, span] for n in range(len(block.ffn))]
    neurons = row("neurons") if "neurons" in kept else None
    row_scale = out_scale = in_scale = neuron_rows = neuron_gain = None
    if block.ffn_norm is not None:
        ffn[0] = row("ffn_norm out")
        if neurons is not None:
            neuron_rows, neuron_gain = _norm_scales(block.ffn_norm, row("ffn_norm in"), ffn[0])
    if neurons is not None and (factor := family.ffn_scale(block.module) * passed) != 1:
        neuron_rows = (
            torch.full((len(neurons),), factor, device=neurons.device) if neuron_rows is None else neuron_rows * factor
        )
    if block.post_norm is not None and block.attention is not None:
        row_scale, out_scale = _norm_scales(block.post_norm, row("post_norm in"), row("post_norm out"))
    if block.inner_norm is not None:
        inner, in_scale = _norm_scales(block.inner_norm, row("inner_norm in"), row("inner_norm out"))
        row_scale = inner if row_scale is None else row_scale * inner
    gate = None
    if block.gate is not None:
        gate = family.gate_of(block.attention, kept["gate"])[item, span].float()  # type: ignore[arg-type]
    source = row(
        "state" if family.residual == "block" else "argument" if family.residual == "argument" else "attention in"
    )
    mid = None if block.parallel else row("mid")
    through = None if mid is None else row("through") if block.through is not None else mid
    added = ffn[0] if len(ffn) == 1 else sum(ffn)
    mixer = row("mixer") if block.mixer is not None else None
    return Layer(
        block,
        query,
        key,
        value,
        scaling,
        mask,
        softcap,
        window,
        sinks,
        residual=_times(source, family.residual_scale(block.module) * (passed if mid is None else 1.0)),
        resid_mid=mid,
        through=None if through is None else _times(through, family.through_scale(block.module) * passed),
        ffn_out=_times(added, family.ffn_scale(block.module) * passed),
        resid_post=row("post"),
        mixer_out=None if mixer is None else _times(mixer, family.mixer_scale(block.module)),
        row_scale=row_scale,
        out_scale=out_scale,
        in_scale=in_scale,
        gate=gate,
        scale=family.attention_scale(block.module) if block.attention is not None else 1.0,
        neurons=neurons,
        neuron_rows=neuron_rows,
        neuron_gain=neuron_gain,
        mixed=mixed,
        attention_function=function,
        weight=kept.get("weight"),
        state=state[item, span] if state.dim() == 3 else None,
        call=Call(kept["call"][0], kept["call"][1], item, len(state), span.start, state.shape[1]),
    )


def _given_weights(layer: Layer, pattern: Tensor) -> Layer:
    """The layer with attention weights ``[head, query, key]`` that the model gave, instead of queries and keys."""
    assert layer.value is not None
    query, key = (
        pattern.new_zeros((n, pattern.shape[1], 1), dtype=torch.float32) for n in (len(pattern), len(layer.value))
    )
    return replace(layer, query=query, key=key, mask=pattern.float().log(), scaling=1.0, softcap=0.0, window=0)


def some_rows(layer: Layer, rows: Tensor) -> Layer:
    """Some rows of a layer; keys, values and the mask stay as they are."""
    rows = rows.to(layer.resid_post.device)
    taken: dict[str, Any] = {name: None if (t := getattr(layer, name)) is None else t[rows] for name in ROW_WISE}
    return replace(layer, query=None if layer.query is None else layer.query[:, rows], **taken)


def rows_of(layer: Layer, rows: Tensor) -> Layer:
    """The same layer with the query positions ``rows`` (sorted) alone; keys and values stay."""
    n_key = len(layer.resid_post)
    if len(rows) == n_key:
        return layer
    positions = None if layer.mask is not None or int(rows[0]) == n_key - len(rows) else rows.cpu()
    mask = None if layer.mask is None else layer.mask[..., rows.to(layer.resid_post.device), :]
    return replace(some_rows(layer, rows), mask=mask, positions=positions)


def masked(layer: Layer) -> Layer:
    """The same with a mask instead of positions."""
    if layer.positions is None:
        return layer
    mask = causal_mask(layer.positions.to(layer.resid_post.device), layer.key.shape[1], layer.window)  # type: ignore[union-attr]
    return replace(layer, mask=mask, window=0, positions=None)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x.float() * factor


def _watch(
    block: Block, kept: dict[str, Any], neurons: bool, done: Callable[[], None], handles: list[Any], ran: set[int]
) -> None:
    """Hooks that fill ``kept`` while a block runs, and call ``done`` when it has finished; ``ran``: the blocks that
    have in this pass.
    """
    family, depth = block.family, _here.depth

    def here(hook: Callable[..., Any]) -> Callable[..., Any]:
        hook = only_here(hook)
        # not in a pass that a hook of the user's starts
        return lambda *args: hook(*args) if _here.depth == depth else None

    def put(name: str, found: Tensor) -> None:
        if found.dim() == 2:  # [batch * token, d]
            found = found.unflatten(0, kept["state"].shape[:2])
        kept[name] = found

    def before(module: nn.Module, hook: Callable[..., Any]) -> None:
        handles.append(module.register_forward_pre_hook(here(hook), with_kwargs=True))

    def after(module: nn.Module, hook: Callable[..., Any]) -> None:
        handles.append(module.register_forward_hook(here(hook)))

    def enters(module: nn.Module | None, name: str) -> None:
        if module is not None:
            before(module, lambda m, args, kwargs: put(name, _first(args, kwargs)))

    def leaves(module: nn.Module | None, name: str, copy: bool = False) -> None:
        if module is not None:  # a copy where the model may add to it in place
            after(module, lambda m, args, out: put(name, _tensor(out).clone() if copy else _tensor(out)))

    def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if block.index in ran:
            raise RanAgain(block)
        ran.add(block.index)
        kept.clear()
        kept["state"] = _first(args, kwargs)
        kept["call"] = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def attended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, tuple) or not isinstance(output[1], Tensor):
            raise ValueError(f"layer {block.index}: the attention of {family.name} did not give its attention weights")
        kept["pattern"] = output[1]

    before(block.module, entered)
    if block.attention is not None:
        if family.residual == "argument":
            before(block.attention, lambda m, args, kwargs: kept.update(argument=args[1]))
        if family.hooked:
            after(block.attention, attended)
            enters(block.output, "mixed")
            if block.values is None:
                raise ValueError(
                    f"this {family.name} model is not built as expected: layer {block.index} has no {family.values!r}"
                )
            after(block.values, lambda m, args, output: kept.update(value=family.value_of(block.attention, output)))  # type: ignore[arg-type]
    if family.residual == "attention":
        enters(block.attention if block.attention is not None else block.mixer, "attention in")
    leaves(block.mixer, "mixer")
    leaves(block.gate, "gate")
    for norm, name in ((block.post_norm, "post_norm"), (block.ffn_norm, "ffn_norm"), (block.inner_norm, "inner_norm")):
        enters(norm, f"{name} in")
        leaves(norm, f"{name} out")
    enters(block.mid, "mid")
    enters(block.through, "through")
    for n, module in enumerate(block.ffn):
        leaves(module, f"ffn {n}", copy=block.parallel)
    if neurons:
        if block.down is None:
            raise ValueError(
                f"layer {block.index}: the FFN of {family.name} has no down projection whose neurons could be read"
            )
        enters(block.down, "neurons")
    enters(block.post, "post")

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept["left"] = _tensor(output)
        kept.setdefault("post", kept["left"])
        done()

    after(block.module, left)


def capture(
    model: nn.Module,
    input_ids: Tensor,
    on_layer: Callable[[Layer], None] | None = None,
    neurons: bool = False,
    *,
    attention_mask: Tensor | None = None,
    on_item: Callable[[int, Layer], None] | None = None,
    logits_to_keep: int | Tensor = 1,
    check: Conservation | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> Any:
    """Run the model once on ``input_ids [batch, token]``; call ``on_layer(layer)`` or ``on_item(item, layer)`` as each
    block finishes.

    ``inputs``: what else the model is given (images). Every layer is checked first (``check``): ``ValueError`` if its
    parts do not add up to the states. ``logits_to_keep``: how many last positions, or which, the model computes logits
    of, where it can choose. ``attention_mask [batch, token]``: 1 for tokens, 0 for padding (left or right); layers come
    without the padding. Returns the model's output. The model is left as it was, also after an exception: attention
    implementation, hooks, training mode.
    """
    model = unwrap(model)
    blocks = blocks_of(model)
    spans = (
        [slice(0, input_ids.shape[1])] * len(input_ids)
        if attention_mask is None
        else [span_of(row) for row in attention_mask]
    )

    def give(item: int, layer: Layer) -> None:
        if on_layer is not None:
            on_layer(layer)
        if on_item is not None:
            on_item(item, layer)

    check = checker(model, blocks) if check is None else check
    options = forward_options(model, attention_mask, logits_to_keep, blocks[0].family.last_logits)
    for name, tensor in (inputs or {}).items():
        dtype = (
            next(p.dtype for p in model.parameters() if p.is_floating_point())
            if tensor.is_floating_point()
            else tensor.dtype
        )
        options[name] = tensor.to(input_ids.device, dtype)
    with prepared(model, blocks), ExitStack() as stack:
        for block in blocks:
            stack.enter_context(watched(block, spans, neurons, give, check))
        output = _called(model, input_ids, options, inputs or {})
    check.finish()
    return output


def _called(model: nn.Module, input_ids: Tensor, options: dict[str, Any], inputs: dict[str, Tensor]) -> Any:
    """The model's output; ``ValueError`` naming what it was given beside the ids if it fails with it."""
    try:
        return model(input_ids=input_ids, **options)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        if not inputs or isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        given = ", ".join(f"{name!r} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise ValueError(
            f"{type(model).__name__} fails with {given}: {(str(error).splitlines() or [''])[0]}"
        ) from error


def checker(model: nn.Module, blocks: list[Block]) -> Conservation:
    """The check of one forward pass through all blocks; thorough where something may act on single positions, and
    for a model's first.
    """
    _check_distinct(blocks)
    foreign = foreign_classes(blocks)
    thorough = (
        model not in _seen
        or any(_meddled(block.module, foreign) for block in blocks)
        or any(True for _ in modes())
        or any(True for _ in replaced_functions(blocks))
    )
    _seen.add(model)
    return Conservation(len(blocks), coarsest_dtype, lambda block: causes(model, block), thorough)


_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _check_distinct(blocks: list[Block]) -> None:
    """``ValueError`` where two layers are one module, or share their attention: what each did could not be told
    apart.
    """
    owner: dict[int, int] = {}
    for block in blocks:
        for module in {id(m): m for m in (block.module, block.attention) if m is not None}.values():
            if (first := owner.setdefault(id(module), block.index)) != block.index:
                raise ValueError(
                    f"layers {first} and {block.index} share one {type(module).__name__}, which runs more than once "
                    f"in a forward pass: give each "
                    "its own module (copy.deepcopy) to trace this model"
                )


def _meddled(block: nn.Module, foreign: set[type]) -> bool:
    """Do hooks, replaced forwards or code of others (modules of the classes ``foreign``) act within a block?"""
    hooks = nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return True
    return any(
        m._forward_hooks
        or m._forward_pre_hooks
        or type(m) in foreign
        or ("forward" in m.__dict__ and not hasattr(m, "_hf_hook"))
        for m in modules_of(block)
    )


def last_logits(output: Any, kept: list[int], lasts: list[int]) -> dict[int, Tensor]:
    """Per sequence the logits after its last position ``lasts``, from a model's output; a classifier's are those of its
    classes.

    ``kept``: the positions, sorted, that the model was asked for; it may have computed all.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return {}
    if logits.dim() == 2:  # pooled: one row per sequence
        return dict(enumerate(logits))
    return {i: logits[i, kept.index(last) if logits.shape[1] == len(kept) else last] for i, last in enumerate(lasts)}


def forward_options(
    model: nn.Module, attention_mask: Tensor | None, logits_to_keep: int | Tensor, last_logits: bool
) -> dict[str, Any]:
    """What a model's forward pass is called with, beside the ids."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
        if "position_ids" in accepted:
            options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in accepted and last_logits:
        options["logits_to_keep"] = logits_to_keep
    if getattr(model.config, "return_dict", True) is False:
        options["return_dict"] = True
    return options


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, run as it was written, whatever the process has switched on. One thread at a time."""
    with _lock, neutral(), _evaluation_mode(model), _as_written(), _rotations_of_their_own(model):
        yield


@contextmanager
def _rotations_of_their_own(model: nn.Module) -> Iterator[None]:
    """Every pass is rotated as in a fresh model: dynamic rotary embeddings otherwise keep the frequencies of the
    longest prompt so far.
    """
    rotary = [
        m
        for m in modules_of(model)
        if hasattr(m, "max_seq_len_cached") and "dynamic" in str(getattr(m, "rope_type", ""))
    ]
    before = [
        (m, dict(m._buffers), {n: v for n, v in vars(m).items() if n.endswith("max_seq_len_cached")}) for m in rotary
    ]
    handles = [m.register_forward_pre_hook(only_here(lambda module, args: _reset(module))) for m in rotary]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, buffers, lengths in before:
            module._buffers.update(buffers)
            vars(module).update(lengths)


def _reset(rotary: Any) -> None:
    for name, buffer in list(rotary._buffers.items()):
        first = (
            getattr(rotary, name.removesuffix("inv_freq") + "original_inv_freq", None)
            if name.endswith("inv_freq")
            else None
        )
        if first is not None and buffer is not None:
            rotary._buffers[name] = first.to(buffer.device)
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        setattr(rotary, name, rotary.original_max_seq_len)


@contextmanager
def prepared(model: nn.Module, blocks: list[Block]) -> Iterator[None]:
    """A model that can be watched: :func:`undisturbed`, without gradients, attention through our wrapper."""
    with undisturbed(model), torch.no_grad(), _attention_interface(model, blocks):
        outer = _here.kept, _here.masks
        _here.kept, _here.masks = {}, {}
        _here.depth += 1
        try:
            yield
        finally:
            _here.depth -= 1
            _here.kept, _here.masks = outer


@contextmanager
def watched(
    block: Block,
    spans: list[slice],
    neurons: bool,
    on_item: Callable[[int, Layer], None],
    check: Conservation,
    group: int = 0,
    ran: set[int] | None = None,
) -> Iterator[None]:
    """While this lasts, every call of the block (within :func:`prepared`) hands on its layer, sequence by sequence; see
    :func:`capture`.

    ``group``: which of several batches that pass the layers side by side. ``ran``: blocks that have run in this pass;
    who lets several passes follow one another empties it between them.
    """
    kept: dict[str, Any] = {}

    def done() -> None:
        if kept["state"].shape[0] != len(spans) or kept["state"].shape[1] < max(span.stop for span in spans):
            raise RanAgain(block)
        computing = _autocast_to(kept["left"].device.type)
        with neutral(), torch.no_grad():  # the model's own code may have switched something on
            hand_on(computing)

    def hand_on(computing: torch.dtype | None) -> None:
        check.enters(group, block, kept["state"])
        kept["weight"] = functools.cache(
            lambda: block.w_o(len(kept["query"][0]) if "query" in kept else len(kept["pattern"][0]))
        )
        for item, span in enumerate(spans):
            layer = _finish(block, kept, item, span)
            if "weights" in kept and layer.sinks is None and not recomputes(layer):
                layer = _given_weights(layer, kept["weights"][item, :, span, span])
            check(layer, computing)
            on_item(item, layer)
        check.leaves(group, kept["left"])
        kept.clear()

    if block.attention is not None:
        _here.kept[id(block.attention)] = kept
    handles: list[Any] = []
    try:
        _watch(block, kept, neurons, done, handles, set() if ran is None else ran)
        yield
    finally:
        for handle in handles:
            handle.remove()
        _here.kept.pop(id(block.attention), None)


def _autocast_to(device: str) -> torch.dtype | None:
    """The type that the model's own code lets products be computed in (its forward wrapped in autocast), or None."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def span_of(mask: Tensor) -> slice:
    """Where the tokens of a padded sequence are; ``ValueError`` for a mask with holes or without tokens."""
    found = mask.nonzero()[:, 0]
    if not len(found):
        raise ValueError("a sequence of the batch is padding only")
    first, last = int(found[0]), int(found[-1])
    if last - first + 1 != len(found):
        raise ValueError(
            "the attention mask has holes: padding may stand before or after the tokens of a sequence, not between them"
        )
    return slice(first, last + 1)
