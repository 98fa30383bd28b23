"""Proximity of all sub-edges, as a tensor or summed over keys.

    out[h,i,j] = max(sum_d min(w_d, 2|y_d| - w_d), 0),  w = sign(y_i) z,  z = r_i alpha[h,i,j] u[h,j],  u[h,j] = v[h,j]
    W_O[h]

(Ferrando & Voita 2403.00824, equation 4, summed termwise in fp32). query [H, Tq, d_qk], key [Hkv, Tk, d_qk], value
[Hkv, Tk, d_v], w_o [H, d_v, D], whole [Tq, D], lse [H, Tq] -> [H, Tq, Tk] or [Tq, H], in the unit of |y|_1.

About 6 H Tq Tk D FLOPs on visible tiles outside the matrix units, which bound the time: use the lists of ``bound`` and
``pairs`` instead where only large importances matter. u is recomputed for every block of queries, 2 ceil(Tq / rows) H
Tk d_v D FLOPs in matrix products, and is never stored; a block of queries reads W_O[h] and its rows of y once per block
of keys, from cache. 4 H Tq Tk bytes are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INTERPRETED,
    Tile,
    attention_arguments,
    closeness,
    columns,
    gather_rows,
    key_blocks,
    load_projection,
    load_tile,
    on_device,
    padded,
    product,
    row_products,
    rows,
    same_dtype,
    select,
    upcast,
    visible_scores,
    weights,
)
from .pairs import pair_proximity

BLOCK_D = 16
PAIRS_AT_ONCE = 2**22


@triton.jit
def dense_kernel(
    p_query,
    p_key,
    p_value,
    p_w_o,
    p_whole,
    p_lse,
    p_mask,
    p_row_scale,
    p_out,
    p_part,
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
    mask_head,
    mask_row,
    scaling,
    softcap,
    window,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_QK: tl.constexpr,
    UPCAST_QK: tl.constexpr,
    UPCAST_V: tl.constexpr,
):
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    i_kv = i_head // group
    offset = n_key - n_query
    o_query = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < n_query
    p_query += i_head * query_head
    p_key += i_kv * key_head
    p_value += i_kv * value_head
    p_w_o += i_head * w_head
    lse = tl.load(p_lse + i_head * n_query + o_query, mask=m_query, other=0.0)
    row_scale = tl.full([BLOCK_Q], 1.0, tl.float32)
    if p_row_scale is not None:
        row_scale = tl.load(p_row_scale + o_query, mask=m_query, other=0.0)
    i_last = tl.minimum(i_block * BLOCK_Q + BLOCK_Q, n_query) - 1
    start, end = key_blocks(i_block * BLOCK_Q, i_last, offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    head_sum = tl.zeros([BLOCK_Q], tl.float32)
    for b_key in range(tl.program_id(2), tl.cdiv(n_key, BLOCK_K), tl.num_programs(2)):
        o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
        m_key = o_key < n_key
        m_tile = m_query[:, None] & m_key[None, :]
        first_q = i_block * BLOCK_Q
        first_k = b_key * BLOCK_K
        if CHUNK_QK > 0:
            scores = row_products(
                p_query,
                first_q,
                QUERY_ROW,
                n_query,
                BLOCK_Q,
                p_key,
                first_k,
                KEY_ROW,
                n_key,
                BLOCK_K,
                D_QK,
                CHUNK_QK,
                UPCAST_QK,
            )
        else:
            q = load_tile(p_query, first_q, QUERY_ROW, n_query, BLOCK_Q, D_QK, B_QK)
            scores = product(q, tl.trans(load_tile(p_key, first_k, KEY_ROW, n_key, BLOCK_K, D_QK, B_QK)), UPCAST_QK)
        if CHUNK == 0:
            v = load_tile(p_value, first_k, VALUE_ROW, n_key, BLOCK_K, D_V, B_V)
        scores = visible_scores(
            scores * scaling,
            o_query[:, None],
            o_key[None, :],
            m_tile,
            i_head,
            p_mask,
            mask_head,
            mask_row,
            offset,
            window,
            softcap,
            WINDOW,
            SOFTCAP,
        )
        alpha = weights(scores, lse[:, None]) * row_scale[:, None]
        # Terms are added channel by channel of a block; the sum over the block comes last, once.
        terms = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_D], tl.float32)
        visible = (b_key >= start) & (b_key < end)
        for first in range(0, tl.where(visible, n_channel, 0), BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < n_channel
            p_y = p_whole + o_query.to(tl.int64)[:, None] * whole_row + o_d[None, :]
            y = tl.load(p_y, mask=m_query[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            if CHUNK > 0:
                u = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
                for first_v in range(0, D_V, CHUNK):
                    v_chunk = gather_rows(p_value, o_key, VALUE_ROW, m_key, first_v, D_V, CHUNK)
                    u += product(
                        v_chunk,
                        load_projection(p_w_o, w_row, w_column, first_v, D_V, CHUNK, first, n_channel, BLOCK_D),
                        UPCAST_V,
                    )
            else:
                u = product(
                    v, load_projection(p_w_o, w_row, w_column, 0, D_V, B_V, first, n_channel, BLOCK_D), UPCAST_V
                )
            terms += closeness(alpha[:, :, None] * u[None, :, :], y[:, None, :])
        out = tl.maximum(tl.sum(terms, 2), 0.0)
        head_sum += tl.sum(out, 1)
        if p_out is not None:
            p_row = p_out + (i_head * n_query + o_query.to(tl.int64)[:, None]) * n_key + o_key[None, :]
            tl.store(p_row, out, mask=m_tile)
    if p_part is not None:
        at = (tl.program_id(2).to(tl.int64) * n_query + o_query) * n_head + i_head
        tl.store(p_part + at, head_sum, mask=m_query)


def configurations(dtype: torch.dtype) -> list[Tile]:
    """Queries by keys."""
    return [Tile(16, 32, 4, 1, 32)] if dtype == torch.float32 else [Tile(16, 32, 8, 2)]


def _launch(query, key, value, w_o, whole, lse, scaling, mask, window, softcap, row_scale, tile, dense):  # type: ignore[no-untyped-def]
    query, key = (rows(t) for t in same_dtype(query, key))
    value, w_o = same_dtype(value, w_o)
    value, w_o, whole = rows(value), columns(w_o), rows(whole)
    n_head, n_query, n_key, device = query.shape[0], query.shape[1], key.shape[1], query.device
    tile = tile or select(configurations(value.dtype), query)
    n_block = triton.cdiv(n_query, tile.rows)
    n_part = triton.cdiv(n_key, tile.columns)
    if not dense and not INTERPRETED:  # enough programs for a large GPU, few partial sums
        n_part = min(n_part, triton.cdiv(4096, max(n_block * n_head, 1)))
    out = torch.empty(
        (n_head, n_query, n_key) if dense else (n_part, n_query, n_head), dtype=torch.float32, device=device
    )
    if not n_query:
        return out if dense else out.sum(0)
    with on_device(query):
        dense_kernel[(n_block, n_head, n_part)](
            **attention_arguments(query, key, scaling, mask, window, softcap, row_scale),
            p_value=value,
            p_w_o=w_o,
            p_whole=whole,
            p_lse=lse.float().contiguous(),
            p_out=out if dense else None,
            p_part=None if dense else out,
            n_head=n_head,
            n_channel=whole.shape[1],
            value_head=value.stride(0),
            VALUE_ROW=value.stride(1),
            w_head=w_o.stride(0),
            w_row=w_o.stride(1),
            w_column=w_o.stride(2),
            whole_row=whole.stride(0),
            D_V=value.shape[2],
            B_V=padded(value.shape[2]),
            BLOCK_Q=tile.rows,
            BLOCK_K=tile.columns,
            BLOCK_D=BLOCK_D,
            CHUNK=tile.chunk,
            CHUNK_QK=32 if query.dtype == torch.float32 else 0,
            UPCAST_QK=upcast(query.dtype),
            UPCAST_V=upcast(value.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out if dense else out.sum(0)


def dense_proximity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    lse: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Proximity of every sub-edge ``[H, Tq, Tk]`` (fp32); arguments as in ``pairs.pair_proximity``, which does the
    work with a gate.
    """
    common = {
        "scaling": scaling,
        "mask": mask,
        "window": window,
        "softcap": softcap,
        "row_scale": row_scale,
        "tile": tile,
    }
    if gate is None:
        return _launch(query, key, value, w_o, whole, lse, **common, dense=True)
    n_head, n_query, n_key = query.shape[0], query.shape[1], key.shape[1]
    out = torch.empty(n_head, n_query, n_key, dtype=torch.float32, device=query.device)
    step = max(1, PAIRS_AT_ONCE // (n_head * n_key))
    for first in range(0, n_query, step):
        last = min(first + step, n_query)
        i, j, h = (
            torch.arange(a, b, dtype=torch.int32, device=query.device)
            for a, b in ((first, last), (0, n_key), (0, n_head))
        )
        index = torch.stack([t.flatten() for t in torch.meshgrid(i, j, h, indexing="ij")])
        listed = pair_proximity(query, key, value, w_o, whole, lse, index, gate=gate, **common)
        out[:, first:last] = listed.view(last - first, n_key, n_head).permute(2, 0, 1)
    return out


def dense_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w_o: Tensor,
    whole: Tensor,
    lse: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    row_scale: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Sums over keys of all proximities ``[Tq, H]`` (fp32), without the dense tensor."""
    return _launch(query, key, value, w_o, whole, lse, scaling, mask, window, softcap, row_scale, tile, dense=False)
