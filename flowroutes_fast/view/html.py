"""A route as a self-contained page: the graph drawn as SVG by the template, with a little JavaScript for hovering."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich.cells import cell_len

from flowroutes_fast.system.escape import printable
from flowroutes_fast.view.text import clip, head_name, rule_text, show_token, states_of, strongest_edges

if TYPE_CHECKING:
    from flowroutes_fast.results.route import Route

KINDS = {
    "attention": "attention",
    "mixer": "mixer without attention weights (sources unknown)",
    "attention_residual": "residual connection around attention",
    "ffn": "FFN",
    "ffn_residual": "residual connection around the FFN",
}
_ORDER = list(reversed(KINDS))
ATTENTION_SHARE = 0.56  # of a sequential layer's height
BOW = 9.0  # px by which FFN (right) and same-token attention (left) bend away from the residual stream
LABEL_CELLS = 16
RIGHT = 34.0  # px beside the last column
NARROWEST = 250.0  # px
CELL = 6.8  # px of a label's character
SLANT = math.radians(52)

_Node = tuple[str, int, int]  # "X" or "A", level (X) or layer (A), position


@dataclass
class _Layout:
    """Coordinates in px: columns of tokens, layers upwards."""

    dx: float
    dy: float
    left: float
    top: float
    n_layers: int
    parallel: list[bool]
    labels: list[str]
    slanted: bool
    chat: bool = False  # its messages are named between the graph and the labels

    @property
    def bottom(self) -> float:
        return self.top + self.n_layers * self.dy

    @property
    def low(self) -> float:
        """From where numbers and labels are written."""
        return self.bottom + (15 if self.chat else 0)

    @property
    def width(self) -> float:
        return max(self.left + (len(self.labels) - 1) * self.dx + RIGHT, NARROWEST)

    @property
    def height(self) -> float:
        longest = max(cell_len(label) for label in self.labels) * CELL
        return self.low + 34 + (longest * math.sin(SLANT) + 8 if self.slanted else 10)

    def at(self, node: _Node) -> tuple[float, float]:
        state, level, position = node
        height = level + (ATTENTION_SHARE if state == "A" else 0)
        return self.left + position * self.dx, self.bottom - height * self.dy


def _layout(route: Route) -> _Layout:
    n = len(route.tokens)
    labels = [clip(show_token(token), LABEL_CELLS) for token in route.tokens]
    dx = 51.0 if n <= 18 else 42.0 if n <= 40 else 30.0
    lengths = [cell_len(label) * CELL for label in labels]
    slanted = max(lengths) > dx - 4 and n > 1
    share = math.cos(SLANT) if slanted else 0.5
    reach = max(length * share - i * dx for i, length in enumerate(lengths))
    left = max(30.0, 14 + reach)
    left += max(NARROWEST - RIGHT - left - (n - 1) * dx, 0) / 2
    dy = min(72.0, max(36.0, 900 / max(route.n_layers, 1)))
    parallel = [shape == "parallel" for shape in route.shapes]
    return _Layout(dx, dy, left, 52.0, route.n_layers, parallel, labels, slanted, bool(route.chat))


def _ends(route: Route, layer: int, kind: str, source: int, target: int) -> tuple[_Node, _Node]:
    parallel = route.shapes[layer] == "parallel"
    if kind.startswith("ffn"):
        return ("X", layer, source) if parallel else ("A", layer, source), ("X", layer + 1, target)
    return ("X", layer, source), ("X", layer + 1, target) if parallel else ("A", layer, target)


def _node_name(node: _Node) -> str:
    state, level, position = node
    return f"A{level}_{position}" if state == "A" else f"I{level - 1}_{position}" if level else f"X0_{position}"


def _node_text(node: _Node) -> str:
    state, level, _ = node
    if state == "A":
        return f"residual stream after the attention of layer {level}"
    return f"residual stream after layer {level - 1}" if level else "token embedding"


def _path(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    """An edge's line: straight up for residual connections, bowed for FFN and same-token attention, an S across
    positions.
    """
    (x0, y0), (x1, y1) = start, end
    rise = y0 - y1
    if x0 != x1:
        return f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 - 0.75 * rise:.1f} {x1:.1f} {y1 + 0.75 * rise:.1f} {x1:.1f} {y1:.1f}"
    if kind.endswith("residual"):
        return f"M{x0:.1f} {y0:.1f}V{y1:.1f}"
    bow = x0 + (BOW if kind == "ffn" else -BOW) * 4 / 3
    return f"M{x0:.1f} {y0:.1f}C{bow:.1f} {y0 - 0.15 * rise:.1f} {bow:.1f} {y1 + 0.15 * rise:.1f} {x1:.1f} {y1:.1f}"


def _heads(route: Route) -> dict[tuple[int, int, int], list[tuple[str, float]]]:
    """(layer, source, target) → the heads of that pair with their importance, strongest first."""
    edges = route.edges[route.edges["kind"] == "attention"].sort_values(
        "importance", ascending=False, kind="stable", key=abs
    )
    result: dict[tuple[int, int, int], list[tuple[str, float]]] = {}
    columns = [edges[name].tolist() for name in ("layer", "source", "target", "head", "importance")]
    for layer, source, target, head, importance in zip(*columns, strict=True):
        result.setdefault((layer, source, target), []).append((head_name(layer, head), round(importance, 5)))
    return result


def _title(route: Route, edge: dict[str, Any]) -> str:
    names = [f"{show_token(route.tokens[edge[end]])}@{edge[end]}" for end in ("source", "target")]
    where = " → ".join(names) if edge["kind"] == "attention" else names[1]
    heads = ", ".join(f"{head} {importance:.3f}" for head, importance in edge["heads"])
    return (
        f"{where}, layer {edge['layer']}, {KINDS[edge['kind']]} "
        f"{edge['importance']:.3f}{f' ({heads})' if heads else ''}"
    )


def _edges(route: Route, layout: _Layout, index: dict[_Node, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The token edges twice: what the template draws (in drawing order), and what the page's script reads."""
    heads = _heads(route)
    columns = [route.token_edges[name].tolist() for name in ("layer", "kind", "source", "target", "importance")]
    rows = sorted(zip(*columns, strict=True), key=lambda row: (_ORDER.index(row[1]), abs(row[4])))
    drawn, data = [], []
    for layer, kind, source, target, importance in rows:
        start, end = _ends(route, layer, kind, source, target)
        own = heads.get((layer, source, target), []) if kind == "attention" else []
        edge = {
            "kind": kind,
            "layer": layer,
            "source": source,
            "target": target,
            "importance": round(importance, 5),
            "heads": own,
        }
        data.append({**edge, "from": index[start], "to": index[end]})
        at = layout.at(start), layout.at(end)
        mark = (at[0][0] + BOW, (at[0][1] + at[1][1]) / 2) if kind == "ffn" else None
        strength = min(abs(importance), 1.0)
        drawn.append(
            {
                "kind": ("residual" if kind.endswith("residual") else kind) + (" negative" if importance < 0 else ""),
                "path": _path(kind, *at),
                "width": round(0.5 + 5 * math.sqrt(strength), 2),
                "opacity": round(0.4 + 0.55 * math.sqrt(strength), 2),
                "mark": mark,
                "size": round(3.5 + 6.5 * math.sqrt(strength), 1),
                "title": _title(route, edge),
            }
        )
    return drawn, data


def _nodes(route: Route, layout: _Layout) -> list[dict[str, Any]]:
    outer, inner = states_of(route)
    nodes: list[_Node] = [*(("X", *at) for at in outer), *(("A", *at) for at in inner)]
    nodes.sort(key=lambda node: (-layout.at(node)[1], node[2]))
    roots = {("X", route.n_layers, position) for position in route.positions}
    return [
        {
            "node": node,
            "x": layout.at(node)[0],
            "y": layout.at(node)[1],
            "kind": "root" if node in roots else node[0],
            "name": _node_name(node),
            "text": _node_text(node),
            "position": node[2],
        }
        for node in nodes
    ]


def _tokens(route: Route, layout: _Layout, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    touched = {node["position"] for node in nodes}
    embedded = {node["position"] for node in nodes if node["node"][1] == 0}
    return [
        {
            "x": layout.left + position * layout.dx,
            "label": layout.labels[position],
            "shown": show_token(token),
            "breaks": token.count("\n"),
            "touched": position in touched,
            "embedded": position in embedded,
            "root": position in route.positions,
            **_message(route, position),
        }
        for position, token in enumerate(route.tokens)
    ]


ROLES = ("system", "user", "assistant")  # of a chat's messages, those with a colour of their own


def _message(route: Route, position: int) -> dict[str, Any]:
    """What a token is in a chat: its ``role`` ("template" for what the template adds, "" where there is no chat), and
    whether a message ``begins``, or such a stretch of the template."""
    if not route.chat:
        return {"role": "", "begins": False, "colour": 3}
    role, first = "template", next((stop for _, _, stop in reversed(route.chat) if stop <= position), 0)
    for name, start, stop in route.chat:
        if start <= position < stop:
            role, first = printable(name), start
    return {"role": role, "begins": position == first, "colour": ROLES.index(role) if role in ROLES else 3}


def _messages(route: Route, layout: _Layout, tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars below a chat's tokens."""
    return [
        {
            "role": tokens[first]["role"],
            "colour": tokens[first]["colour"],
            "first": first,
            "last": stop - 1,
            "x": tokens[first]["x"] - layout.dx / 2 + 3,
            "width": (stop - first) * layout.dx - 6,
        }
        for _, first, stop in route.chat
    ]


def _folding(route: Route, layout: _Layout, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script needs to leave out the template's tokens that the route does not touch."""
    template = [i for i, token in enumerate(tokens) if token["role"] == "template" and not token["touched"]]
    return {"dx": layout.dx, "width": round(layout.width, 1), "template": template, "root": route.position}


@cache
def _template(name: str) -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["printable"] = printable
    return environment.get_template(name)


def route_html(route: Route) -> str:
    """A page that draws ``route`` without anything from the network; the graph also shows where JavaScript is off."""
    layout = _layout(route)
    nodes = _nodes(route, layout)
    edges, edge_data = _edges(route, layout, {node["node"]: i for i, node in enumerate(nodes)})
    tokens = _tokens(route, layout, nodes)
    node_data = [{key: node[key] for key in ("name", "text", "position")} for node in nodes]
    crossing = route.edges[(route.edges["kind"] == "attention") & (route.edges["source"] != route.edges["target"])]
    counts = route.edges["kind"].value_counts()
    return _template("route.html.j2").render(
        route=route,
        layout=layout,
        tokens=tokens,
        nodes=nodes,
        edges=edges,
        root=layout.at(("X", route.n_layers, route.position)),
        root_tokens=[(show_token(route.tokens[position]), position) for position in route.positions],
        rule=rule_text(route),
        prediction=[(show_token(text), p) for text, p in route.prediction],
        counts=[(kind, int(counts[kind])) for kind in KINDS if kind in counts],
        crossing=len(crossing),
        strongest=list(strongest_edges(route, 12, across=True).itertuples(index=False, name=None)),
        messages=_messages(route, layout, tokens),
        data={
            "tokens": [token["shown"] for token in tokens],
            "kinds": KINDS,
            "nodes": node_data,
            "edges": edge_data,
            "chat": _folding(route, layout, tokens) if route.chat else None,
        },
    )


_STROKES = {"attention": "#0072b2", "ffn": "#d55e00", "residual": "#9aa3ae", "mixer": "#8a6d1f", "negative": "#b5179e"}


def static_picture(route: Route, numbers: list[int] | None = None) -> str:
    """The route's graph as one SVG element with colours of its own, for where no script runs; ``numbers``:
    positions to write below the tokens.
    """
    layout = _layout(route)
    nodes = _nodes(route, layout)
    edges, _ = _edges(route, layout, {node["node"]: i for i, node in enumerate(nodes)})
    for edge in edges:
        kind, _, negative = edge["kind"].partition(" ")
        edge["stroke"] = _STROKES[negative or kind]
    tokens = _tokens(route, layout, nodes)
    return _template("picture.svg.j2").render(
        route=route,
        layout=layout,
        nodes=nodes,
        edges=edges,
        tokens=tokens,
        numbers=numbers or range(len(tokens)),
        title=f"Route to {', '.join(show_token(route.tokens[p]) for p in route.positions)}, {printable(route.model)}",
    )
