"""Top-down extraction of a route from a trace (the paper's algorithm 1), and of one cut by flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flowroutes_fast.results.edges import EdgeRows, EdgeTable, after_ffn, same_token_parts
from flowroutes_fast.results.flow import connected, push, strongest
from flowroutes_fast.results.route import Route

if TYPE_CHECKING:
    from flowroutes_fast.results.trace import Trace


def open_rows(trace: Trace, layer: int, active: np.ndarray, threshold: float, renormalize: bool) -> np.ndarray:
    """Those of the rows ``active`` (sorted) where the certified intervals do not say what is above the threshold."""
    if (
        renormalize
        and trace.measure != "signed"
        and np.array_equal(
            trace.values("normaliser_low", layer, active), trace.values("normaliser_high", layer, active)
        )
    ):
        return active[:0]  # evaluated whole
    below, above = trace.factors(layer, active)
    query, key, head, value = trace.sub_edges(layer, active)
    row = np.searchsorted(active, query)
    found = np.zeros(len(active), bool)

    def check(row: np.ndarray | slice, low: np.ndarray, high: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):  # 0 · infinity: nothing is above no threshold
            inside = (low * below[row] <= threshold) & (high * above[row] > threshold)
        found[row] |= inside if isinstance(row, slice) else False
        if not isinstance(row, slice):
            found[row[inside]] = True

    everyone = slice(None)
    for part in same_token_parts(trace, layer, active):
        check(everyone, part.importance, part.importance)
    if renormalize:
        bias = trace.values("attention_bias", layer, active)
        check(everyone, bias, bias)
        named = head >= 0
        check(row[named], value[named].astype(np.float64), value[named].astype(np.float64))
    else:
        pair, inverse = np.unique(query * len(trace.tokens) + key, return_inverse=True)
        known = np.bincount(inverse, weights=value * (head >= 0), minlength=len(pair))
        check(
            np.searchsorted(active, pair // len(trace.tokens)),
            known,
            known + np.bincount(inverse, weights=value * (head < 0), minlength=len(pair)),
        )
    return active[found]


def extract(trace: Trace, positions: Sequence[int], threshold: float, renormalize: bool) -> Route:
    """Follow edges downwards from the last states of ``positions`` while their importance is > ``threshold``
    (strictly).

    ``renormalize=True`` (the paper's experiments): per node, every part ≤ threshold is dropped, the survivors are
    divided by their sum. ``renormalize=False``: sub-edges are summed over heads first and the (source, target) sums are
    thresholded; the table then lists all sub-edges of the pairs that pass; from a certified trace, those too small to
    be evaluated as one row with head -1. The bias part takes part in normalisation but is no edge. Signed flows are
    compared, and renormalised, by absolute value. Where a certified trace leaves a decision open, it is asked to refine
    it (:meth:`Trace.decide`).
    """
    found = EdgeTable()
    active = np.unique(np.asarray(positions, np.int64))
    for layer in reversed(range(trace.n_layers)):
        if not len(active):
            break
        trace.reach(layer, active)
        if trace.shapes[layer] != "parallel":
            active = _ffn_node(found, layer, active, after_ffn(trace, layer, active), threshold, renormalize)
        active = _attention_node(found, trace, layer, active, threshold, renormalize)
    return _route(trace, positions, threshold, found, renormalize=renormalize)


def by_flow(trace: Trace, positions: Sequence[int], threshold: float | None, keep: float | None) -> Route:
    """The edges with the most flow (see :mod:`flowroutes_fast.results.flow`) that hang together with a root;
    ``importance`` is their flow.
    """
    _, flows, _ = push(trace, positions)
    limit = strongest(flows, keep) if keep is not None else threshold
    assert limit is not None
    found = EdgeTable()
    for layer, part in connected(trace, flows, positions, limit):
        found.add(layer, part.kind, part.source, part.target, part.head, part.importance)
    return _route(trace, positions, limit, found, rule="flow", keep=keep, renormalize=True)


def _route(trace: Trace, positions: Sequence[int], threshold: float, found: EdgeTable, **known: Any) -> Route:
    last = max(positions)
    return Route(
        tokens=list(trace.tokens),
        position=last,
        positions=tuple(sorted(set(positions))),
        threshold=threshold,
        model=trace.model,
        shapes=list(trace.shapes),
        edges=found.table(),
        prediction=list(trace.prediction) if last == len(trace.tokens) - 1 else [],
        measure=trace.measure,
        token_ids=list(trace.token_ids),
        inputs=dict(trace.inputs),
        chat=list(trace.chat),
        **known,
    )


def _ffn_node(
    found: EdgeTable, layer: int, active: np.ndarray, parts: list[EdgeRows], threshold: float, renormalize: bool
) -> np.ndarray:
    """The node after the FFN; returns the positions whose state after attention is reached."""
    kept = [np.abs(part.importance) > threshold for part in parts]
    total = np.sum([np.abs(part.importance) * keep for part, keep in zip(parts, kept, strict=True)], axis=0)
    for part, keep in zip(parts, kept, strict=True):
        value = part.importance[keep] / total[keep] if renormalize else part.importance[keep]
        found.add(layer, part.kind, active[keep], active[keep], -1, value)
    return active[np.logical_or.reduce(kept)]


def _attention_node(
    found: EdgeTable, trace: Trace, layer: int, active: np.ndarray, threshold: float, renormalize: bool
) -> np.ndarray:
    """The node after attention (in a parallel block: after the block); returns the source positions."""
    if not len(active):
        return active
    if trace.precision == "certified" and len(undecided := open_rows(trace, layer, active, threshold, renormalize)):
        trace.decide(layer, undecided)
    query, key, head, value = trace.sub_edges(layer, active)
    alone = same_token_parts(trace, layer, active)
    constant = trace.values("attention_bias", layer, active)
    if renormalize:
        keep = (np.abs(value) > threshold) & (head >= 0)
    else:
        value = np.where(head < 0, value / 2, value)  # the middle of what a pair's other heads may have
        unique, inverse = np.unique(query * len(trace.tokens) + key, return_inverse=True)
        keep = np.abs(np.bincount(inverse, weights=value, minlength=len(unique))[inverse]) > threshold
    keep = np.flatnonzero(keep)
    keep = keep[np.lexsort((head[keep], key[keep], query[keep]))]  # in this order however the rows were evaluated
    query, key, head, value = query[keep], key[keep], head[keep], value[keep].astype(np.float64)
    row = np.searchsorted(active, query)
    total = np.ones(len(active))
    if renormalize:
        biases = np.abs(constant) * (np.abs(constant) > threshold)
        total = np.bincount(row, weights=np.abs(value), minlength=len(active)) + biases
        total += np.sum([np.abs(p.importance) * (np.abs(p.importance) > threshold) for p in alone], axis=0)
    found.add(layer, "attention", key, query, head, value / total[row])
    sources = [key]
    for part in alone:
        kept = np.abs(part.importance) > threshold
        found.add(layer, part.kind, active[kept], active[kept], -1, part.importance[kept] / total[kept])
        sources.append(active[kept])
    return np.unique(np.concatenate(sources)).astype(np.int64)
