"""Exact proximity of listed sub-edges."""

from __future__ import annotations

import torch
from torch import Tensor

from flowroutes_fast.ops import cuda, native, reference
from flowroutes_fast.ops.attention import Attention, native_arguments
from flowroutes_fast.ops.bound import Bounds
from flowroutes_fast.system.ambient import in_neutral


@in_neutral
def pairs(attention: Attention, bounds: Bounds, index: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Exact proximity of the listed sub-edges ``index [3, n]`` -> ``[n]`` (equations 3 and 4).

    Raises:
        IndexError: on the CPU, an index outside.
    """
    attention.check()
    if index.dim() != 2 or index.shape[0] != 3 or index.is_floating_point():
        raise ValueError(f"index must hold integers [3, n], got {index.dtype} {list(index.shape)}")
    if backend == "reference":
        a = attention.float()
        return reference.pair_proximity(a.pattern, a.value, a.w_o, a.whole, index, row_scale=a.row_scale, gate=a.gate)
    if backend == "cpu":
        arguments = native_arguments(attention.float(), threads)
        arguments["n"] = index.shape[1]
        arguments.take("index", index.to(torch.int32), 3, index.shape[1], dtype=torch.int32)
        value = arguments.make("value", index.shape[1])
        arguments.call("pairs")
        return value
    if backend == "cuda":
        a = attention
        return on_cuda(pair_weights(a, bounds, index), a.value, a.w_o.to(a.value.dtype), a.whole, index, a.gate)
    from flowroutes_fast.kernels.pairs import pair_proximity

    return pair_proximity(  # type: ignore[no-any-return]
        attention.query,
        attention.key,
        attention.value,
        attention.w_o,
        attention.whole,
        bounds.lse,
        index,
        gate=attention.gate,
        **attention.triton_options,
    )


@in_neutral
def pair_weights(attention: Attention, bounds: Bounds, index: Tensor, chunk: int = 2**18) -> Tensor:
    """r_i·α of listed sub-edges ``[n]``, from queries, keys and the rows' log-sum-exp."""
    out = []
    group = attention.n_head // attention.value.shape[0]
    for part in index.long().split(chunk, 1):
        i, j, h = part
        score = (attention.query[h, i].float() * attention.key[h // group, j].float()).sum(-1) * attention.scaling
        if attention.softcap:
            score = attention.softcap * torch.tanh(score / attention.softcap)
        if attention.mask is not None:
            score = score + (attention.mask[i, j] if attention.mask.dim() == 2 else attention.mask[h, i, j])
        weight = (score - bounds.lse[h, i]).exp()  # type: ignore[index]
        out.append(weight if attention.row_scale is None else weight * attention.row_scale[i])
    return torch.cat(out) if out else index.new_empty(0, dtype=torch.float32)


@in_neutral
def on_cuda(
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
    module = cuda.extension()
    for name, tensor, rank in (("value", value, 3), ("w_o", w_o, 3), ("whole", whole, 2), ("index", index, 2)):
        cuda.rank(name, tensor, rank)
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
    cuda.check(named, shapes, device)
    if value.dtype not in cuda.TYPES or w_o.dtype != value.dtype:
        raise ValueError(f"value and w_o must both be float32, bfloat16 or float16, got {value.dtype} and {w_o.dtype}")
    if value.shape[0] == 0 or n_head % value.shape[0]:
        raise ValueError(f"the number of kv heads {value.shape[0]} does not divide the number of heads {n_head}")
    place = cuda.place(device)
    out = torch.empty(n, dtype=torch.float32, device=device)
    if n == 0:
        return out
    index = index.to(torch.int32).contiguous()
    head, order = index[2], None
    if not ordered:
        head, order = head.sort(stable=True)
    head_start = torch.searchsorted(head, torch.arange(n_head + 1, dtype=torch.int32, device=device), out_int32=True)
    tile_start = torch.zeros_like(head_start)
    torch.cumsum((head_start.diff() + cuda.TILE - 1) // cuda.TILE, 0, dtype=torch.int32, out=tile_start[1:])
    alpha, v, w, y = (
        native.contiguous(alpha.float()),
        cuda.pieces(value),
        cuda.pieces(w_o.transpose(1, 2)),
        cuda.pieces(whole.float()),
    )
    tiles = -(-n // cuda.TILE) + n_head
    splits = max(1, min(4 * cuda.processors(device) // tiles, -(-d_model // (4 * cuda.CHANNELS))))
    partial = out.new_empty(splits, n) if splits > 1 else None
    arguments = {
        **place,
        "type": cuda.TYPES[value.dtype],
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
