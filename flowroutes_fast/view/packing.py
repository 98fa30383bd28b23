"""A trace as the instrument's page stores it: a little JSON, and one compressed block of arrays."""

from __future__ import annotations

import base64
import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from flowroutes_fast.system.escape import printable
from flowroutes_fast.view.text import show_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowroutes_fast.results.lazy import LazyTrace
    from flowroutes_fast.results.trace import Trace
    from flowroutes_fast.view.details import Details

MAX_SUB_EDGES = 800_000  # per trace: about 4 MB of the page
MAX_HEAD_ROWS = 150_000  # (layer, query, head): above it the page leaves out intervals of whole heads
ROLES = ("same token", "previous token", "two before", "three before", "first token")
ROLE_SHARE = 0.5  # of a head's importance over the positions after the first
# of a row
SCALARS = ("attention_residual", "attention_bias", "ffn", "ffn_residual", "normaliser_low", "normaliser_high")
REST = 65535  # stands for head -1 in the page

_Edges = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pack(trace: Trace, details: Details | None = None, max_sub_edges: int = MAX_SUB_EDGES) -> dict[str, Any]:
    """What ``route.js`` reads: names and sizes in clear, arrays as base64 of zlib.

    Sub-edges are stored by row (layer, query), then by pair (row, key), then by head, in the order in which Python adds
    them up. Pairs that are too weak to matter above ``floor`` are left out, where ``floor`` is raised until at most
    ``max_sub_edges`` remain.
    """
    layers, tokens, heads = trace.heads.shape
    edges = _all_edges(trace)
    floor = trace.floor if len(edges[3]) <= max_sub_edges else _raised_floor(edges, trace.floor, max_sub_edges)
    arrays = _rows(_above(edges, floor) if floor > trace.floor else edges, layers * tokens)
    arrays |= {name: getattr(trace, name).numpy().astype(np.float32) for name in SCALARS}
    arrays["heads_of"] = trace.heads.numpy().astype(np.float32)
    if any(trace.mixers):
        arrays["mixer"] = trace.mixer.numpy().astype(np.float32)
    bounded = trace.heads.numel() <= MAX_HEAD_ROWS
    if bounded:
        arrays |= {name: getattr(trace, name).numpy().astype(np.float32) for name in ("heads_low", "heads_high")}
    role, share = _roles(edges, layers, tokens, heads)
    arrays |= {"role": role, "role_share": share}
    about = {} if details is None else details.pack(arrays)
    blocks, data = _joined(arrays)
    return _facts(trace) | {
        "floor": floor,
        "sub_edges": len(edges[3]),
        "stored": int(arrays["value"].size),
        "bounded": bounded,
        "details": about,
        "blocks": blocks,
        "data": data,
    }


def _facts(trace: Trace) -> dict[str, Any]:
    """What is said in clear of every trace."""
    return {
        "tokens": [show_token(token) for token in trace.tokens],
        "breaks": [min(token.count("\n"), 2) for token in trace.tokens],
        "model": trace.model,
        "layers": trace.n_layers,
        "heads": trace.n_heads,
        "shapes": trace.shapes,
        "mixers": [bool(m) for m in trace.mixers] or [False] * trace.n_layers,
        "measure": trace.measure,
        "precision": trace.precision,
        "floor": trace.floor,
        "traced_floor": trace.floor,
        "thresholds": list(trace.thresholds),
        "prediction": [[show_token(text), round(p, 5)] for text, p in trace.prediction],
        "roles": ["", *ROLES],
        "chat": [[printable(role), first, stop] for role, first, stop in trace.chat],
    }


def pack_lazy(trace: LazyTrace, number: int) -> dict[str, Any]:
    """A lazy trace with the rows evaluated so far; nothing is evaluated for it. ``number``: by which the server
    knows it.
    """
    return (
        _facts(trace) | {"lazy": True, "bounded": True, "details": {}} | pack_rows(trace, number, [0] * trace.n_layers)
    )


def pack_rows(trace: LazyTrace, number: int, have: Sequence[int]) -> dict[str, Any]:
    """The rows that a page has not seen: of every layer those evaluated after its first ``have``. ``rows``: layer ·
    tokens + query, rising.
    """
    tokens = len(trace.tokens)
    names = [*SCALARS, *(["mixer"] if any(trace.mixers) else [])]
    rows: list[np.ndarray] = []
    edges: list[_Edges] = []
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.float32)] for name in names}
    heads: dict[str, list[np.ndarray]] = {
        name: [np.zeros((0, trace.n_heads), np.float32)] for name in ("heads", "heads_low", "heads_high")
    }
    for layer, since in enumerate(have):
        queries = trace.evaluated(layer, since)
        rows.append(queries + layer * tokens)
        if len(queries):
            query, key, head, value = trace.sub_edges(layer, queries)
            order = np.argsort(query * tokens + key, kind="stable")
            edges.append((query[order] + layer * tokens, key[order], head[order], value[order]))
            for name, found in parts.items():
                found.append(trace.values(name, layer, queries))
            for name, found in heads.items():
                own = trace.values(name, layer, queries)
                found.append(np.pad(own, ((0, 0), (0, trace.n_heads - own.shape[1]))))
    row, key, head, value = (
        (np.concatenate(column) for column in zip(*edges, strict=True)) if edges else [np.zeros(0, np.int64)] * 4
    )
    every = np.concatenate(rows)
    arrays = _rows((np.searchsorted(every, row), key, head, value.astype(np.float32)), len(every)) | {
        "rows": every.astype(np.uint32)
    }
    arrays |= {name: np.concatenate(found).astype(np.float32) for name, found in {**parts, **heads}.items()}
    arrays["heads_of"] = arrays.pop("heads")
    blocks, data = _joined(arrays, level=1)
    return {"number": number, "have": trace.counts(), "blocks": blocks, "data": data}


def _all_edges(trace: Trace) -> _Edges:
    """Row (layer · tokens + query), key, head and importance of all stored sub-edges, pairs together, heads in
    stored order.
    """
    everyone = np.arange(len(trace.tokens))
    found = []
    for layer in range(trace.n_layers):
        query, key, head, value = trace.sub_edges(layer, everyone)
        order = np.argsort(query * len(everyone) + key, kind="stable")
        found.append((query[order] + layer * len(everyone), key[order], head[order], value[order]))
    row, key, head, value = (np.concatenate(column) for column in zip(*found, strict=True))
    return row, key, head, value.astype(np.float32, copy=False)


def _pair_starts(row: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Index of the first sub-edge of each (row, key) pair."""
    return (
        np.flatnonzero(np.r_[True, (row[1:] != row[:-1]) | (key[1:] != key[:-1])])
        if len(row)
        else np.zeros(0, np.int64)
    )


def _weights(edges: _Edges) -> tuple[np.ndarray, np.ndarray]:
    """What no route at a threshold from here on can use of a pair, and how many sub-edges each pair has."""
    starts = _pair_starts(edges[0], edges[1])
    counts = np.diff(np.r_[starts, len(edges[3])])
    return np.add.reduceat(np.abs(edges[3].astype(np.float64)), starts), counts


def _raised_floor(edges: _Edges, floor: float, most: int) -> float:
    weight, counts = _weights(edges)
    order = np.argsort(-weight, kind="stable")
    allowed = int(np.searchsorted(np.cumsum(counts[order]), most, side="right"))
    exact = max(float(weight[order][min(allowed, len(order) - 1)]), floor, 1e-12)
    digits = 10 ** (math.floor(math.log10(exact)) - 1)
    return round(math.ceil(exact / digits) * digits, 12)  # two digits, upwards


def _above(edges: _Edges, floor: float) -> _Edges:
    weight, counts = _weights(edges)
    keep = np.repeat(weight > floor, counts)
    return edges[0][keep], edges[1][keep], edges[2][keep], edges[3][keep]


def _rows(edges: _Edges, rows: int) -> dict[str, np.ndarray]:
    row, key, head, value = edges
    starts = _pair_starts(row, key)
    counts = np.diff(np.r_[starts, len(value)])
    return {
        "row_pairs": np.bincount(row[starts], minlength=rows).astype(np.uint32),
        "pair_key": key[starts].astype(_unsigned(key)),
        "pair_heads": counts.astype(np.uint16),
        "head": np.where(head < 0, REST, head).astype(np.uint16),
        "value": value,
    }


def _unsigned(values: np.ndarray) -> type:
    return np.uint32 if len(values) and values.max() > 65535 else np.uint16


def _roles(edges: _Edges, layers: int, tokens: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """``[layer, head]``: where more than half of a head's stored importance lies on this prompt (0: nowhere), and
    the largest share.
    """
    row, key, head, value = edges
    query, layer = row % tokens, row // tokens
    known = (head >= 0) & (query > 0)
    cell, weight = (layer * heads + head)[known], np.abs(value[known].astype(np.float64))
    age, key = (query - key)[known], key[known]
    total = np.bincount(cell, weight, layers * heads)
    shares = np.stack(
        [np.bincount(cell[at], weight[at], layers * heads) for at in (age == 0, age == 1, age == 2, age == 3, key == 0)]
    )
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    best = shares.argmax(0)
    share = shares.max(0)
    return np.where(share > ROLE_SHARE, best + 1, 0).astype(np.uint8), share.astype(np.float32)


def _joined(arrays: dict[str, np.ndarray], level: int = 6) -> tuple[dict[str, list[Any]], str]:
    """All arrays as one block, with where each lies in it: ``name: [type, first byte, length]``."""
    blocks: dict[str, list[Any]] = {}
    pieces, at = [], 0
    for name, array in sorted(arrays.items()):
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        blocks[name] = [array.dtype.name, at, array.size]
        padding = -little.nbytes % 8
        pieces += [little.tobytes(), b"\0" * padding]
        at += little.nbytes + padding
    return blocks, base64.b64encode(zlib.compress(b"".join(pieces), level)).decode()
