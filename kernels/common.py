"""What the kernels share: tile shapes, masked scores, row loads, matrix products, and the launch wrappers' handling
of tensors.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# compute capability: these read operands of matrix products from shared memory, of which they have 227 KiB
ASYNCHRONOUS = (9, 10)


class Tile(NamedTuple):
    """Extents of one program: rows (queries, or listed sub-edges) by columns (keys, or channels of the model).

    ``chunk``: how much of a head's width is multiplied at a time, where the whole (0) does not fit registers or shared
    memory.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    chunk: int = 0


INTERPRETER_TILE = Tile(32, 32, 1, 1)


@triton.jit
def load_tile(p_base, first, STRIDE: tl.constexpr, n, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``first`` and after of a matrix of n rows with inner stride 1 ``[BLOCK, PADDED]``, zero past its end and
    past WIDTH.

    The stride is a constant and only the first row's offset is 64 bits wide: otherwise the offsets of all elements
    occupy registers.
    """
    o_row = tl.arange(0, BLOCK)
    o_d = tl.arange(0, PADDED)
    p_tile = p_base + tl.cast(first, tl.int64) * STRIDE + (o_row[:, None] * STRIDE + o_d[None, :])
    m_row = (o_row < n - first)[:, None]
    if WIDTH == PADDED:
        return tl.load(p_tile, mask=m_row, other=0.0)
    return tl.load(p_tile, mask=m_row & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def product(left, right, UPCAST: tl.constexpr):
    """left @ right in fp32. UPCAST: the interpreter's product of bfloat16 operands is wrong, so it multiplies them
    as fp32.
    """
    if UPCAST:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def row_products(
    p_left,
    left_first,
    LEFT_ROW: tl.constexpr,
    n_left,
    BLOCK_L: tl.constexpr,
    p_right,
    right_first,
    RIGHT_ROW: tl.constexpr,
    n_right,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """<left row, right row> ``[BLOCK_L, BLOCK_R]``, CHUNK columns at a time."""
    total = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    p_left += tl.cast(left_first, tl.int64) * LEFT_ROW
    p_right += tl.cast(right_first, tl.int64) * RIGHT_ROW
    o_left = tl.arange(0, BLOCK_L)
    o_right = tl.arange(0, BLOCK_R)
    for first in range(0, WIDTH, CHUNK):
        o_d = first + tl.arange(0, CHUNK)
        m_d = (o_d < WIDTH)[None, :]
        left = tl.load(
            p_left + (o_left[:, None] * LEFT_ROW + o_d[None, :]),
            mask=(o_left < n_left - left_first)[:, None] & m_d,
            other=0.0,
        )
        right = tl.load(
            p_right + (o_right[:, None] * RIGHT_ROW + o_d[None, :]),
            mask=(o_right < n_right - right_first)[:, None] & m_d,
            other=0.0,
        )
        total += product(left, tl.trans(right), UPCAST)
    return total


@triton.jit
def gather_rows(p_base, o_row, STRIDE: tl.constexpr, m_row, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns, from ``first``, of rows ``o_row`` of a matrix with inner stride 1; zero where masked and past
    WIDTH.
    """
    o_d = first + tl.arange(0, BLOCK)
    p_row = p_base + o_row.to(tl.int64)[:, None] * STRIDE + o_d[None, :]
    return tl.load(p_row, mask=m_row[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def load_projection(
    p_head, row, column, first_v, D_V: tl.constexpr, BLOCK_V: tl.constexpr, first_d, n_channel, BLOCK_D: tl.constexpr
):
    """A tile of W_O[h] ``[head dimensions, channels]``; either may be the inner one."""
    o_v = first_v + tl.arange(0, BLOCK_V)
    o_d = first_d + tl.arange(0, BLOCK_D)
    p_tile = p_head + o_v.to(tl.int64)[:, None] * row + o_d.to(tl.int64)[None, :] * column
    return tl.load(p_tile, mask=(o_v < D_V)[:, None] & (o_d < n_channel)[None, :], other=0.0)


@triton.jit
def tanh(x):
    """A series where 1 - exp(-2|x|) would cancel."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def visible_scores(
    scores,
    i_query,
    i_key,
    m_inside,
    i_head,
    p_mask,
    mask_head,
    mask_row,
    offset,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Scores with soft cap and mask, -inf where hidden. ``i_query`` and ``i_key`` are already broadcastable to the
    scores.
    """
    if SOFTCAP:
        scores = softcap * tanh(scores / softcap)
    if p_mask is not None:
        p_bias = p_mask + i_head.to(tl.int64) * mask_head + i_query.to(tl.int64) * mask_row + i_key
        bias = tl.load(p_bias, mask=m_inside, other=float("-inf")).to(tl.float32)
        scores += bias
        m_visible = m_inside & (bias > -1e30)
    else:
        age = i_query + offset - i_key
        m_visible = m_inside & (age >= 0)
        if WINDOW:
            m_visible = m_visible & (age < window)
    return tl.where(m_visible, scores, float("-inf"))


@triton.jit
def weights(scores, lse):
    """alpha = exp(score - lse); zero for hidden keys, also in a row that sees none (where both are -inf)."""
    return tl.where(scores == float("-inf"), 0.0, tl.exp(scores - tl.where(lse == float("-inf"), 0.0, lse)))


@triton.jit
def key_blocks(i_first, i_last, offset, window, n_key, p_mask, BLOCK_K: tl.constexpr, WINDOW: tl.constexpr):
    """Half-open range of key blocks that queries ``i_first`` to ``i_last`` can see."""
    end = n_key
    start = 0
    if p_mask is None:
        end = tl.maximum(tl.minimum(n_key, i_last + offset + 1), 0)
        if WINDOW:
            start = tl.maximum(i_first + offset + 1 - window, 0) // BLOCK_K
    return start, tl.cdiv(end, BLOCK_K)


@triton.jit
def closeness(z, y):
    """One term of the proximity, min(w, 2|y| - w) with w = sign(y) z; the sign bit is the sign of zero."""
    w = tl.where(y.to(tl.int32, bitcast=True) < 0, -z, z)
    return tl.minimum(w, 2 * tl.abs(y) - w)


INTERPRETED = not isinstance(product, triton.runtime.JITFunction)


def padded(width: int) -> int:
    """Extent of a block over a head's width: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(width))


def suited(configurations: list[Tile], major: int) -> Tile:
    """The first configuration on GPUs whose matrix units leave registers free, otherwise the last one, which fits
    99 KiB.
    """
    return configurations[0 if major in ASYNCHRONOUS else -1]


def select(configurations: list[Tile], tensor: Tensor) -> Tile:
    """Configuration for a tensor's device; a tiny one in the interpreter."""
    if INTERPRETED:
        return INTERPRETER_TILE._replace(chunk=configurations[0].chunk)
    return suited(configurations, torch.cuda.get_device_capability(tensor.device)[0])


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def columns(tensor: Tensor) -> Tensor:
    """Output projection ``[head, d_v, D]`` with channels or head dimensions adjacent, whichever it has already."""
    return tensor if 1 in tensor.stride()[-2:] and not tensor.is_neg() else tensor.resolve_neg().contiguous()


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """Operands of one matrix product: their dtype if they share one, fp32 otherwise."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return list(tensors)
    return [t.float() for t in tensors]


def upcast(dtype: torch.dtype) -> bool:
    return INTERPRETED and dtype == torch.bfloat16


def attention_arguments(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None,
    window: int,
    softcap: float,
    row_scale: Tensor | None,
) -> dict:
    """Launch arguments that every kernel recomputing attention weights takes."""
    mask = None if mask is None else rows(mask)
    return {
        "p_query": query,
        "p_key": key,
        "p_mask": mask,
        "p_row_scale": None if row_scale is None else row_scale.float().contiguous(),
        "n_query": query.shape[1],
        "n_key": key.shape[1],
        "group": query.shape[0] // key.shape[0],
        "query_head": query.stride(0),
        "QUERY_ROW": query.stride(1),
        "key_head": key.stride(0),
        "KEY_ROW": key.stride(1),
        "mask_head": mask.stride(0) if mask is not None and mask.dim() == 3 else 0,
        "mask_row": 0 if mask is None else mask.stride(-2),
        "scaling": scaling,
        "softcap": softcap,
        "window": window,
        "WINDOW": window > 0 and mask is None,
        "SOFTCAP": softcap > 0,
        "D_QK": query.shape[2],
        "B_QK": padded(query.shape[2]),
    }
