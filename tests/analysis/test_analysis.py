"""Findings planted in made-up runs are found; a run of a tiny model goes through every analysis."""

import sys

import chromium
import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from test_corpus import Tokenizer, sentences

import flowroutes_fast as fr
from flowroutes_fast import analysis
from flowroutes_fast.analysis.concepts import _final_norm, _gain
from flowroutes_fast.corpora.statistics import PATTERNS, Statistics
from flowroutes_fast.corpora.texts import Text
from flowroutes_fast.models.families import blocks_of
from flowroutes_fast.models.weights import effective_weight

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")
clusters_module = sys.modules["flowroutes_fast.analysis.clusters"]  # analysis.clusters is the function
domains_module = sys.modules["flowroutes_fast.analysis.domains"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    texts = [Text(text, domain) for domain in ("plain", "other") for text in sentences(30, seed=len(domain))]
    return fr.corpus(make("llama"), Tokenizer(), texts, tmp_path_factory.mktemp("run") / "run")


def test_positional_heads_are_found():
    statistics = Statistics((2, 3), positions=110, texts=10, after_first=100, later=50, first=40)
    place = {name: n for n, name in enumerate(PATTERNS)}
    statistics.total[:] = [1, 2, 3, 9, 8, 7, 0, 0]
    statistics.patterns[place["previous token"], 0, 1] = 70  # just enough
    statistics.patterns[place["previous token"], 0, 2] = 69
    statistics.patterns[place["same word"], 0, 1] = 50
    statistics.quiet[0, 1] = 40
    statistics.patterns[place["same word"], 1, 0] = 35
    statistics.quiet[1, 0] = 28
    statistics.patterns[place["same word"], 1, 1] = 50  # not quiet
    statistics.patterns[place["first token"], 1, 2] = 100
    table = analysis.positional_heads(statistics).set_index(["layer", "head"])
    assert table["role"].to_dict() == {
        (0, 0): "",
        (0, 1): "previous token",
        (0, 2): "",
        (1, 0): "subword merging",
        (1, 1): "",
        (1, 2): "first token",
    }
    assert table["largest"].to_dict()[0, 2]
    assert table["largest"].sum() == 2
    with pytest.raises(ValueError, match="share must lie"):
        analysis.positional_heads(statistics, share=0)
    assert (analysis.positional_heads(Statistics((2, 3)))["role"] == "").all()


class Fake:
    shape = (2, 3)

    def component_names(self):
        return [f"L{n // 3}H{n % 3}" for n in range(6)] + ["FFN0", "FFN1"]


@pytest.fixture
def planted(monkeypatch):
    """Head L0H1 belongs to code, L1H2 to both foreign languages, nothing else to anything."""
    rng = np.random.default_rng(0)
    domains = np.repeat(["code", "de", "es", "general"], 60)
    means = np.abs(rng.normal(0.004, 0.001, (240, 8)))
    means[domains == "code", 1] += 0.05
    means[np.isin(domains, ["de", "es"]), 5] += 0.03
    monkeypatch.setattr(domains_module, "_per_text", lambda corpus: (means, domains, np.ones(240)))
    return means, domains


def test_domain_heads_are_found(planted):
    table = analysis.domain_heads(Fake(), general="general", permutations=500)
    found = table[table["specific"] & (table["q"] < 0.05)]
    assert sorted(zip(found["domain"], found["layer"], found["head"], strict=True)) == [
        ("code", 0, 1),
        ("de", 1, 2),
        ("es", 1, 2),
    ]
    assert table["p"].min() == pytest.approx(1 / 501)
    rest = table[~table["specific"]]["p"]
    assert 0.3 < rest.mean() < 0.7  # no head of its own: uniform
    overlap = analysis.domain_overlap(table)
    assert overlap.loc["de", "es"] == 1
    assert overlap.loc["code", "es"] == 0
    means = analysis.domain_means(Fake(), draws=300)
    row = means[(means["domain"] == "code") & (means["component"] == "L0H1")].iloc[0]
    assert row["low"] < row["mean"] < row["high"]
    assert row["high"] - row["low"] < 0.002


def test_domains_that_cannot_be_compared(planted, monkeypatch):
    with pytest.raises(ValueError, match="unknown domain 'fr'"):
        analysis.domain_heads(Fake(), general="fr")
    means, domains = planted
    few = np.r_[0:10, 180:240]
    monkeypatch.setattr(domains_module, "_per_text", lambda corpus: (means[few], domains[few], np.ones(len(few))))
    assert analysis.domain_heads(Fake(), general="general")["p"].isna().all()
    monkeypatch.setattr(domains_module, "_per_text", lambda corpus: (means[:60], domains[:60], np.ones(60)))
    with pytest.raises(ValueError, match="compared with one another"):
        analysis.domain_heads(Fake())


def test_a_run_goes_through(run):
    table = analysis.domain_heads(run, permutations=50)
    assert len(table) == 2 * run.shape[0] * run.shape[1]
    whole = analysis.domain_means(run, draws=20)
    assert set(whole["component"]) == set(run.component_names())
    assert len(analysis.positional_heads(run.all_domains())) == run.shape[0] * run.shape[1]
    found = analysis.untouched(run, limit=1.0)
    assert found.others == 0
    assert found.by_token["share"].eq(1).all()
    assert found.beginnings == len(run.texts())
    assert "100.0% of all beginnings" in str(found)
    nothing = analysis.untouched(run, limit=0.0)
    assert nothing.count == 0
    assert str(nothing).startswith("None of")
    with pytest.raises(ValueError, match="no layer is left"):
        analysis.untouched(run, skip=(0.5, 0.5))
    with pytest.raises(ValueError, match="most must lie"):
        analysis.untouched(run, most=80)
    every, half = (analysis.untouched(run, limit=0.4, most=share).count for share in (1.0, 0.5))
    assert every <= half


def test_first_periods(run):
    texts = {row.number: row.text for row in run.texts().itertuples()}
    found = analysis.untouched(run, limit=1.0).positions
    marked = found[found["first period"]]
    assert len(marked) > 10
    for row in marked.itertuples():
        assert row.token.strip() == "."
        assert texts[row.number][: row.begin].count(".") == 0


def test_attention_that_lands(run):
    """Against attention weights that the model itself gives, position by position."""
    model, middle = make("llama"), analysis.untouched(run, limit=1.0).positions["taken"].median()
    found = analysis.untouched(run, limit=middle)
    assert 0 < found.count < 0.9 * (found.count + found.others)
    seen = analysis.attention_on(run, model, found, texts=3)
    keys = found.positions[["number", "piece"]].drop_duplicates()
    chosen = keys.iloc[[0, (len(keys) - 1) // 2, len(keys) - 1]]
    positions, weights = run.positions(), {True: [], False: []}
    special, periods = (
        {(r.number, r.piece, r.position) for r in t.itertuples()} for t in (found.positions, found.first_periods)
    )
    model.set_attn_implementation("eager")
    for key in chosen.itertuples(index=False):
        ids = positions[(positions["number"] == key.number) & (positions["piece"] == key.piece)]["token_id"].tolist()
        with torch.no_grad():
            attention = torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions).mean((0, 1, 2))
        for place in range(len(ids) - 1):
            if (*key, place) in special or (*key, place) not in periods:
                weights[(*key, place) in special].append(float(attention[place + 1 :, place].mean()))
    assert seen.untouched == pytest.approx(np.mean(weights[True]), rel=1e-4)
    assert seen.others == pytest.approx(np.mean(weights[False]), rel=1e-4)
    assert seen.texts == 3
    assert f"untouched positions {seen.untouched:.4f}" in str(seen)


def test_clusters_that_are_there(run, monkeypatch):
    rng = np.random.default_rng(0)
    tags = rng.choice(["NOUN", "DET"], 300)
    points = pd.DataFrame(
        {
            "number": 0,
            "piece": 0,
            "position": range(300),
            "begin": range(300),
            "end": range(1, 301),
            "word": range(300),
            "later": False,
            "starts": False,
        }
    )
    components = rng.normal(0, 1, (300, 20)) + 5 * (tags == "DET")[:, None]
    monkeypatch.setattr(clusters_module, "_sample", lambda *_: (points.copy(), components))

    class Texts:
        def texts(self):
            return pd.DataFrame({"number": [0], "piece": [0], "text": ["a" * 300]})

    found = analysis.clusters(
        Texts(), lambda text: [(n, n + 1, tag) for n, tag in enumerate(tags)], method="pca", shuffles=5
    )
    score = found.scores.set_index("labels").loc["part of speech"]
    assert score["silhouette"] > 0.2 > 0.02 > score["shuffled largest"]


def test_clusters_of_a_run(run):
    def tagger(text):
        return [(0, len(text), "NOUN" if len(text) % 2 else "DET")]

    found = analysis.clusters(run, tagger, sample=200, shuffles=2)
    assert {"x", "y", "pca_x", "tag", "subword", "digits"} <= set(found.points)
    assert found.points[["x", "y"]].notna().all().all()
    assert not (found.points["position"] == 0).any()
    with pytest.raises(ValueError, match="unknown method"):
        analysis.clusters(run, tagger, method="mds")
    with pytest.raises(ValueError, match="unknown domain"):
        analysis.clusters(run, tagger, domain="fr")


def test_the_tagger_without_downloads():
    pytest.importorskip("textblob")
    text = "The dog sees 3 cats."
    assert [(text[a:b], tag) for a, b, tag in clusters_module.textblob_tagger(text)] == [
        ("The", "DET"),
        ("dog", "NOUN"),
        ("sees", "VERB"),
        ("3", "NUM"),
        ("cats", "NOUN"),
        (".", "."),
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2", "falcon, new", "nemotron"])
def test_concepts_are_those_of_the_whole_matrix(name):
    model = make(name)
    found = analysis.concepts(model, None, rank=2, top=5)
    block = blocks_of(model)[1]
    read = effective_weight(block.values, 1).T
    w_v = block.family.value_of(block.attention, read[None])[0]
    count = model.config.num_attention_heads
    w_o = block.w_o(count)
    if block.post_norm is not None:
        w_o = w_o * _gain(block.post_norm, w_o)[0]
    gain, centred = _gain(_final_norm(model), w_o)
    for head in range(count):
        whole = (w_v[head // (count // len(w_v))] @ w_o[head]).double()
        _, sigma, v = torch.linalg.svd(whole)
        mine = found.of(1, head)
        np.testing.assert_allclose(mine["sigma"].to_numpy()[::2], sigma[:2], rtol=1e-4)
        vector = v[0].float() - (v[0].float().mean() if centred else 0)
        logits = (vector * gain) @ effective_weight(model.get_output_embeddings(), -1).T
        best = {tuple(str(i) for i in (sign * logits).topk(5).indices.tolist()) for sign in (1, -1)}
        assert {tuple(t) for t in mine[mine["rank"] == 0]["tokens"]} == best


@pytest.mark.parametrize(
    ("name", "centred"), [("llama", False), ("gpt2", True), ("gemma2", False), ("cohere", True), ("nemotron", True)]
)
def test_gains_of_norms(name, centred):
    model = make(name)
    norm = _final_norm(model)
    x = torch.randn(1, model.config.hidden_size)
    gain, subtracts = _gain(norm, x)
    assert subtracts == centred
    with torch.no_grad():
        linear = (x - x.mean() if centred else x)[0] * gain
        changed = (norm(x) - norm(-x))[0] / 2
    torch.testing.assert_close(linear / linear.norm(), changed / changed.norm(), rtol=1e-3, atol=1e-5)


def test_concepts_of_some_heads_and_searching():
    model = make("llama")
    found = analysis.concepts(model, None, rank=1, top=3, heads=[(0, 1), (2, 3)])
    assert set(zip(found.table["layer"], found.table["head"], strict=True)) == {(0, 1), (2, 3)}
    token = found.of(0, 1)["tokens"].iloc[0][0]
    assert (0, 1) in set(zip(found.search(token)["layer"], found.search(token)["head"], strict=True))
    assert len(found.search(token, heads=[(2, 3)])) <= 2
    with pytest.raises(ValueError, match="no head L9H9"):
        analysis.concepts(model, None, heads=[(9, 9)])
    with pytest.raises(ValueError, match="rank must be"):
        analysis.concepts(model, None, rank=0)
    with pytest.raises(ValueError, match="latent attention"):
        analysis.concepts(make("deepseek_v3"), None)


def test_a_report(run, tmp_path):
    pytest.importorskip("matplotlib")

    def tagger(text):
        return [(0, len(text), "NOUN" if len(text) % 2 else "DET")]

    page = analysis.analyze(
        run, tmp_path, model=make("llama"), general="plain", tagger=tagger, sample=200, permutations=20
    )
    text = page.read_text()
    for title in (
        "Components by layer",
        "Heads by where they look",
        "Clusters of positions",
        "Periods as BOS",
        "Domains",
        "What heads write",
    ):
        assert title in text
    assert text.count("<svg") == 4
    for name in ("components", "positional", "clusters", "domains"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert (tmp_path / f"{name}.svg").is_file()
    concepts = pd.read_csv(tmp_path / "concepts.csv")
    assert len(concepts[["layer", "head"]].drop_duplicates()) == run.shape[0] * run.shape[1]
    assert "attention weight from each later position" in text or "None of" in text
    assert len(pd.read_csv(tmp_path / "clusters.csv")) > 50
    heads = pd.read_csv(tmp_path / "heads.csv")
    np.testing.assert_allclose(heads["importance"], run.all_domains().heads()["importance"], rtol=1e-4)
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_a_report_on_another_model(run, tmp_path):
    """Concepts and attention of other weights are no findings about this run."""
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"not that of the run in .* \(differing: weights\)"):
        analysis.analyze(run, tmp_path, model=model)
    with pytest.raises(ValueError, match="differing: weights"):
        analysis.attention_on(run, model, analysis.untouched(run, limit=1.0))
    other = Tokenizer()
    other.shift = 1
    with pytest.raises(ValueError, match="differing: tokenizer"):
        analysis.analyze(run, tmp_path, model=make("llama"), tokenizer=other)
    assert not list(tmp_path.glob("*.html"))


def test_a_report_of_what_was_kept(tmp_path):
    bare = fr.corpus(make("llama"), Tokenizer(), sentences(5), tmp_path / "run", positions=False, edges=False)
    text = analysis.analyze(bare, tmp_path / "out").read_text()
    assert "kept no positions" in text
    assert "one domain" in text
    assert "No model was given" in text
    assert f"Traced with flowroutes_fast {fr.__version__}, torch {torch.__version__}" in text


def test_a_report_of_little(tmp_path):
    """Too few positions for clusters, too few texts for a test: said, and the rest is there."""
    few = fr.corpus(
        make("llama"),
        Tokenizer(),
        {"a": [t[:30] for t in sentences(1)], "b": [t[:30] for t in sentences(2, seed=1)]},
        tmp_path / "run",
    )
    text = analysis.analyze(few, tmp_path / "out", permutations=10).read_text()
    assert "Clusters need 50 positions, there are" in text
    assert "b: not tested, for a test takes 20 texts on either side;" in text
    assert "Periods as BOS" in text


def test_umap(run):
    pytest.importorskip("umap")
    found = analysis.clusters(run, lambda text: [(0, len(text), "NOUN")], sample=100, method="umap", shuffles=2)
    assert found.points[["x", "y"]].std().gt(0).all()
    assert not np.allclose(found.points["x"], found.points["pca_x"])


def test_umap_that_is_not_there(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"needs umap-learn: pip install 'flowroutes_fast\[umap\]'"):
        analysis.clusters(run, lambda text: [], sample=100, method="umap", shuffles=1)


def test_searching_the_page(run, tmp_path):
    """In a browser: a token, a domain or a head leaves the rows that have it; numbers of other columns do not count."""
    pytest.importorskip("websocket")
    if chromium.BINARY is None:
        pytest.skip("no Chromium here")
    report, heads = sys.modules["flowroutes_fast.analysis.report"], [(0, 1, ""), (1, 2, "other"), (3, 0, "")]
    rows = [
        {"layer": layer, "head": head, "domains": domains, "sigma": 41.5, "tokens": [f"token{layer}", "<b>"]}
        for layer, head, domains in heads
    ]
    section = report.Section("What heads write", [], "", {"concepts": pd.DataFrame(rows)}, searchable=True)
    page = report.write_page(run, tmp_path, [section], [])
    browser = chromium.Chromium()
    try:
        browser.open(page, "Boolean(document.querySelector('input'))")
        for text, wanted in (
            ("", [0, 1, 3]),
            ("L1H2", [1]),
            ("TOKEN3", [3]),
            ("other", [1]),
            ("41", []),
            ("<b>", [0, 1, 3]),
        ):
            browser.run(
                f"(box => {{ box.value = {text!r}; box.dispatchEvent(new Event('input')); "
                f"}})(document.querySelector('input'))"
            )
            shown = browser.run(
                "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => "
                "Number(r.cells[0].textContent))"
            )
            assert shown == wanted, text
        assert not browser.of("exception")
    finally:
        browser.close()


def test_tokens_are_escaped(run, tmp_path, monkeypatch):
    report = sys.modules["flowroutes_fast.analysis.report"]
    rows = [
        {
            "layer": 0,
            "head": 0,
            "rank": 0,
            "sign": 1,
            "sigma": 1.0,
            "share": 1.0,
            "tokens": ["<img src=x onerror=alert(1)>"],
        }
    ]
    monkeypatch.setattr(report, "concepts", lambda *_, **__: analysis.Concepts(pd.DataFrame(rows)))
    monkeypatch.setattr(report.Corpus, "check_model", lambda *_: True)
    text = analysis.analyze(
        run, tmp_path, model=object(), tagger=lambda text: [(0, 1, "X")], sample=100, permutations=5
    ).read_text()
    assert "<img" not in text
    assert "&lt;img" in text
