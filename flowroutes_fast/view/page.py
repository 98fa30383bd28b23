"""The instrument: a page that holds whole traces and extracts routes from them as the reader asks."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from flowroutes_fast.system.escape import printable
from flowroutes_fast.view import packing
from flowroutes_fast.view.html import static_picture
from flowroutes_fast.view.text import show_token, states_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowroutes_fast.results.lazy import LazyTrace
    from flowroutes_fast.results.route import Route
    from flowroutes_fast.results.trace import Trace
    from flowroutes_fast.view.details import Details

SCRIPTS = ("route.js", "scene.js", "paint.js", "panel.js", "instrument.js")
STATIC_EDGES = 3_000  # of the picture for browsers without JavaScript
_FOLDER = Path(__file__).parent


def trace_html(
    trace: Trace | None,
    other: Trace | None = None,
    *,
    signed: Trace | None = None,
    other_signed: Trace | None = None,
    threshold: float = 0.04,
    position: int = -1,
    other_position: int | None = None,
    renormalize: bool = True,
    details: Details | None = None,
    other_details: Details | None = None,
    max_sub_edges: int = packing.MAX_SUB_EDGES,
    server: dict[str, Any] | None = None,
) -> str:
    """One self-contained page for a trace, or for two that are compared.

    Args:
        trace: what is shown first. None only for a server, whose page starts empty.
        other: a trace of another prompt by the same model, for the difference graph.
        signed, other_signed: the same prompts traced with the other measure; the page switches between both.
        threshold: where the slider starts; raised to the trace's floor.
        position: the root; other_position: a second root in the same trace, to start with their difference.
        renormalize: as in :meth:`Trace.route`.
        details: logit lens and attention weights, from :func:`flowroutes_fast.view.details.details`.
        max_sub_edges: more than so many per trace are cut from below; the page says so.
        server: settings of :mod:`flowroutes_fast.view.server`, whose page may ask for new traces.

    Raises:
        ValueError: traces of different models or prompts that do not belong together.
        IndexError: position out of range.
    """
    trace, other, signed, other_signed = (
        None if one is None else one.complete() for one in (trace, other, signed, other_signed)
    )
    if trace is None and server is None:
        raise ValueError("there is no trace to show")
    data = payload(
        trace,
        other,
        signed=signed,
        other_signed=other_signed,
        details=details,
        other_details=other_details,
        max_sub_edges=max_sub_edges,
        threshold=threshold,
        position=position,
        other_position=other_position,
        renormalize=renormalize,
    )
    script, style = _script(), _style()
    connect = "'self'" if server else "'none'"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data: blob:; "
        f"connect-src {connect}; "
        "base-uri 'none'; form-action 'none'"
    )
    picture, sentence = ("", "") if trace is None else _static(trace, data["start"], renormalize)
    return _template().render(
        model=printable(trace.model) if trace is not None else "",
        policy=policy,
        script=Markup(script),
        style=Markup(style),
        picture=Markup(picture),
        sentence=sentence,
        server=server,
        data={
            **{key: value for key, value in data.items() if key != "data"},
            "prompt": server and server.get("prompt"),
        },
        blocks=data["data"],
    )


def payload(
    trace: Trace | None,
    other: Trace | None = None,
    *,
    signed: Trace | None = None,
    other_signed: Trace | None = None,
    details: Details | None = None,
    other_details: Details | None = None,
    max_sub_edges: int = packing.MAX_SUB_EDGES,
    threshold: float = 0.04,
    position: int = -1,
    other_position: int | None = None,
    renormalize: bool = True,
) -> dict[str, Any]:
    """What the page's script reads: ``sets``, ``columns``, ``start``; ``data`` has the block of every set, in order."""
    if trace is None:
        return {"sets": [], "columns": None, "start": {}, "data": []}
    for beside, whose in ((signed, trace), (other_signed, other)):
        if beside is not None and (
            whose is None or any(getattr(beside, n) != getattr(whose, n) for n in ("token_ids", "model", "inputs"))
        ):
            raise ValueError("the signed trace is of another prompt or model")
        if beside is not None and whose is not None and beside.measure == whose.measure:
            raise ValueError(
                f"both traces of the prompt have measure={beside.measure!r}: there is nothing to switch between"
            )
    if other is not None and (other.model != trace.model or other.n_layers != trace.n_layers):
        raise ValueError(f"traces of different models cannot be compared: {trace.model} and {other.model}")
    given = [
        ("A", trace, details),
        ("A", signed, details),
        ("B", other, other_details),
        ("B", other_signed, other_details),
    ]
    sets, blocks = [], []
    for prompt, one, about in given:
        if one is not None:
            packed = packing.pack(one, about if one in (trace, other) else None, max_sub_edges)
            blocks.append(packed.pop("data"))
            sets.append({"prompt": prompt, **packed})
    root = trace._positions(position)[0]
    second = None if other_position is None else (other or trace)._positions(other_position)[0]
    if other is not None and second is None:
        second = len(other.tokens) - 1
    floor = max(one["floor"] for one in sets)
    start = {
        "threshold": max(threshold, floor),
        "root": root,
        "second": second,
        "renormalize": renormalize,
        "floor": floor,
    }
    return {"sets": sets, "columns": None if other is None else align(trace, other), "start": start, "data": blocks}


def kept_payload(
    kept: Sequence[tuple[int, dict[str, LazyTrace]]], threshold: float, renormalize: bool
) -> dict[str, Any]:
    """The same for one prompt or two whose states a server keeps: per prompt its number and its lazy trace by each
    measure, of which the rows evaluated so far are in it."""
    sets, blocks = [], []
    for prompt, (number, traces) in zip("AB", kept, strict=False):
        for trace in traces.values():
            packed = packing.pack_lazy(trace, number)
            blocks.append(packed.pop("data"))
            sets.append({"prompt": prompt, **packed})
    first, *others = [traces["proximity"] for _, traces in kept]
    second = len(others[0].tokens) - 1 if others else None
    start = {
        "threshold": threshold,
        "root": len(first.tokens) - 1,
        "second": second,
        "renormalize": renormalize,
        "floor": sets[0]["floor"],
    }
    return {"sets": sets, "columns": align(first, others[0]) if others else None, "start": start, "data": blocks}


def align(trace: Trace, other: Trace) -> list[list[int]]:
    """Columns of a comparison: pairs of positions, -1 where one prompt has nothing; equal tokens share a column,
    then replaced ones.
    """
    first, second = (list(map(str, t.token_ids or t.tokens)) for t in (trace, other))
    columns = []
    for _, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        shared = min(b - a, d - c)
        columns += [[a + i, c + i] for i in range(shared)]
        columns += [[i, -1] for i in range(a + shared, b)] + [[-1, i] for i in range(c + shared, d)]
    return columns


def _static(trace: Trace, start: dict[str, Any], renormalize: bool) -> tuple[str, str]:
    """The picture and the sentence that stand in for the page where JavaScript is off."""
    alone = replace(trace, refine=None)  # a picture is not worth another forward pass
    first = start["threshold"]
    thresholds = sorted(
        {first * 1.5**i for i in range(12) if first * 1.5**i < 0.6}
        | {t for t in trace.thresholds if t > first}
        | {first}
    )
    why = ""
    for threshold in thresholds:
        try:
            route = alone.route(start["root"], threshold, renormalize)
        except ValueError as error:  # decisions are open, or rows are missing
            why = why or f"The route cannot be drawn here: {error}."
            continue
        if len(route.token_edges) <= STATIC_EDGES:
            break
    else:
        return "", why or "The route is too large to be drawn here."
    narrow, numbers = touched_only(route)
    note = f"Route to position {route.position} at threshold {threshold:.3g}"
    if len(numbers) < len(route.tokens):
        note += f", {len(numbers)} of {len(route.tokens)} tokens"
    if trace.prediction and route.position == len(trace.tokens) - 1:
        text, probability = trace.prediction[0]
        note += f"; next token {show_token(text)} ({probability:.1%})"
    return static_picture(narrow, numbers), note + "."


def touched_only(route: Route, at_least: int = 60) -> tuple[Route, list[int]]:
    """A long prompt's route without the tokens that it does not touch, and the positions that remain."""
    if len(route.tokens) <= at_least:
        return route, list(range(len(route.tokens)))
    outer, inner = states_of(route)
    kept = sorted({position for _, position in outer | inner})
    place = np.full(len(route.tokens), -1)
    place[kept] = np.arange(len(kept))
    edges = route.edges.assign(source=place[route.edges["source"]], target=place[route.edges["target"]])
    positions = tuple(int(place[p]) for p in route.positions)
    tokens, ids = [route.tokens[p] for p in kept], [route.token_ids[p] for p in kept] if route.token_ids else []
    return replace(
        route,
        tokens=tokens,
        token_ids=ids,
        chat=[],
        edges=edges,
        position=int(place[route.position]),
        positions=positions,
    ), kept


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _script() -> str:
    """All scripts in one function scope, as the policy's hash sees them."""
    return (
        '"use strict";\n(() => {\n'
        + "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
        + "\n})();"
    )


@cache
def _style() -> str:
    return (_FOLDER / "instrument.css").read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("instrument.html.j2")
