"""Why the parts of a block may miss its states: what a model carries that its family's adapter does not know of."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from flowroutes_fast.models.families import Block
from flowroutes_fast.models.modules import modules_of
from flowroutes_fast.models.rounding import stores_few_bits
from flowroutes_fast.models.weights import is_adapter, named

# whose hooks change no output that we do not see
HARMLESS = ("flowroutes_fast", "accelerate", "transformers", "torch.nn.utils")
IDLE = ("nnsight",)  # whose forwards, put on once and for all, do nothing outside its own contexts
LIBRARIES = (  # whose code does alike at all positions
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "flowroutes_fast",
    "flash_attn",
    "causal_conv1d",
    "mamba_ssm",
    "fla",
    "kernels",
)
CALLED = ("forward", "__call__", "_wrapped_call_impl", "_call_impl")  # methods that a call of a module goes through
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
        _several("replaced functions", replaced_functions([block])),
        _several("modes that take PyTorch's calls", modes()),
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


def put_on(model: nn.Module, block: Block) -> str:
    """What others put on a block and may do different things at different positions, as one phrase; empty for
    nothing.
    """
    forwards = (
        f"the forward of {name or 'the block'}"
        for name, module in block.module.named_modules()
        if "forward" in module.__dict__
        and not hasattr(module, "_hf_hook")
        and type(module.__dict__["forward"]).__module__.split(".")[0] not in IDLE
    )
    return " and ".join(
        phrase
        for phrase in (_several("forward hooks", _hooks(model, block)), _several("replaced methods", forwards))
        if phrase
    )


def _patched(block: Block) -> Iterator[str]:
    for name, module in block.module.named_modules():
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            yield f"{name or 'the block'} (on the module)"
        for method in CALLED:
            owner = next((kind for kind in type(module).__mro__ if method in kind.__dict__), nn.Module)
            written = _foreign(getattr(owner, method, None), owner.__module__)
            if written:
                yield f"{owner.__name__}{'' if method == 'forward' else '.' + method} (by {written})"


def written_elsewhere(function: Any) -> bool:
    """Whether a function is, or wraps or is wrapped by, one that is not of PyTorch, transformers or the libraries
    that serve them.
    """
    return bool(_foreign(function))


def _foreign(function: Any, home: str = "torch") -> str:
    """The first module that a function or what it wraps was written in and that is neither of LIBRARIES nor of
    ``home``'s package.
    """
    known = (*LIBRARIES, home.split(".")[0])
    while function is not None:
        function = getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType):
            written = str(function.__globals__.get("__name__"))
        elif isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType)):
            return ""
        else:
            written = _module_of(function)
        if (root := written.split(".")[0]) not in known and root not in sys.stdlib_module_names:
            return written
        function = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
    return ""


def foreign_classes(blocks: list[Block]) -> set[type]:
    """Classes of modules in these blocks that other code than the libraries' runs in."""
    kinds = {type(module) for block in blocks for module in modules_of(block.module)}
    return {kind for kind in kinds if any(written_elsewhere(getattr(kind, method, None)) for method in CALLED)}


def replaced_functions(blocks: list[Block]) -> Iterator[str]:
    """Functions that the model's code or attention calls and that something has put in the place of the libraries'
    own.
    """
    calls = torch.nn.functional
    for owner, names in (
        (calls, ("scaled_dot_product_attention", "softmax", "linear")),
        (torch, ("matmul", "softmax", "bmm")),
    ):
        for name in names:
            if written := _foreign(getattr(owner, name)):
                yield f"{name} (by {written})"
    for config in {
        id(c): c for block in blocks if (c := getattr(block.attention, "config", None)) is not None
    }.values():
        name = str(getattr(config, "_attn_implementation", "") or "").removeprefix("flowroutes_capture_")
        if written := _foreign(_attention_functions().get(name)):
            yield f"the attention function {name!r} (by {written})"
    homes = {
        kind.__module__
        for block in blocks
        for m in (block.module, block.attention)
        if m is not None
        for kind in type(m).__mro__
    }
    homes.add("transformers.integrations.sdpa_attention")
    for home in sorted(home for home in homes if home.startswith("transformers.") and home in sys.modules):
        for name, function in vars(sys.modules[home]).items():
            if name.startswith("__"):  # what torch.compile has made of the module's functions
                continue
            if isinstance(function, types.FunctionType) and (written := _foreign(function)):
                yield f"{name} (by {written})"


def _attention_functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def modes() -> Iterator[str]:
    """Names of the modes of the user's that see every call of PyTorch on this thread."""
    for mode in [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]:
        if not isinstance(mode, DeviceContext) and not type(mode).__module__.startswith("flowroutes_fast."):
            yield type(mode).__name__


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
