"""What a user's process may have switched on (autocast, a default device or dtype, rounded products), kept out of our
computations.

:func:`neutral` covers what PyTorch keeps per thread, and touches no other thread. The default dtype and the precision
of float32 products belong to the whole process: the first is answered by a mode of this thread alone, the second by
:func:`matmul`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone")  # types that autocast can be on for


@contextmanager
def neutral() -> Iterator[None]:
    """Run the block as in a fresh process: autocast off, new tensors in float32 on the CPU unless asked otherwise; then
    all is as before.

    This thread alone is concerned. Costs a few microseconds where nothing is switched on; may be nested.

    Raises:
        ValueError: inside FakeTensorMode, where tensors have no numbers.
    """
    if _ordinary():
        yield
        return
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise ValueError(
            "a FakeTensorMode is active, in which tensors are fake: they have shapes and no numbers; "
            "call this outside it"
        )
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, _AUTOCAST):
            torch.set_autocast_enabled(kind, False)
            stack.callback(torch.set_autocast_enabled, kind, True)
        if torch._C._len_torch_function_stack():  # a default device is such a mode
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.enter_context(_Float32())
        # its tensors do not say when they are written to, and no gradient takes them
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


_any_autocast: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", lambda: any(map(torch.is_autocast_enabled, _AUTOCAST))
)


def _ordinary() -> bool:
    """Whether nothing is switched on, as inside :func:`neutral` when nothing was outside."""
    return not (
        _any_autocast()
        or torch._C._len_torch_function_stack()
        or torch.get_default_dtype() != torch.float32
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
    )


def in_neutral(function: Callable[P, R]) -> Callable[P, R]:
    """An operation, run inside :func:`neutral` and without gradients; while torch.compile traces it, as it is.

    Raises:
        MemoryError: PyTorch cannot allocate (it says RuntimeError).
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            if _ordinary() and not torch.is_grad_enabled():
                return function(*args, **kwargs)
            with neutral(), torch.no_grad():
                return function(*args, **kwargs)
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise

    return run


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs as it is where torch.compile meets it, between two compiled parts of its caller."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return run


def rounded(device: torch.device) -> bool:
    """Whether the process lets float32 products on this device be rounded to TF32 or bfloat16
    (torch.set_float32_matmul_precision).
    """
    if torch.compiler.is_compiling():  # the setting is not looked for while tracing
        return False
    owner: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(owner, "matmul", None), "fp32_precision", None)  # torch 2.9
    if precision is not None:
        return precision not in ("ieee", "none")
    return torch.get_float32_matmul_precision() != "highest"


def unrounded(product: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``product(*tensors)`` that no setting of the process rounds: in float64 where float32 products may be, then
    float32 again.
    """
    if tensors[0].dtype == torch.float32 and rounded(tensors[0].device):
        return product(*(tensor.double() for tensor in tensors)).float()
    return product(*tensors)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by :func:`unrounded`."""
    return unrounded(torch.matmul, a, b)


class _Float32(TorchFunctionMode):
    """Gives new floating point tensors float32 where no dtype is asked for, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is None and (func in _FLOATING or (func in _BY_VALUE and _holds_float((args, kwargs)))):
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


_FLOATING = {
    torch.empty,
    torch.empty_strided,
    torch.zeros,
    torch.ones,
    torch.eye,
    torch.linspace,
    torch.logspace,
    torch.rand,
    torch.randn,
    torch.hann_window,
    torch.hamming_window,
    torch.blackman_window,
    torch.bartlett_window,
    torch.kaiser_window,
}
_BY_VALUE = {torch.full, torch.arange, torch.range, torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


def _holds_float(item: Any) -> bool:
    if isinstance(item, (list, tuple)):
        return any(map(_holds_float, item))
    if isinstance(item, dict):
        return any(map(_holds_float, item.values()))
    return type(item) is float
