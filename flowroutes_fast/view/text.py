"""A route as a plain-text picture: tokens across, layers downwards from the embeddings to the root."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from rich.cells import cell_len, set_cell_size

from flowroutes_fast.system.escape import JOINERS, WHITESPACE, code_of, hidden, printable

if TYPE_CHECKING:
    from flowroutes_fast.results.route import Route

NARROW = 60  # terminal cells: below this the edges go under their layer instead of beside it
MARKS = {
    "│": "residual only",
    "○": "+ attention from other positions",
    "■": "+ FFN",
    "●": "+ both",
    "╰": "feeds other positions only",
    "╷": "nothing above the threshold enters",
}
_RUN = re.compile(r"([·↵⇥])\1{3,}")


def show_token(text: str) -> str:
    """``text`` with whitespace and control characters made visible: ``" to"`` → ``"·to"``; four or more in a row →
    ``"·×4"``.
    """
    if not text:
        return "∅"
    last = len(text) - 1
    shown = "".join(_show_character(c, 0 < i < last) for i, c in enumerate(text))
    return _RUN.sub(lambda run: f"{run[1]}×{len(run[0])}", shown)


def _show_character(character: str, inside: bool) -> str:
    if character in WHITESPACE:
        return WHITESPACE[character]
    if inside and character in JOINERS:
        return character
    if hidden(character):
        return code_of(character)
    return f"◌{character}" if unicodedata.category(character) in ("Mn", "Me") and not inside else character


def clip(text: str, cells: int) -> str:
    """``text`` cut to at most ``cells`` terminal cells, with ``…`` where it was cut."""
    return text if cell_len(text) <= cells else set_cell_size(text, max(cells - 1, 0)).rstrip() + "…"[:cells]


def token_name(route: Route, position: int, cells: int = 12) -> str:
    """A token and its position, without the spaces around it: ``John@4``."""
    text = route.tokens[position]
    return f"{clip(show_token(text.strip(' ') or text), cells)}@{position}"


def show_importance(value: float) -> str:
    """Two decimals without the leading zero (``.12``), three below .01, ``<.001`` below that."""
    if value < 0:
        return "-" + show_importance(-value)
    if 0 < value < 0.0005:
        return "<.001"
    return f"{value:.{2 if value >= 0.00995 or value <= 0 else 3}f}".removeprefix("0")


def head_name(layer: int, head: int) -> str:
    """``L5H3``; ``L5 rest`` for the heads of a pair that are known only as a sum."""
    return f"L{layer}H{head}" if head >= 0 else f"L{layer} rest"


def strongest_edges(route: Route, top: int = 10, *, across: bool = False) -> pd.DataFrame:
    """The ``top`` attention sub-edges: ``head`` (``"L20H3"``), ``source`` and ``target`` (``"John@4"``),
    ``importance``; strongest first.

    ``across=True`` leaves out attention of a position to itself.
    """
    edges = route.edges[route.edges["kind"] == "attention"]
    if across:
        edges = edges[edges["source"] != edges["target"]]
    edges = edges.sort_values("importance", ascending=False, kind="stable", key=abs).head(top)
    columns = {
        "head": [head_name(layer, head) for layer, head in zip(edges["layer"], edges["head"], strict=True)],
        "source": [token_name(route, position) for position in edges["source"]],
        "target": [token_name(route, position) for position in edges["target"]],
    }
    table = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    return table.assign(importance=edges["importance"].to_numpy(float))


def states_of(route: Route) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The nodes of a route, as two sets: (level, position) of layer inputs and outputs, (layer, position) after
    attention.

    Level 0 is the embedding, level l + 1 the residual stream after layer l. Parallel layers have no state after
    attention.
    """
    outer = {(route.n_layers, position) for position in route.positions}
    inner: set[tuple[int, int]] = set()
    columns = [route.token_edges[name].tolist() for name in ("layer", "kind", "source", "target")]
    for layer, kind, source, target in zip(*columns, strict=True):
        parallel = route.shapes[layer] == "parallel"
        after_attention = kind in ("ffn", "ffn_residual")
        (inner if after_attention and not parallel else outer).add((layer, source))
        if after_attention or parallel:
            outer.add((layer + 1, target))
        else:
            inner.add((layer, target))
    return outer, inner


_SubEdge = tuple[int, int, int, int, float]  # source, target, layer, head, importance


@dataclass
class _Layer:
    """What one row of the picture says: a mark per position, and the attention edges that cross positions."""

    label: str
    marks: dict[int, str]
    edges: list[_SubEdge]


def _layers(route: Route) -> list[_Layer]:
    outer, _ = states_of(route)
    rows = [_Layer("emb", {position: "│" for level, position in outer if level == 0}, [])]
    groups = dict(list(route.token_edges.groupby("layer")))
    attention = route.edges[(route.edges["kind"] == "attention") & (route.edges["source"] != route.edges["target"])]
    heads = dict(list(attention.groupby("layer")))
    for layer in range(route.n_layers):
        edges = groups.get(layer, route.token_edges.iloc[:0])
        crossing = edges[(edges["kind"] == "attention") & (edges["source"] != edges["target"])]
        ffn = set(edges.loc[edges["kind"] == "ffn", "target"])
        fed = set(crossing["target"])
        entered = set(edges["target"])
        marks = {position: "╰" for level, position in outer if level == layer}
        for position in (position for level, position in outer if level == layer + 1):
            mark = {(False, False): "│", (True, False): "○", (False, True): "■", (True, True): "●"}[
                position in fed, position in ffn
            ]
            marks[position] = mark if position in entered else "╷"
        rows.append(_Layer(f"L{layer}", marks, _sub_edges(heads.get(layer))))
    return rows


def _sub_edges(edges: pd.DataFrame | None) -> list[_SubEdge]:
    if edges is None:
        return []
    ordered = edges.sort_values("importance", ascending=False, kind="stable", key=abs)
    columns = [ordered[name].tolist() for name in ("source", "target", "layer", "head", "importance")]
    return list(zip(*columns, strict=True))


def _edge_text(route: Route, edges: list[_SubEdge], cells: int) -> str:
    """As many of ``edges`` (strongest first) as fit, heads of a pair together: ``Mary@1→to@13 L23H0 .13 L23H1 .10;
    … +2 more``.
    """
    for count in range(min(len(edges), max(cells // 8, 1)), 0, -1):
        pairs: dict[tuple[int, int], list[str]] = {}
        for source, target, layer, head, importance in edges[:count]:
            pairs.setdefault((source, target), []).append(f"{head_name(layer, head)} {show_importance(importance)}")
        shown = [
            f"{token_name(route, s, 10)}→{token_name(route, t, 10)} {' '.join(heads)}"
            for (s, t), heads in pairs.items()
        ]
        more = f" +{len(edges) - count} more" if count < len(edges) else ""
        if cell_len(line := "; ".join(shown) + more) <= cells:
            return line
    return clip(shown[0], max(cells - len(more), 1)) + more if edges else ""


def _collapsed(rows: list[_Layer]) -> list[_Layer]:
    """Join neighbouring layers that no edge crosses and whose marks are the same: ``L9–L11``."""
    result: list[_Layer] = []
    for row in rows:
        before = result[-1] if result else None
        if before and before.label != "emb" and not row.edges and not before.edges and row.marks == before.marks:
            result[-1] = _Layer(f"{before.label.split('–')[0]}–{row.label}", row.marks, [])
        else:
            result.append(row)
    return result


@dataclass
class _Columns:
    positions: list[int]
    names: list[str]
    widths: list[int]  # terminal cells, with the gap
    left_out: str

    def line(self, cells: Iterable[str]) -> str:
        return "".join(set_cell_size(cell, width) for cell, width in zip(cells, self.widths, strict=True))


def _columns(route: Route, rows: list[_Layer], room: int) -> _Columns:
    """The columns that fit into ``room`` cells: all tokens, else those the route touches, else the most used of
    these.
    """
    times: dict[int, int] = {}
    for row in rows:
        for position in row.marks:
            times[position] = times.get(position, 0) + 1
    times |= dict.fromkeys(route.positions, len(rows) + 1)
    touched = sorted(times)
    for positions, smallest in ((list(range(len(route.tokens))), 4), (touched, 3)):
        for cap in range(9, smallest - 1, -1):
            columns = _sized(route, positions, cap)
            if sum(columns.widths) <= room:
                return columns
    # a column takes two cells or more
    kept = sorted(touched, key=lambda position: -times[position])[: max(room // 2, 1) + 1]
    while len(kept) > 1 and sum(columns.widths) > room:
        kept.pop()
        columns = _sized(route, sorted(kept), 3)
        columns.left_out = (
            f"columns: the {len(kept)} most used of {len(touched)} positions on the route ({len(route.tokens)} tokens)"
        )
    return columns


def _sized(route: Route, positions: list[int], cap: int) -> _Columns:
    names = [clip(show_token(route.tokens[position]), cap) for position in positions]
    widths = [max(cell_len(name), len(str(position))) + 1 for name, position in zip(names, positions, strict=True)]
    left_out = (
        ""
        if len(positions) == len(route.tokens)
        else f"columns: the positions on the route, {len(positions)} of {len(route.tokens)}"
    )
    return _Columns(positions, names, widths, left_out)


def _wrapped(texts: list[str], width: int, separator: str = ", ") -> list[str]:
    """``texts`` joined, broken between texts into lines of at most ``width`` cells, continued with an indent."""
    lines: list[str] = []
    for i, text in enumerate(texts):
        piece = text + (separator if i < len(texts) - 1 else "")
        if lines and cell_len(lines[-1] + piece.rstrip()) <= width:
            lines[-1] += piece
        else:
            lines.append(("  " if lines else "") + piece)
    return [line.rstrip() for line in lines]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def rule_text(route: Route) -> str:
    """How the route was cut, in words."""
    if route.rule == "flow":
        return f"flow above {route.threshold:.2g}" + (
            f" (the strongest {100 * route.keep:g} %)" if route.keep is not None else ""
        )
    return f"threshold {route.threshold:g}, " + (
        "importances renormalized per node" if route.renormalize else "not renormalized"
    )


def _header(route: Route, width: int) -> list[str]:
    about = [
        printable(route.model),
        _count(len(route.tokens), "token"),
        _count(route.n_layers, "layer"),
        rule_text(route),
    ]
    about += ["signed flow"] if route.measure == "signed" else []
    counts = route.edges["kind"].value_counts()
    kinds = [
        f"{counts[kind]} {kind}"
        for kind in ("attention", "mixer", "attention_residual", "ffn", "ffn_residual")
        if kind in counts
    ]
    total = _count(len(route.edges), "sub-edge") + (f": {kinds[0]}" if kinds else "")
    lines = _wrapped(about, width, " · ") + _wrapped([total, *kinds[1:]], width)
    names = ", ".join(f"{show_token(route.tokens[position])}@{position}" for position in route.positions)
    root = f"{'root' if len(route.positions) == 1 else 'roots'}: {names} after L{route.n_layers - 1}"
    guesses = [f"{clip(show_token(text), 14)} {show_importance(p)}" for text, p in route.prediction[:5]]
    return lines + _wrapped([root + (f", next {guesses[0]}" if guesses else ""), *guesses[1:]], width)


def route_text(route: Route, width: int | None = None, top: int = 10) -> str:
    """A plain-text picture of ``route`` in lines of at most ``width`` terminal cells (None: the terminal's width).

    Tokens are the columns; information flows downwards, from the embeddings (first row) through the layers to the root
    (last row). A row's marks stand for the states after that layer; beside them are the attention edges of the layer
    that cross positions, strongest first. The ``top`` strongest of these are listed again at the end.
    """
    width = max(shutil.get_terminal_size().columns if width is None else width, 1)
    rows = _collapsed(_layers(route))
    label = max(len(row.label) for row in rows) + 2
    beside = width >= NARROW and any(row.edges for row in rows)
    columns = _columns(route, rows, width - label - (max(30, width * 2 // 5) if beside else 0))
    taken = label + sum(columns.widths) + 1
    lines = [
        *_header(route, width),
        "",
        " " * label + columns.line(columns.names),
        " " * label + columns.line(map(str, columns.positions)),
    ]
    for row in rows:
        line = f"{row.label:<{label}}" + columns.line(row.marks.get(position, "") for position in columns.positions)
        lines.append(line + (" " + _edge_text(route, row.edges, width - taken) if beside else ""))
        if row.edges and not beside:
            lines.append("  " + _edge_text(route, row.edges, width - 2))
    used = {mark for row in rows for mark in row.marks.values()}
    legend = [f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in used]
    lines += ["", *_wrapped([columns.left_out] if columns.left_out else [], width), *_wrapped(legend, width, "  ")]
    lines += _listing(route, top)
    return "\n".join(clip(line.rstrip(), width) for line in lines)


def _listing(route: Route, top: int) -> list[str]:
    strongest = strongest_edges(route, top, across=True)
    if strongest.empty:
        return []
    rows = list(strongest.itertuples(index=False, name=None))
    rows = [(head, source, target, show_importance(importance)) for head, source, target, importance in rows]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(4)]
    texts = ["  ".join(set_cell_size(cell, cells) for cell, cells in zip(row, widths, strict=True)) for row in rows]
    return ["", "strongest attention sub-edges across positions: head, source, target, importance", *texts]
