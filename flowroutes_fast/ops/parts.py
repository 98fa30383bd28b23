"""Proximity of whole parts to the states that they are parts of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.ops import cuda, native, reference
from flowroutes_fast.ops.arguments import as_tensor, check_states, check_threads, flat_rows, result_dtype
from flowroutes_fast.ops.backends import choose_backend, resolve
from flowroutes_fast.ops.library import library
from flowroutes_fast.system.ambient import in_neutral

library.define("part_proximity(Tensor part, Tensor whole, str backend, int threads=0) -> Tensor")


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
    check_states(part=part, whole=whole)
    check_threads(threads)
    if part.shape != whole.shape:
        raise ValueError(f"part {tuple(part.shape)} and whole {tuple(whole.shape)} must have one shape")
    flat = torch.ops.flowroutes.part_proximity(*flat_rows(part, whole), resolve(backend, whole), threads)
    return flat.reshape(whole.shape[:-1])  # type: ignore[no-any-return]


@torch.library.impl(library, "part_proximity", "CompositeExplicitAutograd")
@in_neutral
def registered(part: Tensor, whole: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of ``part [n or 1, d_model]`` to ``whole [n, d_model]`` -> ``[n]``."""
    check_states(part=part, whole=whole)
    check_threads(threads)
    if part.dim() != 2 or whole.dim() != 2 or part.shape[1] != whole.shape[1] or len(part) not in (1, len(whole)):
        raise ValueError(
            f"part must be [n or 1, d_model] for whole [n, d_model], got {list(part.shape)} and {list(whole.shape)}"
        )
    chosen = choose_backend(backend, whole)
    if chosen == "reference":
        dtype = result_dtype(whole)
        return reference.proximity(part.to(dtype), whole.to(dtype))
    if chosen == "triton":
        from flowroutes_fast.kernels.parts import part_proximity as triton_parts

        return triton_parts(part, whole)  # type: ignore[no-any-return]
    if chosen == "cuda":
        return on_cuda(part, whole)
    rows, d_model = whole.shape
    arguments = native.Arguments(rows=rows, part_rows=len(part), d_model=d_model, threads=threads)
    arguments.take("part", part.float(), len(part), d_model)
    arguments.take("whole", whole.float(), rows, d_model)
    out = arguments.make("out", rows)
    arguments.call("parts")
    return out


@torch.library.register_fake("flowroutes::part_proximity", lib=library)
def _(part, whole, backend, threads=0):  # type: ignore[no-untyped-def]
    return whole.new_empty(whole.shape[0], dtype=result_dtype(whole))


@in_neutral
def on_cuda(part: Tensor, whole: Tensor) -> Tensor:
    """Proximity of rows ``[n]``, float32: ``whole [n, d_model]``, ``part [m, d_model]``, of which row ``i % m``
    belongs to row ``i``.
    """
    module = cuda.extension()
    cuda.rank("whole", whole, 2)
    cuda.rank("part", part, 2)
    cuda.check({"part": part}, {"part": (part.shape[0], whole.shape[1])}, whole.device)
    if part.shape[0] == 0 and whole.shape[0]:
        raise ValueError("part has no rows")
    place = cuda.place(whole.device)
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
