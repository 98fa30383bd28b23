"""Why the parts of a block may miss its states: what a model carries that its family's adapter does not know of."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.models.families import Block
from flowroutes_fast.models.rounding import stores_few_bits
from flowroutes_fast.models.weights import is_adapter, named

HARMLESS = ("flowroutes_fast", "accelerate", "transformers", "torch.nn.utils")  # whose hooks change no output that we do not see
MOST = 3  # examples of a kind


def causes(model: nn.Module, block: Block, mask: Tensor | None = None) -> list[str]:
    """Short phrases, one for each thing found on the model or the block; empty if nothing is.

    ``mask``: the additive mask ``[query, key]`` or ``[head, query, key]`` that the layer was captured with.
    """
    found = [
        _autocast(),
        _products(block),
        _several("forward hooks", _hooks(model, block)),
        _several("replaced forward methods", _patched(block)),
        _several("adapters", _adapters(block)),
        _several("quantised layers", _quantised(block)),
        _several("dropout that is switched on", _dropout(block)),
        _attention(block, mask),
        _own_class(block),
    ]
    return [phrase for phrase in found if phrase]


def _several(what: str, found: Iterator[str]) -> str:
    names = list(dict.fromkeys(found))
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return f"{what}: {', '.join(names[:MOST])}{more}" if names else ""


def _autocast() -> str:
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            return f"autocast to {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')} is active"
    return ""


def _products(block: Block) -> str:
    backend: Any = torch.backends.cuda if block.device.type == "cuda" else torch.backends.mkldnn
    kind = getattr(getattr(backend, "matmul", None), "fp32_precision", "ieee")
    if kind == "bf16" or (kind == "tf32" and block.device.type == "cuda"):
        return f"float32 matrix products are computed in {kind} (torch.set_float32_matmul_precision)"
    return ""


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _harmless(hook: Any) -> bool:
    return any(_module_of(hook) == name or _module_of(hook).startswith(name + ".") for name in HARMLESS)


def _hooks(model: nn.Module, block: Block) -> Iterator[str]:
    kinds = torch.nn.modules.module
    for hook in [*kinds._global_forward_hooks.values(), *kinds._global_forward_pre_hooks.values()]:
        if not _harmless(hook):
            yield "a global one"
    for name, module in block.module.named_modules():
        if any(not _harmless(hook) for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]):
            yield f"on {name or 'the block'}"


def _patched(block: Block) -> Iterator[str]:
    for name, module in block.module.named_modules():
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            yield f"{name or 'the block'} (on the module)"
        owner = next((kind for kind in type(module).__mro__ if "forward" in kind.__dict__), nn.Module)
        written = getattr(owner.__dict__.get("forward"), "__module__", None) or owner.__module__
        if written.split(".")[0] not in (owner.__module__.split(".")[0], "torch"):
            yield f"{owner.__name__} (by {written})"


def _adapters(block: Block) -> Iterator[str]:
    for name, module in block.module.named_modules():
        if is_adapter(module) and isinstance(getattr(module, "base_layer", None), nn.Module):
            yield f"{named(module)} at {name}"


def _quantised(block: Block) -> Iterator[str]:
    for name, module in block.module.named_modules():
        if name and not any(module.children()) and stores_few_bits(module):
            yield f"{type(module).__name__} at {name}"


def _dropout(block: Block) -> Iterator[str]:
    for name, module in block.module.named_modules():
        if module.training and float(getattr(module, "p", 0) or 0) > 0 and "Dropout" in type(module).__name__:
            yield name


def _attention(block: Block, mask: Tensor | None) -> str:
    config: Any = getattr(block.attention, "config", None)
    if mask is not None and mask.shape[-1] == mask.shape[-2]:
        hidden = -5e3  # old masks hide with -1e4
        if bool((mask.triu(1) > hidden).logical_and(torch.ones_like(mask).triu(1).bool()).any()):
            return "attention that looks ahead: the mask lets positions see later ones"
    if getattr(config, "use_bidirectional_attention", None) or getattr(block.attention, "is_causal", True) is False:
        return "attention that looks ahead: it is not causal"
    return ""


def _own_class(block: Block) -> str:
    kinds = {type(m).__name__: type(m).__module__ for m in (block.module, block.attention) if m is not None}
    for name, where in kinds.items():
        if not where.startswith("transformers.models.") and not where.startswith("peft."):
            return f"a {name} from {where}, which is not transformers' own"
    return ""
