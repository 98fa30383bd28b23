"""In which numbers a block computes, and so how far its parts may miss its states."""

from __future__ import annotations

import torch

from flowroutes_fast.models.families import Block
from flowroutes_fast.models.rounding import TOLERANCE, coarsest_of, computing_types
from flowroutes_fast.models.weights import rounding_of


def coarsest_dtype(block: Block, states_dtype: torch.dtype) -> torch.dtype:
    """The type with the largest rounding error among those of the states, of the block's modules and of what W_O's
    module does.

    int8 and float8_e4m3fn stand for a W_O whose inputs are rounded to 8 bits; a plain float32 block gives float32.
    """
    found = {states_dtype, *computing_types(block.module)}
    if block.output is not None:
        found.add(rounding_of(block.output, block.index))
    return coarsest_of(found, block.device)


def tolerance(block: Block, states_dtype: torch.dtype) -> float:
    """How far the parts may miss the state, relative to its largest magnitude."""
    return TOLERANCE[coarsest_dtype(block, states_dtype)]
