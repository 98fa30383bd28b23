"""How coarsely modules round: what they say about it, and how far rounding alone may take a result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# |sum of parts − state| / largest |state|; int8 and float8 stand for layers that round their inputs to so many bits
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
    torch.int8: 4e-2,
    torch.float8_e4m3fn: 6e-2,
}
# ‖answer of a linear module − weight · input‖ / ‖answer‖, for inputs that nothing rounds
AGREEMENT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LOW_BIT_AGREEMENT = 8e-2  # the same where the module may round its inputs to 8 bits


def coarsest_of(types: set[torch.dtype], device: torch.device) -> torch.dtype:
    """The type with the largest rounding error; float32 counts as what this process makes of it in matrix products."""
    known = list(TOLERANCE)
    found = max((t for t in types if t in TOLERANCE), key=known.index, default=torch.float32)
    return max((found, _float32_product(device)), key=known.index) if found == torch.float32 else found


def _float32_product(device: torch.device) -> torch.dtype:
    """What torch.set_float32_matmul_precision and its relatives make of float32 products: TF32 has float16's
    precision.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    kind = getattr(getattr(backend, "matmul", None), "fp32_precision", "ieee")
    return {"bf16": torch.bfloat16, "tf32": torch.float16 if device.type == "cuda" else torch.float32}.get(
        kind, torch.float32
    )


def computing_types(module: nn.Module) -> set[torch.dtype]:
    """Floating types that a module's parts say they compute in: of parameters and buffers, and ``compute_dtype`` of
    quantised ones.
    """
    found = {
        t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point() and t.element_size() > 1
    }
    said = {getattr(m, "compute_dtype", None) for m in module.modules()}
    return found | {t for t in said if isinstance(t, torch.dtype)}


def stores_few_bits(module: nn.Module) -> bool:
    """Whether a module keeps weights as integers, as 8-bit floats or in a format of its own, and so may round its
    inputs too.
    """
    return any(
        _few_bits(t) for m in module.modules() for t in [*m._parameters.values(), *m._buffers.values()] if t is not None
    ) or any(
        type(m).__module__.startswith(("bitsandbytes", "torch.ao")) or "BitLinear" in type(m).__name__
        for m in module.modules()
    )


def _few_bits(t: Tensor) -> bool:
    whole = t.is_floating_point() and t.element_size() > 1
    return t.dtype != torch.bool and (not whole or type(t) not in (nn.Parameter, Tensor))


def type_of_error(error: float) -> torch.dtype:
    """The type that a layer of few bits rounds its inputs to, from the relative error of its additivity."""
    for dtype, largest in (
        (torch.float32, 3e-5),
        (torch.float16, 1.5e-3),
        (torch.bfloat16, 6e-3),
        (torch.int8, 2.5e-2),
    ):
        if error <= largest:
            return dtype
    # not linear: rounding does not excuse it
    return torch.float8_e4m3fn if error <= LOW_BIT_AGREEMENT else torch.float32
