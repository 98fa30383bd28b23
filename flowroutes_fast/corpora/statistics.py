"""What a corpus leaves behind: sums over positions, per domain; nothing of them grows with the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flowroutes_fast.corpora.words import first_of_several, later, word_start

if TYPE_CHECKING:
    from flowroutes_fast.results.route import Route
    from flowroutes_fast.results.trace import Trace

PATTERNS = ("same token", "previous token", "two before", "three before", "first token", "same word")
HALF, LOW = 0.5, 0.005  # the paper's: of a head's influence; overall influence


@dataclass
class Statistics:
    """Counts and sums over the positions of one domain's texts (position 0, where there is nothing before, is left out
    of the patterns).

    ``total`` and ``squares`` ``[component]`` float64 over ``positions``; components are all heads, layer by layer, then
    all FFNs. ``active [layer, head]``: positions with a sub-edge above the threshold; ``in_routes``: texts whose route
    has the head. ``patterns [pattern, layer, head]``: positions where more than half of the head's influence is on that
    place; ``same word``: later subwords where it is on earlier subwords of the word; ``quiet``: first subwords with an
    influence of at most 0.005.

    Of a run of routes alone (``routes_only``) there are ``in_routes`` and the counts; ``ValueError`` for all else.
    """

    shape: tuple[int, int]  # layers, heads
    positions: int = 0
    texts: int = 0
    after_first: int = 0
    later: int = 0
    first: int = 0
    routes_only: bool = False

    def __post_init__(self) -> None:
        layers, heads = self.shape
        self.in_routes = np.zeros(self.shape, np.int64)
        if self.routes_only:
            return
        self.total, self.squares = np.zeros(layers * heads + layers), np.zeros(layers * heads + layers)
        self.active, self.quiet = (np.zeros(self.shape, np.int64) for _ in range(2))
        self.patterns = np.zeros((len(PATTERNS), *self.shape), np.int64)

    def __getattr__(self, name: str) -> Any:
        if name in OF_ALL_ROWS:
            raise ValueError(ROUTES_ONLY.format(OF_ALL_ROWS[name]))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that there are."""
        return ("in_routes",) if self.routes_only else ARRAYS

    def add(self, found: Routed) -> None:
        """Count one text in; :class:`Observed` unless ``routes_only``."""
        self.positions += found.tokens
        self.texts += 1
        self.in_routes += found.in_route
        self.after_first += found.tokens - 1
        self.later += found.later
        self.first += found.first
        if self.routes_only:
            return
        assert isinstance(found, Observed)
        self.total += found.components.sum(0, dtype=np.float64)
        self.squares += np.square(found.components, dtype=np.float64).sum(0)
        self.active += found.active
        self.patterns += found.patterns
        self.quiet += found.quiet

    def merge(self, other: Statistics) -> None:
        if self.shape != other.shape:
            raise ValueError(f"statistics of different models: {self.shape} and {other.shape} layers and heads")
        if self.routes_only != other.routes_only:
            raise ValueError(
                "statistics of a run of routes alone (routes_only=True) cannot be added to those of all positions"
            )
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in self.arrays:
            getattr(self, name).__iadd__(getattr(other, name))

    def mean(self) -> np.ndarray:
        """Mean importance ``[component]``; NaN without positions."""
        with np.errstate(invalid="ignore"):
            return self.total / self.positions if self.positions else np.full_like(self.total, np.nan)

    def variance(self) -> np.ndarray:
        """Variance over positions ``[component]`` (n - 1); NaN below two."""
        n = self.positions
        return np.maximum(self.squares - self.total**2 / n, 0) / (n - 1) if n > 1 else np.full_like(self.total, np.nan)

    def heads(self) -> pd.DataFrame:
        """One row per head: ``layer, head, importance, active, in_routes``, the share of positions of every
        pattern, and ``quiet``.
        """
        layers, heads = self.shape
        table = pd.DataFrame({"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)})
        table["importance"] = self.mean()[: layers * heads]
        table["active"] = self.active.ravel() / max(self.positions, 1)
        table["in_routes"] = self.in_routes.ravel() / max(self.texts, 1)
        for name, counts in zip(PATTERNS, self.patterns, strict=True):
            of = self.later if name == "same word" else self.after_first
            table[name] = counts.ravel() / of if of else np.nan
        table["quiet"] = self.quiet.ravel() / self.first if self.first else np.nan
        return table

    def ffn(self) -> pd.DataFrame:
        """One row per layer: ``layer, importance``."""
        layers, heads = self.shape
        return pd.DataFrame({"layer": np.arange(layers), "importance": self.mean()[layers * heads :]})


COUNTS = ("positions", "texts", "after_first", "later", "first")
ARRAYS = ("total", "squares", "active", "in_routes", "patterns", "quiet")
ROUTES_ONLY = (
    "a run with routes_only=True evaluates what its routes reach and has no {}: run it without, into a new folder"
)
OF_ALL_ROWS = {
    "total": "means over positions",
    "squares": "variances over positions",
    "active": "activation by position",
    "patterns": "places where heads look",
    "quiet": "influence on first subwords",
}


@dataclass
class Routed:
    """What the route of one text's last position says; see :class:`Statistics`."""

    tokens: int
    later: int
    first: int
    in_route: np.ndarray
    edges: pd.DataFrame


@dataclass
class Observed(Routed):
    """What one traced text says."""

    components: np.ndarray  # [position, component] float32
    # [position]: importance of sub-edges from it into later positions, mean over those, summed over layers
    received: np.ndarray
    active: np.ndarray
    patterns: np.ndarray
    quiet: np.ndarray


def follow(route: Route, word: np.ndarray, heads: int) -> Routed:
    """Evaluate a route in a model with so many heads per layer. ``word``: as for :func:`observe`."""
    in_route = np.zeros((len(route.shapes), heads), np.int64)
    edges = route.edges
    of_heads = edges[(edges["kind"] == "attention") & (edges["head"] >= 0)]
    in_route[of_heads["layer"].to_numpy(), of_heads["head"].to_numpy()] = 1
    return Routed(len(word), int(later(word).sum()), int(first_of_several(word).sum()), in_route, edges)


def observe(trace: Trace, word: np.ndarray, threshold: float) -> Observed:
    """Evaluate a trace. ``word [token]``: number of the word of each token, -1 for none
    (:func:`flowroutes_fast.corpora.words.words`).

    Patterns compare a head's sub-edges above the trace's floor with all of its influence.
    """
    layers, tokens, heads = trace.heads.shape
    influence = trace.heads.numpy()
    components = np.concatenate([influence.transpose(1, 0, 2).reshape(tokens, -1), trace.ffn.numpy().T], 1).astype(
        np.float32
    )
    begins, goes_on, starts = word_start(word), later(word), first_of_several(word)
    everyone = np.arange(tokens)
    layer, query, key, head, importance = _all_sub_edges(trace)
    cell = (layer * tokens + query) * heads + head
    age = query - key
    shape = (layers, tokens, heads)
    patterns = np.zeros((len(PATTERNS), layers, heads), np.int64)
    for number, chosen in enumerate(
        (age == 0, age == 1, age == 2, age == 3, key == 0, (key >= begins[query]) & (age > 0))
    ):
        most = np.bincount(cell[chosen], importance[chosen], influence.size).reshape(shape) > HALF * influence
        patterns[number] = most[:, goes_on if PATTERNS[number] == "same word" else everyone > 0].sum(1)
    strong = np.zeros(influence.size, bool)
    strong[cell[importance > threshold]] = True
    active = strong.reshape(shape).sum(1)
    received = np.bincount(key[age > 0], importance[age > 0], tokens)
    after = tokens - 1 - everyone
    return Observed(
        **vars(follow(trace.route(-1, threshold), word, heads)),
        components=components,
        received=(received / np.maximum(after, 1)).astype(np.float32),
        active=active,
        patterns=patterns,
        quiet=(influence[:, starts] <= LOW).sum(1),
    )


def _all_sub_edges(trace: Trace) -> tuple[np.ndarray, ...]:
    """Layer, query, key, head and importance of all sub-edges with a known head."""
    everyone = np.arange(len(trace.tokens))
    found = [trace.sub_edges(layer, everyone) for layer in range(trace.n_layers)]
    layer = np.repeat(np.arange(trace.n_layers), [len(part[0]) for part in found])
    query, key, head, importance = (np.concatenate(column) for column in zip(*found, strict=True))
    known = head >= 0
    return layer[known], query[known], key[known], head[known], importance[known].astype(np.float64)
