"""Proximity of one part per row (residual stream, MLP output, bias) to the state it is added to.

    proximity(z, y) = max(sum_d min(w_d, 2|y_d| - w_d), 0),  w = sign(y) z     (Ferrando & Voita 2403.00824, equation 4,
    termwise in fp32)

part [n or 1, D], whole [n, D] -> [n], in the unit of |y|_1. Every element is read once and 4 n bytes are written; 6 n D
FLOPs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Tile, closeness, on_device, rows, select


@triton.jit
def parts_kernel(
    p_part, p_whole, p_out, n, n_channel, part_row, whole_row, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, n_channel, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_tile = m_n[:, None] & (o_d < n_channel)[None, :]
        z = tl.load(p_part + o_n.to(tl.int64)[:, None] * part_row + o_d[None, :], mask=m_tile, other=0.0).to(tl.float32)
        y = tl.load(p_whole + o_n.to(tl.int64)[:, None] * whole_row + o_d[None, :], mask=m_tile, other=0.0).to(
            tl.float32
        )
        total += closeness(z, y)
    tl.store(p_out + o_n, tl.maximum(tl.sum(total, 1), 0.0), mask=m_n)


def configurations() -> list[Tile]:
    """Rows by channels."""
    return [Tile(2, 1024, 4, 3)]


def part_proximity(part: Tensor, whole: Tensor, *, tile: Tile | None = None) -> Tensor:
    """Proximity ``[n]`` (fp32) of ``part [n or 1, D]`` to ``whole [n, D]``, any strides between rows."""
    part, whole = rows(part), rows(whole)
    n, n_channel = whole.shape
    out = torch.empty(n, dtype=torch.float32, device=whole.device)
    tile = tile or select(configurations(), whole)
    if n:
        with on_device(whole):
            parts_kernel[(triton.cdiv(n, tile.rows),)](
                p_part=part,
                p_whole=whole,
                p_out=out,
                n=n,
                n_channel=n_channel,
                part_row=part.stride(0) if part.shape[0] > 1 else 0,
                whole_row=whole.stride(0),
                BLOCK_N=tile.rows,
                BLOCK_D=tile.columns,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out
