"""Which backend serves a tensor, and why one does not."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from flowroutes_fast.ops import native

BACKENDS = ("reference", "cpu", "triton", "cuda")


@functools.cache
def triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with 'pip install triton'"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA device"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which takes tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cuda_missing() -> str | None:
    from flowroutes_fast.ops.cuda import missing

    reason = missing()
    if reason is None and (without := triton_missing()):
        return f"its bounds are Triton's: {without}"
    return reason


_MISSING: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": lambda: native.load()[1],
    "triton": triton_missing,
    "cuda": cuda_missing,
}


def backend_status() -> dict[str, str | None]:
    """Every backend with None when it is available, or the reason why it is not."""
    return {name: _MISSING[name]() for name in BACKENDS}


def choose_backend(backend: str, tensor: Tensor) -> str:
    """Resolve ``"auto"`` for this tensor: ``"cpu"`` or ``"triton"`` by its device, ``"reference"`` where they are
    missing.

    Raises:
        ValueError: an unknown name, or one that does not serve this tensor's device or dtype. RuntimeError: a missing
            backend.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}: choose one of 'auto', {', '.join(map(repr, BACKENDS))}")
    on_gpu = tensor.device.type == "cuda"
    if backend == "auto":
        if tensor.dtype == torch.float64:
            return "reference"
        wanted = "triton" if on_gpu else "cpu" if tensor.device.type == "cpu" else "reference"
        reason = _MISSING[wanted]()
        if reason:
            say_once(f"flowroutes_fast runs on its slow 'reference' backend: {reason}")
            return "reference"
        return wanted
    reason = _MISSING[backend]()
    if reason:
        raise RuntimeError(
            reason if reason.startswith("backend") else f"backend {backend!r} is not available: {reason}"
        )
    if backend != "reference" and tensor.dtype == torch.float64:
        raise ValueError(f"backend {backend!r} computes in float32; use backend='reference' for float64 tensors")
    if backend == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes tensors on the CPU, not on {tensor.device}; use backend='auto'")
    if backend == "triton" and not on_gpu and not (tensor.device.type == "cpu" and interpreted()):
        raise ValueError(f"backend 'triton' takes tensors on a CUDA device, not on {tensor.device}; use backend='auto'")
    if backend == "cuda" and not on_gpu:
        raise ValueError(f"backend 'cuda' takes tensors on a CUDA device, not on {tensor.device}; use backend='auto'")
    return backend


def resolve(backend: str, tensor: Tensor) -> str:
    """:func:`choose_backend` now, or (while torch.compile traces, which must not look for libraries) when the
    registered op runs.
    """
    return backend if torch.compiler.is_compiling() else choose_backend(backend, tensor)


_said: set[str] = set()


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
