"""Edges of one layer as arrays: what enters a node, and the table they are collected in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from flowroutes_fast.results.trace import Trace

KINDS = ("attention", "mixer", "attention_residual", "ffn", "ffn_residual")
COLUMNS = {
    "layer": "int64",
    "kind": "object",
    "source": "int64",
    "target": "int64",
    "head": "int64",
    "importance": "float64",
}


class EdgeTable:
    """Collects the columns of the edge table."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(
        self,
        layer: int,
        kind: str,
        source: np.ndarray,
        target: np.ndarray,
        head: np.ndarray | int,
        importance: np.ndarray,
    ) -> None:
        n = len(source)
        if not n:
            return
        heads = head if isinstance(head, np.ndarray) else np.full(n, head)
        for name, values in zip(
            COLUMNS, (np.full(n, layer), np.full(n, kind, object), source, target, heads, importance), strict=True
        ):
            self.columns[name].append(values)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        if not self.columns["layer"]:
            return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})
        columns = {
            name: np.concatenate(parts).astype(COLUMNS[name], copy=False) for name, parts in self.columns.items()
        }
        return pd.DataFrame(
            {name: pd.Series(values, dtype=COLUMNS[name], copy=False) for name, values in columns.items()}, copy=False
        )


class EdgeRows(NamedTuple):
    """Edges of one kind: source and target positions, heads (-1: none), importances."""

    kind: str
    source: np.ndarray
    target: np.ndarray
    head: np.ndarray
    importance: np.ndarray


def same_token_parts(trace: Trace, layer: int, queries: np.ndarray) -> list[EdgeRows]:
    """Edges into the node after attention (parallel block: after the block) that stay at their position."""
    kinds = ["attention_residual"]
    if trace.has_mixer(layer):
        kinds.append("mixer")
    if trace.shapes[layer] == "parallel":
        kinds.append("ffn")
    return _alone(trace, layer, queries, kinds)


def after_ffn(trace: Trace, layer: int, queries: np.ndarray) -> list[EdgeRows]:
    """Edges into the node after the FFN of a sequential block."""
    return _alone(trace, layer, queries, ["ffn", "ffn_residual"])


def _alone(trace: Trace, layer: int, queries: np.ndarray, kinds: list[str]) -> list[EdgeRows]:
    none = np.full(len(queries), -1)
    return [
        EdgeRows(kind, queries, queries, none, trace.values(kind, layer, queries).astype(np.float64)) for kind in kinds
    ]
