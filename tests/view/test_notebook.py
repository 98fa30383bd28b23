"""Routes and traces show themselves in a notebook: one is executed, and its output opened in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from chromium import BINARY, Chromium
from families import make
from test_instrument import HOSTILE, ids_of, long_trace

import flowroutes_fast as fr
from flowroutes_fast.view import notebook

CELLS = [
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})",
    "import flowroutes_fast as fr\nfrom families import make\ntrace = fr.trace(make('llama'), None, list(range(3, "
    "16)))\ntrace",
    "trace.route(threshold=0.03)",
]


@pytest.fixture(scope="module")
def executed():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(book, timeout=240, kernel_name="python3").execute()
    nbformat.validate(book)
    return book


@pytest.fixture(scope="module")
def trace():
    return fr.trace(make("llama"), None, list(range(3, 16)))


def frame_of(html):
    """The page in a cell's frame."""
    (found,) = re.findall(r'<iframe srcdoc="([^"]*)"', html)
    assert 'sandbox="allow-scripts allow-downloads"' in html
    return unescape(found)


def test_a_notebook_shows_both(executed, trace):
    results = [cell.outputs[-1].data for cell in executed.cells[1:]]
    assert results[0]["text/plain"] == repr(trace)
    assert results[1]["text/plain"].startswith("Route(")
    assert frame_of(results[0]["text/html"]).count('class="block"') == 1
    assert 'id="graph"' in frame_of(results[1]["text/html"])
    assert "<details><summary>The route as text</summary>" in results[1]["text/html"]


@pytest.mark.skipif(BINARY is None, reason="no chromium was found")
def test_the_exported_notebook_works_in_a_browser(executed, trace, tmp_path):
    exporter = pytest.importorskip("nbconvert").HTMLExporter(template_name="basic")
    page = tmp_path / "book.html"
    page.write_text("<!DOCTYPE html><meta charset=utf-8>" + exporter.from_notebook_node(executed)[0], encoding="utf-8")
    browser = Chromium("--disable-features=IsolateSandboxedIframes,LazyFrameLoading")
    try:
        browser.open(page, ready="true")
        browser.run("document.querySelectorAll('iframe').forEach((f) => f.scrollIntoView())")
        frames = [one["frame"]["id"] for one in browser.call("Page.getFrameTree")["frameTree"]["childFrames"]]
        inside = [browser.call("Page.createIsolatedWorld", frameId=frame)["executionContextId"] for frame in frames]
        found = [
            browser.call(
                "Runtime.evaluate", contextId=context, returnByValue=True, expression=expression, awaitPromise=True
            )["result"]["value"]
            for context, expression in zip(
                inside,
                (
                    "new Promise((done) => { const look = () => document.getElementById('count').textContent ? "
                    "done(document.getElementById('count').textContent) : setTimeout(look, 50); look(); })",
                    "document.querySelectorAll('#graph path').length",
                ),
                strict=True,
            )
        ]
        assert found[0].startswith(f"{len(trace.route(threshold=0.04).edges)} sub-edge")
        assert found[1] >= len(trace.route(threshold=0.03).token_edges)
        assert not [event for event in browser.events if event[0] in ("dialog", "exception")]
    finally:
        browser.close()


def test_hostile_tokens_stay_in_their_frame(trace):
    hostile = replace(
        trace,
        tokens=HOSTILE[:13],
        model="</pre><img src=x onerror=alert(1)>",
        prediction=[(text, 0.1) for text in HOSTILE],
    )
    for html in (hostile._repr_html_(), hostile.route(-1, 0.03)._repr_html_()):
        assert html.encode("utf-8")
        outside = re.sub(r'srcdoc="[^"]*"', "", html)
        assert set(re.findall(r"</?([a-z]+)", outside)) == {"iframe", "details", "summary", "pre"}
        assert "<img" not in frame_of(html)


def test_large_ones_stay_small(trace):
    long = long_trace(layers=6)
    html = long._repr_html_()
    assert len(html) < 1.4 * notebook.MAX_CELL
    assert "<iframe" in html
    html = replace(long_trace(layers=1), heads=long.heads.repeat(30, 1, 1))._repr_html_()
    assert "<iframe" not in html
    assert "trace.to_html(path) writes its page" in html
    assert len(html) < 20_000
    route = trace.route(-1, 0.04)
    rows = 30_000
    table = {"layer": 0, "kind": "attention", "source": range(rows), "target": rows - 1, "head": 0, "importance": 0.1}
    html = replace(
        route, edges=pd.DataFrame(table), tokens=["a"] * rows, token_ids=[], position=rows - 1, positions=(rows - 1,)
    )._repr_html_()
    assert "<iframe" not in html
    assert "route.to_html(path) writes its page" in html


def test_to_html_with_a_model(trace, tmp_path):
    model = make("llama")
    other = fr.trace(model, None, ids_of(9))
    signed = fr.trace(model, None, list(range(3, 16)), measure="signed")
    path = trace.to_html(tmp_path / "page.html", other=other, signed=signed, model=model, threshold=0.05, position=4)
    text = path.read_text(encoding="utf-8")
    assert text.count('class="block"') == 3
    assert '"root": 4' in text
    assert '"texts"' in text
    with pytest.raises(IndexError, match="13 tokens"):
        trace.to_html(tmp_path / "page.html", position=13)
