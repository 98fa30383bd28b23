"""What the CUDA kernels of the native extension share: whether they can run here, and tensors as they take them.

The kernels are called in the files of their operations (``pairs``, ``dense``, ``parts``). Work is queued on the current
stream of the tensors' device. Indices are not checked against the shapes: that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from flowroutes_fast.ops import native

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE = 64  # PAIR_TILE and TILE of csrc/kernels_cuda.h
CHANNELS = 64
DENSE_BYTES = 256 * 2**20  # of u = v W_O at a time


def missing() -> str | None:
    """None when the kernels can run here, or the reason why they cannot."""
    module, reason = native.load()
    if module is None:
        return reason
    if not module.cuda:
        return (
            "the native extension was built without CUDA (no nvcc was found, or it failed); install the CUDA "
            "toolkit and reinstall"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        module.cuda_devices()
    except RuntimeError as error:  # say, a driver older than the toolkit that built the extension
        return str(error)
    return None


def extension() -> ModuleType:
    reason = missing()
    if reason:
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    return native.extension()


def place(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        raise ValueError(f"the CUDA kernels take tensors on a CUDA device, not on {device}")
    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check(tensors: Mapping[str, Tensor | None], shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but whole is on {device}: move them to one device")
        if not tensor.is_floating_point() and name != "index":
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")


def rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {list(tensor.shape)}")


def pieces(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose rows are whole pieces of 16 bytes, zero padded."""
    each = 16 // tensor.element_size()
    padding = -tensor.shape[-1] % each
    if padding:
        return torch.nn.functional.pad(tensor, (0, padding))
    fits = (
        not tensor.is_neg()
        and tensor.stride(-1) == 1
        and all(n % each == 0 for n in tensor.stride()[:-1])
        and tensor.data_ptr() % 16 == 0
    )
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
