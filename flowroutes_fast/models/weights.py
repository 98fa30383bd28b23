"""Reading a linear module's weight, whatever holds it: plain, under a LoRA adapter, quantised, offloaded."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def plain(module: Any) -> Any:
    """The module that a PEFT adapter wraps, or the module itself."""
    return getattr(module, "base_layer", module)


def effective_weight(module: Any, layer: int) -> Tensor:
    """The weight that the module multiplies by, float32, with active LoRA adapters added; ``ValueError`` if it cannot be read."""
    base = plain(module)
    with _aligned(base), torch.no_grad():
        weight = _dequantised(base, layer)
        if base is not module:
            weight = weight + _adapters(module, layer).to(weight)
        # offloaded weights go back to disk when the context ends
        return weight.clone() if _offloaded(base) else weight


def effective_bias(module: Any) -> Tensor | None:
    """The module's bias in float32, or None."""
    base = plain(module)
    if getattr(base, "bias", None) is None:
        return None
    with _aligned(base):
        return base.bias.detach().float().clone()


def _offloaded(module: Any) -> bool:
    if not hasattr(module, "_hf_hook"):
        return False
    from accelerate.utils import has_offloaded_params

    return has_offloaded_params(module)


def _aligned(module: Any) -> Any:
    if not _offloaded(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _dequantised(module: Any, layer: int) -> Tensor:
    weight: Any = module.weight
    if type(module).__module__.startswith("bitsandbytes"):
        weight = _bitsandbytes(module)
    elif type(weight) is not torch.nn.Parameter and type(weight) is not Tensor:  # torchao and other tensor subclasses
        weight = weight.dequantize()
    weight = weight.detach()
    if not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"layer {layer}: the weight of a {type(module).__name__} is stored as {weight.dtype} on {weight.device}, which cannot be read"
        )
    return weight.float()


def _bitsandbytes(module: Any) -> Tensor:
    import bitsandbytes.functional as functional

    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        return functional.dequantize_4bit(module.weight, state)
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * scale[:, None] / 127


def _adapters(module: Any, layer: int) -> Tensor:
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return torch.zeros(())
    total = torch.zeros(())
    for name in getattr(module, "active_adapters", []):
        if name not in getattr(module, "lora_A", {}) or getattr(module, "use_dora", {}).get(name):
            raise ValueError(f"layer {layer}: adapter {name!r} is not a plain LoRA; merge it first (model.merge_and_unload())")
        total = total + module.get_delta_weight(name).detach().float()
    return total
