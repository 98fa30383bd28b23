"""Proximity of listed sub-edges, without storing their n vectors.

    proximity = max(sum_d min(w_d, 2|y_d| - w_d), 0),  w = sign(y_i) z,  z = r_i alpha[h,i,j] (v[h,j] * gate[i,h])
    W_O[h]

(Ferrando & Voita 2403.00824, equation 4, summed termwise in fp32), for n triples (query i, key j, head h).

query [H, Tq, d_qk], key [Hkv, Tk, d_qk], value [Hkv, Tk, d_v], w_o [H, d_v, D], whole [Tq, D], lse [H, Tq], index [3,
n] -> [n], in the unit of |y|_1. The list is grouped by head, so that a tile of candidates shares W_O[h]; alpha is
exp(score - lse), recomputed.

2 n d_v D FLOPs in matrix products (twice that with a gate on 16-bit operands) and about 6 n D elsewhere; per candidate
2 d_qk + d_v elements of q, k, v and D of y are read, and per tile of candidates d_v D of W_O, mostly from cache; 4 n
bytes are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Tile,
    attention_arguments,
    closeness,
    columns,
    gather_rows,
    load_projection,
    on_device,
    padded,
    product,
    rows,
    same_dtype,
    select,
    upcast,
    visible_scores,
    weights,
)

CHUNK_QK = 32


@triton.jit
def load_values(
    p_value,
    i_key,
    VALUE_ROW: tl.constexpr,
    p_gate,
    i_query,
    GATE_ROW: tl.constexpr,
    m_n,
    first,
    D_V: tl.constexpr,
    BLOCK: tl.constexpr,
    p_w_o,
    SPLIT: tl.constexpr,
):
    """Values times gates in W_O's dtype and, SPLIT, what rounding to it leaves."""
    v = gather_rows(p_value, i_key, VALUE_ROW, m_n, first, D_V, BLOCK)
    if p_gate is not None:
        v = v.to(tl.float32) * gather_rows(p_gate, i_query, GATE_ROW, m_n, first, D_V, BLOCK).to(tl.float32)
    high = v.to(p_w_o.dtype.element_ty)
    low = high
    if SPLIT:
        low = (v.to(tl.float32) - high.to(tl.float32)).to(p_w_o.dtype.element_ty)
    return high, low


@triton.jit
def pairs_kernel(
    p_query,
    p_key,
    p_value,
    p_w_o,
    p_whole,
    p_lse,
    p_mask,
    p_row_scale,
    p_gate,
    p_index,
    p_order,
    p_head_start,
    p_out,
    n,
    n_query,
    n_key,
    n_head,
    n_channel,
    group,
    query_head,
    key_head,
    value_head,
    w_head,
    w_row,
    w_column,
    whole_row,
    gate_head,
    mask_head,
    mask_row,
    scaling,
    softcap,
    window,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    GATE_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_QK: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # which head's tile this is: each has as many as its sub-edges fill; the grid is as large as any grouping of n could
    # need
    o_head = tl.arange(0, HEADS)
    starts = tl.load(p_head_start + o_head, mask=o_head <= n_head, other=0)
    ends = tl.load(p_head_start + o_head + 1, mask=o_head < n_head, other=0)
    tiles = tl.where(o_head < n_head, (ends - starts + BLOCK_N - 1) // BLOCK_N, 0)
    last = tl.cumsum(tiles, 0)
    i_tile = tl.program_id(0)
    i_head = tl.sum(((last <= i_tile) & (o_head < n_head)).to(tl.int32), 0).to(tl.int64)
    if i_head >= n_head:
        return
    mine = o_head == i_head
    first_n = tl.sum(tl.where(mine, starts + (i_tile - last + tiles) * BLOCK_N, 0), 0)
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_n = o_n < tl.sum(tl.where(mine, ends, 0), 0)
    o_out = o_n
    if p_order is not None:
        o_out = tl.load(p_order + o_n, mask=m_n, other=0)
    i_query = tl.load(p_index + o_out, mask=m_n, other=0)
    i_key = tl.load(p_index + n + o_out, mask=m_n, other=0)
    i_kv = i_head // group
    p_query += i_head * query_head
    p_key += i_kv * key_head
    scores = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, D_QK, CHUNK_QK):
        q = gather_rows(p_query, i_query, QUERY_ROW, m_n, first, D_QK, CHUNK_QK).to(tl.float32)
        scores += tl.sum(q * gather_rows(p_key, i_key, KEY_ROW, m_n, first, D_QK, CHUNK_QK).to(tl.float32), 1)
    scores = visible_scores(
        scores * scaling,
        i_query,
        i_key,
        m_n,
        i_head,
        p_mask,
        mask_head,
        mask_row,
        n_key - n_query,
        window,
        softcap,
        WINDOW,
        SOFTCAP,
    )
    alpha = weights(scores, tl.load(p_lse + i_head * n_query + i_query, mask=m_n, other=0.0))
    if p_row_scale is not None:
        alpha *= tl.load(p_row_scale + i_query, mask=m_n, other=0.0)
    p_value += i_kv * value_head
    p_w_o += i_head * w_head
    if p_gate is not None:
        p_gate += i_head * gate_head
    if CHUNK == 0:
        v, v_low = load_values(p_value, i_key, VALUE_ROW, p_gate, i_query, GATE_ROW, m_n, 0, D_V, B_V, p_w_o, SPLIT)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n_channel, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        p_y = p_whole + i_query.to(tl.int64)[:, None] * whole_row + o_d[None, :]
        y = tl.load(p_y, mask=m_n[:, None] & (o_d < n_channel)[None, :], other=0.0).to(tl.float32)
        if CHUNK == 0:
            w_o = load_projection(p_w_o, w_row, w_column, 0, D_V, B_V, first, n_channel, BLOCK_D)
            u = product(v, w_o, UPCAST)
            if SPLIT:
                u += product(v_low, w_o, UPCAST)
        else:
            u = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for first_v in range(0, D_V, CHUNK):
                v, v_low = load_values(
                    p_value, i_key, VALUE_ROW, p_gate, i_query, GATE_ROW, m_n, first_v, D_V, CHUNK, p_w_o, SPLIT
                )
                w_o = load_projection(p_w_o, w_row, w_column, first_v, D_V, CHUNK, first, n_channel, BLOCK_D)
                u += product(v, w_o, UPCAST)
                if SPLIT:
                    u += product(v_low, w_o, UPCAST)
        total += tl.sum(closeness(alpha[:, None] * u, y), 1)
    tl.store(p_out + o_out, tl.maximum(total, 0.0), mask=m_n)


def configurations(d_v: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates by channels: the first and the last are used, see ``common.suited``."""
    if dtype == torch.float32:
        return [Tile(32, 32, 4, 1, 32)]
    if padded(d_v) <= 128:
        return [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)]
    return [Tile(64, 64, 8, 2), Tile(64, 32, 8, 2, 64)]


def pair_proximity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    lse: Tensor,
    index: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    ordered: bool = False,
    head_start: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Proximity ``[n]`` (fp32) of the sub-edges ``index [3, n]`` (query, key, head; int32). Fastest when sorted by
    query.

    Args:
        query: ``[H, Tq, d_qk]``; key: ``[Hkv, Tk, d_qk]``; value: ``[Hkv, Tk, d_v]``; w_o: ``[H, d_v, D]``; whole:
            ``[Tq, D]``.
        lse: ``[H, Tq]`` from ``attention_rows`` (it holds the sinks); mask, window, softcap: as there.
        ordered: heads ascend in the list; head_start ``[H + 1]`` (int64): where each begins, if that is known.
        row_scale: ``[Tq]``; gate: ``[Tq, H, d_v]``.
    """
    query, key = (rows(t) for t in same_dtype(query, key))
    if w_o.dtype not in (torch.float16, torch.bfloat16) or value.dtype not in (w_o.dtype, torch.float32):
        value, w_o = same_dtype(value, w_o)
    split = w_o.dtype != torch.float32 and (gate is not None or value.dtype == torch.float32)
    value, w_o, whole = rows(value), columns(w_o), rows(whole)
    gate = None if gate is None else rows(gate)
    n_head, n = query.shape[0], index.shape[1]
    out = torch.empty(n, dtype=torch.float32, device=query.device)
    if not n:
        return out
    tile = tile or select(configurations(value.shape[2], w_o.dtype), query)
    index = index.to(torch.int32).contiguous()
    head, order = index[2], None
    if not ordered:
        head, order = head.sort(stable=True)
    if head_start is None:
        head_start = torch.searchsorted(head, torch.arange(n_head + 1, dtype=torch.int32, device=query.device))
    with on_device(query):
        pairs_kernel[(triton.cdiv(n, tile.rows) + min(n_head, n),)](
            **attention_arguments(query, key, scaling, mask, window, softcap, row_scale),
            p_value=value,
            p_w_o=w_o,
            p_whole=whole,
            p_lse=lse.float().contiguous(),
            p_gate=gate,
            p_index=index,
            p_order=order,
            p_head_start=head_start,
            p_out=out,
            n=n,
            n_head=n_head,
            n_channel=whole.shape[1],
            value_head=value.stride(0),
            VALUE_ROW=value.stride(1),
            w_head=w_o.stride(0),
            w_row=w_o.stride(1),
            w_column=w_o.stride(2),
            whole_row=whole.stride(0),
            GATE_ROW=0 if gate is None else gate.stride(0),
            gate_head=0 if gate is None else gate.stride(1),
            D_V=value.shape[2],
            B_V=padded(value.shape[2]),
            BLOCK_N=tile.rows,
            BLOCK_D=tile.columns,
            CHUNK=tile.chunk,
            CHUNK_QK=CHUNK_QK,
            HEADS=triton.next_power_of_2(n_head + 1),
            SPLIT=split,
            UPCAST=upcast(w_o.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
