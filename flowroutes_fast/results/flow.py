"""Importance as a mass that flows from the root down the whole graph: what each token supplies, and routes cut by flow.

A root has mass 1. Every node hands its mass on to the sources of its incoming edges, in proportion to their importance
(signed flow: its absolute value). The flow of an edge is (mass of its target) × (its share of what enters the target).
Parts without a source, which are the biases, take no mass; a node that nothing enters hands its mass down its own
residual stream. So the mass that arrives at the token embeddings sums to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flowroutes_fast.results.edges import EdgeRows, after_ffn, same_token_parts

if TYPE_CHECKING:
    from flowroutes_fast.results.trace import Trace


@dataclass
class Flow:
    """One layer's edges with their flow, by node: ``ffn`` after the FFN (none in a parallel block), ``attention``
    after attention.
    """

    ffn: list[EdgeRows]
    attention: list[EdgeRows]


def push(trace: Trace, positions: Sequence[int]) -> tuple[np.ndarray, list[Flow], float]:
    """Push mass 1, split evenly over the roots, down the graph.

    Returns the mass ``[token]`` that arrives at the embeddings, the flow of every stored edge per layer, and the mass
    that met sub-edges which are not stored because they are below the floor: it is given to those that are.
    """
    mass = np.zeros(len(trace.tokens))
    mass[list(positions)] = 1 / len(positions)
    flows, unresolved = [], 0.0
    for layer in reversed(range(trace.n_layers)):
        active = mass.nonzero()[0]
        trace.reach(layer, active)
        flow = Flow([], [])
        if trace.shapes[layer] != "parallel":
            _, flow.ffn, _ = _split(mass, active, after_ffn(trace, layer, active))
        query, key, head, value = trace.sub_edges(layer, active)
        value = np.where((head < 0) & (trace.measure != "signed"), value / 2, value).astype(np.float64)
        parts = [EdgeRows("attention", key, query, head, value), *same_token_parts(trace, layer, active)]
        below, flow.attention, total = _split(mass, active, parts)
        unresolved += _missing(trace, layer, active, query, value, mass, total)
        flows.append(flow)
        mass = below
    return mass, flows[::-1], unresolved


def _split(
    mass: np.ndarray, active: np.ndarray, parts: list[EdgeRows]
) -> tuple[np.ndarray, list[EdgeRows], np.ndarray]:
    """Hand the mass of the targets on to the sources: mass of the sources, the edges with their flow, what entered
    each target.
    """
    total = np.zeros(len(mass))
    for part in parts:
        total += np.bincount(part.target, weights=np.abs(part.importance), minlength=len(mass))
    rate = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
    below = np.where(total > 0, 0.0, mass)
    moved = []
    for part in parts:
        flow = np.abs(part.importance) * rate[part.target]
        below += np.bincount(part.source, weights=flow, minlength=len(mass))
        moved.append(EdgeRows(part.kind, part.source, part.target, part.head, flow))
    return below, moved, total


def _missing(
    trace: Trace,
    layer: int,
    active: np.ndarray,
    query: np.ndarray,
    value: np.ndarray,
    mass: np.ndarray,
    total: np.ndarray,
) -> float:
    """Mass at nodes of this layer that belongs to sub-edges which are not stored (known from the heads' sums;
    nothing for signed flow).
    """
    if trace.dense is not None or trace.measure == "signed":
        return 0.0
    heads = np.zeros(len(mass))
    heads[active] = trace.values("heads", layer, active).sum(-1)
    missing = np.clip(heads - np.bincount(query, weights=value, minlength=len(mass)), 0, None)
    whole = total + missing
    return float((mass * np.divide(missing, whole, out=np.zeros_like(whole), where=whole > 0)).sum())


def strongest(flows: list[Flow], keep: float) -> float:
    """The flow above which the strongest share ``keep`` of all edges with a positive flow lie (at least one edge)."""
    every = np.concatenate([part.importance for flow in flows for part in (*flow.ffn, *flow.attention)])
    every = np.sort(every[every > 0])[::-1]
    count = max(1, round(keep * len(every)))
    return float(np.nextafter(every[count - 1], 0)) if len(every) else 0.0


def connected(
    trace: Trace, flows: list[Flow], positions: Sequence[int], threshold: float
) -> list[tuple[int, EdgeRows]]:
    """Edges with a flow above ``threshold`` that hang together with a root, as (layer, edges), top-down."""
    found = []
    active = np.zeros(len(trace.tokens), bool)
    active[list(positions)] = True

    def step(layer: int, parts: list[EdgeRows], active: np.ndarray) -> np.ndarray:
        below = np.zeros_like(active)
        for part in parts:
            keep = (part.importance > threshold) & active[part.target]
            kept = EdgeRows(part.kind, part.source[keep], part.target[keep], part.head[keep], part.importance[keep])
            below[kept.source] = True
            found.append((layer, kept))
        return below

    for layer in reversed(range(trace.n_layers)):
        if flows[layer].ffn:
            active = step(layer, flows[layer].ffn, active)
        active = step(layer, flows[layer].attention, active)
    return found
