"""Routes from several positions, token attribution and routes by flow, against a graph walked edge by edge."""

import json
from collections import defaultdict

import networkx as nx
import numpy as np
import pytest
import torch
from conftest import IOI, tiny
from families import make

import flowroutes_fast as fr

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
NAMES = ["llama", "gpt_neox", "jamba", "falcon_h1", "gemma2"]
KEYS = ["layer", "kind", "source", "target", "head"]


def full_graph(trace):
    """Every edge of an exact trace: (upper node, lower node, key, importance), top-down order of nodes is by level."""
    edges = []
    for layer in range(len(trace.shapes)):
        parallel = trace.shapes[layer] == "parallel"
        below, top = f"X{layer}", f"X{layer + 1}"
        mid = top if parallel else f"A{layer}"
        importance = trace.attention(layer)
        for i in range(len(trace.tokens)):
            for j in range(i + 1):
                for h in range(importance.shape[2]):
                    edges.append(((mid, i), (below, j), (layer, "attention", j, i, h), float(importance[i, j, h])))
            parts = [("attention_residual", trace.attention_residual), ("mixer", trace.mixer)] + (
                [("ffn", trace.ffn)] if parallel else []
            )
            edges += [((mid, i), (below, i), (layer, kind, i, i, -1), float(v[layer, i])) for kind, v in parts]
            if not parallel:
                edges += [
                    ((top, i), (mid, i), (layer, kind, i, i, -1), float(v[layer, i]))
                    for kind, v in (("ffn", trace.ffn), ("ffn_residual", trace.ffn_residual))
                ]
    return edges


def walk(trace, positions):
    """Mass at the embeddings and flow of every edge, node by node."""
    graph = nx.MultiDiGraph()
    for upper, lower, key, value in full_graph(trace):
        if value:
            graph.add_edge(upper, lower, key=key, value=value)
    mass = defaultdict(float)
    for p in positions:
        mass[f"X{len(trace.shapes)}", p] += 1 / len(positions)
    flow = {}
    for node in nx.topological_sort(graph):
        out = list(graph.out_edges(node, keys=True, data="value"))
        total = sum(abs(v) for *_, v in out)
        for _, lower, key, value in out:
            flow[key] = mass[node] * abs(value) / total
            mass[lower] += flow[key]
    return np.array([mass["X0", t] for t in range(len(trace.tokens))]), flow


@pytest.fixture(scope="module", params=NAMES)
def exact(request):
    return fr.trace(make(request.param), None, IDS, precision="exact", dense=True)


@pytest.mark.parametrize("positions", [[10], [4], [0], [3, 7, 10]])
def test_token_attribution_is_the_mass_that_arrives(exact, positions):
    table = exact.token_attribution(positions)
    expected, _ = walk(exact, positions)
    np.testing.assert_allclose(table["importance"], expected, atol=1e-6)
    assert table["importance"].sum() == pytest.approx(1)
    assert table["position"].tolist() == list(range(11))
    assert table.attrs["unresolved"] == 0
    assert (table["importance"][max(positions) + 1 :] == 0).all()


def test_a_span_is_the_mean_of_its_positions(exact):
    alone = [exact.token_attribution(p)["importance"] for p in (8, 9, 10)]
    np.testing.assert_allclose(exact.token_attribution(slice(8, 11))["importance"], np.mean(alone, 0), atol=1e-9)


@pytest.mark.parametrize("options", [{"threshold": 0.01}, {"threshold": 0.2}, {"keep": 0.05}, {"keep": 1.0}])
def test_routes_by_flow(exact, options):
    route = exact.route([5, -1], rule="flow", **options)
    _, flow = walk(exact, [5, 10])
    if "keep" in options:
        ordered = sorted(flow.values(), reverse=True)
        limit = ordered[max(1, round(options["keep"] * sum(v > 1e-12 for v in ordered))) - 1] * (1 - 1e-6)
    else:
        limit = options["threshold"]
    graph = nx.MultiDiGraph()
    for upper, lower, key, value in full_graph(exact):
        if value and flow[key] > limit:
            graph.add_edge(upper, lower, key=key)
    reached = set()
    for p in (5, 10):
        if (root := (f"X{len(exact.shapes)}", p)) in graph:
            reached |= nx.descendants(graph, root) | {root}
    expected = {key for upper, _, key in graph.edges(keys=True) if upper in reached}
    found = {tuple(row) for row in route.edges[KEYS].itertuples(index=False, name=None)}
    disputed = {key for key in found ^ expected if abs(flow[key] - limit) > 1e-6}
    if options == {"keep": 1.0}:
        disputed = {key for key in disputed if flow[key] > 1e-9}
    assert not disputed
    for *key, value in route.edges[[*KEYS, "importance"]].itertuples(index=False, name=None):
        assert value == pytest.approx(flow[tuple(key)], abs=1e-6)
    assert route.rule == "flow"
    assert route.positions == (5, 10)


def test_a_route_of_several_positions_is_the_union(exact):
    parts = [exact.route(p, threshold=0.03) for p in (2, 6, 10)]
    whole = exact.route([-1, 2, 6, 6], threshold=0.03)
    rows = {tuple(row) for part in parts for row in part.edges[KEYS].itertuples(index=False, name=None)}
    assert {tuple(row) for row in whole.edges[KEYS].itertuples(index=False, name=None)} == rows
    assert whole.positions == (2, 6, 10)
    assert set(whole.roots) <= set(whole.to_networkx())
    assert whole.prediction
    assert not exact.route([2, 6]).prediction


def test_mixers_are_edges_and_named():
    trace = fr.trace(make("jamba"), None, IDS)
    assert [bool(m) for m in trace.mixers] == [True, False, True]
    edges = trace.route(threshold=0.01).edges
    assert set(edges[edges["kind"] == "mixer"]["layer"]) <= {0, 2}
    assert len(edges[edges["kind"] == "mixer"])
    route = trace.route(threshold=0.01)
    assert "mixer" in route.to_text(100)
    assert "mixer" in {data["kind"] for *_, data in route.to_networkx().edges(data=True)}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_certified_attribution_is_close(name):
    model = make(name)
    exact, certified = fr.trace(model, None, IDS, precision="exact", dense=True), fr.trace(model, None, IDS)
    a, b = exact.token_attribution(), certified.token_attribution()
    np.testing.assert_allclose(a["importance"], b["importance"], atol=0.02)
    assert 0 <= b.attrs["unresolved"] < 0.05
    assert b["importance"].sum() == pytest.approx(1)


def test_signed_attribution_and_flow():
    trace = fr.trace(tiny("llama"), None, IDS, measure="signed")
    assert trace.token_attribution()["importance"].sum() == pytest.approx(1)
    assert len(trace.route(rule="flow", keep=0.1).edges)


def test_one_token():
    trace = fr.trace(tiny("llama"), None, [5])
    assert trace.token_attribution()["importance"].tolist() == pytest.approx([1.0])
    assert len(trace.route(rule="flow", threshold=0.0).edges)


def test_other_heads_of_a_pair_carry_half_of_what_they_may():
    trace = fr.trace(tiny("llama"), None, IDS)
    trace.sparse = [(torch.tensor([[10], [4], [-1]], dtype=torch.int32), torch.tensor([0.4])) for _ in range(3)]
    trace.attention_residual[:] = 0.6
    assert trace.token_attribution()["importance"][10] == pytest.approx(0.75**3)  # 0.6 of 0.6 and 0.2, in three layers


def test_mass_at_a_node_that_nothing_enters_goes_down():
    trace = fr.trace(tiny("llama"), None, IDS, precision="exact", dense=True)
    trace.ffn[1, -1] = trace.ffn_residual[1, -1] = 0.0
    trace.attention_residual[0, 3] = 0.0
    trace.dense[0][:, 3] = 0.0
    table = trace.token_attribution()
    assert table["importance"].sum() == pytest.approx(1)
    assert table["importance"][3] > 0


def test_routes_are_saved_with_their_roots(tmp_path):
    route = fr.trace(tiny("llama"), None, IDS).route([3, -1], rule="flow", keep=0.2)
    loaded = fr.load_route(route.save(tmp_path / "route.json"))
    assert (loaded.positions, loaded.rule, loaded.keep) == ((3, 10), "flow", 0.2)
    document = json.loads((tmp_path / "route.json").read_text())
    for name in ("positions", "rule", "keep", "sha256"):
        del document[name]
    (tmp_path / "old.json").write_text(json.dumps(document | {"version": 1}))
    assert fr.load_route(tmp_path / "old.json").positions == (10,)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "flow"}, "needs a threshold"),
        ({"rule": "flow", "threshold": 0.1, "keep": 0.1}, "without a threshold"),
        ({"keep": 0.1}, "belongs to rule='flow'"),
        ({"rule": "flow", "keep": 0}, r"\(0, 1\]"),
        ({"rule": "flow", "keep": 0.1, "renormalize": False}, "no renormalize=False"),
        ({"rule": "fast"}, "unknown rule"),
        ({"position": []}, "needs a root"),
    ],
)
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        fr.trace(tiny("llama"), None, IDS).route(**options)


def test_spans_without_a_position_are_refused():
    trace = fr.trace(tiny("llama"), None, IDS)
    with pytest.raises(ValueError, match="holds no position"):
        trace.token_attribution(slice(20, 30))
    with pytest.raises(IndexError, match="position 11"):
        trace.token_attribution([1, 11])


@pytest.mark.demo_model
def test_on_the_real_model(demo, tmp_path):
    trace = fr.trace(*demo, IOI)
    table = trace.token_attribution()
    assert table["importance"].sum() == pytest.approx(1)
    assert table.attrs["unresolved"] < 0.2
    route = trace.route(rule="flow", keep=0.05)
    assert 0 < len(route.edges) <= round(0.05 * 60000)
    assert route.edges["importance"].max() <= 1
    page = route.to_html(tmp_path / "flow.html").read_text(encoding="utf-8")
    assert "strongest 5 %" in page
    assert torch.tensor(route.edges["importance"].to_numpy()).isfinite().all()
