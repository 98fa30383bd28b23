"""Extraction against a slow, literal walk of the paper's algorithm 1; files; the command line."""

import json

import numpy as np
import pytest
import torch
from conftest import IOI, KINDS, tiny
from typer.testing import CliRunner

import flowroutes_fast as fr
from flowroutes_fast.ops import native
from flowroutes_fast.results.extract import open_rows

IDS = [3, 14, 15, 92, 65, 35, 89]


def walk(trace, position, threshold, renormalize):
    """One node at a time, in plain Python."""
    found, active = set(), {position}
    for layer in reversed(range(trace.n_layers)):
        parallel = trace.shapes[layer] == "parallel"
        middle = set()
        for i in active if not parallel else ():
            for kind, values in (("ffn", trace.ffn), ("ffn_residual", trace.ffn_residual)):
                if values[layer, i] > threshold:
                    found.add((layer, kind, i, i, -1))
                    middle.add(i)
        active = active if parallel else middle
        below = set()
        for i in active:
            alone = [("attention_residual", trace.attention_residual)] + ([("ffn", trace.ffn)] if parallel else [])
            for kind, values in alone:
                if values[layer, i] > threshold:
                    found.add((layer, kind, i, i, -1))
                    below.add(i)
            edge = trace.attention(layer)[i]
            for j in range(len(trace.tokens)):
                for h in range(edge.shape[1]):
                    if (edge[j, h] > threshold) if renormalize else (edge[j].sum() > threshold and edge[j, h] > 0):
                        found.add((layer, "attention", j, i, h))
                        below.add(j)
        active = below
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("position", "threshold"), [(-1, 0.03), (3, 0.1), (0, 0.0)])
def test_extraction_is_algorithm_1(kind, renormalize, position, threshold):
    trace = fr.trace(tiny(kind), None, IDS, precision="exact")
    route = trace.route(position, threshold, renormalize)
    rows = {tuple(row) for row in route.edges[["layer", "kind", "source", "target", "head"]].itertuples(index=False)}
    assert rows == walk(trace, position % len(IDS), threshold, renormalize)
    if renormalize and kind in ("mistral",):  # no bias part: survivors of every node sum to 1
        edges = route.edges.assign(node=route.edges.kind.str.startswith("ffn"))
        assert (edges.groupby(["layer", "node", "target"]).importance.sum() - 1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "neox"])
def test_survivors_are_divided_by_their_sum(kind):
    """Of all parts of a node above the threshold, the bias among them, though it is no edge."""
    threshold, biases = 0.03, 0
    trace = fr.trace(tiny(kind), None, IDS, precision="exact")
    edges = trace.route(threshold=threshold).edges
    after_ffn = (edges.kind == "ffn_residual") | ((edges.kind == "ffn") & (kind != "neox"))
    for (layer, target), node in edges[~after_ffn].groupby(["layer", "target"]):
        alone = [trace.attention_residual, trace.attention_bias, *([trace.ffn] if kind == "neox" else [])]
        parts = torch.cat(
            [trace.attention(layer)[target].flatten(), torch.stack([part[layer, target] for part in alone])]
        ).double()
        bias = float(trace.attention_bias[layer, target])
        total = float(parts[parts > threshold].sum())
        biases += bias > threshold
        assert node.importance.sum() == pytest.approx(1 - bias * (bias > threshold) / total, abs=1e-6)
    for _, node in edges[after_ffn].groupby(["layer", "target"]):
        assert node.importance.sum() == pytest.approx(1, abs=1e-6)
    assert (biases > 0) == (kind != "mistral")


def test_what_is_at_the_threshold_is_no_edge():
    trace = fr.trace(tiny("mistral"), None, IDS, precision="exact")
    last = trace.n_layers - 1
    near = trace.attention(last)[-1]
    key, head = divmod(int(near.argmax()), near.shape[1])
    share = float(near[key, head])
    assert trace.ffn_residual[last, -1] > share  # so that the route gets there
    for kind, value in (
        ("attention", share),
        ("ffn", float(trace.ffn[last, -1])),
        ("ffn_residual", float(trace.ffn_residual[last, -1])),
    ):
        for threshold, there in ((value, False), (float(np.nextafter(np.float32(value), np.float32(0))), True)):
            edges = trace.route(threshold=threshold).edges
            found = edges[(edges.layer == last) & (edges.kind == kind) & (edges.target == len(IDS) - 1)]
            assert bool((found["head"] == head).any() if kind == "attention" else len(found)) == there


def test_a_bias_at_the_threshold_leaves_a_row_open(monkeypatch, tmp_path):
    monkeypatch.setattr("flowroutes_fast.tracing.importances.FEW_KEYS", 0)
    trace = fr.trace(tiny("llama"), None, list(range(7, 36)), tolerance=0.3, thresholds=())
    layer, row = 2, 28
    assert trace.normaliser_low[layer, row] < trace.normaliser_high[layer, row]
    trace.attention_bias[layer, row] = 0.9  # more than any other part here
    rows = np.array([row])
    assert open_rows(trace, layer, rows, 0.9, True).tolist() == [row]
    assert open_rows(trace, layer, rows, 0.6, True).tolist() == []
    assert open_rows(trace, layer, rows, 0.9, False).tolist() == []  # sums are not divided by what a bias takes part in


def test_nothing_above_the_threshold_is_an_empty_route(tmp_path):
    route = fr.trace(tiny("llama"), None, IDS).route(threshold=0.999)
    assert list(route.edges.columns) == ["layer", "kind", "source", "target", "head", "importance"]
    graph = route.to_networkx()
    assert route.root in graph
    assert route.to_html(tmp_path / "r.html").stat().st_size > 0
    assert fr.load_route(route.save(tmp_path / "r.json")).edges.shape == route.edges.shape


@pytest.mark.parametrize(
    ("position", "threshold", "error"),
    [(7, 0.1, IndexError), (-8, 0.1, IndexError), (0, 1.0, ValueError), (0, -0.1, ValueError)],
)
def test_bad_positions_and_thresholds(position, threshold, error):
    with pytest.raises(error):
        fr.trace(tiny("llama"), None, IDS).route(position, threshold)


def test_graph_and_files(tmp_path):
    route = fr.trace(tiny("neox"), None, IDS).route()
    graph = route.to_networkx()
    assert graph.number_of_edges() == len(route.edges)
    assert all(start.startswith(("X0", "I")) for start, _ in graph.edges())
    again = fr.load_route(route.save(tmp_path / "route.json"))
    assert again.edges.equals(route.edges)
    document = json.loads((tmp_path / "route.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps({**document, "version": 99}))
    (tmp_path / "cut.json").write_text((tmp_path / "route.json").read_text()[:100])
    (tmp_path / "other.json").write_text("{}")
    for name in ("old.json", "cut.json", "other.json"):
        with pytest.raises(ValueError, match=name):
            fr.load_route(tmp_path / name)


def run(*arguments):
    from flowroutes_fast.cli import app

    return CliRunner().invoke(app, list(arguments))


@pytest.mark.demo_model
def test_command_line(tmp_path):
    result = run("trace", IOI, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "' Mary' with probability 0.92" in result.output
    assert "L23H0" in result.output
    assert (tmp_path / "out/route.html").is_file()
    assert (tmp_path / "out/route.json").is_file()
    assert "cpu" in run("doctor").output
    assert fr.__version__ in run("--version").output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trace", ""], "empty"),
        (["trace", "x", "--threshold", "2"], r"\[0, 1\)"),
        (["trace", "x", "--model", "./nowhere"], "no folder or file"),
        (["trace", "x", "--out", "/dev/null/x"], "cannot write"),
        (["trace", "x", "--model", "nowhere.gguf"], "no GGUF file"),
    ],
)
def test_command_line_says_what_is_wrong(arguments, says, monkeypatch, capsys):
    import re
    import sys

    from flowroutes_fast import cli

    monkeypatch.setattr(sys, "argv", ["flowroutes", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        fr.load(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    from flowroutes_fast.system.files import write_atomically

    def stop(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file.json", stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(native.load()[0] is None, reason="native extension not built")
@pytest.mark.parametrize("options", [{}, {"precision": "exact"}, {"measure": "signed"}, {"neurons": True}], ids=str)
def test_threads_argument_is_taken(options, monkeypatch):
    """It reaches every kernel, which takes as many (tests of the extension), and changes no figure."""
    monkeypatch.setattr("flowroutes_fast.tracing.importances.FEW_KEYS", 0)
    module, given = native.extension(), {}

    class Noting:
        def __getattr__(self, name):
            def call(arguments, isa):
                given.setdefault(name, set()).add(arguments.get("threads"))
                return getattr(module, name)(arguments, isa)

            return call

    monkeypatch.setattr(native, "extension", Noting)
    a, b = (fr.trace(tiny("llama"), None, IDS, threads=n, **options) for n in (1, 2))
    assert torch.equal(a.heads, b.heads)
    given.pop("conservation", None)  # too small a work for several
    assert len(given) >= (1 if options == {"measure": "signed"} else 2)
    assert all(threads == {1, 2} for threads in given.values()), given
