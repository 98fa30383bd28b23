"""Decisions about listed sub-edges on the device: what is open in a row, and what becomes of a (query, key) pair.

A part is open at a threshold t if it lies above t low and not above t high, the ends of its row's normaliser: it may be
in a route or not. 4 n bytes of values and 12 n of indices are read once; nothing waits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device

DROPPED, KEPT, UNCLEAR = 0, 1, 2


@triton.jit
def open_kernel(p_index, p_value, p_low, p_high, p_threshold, p_open, n, n_threshold, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    query = tl.load(p_index + o, mask=m, other=0)
    value = tl.load(p_value + o, mask=m, other=0.0)
    low = tl.load(p_low + query, mask=m, other=0.0)
    high = tl.load(p_high + query, mask=m, other=0.0)
    inside = m & (o < 0)
    for i in range(0, n_threshold):
        threshold = tl.load(p_threshold + i)
        inside = inside | ((value > threshold * low) & (value <= threshold * high))
    tl.store(p_open + query, tl.full([BLOCK], 1, tl.int32), mask=m & inside)


@triton.jit
def states_kernel(
    p_name,
    p_value,
    p_low,
    p_high,
    p_tolerance,
    p_threshold,
    p_state,
    p_open,
    p_unclear,
    n,
    n_threshold,
    size,
    n_key,
    floor,
    well,
    tolerance,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    pair = tl.load(p_name + o, mask=m, other=-1) // size
    before = tl.load(p_name + o - 1, mask=m & (o > 0), other=-size) // size
    first = m & ((o == 0) | (pair != before))
    known, rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    running, step = first, 0
    while tl.max(running.to(tl.int32), 0) > 0:  # a pair's entries follow each other: its first one adds them up
        name = tl.load(p_name + o + step, mask=running & (o + step < n), other=-1)
        running = running & (name >= 0) & (name // size == pair)
        value = tl.load(p_value + o + step, mask=running, other=0.0)
        known += tl.where(name % size > 0, value, 0.0)
        rest += tl.where(name % size > 0, 0.0, value)
        step += 1
    query = pair // n_key
    low = tl.load(p_low + query, mask=first, other=0.0)
    high = tl.load(p_high + query, mask=first, other=0.0)
    share = tl.full([BLOCK], 0.0, tl.float32) + tolerance
    if p_tolerance is not None:
        share = tl.load(p_tolerance + query, mask=first, other=0.0)
    top = known + rest
    unclear = (top > well * floor * low) & (rest > 2 * share * top)
    between = first & (o < 0)
    for i in range(0, n_threshold):
        threshold = tl.load(p_threshold + i)
        unclear = unclear | ((known <= threshold * high) & (top > threshold * low))
        between = between | ((known > threshold * low) & (known <= threshold * high))
    unclear = first & unclear & (rest > 0)
    between = first & between & (rest == 0) & (high > low)
    state = tl.where(unclear, 2, tl.where(top > floor * low, 1, 0)).to(tl.int8)
    for i in range(0, step):
        name = tl.load(p_name + o + i, mask=first & (o + i < n), other=-1)
        tl.store(p_state + o + i, state, mask=first & (name >= 0) & (name // size == pair))
    tl.store(p_open + query, tl.full([BLOCK], 1, tl.int32), mask=between)
    number = tl.sum(unclear.to(tl.int32), 0)
    if number > 0:
        tl.atomic_add(p_unclear, number)


def mark_open(index: Tensor, value: Tensor, low: Tensor, high: Tensor, thresholds: Tensor, open_: Tensor) -> None:
    """Set ``open_ [query]`` (int32) to 1 where a sub-edge of ``index [3, n]``, ``value [n]`` is open at one of
    ``thresholds``.
    """
    n = len(value)
    if n and len(thresholds):
        with on_device(value):
            open_kernel[(triton.cdiv(n, 1024),)](
                p_index=index,
                p_value=value,
                p_low=low,
                p_high=high,
                p_threshold=thresholds,
                p_open=open_,
                n=n,
                n_threshold=len(thresholds),
                BLOCK=1024,
                num_warps=4,
            )


def pair_states(
    name: Tensor,
    value: Tensor,
    low: Tensor,
    high: Tensor,
    tolerance: float | Tensor,
    thresholds: Tensor,
    *,
    size: int,
    n_key: int,
    floor: float,
    well: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What becomes of the sub-edges of each pair: ``DROPPED`` (below the floor), ``KEPT``, or ``UNCLEAR``: its other
    heads must be evaluated.

    Args:
        name: ``[n]`` int64, ascending: (query · n_key + key) · size + head + 1; head -1: what the other heads add at
            most.
        value: ``[n]`` proximities; low, high ``[query]``: of the normalisers; tolerance: of sums above ``well`` floors,
            a number or ``[query]``.

    Returns:
        state of every entry ``[n]`` (int8); 1 for rows in which a known sum is open ``[query]`` (int32); how many pairs
        are unclear ``[1]``.
    """
    n = len(name)
    state = torch.empty(n, dtype=torch.int8, device=name.device)
    open_ = torch.zeros(len(low), dtype=torch.int32, device=name.device)
    unclear = torch.zeros(1, dtype=torch.int32, device=name.device)
    if n:
        with on_device(name):
            states_kernel[(triton.cdiv(n, 256),)](
                p_name=name,
                p_value=value,
                p_low=low,
                p_high=high,
                p_tolerance=tolerance if isinstance(tolerance, Tensor) else None,
                p_threshold=thresholds,
                p_state=state,
                p_open=open_,
                p_unclear=unclear,
                n=n,
                n_threshold=len(thresholds),
                size=size,
                n_key=n_key,
                floor=floor,
                well=well,
                tolerance=0.0 if isinstance(tolerance, Tensor) else tolerance,
                BLOCK=256,
                num_warps=4,
            )
    return state, open_, unclear
