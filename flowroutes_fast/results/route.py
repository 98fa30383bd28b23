"""A route: the sub-edges through which states are reached, as a table, a graph, a picture, a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowroutes_fast.results.edges import COLUMNS, KINDS
from flowroutes_fast.results.elsewhere import from_above
from flowroutes_fast.system import documents as doc
from flowroutes_fast.system.arguments import file_path, integer, share
from flowroutes_fast.system.errors import DamagedFile
from flowroutes_fast.system.escape import printable
from flowroutes_fast.system.files import write_text

if TYPE_CHECKING:
    import networkx
    import pandas as pd
    from torch import Tensor

    from flowroutes_fast.experiments.faithfulness import Faithfulness

FORMAT = "flowroutes_fast.route"
FORMAT_VERSION = 2
MAX_HEADS = 2**14  # more than any model has


@dataclass(eq=False)
class Route:
    """The sub-edges through which the last states of one or several positions are reached.

    ``edges`` has one row per sub-edge: ``layer``, ``kind`` (one of :data:`KINDS`), ``source`` and ``target`` (token
    positions), ``head`` (-1 where it has no meaning, or for the heads of a token edge that are too small to be told
    apart) and ``importance`` (share of its node's total, in [0, 1]; with ``measure="signed"`` in [-1, 1]; with
    ``rule="flow"`` its flow, the share of the roots' mass that passes through it). The roots are the states of
    ``positions`` after the last layer; ``position`` is the last of them. ``"mixer"`` is what a layer without attention
    weights (Mamba, linear attention) adds: its sources are not known.
    """

    tokens: list[str]
    position: int
    threshold: float  # rule="flow": of the flow; with ``keep``, the one that keeps so much
    renormalize: bool
    model: str
    shapes: list[str]  # per layer: "sequential" or "parallel"
    edges: pd.DataFrame = field(repr=False)
    prediction: list[tuple[str, float]] = field(default_factory=list)
    measure: str = "proximity"
    positions: tuple[int, ...] = ()
    rule: str = "importance"
    keep: float | None = None
    token_ids: list[int] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)  # what the model was given beside the tokens, see Trace
    chat: list[tuple[str, int, int]] = field(default_factory=list)  # where the messages of a chat are, see Trace

    def __post_init__(self) -> None:
        self.positions = tuple(self.positions) or (self.position,)

    @property
    def n_layers(self) -> int:
        return len(self.shapes)

    @cached_property
    def token_edges(self) -> pd.DataFrame:
        """Heads summed: ``layer``, ``kind``, ``source``, ``target``, ``importance``."""
        import pandas as pd

        keys = ["layer", "kind", "source", "target"]
        return pd.DataFrame(self.edges.groupby(keys, as_index=False, sort=False)["importance"].sum())

    def nodes_of(self, layer: int, kind: str, source: int, target: int) -> tuple[str, str]:
        """Names of the states an edge joins: ``X0_{t}`` embedding, ``A{l}_{t}`` after attention, ``I{l}_{t}`` after
        layer l.
        """
        below = f"I{layer - 1}" if layer else "X0"
        parallel = self.shapes[layer] == "parallel"
        if kind in ("ffn", "ffn_residual"):
            return f"{below if parallel else f'A{layer}'}_{source}", f"I{layer}_{target}"
        return f"{below}_{source}", f"{'I' if parallel else 'A'}{layer}_{target}"

    @property
    def roots(self) -> list[str]:
        return [f"I{self.n_layers - 1}_{position}" for position in self.positions]

    @property
    def root(self) -> str:
        return f"I{self.n_layers - 1}_{self.position}"

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The route as a multigraph: an edge per sub-edge, from source to target state, with ``kind``, ``layer``,
        ``head``, ``importance``.
        """
        import networkx as nx

        about = {
            name: getattr(self, name)
            for name in ("model", "position", "positions", "threshold", "renormalize", "rule", "measure")
        }
        graph = nx.MultiDiGraph(**about)
        graph.add_nodes_from(self.roots)
        for layer, kind, source, target, head, importance in self._rows():
            start, end = self.nodes_of(layer, kind, source, target)
            key = f"L{layer}H{head}" if head >= 0 else kind
            graph.add_edge(start, end, key=key, kind=kind, layer=layer, head=head, importance=importance)
        for name, data in graph.nodes(data=True):
            position = int(name.rsplit("_", 1)[1])
            data.update(position=position, token=self.tokens[position])
        return graph

    def _rows(self) -> Iterator[tuple[int, str, int, int, int, float]]:
        return self.edges[list(COLUMNS)].itertuples(index=False, name=None)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a self-contained page that draws the route; returns its path."""
        return write_text(file_path(path), from_above("route_html")(self))

    def to_circuit_tracer(
        self, path: str | os.PathLike[str], *, slug: str | None = None, min_weight: float = 0.005
    ) -> Path:
        """Write the route as a graph for circuit-tracer's server or Neuronpedia; see
        :mod:`flowroutes_fast.integrations.circuit_tracer`.
        """
        if slug is not None and not isinstance(slug, str):
            raise TypeError(f"slug must be a text, got {slug!r}")
        return Path(from_above("write_graph")(self, path, slug=slug, min_weight=share("min_weight", min_weight)))

    def to_text(self, width: int | None = None) -> str:
        """A compact text picture: layers down, tokens across."""
        return str(from_above("route_text")(self, None if width is None else integer("width", width)))

    def verify(
        self,
        model: Any,
        *,
        ablation: str = "mean",
        means: Sequence[Tensor] | None = None,
        answer: int | None = None,
        random: int = 5,
        seed: int = 0,
        attention: str = "live",
        ids: Sequence[int] | None = None,
    ) -> Faithfulness:
        """Run the model on the route's sub-edges alone, and on as many random ones and ones with the highest attention
        weights.

        All sub-edges that are not in the route are ablated, at all positions up to ``position``, in all layers; FFNs
        and residual connections are kept, also those that are not in the route. Few routes carry a prediction by
        themselves: compare with the rivals.

        Args:
            model: the model that was traced; it comes back unchanged.
            ablation: ``"mean"``: a dropped sub-edge brings its head's mean value instead of its own; ``"zero"``: it
                brings nothing.
            means: per layer ``[head, d_head]``, from :func:`flowroutes_fast.experiments.ablation.value_means` over a
                corpus. None: of this prompt's own positions, which needs no corpus but knows the prompt.
            answer: token id whose probability and rank are given; None: the most probable one.
            random: draws of random sub-edges, as many per layer as the route has.
            attention: ``"live"``: attention weights of the ablated run; ``"frozen"``: of the whole model.
            ids: the prompt's token ids, for a route that does not hold them (from a file of an earlier version).

        Raises:
            ValueError: an unknown option, another model's route, a model whose attention cannot be replaced.
        """
        options: dict[str, Any] = {
            "ablation": ablation,
            "means": means,
            "answer": answer,
            "random": random,
            "seed": seed,
        }
        found: Faithfulness = from_above("verify")(self, model, attention=attention, ids=ids, **options)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The route as plain lists and numbers, ``edges`` by column, and their checksum: what :meth:`save` writes."""
        header = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "edges"}
        header = json.loads(doc.written(header | {"model": doc.one_line(self.model)}))
        columns = {name: self.edges[name].tolist() for name in COLUMNS}
        document = {"format": FORMAT, "version": FORMAT_VERSION, **header, "edges": columns}
        return document | {"sha256": doc.digest_of(document)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the route as JSON (:func:`load_route` reads it back)."""
        return write_text(file_path(path), json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False))

    def _repr_html_(self) -> str:
        return str(from_above("route_cell")(self))

    def __repr__(self) -> str:
        return (
            f"Route({len(self.edges)} sub-edges to {', '.join(f'{self.tokens[p]!r}@{p}' for p in self.positions)}, "
            f"threshold={self.threshold}, {printable(self.model)})"
        )


def load_route(path: str | os.PathLike[str]) -> Route:
    """Read a route written by :meth:`Route.save`.

    Raises:
        DamagedFile: (a ``ValueError``) the file is something else, cut short, changed, of another version, or holds
            what is no route.
        FileNotFoundError, IsADirectoryError, PermissionError: there is no file to read.
    """
    file = doc.plain_file(path, "route file")
    with doc.named(path, "is a damaged route file, or none"):
        try:
            document = doc.parse(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise DamagedFile(f"it is no text ({error})") from error
        doc.check(
            isinstance(document, dict) and document.get("format") == FORMAT, "it is not a route file of flowroutes_fast"
        )
        version = document.get("version")
        known = type(version) is int and 1 <= version <= FORMAT_VERSION
        doc.check(known, f"it is of version {str(version)[:20]}; this release reads versions up to {FORMAT_VERSION}")
        written = document.pop("sha256", None)
        required = _REQUIRED if version == 1 else _REQUIRED | {"measure", "positions", "rule", "keep"}
        route = _checked(
            {name: value for name, value in document.items() if name not in ("format", "version")}, required
        )
        doc.check(
            written is None or written == doc.digest_of(document),
            "its content is not what was written (the checksum differs; a file that was changed on purpose is read "
            "without its sha256)",
        )
        return route


_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "tokens": doc.texts,
    "position": lambda name, value: doc.an_integer(name, value, 0, doc.INT64),
    "threshold": lambda name, value: doc.a_number(name, value, 0, 1 + doc.ROUNDING),  # a flow may reach 1
    "renormalize": doc.a_flag,
    "model": doc.a_name,
    "shapes": doc.shapes,
    "prediction": doc.probabilities,
    "measure": doc.one_of("proximity", "signed"),
    "positions": lambda name, value: tuple(doc.integers(name, value, 0, doc.INT64)),
    "rule": doc.one_of("importance", "flow"),
    "keep": lambda name, value: None if value is None else doc.a_number(name, value, 0, 1),
    "token_ids": lambda name, value: doc.integers(name, value, 0, doc.INT64),
    "inputs": lambda name, value: doc.table_of(name, value, doc.a_text),
    "chat": doc.messages,
}
_REQUIRED = {"tokens", "position", "threshold", "renormalize", "model", "shapes", "prediction", "edges"}


def _checked(document: dict[str, Any], required: set[str]) -> Route:
    """A route from what its file says; :class:`DamagedFile` for what no trace has."""
    doc.check_names(document, required, {*_FIELDS, "edges"})
    found = {name: _FIELDS[name](name, value) for name, value in document.items() if name != "edges"}
    tokens, layers = len(found["tokens"]), len(found["shapes"])
    positions = found.get("positions") or (found["position"],)
    doc.check(layers > 0, "it has no layers")
    doc.check(max(positions) < tokens, f"its roots are outside its {tokens} tokens")
    doc.check(
        list(positions) == sorted(set(positions)) and positions[-1] == found["position"],
        "its position is not the last of its positions",
    )
    doc.check(
        len(found.get("token_ids", [])) in (0, tokens),
        f"it has {len(found.get('token_ids', []))} token ids for {tokens} tokens",
    )
    doc.check_messages(found.get("chat", []), tokens)
    flow, signed = found.get("rule") == "flow", found.get("measure") == "signed"
    doc.check(
        flow or (found["threshold"] < 1 and found.get("keep") is None),
        "its threshold and keep do not belong to its rule",
    )
    doc.check(not flow or found["renormalize"], "a route by flow is always renormalised")
    most = float("inf") if signed and not found["renormalize"] else 1 + doc.ROUNDING
    edges = _checked_edges(document["edges"], tokens, found["shapes"], -most if signed and not flow else 0, most)
    return Route(edges=edges, **found)


def _checked_edges(columns: Any, tokens: int, shapes: list[str], low: float, high: float) -> pd.DataFrame:
    import pandas as pd

    doc.check(isinstance(columns, dict), "edges is no table of columns")
    doc.check_names(columns, set(COLUMNS), set(COLUMNS))
    count = len(doc.a_list("edges: layer", columns["layer"]))
    known = doc.one_of(*KINDS)
    limits = {
        "layer": (0, len(shapes) - 1),
        "source": (0, tokens - 1),
        "target": (0, tokens - 1),
        "head": (-1, MAX_HEADS - 1),
    }
    checked: dict[str, list[Any]] = {
        name: doc.integers(f"edges: {name}", columns[name], *limits[name], count) for name in limits
    }
    checked["kind"] = [known("edges: kind", kind) for kind in doc.a_list("edges: kind", columns["kind"], count)]
    checked["importance"] = doc.numbers("edges: importance", columns["importance"], low, high, count)
    table = pd.DataFrame({name: pd.Series(checked[name], dtype=kind) for name, kind in COLUMNS.items()})
    attention = (table["kind"] == "attention").to_numpy()
    source, target = table["source"].to_numpy(), table["target"].to_numpy()
    doc.check(
        (np.where(attention, source <= target, source == target)).all(),
        "edges lead to earlier tokens, or change the token without attention",
    )
    doc.check((table["head"].to_numpy()[~attention] == -1).all(), "edges without attention have a head")
    parallel = np.array([shape == "parallel" for shape in shapes])[table["layer"].to_numpy()]
    doc.check(
        not (parallel & (table["kind"] == "ffn_residual").to_numpy()).any(),
        "a parallel layer has a residual connection past its FFN",
    )
    doc.check(not table.duplicated(list(COLUMNS)[:-1]).any(), "edges lists a sub-edge twice")
    return table
