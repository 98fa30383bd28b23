"""What a corpus leaves behind: sums over positions, per domain; nothing of them grows with the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from flowroutes_fast.corpora.words import first_of_several, later, word_start

if TYPE_CHECKING:
    from flowroutes_fast.results.trace import Trace

PATTERNS = ("same token", "previous token", "two before", "three before", "first token", "same word")
HALF, LOW = 0.5, 0.005  # the paper's: of a head's influence; overall influence


@dataclass
class Statistics:
    """Counts and sums over the positions of one domain's texts (position 0, where there is nothing before, is left out of the patterns).

    ``total`` and ``squares`` ``[component]`` float64 over ``positions``; components are all heads, layer by layer, then all FFNs.
    ``active [layer, head]``: positions with a sub-edge above the threshold; ``in_routes``: texts whose route has the head.
    ``patterns [pattern, layer, head]``: positions where more than half of the head's influence is on that place;
    ``same word``: later subwords where it is on earlier subwords of the word; ``quiet``: first subwords with an influence of at most 0.005.
    """

    shape: tuple[int, int]  # layers, heads
    positions: int = 0
    texts: int = 0
    after_first: int = 0
    later: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        layers, heads = self.shape
        self.total, self.squares = np.zeros(layers * heads + layers), np.zeros(layers * heads + layers)
        self.active, self.in_routes, self.quiet = (np.zeros(self.shape, np.int64) for _ in range(3))
        self.patterns = np.zeros((len(PATTERNS), *self.shape), np.int64)

    def add(self, found: Observed) -> None:
        """Count one text in."""
        self.positions += len(found.components)
        self.texts += 1
        self.total += found.components.sum(0, dtype=np.float64)
        self.squares += np.square(found.components, dtype=np.float64).sum(0)
        self.active += found.active
        self.in_routes += found.in_route
        self.patterns += found.patterns
        self.quiet += found.quiet
        self.after_first += len(found.components) - 1
        self.later += found.later
        self.first += found.first

    def merge(self, other: Statistics) -> None:
        if self.shape != other.shape:
            raise ValueError(f"statistics of different models: {self.shape} and {other.shape} layers and heads")
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ARRAYS:
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
        """One row per head: ``layer, head, importance, active, in_routes``, the share of positions of every pattern, and ``quiet``."""
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


@dataclass
class Observed:
    """What one traced text says; see :class:`Statistics`."""

    components: np.ndarray  # [position, component] float32
    received: np.ndarray  # [position]: importance of sub-edges from it into later positions, mean over those, summed over layers
    active: np.ndarray
    in_route: np.ndarray
    patterns: np.ndarray
    quiet: np.ndarray
    later: int
    first: int
    edges: pd.DataFrame  # of the last position's route


def observe(trace: Trace, word: np.ndarray, threshold: float) -> Observed:
    """Evaluate a trace. ``word [token]``: number of the word of each token, -1 for none (:func:`flowroutes_fast.corpora.words.words`).

    Patterns compare a head's sub-edges above the trace's floor with all of its influence.
    """
    layers, tokens, heads = trace.heads.shape
    influence = trace.heads.numpy()
    components = np.concatenate([influence.transpose(1, 0, 2).reshape(tokens, -1), trace.ffn.numpy().T], 1).astype(np.float32)
    in_route = np.zeros((layers, heads), np.int64)
    begins, goes_on, starts = word_start(word), later(word), first_of_several(word)
    everyone = np.arange(tokens)
    layer, query, key, head, importance = _all_sub_edges(trace)
    cell = (layer * tokens + query) * heads + head
    age = query - key
    shape = (layers, tokens, heads)
    patterns = np.zeros((len(PATTERNS), layers, heads), np.int64)
    for number, chosen in enumerate((age == 0, age == 1, age == 2, age == 3, key == 0, (key >= begins[query]) & (age > 0))):
        most = np.bincount(cell[chosen], importance[chosen], influence.size).reshape(shape) > HALF * influence
        patterns[number] = most[:, goes_on if PATTERNS[number] == "same word" else everyone > 0].sum(1)
    strong = np.zeros(influence.size, bool)
    strong[cell[importance > threshold]] = True
    active = strong.reshape(shape).sum(1)
    received = np.bincount(key[age > 0], importance[age > 0], tokens)
    edges = trace.route(-1, threshold).edges
    of_heads = edges[(edges["kind"] == "attention") & (edges["head"] >= 0)]
    in_route[of_heads["layer"].to_numpy(), of_heads["head"].to_numpy()] = 1
    after = tokens - 1 - everyone
    return Observed(
        components, (received / np.maximum(after, 1)).astype(np.float32), active, in_route, patterns,
        (influence[:, starts] <= LOW).sum(1), int(goes_on.sum()), int(starts.sum()), edges,
    )  # fmt: skip


def _all_sub_edges(trace: Trace) -> tuple[np.ndarray, ...]:
    """Layer, query, key, head and importance of all sub-edges with a known head."""
    everyone = np.arange(len(trace.tokens))
    found = [trace.sub_edges(layer, everyone) for layer in range(trace.n_layers)]
    layer = np.repeat(np.arange(trace.n_layers), [len(part[0]) for part in found])
    query, key, head, importance = (np.concatenate(column) for column in zip(*found, strict=True))
    known = head >= 0
    return layer[known], query[known], key[known], head[known], importance[known].astype(np.float64)
