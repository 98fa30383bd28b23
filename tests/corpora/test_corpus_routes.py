"""A corpus run of routes alone: the routes and frequencies of a full run from the rows they reach, and nothing
else, by name.
"""

import json

import numpy as np
import pandas as pd
import pytest
from families import make
from test_corpus import Text, Tokenizer, sentences
from typer.testing import CliRunner

import flowroutes_fast as fr
from flowroutes_fast.analysis import analyze, clusters, domain_heads, domain_means, positional_heads, untouched
from flowroutes_fast.cli import app
from flowroutes_fast.corpora import run as runs
from flowroutes_fast.corpora.state import _checksum
from flowroutes_fast.corpora.statistics import Statistics
from flowroutes_fast.results.contrast import head_frequencies

pytest.importorskip("pyarrow")
TEXTS = [Text(text, "ab"[n % 2]) for n, text in enumerate(sentences(11))]
OPTIONS = {"window": 4, "batch_tokens": 60}
FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "falcon_h1",
    "qwen2_moe",
]  # sequential, learned positions, parallel, windows, mixers, experts


def traced(model, folder, texts=TEXTS, **options):
    return fr.corpus(model, Tokenizer(), texts, folder, **OPTIONS | options)


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    return traced(model, tmp_path_factory.mktemp("routes") / "run", routes_only=True)


def same_tables(found, wanted):
    """Equal but for rounding of importances."""
    rest = [name for name in wanted if name != "importance"]
    pd.testing.assert_frame_equal(found[rest], wanted[rest])
    np.testing.assert_allclose(found["importance"], wanted["importance"], atol=1e-5)


def same_routes(found, wanted):
    same_tables(found.edges(), wanted.edges())
    same_tables(found.frequencies(), wanted.frequencies())
    assert found.texts().equals(wanted.texts().drop(columns="mean", errors="ignore"))
    assert found.domains == wanted.domains
    for domain in wanted.domains:
        mine, theirs = found.statistics[domain], wanted.statistics[domain]
        np.testing.assert_array_equal(mine.in_routes, theirs.in_routes)
        for name in ("positions", "texts", "after_first", "later", "first"):
            assert getattr(mine, name) == getattr(theirs, name)


@pytest.mark.parametrize("name", FAMILIES)
def test_routes_are_those_of_a_full_run(name, tmp_path):
    model = make(name)
    # its heads are weak
    options = {"threshold": 0.002, "precision": "exact"} if name == "gpt2" else {"threshold": 0.02}
    full = traced(model, tmp_path / "full", **options)
    found = traced(model, tmp_path / "routes", routes_only=True, **options)
    assert len(full.edges()) > 5 * len(TEXTS)
    assert full.all_domains().in_routes.any()
    same_routes(found, full)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0, "floor": 0.0, "precision": "exact"},
        {"threshold": 0.3},
        {"overflow": "split", "max_tokens": 5},
    ],
    ids=str,
)
def test_other_thresholds_and_pieces(model, tmp_path, options):
    full, found = (traced(model, tmp_path / str(only), routes_only=only, **options) for only in (False, True))
    same_routes(found, full)


def test_only_reached_rows_are_evaluated(model, tmp_path, monkeypatch):
    from flowroutes_fast.results.lazy import LazyTrace
    from flowroutes_fast.tracing import trace as tracing

    seen = []
    release = LazyTrace.release
    monkeypatch.setattr(
        LazyTrace,
        "release",
        lambda one: (seen.append((one.certificate["rows"], one.n_layers * len(one.tokens))), release(one)),
    )
    monkeypatch.setattr(tracing, "_run", lambda *_, **__: pytest.fail("a full trace ran"))
    traced(model, tmp_path / "run", routes_only=True, threshold=0.1)
    assert len(seen) == len(TEXTS)
    rows, every = map(sum, zip(*seen, strict=True))
    assert 0 < rows < every / 2


@pytest.mark.parametrize("windows", [0, 1, 2])
def test_an_interrupted_run_goes_on(model, done, tmp_path, monkeypatch, windows):
    write = runs.Folder.write
    with monkeypatch.context() as patched:
        patched.setattr(
            runs.Folder,
            "write",
            lambda self, window, rows: 1 / 0 if window.number == windows else write(self, window, rows),
        )
        with pytest.raises(ZeroDivisionError):
            traced(model, tmp_path / "run", routes_only=True)
    assert traced(model, tmp_path / "run", routes_only=True).states[0].files == done.states[0].files
    assert traced(model, tmp_path / "run", routes_only=True).finished


def test_shards_add_up(model, done, tmp_path):
    folders = [traced(model, tmp_path / str(i), routes_only=True, shard=(i, 2)).folders[0] for i in (0, 1)]
    same_routes(fr.open_corpus(*folders), done)
    full = traced(model, tmp_path / "full", shard=(1, 2))
    with pytest.raises(ValueError, match="differing: positions, routes_only"):
        fr.open_corpus(folders[0], full.folders[0])


def test_another_choice_is_refused(model, done, tmp_path):
    with pytest.raises(ValueError, match=r"holds another run \(differing: positions, routes_only\)"):
        traced(model, done.folders[0])
    with pytest.raises(ValueError, match=r"holds another run \(differing: routes_only\)"):
        traced(model, done.folders[0], positions=False)
    with pytest.raises(ValueError, match="leave out one of positions and routes_only"):
        traced(model, tmp_path / "run", routes_only=True, positions=True)
    assert not (tmp_path / "run").exists()


MISSING = {
    "positions": lambda run: run.positions(),
    "positions by part": lambda run: list(run.parts("positions")),
    "means of texts": lambda run: list(run.parts("texts", ["mean"])),
    "mean": lambda run: run.statistics["a"].mean(),
    "variance": lambda run: run.all_domains().variance(),
    "heads": lambda run: run.statistics["b"].heads(),
    "ffn": lambda run: run.all_domains().ffn(),
    "active": lambda run: run.all_domains().active,
    "patterns": lambda run: run.all_domains().patterns,
    "quiet": lambda run: run.all_domains().quiet,
    "domain_means": domain_means,
    "domain_heads": domain_heads,
    "untouched": untouched,
    "clusters": clusters,
    "positional": lambda run: positional_heads(run.all_domains()),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_named(done, name):
    with pytest.raises(
        ValueError,
        match=r"^a run with routes_only=True evaluates what its routes reach and has no [a-z ]+: run it without, into "
        r"a new folder$",
    ):
        MISSING[name](done)


def test_no_report(done, tmp_path):
    with pytest.raises(ValueError, match=r"routes_only=True .* has no means over positions, which a report is about"):
        analyze(done, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_sums_of_both_kinds_do_not_mix():
    with pytest.raises(ValueError, match="cannot be added"):
        Statistics((2, 3)).merge(Statistics((2, 3), routes_only=True))
    assert not hasattr(Statistics((2, 3), routes_only=True), "nothing")


def test_nothing_of_all_rows_is_written(done):
    assert "mean" not in done.texts()
    assert not list(done.folders[0].glob("positions-*"))
    sums = next(done.folders[0].glob("statistics*")).read_bytes()
    names = json.loads(sums[8 : 8 + int.from_bytes(sums[:8], "little")])
    assert sorted(names) == ["0.in_routes", "1.in_routes", "__metadata__"]


def test_without_edges(model, done, tmp_path):
    sums = traced(model, tmp_path / "sums", routes_only=True, edges=False)
    np.testing.assert_array_equal(sums.all_domains().in_routes, done.all_domains().in_routes)
    for call in (sums.edges, sums.frequencies):
        with pytest.raises(ValueError, match="this run kept no edges; run it with edges=True"):
            call()


def test_frequencies_are_those_of_routes(model, done):
    """Heads as :func:`head_frequencies` counts them; FFNs and residual connections by a loop."""
    for domain in (None, "a"):
        texts = [t for t in TEXTS if domain in (None, t.domain)]
        routes = [fr.route(model, None, Tokenizer()(t.text)["input_ids"]) for t in texts]
        found = done.frequencies(domain)
        heads = found[found["kind"] == "attention"].drop(columns="kind").reset_index(drop=True)
        pd.testing.assert_frame_equal(heads, head_frequencies(routes)[list(heads)], check_dtype=False, atol=1e-6)
        for kind in ("ffn", "attention_residual"):
            for layer in range(3):
                count = sum(((r.edges["layer"] == layer) & (r.edges["kind"] == kind)).any() for r in routes)
                mine = found[(found["kind"] == kind) & (found["layer"] == layer)]
                assert mine["frequency"].tolist() == ([count / len(texts)] if count else [])
    with pytest.raises(ValueError, match=r"unknown domain 'c': choose one of 'a', 'b'"):
        done.frequencies("c")


def test_runs_from_before_the_choice_go_on(model, tmp_path):
    """A folder whose settings do not know the option is one of a full run."""
    full = traced(model, tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    found = json.loads(file.read_text())
    del found["checksum"], found["settings"]["routes_only"], found["settings"]["evaluation"]
    file.write_text(json.dumps(found | {"checksum": _checksum(found)}))
    assert traced(model, tmp_path / "run").states[0].files == full.states[0].files
    with pytest.raises(ValueError, match="differing: positions, routes_only"):
        traced(model, tmp_path / "run", routes_only=True)


def test_streamed_models_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "final")
    streamed, _ = fr.open_streaming(tmp_path / "final")
    with pytest.raises(ValueError, match="routes_only=True needs the weights in memory"):
        traced(streamed, tmp_path / "run", routes_only=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.demo_model
def test_command(tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on the mat.")
    command = ["corpus", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"), "--routes-only"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    run = fr.open_corpus(tmp_path / "run")
    assert run.settings["routes_only"]
    assert len(run.edges())
    for more, said in (
        (["--positions"], "leave out one of positions"),
        (["--memory", "1GiB"], "--memory and --routes-only exclude one another"),
    ):
        with pytest.raises(ValueError, match=said):
            CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
