"""A trace: the importances of one forward pass, as arrays and tables."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from flowroutes_fast.files import write_atomically
from flowroutes_fast.routes import Route, extract

FORMAT = "flowroutes_fast.trace"
FORMAT_VERSION = 1
_ARRAYS = ("heads", "attention_residual", "attention_bias", "ffn", "ffn_residual")


@dataclass(eq=False)
class Trace:
    """Importances of one prompt of ``token`` tokens in a model of ``layer`` layers and ``head`` heads; all float32, on the CPU.

    Attributes:
        tokens: token texts, ``token`` long; token_ids: their ids.
        heads: ``[layer, query, head]``, every head's importance summed over keys.
        attention_residual, attention_bias: ``[layer, query]``, the residual connection's and the constant bias part's share of
            the state after attention. ``heads.sum(-1) + attention_residual + attention_bias`` is 1.
        ffn, ffn_residual: ``[layer, query]``, shares of the state after the FFN; they sum to 1. A parallel block (``shapes[layer]
            == "parallel"``) has one node: its ``ffn`` belongs to the attention sum, its ``ffn_residual`` is NaN.
        floor: 0 when all sub-edges are kept; otherwise those of (query, key) pairs above it are.
        prediction: most probable next tokens after the last position, with probabilities.
        timings: seconds of the whole traced pass (``"total"``) and of our part of it (``"importances"``).
    """

    tokens: list[str]
    token_ids: list[int]
    model: str
    shapes: list[str]
    heads: Tensor
    attention_residual: Tensor
    attention_bias: Tensor
    ffn: Tensor
    ffn_residual: Tensor
    floor: float
    precision: str = "exact"
    backend: str = "reference"
    bias: str = "part"
    prediction: list[tuple[str, float]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    dense: list[Tensor] | None = field(default=None, repr=False)  # per layer [head, query, key]
    sparse: list[tuple[Tensor, Tensor]] | None = field(default=None, repr=False)  # per layer: index [3, n], importance [n]

    @property
    def n_layers(self) -> int:
        return len(self.shapes)

    def _layer(self, layer: int) -> int:
        if not -self.n_layers <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is out of range: the model has {self.n_layers} layers")
        return layer % self.n_layers

    def attention(self, layer: int) -> Tensor:
        """Importances of all sub-edges of one layer ``[query, key, head]``; ``ValueError`` when only those above a floor were kept."""
        layer = self._layer(layer)
        if self.dense is None:
            size = self.n_layers * self.heads.shape[-1] * len(self.tokens) ** 2 * 4
            raise ValueError(
                f"dense importances were not kept: all layers take {size / 1e9:.2f} GB, so sub-edges of pairs above {self.floor} were "
                f"kept instead (trace.edges({layer})); to have all, call trace(..., dense=True)"
            )
        return self.dense[layer].permute(1, 2, 0)

    def sub_edges(self, layer: int, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Stored sub-edges with positive importance into the given query positions (sorted): query, key, head, importance."""
        if self.dense is not None:
            rows = self.dense[layer].numpy()[:, queries]
            head, row, key = rows.nonzero()
            return queries[row], key, head, rows[head, row, key]
        index, importance = self.sparse[layer]  # type: ignore[index]
        query, key, head = index.numpy()
        keep = np.isin(query, queries)
        return query[keep].astype(np.int64), key[keep].astype(np.int64), head[keep].astype(np.int64), importance.numpy()[keep]

    def edges(self, layer: int, floor: float | None = None) -> pd.DataFrame:
        """Sub-edges of one layer above ``floor`` (default: the trace's own, at least 1e-3): ``query, key, head, importance``."""
        layer = self._layer(layer)
        floor = max(self.floor, 1e-3) if floor is None else floor
        if floor < self.floor:
            raise ValueError(f"sub-edges below {self.floor} were not kept; trace again with floor={floor} or dense=True")
        query, key, head, importance = self.sub_edges(layer, np.arange(len(self.tokens)))
        keep = importance > floor
        table = pd.DataFrame({"query": query[keep], "key": key[keep], "head": head[keep], "importance": importance[keep]})
        return table.sort_values(["query", "key", "head"], ignore_index=True)

    def route(self, position: int = -1, threshold: float = 0.04, renormalize: bool = True) -> Route:
        """The route of ``position``'s last state: every edge above ``threshold``, followed top-down (algorithm 1 of the paper).

        Raises:
            ValueError: threshold outside [0, 1) or below the floor of this trace.
            IndexError: position out of range.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        if threshold < self.floor:
            raise ValueError(
                f"threshold {threshold} is below this trace's floor {self.floor}; trace again with floor={threshold} or dense=True"
            )
        count = len(self.tokens)
        if not -count <= position < count:
            raise IndexError(f"position {position} is out of range: the prompt has {count} tokens")
        return extract(self, position % count, float(threshold), renormalize)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace as one safetensors file (:func:`load_trace` reads it back)."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name) for name in _ARRAYS}
        for layer in range(self.n_layers):
            if self.dense is not None:
                tensors[f"dense.{layer}"] = self.dense[layer]
            else:
                tensors[f"edge_index.{layer}"], tensors[f"edge_importance.{layer}"] = self.sparse[layer]  # type: ignore[index]
        plain = ("tokens", "token_ids", "model", "shapes", "floor", "precision", "backend", "bias", "prediction", "timings")
        header = {name: getattr(self, name) for name in plain}
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "trace": json.dumps(header, ensure_ascii=False)}
        return write_atomically(path, lambda temporary: save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, metadata))

    def __repr__(self) -> str:
        kept = "all sub-edges" if self.dense is not None else f"sub-edges above {self.floor}"
        return f"Trace({len(self.tokens)} tokens, {self.n_layers} layers × {self.heads.shape[-1]} heads, {self.precision}, {kept}, {self.model})"


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace written by :meth:`Trace.save`. ``ValueError`` if the file is something else, cut short, or of another version."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no trace file at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"'{path}' is not a trace file of flowroutes_fast")
            if metadata.get("version") != str(FORMAT_VERSION):
                raise ValueError(
                    f"'{path}' is a trace file of version {metadata.get('version')}; this release reads version {FORMAT_VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a safetensors handle is no dict)
        header = json.loads(metadata["trace"])
        header["prediction"] = [(text, p) for text, p in header["prediction"]]
        layers = range(len(header["shapes"]))
        if "dense.0" in tensors:
            stored: dict = {"dense": [tensors[f"dense.{layer}"] for layer in layers]}
        else:
            stored = {"sparse": [(tensors[f"edge_index.{layer}"], tensors[f"edge_importance.{layer}"]) for layer in layers]}
        return Trace(**header, **{name: tensors[name] for name in _ARRAYS}, **stored)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path}' is a damaged trace file: {error}") from error
