"""The native extension, imported on first use, and its calls: every tensor is checked right where its address is
taken.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import mul
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (Tensor, torch.nn.Parameter)  # types whose memory is their own
_isa: ContextVar[str] = ContextVar("instruction set", default="auto")


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return ``(extension, None)`` or ``(None, reason)``."""
    # torch's OpenMP runtime is in the process already: one thread pool, not two that spin against each other
    try:
        _native = importlib.import_module("flowroutes_fast._native")
    except ImportError as error:
        return None, (
            f"the native extension cannot be imported ({error}); install a C++17 compiler and run "
            "'pip install --force-reinstall --no-deps flowroutes_fast' (or 'pip install -e .' in a checkout)"
        )
    if not hasattr(_native, "instruction_sets"):
        return None, "the native extension is of another version: build it again ('pip install -e .' in a checkout)"
    return _native, None


def extension() -> ModuleType:
    """Return the extension or raise ``RuntimeError`` with the reason why it is missing."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"backend 'cpu' is not available: {reason}")
    return module


def instruction_sets() -> list[str]:
    """Those that the kernels are compiled for and this processor runs, the fastest first; none without the
    extension.
    """
    module = load()[0]
    return [] if module is None else list(module.instruction_sets())


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the block's native kernels on one instruction set (``"baseline"``, ``"avx2"``, ``"avx512"``) instead of
    the fastest.
    """
    token = _isa.set(name)
    try:
        yield
    finally:
        _isa.reset(token)


def address(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, inner: bool = False
) -> int:
    """Where a tensor's numbers lie, once it is what the kernel takes it for.

    Args:
        name: for the messages. shape, dtype: what it must have. inner: only the last dimension must be contiguous, not
            the whole.

    Raises:
        ValueError: another shape, device, layout, or strides. TypeError: another dtype, or a tensor without memory
            (fake, meta, of vmap).
    """
    try:  # as nearly always, told in half a microsecond; whatever else is looked at closely
        if (
            type(tensor) in PLAIN
            and tensor.dtype is dtype
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and tensor.shape == shape
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and (at := tensor.data_ptr())
            and tensor.untyped_storage().nbytes() >= tensor.storage_offset() * dtype.itemsize + tensor.nbytes
        ):
            return at
    except RuntimeError:  # a wrapper, say of torch.func.vmap
        pass
    return _address(name, tensor, shape, dtype, inner)


def address_within(name: str, tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The same for float32 numbers at these strides, the last of which is 1."""
    try:
        if (
            type(tensor) in PLAIN
            and tensor.dtype is torch.float32
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and tensor.shape == shape
            and tensor.stride() == strides
            and strides[-1] == 1
            and not tensor.is_neg()
            and (at := tensor.data_ptr())
            and tensor.untyped_storage().nbytes()
            >= 4 * (tensor.storage_offset() + sum(map(mul, shape, strides)) - sum(strides) + 1)
        ):
            return at
    except RuntimeError:
        pass
    return _address(name, tensor, shape, torch.float32, inner=True)


def _address(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, inner: bool) -> int:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor on the CPU, got a {tensor.layout} tensor on {tensor.device}")
    if tensor.shape != (shape if isinstance(shape, tuple) else tuple(shape)):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    whole = tensor.is_contiguous()
    if tensor.is_neg() or not (whole or (inner and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1))):
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    try:
        at = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    except RuntimeError:  # a wrapper, say of torch.func.vmap
        at = 0
    if not at and tensor.numel():
        raise TypeError(
            f"{name} is a {type(tensor).__name__} without memory of its own: the native kernels take real tensors"
        )
    count = tensor.numel()
    last: Any = (
        count - 1 if whole else sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    )
    last += tensor.storage_offset()
    if count and tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size():
        raise ValueError(
            f"{name} has a storage of {tensor.untyped_storage().nbytes()} bytes, too few for shape {list(tensor.shape)}"
        )
    return at


class Arguments(dict[str, Any]):
    """What a native operation is called with: numbers as they are, tensors by their addresses, kept alive as long
    as this.
    """

    def __init__(self, **numbers: Any) -> None:
        super().__init__(numbers)
        self.kept: list[Tensor] = []

    def take(
        self,
        name: str,
        tensor: Tensor | None,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        where: str | None = None,
    ) -> None:
        """A contiguous tensor of this shape, or nothing for None; ``where``: its field's name."""
        if tensor is None:
            return
        if not tensor.is_contiguous() or tensor.is_neg():
            tensor = contiguous(tensor)
        self[where or name] = address(name, tensor, shape, dtype)
        self.kept.append(tensor)

    def take_rows(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], strides: Sequence[str | None], where: str | None = None
    ) -> None:
        """A tensor whose last dimension is contiguous, and the strides of the others as the fields of these names."""
        steps = tensor.stride()
        if steps[-1] != 1 or tensor.is_neg():
            tensor = contiguous(tensor)
            steps = tensor.stride()
        self[where or name] = address_within(name, tensor, shape, steps)
        self.kept.append(tensor)
        for stride, field in zip(steps, strides, strict=False):
            if field:
                self[field] = stride

    def make(self, name: str, *shape: int) -> Tensor:
        """A float32 tensor on the CPU for the kernel to write, not initialised."""
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        self.take(name, out, *shape)
        return out

    def call(self, operation: str) -> Any:
        """Run the operation of the extension on these arguments.

        Raises:
            RuntimeError: no extension. ValueError: arguments that do not fit, NaN among them. IndexError: an index
                outside. MemoryError.
        """
        return getattr(extension(), operation)(self, _isa.get())


def contiguous(tensor: Tensor) -> Tensor:
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


def rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 and not tensor.is_neg() else contiguous(tensor)


def edges(found: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Index ``[3, n]`` (query, key, head; int32) and value ``[n]`` as tensors."""
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])
