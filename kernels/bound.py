"""Sign bounds of all sub-edges, and the list of those above a cut, without storing any [head, query, key] tensor.

With w = sign(y) z, proximity(z, y) = max(sum_d min(w_d, 2|y_d| - w_d), 0) <= max(sum_d w_d, 0) (Ferrando & Voita
2403.00824, equation 4). For a sub-edge z = r_i alpha[h,i,j] v[h,j] W_O[h] the last sum is a dot product over the head's
width:

    b[h,i,j] = r_i alpha[h,i,j] max(<v[h,j], g[i,h]> + e[h,i,j], 0),    g[i,h] = W_O[h] sign(y_i) * gate[i,h],

where e is what rounding v and g to 16 bits lost (``gradient``). query [H, Tq, d_qk], key [Hkv, Tk, d_qk], r [Tq] >= 0;
query i stands at key i + Tk - Tq; b has the unit of |y|_1. alpha is exp(score - lse), lse from ``attention``.

``bounds``: one pass over the rows asked for. Heads that share keys and values are packed into a tile's rows. What is at
or below its row's cut is summed, what is above leaves one bit; the bits become a list, in (head, query, key) order,
whatever the schedule was. ``pair_rests``: sums over heads; pairs above a cut of their own, with the sum of their heads
at or below the row's cut.

R rows, Tk keys: 2 H R Tk (d_qk + d_v) FLOPs per pass, causal and window tiles skipped; k and v are read once per tile
of rows, Hkv Tk (d_qk + d_v) elements from memory and the rest from cache; H R Tk / 8 bytes of bits are written and read
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import configurations
from .common import (
    Tile,
    attention_arguments,
    gather_rows,
    key_blocks,
    load_tile,
    on_device,
    padded,
    product,
    rows,
    same_dtype,
    select,
    upcast,
    visible_scores,
)
from .gradient import Halves

LOG2E = tl.constexpr(math.log2(math.e))
# of a sum of bounds: weights are computed once more where sub-edges are evaluated, |score| 2^-20 apart
MARGIN = 2.0**-12
BITS = 256 * 2**20  # bytes of bits at a time
WORDS = 32  # of one row, looked at together
LEVELS = 5  # cuts whose sums ``sums_below`` makes, each RATIO times the one before
RATIO = 0.4


@triton.jit
def tile_bounds(
    q,
    g,
    p_q,
    p_k,
    p_v,
    first_k,
    i_query,
    o_key,
    m_row,
    i_head,
    unit,
    error,
    length,
    p_scale,
    p_error,
    p_length,
    p_mask,
    n_key,
    mask_head,
    mask_row,
    offset,
    scaling,
    softcap,
    window,
    WHOLE: tl.constexpr,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Bounds of rows (``i_query``, ``i_head``) by one block of keys. WHOLE: all of them are visible, and inside.

    unit: log2 of what the exponential is divided by, lse and 1 / (r 2^e) of the row; p_scale and so on: of this block
    of values.
    """
    if CHUNK == 0:
        scores = product(q, tl.trans(load_tile(p_k, first_k, KEY_ROW, n_key, BLOCK_K, D_QK, B_QK)), UPCAST)
    else:
        scores = tl.zeros([q.shape[0], BLOCK_K], tl.float32)
        for first in range(0, D_QK, CHUNK):
            left = gather_rows(p_q, i_query, QUERY_ROW, m_row, first, D_QK, CHUNK)
            right = gather_rows(p_k, o_key, KEY_ROW, o_key < n_key, first, D_QK, CHUNK)
            scores += product(left, tl.trans(right), UPCAST)
    flow = tl.dot(g, tl.trans(load_tile(p_v, first_k, D_V, n_key, BLOCK_K, D_V, B_V)))
    v_error, v_length = tl.load(p_error), tl.load(p_length)
    flow += (error * (v_length + v_error) + length * v_error)[:, None]
    unit -= tl.log2(tl.load(p_scale))
    if WHOLE and not SOFTCAP:
        power = scores * (scaling * LOG2E)
    else:
        m_inside = m_row[:, None] & (o_key < n_key)[None, :]
        power = LOG2E * visible_scores(
            scores * scaling,
            i_query[:, None],
            o_key[None, :],
            m_inside,
            i_head[:, None],
            p_mask,
            mask_head,
            mask_row,
            offset,
            window,
            softcap,
            WINDOW,
            SOFTCAP,
        )
    return tl.exp2(power - unit[:, None]) * tl.maximum(flow, 0.0)


@triton.jit
def row_unit(p_lse, p_scale, p_row_scale, i_query, i_head, m_row, n_query, n_head):
    """log2 of exp(lse) / (r 2^e); infinite, so that bounds are zero, in rows that see nothing."""
    lse = tl.load(p_lse + i_head.to(tl.int64) * n_query + i_query, mask=m_row, other=float("-inf"))
    scale = tl.load(p_scale + i_query.to(tl.int64) * n_head + i_head, mask=m_row, other=1.0)
    if p_row_scale is not None:
        scale *= tl.load(p_row_scale + i_query, mask=m_row, other=0.0)
    return tl.where((lse == float("-inf")) | (scale == 0), float("inf"), lse * LOG2E - tl.log2(scale))


@triton.jit
def packed_rows(
    p_query,
    p_row,
    p_g,
    p_g_scale,
    p_g_error,
    p_g_length,
    p_lse,
    p_row_scale,
    i_tile,
    i_kv,
    n_row,
    n_query,
    n_head,
    group,
    query_head,
    QUERY_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of the rows of a key-value head, (row, head of the group) flattened: where they are, and what a pass
    needs of each.
    """
    flat = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    place = flat // group
    m_row = place < n_row
    i_head = i_kv * group + flat % group
    i_query = tl.load(p_row + place, mask=m_row, other=0) if p_row is not None else tl.where(m_row, place, 0)
    o_d, o_v = tl.arange(0, B_QK), tl.arange(0, B_V)
    wide = i_query.to(tl.int64)
    at = wide * n_head + i_head
    p_q = p_query + i_head.to(tl.int64)[:, None] * query_head
    if CHUNK == 0:
        q = tl.load(
            p_q + wide[:, None] * QUERY_ROW + o_d[None, :], mask=m_row[:, None] & (o_d < D_QK)[None, :], other=0.0
        )
    else:  # read piece by piece
        q = tl.zeros([BLOCK_M, 1], tl.float32)
    g = tl.load(p_g + at[:, None] * D_V + o_v[None, :], mask=m_row[:, None] & (o_v < D_V)[None, :], other=0.0)
    error = tl.load(p_g_error + at, mask=m_row, other=0.0)
    length = tl.load(p_g_length + at, mask=m_row, other=0.0)
    unit = row_unit(p_lse, p_g_scale, p_row_scale, i_query, i_head, m_row, n_query, n_head)
    return flat, place, m_row, i_head, i_query, at, p_q, q, g, error, length, unit


@triton.jit
def bounds_kernel(
    p_query,
    p_key,
    p_row,
    p_g,
    p_g_scale,
    p_g_error,
    p_g_length,
    p_value,
    p_v_scale,
    p_v_error,
    p_v_length,
    p_lse,
    p_row_scale,
    p_cut,
    p_mask,
    p_rest,
    p_count,
    p_bits,
    n_row,
    n_query,
    n_key,
    n_head,
    n_block,
    group,
    query_head,
    key_head,
    mask_head,
    mask_row,
    scaling,
    softcap,
    window,
    grown,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_kv = tl.program_id(1)
    flat, place, m_row, i_head, i_query, at, p_q, q, g, error, length, unit = packed_rows(
        p_query,
        p_row,
        p_g,
        p_g_scale,
        p_g_error,
        p_g_length,
        p_lse,
        p_row_scale,
        i_tile,
        i_kv,
        n_row,
        n_query,
        n_head,
        group,
        query_head,
        QUERY_ROW,
        D_QK,
        B_QK,
        D_V,
        B_V,
        BLOCK_M,
        CHUNK,
    )
    cut = tl.load(p_cut + i_query, mask=m_row, other=float("inf"))
    rest = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    offset = n_key - n_query
    i_first = tl.min(tl.where(m_row, i_query, n_query - 1), 0)
    i_last = tl.max(tl.where(m_row, i_query, 0), 0)
    start, end = key_blocks(i_first, i_last, offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    whole = start
    if (p_mask is None) and (not WINDOW) and (not SOFTCAP):  # blocks that every row sees
        whole = tl.maximum((i_first + offset + 1) // BLOCK_K, 0)
    p_k = p_key + i_kv.to(tl.int64) * key_head
    p_v = p_value + i_kv.to(tl.int64) * n_key * D_V
    WORD: tl.constexpr = BLOCK_K // 32
    p_word = (
        p_bits + (i_kv.to(tl.int64) * n_row * group + flat)[:, None] * (n_block * WORD) + tl.arange(0, WORD)[None, :]
    )
    shift = tl.arange(0, 32)[None, None, :]
    i_block = i_kv * n_block
    for edge in tl.static_range(0, 2):  # blocks that every row sees whole, then the others
        for b_key in range(start if edge == 0 else whole, whole if edge == 0 else end):
            o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
            b = tile_bounds(
                q,
                g,
                p_q,
                p_k,
                p_v,
                b_key * BLOCK_K,
                i_query,
                o_key,
                m_row,
                i_head,
                unit,
                error,
                length,
                p_v_scale + i_block + b_key,
                p_v_error + i_block + b_key,
                p_v_length + i_block + b_key,
                p_mask,
                n_key,
                mask_head,
                mask_row,
                offset,
                scaling,
                softcap,
                window,
                edge == 0,
                QUERY_ROW,
                KEY_ROW,
                D_QK,
                B_QK,
                D_V,
                B_V,
                BLOCK_K,
                WINDOW,
                SOFTCAP,
                CHUNK,
                UPCAST,
            )
            above = b > cut[:, None]
            rest += tl.sum(tl.where(above, 0.0, b), 1)
            listed = above.to(tl.int32)
            count += tl.sum(listed, 1)
            tl.store(
                p_word + b_key * WORD, tl.sum(tl.reshape(listed, [BLOCK_M, WORD, 32]) << shift, 2), mask=m_row[:, None]
            )
    tl.store(p_rest + at, rest * grown, mask=m_row)
    tl.store(p_count + i_head.to(tl.int64) * n_row + place, count, mask=m_row)


@triton.jit
def levels_kernel(
    p_query,
    p_key,
    p_g,
    p_g_scale,
    p_g_error,
    p_g_length,
    p_value,
    p_v_scale,
    p_v_error,
    p_v_length,
    p_lse,
    p_row_scale,
    p_cut,
    p_mask,
    p_out,
    n_query,
    n_key,
    n_head,
    n_block,
    group,
    query_head,
    key_head,
    mask_head,
    mask_row,
    scaling,
    softcap,
    window,
    grown,
    ratio,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_kv = tl.program_id(1)
    _, _, m_row, i_head, i_query, at, p_q, q, g, error, length, unit = packed_rows(
        p_query,
        None,
        p_g,
        p_g_scale,
        p_g_error,
        p_g_length,
        p_lse,
        p_row_scale,
        i_tile,
        i_kv,
        n_query,
        n_query,
        n_head,
        group,
        query_head,
        QUERY_ROW,
        D_QK,
        B_QK,
        D_V,
        B_V,
        BLOCK_M,
        CHUNK,
    )
    cut = tl.load(p_cut + i_query, mask=m_row, other=0.0)
    sum_0, sum_1, sum_2, sum_3, sum_4, total = (
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    cut_1 = cut * ratio
    cut_2 = cut_1 * ratio
    cut_3 = cut_2 * ratio
    cut_4 = cut_3 * ratio
    offset = n_key - n_query
    i_first = i_tile * BLOCK_M // group
    i_last = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // group, n_query - 1)
    start, end = key_blocks(i_first, i_last, offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    whole = start
    if (p_mask is None) and (not WINDOW) and (not SOFTCAP):
        whole = tl.maximum((i_first + offset + 1) // BLOCK_K, 0)
    p_k = p_key + i_kv.to(tl.int64) * key_head
    p_v = p_value + i_kv.to(tl.int64) * n_key * D_V
    i_block = i_kv * n_block
    for edge in tl.static_range(0, 2):  # blocks that every row sees whole, then the others
        for b_key in range(start if edge == 0 else whole, whole if edge == 0 else end):
            o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
            b = tile_bounds(
                q,
                g,
                p_q,
                p_k,
                p_v,
                b_key * BLOCK_K,
                i_query,
                o_key,
                m_row,
                i_head,
                unit,
                error,
                length,
                p_v_scale + i_block + b_key,
                p_v_error + i_block + b_key,
                p_v_length + i_block + b_key,
                p_mask,
                n_key,
                mask_head,
                mask_row,
                offset,
                scaling,
                softcap,
                window,
                edge == 0,
                QUERY_ROW,
                KEY_ROW,
                D_QK,
                B_QK,
                D_V,
                B_V,
                BLOCK_K,
                WINDOW,
                SOFTCAP,
                CHUNK,
                UPCAST,
            )
            total += tl.sum(b, 1)
            b = tl.where(b > cut[:, None], 0.0, b)  # each cut is below the one before
            sum_0 += tl.sum(b, 1)
            b = tl.where(b > cut_1[:, None], 0.0, b)
            sum_1 += tl.sum(b, 1)
            b = tl.where(b > cut_2[:, None], 0.0, b)
            sum_2 += tl.sum(b, 1)
            b = tl.where(b > cut_3[:, None], 0.0, b)
            sum_3 += tl.sum(b, 1)
            sum_4 += tl.sum(tl.where(b > cut_4[:, None], 0.0, b), 1)
    step = tl.cast(n_query, tl.int64) * n_head
    tl.store(p_out + at, sum_0 * grown, mask=m_row)
    tl.store(p_out + step + at, sum_1 * grown, mask=m_row)
    tl.store(p_out + 2 * step + at, sum_2 * grown, mask=m_row)
    tl.store(p_out + 3 * step + at, sum_3 * grown, mask=m_row)
    tl.store(p_out + 4 * step + at, sum_4 * grown, mask=m_row)
    tl.store(p_out + 5 * step + at, total * grown, mask=m_row)


@triton.jit
def list_kernel(
    p_bits,
    p_row,
    p_start,
    p_out,
    n,
    n_row,
    n_query,
    n_key,
    n_word,
    group,
    window,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per (row, head): its bits as triples (query, key, head), from ``p_start`` on, keys ascending."""
    place, i_head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(p_start + i_head.to(tl.int64) * n_row + place)
    if tl.load(p_start + i_head.to(tl.int64) * n_row + place + 1) > begin:
        i_query = place
        if p_row is not None:
            i_query = tl.load(p_row + place)
        first, end = 0, n_word
        if CAUSAL:  # other words were not written
            seen = i_query + n_key - n_query
            end = tl.minimum((seen // BLOCK_K + 1) * (BLOCK_K // 32), n_word)
            if WINDOW:
                first = tl.maximum(seen + 1 - window, 0) // BLOCK_K * (BLOCK_K // 32)
        p_bits += ((i_head // group).to(tl.int64) * n_row * group + place * group + i_head % group) * n_word
        for base in range(first, end, LANES):
            o_word = base + tl.arange(0, LANES)
            word = tl.load(p_bits + o_word, mask=o_word < end, other=0)
            if tl.max((word != 0).to(tl.int32), 0) > 0:
                flat = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, [LANES * 32])
                at = begin + tl.cumsum(flat, 0) - 1
                p_at = p_out + at
                m = flat > 0
                tl.store(p_at, tl.zeros_like(flat) + i_query, mask=m)
                tl.store(p_at + n, base * 32 + tl.arange(0, LANES * 32), mask=m)
                tl.store(p_at + 2 * n, tl.zeros_like(flat) + i_head, mask=m)
                begin += tl.sum(flat, 0)


@triton.jit
def pair_rests_kernel(
    p_query,
    p_key,
    p_row,
    p_g,
    p_g_scale,
    p_g_error,
    p_g_length,
    p_value,
    p_v_scale,
    p_v_error,
    p_v_length,
    p_lse,
    p_row_scale,
    p_cut,
    p_pair_cut,
    p_mask,
    p_out_pair,
    p_out_rest,
    p_used,
    n_row,
    n_query,
    n_key,
    n_head,
    n_block,
    group,
    query_head,
    key_head,
    mask_head,
    mask_row,
    scaling,
    softcap,
    window,
    capacity,
    grown,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    b_key = tl.program_id(1)
    offset = n_key - n_query
    i_query = first + tl.arange(0, BLOCK_M)
    m_row = i_query < n_row
    if p_row is not None:
        i_query = tl.load(p_row + i_query, mask=m_row, other=0)
    i_query = tl.where(m_row, i_query, 0)
    i_first = tl.min(tl.where(m_row, i_query, n_query - 1), 0)
    start, end = key_blocks(i_first, tl.max(i_query, 0), offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    wide = i_query.to(tl.int64)
    o_d, o_v = tl.arange(0, B_QK), tl.arange(0, B_V)
    o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
    # what the list may have missed by rounding counts as well
    cut = tl.load(p_cut + i_query, mask=m_row, other=0.0) * grown
    pair = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    left = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i_head in range(0, tl.where((b_key >= start) & (b_key < end), n_head, 0)):
        head = tl.full([BLOCK_M], 0, tl.int32) + i_head
        i_kv = i_head // group
        at = wide * n_head + i_head
        p_q = p_query + tl.cast(i_head, tl.int64) * query_head
        if CHUNK == 0:
            q = tl.load(
                p_q + wide[:, None] * QUERY_ROW + o_d[None, :], mask=m_row[:, None] & (o_d < D_QK)[None, :], other=0.0
            )
        else:
            q = tl.zeros([BLOCK_M, 1], tl.float32)
        g = tl.load(p_g + at[:, None] * D_V + o_v[None, :], mask=m_row[:, None] & (o_v < D_V)[None, :], other=0.0)
        error = tl.load(p_g_error + at, mask=m_row, other=0.0)
        length = tl.load(p_g_length + at, mask=m_row, other=0.0)
        unit = row_unit(p_lse, p_g_scale, p_row_scale, i_query, head, m_row, n_query, n_head)
        i_block = i_kv * n_block + b_key
        b = tile_bounds(
            q,
            g,
            p_q,
            p_key + tl.cast(i_kv, tl.int64) * key_head,
            p_value + tl.cast(i_kv, tl.int64) * n_key * D_V,
            b_key * BLOCK_K,
            i_query,
            o_key,
            m_row,
            head,
            unit,
            error,
            length,
            p_v_scale + i_block,
            p_v_error + i_block,
            p_v_length + i_block,
            p_mask,
            n_key,
            mask_head,
            mask_row,
            offset,
            scaling,
            softcap,
            window,
            False,
            QUERY_ROW,
            KEY_ROW,
            D_QK,
            B_QK,
            D_V,
            B_V,
            BLOCK_K,
            WINDOW,
            SOFTCAP,
            CHUNK,
            UPCAST,
        )
        pair += b
        left += tl.where(b > cut[:, None], 0.0, b)
    pair_cut = tl.load(p_pair_cut + i_query, mask=m_row, other=float("inf"))
    hot = (pair * grown > pair_cut[:, None]) & (left > 0)
    number = tl.sum(tl.sum(hot.to(tl.int32), 1), 0)
    if number > 0:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_K
        flat = tl.reshape(hot.to(tl.int32), [SIZE])
        at = tl.atomic_add(p_used, number) + tl.cumsum(flat, 0) - 1
        m = (flat > 0) & (at < capacity)
        name = tl.reshape(wide[:, None] * n_key + o_key[None, :], [SIZE])
        tl.store(p_out_pair + at, name, mask=m)
        tl.store(p_out_rest + at, tl.reshape(left * grown, [SIZE]), mask=m)


@triton.jit
def sums_kernel(p_value, p_start, p_out, n, BLOCK: tl.constexpr, LANES: tl.constexpr):
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = segment < n
    start = tl.load(p_start + segment, mask=m, other=0)
    end = tl.load(p_start + segment + 1, mask=m, other=0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tl.max(end - start, 0), LANES):
        o = start[:, None] + first + tl.arange(0, LANES)[None, :]
        total += tl.sum(tl.load(p_value + o, mask=o < end[:, None], other=0.0), 1)
    tl.store(p_out + segment, total, mask=m)


def _pass_arguments(query, key, value, g, lse, cut, scaling, mask, window, softcap, row_scale, tile):  # type: ignore[no-untyped-def]
    query, key = (rows(t) for t in same_dtype(query, key))
    d_v = value.half.shape[2]
    arguments = attention_arguments(query, key, scaling, mask, window, softcap, row_scale) | {
        "p_g": g.half,
        "p_g_scale": g.scale,
        "p_g_error": g.error,
        "p_g_length": g.length,
        "p_value": value.half,
        "p_v_scale": value.scale,
        "p_v_error": value.error,
        "p_v_length": value.length,
        "p_lse": lse,
        "p_cut": cut.float().contiguous(),
        "n_head": query.shape[0],
        "n_block": value.scale.shape[1],
        "D_V": d_v,
        "B_V": padded(d_v),
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.columns,
        "CHUNK": tile.chunk,
        "UPCAST": upcast(query.dtype),
        "grown": 1 + MARGIN,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return arguments


def tile_of(query: Tensor, d_v: int) -> Tile:
    """The tile of all passes over a layer; its columns are the blocks of ``gradient.values``."""
    return select(configurations(query.shape[2], d_v, query.dtype), query)


def sums_below(
    query: Tensor,
    key: Tensor,
    value: Halves,
    g: Halves,
    lse: Tensor,
    cut: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    row_scale: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Sums ``[LEVELS + 1, Tq, H]`` of the bounds at or below ``cut [Tq]`` times RATIO^k, k < LEVELS, and of all;
    with a margin for rounding.
    """
    tile = tile or tile_of(query, value.half.shape[2])
    n_head, n_query = query.shape[:2]
    out = torch.empty(LEVELS + 1, n_query, n_head, dtype=torch.float32, device=query.device)
    arguments = _pass_arguments(query, key, value, g, lse, cut, scaling, mask, window, softcap, row_scale, tile)
    if n_query:
        with on_device(query):
            levels_kernel[(triton.cdiv(n_query * arguments["group"], tile.rows), key.shape[0])](
                **arguments, p_out=out, ratio=RATIO
            )
    return out


class Piece(NamedTuple):
    """Listed sub-edges of some rows: ``row`` (None: all), index ``[3, n]`` (query, key, head; int32) in (head, row,
    key) order, and where each (head, row) begins ``[H R + 1]``."""

    row: Tensor | None
    index: Tensor
    start: Tensor


def bounds(
    query: Tensor,
    key: Tensor,
    value: Halves,
    g: Halves,
    lse: Tensor,
    cut: Tensor,
    rest: Tensor,
    row: Tensor | None = None,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    row_scale: Tensor | None = None,
    tile: Tile | None = None,
) -> Iterator[Piece]:
    """Sub-edges with b > ``cut [Tq]``, as many rows at a time as ``BITS`` bytes of bits allow; waits once for each, for
    the list's length.

    Args:
        rest: ``[Tq, H]`` fp32, is set to the sum of the other bounds, with a margin for rounding, in the rows asked
            for.
        row: ascending rows to look at (int32), None for all; the others are left as they are. The other arguments as in
            ``attention_rows``.
    """
    tile = tile or tile_of(query, value.half.shape[2])
    n_head, n_query, n_key, device = query.shape[0], query.shape[1], key.shape[1], query.device
    n_word = triton.cdiv(n_key, tile.columns) * (tile.columns // 32)
    step = max(1, BITS // (4 * n_head * n_word))
    arguments = _pass_arguments(query, key, value, g, lse, cut, scaling, mask, window, softcap, row_scale, tile)
    if row is None and n_query > step:
        row = torch.arange(n_query, dtype=torch.int32, device=device)
    for some in [None] if row is None else row.split(step):
        n_row = n_query if some is None else len(some)
        if not n_row:
            continue
        count = torch.empty(n_head * n_row, dtype=torch.int32, device=device)
        bits = torch.empty(n_head, n_row, n_word, dtype=torch.int32, device=device)
        start = torch.zeros(n_head * n_row + 1, dtype=torch.int64, device=device)
        with on_device(query):
            bounds_kernel[(triton.cdiv(n_row * arguments["group"], tile.rows), key.shape[0])](
                **arguments, p_row=some, p_rest=rest, p_count=count, p_bits=bits, n_row=n_row
            )
            torch.cumsum(count, 0, out=start[1:])
            n = int(start[-1])
            index = torch.empty(3, n, dtype=torch.int32, device=device)
            if n:
                list_kernel[(n_row, n_head)](
                    p_bits=bits,
                    p_row=some,
                    p_start=start,
                    p_out=index,
                    n=n,
                    n_row=n_row,
                    n_query=n_query,
                    n_key=n_key,
                    n_word=n_word,
                    group=arguments["group"],
                    window=window,
                    BLOCK_K=tile.columns,
                    WINDOW=arguments["WINDOW"],
                    CAUSAL=mask is None,
                    LANES=min(WORDS, triton.next_power_of_2(n_word)),
                    num_warps=1,
                )
        yield Piece(some, index, start)


def segment_sums(value: Tensor, start: Tensor) -> Tensor:
    """Sums of ``value [n]`` (fp32) between neighbours of ``start [m + 1]``, in an order that does not depend on
    scheduling ``[m]``.
    """
    n = len(start) - 1
    out = torch.empty(n, dtype=torch.float32, device=value.device)
    if n:
        with on_device(value):
            sums_kernel[(triton.cdiv(n, 64),)](
                p_value=value, p_start=start, p_out=out, n=n, BLOCK=64, LANES=16, num_warps=4
            )
    return out


def pair_rests(
    query: Tensor,
    key: Tensor,
    value: Halves,
    g: Halves,
    lse: Tensor,
    cut: Tensor,
    pair_cut: Tensor,
    row: Tensor | None = None,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    row_scale: Tensor | None = None,
    tile: Tile | None = None,
    capacity: int = 0,
) -> tuple[Tensor, Tensor]:
    """Pairs whose bounds summed over heads are above ``pair_cut [Tq]``: query · Tk + key (int64), and the sum of those
    at or below ``cut``.

    In no order; pairs without any of these are left out. ``row``: ascending rows to look at (int32), None for all.
    Waits once, for the number of pairs.
    """
    tile = tile or tile_of(query, value.half.shape[2])
    n_query, n_key, device = query.shape[1], key.shape[1], query.device
    arguments = _pass_arguments(query, key, value, g, lse, cut, scaling, mask, window, softcap, row_scale, tile)
    n_row = n_query if row is None else len(row)
    capacity = capacity or 64 * n_row
    while True:
        pair = torch.empty(capacity, dtype=torch.int64, device=device)
        rest = torch.empty(capacity, dtype=torch.float32, device=device)
        used = torch.zeros(1, dtype=torch.int32, device=device)
        if n_row and n_key:
            with on_device(query):
                pair_rests_kernel[(triton.cdiv(n_row, tile.rows), triton.cdiv(n_key, tile.columns))](
                    **arguments | {"num_warps": 8 if tile.chunk == 0 else tile.num_warps},
                    p_row=row,
                    n_row=n_row,
                    p_pair_cut=pair_cut.float().contiguous(),
                    p_out_pair=pair,
                    p_out_rest=rest,
                    p_used=used,
                    capacity=capacity,
                )
        n = int(used)
        if n <= capacity:
            return pair[:n], rest[:n]
        capacity = n
