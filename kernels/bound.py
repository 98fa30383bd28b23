"""Sign bounds of all sub-edges, and the list of those above a cut, without storing any [head, query, key] tensor.

With w = sign(y) z, proximity(z, y) = max(sum_d min(w_d, 2|y_d| - w_d), 0) <= max(sum_d w_d, 0) (Ferrando & Voita 2403.00824,
equation 4). For a sub-edge z = r_i alpha[h,i,j] v[h,j] W_O[h] the last sum is a dot product over the head's width:

    b[h,i,j] = r_i alpha[h,i,j] max(<v[h,j], g[i,h]> + slack |v[h,j]|_2 |g[i,h]|_2, 0),    g[i,h] = W_O[h] sign(y_i).

query [H, Tq, d_qk], key [Hkv, Tk, d_qk], value [Hkv, Tk, d_v], g [Tq, H, d_v], r [Tq] >= 0; query i stands at key i + Tk - Tq; b has the
unit of |y|_1. ``slack`` is the caller's duty (``required_slack``): fp32 operands are multiplied in fp32; 16-bit ones meet g, divided by
its largest entry, split into two 16-bit numbers, so two products leave 2^-17 of |v|_2 |g|_2 where one in bfloat16 would leave 2^-8.

``bound_rows``: 2 H Tq Tk (d_qk + d_v) FLOPs (2 d_v for 16-bit operands), causal and window tiles skipped; k and v are read once per block
of queries, Hkv Tk (d_qk + d_v) elements from memory and the rest from cache; 12 H Tq bytes written.
``bound_candidates``: the same products, once more in tiles with a pair above its cut; 12 bytes written per candidate.
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
    weights,
)


@triton.jit
def rows_kernel(
    p_query, p_key, p_value, p_g_high, p_g_low, p_top, p_length_g, p_mask, p_sinks, p_row_scale, p_length, p_lse, p_upper, p_signed,
    n_query, n_key, n_head, group, query_head, key_head, value_head, g_head, mask_head, mask_row,
    scaling, softcap, window, slack,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, G_ROW: tl.constexpr,
    D_QK: tl.constexpr, B_QK: tl.constexpr, D_V: tl.constexpr, B_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest rows first
    i_head = tl.program_id(1)
    i_kv = (i_head // group).to(tl.int64)
    offset = n_key - n_query
    o_query = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < n_query
    first = i_block * BLOCK_Q
    p_query += i_head.to(tl.int64) * query_head
    p_g_high += i_head.to(tl.int64) * g_head
    if SPLIT:
        p_g_low += i_head.to(tl.int64) * g_head
    p_key += i_kv * key_head
    p_value += i_kv * value_head
    if CHUNK == 0:
        q = load_tile(p_query, first, QUERY_ROW, n_query, BLOCK_Q, D_QK, B_QK)
        g_high = load_tile(p_g_high, first, G_ROW, n_query, BLOCK_Q, D_V, B_V)
        g_low = load_tile(p_g_low, first, G_ROW, n_query, BLOCK_Q, D_V, B_V)
    top = tl.load(p_top + o_query * n_head + i_head, mask=m_query, other=0.0)
    if p_length is not None:
        length_g = tl.load(p_length_g + o_query * n_head + i_head, mask=m_query, other=0.0) * slack
    high = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    upper = tl.zeros([BLOCK_Q], tl.float32)
    signed = tl.zeros([BLOCK_Q], tl.float32)
    i_last = tl.minimum(i_block * BLOCK_Q + BLOCK_Q, n_query) - 1
    start, end = key_blocks(i_block * BLOCK_Q, i_last, offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    for b_key in range(start, end):
        o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
        m_key = o_key < n_key
        if CHUNK == 0:
            k = load_tile(p_key, b_key * BLOCK_K, KEY_ROW, n_key, BLOCK_K, D_QK, B_QK)
            v = tl.trans(load_tile(p_value, b_key * BLOCK_K, VALUE_ROW, n_key, BLOCK_K, D_V, B_V))
            scores = product(q, tl.trans(k), UPCAST)
            flow = product(g_high, v, UPCAST) + product(g_low, v, UPCAST)
        else:
            scores = row_products(
                p_query, first, QUERY_ROW, n_query, BLOCK_Q, p_key, b_key * BLOCK_K, KEY_ROW, n_key, BLOCK_K, D_QK, CHUNK, UPCAST
            )
            flow = row_products(
                p_g_high, first, G_ROW, n_query, BLOCK_Q, p_value, b_key * BLOCK_K, VALUE_ROW, n_key, BLOCK_K, D_V, CHUNK, UPCAST
            )
            if SPLIT:
                flow += row_products(
                    p_g_low, first, G_ROW, n_query, BLOCK_Q, p_value, b_key * BLOCK_K, VALUE_ROW, n_key, BLOCK_K, D_V, CHUNK, UPCAST
                )
        scores = visible_scores(
            scores * scaling, o_query[:, None], o_key[None, :], m_query[:, None] & m_key[None, :],
            i_head, p_mask, mask_head, mask_row, offset, window, softcap, WINDOW, SOFTCAP,
        )  # fmt: skip
        positive = flow
        if p_length is not None:
            length = tl.load(p_length + i_kv * n_key + o_key, mask=m_key, other=0.0)
            positive += length_g[:, None] * length[None, :]
        new_high = tl.maximum(high, tl.max(scores, 1))
        from_high = tl.where(new_high == float("-inf"), 0.0, new_high)
        e = tl.exp(scores - from_high[:, None])
        decay = tl.exp(high - from_high)
        total = total * decay + tl.sum(e, 1)
        upper = upper * decay + tl.sum(e * tl.maximum(positive, 0.0), 1)
        signed = signed * decay + tl.sum(e * flow, 1)
        high = new_high
    if p_sinks is not None:
        sink = tl.load(p_sinks + i_head)
        new_high = tl.maximum(high, sink)
        decay = tl.exp(high - new_high)
        total = total * decay + tl.exp(sink - new_high)
        upper *= decay
        signed *= decay
        high = new_high
    seen = total > 0
    factor = tl.where(seen, top / tl.where(seen, total, 1.0), 0.0)
    if p_row_scale is not None:
        factor *= tl.load(p_row_scale + o_query, mask=m_query, other=0.0)
    tl.store(p_lse + i_head.to(tl.int64) * n_query + o_query, tl.where(seen, high + tl.log(total), float("-inf")), mask=m_query)
    tl.store(p_upper + o_query.to(tl.int64) * n_head + i_head, upper * factor, mask=m_query)
    tl.store(p_signed + o_query.to(tl.int64) * n_head + i_head, signed * factor, mask=m_query)


@triton.jit
def candidates_kernel(
    p_query, p_key, p_value, p_g_high, p_g_low, p_top, p_length_g, p_mask, p_row_scale, p_length, p_lse, p_cut, p_pair_cut, p_out_edge, p_out_bound, p_counts,
    n_query, n_key, n_head, group, query_head, key_head, value_head, g_head, mask_head, mask_row,
    scaling, softcap, window, slack, capacity,
    QUERY_ROW: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, G_ROW: tl.constexpr,
    D_QK: tl.constexpr, B_QK: tl.constexpr, D_V: tl.constexpr, B_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    b_key = tl.program_id(1)
    offset = n_key - n_query
    i_last = tl.minimum(i_block * BLOCK_Q + BLOCK_Q, n_query) - 1
    start, end = key_blocks(i_block * BLOCK_Q, i_last, offset, window, n_key, p_mask, BLOCK_K, WINDOW)
    o_query = i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < n_query
    o_key = b_key * BLOCK_K + tl.arange(0, BLOCK_K)
    m_key = o_key < n_key
    cut = tl.load(p_cut + o_query, mask=m_query, other=float("inf"))
    pair_cut = tl.load(p_pair_cut + o_query, mask=m_query, other=float("inf"))
    row_scale = tl.full([BLOCK_Q], 1.0, tl.float32)
    if p_row_scale is not None:
        row_scale = tl.load(p_row_scale + o_query, mask=m_query, other=0.0)
    first = i_block * BLOCK_Q
    first_place = tl.cast(first, tl.int64) * capacity
    p_out_edge += first_place
    p_out_bound += first_place
    pair = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    heads = tl.where((b_key >= start) & (b_key < end), n_head, 0)
    # Phase 0 sums pairs and lists what is above the cut; phase 1, where a pair is above its own, lists that pair's other heads.
    for phase in range(0, 2):
        for i_head in range(0, heads):
            i_kv = tl.cast(i_head // group, tl.int64)
            i_wide = tl.cast(i_head, tl.int64)
            p_q = p_query + i_wide * query_head
            p_g = p_g_high + i_wide * g_head
            p_k = p_key + i_kv * key_head
            p_v = p_value + i_kv * value_head
            if CHUNK == 0:
                q = load_tile(p_q, first, QUERY_ROW, n_query, BLOCK_Q, D_QK, B_QK)
                k = load_tile(p_k, b_key * BLOCK_K, KEY_ROW, n_key, BLOCK_K, D_QK, B_QK)
                v = tl.trans(load_tile(p_v, b_key * BLOCK_K, VALUE_ROW, n_key, BLOCK_K, D_V, B_V))
                g_high = load_tile(p_g, first, G_ROW, n_query, BLOCK_Q, D_V, B_V)
                g_low = load_tile(p_g_low + i_wide * g_head, first, G_ROW, n_query, BLOCK_Q, D_V, B_V)
                scores = product(q, tl.trans(k), UPCAST)
                flow = product(g_high, v, UPCAST) + product(g_low, v, UPCAST)
            else:
                scores = row_products(
                    p_q, first, QUERY_ROW, n_query, BLOCK_Q, p_k, b_key * BLOCK_K, KEY_ROW, n_key, BLOCK_K, D_QK, CHUNK, UPCAST
                )
                flow = row_products(
                    p_g, first, G_ROW, n_query, BLOCK_Q, p_v, b_key * BLOCK_K, VALUE_ROW, n_key, BLOCK_K, D_V, CHUNK, UPCAST
                )
                if SPLIT:
                    flow += row_products(
                        p_g_low + i_wide * g_head,
                        first,
                        G_ROW,
                        n_query,
                        BLOCK_Q,
                        p_v,
                        b_key * BLOCK_K,
                        VALUE_ROW,
                        n_key,
                        BLOCK_K,
                        D_V,
                        CHUNK,
                        UPCAST,
                    )
            top = tl.load(p_top + o_query * n_head + i_head, mask=m_query, other=0.0)
            scores = visible_scores(
                scores * scaling, o_query[:, None], o_key[None, :], m_query[:, None] & m_key[None, :],
                i_wide, p_mask, mask_head, mask_row, offset, window, softcap, WINDOW, SOFTCAP,
            )  # fmt: skip
            if p_length is not None:
                length = tl.load(p_length + i_kv * n_key + o_key, mask=m_key, other=0.0)
                length_g = tl.load(p_length_g + o_query * n_head + i_head, mask=m_query, other=0.0) * slack
                flow += length_g[:, None] * length[None, :]
            lse = tl.load(p_lse + i_wide * n_query + o_query, mask=m_query, other=0.0)
            bound = weights(scores, lse[:, None]) * tl.maximum(flow, 0.0) * (row_scale * top)[:, None]
            above = bound > cut[:, None]
            m_listed = tl.where(phase == 0, above, (pair > pair_cut[:, None]) & (bound > 0) & (bound <= cut[:, None]))
            pair += tl.where(phase == 0, bound, 0.0)
            listed = m_listed.to(tl.int32)
            found = tl.sum(listed, 1)
            if tl.max(found, 0) > 0:
                base = tl.atomic_add(p_counts + o_query, found, mask=m_query & (found > 0))
                rank = tl.cumsum(listed, 1) - 1
                m_kept = m_listed & (rank < (capacity - base)[:, None])
                at = (tl.arange(0, BLOCK_Q) * capacity + base)[:, None] + rank
                tl.store(p_out_edge + at, tl.broadcast_to((i_head * n_key + o_key)[None, :], [BLOCK_Q, BLOCK_K]), mask=m_kept)
                tl.store(p_out_bound + at, bound, mask=m_kept)
        hot = tl.max(tl.max((pair > pair_cut[:, None]).to(tl.int32), 1), 0)
        heads = tl.where(hot > 0, heads, 0)


def configurations(d_qk: int, d_v: int, dtype: torch.dtype) -> list[Tile]:
    """Queries by keys for ``bound_rows``: the first and the last are used, see ``common.suited``."""
    width = max(padded(d_qk), padded(d_v))
    if dtype == torch.float32:
        return [Tile(32, 32, 4, 1, 32)]
    if width <= 64:
        return [Tile(128, 64, 8, 2)]
    if width <= 128:
        return [Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)]
    return [Tile(64, 32, 4, 2), Tile(64, 32, 8, 2, 64)]


def candidates_configurations(d_qk: int, d_v: int, dtype: torch.dtype) -> list[Tile]:
    """The same for ``bound_candidates``, which reads q and g of every head anyway and holds the sum over heads in registers."""
    if dtype == torch.float32:
        return [Tile(32, 32, 8 if max(padded(d_qk), padded(d_v)) <= 64 else 4, 1, 32)]  # the number of warps that does not spill
    chunk = 0 if max(padded(d_qk), padded(d_v)) <= 64 else 64
    return [Tile(64, 64, 8, 2, chunk), Tile(64, 32, 8, 2, chunk)]


def required_slack(dtype: torch.dtype, d_v: int) -> float:
    """Relative to |v|_2 |g|_2: what is left of g after the split, and d_v additions that may truncate."""
    return d_v * 2.0**-23 + (0 if dtype == torch.float32 else 2.0**-17)


def split_g(g: Tensor, dtype: torch.dtype, lengths: bool) -> dict:
    """g divided by the largest entry of each row, as one fp32 or two 16-bit numbers; those entries; lengths of the divided rows."""
    g = g.float()
    top = g.abs().amax(-1)
    top = torch.where(top > 0, top, 1.0)
    g = g / top[..., None]
    high = g.to(dtype).contiguous()
    return {
        "p_g_high": high, "p_g_low": None if dtype == torch.float32 else (g - high.float()).to(dtype).contiguous(),
        "p_top": top.contiguous(), "p_length_g": torch.linalg.vector_norm(g, dim=-1) if lengths else None,
        "G_ROW": high.stride(0), "g_head": high.stride(1),
    }  # fmt: skip


def _arguments(query, key, value, g, scaling, mask, window, softcap, row_scale, slack, tile, configurations):  # type: ignore[no-untyped-def]
    query, key, value = (rows(t) for t in same_dtype(query, key, value))
    tile = tile or select(configurations(query.shape[2], value.shape[2], query.dtype), query)
    arguments = attention_arguments(query, key, scaling, mask, window, softcap, row_scale) | {
        "p_value": value, "n_head": query.shape[0], "slack": slack,
        "p_length": torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32).contiguous() if slack else None,
        "value_head": value.stride(0), "VALUE_ROW": value.stride(1),
        "D_V": value.shape[2], "B_V": padded(value.shape[2]), "BLOCK_Q": tile.rows, "BLOCK_K": tile.columns,
        "CHUNK": tile.chunk, "SPLIT": query.dtype != torch.float32, "UPCAST": upcast(query.dtype),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    } | split_g(g, query.dtype, slack > 0)  # fmt: skip
    return arguments, tile


def bound_rows(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, *, scaling: float, mask: Tensor | None = None, window: int = 0,
    softcap: float = 0.0, sinks: Tensor | None = None, row_scale: Tensor | None = None, slack: float = 0.0, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums over keys of all sign bounds.

    Args:
        query: ``[H, Tq, d_qk]``; key: ``[Hkv, Tk, d_qk]``; value: ``[Hkv, Tk, d_v]``; g: ``[Tq, H, d_v]``, fp32 for a trustworthy bound.
        mask: additive ``[Tq, Tk]`` or ``[H, Tq, Tk]``, hidden at or below -1e30; None for causal, limited to ``window`` keys if positive.
        sinks: one more logit ``[H]``; row_scale: ``[Tq]``, not negative; slack: relative to |v|_2 |g|_2.

    Returns:
        log-sum-exp of the scores and the sink ``[H, Tq]`` (-inf in rows that see nothing), sum of bounds ``[Tq, H]``, and sum of
        r alpha <v, g> ``[Tq, H]`` with neither clamp nor slack. All fp32.
    """
    arguments, tile = _arguments(query, key, value, g, scaling, mask, window, softcap, row_scale, slack, tile, configurations)
    n_head, n_query = query.shape[:2]
    lse = torch.empty(n_head, n_query, dtype=torch.float32, device=query.device)
    upper, signed = (torch.empty(n_query, n_head, dtype=torch.float32, device=query.device) for _ in range(2))
    if n_query:
        with on_device(query):
            rows_kernel[(triton.cdiv(n_query, tile.rows), n_head)](
                **arguments, p_sinks=None if sinks is None else sinks.float().contiguous(), p_lse=lse, p_upper=upper, p_signed=signed
            )
    return lse, upper, signed


def bound_candidates(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, lse: Tensor, cut: Tensor, pair_cut: Tensor, *, scaling: float, capacity: int,
    mask: Tensor | None = None, window: int = 0, softcap: float = 0.0, row_scale: Tensor | None = None, slack: float = 0.0,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sub-edges with b > ``cut[i]``, or b > 0 in a (query, key) pair whose sum over heads is above ``pair_cut[i]``; both ``[Tq]``, >= 0.

    The other arguments are those of ``bound_rows``, whose ``lse`` holds the sinks. Order within a row varies: see ``compact``.

    Returns:
        key and head (int32) and bound (fp32), each ``[Tq, capacity]`` with -1, -1 and 0 in free places, and counts ``[Tq]`` (int32), which
        go on counting where a row has more candidates than ``capacity``.
    """
    arguments, tile = _arguments(query, key, value, g, scaling, mask, window, softcap, row_scale, slack, tile, candidates_configurations)
    n_query, n_key, device = query.shape[1], key.shape[1], query.device
    edge = torch.full((n_query, capacity), -1, dtype=torch.int32, device=device)
    bound = torch.zeros(n_query, capacity, dtype=torch.float32, device=device)
    counts = torch.zeros(n_query, dtype=torch.int32, device=device)
    if n_query:
        with on_device(query):
            candidates_kernel[(triton.cdiv(n_query, tile.rows), triton.cdiv(n_key, tile.columns))](
                **arguments, p_lse=lse.float().contiguous(), p_cut=cut.float().contiguous(), p_pair_cut=pair_cut.float().contiguous(),
                p_out_edge=edge, p_out_bound=bound, p_counts=counts, capacity=capacity,
            )  # fmt: skip
    m_free = edge < 0
    return (edge % n_key).masked_fill_(m_free, -1), (edge // n_key).masked_fill_(m_free, -1), bound, counts


def compact(key: Tensor, head: Tensor, bound: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Buffers of ``bound_candidates`` -> index ``[3, n]`` (query, key, head; int32) in that order, and bound ``[n]``."""
    capacity = key.shape[1]
    m_kept = torch.arange(capacity, dtype=torch.int64, device=key.device) < counts.clamp_max(capacity)[:, None]
    query = m_kept.nonzero()[:, 0]
    key, head, bound = key[m_kept], head[m_kept], bound[m_kept]
    if not len(query):
        return torch.stack([key, key, head]), bound
    order = (key.long() * (int(head.max()) + 1) + head).argsort()
    order = order[query[order].argsort(stable=True)]
    return torch.stack([query.to(torch.int32), key, head])[:, order].contiguous(), bound[order]
