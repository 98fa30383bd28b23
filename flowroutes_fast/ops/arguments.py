"""What callers give, checked: arrays as tensors, shapes, devices, dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_tensor(given: Any, name: str = "the array") -> Tensor:
    """A tensor that shares memory with ``given``: a tensor itself, or anything with ``__dlpack__`` (a read-only or
    reversed array is copied).
    """
    if isinstance(given, Tensor):
        return given
    if not hasattr(given, "__dlpack__"):
        raise TypeError(
            f"{name} must be a torch.Tensor or an array that supports DLPack (NumPy, JAX, CuPy), got "
            f"{type(given).__name__}"
        )
    if hasattr(given, "filled") and hasattr(given, "mask"):  # numpy.ma: DLPack would forget the mask
        raise TypeError(f"{name} is a masked array, whose mask would be lost: give .filled(value)")
    strides = getattr(given, "strides", None)
    if isinstance(strides, tuple) and any(step < 0 for step in strides):  # PyTorch ends the process on these
        given = given.copy()
    try:
        return torch.from_dlpack(given)
    except (BufferError, RuntimeError, TypeError, ValueError):  # read-only, or of a dtype that DLPack has no name for
        import numpy as np

        array = np.array(given)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def check_states(**named: Tensor) -> None:
    devices = {tensor.device for tensor in named.values()}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(named)} are on different devices: {', '.join(map(str, devices))}")
    if len({tensor.dtype == torch.float64 for tensor in named.values()}) > 1:
        raise TypeError(f"{' and '.join(named)} must both be float64, or neither")
    for name, tensor in named.items():
        if tensor.dtype not in FLOAT:
            raise TypeError(
                f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}"
            )
        check_real(name, tensor)
        if not tensor.dim() or not tensor.shape[-1]:
            raise ValueError(f"{name} must be [..., d_model], got shape {tuple(tensor.shape)}")


def check_real(name: str, tensor: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise ValueError(f"{name} is a {'meta' if tensor.is_meta else 'fake'} tensor: it has a shape and no numbers")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}: call .to_dense()")


def check_threads(threads: int) -> None:
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads < 2**31:
        raise ValueError(f"threads must be a whole number, zero for OpenMP's default, got {threads!r}")


def check_tensors(**named: tuple[Tensor | None, int]) -> None:
    """Floating point tensors of these ranks, dense, not empty, on one device; None is skipped.

    Raises:
        ValueError, TypeError: the first that is not so.
    """
    device = None
    for name, (tensor, rank) in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT:
            raise TypeError(
                f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}"
            )
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got shape {list(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {list(tensor.shape)}")
        if tensor.device != (device := device or tensor.device):
            raise ValueError(f"{name} is on {tensor.device}, others are on {device}: move them to one device")
        check_real(name, tensor)


def check_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    *,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> None:
    """Check that one layer's tensors fit together (shapes as in :class:`flowroutes_fast.ops.bounds.Attention`).

    Raises:
        ValueError: a shape or device that does not fit, heads that do not divide, causal attention with fewer keys than
            queries.
        TypeError: no floating point numbers.
    """
    check_tensors(
        query=(query, 3),
        key=(key, 3),
        value=(value, 3),
        w_o=(w_o, 3),
        whole=(whole, 2),
        base=(base, 1),
        sinks=(sinks, 1),
        row_scale=(row_scale, 1),
        gate=(gate, 3),
        mask=(mask, mask.dim() if mask is not None and mask.dim() in (2, 3) else 3),
    )
    (n_head, n_query, d_qk), (kv, n_key) = query.shape, key.shape[:2]
    d_v, d_model = w_o.shape[1:]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "key": (key, (kv, n_key, d_qk)),
        "value": (value, (kv, n_key, d_v)),
        "w_o": (w_o, (n_head, d_v, d_model)),
        "whole": (whole, (n_query, d_model)),
        "base": (base, (n_query,)),
        "sinks": (sinks, (n_head,)),
        "row_scale": (row_scale, (n_query,)),
        "gate": (gate, (n_query, n_head, d_v)),
        "mask": (mask, (n_head, n_query, n_key)[3 - (mask.dim() if mask is not None else 3) :]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; with the other shapes it must be {list(shape)}")
    if n_head % kv:
        raise ValueError(f"the number of key-value heads {kv} does not divide the number of heads {n_head}")
    if mask is None and n_query > n_key:
        raise ValueError(
            f"causal attention of {n_query} queries needs as many keys, got {n_key}; give a mask for another order"
        )
    if not softcap >= 0 or window < 0:
        raise ValueError(f"softcap and window must be zero or positive, got {softcap} and {window}")


def result_dtype(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def flat_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().reshape(-1, t.shape[-1]) for t in tensors)
