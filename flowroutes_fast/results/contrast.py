"""Contrastive routes: in how many examples a head is active, and what changes from one set of prompts, or one
prompt, to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.results.route import Route
from flowroutes_fast.results.trace import Trace

THRESHOLD = 0.04
NORMAL_95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
HEAD = ["layer", "head"]
EDGE = ["layer", "query", "key", "head"]


def head_frequencies(
    traces: Sequence[Trace] | Sequence[Route], threshold: float | None = None, position: int | None = None
) -> pd.DataFrame:
    """In which share of examples a head is active: at least one of its sub-edges is in the extracted route (section 4.1
    of the paper).

    Args:
        traces: one per example; or their routes, as extracted.
        threshold: of the routes, 0.04 by default; position: what is explained, the last token by default. Routes have
            their own.

    Returns:
        A table ``layer, head, frequency, importance, n``: ``frequency`` in [0, 1], ``importance`` the head's sub-edges
        in the route summed, averaged over examples, ``n`` the number of examples. All heads of traces; of routes those
        that occur in any.

    Raises:
        ValueError: no examples, examples of different models, a threshold below a trace's floor, threshold or position
            given for routes.
    """
    routes, shape = _routes(traces, threshold, position)
    active = _active(routes, shape)
    return _frequencies(active)


def contrast(
    a: Trace | Route | Sequence[Trace] | Sequence[Route],
    b: Trace | Route | Sequence[Trace] | Sequence[Route],
    *,
    threshold: float | None = None,
    position: int | None = None,
    paired: bool = False,
) -> pd.DataFrame:
    """What differs between two sets of examples (head frequencies), or between two prompts (edges).

    Args:
        a, b: two lists of traces or of routes; or two single traces or routes of prompts with equally many tokens.
        threshold: lists of traces: of the routes, 0.04 by default. Single traces: edges above it in ``a`` or ``b`` are
            listed, by default above the larger floor of the two (at least 1e-3). Routes have their own.
        position: lists: what is explained, the last token by default. Single ones: edges into this query position
            alone; default: all.
        paired: the i-th examples of both lists belong together (a prompt and its contrast): the interval takes their
            correlation into account.

    Returns:
        Lists: ``layer, head, frequency_a, frequency_b, difference, low, high, n_a, n_b``, largest difference first. The
            difference is
        a − b; ``low ... high`` is its 95 % interval (Newcombe 1998: Wilson's intervals combined; paired: his method
        10). It holds for one head that was chosen beforehand, not for the largest of hundreds. Single ones: ``layer,
        query, key, head, importance_a, importance_b, difference``, attention sub-edges largest difference first. A
        sub-edge that one side did not keep counts as 0 there: it is at most ``table.attrs["unknown"]`` (routes: the
        threshold).

    Raises:
        ValueError: empty lists, a list against a single one, different models, different lengths of prompts (edges) or
            of paired lists, a threshold below a floor or outside [0, 1), threshold given for routes. TypeError:
            anything else than traces and routes.
        IndexError: position out of range.
    """
    single = [isinstance(x, (Trace, Route)) for x in (a, b)]
    if any(single) and not all(single):
        raise ValueError("contrast compares two lists, or two single traces or routes: one of the two is a list here")
    if all(single):
        if paired:
            raise ValueError(
                "paired= belongs to lists of examples; two single prompts are always compared edge by edge"
            )
        return _edge_differences(a, b, threshold, position)  # type: ignore[arg-type]
    (routes_a, shape_a), (routes_b, shape_b) = (_routes(x, threshold, position) for x in (a, b))  # type: ignore[arg-type]
    _same_model(routes_a[0], routes_b[0])
    if (routes_a[0].threshold, routes_a[0].rule) != (routes_b[0].threshold, routes_b[0].rule):
        raise ValueError(
            f"routes were extracted differently: threshold {routes_a[0].threshold} and {routes_b[0].threshold}"
        )
    if paired and len(routes_a) != len(routes_b):
        raise ValueError(f"paired examples come in equal numbers, got {len(routes_a)} and {len(routes_b)}")
    active_a, active_b = _active(routes_a, shape_a), _active(routes_b, shape_b)
    heads = sorted(set(active_a) | set(active_b))
    x, y = (np.zeros((len(heads), len(routes)), bool) for routes in (routes_a, routes_b))
    for i, head in enumerate(heads):
        for rows, active in ((x, active_a), (y, active_b)):
            if head in active:
                rows[i] = active[head] != 0
    low, high = difference_interval(x, y, paired)
    table = pd.DataFrame(heads, columns=HEAD).astype(int)
    p, q = x.mean(1), y.mean(1)
    table = table.assign(
        frequency_a=p, frequency_b=q, difference=p - q, low=low, high=high, n_a=len(routes_a), n_b=len(routes_b)
    )
    return _largest_first(table)


def wilson(successes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a share."""
    p, z2 = successes / n, NORMAL_95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return np.where(successes == 0, 0.0, middle - half), np.where(successes == n, 1.0, middle + half)


def difference_interval(x: np.ndarray, y: np.ndarray, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """Newcombe's 95 % interval of a difference of shares, row by row of ``x, y [row, example]`` (bool); see
    :func:`contrast`.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998), 873-890 (unpaired) and 2635-2650 (paired, with its
    continuity correction of φ).
    """
    p, q = x.mean(1), y.mean(1)
    (l1, u1), (l2, u2) = wilson(x.sum(1), x.shape[1]), wilson(y.sum(1), y.shape[1])
    correlation = _phi(x, y) if paired else np.zeros(len(x))

    def reach(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(one**2 - 2 * correlation * one * other + other**2, 0))  # type: ignore[no-any-return]

    return p - q - reach(p - l1, u2 - q), p - q + reach(u1 - p, q - l2)


def _phi(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    both, first, second = (x & y).sum(1), (x & ~y).sum(1), (~x & y).sum(1)
    neither = n - both - first - second
    top = both * neither - first * second
    top = np.where(top > 0, np.maximum(top - n / 2, 0), top)
    bottom = (both + first) * (second + neither) * (both + second) * (first + neither)
    return np.where(bottom > 0, top / np.sqrt(np.maximum(bottom, 1)), 0.0)


def _routes(examples: Any, threshold: float | None, position: int | None) -> tuple[list[Route], tuple[int, int] | None]:
    """The examples' routes, and (layers, heads) where traces tell."""
    if isinstance(examples, (Trace, Route)):
        raise ValueError("one example is no list: pass [example]")
    items = list(examples)
    if not items:
        raise ValueError("the list of examples is empty")
    kinds = {Trace if isinstance(item, Trace) else Route if isinstance(item, Route) else type(item) for item in items}
    if not kinds <= {Trace, Route}:
        raise TypeError(f"examples are traces or routes, got {sorted(k.__name__ for k in kinds - {Trace, Route})[0]}")
    if len(kinds) > 1:
        raise ValueError("examples are all traces or all routes, not both")
    for item in items:
        _same_model(items[0], item)
    if kinds == {Route}:
        if threshold is not None or position is not None:
            raise ValueError(
                "routes were extracted at a threshold and a position already; pass traces to choose others"
            )
        if len(found := {(r.threshold, r.rule, r.renormalize) for r in items}) > 1:
            raise ValueError(f"routes were extracted at different thresholds or by different rules: {sorted(found)}")
        return items, None
    wanted = THRESHOLD if threshold is None else threshold
    routes = [trace.route(-1 if position is None else position, wanted) for trace in items]
    return routes, (items[0].n_layers, items[0].n_heads)


def _same_model(a: Trace | Route, b: Trace | Route) -> None:
    if a.model != b.model or a.shapes != b.shapes:
        raise ValueError(
            f"these are of different models: {a.model} ({a.n_layers} layers) and {b.model} ({b.n_layers} layers)"
        )
    if a.measure != b.measure:
        raise ValueError(f"these are of different measures: {a.measure!r} and {b.measure!r}")


def _active(routes: list[Route], shape: tuple[int, int] | None) -> dict[tuple[int, int], np.ndarray]:
    """(layer, head) -> importance of its sub-edges in each example's route, 0 where there are none."""
    everyone = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])] if shape else []
    found = {head: np.zeros(len(routes)) for head in everyone}
    for i, route in enumerate(routes):
        sums = _attention(route).groupby(HEAD, as_index=False)["importance"].sum()
        for layer, head, importance in sums.itertuples(index=False, name=None):
            found.setdefault((layer, head), np.zeros(len(routes)))[i] = importance
    return found


def _attention(route: Route) -> pd.DataFrame:
    edges = route.edges
    return edges[(edges["kind"] == "attention") & (edges["head"] >= 0)]


def _frequencies(active: dict[tuple[int, int], np.ndarray]) -> pd.DataFrame:
    rows = [
        (*head, float((values != 0).mean()), float(values.mean()), len(values))
        for head, values in sorted(active.items())
    ]
    return pd.DataFrame(rows, columns=[*HEAD, "frequency", "importance", "n"])


def _edge_differences(
    a: Trace | Route, b: Trace | Route, threshold: float | None, position: int | None
) -> pd.DataFrame:
    if type(a) is not type(b):
        raise ValueError("a trace and a route cannot be compared; extract the route of both, or of none")
    _same_model(a, b)
    count = len(a.tokens)
    if count != len(b.tokens):
        raise ValueError(
            f"edges are compared position by position, but the prompts have {count} and {len(b.tokens)} tokens"
        )
    if position is not None and not -count <= position < count:
        raise IndexError(f"position {position} is out of range: the prompts have {count} tokens")
    if isinstance(a, Route):
        if threshold is not None:
            raise ValueError("routes were extracted at a threshold already; pass traces to choose another")
        tables = [_attention(r).rename(columns={"source": "key", "target": "query"}) for r in (a, b)]  # type: ignore[arg-type]
        unknown = max(a.threshold, b.threshold)  # type: ignore[union-attr]
    else:
        unknown = max(a.floor, b.floor)  # type: ignore[union-attr]
        threshold = max(unknown, 1e-3) if threshold is None else float(threshold)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        if threshold < unknown:
            raise ValueError(
                f"threshold {threshold} is below the floor {unknown} of these traces; trace again with "
                f"floor={threshold}"
            )
        tables = [_edges_of(t, position) for t in (a, b)]  # type: ignore[arg-type]
    sides = [
        t[[*EDGE, "importance"]].rename(columns={"importance": f"importance_{s}"})
        for t, s in zip(tables, "ab", strict=True)
    ]
    table = sides[0].merge(sides[1], how="outer", on=EDGE)
    table = table.fillna({"importance_a": 0.0, "importance_b": 0.0})
    if position is not None:
        table = table[table["query"] == position % count]
    if threshold is not None:
        table = table[(table["importance_a"].abs() > threshold) | (table["importance_b"].abs() > threshold)]
    table = _largest_first(table.assign(difference=table["importance_a"] - table["importance_b"]))
    table.attrs["unknown"] = unknown
    return table


def _edges_of(trace: Trace, position: int | None) -> pd.DataFrame:
    """All kept sub-edges of a trace."""
    count = len(trace.tokens)
    queries = np.arange(count) if position is None else np.array([position % count])
    parts = []
    for layer in range(trace.n_layers):
        query, key, head, importance = trace.sub_edges(layer, queries)
        parts.append(
            pd.DataFrame(
                {"layer": layer, "query": query, "key": key, "head": head, "importance": importance.astype(np.float64)}
            )
        )
    table = pd.concat(parts, ignore_index=True)
    return table[table["head"] >= 0]


def _largest_first(table: pd.DataFrame) -> pd.DataFrame:
    order = table["difference"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)
