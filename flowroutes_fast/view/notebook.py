"""Routes and traces in notebooks: their page in a frame of its own, and text where no frame is shown."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from flowroutes_fast.view.html import route_html
from flowroutes_fast.view.page import trace_html
from flowroutes_fast.view.text import show_importance, show_token

if TYPE_CHECKING:
    from flowroutes_fast.results.route import Route
    from flowroutes_fast.results.trace import Trace

MAX_CELL = 3_000_000  # bytes of a cell's page: notebooks keep their output
MAX_EDGES = 5_000  # of a route that is drawn
TEXT_WIDTH = 110
_SUB_EDGES = (200_000, 50_000)
_MAX_NUMBERS = 400_000  # (layer, token, head): above it a page cannot be small


def route_cell(route: Route) -> str:
    """The page of a route, and its text picture."""
    page = route_html(route) if len(route.token_edges) <= MAX_EDGES else None
    if page is not None and len(page.encode()) > MAX_CELL:
        page = None
    return _cell(
        page,
        repr(route),
        route.to_text(TEXT_WIDTH),
        "The route as text",
        "This route is too large for a cell: route.to_html(path) writes its page.",
    )


def trace_cell(trace: Trace) -> str:
    """The instrument with a trace, its weakest sub-edges left out where it would be too large; and a summary."""
    small = (page for page in _pages(trace) if len(page.encode()) <= MAX_CELL)
    return _cell(
        next(small, None),
        repr(trace),
        _summary(trace),
        "Summary",
        "This trace is too large for a cell: trace.to_html(path) writes its page.",
    )


def _pages(trace: Trace) -> Iterator[str]:
    for most in _SUB_EDGES if trace.heads.numel() <= _MAX_NUMBERS else ():
        yield trace_html(trace, max_sub_edges=most)


def _summary(trace: Trace) -> str:
    lines = [
        "tokens      "
        + " ".join(f"{i}:{show_token(token)}" for i, token in enumerate(trace.tokens[:200]))
        + (" …" if len(trace.tokens) > 200 else "")
    ]
    lines += [f"prediction  {show_token(text)} {show_importance(p)}" for text, p in trace.prediction[:5]]
    return "\n".join(lines)


def _cell(page: str | None, title: str, text: str, summary: str, without: str) -> str:
    """``page`` in a sandbox (no access to the notebook), then ``text``, which is all that is left where frames are
    filtered out.
    """
    below = (
        f"<details{'' if page else ' open'}><summary>{escape(summary)}</summary><pre "
        f'style="line-height:1.25">{_plain(text)}</pre></details>'
    )
    if page is None:
        return f"<p>{_plain(title)}</p><p>{escape(without)}</p>{below}"
    frame = (
        f'<iframe srcdoc="{escape(page)}" title="{_plain(title)}" sandbox="allow-scripts allow-downloads" '
        f'loading="lazy" '
        'style="width:100%;height:680px;border:1px solid #8884;border-radius:6px"></iframe>'
    )
    return frame + below


def _plain(text: str) -> str:
    return escape(text.encode("utf-8", "replace").decode())
