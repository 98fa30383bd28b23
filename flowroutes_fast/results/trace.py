"""A trace: the importances of one forward pass, as arrays and tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flowroutes_fast.ops.neurons import NeuronImportances
from flowroutes_fast.results import trace_file
from flowroutes_fast.results.elsewhere import from_above
from flowroutes_fast.results.extract import by_flow, extract, open_rows
from flowroutes_fast.results.flow import push
from flowroutes_fast.results.route import Route
from flowroutes_fast.system.arguments import file_path, flag, integer, integers, number, share
from flowroutes_fast.system.escape import printable
from flowroutes_fast.system.files import write_text

if TYPE_CHECKING:
    import pandas as pd  # a quarter of a second; imported when the first table is made


class OpenRows(Exception):
    """A certified trace leaves a decision open at some rows that a route visits."""

    def __init__(self, layer: int, queries: np.ndarray) -> None:
        super().__init__(layer, queries)
        self.layer, self.queries = layer, queries


CHANGED = 0.05  # of a normaliser: above what rounding to bfloat16 does between two passes
# {layer: queries} -> {layer: LayerImportances}, rows evaluated whole
Refine = Callable[[dict[int, np.ndarray]], "dict[int, Any] | None"]


@dataclass(eq=False)
class Trace:
    """Importances of one prompt of ``token`` tokens in a model of ``layer`` layers and ``head`` heads; all float32, on
    the CPU.

    Attributes:
        tokens: token texts, ``token`` long; token_ids: their ids.
        heads: ``[layer, query, head]``, every head's importance summed over keys; heads_low, heads_high: what it lies
            between.
        normaliser_low, normaliser_high: ``[layer, query]``, bounds of what proximities of the state after attention are
            divided by (in units of its L1 norm). Importances divide by their middle. They are equal where a row was
            evaluated whole.
        attention_residual, attention_bias: ``[layer, query]``, the residual connection's and the constant bias part's
            share of the state after attention. ``heads.sum(-1) + attention_residual + attention_bias`` is 1.
        ffn, ffn_residual: ``[layer, query]``, shares of the state after the FFN; they sum to 1. A parallel block
            (``shapes[layer] == "parallel"``) has one node: its ``ffn`` belongs to the attention sum, its
            ``ffn_residual`` is NaN.
        floor: 0 when all sub-edges are kept; otherwise those of (query, key) pairs above it are.
        measure: ``"proximity"`` or ``"signed"``; precision: ``"certified"`` or ``"exact"``.
        prediction: most probable next tokens after the last position, with probabilities.
        timings: seconds of the whole traced pass (``"total"``) and of our part of it (``"importances"``).
        inputs: what the model was given beside the tokens (images), ``{name: digest}``; a trace does not keep it, so
            that what runs the model again on the tokens alone (``to_html(model=)``, ``Route.verify``) is refused.
        chat: of a chat, ``(role, first, stop)`` of each message's tokens; the others are the template's. Empty for
            other prompts, and where the messages were not found again among the tokens.
        lazy: rows were evaluated when they were asked for (``trace(..., lazy=True)``); in a trace that was saved the
            others are NaN.
    """

    tokens: list[str]
    token_ids: list[int]
    model: str
    shapes: list[str]
    heads: Tensor
    heads_low: Tensor
    heads_high: Tensor
    normaliser_low: Tensor
    normaliser_high: Tensor
    attention_residual: Tensor
    attention_bias: Tensor
    mixer: Tensor
    ffn: Tensor
    ffn_residual: Tensor
    floor: float
    precision: str = "exact"
    measure: str = "proximity"
    backend: str = "reference"
    bias: str = "part"
    tolerance: float = 0.0
    thresholds: tuple[float, ...] = ()
    work: dict[str, int] = field(default_factory=dict)
    mixers: list[str] = field(default_factory=list)
    prediction: list[tuple[str, float]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    chat: list[tuple[str, int, int]] = field(default_factory=list)
    lazy: bool = False
    dense: list[Tensor] | None = field(default=None, repr=False)  # per layer [head, query, key]
    # per layer: index [3, n], importance [n]
    sparse: list[tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    neuron_parts: list[NeuronImportances] | None = field(default=None, repr=False)  # per layer
    refine: Refine | None = field(default=None, repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.shapes)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, arrays as numpy's: a pickled trace keeps no model, so that open decisions are refused.
        Loading checks nothing.
        """
        return {name: _map(value, Tensor, Tensor.numpy) for name, value in vars(self).items()} | {"refine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from torch import from_numpy

        self.__dict__.update(
            {
                name: _map(value, np.ndarray, lambda array: from_numpy(np.require(array, requirements="W")))
                for name, value in state.items()
            }
        )

    def __copy__(self) -> Trace:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        """A copy that refines with the same model: models are shared, not copied."""
        values = {name: value if name == "refine" else deepcopy(value, memo) for name, value in vars(self).items()}
        memo[id(self)] = copied = type(self)(**values)
        return copied

    def _layer(self, layer: int) -> int:
        layer = integer("layer", layer)
        if not -self.n_layers <= layer < self.n_layers:
            raise IndexError(f"layer {layer} is out of range: the model has {self.n_layers} layers")
        return layer % self.n_layers

    def attention(self, layer: int) -> Tensor:
        """Importances of all sub-edges of one layer ``[query, key, head]``; ``ValueError`` when only those above a
        floor were kept.
        """
        layer = self._layer(layer)
        if self.dense is None:
            size = self.n_layers * self.n_heads * len(self.tokens) ** 2 * 4
            raise ValueError(
                f"dense importances were not kept (all layers would take {size / 1e9:.2f} GB): sub-edges above "
                f"{self.floor} are in "
                f"trace.edges({layer}); to have all, call trace(..., precision='exact', dense=True)"
            )
        return self.dense[layer].permute(1, 2, 0)

    @property
    def normaliser_bounds(self) -> Tensor:
        """``[layer, query, 2]``: what proximities are divided by lies between these (in units of the state's L1
        norm).
        """
        import torch

        return torch.stack([self.normaliser_low, self.normaliser_high], -1)

    @property
    def certificate(self) -> dict[str, float | int | str]:
        """How the results are known: rows, sub-edges bounded and evaluated, rows refined and evaluated whole, widest
        interval.

        ``worst_error`` and ``mean_error`` are (high − low) / (high + low) of the normalisers: the relative error of any
        importance.
        """
        low, high = self._normalisers()
        error = ((high - low) / (high + low).clamp_min(1e-300)).clamp_min(0)
        return {
            "precision": self.precision,
            "measure": self.measure,
            "rows": low.numel(),
            "pairs_bounded": self.work.get("bounded", 0),
            "pairs_evaluated": self.work.get("evaluated", 0),
            "rows_refined": self.work.get("refined", 0),
            "rows_evaluated_whole": self.work.get("exhausted", 0),
            "worst_error": float(error.max()) if len(error) else 0.0,
            "mean_error": float(error.mean()) if len(error) else 0.0,
        }

    def _normalisers(self) -> tuple[Tensor, Tensor]:
        """Bounds of the normalisers that are known, ``[row]`` each, float64."""
        traced = ~self.normaliser_low.isnan()
        return self.normaliser_low[traced].double(), self.normaliser_high[traced].double()

    @property
    def n_heads(self) -> int:
        """Heads of the layer that has most."""
        return self.heads.shape[-1]

    def values(self, name: str, layer: int, queries: np.ndarray) -> np.ndarray:
        """One of the arrays ``[layer, query, ...]`` at some rows of a layer (after :meth:`reach`)."""
        found: np.ndarray = getattr(self, name)[layer].numpy()[queries]
        return found

    def reach(self, layer: int, queries: np.ndarray) -> None:
        """Called before rows are looked at; ``ValueError`` if one of them is not there."""
        if len(missing := queries[np.isnan(self.values("ffn", layer, queries))]):
            raise ValueError(self._missing(layer, int(missing[0])))

    def _missing(self, layer: int, position: int) -> str:
        if self.lazy:
            return (
                f"position {position} of layer {layer} had not been evaluated when this trace was saved; trace "
                f"again, or follow routes before saving"
            )
        return (
            f"position {position} was not traced, and the route reaches it in layer {layer}; trace without positions="
        )

    def complete(self) -> Trace:
        """The trace with all its rows: a lazy one evaluates those that are missing.

        Raises:
            ValueError: rows that are not there, in a lazy trace from a file.
        """
        if self.lazy and (missing := int(self.ffn.isnan().sum())):
            raise ValueError(
                f"this trace was lazy when it was saved and has no figures of {missing} of its {self.ffn.numel()} "
                f"rows (layers × tokens): "
                "trace again without lazy=True"
            )
        return self

    def decide(self, layer: int, queries: np.ndarray) -> None:
        """Refine rows whose intervals leave a decision open; a trace that keeps no states does it all at once, see
        :meth:`route`.
        """
        raise OpenRows(layer, queries)

    def factors(self, layer: int, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What an importance of these rows is multiplied by to get its lower and its upper bound."""
        low, high = (self.values(name, layer, queries) for name in ("normaliser_low", "normaliser_high"))
        if self.measure == "signed":
            return np.ones(len(low)), np.ones(len(low))
        return _factors(low, high)

    def sub_edges(self, layer: int, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Stored sub-edges into the given query positions (sorted): query, key, head, importance.

        Head -1 stands for a pair's other heads, whose importances together lie between 0 and the one given.
        """
        if self.dense is not None:
            rows = self.dense[layer].numpy()[:, queries]
            head, row, key = rows.nonzero()
            return queries[row], key, head, rows[head, row, key]
        index, importance = self.sparse[layer]  # type: ignore[index]
        query, key, head = index.numpy()
        if len(queries) == len(self.tokens):
            keep: Any = slice(None)
        else:
            wanted = np.zeros(len(self.tokens), bool)
            wanted[queries] = True
            keep = wanted[query]
        return (
            query[keep].astype(np.int64),
            key[keep].astype(np.int64),
            head[keep].astype(np.int64),
            importance.numpy()[keep],
        )

    def edges(
        self, layer: int, floor: float | None = None, *, positions: int | Sequence[int] | None = None
    ) -> pd.DataFrame:
        """Sub-edges of one layer whose importance may be above ``floor`` (default: the trace's own, at least 1e-3).

        ``positions``: of the queries; None for all (a lazy trace evaluates the rows of this layer that it needs).

        Columns ``query, key, head, importance, low, high``: the estimate, and what the exact importance lies between.
        ``ValueError`` for a floor outside [0, 1) or below the trace's own, ``IndexError`` for a layer that there is
        not, ``TypeError`` for what is no number.
        """
        import pandas as pd

        layer = self._layer(layer)
        floor = max(self.floor, 1e-3) if floor is None else share("floor", floor)
        if floor < self.floor:
            way = "precision='exact', dense=True" if floor == 0 else f"floor={floor}"
            raise ValueError(f"sub-edges below {self.floor} were not kept; trace again with {way}")
        queries = np.arange(len(self.tokens)) if positions is None else np.asarray(self._positions(positions), np.int64)
        if positions is not None or self.lazy:
            self.reach(layer, queries)
        query, key, head, importance = self.sub_edges(layer, queries)
        below, above = self.factors(layer, queries)
        row = np.searchsorted(queries, query)
        with np.errstate(invalid="ignore"):  # nothing is nothing, whatever it is divided by
            low, high = (np.where(importance == 0, 0, importance * factor[row]) for factor in (below, above))
        keep = (np.maximum(np.abs(low), np.abs(high)) > floor) & (head >= 0)
        columns = {"query": query, "key": key, "head": head, "importance": importance, "low": low, "high": high}
        table = pd.DataFrame({name: values[keep] for name, values in columns.items()})
        return table.sort_values(["query", "key", "head"], ignore_index=True)

    def neurons(self, layer: int) -> pd.DataFrame:
        """FFN neurons of one layer whose share of the state after the FFN may be above the floor; needs ``trace(...,
        neurons=True)``.

        Columns ``position, neuron, importance, low, high``. The neurons take the FFN's place among the parts: they
        share one normalisation with the residual connection and the bias (in a parallel block, with the attention too).
        """
        import pandas as pd

        if self.neuron_parts is None:
            raise ValueError("neurons were not traced; call trace(..., neurons=True)")
        found = self.neuron_parts[self._layer(layer)]
        position, neuron = found.index.numpy()
        value, low, high = found.importance.numpy(), found.low.numpy()[position], found.high.numpy()[position]
        below, above = _factors(low, high) if self.measure != "signed" else (1.0, 1.0)
        columns = {
            "position": position,
            "neuron": neuron,
            "importance": value,
            "low": value * below,
            "high": value * above,
        }
        return pd.DataFrame(columns)

    def has_mixer(self, layer: int) -> bool:
        """Does a mixer without attention weights (Mamba, linear attention, convolution) take part in this layer?"""
        return bool(self.mixers) and bool(self.mixers[self._layer(layer)])

    def route(
        self,
        position: int | Sequence[int] = -1,
        threshold: float | None = None,
        renormalize: bool = True,
        *,
        rule: str = "importance",
        keep: float | None = None,
    ) -> Route:
        """The route of ``position``'s last state: every edge above ``threshold``, followed top-down (algorithm 1 of the
        paper).

        It is the route of exact importances. Where the certified intervals leave a decision open (which they do not at
        the thresholds that were asked for when tracing), the model runs once more to refine it; a trace keeps no model
        alive for that.

        Args:
            position: where to start, negative from the end; several positions give the union of their routes.
            threshold: importances above it are followed; 0.04 by default.
            renormalize: drop sub-edges up to the threshold before heads are summed, and divide the survivors by their
                sum.
            rule: ``"importance"``, the paper's; or ``"flow"``: mass 1 starts at the root and splits at every node over
                what enters it, in proportion to importance; an edge's flow is the mass it carries. A route by flow
                holds the edges with a flow above ``threshold``, or the strongest share ``keep`` of all that carry any,
                as far as they hang together with a root. Sub-edges below the floor of the trace are no candidates, and
                certified importances enter as estimated.
            keep: share of the edges to keep, in (0, 1]; with ``rule="flow"``, instead of a threshold.

        Raises:
            ValueError: threshold outside [0, 1) or below the floor of this trace; a decision is open and the model is
                gone; options that exclude each other.
            IndexError: position out of range. TypeError: a position that is no integer, a threshold that is no number.
        """
        positions, renormalize = self._positions(position), flag("renormalize", renormalize)
        if rule not in ("importance", "flow"):
            raise ValueError(f"unknown rule {rule!r}: choose 'importance' or 'flow'")
        if keep is not None and (rule != "flow" or threshold is not None):
            raise ValueError("keep belongs to rule='flow', without a threshold")
        if keep is not None and not 0 < (keep := number("keep", keep)) <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {keep}")
        if rule == "flow" and threshold is None and keep is None:
            raise ValueError("rule='flow' needs a threshold of the flow, or keep= (the share of edges to keep)")
        if rule == "flow" and not renormalize:
            raise ValueError("rule='flow' has no renormalize=False: flow is a share of the root's mass")
        threshold = 0.04 if threshold is None else share("threshold", threshold)
        if rule == "flow":
            return by_flow(self, positions, threshold, keep)
        if threshold < self.floor:
            raise ValueError(
                f"threshold {threshold} is below this trace's floor {self.floor}; trace again with "
                + (f"floor={threshold}" if threshold > 0 else "precision='exact', dense=True")
            )
        try:
            return extract(self, positions, threshold, renormalize)
        except OpenRows as found:
            self._refine_rows(threshold, renormalize, found)
            return extract(self, positions, threshold, renormalize)

    def token_attribution(self, position: int | Sequence[int] | slice = -1) -> pd.DataFrame:
        """How much each token supplies to the last state of ``position`` (several: to each of them equally).

        Mass 1 starts at the root and goes down the whole graph; every node hands its mass to the sources of its
        incoming edges in proportion to their importance (equation 5; signed flow: its absolute value), an FFN's and a
        residual connection's source being the same position. Biases have no source and take nothing. What arrives at
        the embeddings sums to 1.

        Returns:
            A table ``position, token, importance``, all tokens. ``table.attrs["unresolved"]`` is the mass, summed over
            layers, that met sub-edges below the trace's floor; it went to those above. It is 0 with
            ``precision="exact", dense=True``.

        Raises:
            ValueError: no position, or one that the mass reaches was not traced. IndexError: position out of range.
                TypeError: a position that is no integer.
        """
        import pandas as pd

        positions = (
            list(range(len(self.tokens)))[position] if isinstance(position, slice) else self._positions(position)
        )
        if not positions:
            raise ValueError(f"the span {position} holds no position")
        mass, _, unresolved = push(self, positions)
        table = pd.DataFrame({"position": np.arange(len(mass)), "token": self.tokens, "importance": mass})
        table.attrs["unresolved"] = unresolved
        return table

    def _positions(self, position: int | Sequence[int]) -> list[int]:
        count = len(self.tokens)
        chosen = integers("position", position)
        if not chosen:
            raise ValueError("position is empty: a route needs a root")
        for p in chosen:
            if not -count <= p < count:
                raise IndexError(f"position {p} is out of range: the prompt has {count} tokens")
        return sorted({p % count for p in chosen})

    def _refine_rows(self, threshold: float, renormalize: bool, found: OpenRows) -> None:
        """Evaluate every row that is open at a threshold whole, by one more forward pass."""
        import torch

        everyone = (~self.normaliser_low[0].isnan()).numpy().nonzero()[0]
        rows = {layer: open_rows(self, layer, everyone, threshold, renormalize) for layer in range(self.n_layers)}
        rows = {layer: queries for layer, queries in rows.items() if len(queries)}
        refined = self.refine(rows) if self.refine else None
        if refined is None:
            raise ValueError(
                f"at threshold {threshold} this trace leaves {sum(map(len, rows.values()))} rows open (first met: "
                f"layer {found.layer}, position "
                f"{found.queries[0]}) and its model is gone (a trace from a file or another process has none); trace "
                f"again with thresholds=[{threshold}], or use one of {list(self.thresholds)}"
            )
        for layer, queries in rows.items():
            at = torch.from_numpy(queries)
            exact, low, high = refined[layer].low[at], self.normaliser_low[layer, at], self.normaliser_high[layer, at]
            if not bool(((exact >= low * (1 - CHANGED)) & (exact <= high * (1 + CHANGED))).all()):
                raise ValueError("the model does not compute what it did when it was traced: trace again")
        fields = {
            "heads": "heads",
            "heads_low": "heads_low",
            "heads_high": "heads_high",
            "normaliser_low": "low",
            "normaliser_high": "high",
            "attention_residual": "attention_residual",
            "attention_bias": "bias",
            "mixer": "mixer",
            "ffn": "ffn",
            "ffn_residual": "ffn_residual",
        }
        for layer, queries in rows.items():
            at = torch.from_numpy(queries)
            for mine, theirs in fields.items():
                getattr(self, mine)[layer, at] = getattr(refined[layer], theirs)[at]
            chosen = torch.zeros(len(self.tokens), dtype=torch.bool)
            chosen[at] = True
            parts = [(self.sparse[layer], ~chosen), (refined[layer].edges, chosen)]  # type: ignore[index]
            kept = [(index[:, mask[index[0].long()]], value[mask[index[0].long()]]) for (index, value), mask in parts]
            self.sparse[layer] = (torch.cat([i for i, _ in kept], 1), torch.cat([v for _, v in kept]))  # type: ignore[index]
        self.work["exhausted"] = self.work.get("exhausted", 0) + sum(map(len, rows.values()))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the trace as one safetensors file (:func:`load_trace` reads it back); of a lazy trace, the rows
        that have been evaluated.
        """
        return trace_file.write(
            file_path(path), {name: getattr(self, name) for name in trace_file.PLAIN}, self._stored()
        )

    def _stored(self) -> dict[str, Tensor]:
        """The arrays of its file."""
        tensors = {name: getattr(self, name) for name in trace_file.ARRAYS}
        for layer in range(self.n_layers):
            if self.dense is not None:
                tensors[f"dense.{layer}"] = self.dense[layer]
            else:
                tensors[f"edge_index.{layer}"], tensors[f"edge_importance.{layer}"] = self.sparse[layer]  # type: ignore[index]
        for layer, found in enumerate(self.neuron_parts or []):
            tensors |= {f"neuron_{name}.{layer}": getattr(found, name) for name in trace_file.NEURON}
        return tensors

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        other: Trace | None = None,
        signed: Trace | None = None,
        model: Any = None,
        tokenizer: Any = None,
        threshold: float = 0.04,
        position: int = -1,
        renormalize: bool = True,
    ) -> Path:
        """Write the trace as a self-contained page that extracts routes while you move its slider; returns the page's
        path.

        Args:
            other: another prompt's trace by the same model, to compare with.
            signed: the same prompt with ``measure="signed"``, to switch to.
            model, tokenizer: those of the trace, which run once more: the page then shows what every state would
                predict (logit lens) and where every head attends.
            threshold, position, renormalize: the route that the page opens with.

        Raises:
            ValueError: traces that do not belong together, a threshold outside [0, 1). IndexError: position out of
                range. TypeError: an argument of a wrong type.
        """
        threshold, position, renormalize = (
            share("threshold", threshold),
            integer("position", position),
            flag("renormalize", renormalize),
        )
        for name, one in (("other", other), ("signed", signed)):
            if one is not None and not isinstance(one, Trace):
                raise TypeError(f"{name} must be a trace, got a {type(one).__name__}")
        path, details = file_path(path), from_above("details")
        about = [
            details(model, tokenizer, one, position=at) if model is not None and one else None
            for one, at in ((self, position), (other, -1))
        ]
        page = from_above("trace_html")(
            self,
            other,
            signed=signed,
            details=about[0],
            other_details=about[1],
            threshold=threshold,
            position=position,
            renormalize=renormalize,
        )
        return write_text(path, page)

    def _repr_html_(self) -> str:
        return str(from_above("trace_cell")(self))

    def __repr__(self) -> str:
        kept = "all sub-edges" if self.dense is not None else f"sub-edges above {self.floor}"
        return (
            f"Trace({len(self.tokens)} tokens, {self.n_layers} layers × {self.n_heads} heads, {self.precision}, "
            f"{kept}, {printable(self.model)})"
        )


def _factors(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What shares of a normaliser's middle are multiplied by to be those of its upper and of its lower bound."""
    middle = (low + (high - low) / 2).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where((high > low) & (high > 0), middle / high, 1.0)
        above = np.where(high > low, np.where(low > 0, middle / low, np.inf), 1.0)
    return below, above


def _map(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Apply ``change`` to everything of one kind in a field of a trace."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(one, kind, change) for one in value)
    if isinstance(value, NeuronImportances):
        return NeuronImportances(**{name: _map(one, kind, change) for name, one in vars(value).items()})
    return value


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace written by :meth:`Trace.save`.

    Raises:
        DamagedFile: (a ``ValueError``) the file is something else, cut short, changed, of another version, or holds
            what no pass can give.
        FileNotFoundError, IsADirectoryError, PermissionError: there is no file to read.
    """
    header, tensors = trace_file.read(path)
    layers = range(len(header["shapes"]))
    stored: dict[str, Any] = {name: tensors[name] for name in trace_file.ARRAYS}
    if "dense.0" in tensors:
        stored["dense"] = [tensors[f"dense.{layer}"] for layer in layers]
    else:
        stored["sparse"] = [(tensors[f"edge_index.{layer}"], tensors[f"edge_importance.{layer}"]) for layer in layers]
    if "neuron_index.0" in tensors:
        stored["neuron_parts"] = [
            NeuronImportances(*(tensors[f"neuron_{name}.{layer}"] for name in trace_file.NEURON)) for layer in layers
        ]
    return Trace(**header, **stored)
