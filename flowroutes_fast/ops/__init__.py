"""The functions everything is built on: they check their arguments, choose a backend and return tensors.

:func:`attention_importances`, :func:`part_proximity` and :func:`component_proximity` are public. They take PyTorch
tensors, or arrays of any library that speaks DLPack (NumPy, JAX, CuPy), and may be called inside
``torch.compile(fullgraph=True)``; there, shapes and dtypes are checked and numbers are not. None of them has a
gradient. What they call is registered with ``torch.library`` (namespace ``flowroutes``).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from flowroutes_fast.ops import native, reference
from flowroutes_fast.system.ambient import in_neutral, matmul

BACKENDS = ("reference", "cpu", "triton", "cuda")
_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def _triton_missing() -> str | None:
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


def _cuda_missing() -> str | None:
    from flowroutes_fast.ops.cuda import missing

    reason = missing()
    if reason is None and (without := _triton_missing()):
        return f"its bounds are Triton's: {without}"
    return reason


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
            _say_once(f"flowroutes_fast runs on its slow 'reference' backend: {reason}")
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


def _resolve(backend: str, tensor: Tensor) -> str:
    """:func:`choose_backend` now, or (while torch.compile traces, which must not look for libraries) when the
    registered op runs.
    """
    return backend if torch.compiler.is_compiling() else choose_backend(backend, tensor)


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


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


@in_neutral
def part_proximity(part: Any, whole: Any, *, backend: str = "auto", threads: int = 0) -> Tensor:
    """Proximity of parts to the states they are parts of (equation 4), without a temporary.

    Equivalent to::

        (whole.abs().sum(-1) - (part - whole).abs().sum(-1)).clamp_min(0)

    but summed termwise, so that nothing cancels.

    Args:
        part, whole: ``[..., d_model]``, of one shape, float32, bfloat16 or float16 (float64: computed by the
            reference).
        backend: see :func:`attention_importances`. threads: of the CPU kernel; 0 for OpenMP's default.

    Returns:
        ``[...]`` in the units of ‖whole‖₁, float32 (float64 for float64).

    Raises:
        ValueError: differing shapes or devices, no d_model. TypeError: no floating point numbers.
    """
    part, whole = as_tensor(part, "part"), as_tensor(whole, "whole")
    _check_states(part=part, whole=whole)
    check_threads(threads)
    if part.shape != whole.shape:
        raise ValueError(f"part {tuple(part.shape)} and whole {tuple(whole.shape)} must have one shape")
    flat = torch.ops.flowroutes.part_proximity(*_flat(part, whole), _resolve(backend, whole), threads)
    return flat.reshape(whole.shape[:-1])  # type: ignore[no-any-return]


@in_neutral
def component_proximity(outputs: Any, state: Any, *, backend: str = "auto", threads: int = 0) -> Tensor:
    """Proximity of every component's output to the state it is added to, at the same position: the
    component-to-component variant.

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
    check_threads(threads)
    _check_components(outputs, state)
    return torch.ops.flowroutes.component_proximity(outputs.detach(), state.detach(), _resolve(backend, state), threads)  # type: ignore[no-any-return]


def _check_states(**named: Tensor) -> None:
    devices = {tensor.device for tensor in named.values()}
    if len(devices) > 1:
        raise ValueError(f"{' and '.join(named)} are on different devices: {', '.join(map(str, devices))}")
    if len({tensor.dtype == torch.float64 for tensor in named.values()}) > 1:
        raise TypeError(f"{' and '.join(named)} must both be float64, or neither")
    for name, tensor in named.items():
        if tensor.dtype not in _FLOAT:
            raise TypeError(
                f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}"
            )
        _check_real(name, tensor)
        if not tensor.dim() or not tensor.shape[-1]:
            raise ValueError(f"{name} must be [..., d_model], got shape {tuple(tensor.shape)}")


def _check_components(outputs: Tensor, state: Tensor) -> None:
    if (
        outputs.dim() != state.dim() + 1
        or outputs.shape[:-2] != state.shape[:-1]
        or outputs.shape[-1] != state.shape[-1]
    ):
        raise ValueError(
            f"outputs {tuple(outputs.shape)} must be [..., component, d_model] for a state [..., d_model] = "
            f"{tuple(state.shape)}"
        )


def _check_real(name: str, tensor: Tensor) -> None:
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
        if tensor.dtype not in _FLOAT:
            raise TypeError(
                f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}"
            )
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions, got shape {list(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {list(tensor.shape)}")
        if tensor.device != (device := device or tensor.device):
            raise ValueError(f"{name} is on {tensor.device}, others are on {device}: move them to one device")
        _check_real(name, tensor)


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


def _result(state: Tensor) -> torch.dtype:
    return torch.float64 if state.dtype == torch.float64 else torch.float32


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().reshape(-1, t.shape[-1]) for t in tensors)


class AttentionImportances(NamedTuple):
    """What :func:`attention_importances` returns."""

    importances: Tensor  # [batch, query, key, head]
    residual: Tensor  # [batch, query]


@in_neutral
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
        float64 inputs). Over keys and heads, together with the residual, a row sums to 1 (0 where no part is closer
        than none).

    Raises:
        ValueError: shapes that do not fit, NaN or infinity in a state, an unknown backend.
        TypeError: tensors that are not floating point.
    """
    given = {"pattern": pattern, "value": value, "w_o": w_o, "resid_pre": resid_pre, "resid_mid": resid_mid}
    pattern, value, w_o, resid_pre, resid_mid = (as_tensor(array, name) for name, array in given.items())
    _check_importances(pattern, value, w_o, resid_pre, resid_mid, distance_norm, clip)
    chosen = _resolve(backend, resid_mid)
    if backend not in ("auto", "reference") and distance_norm != 1:
        raise ValueError(
            f"backend {chosen!r} computes distance_norm=1 only, not {distance_norm}; use backend='reference'"
        )
    dtype = _result(resid_mid)
    pattern, value, w_o, resid_pre, resid_mid = (
        t.detach().to(dtype) for t in (pattern, value, w_o, resid_pre, resid_mid)
    )
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
            raise TypeError(
                f"{name} must be floating point (float32, bfloat16, float16 or float64), got {tensor.dtype}"
            )
        if tensor.dim() != rank[name]:
            raise ValueError(f"{name} must have {rank[name]} dimensions, got shape {tuple(tensor.shape)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}")
        if tensor.device != resid_mid.device:
            raise ValueError(
                f"{name} is on {tensor.device} but resid_mid is on {resid_mid.device}: move them to one device"
            )
        _check_real(name, tensor)
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
        raise ValueError(
            f"value has {value.shape[2]} key-value heads, which does not divide the pattern's {head} heads"
        )
    for name, tensor in named.items():
        if not torch.compiler.is_compiling() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    if not distance_norm > 0:
        raise ValueError(f"distance_norm must be positive, got {distance_norm}")
    if not 0 <= clip < float("inf"):
        raise ValueError(f"clip must be zero or a positive number, got {clip}")


def layer_arguments(value: Tensor, w_o: Tensor, whole: Tensor, g: Tensor, threads: int) -> native.Arguments:
    """What every native operation on one layer takes, float32 on the CPU; where attention weights come from is
    added.
    """
    n_query, (kv, n_key), (n_head, d_v, d_model) = whole.shape[0], value.shape[:2], w_o.shape
    check_threads(threads)
    arguments = native.Arguments(
        queries=n_query,
        keys=n_key,
        heads=n_head,
        group=n_head // kv,
        d_v=d_v,
        d_model=d_model,
        w_row=n_head * d_v,
        threads=threads,
    )
    arguments.take_rows("value", value, (kv, n_key, d_v), ("v_head", "v_row"), where="v")
    arguments.take("g", g, n_query, n_head, d_v)
    arguments.take("w_o", _linear(w_o), d_model, n_head * d_v)
    arguments.take("whole", whole, n_query, d_model, where="y")
    return arguments


def _linear(w_o: Tensor) -> Tensor:
    """``[head, d_head, d_model]`` as a linear layer stores it ``[d_model, head * d_head]``: no copy when it views
    one.
    """
    return native.contiguous(w_o.permute(2, 0, 1).reshape(w_o.shape[2], -1))


def _native_attention(
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
    return out, by_head, normaliser, *native.edges(arguments.call("attention_proximity"))


def _native_layer(value: Tensor, w_o: Tensor, whole: Tensor, threads: int) -> native.Arguments:
    sign = torch.copysign(torch.ones_like(whole), whole)
    # W_O[h] sign(y_i), the sign bit as the sign of zero
    g = matmul(sign, _linear(w_o)).view(len(whole), *w_o.shape[:2])
    return layer_arguments(value, w_o, whole, g, threads)


def take_qk(
    arguments: native.Arguments,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> None:
    """Attention weights are recomputed from queries and keys."""
    (n_head, n_query, d_qk), n_key = query.shape, key.shape[1]
    arguments |= {"d_qk": d_qk, "scale": scaling, "softcap": softcap, "window": window, "offset": n_key - n_query}
    arguments.take_rows(
        "query", query, (arguments["heads"], arguments["queries"], d_qk), ("q_head", "q_row"), where="q"
    )
    arguments.take_rows(
        "key", key, (n_head // arguments["group"], arguments["keys"], d_qk), ("k_head", "k_row"), where="k"
    )
    if mask is not None:
        strides = ("mask_head", "mask_query") if mask.dim() == 3 else ("mask_query",)
        arguments.take_rows("mask", mask, (n_head, n_query, n_key)[3 - mask.dim() :], strides)
    arguments.take("sinks", None if sinks is None else sinks.float(), n_head)


_library = torch.library.Library("flowroutes", "DEF")
_library.define("part_proximity(Tensor part, Tensor whole, str backend, int threads=0) -> Tensor")
_library.define("component_proximity(Tensor outputs, Tensor state, str backend, int threads=0) -> Tensor")
_library.define(
    "attention_proximity(Tensor pattern, Tensor value, Tensor w_o, Tensor whole, str backend, int threads=0) -> Tensor",
)
_library.define(
    "attention_layer(Tensor query, Tensor key, Tensor value, Tensor w_o, Tensor whole, Tensor base, Tensor? mask, "
    "Tensor? sinks, "
    "float scaling, float softcap, int window, bool dense, float floor, str backend, int threads=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_library, "part_proximity", "CompositeExplicitAutograd")
@in_neutral
def _part_proximity(part: Tensor, whole: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of ``part [n or 1, d_model]`` to ``whole [n, d_model]`` -> ``[n]``."""
    _check_states(part=part, whole=whole)
    check_threads(threads)
    if part.dim() != 2 or whole.dim() != 2 or part.shape[1] != whole.shape[1] or len(part) not in (1, len(whole)):
        raise ValueError(
            f"part must be [n or 1, d_model] for whole [n, d_model], got {list(part.shape)} and {list(whole.shape)}"
        )
    chosen = choose_backend(backend, whole)
    if chosen == "reference":
        dtype = _result(whole)
        return reference.proximity(part.to(dtype), whole.to(dtype))
    if chosen == "triton":
        from flowroutes_fast.kernels.parts import part_proximity as triton_parts

        return triton_parts(part, whole)  # type: ignore[no-any-return]
    if chosen == "cuda":
        from flowroutes_fast.ops.cuda import part_proximity as cuda_parts

        return cuda_parts(part, whole)
    rows, d_model = whole.shape
    arguments = native.Arguments(rows=rows, part_rows=len(part), d_model=d_model, threads=threads)
    arguments.take("part", part.float(), len(part), d_model)
    arguments.take("whole", whole.float(), rows, d_model)
    out = arguments.make("out", rows)
    arguments.call("part_proximity")
    return out


@torch.library.impl(_library, "component_proximity", "CompositeExplicitAutograd")
@in_neutral
def _component_proximity(outputs: Tensor, state: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of ``outputs [..., component, d_model]`` to ``state [..., d_model]`` -> ``[..., component]``."""
    _check_states(outputs=outputs, state=state)
    check_threads(threads)
    _check_components(outputs, state)
    chosen = choose_backend(backend, state)
    dtype = _result(state)
    shape = outputs.shape[:-1]
    if not outputs.numel():
        return torch.zeros(shape, dtype=dtype, device=state.device)
    if chosen == "reference":
        # one at a time
        return torch.stack([reference.proximity(one.to(dtype), state.to(dtype)) for one in outputs.unbind(-2)], -1)
    if chosen != "cpu":  # the kernel of whole parts, one component at a time
        flat = state.reshape(-1, state.shape[-1])
        found = [_part_proximity(one.reshape(flat.shape), flat, chosen) for one in outputs.unbind(-2)]
        return torch.stack(found, -1).reshape(shape)
    outputs, state = outputs.float().reshape(-1, *outputs.shape[-2:]), state.float().reshape(-1, state.shape[-1])
    (rows, count, d_model), packed = outputs.shape, outputs[:1].is_contiguous() and not outputs.is_neg()
    outputs = outputs if packed and (rows == 1 or outputs.stride(0) >= count * d_model) else native.contiguous(outputs)
    arguments = native.Arguments(rows=rows, count=count, d_model=d_model, threads=threads)
    # the rows as one tensor whose last dimension holds the components
    span = outputs.stride(0) if rows > 1 else count * d_model
    arguments.take_rows(
        "outputs",
        outputs.as_strided((rows, count * d_model), (span, 1)),
        (rows, count * d_model),
        ("stride",),
        where="output",
    )
    arguments.take("state", state, rows, d_model, where="whole")
    out = arguments.make("out", rows, count)
    arguments.call("component_proximity")
    return out.reshape(shape)


@torch.library.impl(_library, "attention_proximity", "CompositeExplicitAutograd")
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
        reason = _cuda_missing()
        if reason:
            _say_once(f"flowroutes_fast takes stored attention patterns with its slow 'reference' backend: {reason}")
        chosen = "reference" if reason else "cuda"
    if chosen == "cuda":
        from flowroutes_fast.ops.cuda import dense_proximity as cuda_dense

        return cuda_dense(pattern, value, w_o, whole)
    dtype = _result(whole)
    pattern, value, w_o, whole = (t.to(dtype) for t in (pattern, value, w_o, whole))
    if chosen != "cpu":
        return reference.attention_proximity(pattern, value, w_o, whole)
    arguments = _native_layer(value, w_o, whole, threads)
    arguments.take_rows("pattern", pattern, (n_head, n_query, n_key), ("pattern_head", "pattern_query"))
    return _native_attention(arguments, True, -1.0, False)[0]


@torch.library.impl(_library, "attention_layer", "CompositeExplicitAutograd")
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
        return _native_attention(arguments, dense, floor, True)
    if chosen == "reference":
        dtype = _result(whole)
        query, key, value, w_o, whole, base = (t.to(dtype) for t in (query, key, value, w_o, whole, base))
    options: dict[str, Any] = {"scaling": scaling, "mask": mask, "softcap": softcap, "window": window, "sinks": sinks}
    if chosen == "triton":
        edge = _triton_dense(query, key, value, w_o, whole, options)
    else:
        edge = reference.attention_pattern(query, key, **options)
        if chosen == "cuda":
            from flowroutes_fast.ops.cuda import dense_proximity as cuda_dense

            edge = cuda_dense(edge, value, w_o, whole)
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
    from flowroutes_fast.kernels.bound import attention_rows
    from flowroutes_fast.kernels.dense import dense_proximity

    lse = attention_rows(query, key, **options)[0]
    options = {name: option for name, option in options.items() if name != "sinks"}
    return dense_proximity(query, key, value, w_o, whole, lse, **options)  # type: ignore[no-any-return]


@torch.library.register_fake("flowroutes::part_proximity", lib=_library)
def _(part, whole, backend, threads=0):  # type: ignore[no-untyped-def]
    return whole.new_empty(whole.shape[0], dtype=_result(whole))


@torch.library.register_fake("flowroutes::component_proximity", lib=_library)
def _(outputs, state, backend, threads=0):  # type: ignore[no-untyped-def]
    return state.new_empty(outputs.shape[:-1], dtype=_result(state))


@torch.library.register_fake("flowroutes::attention_proximity", lib=_library)
def _(pattern, value, w_o, whole, backend, threads=0):  # type: ignore[no-untyped-def]
    return whole.new_empty(pattern.shape, dtype=_result(whole))


@torch.library.register_fake("flowroutes::attention_layer", lib=_library)
def _(query, key, value, w_o, whole, base, mask, sinks, scaling, softcap, window, dense, floor, backend, threads=0):  # type: ignore[no-untyped-def]
    n_head, n_query, n_key = query.shape[0], query.shape[1], key.shape[1]
    n_edge = torch.library.get_ctx().new_dynamic_size() if floor >= 0 else 0
    return (
        whole.new_empty((n_head, n_query, n_key) if dense else (0, 0, 0), dtype=_result(whole)),
        whole.new_empty((n_query, n_head), dtype=_result(whole)),
        whole.new_empty(n_query, dtype=_result(whole)),
        whole.new_empty((3, n_edge), dtype=torch.int32),
        whole.new_empty(n_edge, dtype=_result(whole)),
    )
