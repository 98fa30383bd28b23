"""What is known of one layer's sub-edges: intervals, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Counts:
    """How much work a certificate took: (query, key, head) sub-edges bounded and evaluated, rows refined, rows
    evaluated whole.
    """

    bounded: int = 0
    evaluated: int = 0
    refined: int = 0
    exhausted: int = 0


@dataclass
class Certified:
    """What is known of one layer's sub-edges. Proximities are in units of the state's L1 norm.

    ``low``, ``high`` ``[query]`` bound the normaliser; ``head_low``, ``head_high`` ``[query, head]`` a head's sum over
    keys. ``index [3, n]`` (query, key, head; int32) and ``value [n]``: exact proximities of the evaluated sub-edges of
    every (query, key) pair that may reach the floor; head -1 stands for the pair's other heads, whose sum lies between
    0 and its value. With ``measure="signed"`` everything is a share of ‖y‖₁, signed, and known.
    """

    low: Tensor
    high: Tensor
    head_low: Tensor
    head_high: Tensor
    index: Tensor
    value: Tensor
    counts: Counts = field(default_factory=Counts)
