"""The CUDA kernels of the native extension on torch tensors: exact proximities of listed sub-edges, of all sub-edges,
of whole parts.

Work is queued on the current stream of the tensors' device. Indices are not checked against the shapes: that would wait
for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from flowroutes_fast.ops import native
from flowroutes_fast.system.ambient import in_neutral, matmul

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_TILE = 64  # PAIR_TILE and TILE of csrc/proximity_cuda.h
_CHANNELS = 64
_DENSE_BYTES = 256 * 2**20  # of u = v W_O at a time


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


def _extension() -> ModuleType:
    reason = missing()
    if reason:
        raise RuntimeError(f"backend 'cuda' is not available: {reason}")
    return native.extension()


def _place(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        raise ValueError(f"the CUDA kernels take tensors on a CUDA device, not on {device}")
    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(tensors: Mapping[str, Tensor | None], shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but whole is on {device}: move them to one device")
        if not tensor.is_floating_point() and name != "index":
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {list(shapes[name])}, got {list(tensor.shape)}")


def _rank(name: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {list(tensor.shape)}")


def _pieces(tensor: Tensor) -> Tensor:
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


@in_neutral
def pair_proximity(
    alpha: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    index: Tensor,
    gate: Tensor | None = None,
    *,
    ordered: bool = False,
) -> Tensor:
    """Proximity of listed sub-edges ``[n]``, float32.

    Args:
        alpha: attention weight of every listed sub-edge ``[n]``, times whatever scales its row.
        value: ``[kv_head, key, d_head]`` in float32, bfloat16 or float16; products of 16-bit types are summed in
            float32.
        w_o: ``[head, d_head, d_model]`` in the type of ``value``; not copied if it is a view of a linear layer's
            weight.
        whole: ``[query, d_model]``.
        index: query, key and head of every sub-edge ``[3, n]``.
        gate: an output gate ``[query, head, d_head]``, or None.
        ordered: the caller knows that ``index[2]`` ascends.

    Raises:
        RuntimeError: the extension has no CUDA kernels, no device is visible, or CUDA failed.
        ValueError: shapes, types or devices that do not fit.
    """
    module = _extension()
    for name, tensor, rank in (("value", value, 3), ("w_o", w_o, 3), ("whole", whole, 2), ("index", index, 2)):
        _rank(name, tensor, rank)
    n_head, d_head, d_model = w_o.shape
    n, device = index.shape[1], whole.device
    named = {"alpha": alpha, "w_o": w_o, "value": value, "whole": whole, "index": index, "gate": gate}
    shapes: dict[str, tuple[int, ...]] = {
        "alpha": (n,),
        "w_o": (n_head, d_head, d_model),
        "value": (value.shape[0], value.shape[1], d_head),
        "whole": (whole.shape[0], d_model),
        "index": (3, n),
        "gate": (whole.shape[0], n_head, d_head),
    }
    _check(named, shapes, device)
    if value.dtype not in _TYPES or w_o.dtype != value.dtype:
        raise ValueError(f"value and w_o must both be float32, bfloat16 or float16, got {value.dtype} and {w_o.dtype}")
    if value.shape[0] == 0 or n_head % value.shape[0]:
        raise ValueError(f"the number of kv heads {value.shape[0]} does not divide the number of heads {n_head}")
    place = _place(device)
    out = torch.empty(n, dtype=torch.float32, device=device)
    if n == 0:
        return out
    index = index.to(torch.int32).contiguous()
    head, order = index[2], None
    if not ordered:
        head, order = head.sort(stable=True)
    head_start = torch.searchsorted(head, torch.arange(n_head + 1, dtype=torch.int32, device=device), out_int32=True)
    tile_start = torch.zeros_like(head_start)
    torch.cumsum((head_start.diff() + _TILE - 1) // _TILE, 0, dtype=torch.int32, out=tile_start[1:])
    alpha, v, w, y = (
        native.contiguous(alpha.float()),
        _pieces(value),
        _pieces(w_o.transpose(1, 2)),
        _pieces(whole.float()),
    )
    tiles = -(-n // _TILE) + n_head
    splits = max(1, min(4 * _processors(device) // tiles, -(-d_model // (4 * _CHANNELS))))
    partial = out.new_empty(splits, n) if splits > 1 else None
    arguments = {
        **place,
        "type": _TYPES[value.dtype],
        "pairs": n,
        "heads": n_head,
        "group": n_head // value.shape[0],
        "d_v": v.shape[2],
        "d_model": d_model,
        "query": index[0].data_ptr(),
        "key": index[1].data_ptr(),
        "order": 0 if order is None else order.data_ptr(),
        "head_start": head_start.data_ptr(),
        "tile_start": tile_start.data_ptr(),
        "alpha": alpha.data_ptr(),
        "v": v.data_ptr(),
        "v_head": v.stride(0),
        "v_row": v.stride(1),
        "w_o": w.data_ptr(),
        "w_head": w.stride(0),
        "w_row": w.stride(1),
        "y": y.data_ptr(),
        "y_row": y.stride(0),
        "splits": splits,
        "partial": 0 if partial is None else partial.data_ptr(),
        "out": out.data_ptr(),
    }
    if gate is not None:
        gate = native.contiguous(torch.nn.functional.pad(gate.float(), (0, v.shape[2] - d_head)))
        arguments |= {"gate": gate.data_ptr(), "gate_query": gate.stride(0), "gate_head": gate.stride(1)}
    module.cuda_pairs(arguments)
    return out


@in_neutral
def dense_proximity(
    alpha: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    causal: bool = False,
    *,
    out: Tensor | None = None,
    by_head: Tensor | None = None,
) -> Tensor:
    """Proximity of all sub-edges ``[head, query, key]``, float32.

    Args:
        alpha: attention weights ``[head, query, key]``, times whatever scales a row.
        value, w_o, whole: as for :func:`pair_proximity`; what is written is computed in float32 whatever torch's TF32
            setting.
        causal: query i sees keys up to i + n_key - n_query; ``alpha`` is not read beyond, and the result is zero there.
        out: where the result goes, float32; may be ``alpha`` itself.
        by_head: where its sum over keys goes ``[query, head]``, float32, if wanted.

    Raises:
        As for :func:`pair_proximity`.
    """
    module = _extension()
    for name, tensor, rank in (("alpha", alpha, 3), ("value", value, 3), ("w_o", w_o, 3), ("whole", whole, 2)):
        _rank(name, tensor, rank)
    n_head, n_query, n_key = alpha.shape
    d_head, d_model = w_o.shape[1:]
    device = whole.device
    shapes: dict[str, tuple[int, ...]] = {
        "alpha": (n_head, n_query, n_key),
        "value": (value.shape[0], n_key, d_head),
        "w_o": (n_head, d_head, d_model),
        "whole": (n_query, d_model),
        "out": (n_head, n_query, n_key),
        "by_head": (n_query, n_head),
    }
    named = {"alpha": alpha, "value": value, "w_o": w_o, "whole": whole, "out": out, "by_head": by_head}
    _check(named, shapes, device)
    if value.shape[0] == 0 or n_head % value.shape[0]:
        raise ValueError(f"the number of kv heads {value.shape[0]} does not divide the number of heads {n_head}")
    if out is None:
        out = torch.empty(n_head, n_query, n_key, dtype=torch.float32, device=device)
    for name, target in (("out", out), ("by_head", by_head)):
        if target is not None and (target.dtype != torch.float32 or target.stride(-1) != 1):
            raise ValueError(f"{name} must be float32 with an inner stride of 1")
    place = _place(device)
    alpha = alpha.float()
    alpha = native.rows(alpha)
    y = _pieces(whole.float())
    group = n_head // value.shape[0]
    each = max(1, min(n_head, _DENSE_BYTES // (max(1, n_key) * max(1, y.shape[1]) * 4)))
    for first in range(0, n_head, each):
        heads = torch.arange(first, min(first + each, n_head), dtype=torch.int64, device=device)
        u = _pieces(matmul(value[heads // group].float(), w_o[first : first + each].float()))
        arguments = {
            **place,
            "heads": len(heads),
            "queries": n_query,
            "keys": n_key,
            "d_model": u.shape[2],
            "alpha": alpha[first:].data_ptr(),
            "alpha_head": alpha.stride(0),
            "alpha_query": alpha.stride(1),
            "u": u.data_ptr(),
            "u_head": u.stride(0),
            "u_row": u.stride(1),
            "y": y.data_ptr(),
            "y_row": y.stride(0),
            "causal": causal,
            "out": out[first:].data_ptr(),
            "out_head": out.stride(0),
            "out_query": out.stride(1),
        }
        if by_head is not None:
            partial = y.new_empty(-(-n_key // _TILE), len(heads), n_query)
            arguments |= {
                "partial": partial.data_ptr(),
                "by_head": by_head[:, first:].data_ptr(),
                "by_head_query": by_head.stride(0),
            }
        module.cuda_dense(arguments)
    return out


@in_neutral
def part_proximity(part: Tensor, whole: Tensor) -> Tensor:
    """Proximity of rows ``[n]``, float32: ``whole [n, d_model]``, ``part [m, d_model]``, of which row ``i % m``
    belongs to row ``i``.
    """
    module = _extension()
    _rank("whole", whole, 2)
    _rank("part", part, 2)
    _check({"part": part}, {"part": (part.shape[0], whole.shape[1])}, whole.device)
    if part.shape[0] == 0 and whole.shape[0]:
        raise ValueError("part has no rows")
    place = _place(whole.device)
    out = torch.empty(whole.shape[0], dtype=torch.float32, device=whole.device)
    part, whole = native.contiguous(part.float()), native.contiguous(whole.float())
    module.cuda_parts(
        {
            **place,
            "rows": whole.shape[0],
            "part_rows": part.shape[0],
            "d_model": whole.shape[1],
            "part": part.data_ptr(),
            "whole": whole.data_ptr(),
            "out": out.data_ptr(),
        }
    )
    return out
