"""Proximity of every component's output to the state that it is added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.ops import native, parts, reference
from flowroutes_fast.ops.arguments import as_tensor, check_states, check_threads, result_dtype
from flowroutes_fast.ops.backends import choose_backend, resolve
from flowroutes_fast.ops.library import library
from flowroutes_fast.system.ambient import in_neutral

library.define("component_proximity(Tensor outputs, Tensor state, str backend, int threads=0) -> Tensor")


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
    check_states(outputs=outputs, state=state)
    check_threads(threads)
    _check_components(outputs, state)
    return torch.ops.flowroutes.component_proximity(outputs.detach(), state.detach(), resolve(backend, state), threads)  # type: ignore[no-any-return]


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


@torch.library.impl(library, "component_proximity", "CompositeExplicitAutograd")
@in_neutral
def registered(outputs: Tensor, state: Tensor, backend: str, threads: int = 0) -> Tensor:
    """Proximity of ``outputs [..., component, d_model]`` to ``state [..., d_model]`` -> ``[..., component]``."""
    check_states(outputs=outputs, state=state)
    check_threads(threads)
    _check_components(outputs, state)
    chosen = choose_backend(backend, state)
    dtype = result_dtype(state)
    shape = outputs.shape[:-1]
    if not outputs.numel():
        return torch.zeros(shape, dtype=dtype, device=state.device)
    if chosen == "reference":
        # one at a time
        return torch.stack([reference.proximity(one.to(dtype), state.to(dtype)) for one in outputs.unbind(-2)], -1)
    if chosen != "cpu":  # the kernel of whole parts, one component at a time
        flat = state.reshape(-1, state.shape[-1])
        found = [parts.registered(one.reshape(flat.shape), flat, chosen) for one in outputs.unbind(-2)]
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
    arguments.call("components")
    return out.reshape(shape)


@torch.library.register_fake("flowroutes::component_proximity", lib=library)
def _(outputs, state, backend, threads=0):  # type: ignore[no-untyped-def]
    return state.new_empty(outputs.shape[:-1], dtype=result_dtype(state))
