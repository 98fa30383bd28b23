"""Certified importances of one layer: intervals that hold the exact values, tight where it matters.

Every sub-edge is bounded, those above a cut are evaluated, and the rest widens an interval around the row's normaliser.
Rows are refined with smaller cuts until their normaliser is known to the tolerance and nothing is ambiguous at the
thresholds asked for; a row that has more candidates than the buffer holds is evaluated whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowroutes_fast.ops.arguments import check_threads
from flowroutes_fast.ops.attention import Attention, native_arguments
from flowroutes_fast.ops.certified_rounds import FIRST_CUT, Rounds, signed
from flowroutes_fast.ops.intervals import Certified, Counts
from flowroutes_fast.ops.native import edges
from flowroutes_fast.system.ambient import in_neutral

MEASURES = ("proximity", "signed")
CAPACITY = 4096  # candidates per row


@in_neutral
def certified(
    attention: Attention,
    others: Tensor,
    *,
    floor: float,
    thresholds: tuple[float, ...] = (),
    tolerance: float | Tensor = 1e-2,
    measure: str = "proximity",
    backend: str = "cpu",
    capacity: int = CAPACITY,
    slack: float = 0.0,
    threads: int = 0,
    fused: bool = True,
) -> Certified:
    """Intervals of one layer's importances.

    Args:
        attention: the layer's sub-edges.
        others: proximities of the state's other parts ``[part, query]``.
        floor: all sub-edges of pairs whose share of the normaliser may be above it are listed.
        thresholds: rows are refined until no sub-edge, pair or other part is ambiguous at any of these shares.
        tolerance: largest (high − low) / (high + low) of a normaliser: the relative error of its midpoint;
            a tensor ``[query]`` sets it per row (0: the row is evaluated whole).
        measure: ``"proximity"``, or ``"signed"`` for ⟨sign(y), z⟩ / ‖y‖₁.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.
        capacity: candidates per row before it is evaluated whole, on the CPU.
        slack: relative rounding error of ⟨v, g⟩ on the CPU; GPUs know their own (kernels/gradient.py).
        fused: on the CPU, one kernel that does everything row by row; False for the same in passes.
    """
    if backend != "cpu":
        attention = attention.masked()
    _check(attention, others, tolerance, measure, capacity, threads)
    if backend in ("reference", "cpu"):
        attention = attention.float()
    if backend == "cpu" and fused:
        return _fused(attention, others.float(), floor, thresholds, tolerance, measure, capacity, threads)
    if measure == "signed":
        return signed(attention, floor, backend, slack, threads)
    if backend in ("triton", "cuda"):
        from flowroutes_fast.ops.certified_gpu import Passes

        return Passes(attention, others, floor, thresholds, tolerance, backend).run()
    return Rounds(attention, others, floor, thresholds, tolerance, backend, capacity, slack, threads).run()


def _fused(
    attention: Attention,
    others: Tensor,
    floor: float,
    thresholds: tuple[float, ...],
    tolerance: float | Tensor,
    measure: str,
    capacity: int,
    threads: int,
) -> Certified:
    arguments = native_arguments(attention, threads)
    n_query, n_head = attention.n_query, attention.n_head
    arguments |= {
        "n_others": others.shape[0],
        "floor": floor,
        "cut": min(FIRST_CUT, floor) or FIRST_CUT,
        "capacity": capacity,
        "n_thresholds": len(thresholds),
    }
    arguments.take("others", others, others.shape[0], n_query)
    arguments.take("thresholds", torch.tensor(thresholds, dtype=torch.float32, device="cpu"), len(thresholds))
    low, high = (arguments.make(name, n_query) for name in ("low", "high"))
    head_low, head_high = (arguments.make(name, n_query, n_head) for name in ("head_low", "head_high"))
    if isinstance(tolerance, Tensor):
        arguments.take("tolerance", tolerance.float(), n_query, where="tolerances")
    else:
        arguments["tolerance"] = tolerance
    if measure == "signed":
        arguments.take("whole_norm", attention.whole.abs().sum(-1), n_query)
    index, value, counts = arguments.call("certified")
    return Certified(low, high, head_low, head_high, *edges((index, value)), Counts(*counts))


def _check(
    attention: Attention, others: Tensor, tolerance: float | Tensor, measure: str, capacity: int, threads: int
) -> None:
    attention.check()
    check_threads(threads)
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(map(repr, MEASURES))}, got {measure!r}")
    if others.dim() != 2 or others.shape[1] != attention.n_query:
        raise ValueError(f"others must be [part, query = {attention.n_query}], got shape {list(others.shape)}")
    if isinstance(tolerance, Tensor) and tolerance.shape != (attention.n_query,):
        raise ValueError(
            f"tolerance must be a number or [query = {attention.n_query}], got shape {list(tolerance.shape)}"
        )
    if capacity < 0:
        raise ValueError(f"capacity must be zero or positive, got {capacity}")
