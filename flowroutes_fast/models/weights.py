"""What a linear module multiplies by and adds, whatever stores it: plain, adapted, quantised, packed, masked,
offloaded.

PyTorch's own linear layer is read. A known stored format is taken apart and believed only if it gives what the module
gives. Any other module is asked: its answers to zero and to the identity are its bias and its weight, if it answers
like a linear map.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flowroutes_fast.models.modules import modules_of, name_of
from flowroutes_fast.models.rounding import (
    AGREEMENT,
    LOW_BIT_AGREEMENT,
    coarsest_of,
    computing_types,
    stores_few_bits,
    type_of_error,
)

NUMBERS_AT_ONCE = 2**24  # of the identity and of the answers to it, in float32
_LINEAR = {"torch.nn.modules.linear.Linear.forward", "transformers.pytorch_utils.Conv1D.forward"}
_BY_WRAPPER = {
    "xlora": "X-LoRA: a pass of its own mixes its experts",
    "poly": "Poly: it needs task_ids",
    "shadow": "Shadow: it runs beside the model",
}
_WIDTHS = ("in_features", "infeatures", "input_size", "nx")


def plain(module: Any) -> Any:
    """The module that adapters wrap, or the module itself."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def effective_weight(module: Any, layer: int) -> Tensor:
    """The weight ``[out, in]`` that the module multiplies by, float32, with active adapters; ``ValueError`` if
    there is no such weight.
    """
    return module.weight.detach().float() if _is_untouched(module) else _read(module, layer)[0]


def effective_bias(module: Any, layer: int = -1) -> Tensor | None:
    """What the module adds ``[out]``, float32, with active adapters; None if nothing. ``ValueError`` if it cannot
    be asked.
    """
    if module is None:
        return None
    if _is_untouched(module):
        return None if module.bias is None else module.bias.detach().float().clone()
    stand_in = quiet(module)
    with _undisturbed():
        if _is_linear(stand_in):
            with _aligned(stand_in):
                return None if stand_in.bias is None else stand_in.bias.detach().float().clone()
        bias = _Answers(stand_in, layer).bias
    return bias if bias.any() else None


def _is_untouched(module: Any) -> bool:
    """PyTorch's own linear layer with nothing on it, told in microseconds: it is asked for every layer of every
    pass.
    """
    if (
        type(module) is not nn.Linear
        or not module.__dict__.keys().isdisjoint(("forward", "_hf_hook", "_old_forward"))
        or module._forward_pre_hooks
    ):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and _is_readable(weight)
        and (bias is None or (type(bias) is nn.Parameter and _is_readable(bias)))
    )


def _is_readable(t: Tensor) -> bool:
    return t.is_floating_point() and t.element_size() > 1 and not t.is_meta and t.layout == torch.strided


def check_adapters(model: nn.Module) -> None:
    """``ValueError`` for adapters that act through their wrapper's forward pass, which a trace does not call."""
    for module in modules_of(model):
        if (why := _depends_on_wrapper(module)) is not None:
            name = name_of(module, model)
            raise ValueError(
                f"the adapter on {name or 'the model'} ({why}) cannot be traced: disable it, or merge it "
                f"where it can be"
            )


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What changes when a model's weights are written to or its adapters switched; weights that come and go
    (offloaded, packed) are left out.
    """
    held = [m for m in modules_of(model) if "_hf_hook" not in m.__dict__]
    return _versions(_weights(held)), _switches(held)


def state_and_places(model: nn.Module) -> tuple[Any, ...]:
    """The same, and where the weights are, and their types: what changes when a model is moved or converted."""
    held = [m for m in modules_of(model) if "_hf_hook" not in m.__dict__]
    weights = _weights(held)
    return _versions(weights), _switches(held), tuple([(p.data_ptr(), p.dtype) for p in weights])


def _weights(held: list[nn.Module]) -> list[nn.Parameter]:
    return [
        p
        for m in held
        for p in m._parameters.values()
        if type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta
    ]


def _versions(weights: list[nn.Parameter]) -> tuple[Any, ...]:
    return tuple([(id(p), 0 if p.is_inference() else p._version) for p in weights])


def _switches(held: list[nn.Module]) -> tuple[Any, ...]:
    adapters = [m for m in held if is_adapter(m)]
    return tuple(
        tuple(map(str, (getattr(m, name, "") for name in ("disable_adapters", "merged", "active_adapters"))))
        for m in adapters
    )


def _depends_on_wrapper(module: Any) -> str | None:
    kind = type(module).__module__.removeprefix("peft.tuners.").split(".")[0]
    if is_adapter(module) and kind in _BY_WRAPPER and not getattr(module, "disable_adapters", False):
        return _BY_WRAPPER[kind]
    variants: Any = module.__dict__.get("lora_variant")
    if not variants:
        return None
    off = getattr(module, "disable_adapters", False) or getattr(module, "merged", False)
    active = () if off else module.active_adapters
    if any("ALora" in getattr(variants.get(name), "__name__", type(variants.get(name)).__name__) for name in active):
        return "activated LoRA: it acts only on tokens after its invocation sequence"
    return None


def rounding_of(module: Any, layer: int) -> torch.dtype:
    """The coarsest type a linear module says or shows to compute in; int8 and float8_e4m3fn: it rounds its inputs
    to 8 bits.
    """
    stand_in = quiet(module)
    with _undisturbed():
        if _is_linear(stand_in):
            return coarsest_of(computing_types(stand_in), _device(stand_in))
        answers = _Answers(stand_in, layer)
        said = computing_types(stand_in) | answers.types()
        if stores_few_bits(stand_in):
            said.add(type_of_error(answers.additivity_error()))
        return coarsest_of(said, answers.device)


def quiet(module: nn.Module) -> Any:
    """A stand-in that shares a module's tensors: in evaluation mode, without hooks; asking it leaves the module as
    it was.
    """
    return _copied(module, {})


def _copied(module: Any, made: dict[int, Any]) -> Any:
    module = getattr(module, "_orig_mod", module)  # inside torch.compile
    if id(module) in made or isinstance(module, torch.jit.ScriptModule):
        return made.get(id(module), module)
    found = made[id(module)] = object.__new__(type(module))
    state = found.__dict__
    state.update({name: _rebound(value, module, found) for name, value in module.__dict__.items()})
    state["_parameters"] = {
        n: nn.Parameter(p.detach(), False) if type(p) is nn.Parameter else p for n, p in module._parameters.items()
    }
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {
        name: None if child is None else _copied(child, made) for name, child in module._modules.items()
    }
    state["training"], state["_compiled_call_impl"] = False, None
    for hook in module._forward_pre_hooks.values():  # pruning and the older norms of weights make the weight in a hook
        if type(hook).__module__.startswith("torch.nn.utils."):
            hook(found, ())
    state["_call_impl"] = found.forward  # no hooks, of this module or global
    return found


def _rebound(value: Any, module: nn.Module, stand_in: nn.Module) -> Any:
    """An attribute for the stand-in: methods put on the module itself act on the stand-in, uncompiled."""
    value = getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, stand_in)
    if isinstance(value, functools.partial) and value.args and value.args[0] is module:
        return functools.partial(value.func, stand_in, *value.args[1:], **value.keywords)
    return value


@contextlib.contextmanager
def _undisturbed() -> Any:
    """No gradients and no autocast, whatever surrounds the caller."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _is_linear(module: Any) -> bool:
    forward = module.forward
    if isinstance(forward, functools.partial) and getattr(forward.func, "__module__", "") == "accelerate.hooks":
        forward = module._old_forward
    function = getattr(forward, "__func__", None)
    if f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}" not in _LINEAR:
        return False
    weight, bias = module.weight, module.bias
    return all(
        type(t) in (nn.Parameter, Tensor) and t.is_floating_point() and t.element_size() > 1
        for t in (weight, bias)
        if t is not None
    )


def _read(module: Any, layer: int) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, in]`` and bias ``[out]`` or None, float32."""
    if (why := _depends_on_wrapper(module)) is not None:
        raise ValueError(f"layer {layer}: an adapter ({why}) cannot be traced: disable it")
    stand_in = quiet(module)
    with _undisturbed():
        if _is_linear(stand_in):
            return _plain_parts(stand_in, layer)
        answers = _Answers(stand_in, layer)
        for stored in (_lora, _bitsandbytes, _dequantised):
            weight = _attempt(stored, stand_in, layer)
            if weight is not None and answers.agree(weight):
                return weight, answers.bias
        return answers.weight(), answers.bias


def _plain_parts(module: Any, layer: int) -> tuple[Tensor, Tensor | None]:
    with _aligned(module):
        weight, bias = module.weight.detach(), module.bias
        if weight.is_meta or weight.dim() != 2:
            shape = list(weight.shape)
            raise ValueError(
                f"layer {layer}: the weight {shape} of {named(module)} on {weight.device} cannot be read: load the "
                f"model whole, "
                "on this process alone, or with device_map="
            )
        weight = weight.T if "Conv1D.forward" in _forward_name(module) else weight
        bias = None if bias is None else bias.detach().float()
        # offloaded weights go back to disk when the context ends
        return (
            (weight.float().clone(), bias if bias is None else bias.clone())
            if _offloaded(module)
            else (weight.float(), bias)
        )


def _forward_name(module: Any) -> str:
    return str(getattr(type(module).forward, "__qualname__", ""))


def _offloaded(module: Any) -> bool:
    if not hasattr(module, "_hf_hook"):
        return False
    from accelerate.utils import has_offloaded_params

    return has_offloaded_params(module)  # type: ignore[no-any-return]


def _aligned(module: Any) -> Any:
    if not _offloaded(module):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


class _Answers:
    """What a module gives for zero, random vectors and the identity. ``ValueError`` if it cannot be asked."""

    def __init__(self, module: Any, layer: int) -> None:
        self.module, self.layer = module, layer
        for part in module.modules():
            if not hasattr(part, "_hf_hook") and any(p is not None and p.is_meta for p in part._parameters.values()):
                raise ValueError(
                    f"layer {layer}: {named(module)} has no weights: its {type(part).__name__} is on the meta device"
                )
        self.device = _device(module)
        self.width, self.dtype = self._accepted()
        self.bias = self._bias()

    def __call__(self, x: Tensor) -> Tensor:
        """``x [row, in]`` on the module's device -> ``[row, out]`` float32."""
        found = self.module.forward(x.to(self.dtype)[None])
        found = found[0] if isinstance(found, tuple) else found
        return found[0].float()  # type: ignore[no-any-return]

    def _accepted(self) -> tuple[int, torch.dtype]:
        """The first width and type of an input that the module takes."""
        types_ = [torch.float32, *sorted(computing_types(self.module), key=str), torch.bfloat16, torch.float16]
        why: Exception | None = None
        for width in _widths(self.module):
            for dtype in dict.fromkeys(types_):
                self.dtype = dtype
                try:
                    if self(torch.zeros(1, width, dtype=torch.float32, device=self.device)).dim() == 2:
                        return width, dtype
                except Exception as error:  # a module may say in any way that it does not take this
                    why = error
        reason = (
            "it does not say how wide its input is (in_features)" if why is None else f"it fails: {_first_line(why)}"
        )
        raise ValueError(
            f"layer {self.layer}: {named(self.module)} cannot be asked what it multiplies by: {reason}"
        ) from why

    def _bias(self) -> Tensor:
        found = self(torch.zeros(1, self.width, dtype=torch.float32, device=self.device))[0]
        if bool(torch.isfinite(found).all()):
            return found
        x = self._random(1)  # a scale of nothing may be infinite
        return (self(x) + self(-x))[0] / 2

    def _random(self, rows: int) -> Tensor:
        found = torch.randn(
            rows, self.width, generator=torch.Generator("cpu").manual_seed(rows), dtype=torch.float32, device="cpu"
        )
        return (found / 2).to(self.dtype).float().to(self.device)

    def _allowed(self, rounded: bool) -> float:
        """Relative difference that rounding explains; ``rounded``: also that of inputs to few bits."""
        if rounded and stores_few_bits(self.module):
            return LOW_BIT_AGREEMENT
        return AGREEMENT[coarsest_of({self.dtype, *computing_types(self.module)}, self.device)]

    def agree(self, weight: Tensor) -> bool:
        """Whether the module multiplies by ``weight [out, in]``."""
        if weight.shape != (len(self.bias), self.width):
            return False
        x = self._random(3)
        return _distance(x @ weight.T + self.bias, self(x)) <= self._allowed(rounded=True)

    def types(self) -> set[torch.dtype]:
        """The half-precision types that all its answers are numbers of."""
        found = self(self._random(3))
        return {t for t in (torch.float16, torch.bfloat16) if torch.equal(found.to(t).float(), found)}

    def additivity_error(self) -> float:
        """‖f(x + y) − f(x) − f(y) + f(0)‖ / ‖f(x + y) − f(0)‖."""
        x = self._random(4)
        one, other = self(x[:2]), self(x[2:])
        both = self(x[:2] + x[2:]) - self.bias
        return _distance(one + other - 2 * self.bias, both)

    def weight(self) -> Tensor:
        """``[out, in]``: what the module makes of the identity; ``ValueError`` for one that is not linear."""
        self._check_scaling()
        for asked in (_Answers(_without_bias(self.module), self.layer), self):
            found = asked._identity()
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"layer {self.layer}: {named(self.module)} answers with NaN or infinite numbers")
            if self.agree(found):
                return found
        x = self._random(3)
        self._refuse(
            f"what it gives is {_distance(x @ found.T + self.bias, self(x)):.1%} off what one matrix would give"
        )

    def _identity(self) -> Tensor:
        scale = self._scale()
        found = torch.empty(len(self.bias), self.width, dtype=torch.float32, device=self.device)
        rows = max(1, NUMBERS_AT_ONCE // max(self.width, len(self.bias)))
        for start in range(0, self.width, rows):
            stop = min(start + rows, self.width)
            x = torch.zeros(stop - start, self.width, dtype=torch.float32, device=self.device)
            x[torch.arange(stop - start, device=self.device), torch.arange(start, stop, device=self.device)] = scale
            found[:, start:stop] = ((self(x) - self.bias) / scale).T
        return found

    def _check_scaling(self) -> None:
        x = self._random(3)
        once = self(x) - self.bias
        for factor, rounded in ((2, False), (-1, True)):
            error = _distance(factor * once + self.bias, self(factor * x))
            if not error <= self._allowed(rounded):
                self._refuse(f"{factor} times an input misses {factor} times its output by {error:.1%}")

    def _refuse(self, what: str) -> NoReturn:
        way_out = (
            "merge the adapter first (model.merge_and_unload()) or disable it"
            if is_adapter(self.module)
            else "replace it"
        )
        raise ValueError(
            f"layer {self.layer}: {named(self.module)} is not linear ({what}), so its output cannot be split into "
            f"parts: {way_out}"
        )

    def _scale(self) -> float:
        """What to multiply the identity by so that a large bias does not round the weights away: a power of two."""
        size = float(self.bias.abs().max())
        rough = float((self(self._random(1)) - self.bias).abs().max()) * 2 / self.width**0.5
        return float(min(2**12, 2 ** max(0, int(size / max(rough, 1e-30)).bit_length()))) if size and rough else 1.0


def _without_bias(module: Any) -> Any:
    """A stand-in whose biases are zero, so that they round nothing away."""
    found = quiet(module)
    for part in found.modules():
        if type(bias := part._parameters.get("bias")) is nn.Parameter and bias.is_floating_point():
            part._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), False)
    return found


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def named(module: Any) -> str:
    """A module for a message: its type, and what it wraps."""
    kind = type(module)
    base = plain(module)
    name = (
        f"{kind.__module__.removeprefix('peft.tuners.').split('.')[0]} adapter"
        if is_adapter(module)
        else f"a {kind.__name__}"
    )
    return name if base is module else f"the {name} on a {type(base).__name__}".replace("the a ", "a ")


def is_adapter(module: Any) -> bool:
    """Whether PEFT made the module."""
    return type(module).__module__.startswith("peft.")


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _device(module: Any) -> torch.device:
    device = getattr(getattr(plain(module), "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((t.device for t in _tensors(module) if not t.is_meta), torch.device("cpu"))


def _widths(module: Any) -> list[int]:
    """How wide the module's input may be: what it says, else the dimensions of what it stores, which may be packed."""
    base = plain(module)
    for name in _WIDTHS:
        if isinstance(width := getattr(base, name, None), int):
            return [width]
    if "Conv1D.forward" in _forward_name(base):
        return [base.weight.shape[0]]
    sizes = dict.fromkeys(size for t in _tensors(base) if t.dim() > 1 for size in reversed(t.shape) if size > 1)
    return [size * packed for packed in (1, 2, 4, 8) for size in sizes]


def _attempt(stored: Any, module: Any, layer: int) -> Tensor | None:
    """A stored format's weight, or None for another format or an unexpected version of it: the module is asked then."""
    try:
        return stored(module, layer)  # type: ignore[no-any-return]
    except Exception:
        return None


def _lora(module: Any, layer: int) -> Tensor | None:
    """Plain LoRA: base + scaling B A. Its variants are asked."""
    if not hasattr(module, "lora_A") or not isinstance(getattr(module, "base_layer", None), nn.Module):
        return None
    weight = _read(module.base_layer, layer)[0]
    for name in () if module.merged or module.disable_adapters else module.active_adapters:
        if name in module.lora_A:
            a, b = (getattr(module, side)[name].weight.detach().float() for side in ("lora_A", "lora_B"))
            weight = weight + (b @ a).to(weight.device) * module.scaling[name]
    return weight


def _bitsandbytes(module: Any, layer: int) -> Tensor | None:
    if not type(module).__module__.startswith("bitsandbytes"):
        return None
    import bitsandbytes.functional as functional

    data, state = module.weight.data, getattr(module.weight, "quant_state", None)
    if state is None:
        scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return data.float() * scale[:, None] / 127  # type: ignore[no-any-return]
    if getattr(state, "packing_format_for_cpu", False):  # for AVX-512 BF16, done at the first forward pass
        state = copy.copy(state)
        absmax, state.original_nested = state.absmax.float().T.reshape(-1).contiguous(), False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax, state.dtype = absmax, torch.float32
    return functional.dequantize_4bit(data, state).float()  # type: ignore[no-any-return]


def _dequantised(module: Any, layer: int) -> Tensor | None:
    """Weights of torchao and of other tensor subclasses."""
    weight = getattr(module, "weight", None)
    if type(weight) in (nn.Parameter, Tensor) or not hasattr(weight, "dequantize"):
        return None
    return weight.dequantize().detach().float()  # type: ignore[no-any-return,union-attr]
