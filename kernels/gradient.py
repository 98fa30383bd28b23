"""What a bound needs of the state and of the values: g and v in 16 bits, and how far each is from what it stands for.

    g[i,h] = W_O[h] sign(y_i) * gate[i,h]    (the sign bit is the sign of zero),

so that <sign(y_i), u[h,j]> = <v[h,j], g[i,h]> (Ferrando & Voita 2403.00824, equation 4, see ``bound``). Both operands
are divided by a power of two and rounded to float16; with l = |g16|_2, e >= |g - g16|_2 and the same of v,

    <v, g>  <=  <v16, g16> + e_g l_v + l_g e_v + e_g e_v,

which the bound adds: what rounding really lost, not the worst case. ``e`` holds the rounding to 16 bits, that of g's
own summation over D channels (a block at a time, so that the error grows little with D) and that of the product over
the head's width.

``gradient``: 2 T H d_v D FLOPs; y and W_O are read once per block, 2 T H d_v bytes written. ``values``: v is read once,
2 Hkv T d_v bytes written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED, Tile, columns, load_projection, on_device, padded, product, rows, select, upcast

UNIT = 1.25 * 2.0**-23  # relative error of one addition in a matrix unit that truncates


@triton.jit
def power_of_two(x):
    """The largest power of two that is not above x > 0; 1 for 0, and 2^-126 at least."""
    bits = tl.maximum(x, 2.0**-126).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(x > 0, bits.to(tl.float32, bitcast=True), 1.0)


@triton.jit
def gradient_kernel(
    p_whole,
    p_w_o,
    p_gate,
    p_lost,
    p_half,
    p_scale,
    p_error,
    p_length,
    n_query,
    n_channel,
    n_head,
    whole_row,
    w_head,
    w_row,
    w_column,
    gate_row,
    gate_head,
    product_error,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_head = tl.program_id(0)
    o_query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_v = tl.arange(0, B_V)
    m_query = o_query < n_query
    p_w_o += i_head.to(tl.int64) * w_head
    total = tl.zeros([BLOCK_Q, B_V], tl.float32)
    for first in range(0, n_channel, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        p_y = p_whole + o_query.to(tl.int64)[:, None] * whole_row + o_d[None, :]
        y = tl.load(p_y, mask=m_query[:, None] & (o_d < n_channel)[None, :], other=0.0)
        w_o = load_projection(p_w_o, w_row, w_column, 0, D_V, B_V, first, n_channel, BLOCK_D)
        sign = tl.where(y.to(tl.float32).to(tl.int32, bitcast=True) < 0, -1.0, 1.0).to(w_o.dtype)
        if UPCAST:
            part = product(sign, tl.trans(w_o), UPCAST)
        else:  # a count of imprecise additions keeps the compiler from folding the sum into the product's own
            part = tl.dot(sign, tl.trans(w_o), input_precision="ieee", max_num_imprecise_acc=BLOCK_D)
        total += part
    error = tl.load(p_lost + i_head) + tl.zeros([BLOCK_Q], tl.float32)
    if p_gate is not None:
        p_factor = p_gate + o_query.to(tl.int64)[:, None] * gate_row + i_head.to(tl.int64) * gate_head + o_v[None, :]
        gate = tl.load(p_factor, mask=m_query[:, None] & (o_v < D_V)[None, :], other=0.0).to(tl.float32)
        total *= gate
        error *= tl.max(tl.abs(gate), 1)
    scale = power_of_two(tl.max(tl.abs(total), 1))
    g = total / scale[:, None]
    half = g.to(tl.float16)
    kept = half.to(tl.float32)
    lost = g - kept
    length = tl.sqrt(tl.sum(kept * kept, 1))
    error = 1.001 * (tl.sqrt(tl.sum(lost * lost, 1)) + error / scale + product_error * length)
    place = o_query.to(tl.int64) * n_head + i_head
    tl.store(p_half + place[:, None] * D_V + o_v[None, :], half, mask=m_query[:, None] & (o_v < D_V)[None, :])
    tl.store(p_scale + place, scale, mask=m_query)
    tl.store(p_error + place, error, mask=m_query)
    tl.store(p_length + place, 1.001 * length, mask=m_query)


@triton.jit
def values_kernel(
    p_value,
    p_half,
    p_scale,
    p_error,
    p_length,
    n_key,
    n_block,
    value_head,
    value_row,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, i_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    o_v = tl.arange(0, B_V)
    m = (o_key < n_key)[:, None] & (o_v < D_V)[None, :]
    v = tl.load(
        p_value + i_kv * value_head + o_key.to(tl.int64)[:, None] * value_row + o_v[None, :], mask=m, other=0.0
    ).to(tl.float32)
    scale = power_of_two(tl.max(tl.max(tl.abs(v), 1), 0))
    v = v / scale
    half = v.to(tl.float16)
    kept = half.to(tl.float32)
    lost = v - kept
    place = i_kv * n_block + block
    tl.store(p_half + (i_kv * n_key + o_key)[:, None] * D_V + o_v[None, :], half, mask=m)
    tl.store(p_scale + place, scale)
    tl.store(p_error + place, 1.001 * tl.sqrt(tl.max(tl.sum(lost * lost, 1), 0)))
    tl.store(p_length + place, 1.001 * tl.sqrt(tl.max(tl.sum(kept * kept, 1), 0)))


@dataclass(frozen=True, eq=False)
class Halves:
    """A tensor in float16 ``half`` times powers of two ``scale``; ``error`` and ``length``: of the difference and of
    ``half``, in its unit.

    Of g: half ``[query, head, d_v]``, the others ``[query, head]``. Of v: half ``[kv_head, key, d_v]``, the others
    ``[kv_head, block]``, the largest of each block of keys.
    """

    half: Tensor
    scale: Tensor
    error: Tensor
    length: Tensor

    def mirrored(self) -> Halves:
        return Halves(-self.half, self.scale, self.error, self.length)


def configurations(dtype: torch.dtype, d_v: int) -> list[Tile]:
    """Queries by channels."""
    if dtype == torch.float32:
        return [Tile(32, 32, 8, 1)]
    return [Tile(64, 64, 4, 3), Tile(64, 64, 8, 2)] if padded(d_v) <= 128 else [Tile(64, 64, 8, 2)]


def gradient(whole: Tensor, w_o: Tensor, gate: Tensor | None = None, *, tile: Tile | None = None) -> Halves:
    """g of every query and head; whole ``[Tq, D]``, w_o ``[H, d_v, D]`` (multiplied as it is stored), gate ``[Tq,
    H, d_v]``.
    """
    whole, w_o = rows(whole), columns(w_o)
    gate = None if gate is None else rows(gate)
    n_head, d_v, n_channel = w_o.shape
    n_query, device = len(whole), whole.device
    tile = tile or select(configurations(w_o.dtype, d_v), whole)
    half = torch.empty(n_query, n_head, d_v, dtype=torch.float16, device=device)
    scale, error, length = (torch.empty(n_query, n_head, dtype=torch.float32, device=device) for _ in range(3))
    # of the summation: each block's products, then the blocks, each relative to the sum of |W_O| over the channels
    summed = (min(tile.columns, n_channel) + triton.cdiv(n_channel, tile.columns)) * UNIT
    lost = torch.linalg.vector_norm(torch.linalg.vector_norm(w_o, 1, dim=-1, dtype=torch.float32), dim=-1) * (
        summed * 1.001
    )
    if n_query:
        with on_device(whole):
            gradient_kernel[(n_head, triton.cdiv(n_query, tile.rows))](
                p_whole=whole,
                p_w_o=w_o,
                p_gate=gate,
                p_lost=lost,
                p_half=half,
                p_scale=scale,
                p_error=error,
                p_length=length,
                n_query=n_query,
                n_channel=n_channel,
                n_head=n_head,
                whole_row=whole.stride(0),
                w_head=w_o.stride(0),
                w_row=w_o.stride(1),
                w_column=w_o.stride(2),
                gate_row=0 if gate is None else gate.stride(0),
                gate_head=0 if gate is None else gate.stride(1),
                product_error=d_v * UNIT,
                D_V=d_v,
                B_V=padded(d_v),
                BLOCK_Q=tile.rows,
                BLOCK_D=tile.columns,
                UPCAST=upcast(w_o.dtype) or INTERPRETED,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return Halves(half, scale, error, length)


def values(value: Tensor, block: int) -> Halves:
    """v ``[Hkv, Tk, d_v]`` in blocks of keys."""
    value = rows(value)
    n_kv, n_key, d_v = value.shape
    n_block = triton.cdiv(n_key, block)
    half = torch.empty(n_kv, n_key, d_v, dtype=torch.float16, device=value.device)
    scale, error, length = (torch.empty(n_kv, n_block, dtype=torch.float32, device=value.device) for _ in range(3))
    if n_key:
        with on_device(value):
            values_kernel[(n_block, n_kv)](
                p_value=value,
                p_half=half,
                p_scale=scale,
                p_error=error,
                p_length=length,
                n_key=n_key,
                n_block=n_block,
                value_head=value.stride(0),
                value_row=value.stride(1),
                D_V=d_v,
                B_V=padded(d_v),
                BLOCK_K=block,
                num_warps=4,
            )
    return Halves(half, scale, error, length)
