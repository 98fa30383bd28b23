"""Exact proximity of all sub-edges of a layer, from stored attention weights or from queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.ops import cuda, native, reference
from flowroutes_fast.ops.arguments import check_layer, check_tensors, check_threads, result_dtype
from flowroutes_fast.ops.attention import layer_arguments, linear, take_qk
from flowroutes_fast.ops.backends import choose_backend, cuda_missing, say_once
from flowroutes_fast.ops.library import library
from flowroutes_fast.system.ambient import in_neutral, matmul

library.define(
    "attention_proximity(Tensor pattern, Tensor value, Tensor w_o, Tensor whole, str backend, int threads=0) -> Tensor",
)
library.define(
    "attention_layer(Tensor query, Tensor key, Tensor value, Tensor w_o, Tensor whole, Tensor base, Tensor? mask, "
    "Tensor? sinks, "
    "float scaling, float softcap, int window, bool dense, float floor, str backend, int threads=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _native(
    arguments: native.Arguments, dense: bool, floor: float, normalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the native kernel; returns dense (or empty), by_head, normaliser, edge index ``[3, n]``, edge value
    ``[n]``.
    """
    n_query, n_key, n_head = (arguments[name] for name in ("queries", "keys", "heads"))
    out = (
        arguments.make("dense", n_head, n_query, n_key)
        if dense
        else torch.empty((0, 0, 0), dtype=torch.float32, device="cpu")
    )
    by_head, normaliser = arguments.make("by_head", n_query, n_head), arguments.make("normaliser", n_query)
    arguments |= {"floor": floor, "normalise": normalise}
    return out, by_head, normaliser, *native.edges(arguments.call("dense"))


def _native_layer(value: Tensor, w_o: Tensor, whole: Tensor, threads: int) -> native.Arguments:
    sign = torch.copysign(torch.ones_like(whole), whole)
    # W_O[h] sign(y_i), the sign bit as the sign of zero
    g = matmul(sign, linear(w_o)).view(len(whole), *w_o.shape[:2])
    return layer_arguments(value, w_o, whole, g, threads)


@torch.library.impl(library, "attention_proximity", "CompositeExplicitAutograd")
@in_neutral
def _attention_proximity(
    pattern: Tensor, value: Tensor, w_o: Tensor, whole: Tensor, backend: str, threads: int = 0
) -> Tensor:
    """Proximity of all sub-edges ``[head, query, key]`` from stored attention weights."""
    check_tensors(pattern=(pattern, 3), value=(value, 3), w_o=(w_o, 3), whole=(whole, 2))
    check_threads(threads)
    (n_head, n_query, n_key), (d_v, d_model) = pattern.shape, w_o.shape[1:]
    if n_head % len(value):
        raise ValueError(f"the number of key-value heads {len(value)} does not divide the number of heads {n_head}")
    expected = {"value": (len(value), n_key, d_v), "w_o": (n_head, d_v, d_model), "whole": (n_query, d_model)}
    for (name, shape), tensor in zip(expected.items(), (value, w_o, whole), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; with the other shapes it must be {list(shape)}")
    chosen = choose_backend(backend, whole)
    if chosen == "triton":  # it recomputes attention weights; a stored pattern is the CUDA kernel's
        if backend != "auto":
            raise ValueError(
                "backend 'triton' has no kernel for a stored pattern; use backend='cuda', 'reference' or 'auto'"
            )
        reason = cuda_missing()
        if reason:
            say_once(f"flowroutes_fast takes stored attention patterns with its slow 'reference' backend: {reason}")
        chosen = "reference" if reason else "cuda"
    if chosen == "cuda":
        return on_cuda(pattern, value, w_o, whole)
    dtype = result_dtype(whole)
    pattern, value, w_o, whole = (t.to(dtype) for t in (pattern, value, w_o, whole))
    if chosen != "cpu":
        return reference.attention_proximity(pattern, value, w_o, whole)
    arguments = _native_layer(value, w_o, whole, threads)
    arguments.take_rows("pattern", pattern, (n_head, n_query, n_key), ("pattern_head", "pattern_query"))
    return _native(arguments, True, -1.0, False)[0]


@torch.library.impl(library, "attention_layer", "CompositeExplicitAutograd")
@in_neutral
def _attention_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    base: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    dense: bool,
    floor: float,
    backend: str,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Importances of one layer's sub-edges, attention recomputed from queries and keys.

    Args:
        query: ``[head, query, d_qk]``; key: ``[kv_head, key, d_qk]``; value: ``[kv_head, key, d_head]``; w_o: ``[head,
            d_head, d_model]``.
        whole: the state the parts add up to ``[query, d_model]``; base: proximity of the other parts ``[query]``.
        mask: additive ``[query, key]`` or ``[head, query, key]``, None for causal; sinks: ``[head]`` or None.
        dense: return all importances; floor: if >= 0, return the sub-edges of all (query, key) pairs whose sum over
            heads is above it.

    Returns:
        dense importances ``[head, query, key]`` (or empty), by_head ``[query, head]``, normaliser ``[query]`` (a
        proximity), edge index ``[3, n]`` (query, key, head; int32), edge importance ``[n]``.
    """
    check_layer(query, key, value, w_o, whole, base=base, mask=mask, sinks=sinks, softcap=softcap, window=window)
    check_threads(threads)
    chosen = choose_backend(backend, whole)
    if chosen == "cpu":
        query, key, value, w_o, whole, base = (t.float() for t in (query, key, value, w_o, whole, base))
        arguments = _native_layer(value, w_o, whole, threads)
        take_qk(arguments, query, key, None if mask is None else mask.float(), scaling, softcap, window, sinks)
        arguments.take("base", base, len(whole))
        return _native(arguments, dense, floor, True)
    if chosen == "reference":
        dtype = result_dtype(whole)
        query, key, value, w_o, whole, base = (t.to(dtype) for t in (query, key, value, w_o, whole, base))
    options: dict[str, Any] = {"scaling": scaling, "mask": mask, "softcap": softcap, "window": window, "sinks": sinks}
    if chosen == "triton":
        edge = _triton_dense(query, key, value, w_o, whole, options)
    else:
        edge = reference.attention_pattern(query, key, **options)
        if chosen == "cuda":
            edge = on_cuda(edge, value, w_o, whole)
        else:
            edge = reference.attention_proximity(edge, value, w_o, whole)
    normaliser = edge.sum((0, 2)) + base
    edge *= torch.where(normaliser > 0, 1 / normaliser, 0)[:, None]
    index = torch.empty((3, 0), dtype=torch.int32, device=edge.device)
    found = edge.new_empty(0)
    if floor >= 0:
        at = ((edge.sum(0) > floor) & (edge > 0)).permute(1, 2, 0).nonzero()
        found = edge[at[:, 2], at[:, 0], at[:, 1]]
        index = at.T.to(torch.int32).contiguous()
    by_head = edge.sum(-1).T.contiguous()
    return (edge if dense else edge.new_empty(0, 0, 0)), by_head, normaliser, index, found


def _triton_dense(
    query: Tensor, key: Tensor, value: Tensor, w_o: Tensor, whole: Tensor, options: dict[str, Any]
) -> Tensor:
    from flowroutes_fast.kernels.attention import attention_rows
    from flowroutes_fast.kernels.dense import dense_proximity

    lse = attention_rows(query, key, **options)[0]
    options = {name: option for name, option in options.items() if name != "sinks"}
    return dense_proximity(query, key, value, w_o, whole, lse, **options)  # type: ignore[no-any-return]


@torch.library.register_fake("flowroutes::attention_proximity", lib=library)
def _(pattern, value, w_o, whole, backend, threads=0):  # type: ignore[no-untyped-def]
    return whole.new_empty(pattern.shape, dtype=result_dtype(whole))


@torch.library.register_fake("flowroutes::attention_layer", lib=library)
def _(query, key, value, w_o, whole, base, mask, sinks, scaling, softcap, window, dense, floor, backend, threads=0):  # type: ignore[no-untyped-def]
    n_head, n_query, n_key = query.shape[0], query.shape[1], key.shape[1]
    n_edge = torch.library.get_ctx().new_dynamic_size() if floor >= 0 else 0
    return (
        whole.new_empty((n_head, n_query, n_key) if dense else (0, 0, 0), dtype=result_dtype(whole)),
        whole.new_empty((n_query, n_head), dtype=result_dtype(whole)),
        whole.new_empty(n_query, dtype=result_dtype(whole)),
        whole.new_empty((3, n_edge), dtype=torch.int32),
        whole.new_empty(n_edge, dtype=result_dtype(whole)),
    )


@in_neutral
def on_cuda(
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
        value, w_o, whole: as for :func:`flowroutes_fast.ops.pairs.on_cuda`; what is written is computed in float32
            whatever torch's TF32 setting.
        causal: query i sees keys up to i + n_key - n_query; ``alpha`` is not read beyond, and the result is zero there.
        out: where the result goes, float32; may be ``alpha`` itself.
        by_head: where its sum over keys goes ``[query, head]``, float32, if wanted.

    Raises:
        As for :func:`flowroutes_fast.ops.pairs.on_cuda`.
    """
    module = cuda.extension()
    for name, tensor, rank in (("alpha", alpha, 3), ("value", value, 3), ("w_o", w_o, 3), ("whole", whole, 2)):
        cuda.rank(name, tensor, rank)
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
    cuda.check(named, shapes, device)
    if value.shape[0] == 0 or n_head % value.shape[0]:
        raise ValueError(f"the number of kv heads {value.shape[0]} does not divide the number of heads {n_head}")
    if out is None:
        out = torch.empty(n_head, n_query, n_key, dtype=torch.float32, device=device)
    for name, target in (("out", out), ("by_head", by_head)):
        if target is not None and (target.dtype != torch.float32 or target.stride(-1) != 1):
            raise ValueError(f"{name} must be float32 with an inner stride of 1")
    place = cuda.place(device)
    alpha = alpha.float()
    alpha = native.rows(alpha)
    y = cuda.pieces(whole.float())
    group = n_head // value.shape[0]
    each = max(1, min(n_head, cuda.DENSE_BYTES // (max(1, n_key) * max(1, y.shape[1]) * 4)))
    for first in range(0, n_head, each):
        heads = torch.arange(first, min(first + each, n_head), dtype=torch.int64, device=device)
        u = cuda.pieces(matmul(value[heads // group].float(), w_o[first : first + each].float()))
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
            partial = y.new_empty(-(-n_key // cuda.TILE), len(heads), n_query)
            arguments |= {
                "partial": partial.data_ptr(),
                "by_head": by_head[:, first:].data_ptr(),
                "by_head_query": by_head.stride(0),
            }
        module.cuda_dense(arguments)
    return out
