"""How activations leave a model: layer by layer, through transformers' attention interface and a few forward hooks.

The model's own attention function (sdpa, flash, eager) stays in use; a wrapper keeps its queries, keys, values and mask.
Each layer is handed on when its block has finished, and then released.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.models.families import Block, blocks_of

PREFIX = "flowroutes_capture_"
_lock = threading.RLock()
_active: dict[int, dict[str, Any]] = {}  # id(attention module) -> what its current call leaves


@dataclass
class Layer:
    """Activations of one layer for one sequence, as the model computed them (its dtype, its device)."""

    block: Block
    query: Tensor  # [head, query, d_qk]
    key: Tensor  # [kv_head, key, d_qk]
    value: Tensor  # [kv_head, key, d_head]
    scaling: float
    mask: Tensor | None  # additive [query, key] or [head, query, key]; None: causal
    softcap: float
    window: int
    sinks: Tensor | None  # [head]
    resid_pre: Tensor  # [token, d_model]
    resid_mid: Tensor | None  # [token, d_model]; None in a parallel block
    ffn_out: Tensor  # [token, d_model]
    resid_post: Tensor  # [token, d_model]
    neurons: Tensor | None = None  # what the FFN's down projection multiplies [token, neuron], if asked for

    @property
    def index(self) -> int:
        return self.block.index


def _wrap(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function that keeps its inputs and calls the one the model would have called."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any):  # type: ignore[no-untyped-def]
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        original = ALL_ATTENTION_FUNCTIONS.get(implementation, eager) if implementation != "eager" else eager
        if original is None:
            raise RuntimeError(f"{type(module).__name__} has no {implementation!r} attention function")
        kept = _active.get(id(module))
        if kept is not None:
            kept["calls"] = kept.get("calls", 0) + 1
            kept.update(query=query, key=key, value=value, mask=attention_mask, options=kwargs)
        return original(module, query, key, value, attention_mask, **kwargs)

    return attention


@contextmanager
def _attention_interface(model: Any, blocks: list[Block]) -> Iterator[None]:
    """Route the model's attention calls through wrappers; every config comes back as it was."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    configs: dict[int, Any] = {id(c): c for c in [model.config, *(getattr(b.attention, "config", None) for b in blocks)] if c is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key, config in configs.items():
            implementation = before[key] or "eager"
            name = PREFIX + implementation
            AttentionInterface.register(name, _wrap(implementation))
            if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
                AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The model's mask ``[1, 1 or head, query, key]`` as an additive one without the batch dimension."""
    if mask is None:
        return None
    mask = mask[0, :, : query.shape[-2], : key.shape[-2]]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask[0] if mask.shape[0] == 1 else mask


def _finish(block: Block, kept: dict[str, Any]) -> Layer:
    if kept.get("calls") != 1:
        raise ValueError(
            f"layer {block.index} called the attention interface {kept.get('calls', 0)} times instead of once: "
            "this model computes attention in a way that cannot be captured"
        )
    options = kept["options"]
    query, key = kept["query"][0], kept["key"][0]
    scaling = options.get("scaling")
    mask = _additive(kept["mask"], query, key)
    return Layer(
        block, query, key, kept["value"][0],
        scaling=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        mask=mask,
        softcap=float(options.get("softcap") or 0.0),
        window=int(options.get("sliding_window") or 0) if mask is None else 0,
        sinks=options.get("s_aux"),
        resid_pre=kept["resid_pre"][0],
        resid_mid=None if block.parallel else kept["resid_mid"][0],
        ffn_out=kept["ffn_out"][0],
        resid_post=kept["resid_post"][0],
        neurons=kept["neurons"][0] if "neurons" in kept else None,
    )  # fmt: skip


def capture(model: nn.Module, input_ids: Tensor, on_layer: Callable[[Layer], None], neurons: bool = False) -> Any:
    """Run the model once on ``input_ids [1, token]``; call ``on_layer`` as each block finishes. Returns the model's output.

    The model is left as it was, also after an exception: attention implementation, hooks, training mode.
    """
    blocks = blocks_of(model)
    handles: list[Any] = []

    def watch(block: Block) -> None:
        kept: dict[str, Any] = {}
        _active[id(block.attention)] = kept

        def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
            kept.clear()
            kept["resid_pre"] = _first(args, kwargs)

        def left(module: nn.Module, args: tuple, output: Any) -> None:
            kept["resid_post"] = _tensor(output)
            layer = _finish(block, kept)
            kept.clear()
            on_layer(layer)

        handles.append(block.module.register_forward_pre_hook(entered, with_kwargs=True))
        handles.append(
            block.mid.register_forward_pre_hook(lambda m, args, kwargs: kept.update(resid_mid=_first(args, kwargs)), with_kwargs=True)
        )
        handles.append(block.ffn.register_forward_hook(lambda m, args, output: kept.update(ffn_out=_tensor(output))))
        if neurons:
            if block.down is None:
                raise ValueError(f"layer {block.index}: the FFN of {block.family.name} has no down projection whose neurons could be read")
            handles.append(block.down.register_forward_pre_hook(lambda m, args: kept.update(neurons=args[0])))
        handles.append(block.module.register_forward_hook(left))

    import inspect

    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with _lock, torch.no_grad(), _evaluation_mode(model), _attention_interface(model, blocks):
        try:
            for block in blocks:
                watch(block)
            return model(input_ids=input_ids, **options)
        finally:
            for handle in handles:
                handle.remove()
            for block in blocks:
                _active.pop(id(block.attention), None)
