"""Rows of attention: the log-sum-exp of their scores, from which every other kernel recomputes weights, and the signed
flow of a head where it is asked for. Nothing of the size [head, query, key] is stored.

query [H, Tq, d_qk], key [Hkv, Tk, d_qk]; query i stands at key i + Tk - Tq; alpha = exp(score - lse).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Tile,
    attention_arguments,
    key_blocks,
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
)


@triton.jit
def rows_kernel(
    p_query,
    p_key,
    p_value,
    p_g_high,
    p_g_low,
    p_top,
    p_mask,
    p_sinks,
    p_row_scale,
    p_lse,
    p_signed,
    n_query,
    n_key,
    n_head,
    group,
    query_head,
    key_head,
    value_head,
    g_head,
    mask_head,
    mask_row,
    scaling,
    softcap,
    window,
    QUERY_ROW: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    G_ROW: tl.constexpr,
    D_QK: tl.constexpr,
    B_QK: tl.constexpr,
    D_V: tl.constexpr,
    B_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
    FLOW: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    UPCAST_V: tl.constexpr,
):
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest rows first
    i_head = tl.program_id(1)
    i_kv = (i_head // group).to(tl.int64)
    offset = n_key - n_query
    o_query = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < n_query
    first = i_block * BLOCK_Q
    p_query += i_head.to(tl.int64) * query_head
    p_key += i_kv * key_head
    if FLOW:
        p_value += i_kv * value_head
        p_g_high += i_head.to(tl.int64) * g_head
        if SPLIT:
            p_g_low += i_head.to(tl.int64) * g_head
    if CHUNK == 0:
        q = load_tile(p_query, first, QUERY_ROW, n_query, BLOCK_Q, D_QK, B_QK)
    high = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    signed = tl.zeros([BLOCK_Q], tl.float32)
    i_last = tl.minimum(i_block * BLOCK_Q + BLOCK_Q, n_query) - 1
    start, end = key_blocks(i_block * BLOCK_Q, i_last, offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    for b_key in range(start, end):
        o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
        m_key = o_key < n_key
        first_k = b_key * BLOCK_K
        if CHUNK == 0:
            scores = product(q, tl.trans(load_tile(p_key, first_k, KEY_ROW, n_key, BLOCK_K, D_QK, B_QK)), UPCAST)
        else:
            scores = row_products(
                p_query,
                first,
                QUERY_ROW,
                n_query,
                BLOCK_Q,
                p_key,
                first_k,
                KEY_ROW,
                n_key,
                BLOCK_K,
                D_QK,
                CHUNK,
                UPCAST,
            )
        scores = visible_scores(
            scores * scaling,
            o_query[:, None],
            o_key[None, :],
            m_query[:, None] & m_key[None, :],
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
        new_high = tl.maximum(high, tl.max(scores, 1))
        from_high = tl.where(new_high == float("-inf"), 0.0, new_high)
        e = tl.exp(scores - from_high[:, None])
        decay = tl.exp(high - from_high)
        total = total * decay + tl.sum(e, 1)
        if FLOW:
            flow = row_products(
                p_g_high, first, G_ROW, n_query, BLOCK_Q, p_value, first_k, VALUE_ROW, n_key, BLOCK_K, D_V, 32, UPCAST_V
            )
            if SPLIT:
                flow += row_products(
                    p_g_low,
                    first,
                    G_ROW,
                    n_query,
                    BLOCK_Q,
                    p_value,
                    first_k,
                    VALUE_ROW,
                    n_key,
                    BLOCK_K,
                    D_V,
                    32,
                    UPCAST_V,
                )
            signed = signed * decay + tl.sum(e * flow, 1)
        high = new_high
    if p_sinks is not None:
        sink = tl.load(p_sinks + i_head)
        new_high = tl.maximum(high, sink)
        decay = tl.exp(high - new_high)
        total = total * decay + tl.exp(sink - new_high)
        signed *= decay
        high = new_high
    seen = total > 0
    tl.store(
        p_lse + i_head.to(tl.int64) * n_query + o_query,
        tl.where(seen, high + tl.log(total), float("-inf")),
        mask=m_query,
    )
    if FLOW:
        factor = tl.where(
            seen, tl.load(p_top + o_query * n_head + i_head, mask=m_query, other=0.0) / tl.where(seen, total, 1.0), 0.0
        )
        if p_row_scale is not None:
            factor *= tl.load(p_row_scale + o_query, mask=m_query, other=0.0)
        tl.store(p_signed + o_query.to(tl.int64) * n_head + i_head, signed * factor, mask=m_query)


def configurations(d_qk: int, d_v: int, dtype: torch.dtype) -> list[Tile]:
    """Rows by keys of all passes: the first and the last are used, see ``common.suited``."""
    width = max(padded(d_qk), padded(d_v))
    if dtype == torch.float32:
        return [Tile(16, 32, 4, 1, 32)]
    if width <= 128:
        return [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)]
    return [Tile(64, 32, 8, 2), Tile(64, 32, 8, 1, 64)]


def split_g(g: Tensor, dtype: torch.dtype) -> dict:
    """g divided by the largest entry of each row, as one fp32 or two 16-bit numbers, and those entries."""
    g = g.float()
    top = g.abs().amax(-1)
    top = torch.where(top > 0, top, 1.0)
    g = g / top[..., None]
    high = g.to(dtype).contiguous()
    return {
        "p_g_high": high,
        "p_g_low": None if dtype == torch.float32 else (g - high.float()).to(dtype).contiguous(),
        "p_top": top.contiguous(),
        "G_ROW": high.stride(0),
        "g_head": high.stride(1),
    }


def attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    g: Tensor | None = None,
    *,
    scaling: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    row_scale: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of the scores and the sink ``[H, Tq]`` (-inf in rows that see nothing), and r sum_j alpha <v, g>
    ``[Tq, H]``. All fp32.

    Args:
        query: ``[H, Tq, d_qk]``; key: ``[Hkv, Tk, d_qk]``; for the second result value ``[Hkv, Tk, d_v]`` and g ``[Tq,
            H, d_v]`` in fp32.
        mask: additive ``[Tq, Tk]`` or ``[H, Tq, Tk]``, hidden at or below -1e30; None for causal, limited to ``window``
            keys if positive.
        sinks: one more logit ``[H]``; row_scale: ``[Tq]``, not negative.
    """
    query, key = (rows(t) for t in same_dtype(query, key))
    flow = g is not None and value is not None
    d_v = value.shape[2] if value is not None else 16
    tile = tile or select(configurations(query.shape[2], query.shape[2], query.dtype), query)
    n_head, n_query = query.shape[:2]
    lse = torch.empty(n_head, n_query, dtype=torch.float32, device=query.device)
    signed = torch.empty(n_query, n_head, dtype=torch.float32, device=query.device) if flow else None
    arguments = attention_arguments(query, key, scaling, mask, window, softcap, row_scale) | {
        "p_value": None,
        "value_head": 0,
        "VALUE_ROW": 0,
        "p_g_high": None,
        "p_g_low": None,
        "p_top": None,
        "G_ROW": 0,
        "g_head": 0,
        "SPLIT": False,
        "UPCAST_V": False,
    }
    if flow:
        value = rows(value) if value.dtype in (torch.float32, torch.bfloat16, torch.float16) else rows(value.float())  # type: ignore[union-attr,arg-type]
        arguments |= {"p_value": value, "value_head": value.stride(0), "VALUE_ROW": value.stride(1)} | split_g(
            g, value.dtype
        )  # type: ignore[arg-type]
        arguments |= {"SPLIT": value.dtype != torch.float32, "UPCAST_V": upcast(value.dtype)}
    if n_query:
        with on_device(query):
            rows_kernel[(triton.cdiv(n_query, tile.rows), n_head)](
                **arguments,
                p_sinks=None if sinks is None else sinks.float().contiguous(),
                p_lse=lse,
                p_signed=signed,
                n_head=n_head,
                D_V=d_v,
                B_V=padded(d_v),
                BLOCK_Q=tile.rows,
                BLOCK_K=tile.columns,
                CHUNK=tile.chunk,
                FLOW=flow,
                UPCAST=upcast(query.dtype),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return lse, signed
