"""A route as an attribution graph in the JSON of circuit-tracer and Neuronpedia. circuit-tracer itself is not needed to
write it.

Their graphs join components, a route's edges join states. So every head and FFN of the route becomes a node at the
position it writes to, and a link from component c to component d carries the share of what d reads that c supplied,
passed on by residual connections:

    share(c in y) = Σ over edges into y of importance(edge) · [c is the edge's component, or share(c in the source) if
    it is a residual]

A head that reads several positions takes the mean over its sub-edges, weighted by their importance. Shares of parts
that are not in the route are missing: the links into a node sum to at most 1.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowroutes_fast.system.documents import a_list, parse, plain_file
from flowroutes_fast.system.errors import DamagedFile
from flowroutes_fast.system.files import write_text

if TYPE_CHECKING:
    from flowroutes_fast.results.route import Route

SCHEMA_VERSION = 1
METADATA = "graph-metadata.json"
PINNED = 8  # components that the page shows as a subgraph when it is opened
RESIDUAL = ("attention_residual", "ffn_residual")
Shares = dict["Component", float]


class Component(NamedTuple):
    """A node of the written graph: ``kind`` (embedding, head, mixer, ffn or logit), layer (-1: embedding), head,
    position.
    """

    kind: str
    layer: int
    head: int
    position: int


def write_graph(
    route: Route, path: str | os.PathLike[str], *, slug: str | None = None, min_weight: float = 0.005
) -> Path:
    """Write ``{slug}.json`` and an entry in ``graph-metadata.json`` into a folder, where circuit-tracer's server finds
    them.

    Args:
        path: the folder, or a file name ending in ``.json`` whose stem is the slug.
        slug: name of the graph (letters, digits, ``-`` and ``_``); by default made of the prompt.
        min_weight: links with a smaller weight are left out.

    Returns:
        The written graph file.

    Raises:
        ValueError: a slug with other characters; a ``graph-metadata.json`` that is not one. OSError: a folder that
            cannot be written to.
    """
    path = Path(path)
    if path.suffix == ".json":
        folder, slug = path.parent, slug or path.stem
    else:
        folder = path
    if slug is None:
        slug = re.sub(r"[^a-z0-9]+", "-", "".join(route.tokens).lower()).strip("-")[:60].strip("-") or "route"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", slug):
        raise ValueError(f"slug {slug!r} may hold letters, digits, '-' and '_' only")
    if not 0 <= min_weight < 1:
        raise ValueError(f"min_weight must lie in [0, 1), got {min_weight}")
    graph = graph_of(route, slug, min_weight)
    folder.mkdir(parents=True, exist_ok=True)
    listed = _listed(folder / METADATA)
    listed["graphs"] = [known for known in listed["graphs"] if known.get("slug") != slug] + [graph["metadata"]]
    written = write_text(folder / f"{slug}.json", json.dumps(graph, ensure_ascii=False, indent=1, allow_nan=False))
    write_text(folder / METADATA, json.dumps(listed, ensure_ascii=False, indent=1, allow_nan=False))
    return written


def _listed(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"graphs": []}
    try:
        found = parse(plain_file(path, "list of graphs").read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(known, dict) for known in a_list("graphs", found.get("graphs"))):
            return found
    except (DamagedFile, UnicodeDecodeError):
        pass
    raise ValueError(f"'{path}' is there but lists no graphs: give another folder")


def graph_of(route: Route, slug: str, min_weight: float = 0.005) -> dict[str, Any]:
    """The graph as the dictionary that is written; see :func:`write_graph`."""
    into = _edges_by_state(route)
    read = _shares(route, into)
    links = [
        (source, target, weight)
        for target, shares in read.items()
        for source, weight in shares.items()
        if abs(weight) >= min_weight
    ]
    influence = _influence(read)
    used = {component for source, target, _ in links for component in (source, target)}
    used |= {component for component in read if component.kind == "logit"}
    used |= {Component("embedding", -1, -1, position) for position in range(len(route.tokens))}
    ordered = sorted(used, key=lambda c: (c.layer, c.kind, c.head, c.position))
    ids = {component: _node_id(component, number) for number, component in enumerate(ordered)}
    kept = _cumulative(influence, ordered)
    nodes = [
        _node(route, component, number, ids[component], influence, kept) for number, component in enumerate(ordered)
    ]
    metadata = {
        "slug": slug,
        "scan": route.model,
        "transcoder_list": [],
        "prompt_tokens": list(route.tokens),
        "prompt": "".join(route.tokens),
        "node_threshold": None,
        "schema_version": SCHEMA_VERSION,
    }
    root = ids[next(component for component in reversed(ordered) if component.kind == "logit")]
    first = [ids[c] for c in sorted(kept, key=lambda c: kept[c])[:PINNED]]  # the most influential heads and FFNs
    params: dict[str, Any] = {
        "pinnedIds": [*first, root],
        "supernodes": [],
        "linkType": "both",
        "clickedId": root,
        "sg_pos": "",
    }
    arrows = [{"source": ids[source], "target": ids[target], "weight": weight} for source, target, weight in links]
    return {"metadata": metadata, "qParams": params, "nodes": nodes, "links": arrows}


class _Edge(NamedTuple):
    kind: str
    source: str  # state
    head: int
    position: int  # of the target
    layer: int
    importance: float


def _edges_by_state(route: Route) -> dict[str, list[_Edge]]:
    """The route's edges by the state they enter; flows are divided by what enters their state."""
    into: dict[str, list[_Edge]] = defaultdict(list)
    for layer, kind, source, target, head, importance in route._rows():
        start, end = route.nodes_of(layer, kind, source, target)
        into[end].append(_Edge(kind, start, head, target, layer, importance))
    if route.rule == "flow":
        for state, edges in into.items():
            total = sum(abs(edge.importance) for edge in edges)
            into[state] = [edge._replace(importance=edge.importance / total if total else 0.0) for edge in edges]
    return into


def _component(edge: _Edge) -> Component:
    kind = "head" if edge.kind == "attention" else edge.kind
    return Component(kind, edge.layer, edge.head if kind == "head" else -1, edge.position)


def _shares(route: Route, into: dict[str, list[_Edge]]) -> dict[Component, Shares]:
    """For every component of the route, and every root's logit, what supplied the state that it reads."""
    content: dict[str, Shares] = {}  # state -> what it is made of
    read: dict[Component, Shares] = {}
    weight: dict[Component, float] = defaultdict(float)

    def supplied(state: str) -> Shares:
        if state not in content:  # an embedding, or a state that nothing in the route enters
            name, position = state.split("_")
            content[state] = {Component("embedding", -1, -1, int(position)): 1.0} if name == "X0" else {}
        return content[state]

    def order(state: str) -> tuple[int, bool]:
        return int(state[1:].split("_")[0]), state[0] == "I"

    for state in sorted(into, key=order):
        made: Shares = defaultdict(float)
        for edge in into[state]:
            below = supplied(edge.source)
            if edge.kind in RESIDUAL:
                for component, share in below.items():
                    made[component] += edge.importance * share
                continue
            component = _component(edge)
            made[component] += edge.importance
            weight[component] += abs(edge.importance)
            reads = read.setdefault(component, defaultdict(float))
            for origin, share in below.items():
                reads[origin] += abs(edge.importance) * share
        content[state] = dict(made)
    found = {
        c: {origin: share / weight[c] for origin, share in reads.items()} if weight[c] else {}
        for c, reads in read.items()
    }
    for position, root in zip(route.positions, route.roots, strict=True):
        found[Component("logit", route.n_layers, -1, position)] = supplied(root)
    return found


def _influence(read: dict[Component, Shares]) -> dict[Component, float]:
    """Share of the roots that passes through each component."""
    found: dict[Component, float] = defaultdict(float)
    roots = [component for component in read if component.kind == "logit"]
    for component in roots:
        found[component] = 1 / len(roots)
    order = {"embedding": 0, "head": 1, "mixer": 1, "ffn": 2, "logit": 3}
    for component in sorted(read, key=lambda c: (c.layer, order[c.kind]), reverse=True):
        for origin, share in read[component].items():
            found[origin] += found[component] * abs(share)
    return dict(found)


def _cumulative(influence: dict[Component, float], used: list[Component]) -> dict[Component, float]:
    """What circuit-tracer's pruning slider compares: the share of all influence held by the node and those with
    more.
    """
    inner = sorted((c for c in used if c.kind not in ("embedding", "logit")), key=lambda c: -influence.get(c, 0.0))
    total, running, found = sum(influence.get(c, 0.0) for c in inner), 0.0, {}
    for component in inner:
        running += influence.get(component, 0.0)
        found[component] = min(running / total, 1.0) if total else 1.0
    return found


def _node_id(component: Component, number: int) -> str:
    layer = "E" if component.kind == "embedding" else component.layer
    return f"{layer}_{number}_{component.position}"


_TYPES = {"embedding": "embedding", "head": "attention head", "mixer": "mixer", "ffn": "ffn", "logit": "logit"}


def _node(
    route: Route,
    component: Component,
    number: int,
    node_id: str,
    influence: dict[Component, float],
    kept: dict[Component, float],
) -> dict[str, Any]:
    kind, layer, head, position = component
    token = route.tokens[position]
    clerp, probability, last = "", 0.0, position == len(route.tokens) - 1
    if kind == "logit":
        known = route.prediction[0] if last and route.prediction else None
        probability = known[1] if known else 0.0
        clerp = f'Output "{known[0]}" (p={probability:.3f})' if known else f'After "{token}" (p={probability:.3f})'
    elif kind == "head":
        clerp = f'L{layer}H{head} to "{token}"' if head >= 0 else f'L{layer}, heads below the floor, to "{token}"'
    elif kind != "embedding":
        clerp = f'{kind.upper() if kind == "ffn" else kind} {layer} at "{token}"'
    return {
        "node_id": node_id,
        "feature": number,
        "layer": "E" if kind == "embedding" else str(layer),
        "ctx_idx": position,
        "feature_type": _TYPES[kind],
        "token_prob": probability,
        "is_target_logit": kind == "logit" and last,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{node_id}-0",
        "clerp": clerp,
        "influence": kept.get(component),
        "activation": influence.get(component),
    }
