"""The functions everything is built on: they check their arguments, choose a backend and return tensors.

:func:`attention_importances`, :func:`part_proximity` and :func:`component_proximity` are public. They take PyTorch tensors, or arrays of
any library that speaks DLPack (NumPy, JAX, CuPy), and may be called inside ``torch.compile(fullgraph=True)``; there, shapes and dtypes
are checked and numbers are not. None of them has a gradient. What they call is registered with ``torch.library`` (namespace ``flowroutes``).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowroutes_fast import native, reference

BACKENDS = ("reference", "cpu", "triton", "cuda")
_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with 'pip install triton'"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch sees no CUDA device"
    return None


def _cuda_missing() -> str | None:
    from flowroutes_fast.cuda import missing

    return missing()


_MISSING: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": lambda: native.load()[1],
    "triton": _triton_missing,
    "cuda": _cuda_missing,
}


def backend_status() -> dict[str, str | None]:
    """Every backend with None when it is available, or the reason why it is not."""
    return {name: _MISSING[name]() for name in BACKENDS}


def choose_backend(backend: str, tensor: Tensor) -> str:
    """Resolve ``"auto"`` for this tensor: ``"cpu"`` or ``"triton"`` by its device, ``"reference"`` where they are missing.

    Raises:
        ValueError: an unknown name, or one that does not serve this tensor's device or dtype. RuntimeError: a missing backend.
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
            _say_once(f"flowroutes_fast runs on its slow 'reference' backend: {reason}")
            return "reference"
        return wanted
    reason = _MISSING[backend]()
    if reason:
        raise RuntimeError(reason if reason.startswith("backend") else f"backend {backend!r} is not available: {reason}")
    if backend != "reference" and tensor.dtype == torch.float64:
        raise ValueError(f"backend {backend!r} computes in float32; use backend='reference' for float64 tensors")
    if backend == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes tensors on the CPU, not on {tensor.device}; use backend='auto'")
    if backend == "cuda" and not on_gpu:
        raise ValueError(f"backend 'cuda' takes tensors on a CUDA device, not on {tensor.device}; use backend='auto'")
    return backend


def _resolve(backend: str, tensor: Tensor) -> str:
    """:func:`choose_backend` now, or (while torch.compile traces, which must not look for libraries) when the registered op runs."""
    return backend if torch.compiler.is_compiling() else choose_backend(backend, tensor)


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def as_tensor(given: Any, name: str = "the array") -> Tensor:
    """A tensor that shares memory with ``given``: a tensor itself, or anything with ``__dlpack__`` (a read-only or reversed array is copied)."""
    if isinstance(given, Tensor):
        return given
    if not hasattr(given, "__dlpack__"):
        raise TypeError(f"{name} must be a torch.Tensor or an array that supports DLPack (NumPy, JAX, CuPy), got {type(given).__name__}")
    strides = getattr(given, "strides", None)
    if isinstance(strides, tuple) and any(step < 0 for step in strides):  # PyTorch ends the process on these
        given = given.copy()
    try:
        return torch.from_dlpack(given)
    except (BufferError, RuntimeError, TypeError, ValueError):  # read-only, or of a dtype that DLPack has no name for
        import numpy as np

        array = np.array(given)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def part_proximity(part: Any, whole: Any, *, backend: str = "auto", threads: int = 0) -> Tensor:
    """Proximity of parts to the states they are parts of (equation 4), without a temporary.

    Equivalent to::

        (whole.abs().sum(-1) - (part - whole).abs().sum(-1)).clamp_min(0)

    but summed termwise, so that nothing cancels.

    Args:
        part, whole: ``[..., d_model]``, of one shape, float32, bfloat16 or float16 (float64: computed by the reference).
        backend: see :func:`attention_importances`. threads: of the CPU kernel; 0 for OpenMP's default.

    Returns:
        ``[...]`` in the units of ‖whole‖₁, float32 (float64 for float64).

    Raises:
        ValueError: differing shapes or devices, no d_model. TypeError: no floating point numbers.
    """
    part, whole = as_tensor(part, "part"), as_tensor(whole, "whole")
    _check_states(part=part, whole=whole)
    if part.shape != whole.shape:
        raise ValueError(f"part {tuple(part.shape)} and whole {tuple(whole.shape)} must have one shape")
    flat = torch.ops.flowroutes.part_proximity(*_flat(part, whole), _resolve(backend, whole), threads)
    return flat.reshape(whole.shape[:-1])


def component_proximity(outputs: Any, state: Any, *, backend: str = "auto", threads: int = 0) -> Tensor:
    """Proximity of every component's output to the state it is added to, at the same position: the component-to-component variant.

    Equivalent to::

        (state.abs().sum(-1, keepdim=True) - (outputs - state[..., None, :]).abs().sum(-1)).clamp_min(0)

    without the temporary of the size of ``outputs``. Divided by its sum over components it is their importance.

    Args:
        outputs: ``[..., component, d_model]``; a slice of the first components of a larger tensor is not copied.
        state: ``[..., d_model]``. backend, threads: as for :func:`part_proximity`.

    Returns:
        ``[..., component]`` in the units of ‖state‖₁, float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit. TypeError: no floating point numbers.
    """
    outputs, state = as_tensor(outputs, "outputs"), as_tensor(state, "state")
    _check_states(outputs=outputs, state=state)
    if outputs.dim() != state.dim() + 1 or outputs.shape[:-2] != state.shape[:-1] or outputs.shape[-1] != state.shape[-1]:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} must be [..., component, d_model] for a state [..., d_model] = {tuple(state.shape)}"
        )
    return torch.ops.flowroutes.component_proximity(outputs.detach(), state.detach(), _resolve(backend, state), threads)


def _check_states(**named: Tensor) -> None:
    devices = {tensor.device for tensor in named.values()}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(named)} are on different devices: {', '.join(map(str, devices))}")
    if len({tensor.dtype == torch.float64 for tensor in named.values()}) > 1:
        raise TypeError(f"{' and '.join(named)} must both be float64, or neither")
    for name, tensor in named.items():
        if tensor.dtype not in _FLOAT:
            raise TypeError(f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}")
        if not tensor.dim() or not tensor.shape[-1]:
            raise ValueError(f"{name} must be [..., d_model], got shape {tuple(tensor.shape)}")


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().reshape(-1, t.shape[-1]) for t in tensors)


class AttentionImportances(NamedTuple):
    """What :func:`attention_importances` returns."""

    importances: Tensor  # [batch, query, key, head]
    residual: Tensor  # [batch, query]


def attention_importances(
    pattern: Any,
    value: Any,
    w_o: Any,
    resid_pre: Any,
    resid_mid: Any,
    *,
    distance_norm: float = 1,
    clip: float = 0.0,
    backend: str = "auto",
) -> AttentionImportances:
    """Importance of every sub-edge and of the residual connection for the state after attention (equation 5).

    Equivalent to::

        z = torch.einsum("bhqk,bkhd,hdm->bqkhm", pattern, value.repeat_interleave(group, 2), w_o)  # all that is avoided
        y = resid_mid[:, :, None, None]
        edge = (y.abs().sum(-1) - (z - y).abs().sum(-1)).clamp_min(clip)
        residual = (resid_mid.abs().sum(-1) - (resid_pre - resid_mid).abs().sum(-1)).clamp_min(clip)
        total = edge.sum((2, 3)) + residual
        return edge / total[:, :, None, None], residual / total

    Args:
        pattern: attention weights ``[batch, head, query, key]``.
        value: value vectors ``[batch, key, kv_head, d_head]``; ``kv_head`` divides ``head``.
        w_o: output projection ``[head, d_head, d_model]``.
        resid_pre: states before attention ``[batch, query, d_model]``.
        resid_mid: states after attention ``[batch, query, d_model]``.
        distance_norm: 1 for the paper's L1 norm; other norms are computed by the reference backend.
        clip: lower limit of every proximity, masked pairs included (the reference tool uses 1e-5).
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"``.

    Returns:
        importances ``[batch, query, key, head]`` and residual ``[batch, query]``, dimensionless, float32 (float64 for
        float64 inputs). Over keys and heads, together with the residual, a row sums to 1 (0 where no part is closer than none).

    Raises:
        ValueError: shapes that do not fit, NaN or infinity in a state, an unknown backend.
        TypeError: tensors that are not floating point.
    """
    given = {"pattern": pattern, "value": value, "w_o": w_o, "resid_pre": resid_pre, "resid_mid": resid_mid}
    pattern, value, w_o, resid_pre, resid_mid = (as_tensor(array, name) for name, array in given.items())
    _check_importances(pattern, value, w_o, resid_pre, resid_mid, distance_norm, clip)
    chosen = _resolve(backend, resid_mid)
    if backend not in ("auto", "reference") and distance_norm != 1:
        raise ValueError(f"backend {chosen!r} computes distance_norm=1 only, not {distance_norm}; use backend='reference'")
    dtype = torch.float64 if resid_mid.dtype == torch.float64 else torch.float32
    pattern, value, w_o, resid_pre, resid_mid = (t.detach().to(dtype) for t in (pattern, value, w_o, resid_pre, resid_mid))
    rows, residuals = [], []
    for b in range(pattern.shape[0]):
        v, y = value[b].transpose(0, 1), resid_mid[b]
        if distance_norm == 1:
            edge = torch.ops.flowroutes.attention_proximity(pattern[b], v, w_o, y, chosen)
            residual = torch.ops.flowroutes.part_proximity(resid_pre[b], y, chosen)
        else:
            edge = reference.attention_proximity(pattern[b], v, w_o, y, distance_norm)
            residual = reference.proximity(resid_pre[b], y, distance_norm)
        edge, residual = edge.clamp_min(clip), residual.clamp_min(clip)
        total = edge.sum((0, 2), dtype=torch.float64).to(dtype) + residual
        scale = torch.where(total > 0, 1 / total, 0)
        rows.append((edge * scale[:, None]).permute(1, 2, 0))
        residuals.append(residual * scale)
    return AttentionImportances(torch.stack(rows), torch.stack(residuals))


def _check_importances(pattern, value, w_o, resid_pre, resid_mid, distance_norm, clip) -> None:  # type: ignore[no-untyped-def]
    named = {"pattern": pattern, "value": value, "w_o": w_o, "resid_pre": resid_pre, "resid_mid": resid_mid}
    rank = {"pattern": 4, "value": 4, "w_o": 3, "resid_pre": 3, "resid_mid": 3}
    for name, tensor in named.items():
        if tensor.dtype not in _FLOAT:
            raise TypeError(f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}")
        if tensor.dim() != rank[name]:
            raise ValueError(f"{name} must have {rank[name]} dimensions, got shape {tuple(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}")
        if tensor.device != resid_mid.device:
            raise ValueError(f"{name} is on {tensor.device} but resid_mid is on {resid_mid.device}: move them to one device")
    batch, head, query, key = pattern.shape
    d_head, d_model = w_o.shape[1:]
    expected = {
        "value": (batch, key, value.shape[2], d_head),
        "w_o": (head, d_head, d_model),
        "resid_pre": (batch, query, d_model),
        "resid_mid": (batch, query, d_model),
    }
    for name, shape in expected.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)}; with the other shapes it must be {shape}")
    if head % value.shape[2]:
        raise ValueError(f"value has {value.shape[2]} key-value heads, which does not divide the pattern's {head} heads")
    for name, tensor in named.items():
        if not torch.compiler.is_compiling() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    if not distance_norm > 0:
        raise ValueError(f"distance_norm must be positive, got {distance_norm}")
    if not 0 <= clip < float("inf"):
        raise ValueError(f"clip must be zero or a positive number, got {clip}")


def rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _native_attention(
    alpha: dict, value: Tensor, w_o: Tensor, whole: Tensor, base: Tensor | None, dense: bool, floor: float, normalise: bool, threads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the native kernel; returns dense (or empty), by_head, normaliser, edge index ``[3, n]``, edge value ``[n]``."""
    n_query, n_key, n_head = whole.shape[0], value.shape[1], w_o.shape[0]
    value, whole = rows(value), whole.contiguous()
    w_rows = w_o.permute(2, 0, 1).reshape(w_o.shape[2], -1).contiguous()  # [d_model, head * d_head]: no copy when w_o views a linear layer
    g = torch.copysign(torch.ones_like(whole), whole) @ w_rows  # W_O[h] sign(y_i) [query, head * d_head], the sign bit as the sign of zero
    out = whole.new_empty((n_head, n_query, n_key) if dense else (0, 0, 0))
    by_head, normaliser = whole.new_empty(n_query, n_head), whole.new_empty(n_query)
    keep = [value, whole, g, w_rows, out, by_head, normaliser]
    arguments = {
        "queries": n_query, "keys": n_key, "heads": n_head, "group": n_head // value.shape[0],
        "d_v": w_o.shape[1], "d_model": w_o.shape[2], "v_head": value.stride(0), "v_row": value.stride(1),
        "v": value.data_ptr(), "g": g.data_ptr(), "w_o": w_rows.data_ptr(), "w_row": w_rows.stride(0), "y": whole.data_ptr(),
        "by_head": by_head.data_ptr(), "normaliser": normaliser.data_ptr(), "floor": floor, "normalise": normalise, "threads": threads,
    }  # fmt: skip
    if base is not None:
        base = base.contiguous()
        keep.append(base)
        arguments["base"] = base.data_ptr()
    if dense:
        arguments["dense"] = out.data_ptr()
    for name, item in alpha.items():
        if isinstance(item, Tensor):
            keep.append(item)
            item = item.data_ptr()
        arguments[name] = item
    index, edge = native.extension().attention_proximity(arguments)
    return out, by_head, normaliser, torch.from_numpy(index), torch.from_numpy(edge)


def _pattern_source(pattern: Tensor) -> dict:
    pattern = rows(pattern)
    return {"pattern": pattern, "pattern_head": pattern.stride(0), "pattern_query": pattern.stride(1)}


def qk_source(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float, window: int, sinks: Tensor | None) -> dict:
    query, key = rows(query), rows(key)
    source = {
        "q": query, "q_head": query.stride(0), "q_row": query.stride(1), "k": key, "k_head": key.stride(0), "k_row": key.stride(1),
        "d_qk": query.shape[-1], "scale": scaling, "softcap": softcap, "window": window, "offset": key.shape[1] - query.shape[1],
    }  # fmt: skip
    if mask is not None:
        mask = rows(mask)
        source |= {"mask": mask, "mask_head": mask.stride(0) if mask.dim() == 3 else 0, "mask_query": mask.stride(-2)}
    if sinks is not None:
        source["sinks"] = sinks.float().contiguous()
    return source


_library = torch.library.Library("flowroutes", "DEF")
_library.define("part_proximity(Tensor part, Tensor whole, str backend, int threads=0) -> Tensor")
_library.define("component_proximity(Tensor outputs, Tensor state, str backend, int threads=0) -> Tensor")
_library.define(
    "attention_proximity(Tensor pattern, Tensor value, Tensor w_o, Tensor whole, str backend, int threads=0) -> Tensor",
)
_library.define(
    "attention_layer(Tensor query, Tensor key, Tensor value, Tensor w_o, Tensor whole, Tensor base, Tensor? mask, Tensor? sinks, "
    "float scaling, float softcap, int window, bool dense, float floor, str backend, int threads=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_library, "part_proximity", "CompositeExplicitAutograd")
def _part_proximity(part: Tensor, whole: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of ``part [n or 1, d_model]`` to ``whole [n, d_model]`` -> ``[n]``."""
    chosen = choose_backend(backend, whole)
    if chosen == "reference":
        dtype = torch.float64 if whole.dtype == torch.float64 else torch.float32
        return reference.proximity(part.to(dtype), whole.to(dtype))
    if chosen == "triton":
        from flowroutes_fast.kernels.parts import part_proximity as triton_parts

        return triton_parts(part, whole)
    if chosen == "cuda":
        from flowroutes_fast.cuda import part_proximity as cuda_parts

        return cuda_parts(part, whole)
    part, whole = part.float().contiguous(), whole.float().contiguous()
    out = whole.new_empty(whole.shape[0])
    native.extension().part_proximity(
        part.data_ptr(), whole.data_ptr(), out.data_ptr(), whole.shape[0], part.shape[0], whole.shape[1], threads
    )
    return out


@torch.library.impl(_library, "component_proximity", "CompositeExplicitAutograd")
def _component_proximity(outputs: Tensor, state: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of ``outputs [..., component, d_model]`` to ``state [..., d_model]`` -> ``[..., component]``."""
    if choose_backend(backend, state) != "cpu":
        dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
        found = [reference.proximity(outputs[..., n, :].to(dtype), state.to(dtype)) for n in range(outputs.shape[-2])]  # one at a time
        return torch.stack(found, -1) if found else state.new_zeros(outputs.shape[:-1], dtype=dtype)
    shape = outputs.shape[:-1]
    if not outputs.numel():
        return state.new_zeros(shape, dtype=torch.float32)
    outputs, state = outputs.float().reshape(-1, *outputs.shape[-2:]), state.float().reshape(-1, state.shape[-1]).contiguous()
    if outputs.stride(2) != 1 or outputs.stride(1) != outputs.shape[2]:
        outputs = outputs.contiguous()
    out = state.new_empty(outputs.shape[:2])
    native.extension().component_proximity(
        outputs.data_ptr(), outputs.stride(0), outputs.shape[1], state.data_ptr(), out.data_ptr(), len(state), state.shape[1], threads
    )
    return out.reshape(shape)


@torch.library.impl(_library, "attention_proximity", "CompositeExplicitAutograd")
def _attention_proximity(pattern: Tensor, value: Tensor, w_o: Tensor, whole: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of all sub-edges ``[head, query, key]`` from stored attention weights."""
    chosen = choose_backend(backend, whole)
    if chosen == "triton":  # it recomputes attention weights; a stored pattern is the CUDA kernel's
        chosen = "reference" if _cuda_missing() else "cuda"
    if chosen == "cuda":
        from flowroutes_fast.cuda import dense_proximity as cuda_dense

        return cuda_dense(pattern, value, w_o, whole)
    if chosen != "cpu":
        return reference.attention_proximity(pattern, value, w_o, whole)
    pattern, value, w_o, whole = (t.float() for t in (pattern, value, w_o, whole))
    return _native_attention(_pattern_source(pattern), value, w_o, whole, None, True, -1.0, False, threads)[0]


@torch.library.impl(_library, "attention_layer", "CompositeExplicitAutograd")
def _attention_layer(
    query: Tensor, key: Tensor, value: Tensor, w_o: Tensor, whole: Tensor, base: Tensor, mask: Tensor | None, sinks: Tensor | None,
    scaling: float, softcap: float, window: int, dense: bool, floor: float, backend: str, threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Importances of one layer's sub-edges, attention recomputed from queries and keys.

    Args:
        query: ``[head, query, d_qk]``; key: ``[kv_head, key, d_qk]``; value: ``[kv_head, key, d_head]``; w_o: ``[head, d_head, d_model]``.
        whole: the state the parts add up to ``[query, d_model]``; base: proximity of the other parts ``[query]``.
        mask: additive ``[query, key]`` or ``[head, query, key]``, None for causal; sinks: ``[head]`` or None.
        dense: return all importances; floor: if >= 0, return the sub-edges of all (query, key) pairs whose sum over heads is above it.

    Returns:
        dense importances ``[head, query, key]`` (or empty), by_head ``[query, head]``, normaliser ``[query]`` (a proximity),
        edge index ``[3, n]`` (query, key, head; int32), edge importance ``[n]``.
    """
    chosen = choose_backend(backend, whole)
    if chosen == "cpu":
        query, key, value, w_o, whole, base = (t.float() for t in (query, key, value, w_o, whole, base))
        source = qk_source(query, key, None if mask is None else mask.float(), scaling, softcap, window, sinks)
        return _native_attention(source, value, w_o, whole, base, dense, floor, True, threads)
    options: dict[str, Any] = {"scaling": scaling, "mask": mask, "softcap": softcap, "window": window, "sinks": sinks}
    if chosen == "triton":
        edge = _triton_dense(query, key, value, w_o, whole, options)
    else:
        edge = reference.attention_pattern(query, key, **options).to(whole.dtype)
        if chosen == "cuda":
            from flowroutes_fast.cuda import dense_proximity as cuda_dense

            edge = cuda_dense(edge, value, w_o, whole)
        else:
            edge = reference.attention_proximity(edge, value.to(whole.dtype), w_o, whole)
    normaliser = edge.sum((0, 2)) + base
    edge *= torch.where(normaliser > 0, 1 / normaliser, 0)[:, None]
    index = edge.new_empty(0, dtype=torch.int32).view(3, 0)
    found = edge.new_empty(0)
    if floor >= 0:
        at = ((edge.sum(0) > floor) & (edge > 0)).permute(1, 2, 0).nonzero()
        found = edge[at[:, 2], at[:, 0], at[:, 1]]
        index = at.T.to(torch.int32).contiguous()
    by_head = edge.sum(-1).T.contiguous()
    return (edge if dense else edge.new_empty(0, 0, 0)), by_head, normaliser, index, found


def _triton_dense(query: Tensor, key: Tensor, value: Tensor, w_o: Tensor, whole: Tensor, options: dict) -> Tensor:
    from flowroutes_fast.kernels.bound import bound_rows
    from flowroutes_fast.kernels.dense import dense_proximity

    nothing = whole.new_zeros(whole.shape[0], w_o.shape[0], w_o.shape[1])
    lse = bound_rows(query, key, value, nothing, **options)[0]
    options = {name: option for name, option in options.items() if name != "sinks"}
    return dense_proximity(query, key, value, w_o, whole, lse, **options)


@torch.library.register_fake("flowroutes::part_proximity", lib=_library)
def _(part, whole, backend, threads=0):  # type: ignore[no-untyped-def]
    return whole.new_empty(whole.shape[0], dtype=torch.float64 if whole.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("flowroutes::component_proximity", lib=_library)
def _(outputs, state, backend, threads=0):  # type: ignore[no-untyped-def]
    return state.new_empty(outputs.shape[:-1], dtype=torch.float64 if state.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("flowroutes::attention_proximity", lib=_library)
def _(pattern, value, w_o, whole, backend, threads=0):  # type: ignore[no-untyped-def]
    return whole.new_empty(pattern.shape)


@torch.library.register_fake("flowroutes::attention_layer", lib=_library)
def _(query, key, value, w_o, whole, base, mask, sinks, scaling, softcap, window, dense, floor, backend, threads=0):  # type: ignore[no-untyped-def]
    n_head, n_query, n_key = query.shape[0], query.shape[1], key.shape[1]
    n_edge = torch.library.get_ctx().new_dynamic_size() if floor >= 0 else 0
    return (
        whole.new_empty((n_head, n_query, n_key) if dense else (0, 0, 0)),
        whole.new_empty(n_query, n_head),
        whole.new_empty(n_query),
        whole.new_empty((3, n_edge), dtype=torch.int32),
        whole.new_empty(n_edge),
    )
