"""The text picture and the page of a route, on hand-made edge tables."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.cells import cell_len

from flowroutes_fast.view.html import route_html
from flowroutes_fast.view.text import clip, route_text, show_importance, show_token, states_of, strongest_edges

COLUMNS = ["layer", "kind", "source", "target", "head", "importance"]
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "{{7*7}}",
    "<!--",
    "\u2028&amp;",
    "\"'`",
    "\u202eשלום",
    "\ud800",
    "日本語",
    "👩‍👩‍👧",
    "\x1b[31m",
]


def make_route(tokens, rows, n_layers=3, position=None, shape="sequential", prediction=()):
    edges = pd.DataFrame(rows, columns=COLUMNS).astype({"importance": float})
    keys = ["layer", "kind", "source", "target"]
    return SimpleNamespace(
        tokens=list(tokens),
        n_layers=n_layers,
        position=len(tokens) - 1 if position is None else position,
        positions=(len(tokens) - 1 if position is None else position,),
        rule="importance",
        keep=None,
        threshold=0.04,
        renormalize=True,
        model="toy",
        measure="proximity",
        chat=[],
        prediction=list(prediction),
        shapes=[shape] * n_layers,
        edges=edges,
        token_edges=edges.groupby(keys, as_index=False, sort=False)["importance"].sum(),
    )


def full_rows(n_tokens, n_layers, shape="sequential", heads=3):
    """Every position of every layer, each fed by the position before it and by itself."""
    rows = []
    for layer in range(n_layers):
        for target in range(n_tokens):
            rows.append((layer, "attention_residual", target, target, -1, 0.5))
            rows.append((layer, "ffn", target, target, -1, 0.2))
            if shape == "sequential":
                rows.append((layer, "ffn_residual", target, target, -1, 0.8))
            for head in range(heads):
                source = max(target - 1, 0)
                rows.append((layer, "attention", source, target, head, 0.02 + 0.001 * head + 0.01 * layer))
    return rows


def page_data(page):
    blocks = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert len(blocks) == 1
    return json.loads(blocks[0])


def heads_of(data):
    return {(e["layer"], e["source"], e["target"], head): value for e in data["edges"] for head, value in e["heads"]}


@pytest.fixture
def small():
    rows = [
        (0, "attention", 0, 2, 1, 0.12),
        (0, "attention", 0, 2, 0, 0.30),
        (0, "attention", 2, 2, 5, 0.50),
        (0, "attention_residual", 0, 0, -1, 1.0),
        (0, "ffn", 2, 2, -1, 0.4),
        (0, "ffn_residual", 2, 2, -1, 0.6),
        (1, "attention", 0, 2, 4, 0.07),
        (1, "attention_residual", 2, 2, -1, 0.93),
        (1, "ffn_residual", 2, 2, -1, 1.0),
        (0, "ffn_residual", 0, 0, -1, 1.0),
    ]
    return make_route(["John", " gave", " to"], rows, n_layers=2, prediction=[(" Mary", 0.9), ("\n", 0.05)])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" to", "·to"),
        ("\n", "↵"),
        ("\t\t", "⇥⇥"),
        (" " * 19, "·×19"),
        ("", "∅"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202ea", "\\u202ea"),
        ("\ud800", "\\ud800"),
        ("a\u00a0b", "a\\xa0b"),
        ("👩‍👩‍👧", "👩‍👩‍👧"),
        ("\u200d", "\\u200d"),
    ],
)
def test_show_token(text, shown):
    assert show_token(text) == shown


def test_show_importance():
    assert [show_importance(x) for x in (0.123, 1.0, 0.0053, 0.0001, 0.0)] == [".12", "1.00", ".005", "<.001", ".00"]


def test_clip_counts_cells():
    assert clip("abc", 3) == "abc"
    assert clip("abcd", 3) == "ab…"
    assert all(cell_len(clip("日本語日本語", n)) <= n for n in range(8))


def test_strongest_edges(small):
    table = strongest_edges(small, 2)
    assert table.to_dict("list") == {
        "head": ["L0H5", "L0H0"],
        "source": ["to@2", "John@0"],
        "target": ["to@2", "to@2"],
        "importance": [0.5, 0.3],
    }
    assert list(strongest_edges(small, across=True)["head"]) == ["L0H0", "L0H1", "L1H4"]
    empty = strongest_edges(make_route(["a"], []))
    assert list(empty.columns) == ["head", "source", "target", "importance"]
    assert empty.empty


def test_states(small):
    outer, inner = states_of(small)
    assert outer == {(0, 0), (0, 2), (1, 0), (1, 2), (2, 2)}
    assert inner == {(0, 0), (0, 2), (1, 2)}


def test_text_shows_marks_and_heads(small):
    text = route_text(small, 100)
    lines = text.splitlines()
    first, second = (next(line for line in lines if line.startswith(label + " ")) for label in ("L0", "L1"))
    assert re.search(r"│ +● +John@0→to@2 L0H0 \.30 L0H1 \.12$", first)
    assert re.search(r"╰ +○ +John@0→to@2 L1H4 \.07$", second)
    assert "root: ·to@2 after L1, next ·Mary .90, ↵ .05" in text
    assert "L0H5" not in text


@pytest.mark.parametrize("width", [1, 9, 30, 59, 60, 80, 133, 400])
@pytest.mark.parametrize("shape", ["sequential", "parallel"])
def test_text_stays_within_width(width, shape):
    for tokens in (HOSTILE, ["x"], [f" token{i}" for i in range(120)]):
        route = make_route(
            tokens, full_rows(len(tokens), 3, shape), shape=shape, prediction=[(token, 0.1) for token in tokens[:9]]
        )
        lines = route_text(route, width).splitlines()
        assert max(cell_len(line) for line in lines) <= width


def test_text_collapses_equal_layers():
    rows = [(layer, kind, 0, 0, -1, 1.0) for layer in range(9) for kind in ("attention_residual", "ffn_residual")]
    text = route_text(make_route(["x"], rows, n_layers=9), 80)
    assert "L0–L8" in text


def test_text_says_how_much_is_left_out():
    route = make_route([f" token{i}" for i in range(120)], full_rows(120, 2), n_layers=2)
    text = route_text(route, 80)
    assert re.search(r"\+\d+ more", text)
    assert re.search(r"columns: the \d+ most used of 120 positions", text)
    assert re.search(r"columns: the positions on the route, 1 of 120", route_text(make_route(route.tokens, []), 80))


def test_every_head_is_in_the_page(small):
    for route in (small, make_route(list("abcdef"), full_rows(6, 4, heads=9), n_layers=4)):
        attention = route.edges[route.edges["kind"] == "attention"]
        expected = {(r.layer, r.source, r.target, f"L{r.layer}H{r.head}"): r.importance for r in attention.itertuples()}
        data = page_data(route_html(route))
        assert heads_of(data) == pytest.approx(expected, abs=1e-5)
        assert len(data["edges"]) == len(route.token_edges)


def test_page_draws_what_its_data_lists(small):
    page = route_html(small)
    data = page_data(page)
    assert page.count('<g class="edge ') - page[page.index('<dl class="legend">') :].count('<g class="edge ') == len(
        data["edges"]
    )
    assert [node["name"] for node in data["nodes"]] == ["X0_0", "X0_2", "A0_0", "A0_2", "I0_0", "I0_2", "A1_2", "I1_2"]
    edge = next(e for e in data["edges"] if e["kind"] == "attention" and e["layer"] == 1)
    assert (data["nodes"][edge["from"]]["name"], data["nodes"][edge["to"]]["name"]) == ("I0_0", "A1_2")
    assert "John@0 → ·to@2, layer 0, attention 0.420 (L0H0 0.300, L0H1 0.120)" in page


def test_hostile_tokens_are_only_shown():
    route = make_route(HOSTILE, full_rows(len(HOSTILE), 3), prediction=[(token, 0.1) for token in HOSTILE])
    page = route_html(route)
    assert page.encode("utf-8")
    assert "<img" not in page
    assert "<!--" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not {"\u2028", "\u202e", "\x1b"} & set(page)
    assert ">{{7*7}}<" in page
    assert page_data(page)["tokens"] == [show_token(token) for token in HOSTILE]


def test_hostile_model_name_is_escaped(small):
    small.model = "<img src=x>"
    assert "<img" not in route_html(small)


def test_page_loads_nothing(small):
    page = route_html(small)
    assert not re.search(r"https?://|@import|url\(", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert "<noscript>" in page


def test_empty_route_has_only_its_root():
    route = make_route(["a", " b", " c"], [], position=1)
    data = page_data(route_html(route))
    assert data["edges"] == []
    assert [node["name"] for node in data["nodes"]] == ["I2_1"]
    assert "root: ·b@1 after L2" in route_text(route, 80)


def test_one_token():
    route = make_route(["x"], full_rows(1, 3))
    data = page_data(route_html(route))
    assert len(data["nodes"]) == 3 * 2 + 1
    assert "→" not in route_text(route, 80)


def test_parallel_layers_have_no_state_after_attention():
    route = make_route(["a", "b"], full_rows(2, 3, "parallel"), shape="parallel")
    page = route_html(route)
    data = page_data(page)
    assert {node["name"] for node in data["nodes"]} == {
        f"{state}_{i}" for state in ("X0", "I0", "I1", "I2") for i in range(2)
    }
    ffn = next(e for e in data["edges"] if e["kind"] == "ffn" and e["layer"] == 1)
    assert (data["nodes"][ffn["from"]]["name"][:2], data["nodes"][ffn["to"]]["name"][:2]) == ("I0", "I1")
    assert "residual stream after attention" not in page
    assert "a@0→b@1 L2H2 .04" in route_text(route, 100)


def test_long_prompt_keeps_every_label():
    tokens = [f" token{i}" for i in range(120)]
    page = route_html(make_route(tokens, full_rows(120, 2), n_layers=2))
    assert all(f">·token{i}</text>" in page for i in range(120))
    coordinates = [float(x) for x in re.findall(r'<circle cx="([-\d.]+)"', page)]
    width = float(re.search(r'<svg id="graph" width="([\d.]+)"', page)[1])
    assert 0 < min(coordinates) < max(coordinates) < width


def test_negative_and_unnamed_parts(small):
    rows = [
        (0, "attention", 0, 1, 2, -0.31),
        (0, "attention", 0, 1, -1, 0.05),
        (0, "attention_residual", 1, 1, -1, 0.9),
    ]
    route = make_route(["a", "b"], rows, n_layers=1)
    route.measure = "signed"
    assert strongest_edges(route)["head"].tolist() == ["L0H2", "L0 rest"]
    assert show_importance(-0.31) == "-.31"
    assert show_importance(-0.0001) == "-<.001"
    assert "signed flow" in route_text(route, 100)
    assert "L0H2 -.31" in route_text(route, 100)
    page = route_html(route)
    assert "pushes the state away" in page
    assert 'class="edge attention negative"' in page
    assert "L0 rest" in page
    assert "negative" not in re.sub(r"(?s)<style>.*?</style>|<script.*?</script>", "", route_html(small))
