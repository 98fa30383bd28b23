"""Texts in, sums and tables out: the same whatever the batches, the windows, the shards and the kills."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import flowroutes_fast as fr
from flowroutes_fast.cli import app
from flowroutes_fast.corpora.results import vectors
from flowroutes_fast.corpora.run import batches
from flowroutes_fast.corpora.statistics import PATTERNS, observe
from flowroutes_fast.corpora.texts import Skipped, Stream, Text, pieces, read_texts
from flowroutes_fast.corpora.words import first_of_several, later, word_start, words

pytest.importorskip("pyarrow")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


class Tokenizer:
    """Two letters a token; spaces and punctuation belong to what follows them."""

    is_fast = True

    def __call__(self, text, return_offsets_mapping=False, verbose=True):
        ends = list(range(2, len(text), 2))
        offsets = list(zip([0, *ends], [*ends, len(text)], strict=True))
        ids = [(sum(map(ord, text[a:b])) * 7) % 100 for a, b in offsets]
        return {"input_ids": ids, "offset_mapping": offsets}


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, 9))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def model():
    return make("llama")


TEXTS = [Text(text, "ab"[n % 2]) for n, text in enumerate(sentences(23))]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return fr.corpus(model, Tokenizer(), TEXTS, tmp_path_factory.mktemp("whole") / "run", window=5, batch_tokens=100)


def same_sums(a, b):
    for domain in {*a.statistics, *b.statistics}:
        for name in ("total", "squares", "active", "in_routes", "patterns", "quiet"):
            np.testing.assert_allclose(
                getattr(a.statistics[domain], name), getattr(b.statistics[domain], name), rtol=1e-5, err_msg=name
            )
        assert a.statistics[domain].texts == b.statistics[domain].texts
        assert a.statistics[domain].positions == b.statistics[domain].positions


def test_rows_and_sums_are_those_of_single_traces(model, whole):
    tokenizer = Tokenizer()
    texts, positions, edges = whole.texts(), whole.positions(), whole.edges()
    assert texts["text"].tolist() == [t.text for t in TEXTS]
    for number, text in enumerate(TEXTS):
        trace = fr.trace(model, None, tokenizer(text.text)["input_ids"], thresholds=[0.04])
        rows = positions[positions["number"] == number]
        components = vectors(rows["components"])
        expected = torch.cat([trace.heads.permute(1, 0, 2).flatten(1), trace.ffn.T], 1).numpy()
        np.testing.assert_allclose(components, expected, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(texts["mean"][number], expected.mean(0), rtol=2e-3, atol=1e-5)
        assert rows["position"].tolist() == list(range(len(trace.tokens)))
        route = trace.route(-1, 0.04).edges
        mine = edges[edges["number"] == number]
        assert len(mine) == len(route)
        np.testing.assert_allclose(np.sort(mine["importance"]), np.sort(route["importance"]), rtol=5e-3)
    every = vectors(positions["components"])
    domain = np.array([TEXTS[n].domain for n in positions["number"]])
    for name in whole.domains:
        mean, variance = whole.statistics[name].mean(), whole.statistics[name].variance()
        np.testing.assert_allclose(mean, every[domain == name].mean(0), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(variance, every[domain == name].var(0, ddof=1), rtol=1e-3, atol=1e-9)
    heads = whole.all_domains().heads()
    assert (
        heads["in_routes"].sum() * len(TEXTS)
        == edges[edges["kind"] == "attention"].groupby("number")[["layer", "head"]].value_counts().shape[0]
    )
    assert list(whole.component_names()[:2]) == ["L0H0", "L0H1"]
    assert len(whole.component_names()) == every.shape[1] == layers_heads(whole)


def layers_heads(run):
    layers, heads = run.shape
    return layers * heads + layers


def test_patterns_against_a_loop(model):
    text = "alpha beta, gamma"
    found = Tokenizer()(text)
    trace = fr.trace(model, None, found["input_ids"], precision="exact", thresholds=[0.04])
    word = words(text, found["offset_mapping"])
    seen = observe(trace, word, 0.04)
    begins, goes_on = word_start(word), later(word)
    dense = trace.dense.numpy() if isinstance(trace.dense, torch.Tensor) else np.stack([d.numpy() for d in trace.dense])
    tokens = len(word)
    for layer in range(trace.n_layers):
        for head in range(trace.heads.shape[-1]):
            counts = dict.fromkeys(PATTERNS, 0)
            for q in range(1, tokens):
                row = dense[layer][head, q]
                half = 0.5 * float(trace.heads[layer, q, head])
                for name, share in {
                    "same token": row[q],
                    "previous token": row[q - 1],
                    "two before": row[q - 2] if q > 1 else 0,
                    "three before": row[q - 3] if q > 2 else 0,
                    "first token": row[0],
                }.items():
                    counts[name] += share > half
                if goes_on[q]:
                    counts["same word"] += row[begins[q] : q].sum() > half
            assert [counts[name] for name in PATTERNS] == seen.patterns[:, layer, head].tolist()
            assert seen.active[layer, head] == (dense[layer][head] > 0.04).any(1).sum()
    received = sum(
        np.tril(dense[layer][head], -1).sum(0)
        for layer in range(trace.n_layers)
        for head in range(trace.heads.shape[-1])
    )
    np.testing.assert_allclose(
        seen.received[:-1], (received / np.maximum(tokens - 1 - np.arange(tokens), 1))[:-1], rtol=1e-4
    )


@pytest.mark.parametrize(
    "options", [{"window": 4, "batch_tokens": 20}, {"window": 100, "batch_tokens": 10**6}, {"precision": "exact"}]
)
def test_windows_and_batches_change_nothing(model, whole, tmp_path, options):
    other = fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", **options)
    assert other.texts()["number"].tolist() == whole.texts()["number"].tolist()
    np.testing.assert_allclose(
        vectors(other.texts()["mean"]), vectors(whole.texts()["mean"]), rtol=1e-2, atol=5e-4
    )  # certified: an interval


def test_shards_add_up(model, whole, tmp_path):
    folders = [tmp_path / str(i) for i in range(3)]
    for i, folder in enumerate(folders):
        fr.corpus(model, Tokenizer(), TEXTS, folder, shard=(i, 3), window=5, batch_tokens=100)
    together = fr.open_corpus(*folders)
    same_sums(together, whole)
    assert together.texts()["text"].tolist() == whole.texts()["text"].tolist()
    assert together.finished
    with pytest.raises(ValueError, match="same shard"):
        fr.open_corpus(folders[0], folders[0])


KILLED = """
import os, sys
sys.path[:0] = [sys.argv[3], os.path.dirname(sys.argv[3])]
import flowroutes_fast as fr
from flowroutes_fast.corpora import run
from test_corpus import TEXTS, Tokenizer
from families import make
left = [int(sys.argv[2])]

def killed(*rest, original={name}):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return original(*rest)

{name} = killed
fr.corpus(make("llama"), Tokenizer(), TEXTS, sys.argv[1], window=5, batch_tokens=100)
"""


@pytest.mark.parametrize(
    ("name", "calls"),
    [("run._write_table", 4), ("run.Folder._write_state", 2), ("run.write_text", 1), ("run._evaluate", 12)],
)
def test_no_row_is_lost_or_doubled_by_a_kill(model, whole, tmp_path, name, calls):
    """Killed between any two files, the run goes on and gives the same, bit for bit."""
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(name=name), str(tmp_path / "run"), str(calls), here],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    again = fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", window=5, batch_tokens=100)
    for table in ("texts", "positions", "edges"):
        a, b = getattr(again, table)(), getattr(whole, table)()
        assert len(a) == len(b)
        for column in a:
            if column in ("mean", "components"):
                np.testing.assert_array_equal(vectors(a[column]), vectors(b[column]))
            else:
                assert a[column].tolist() == b[column].tolist()
    for domain in whole.domains:
        np.testing.assert_array_equal(again.statistics[domain].total, whole.statistics[domain].total)
        np.testing.assert_array_equal(again.statistics[domain].patterns, whole.statistics[domain].patterns)
    assert again.progress[0].tokens == whole.progress[0].tokens
    # nothing is done twice
    assert fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", window=5, batch_tokens=100).finished


def test_another_run_in_the_folder(model, tmp_path, monkeypatch):
    from filelock import FileLock

    from flowroutes_fast.corpora import run

    def again(texts=TEXTS, where=tmp_path / "run", **options):
        return fr.corpus(model, Tokenizer(), texts, where, window=5, batch_tokens=100, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run.Folder, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again()
    with pytest.raises(ValueError, match=r"holds another run \(differing: threshold\)"):
        again(threshold=0.1)
    with pytest.raises(ValueError, match="not those of the run"):
        again([*TEXTS[:3], "something else", *TEXTS[4:]])
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process"):
        again()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        again(where=tmp_path)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json' cannot be read"):
        again()


def test_damaged_results(model, tmp_path):
    run = fr.corpus(model, Tokenizer(), TEXTS[:4], tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="holds no corpus run"):
        fr.open_corpus(tmp_path)
    file = tmp_path / "run" / "positions-000000.parquet"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"positions-000000.parquet' is damaged"):
        run.positions()
    file.unlink()
    with pytest.raises(ValueError, match=r"positions-000000.parquet' is missing"):
        run.positions()
    next(tmp_path.glob("run/statistics*")).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or missing"):
        fr.open_corpus(tmp_path / "run")


def test_long_texts(model, tmp_path):
    texts = ["alpha beta gamma delta epsilon", "alpha", "eta theta iota kappa alpha"]
    cut = fr.corpus(model, Tokenizer(), texts, tmp_path / "cut", max_tokens=6)
    assert cut.texts()["tokens"].tolist() == [6, 3, 6]
    assert (cut.progress[0].truncated, cut.progress[0].dropped) == (2, 9 + 7)
    split = fr.corpus(model, Tokenizer(), texts, tmp_path / "split", max_tokens=6, overflow="split")
    assert split.texts()["tokens"].tolist() == [6, 6, 3, 3, 6, 6, 1]
    assert split.progress[0].split == 2
    tables = fr.corpus(model, Tokenizer(), texts, tmp_path / "sums", positions=False, edges=False)
    with pytest.raises(ValueError, match="kept no positions"):
        tables.positions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "wrap"}, "unknown overflow"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"window": 0}, "window"),
        ({"shard": (3, 3)}, "shard"),
        ({"threshold": 1e-5}, "threshold"),
        ({"split": "word"}, "unknown split"),
    ],
)
def test_bad_options(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", **options)


def test_nothing_to_trace(model, tmp_path):
    with pytest.raises(ValueError, match=r"no text to trace \(2 empty\)"):
        fr.corpus(model, Tokenizer(), ["", "  "], tmp_path / "run")
    with pytest.raises(TypeError, match="texts must be"):
        fr.corpus(model, Tokenizer(), 3, tmp_path / "run2")
    with pytest.raises(TypeError, match="tokenizer"):
        fr.corpus(model, None, TEXTS, tmp_path / "run3")


def test_sources(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nlines\n\n\nthree")
    (tmp_path / "b.jsonl").write_text('{"text": "four", "domain": "x"}\n\n{"text": ""}\n"five"\n')
    pd.DataFrame({"text": ["six", None], "domain": ["y", ""]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / "e.txt").write_bytes("Ein längerer Satz über Füchse, damit man ihn erkennt.".encode("latin-1"))
    (tmp_path / "f.txt").write_text("")
    skipped = Skipped()
    found = list(read_texts(tmp_path, split="paragraph", domain="z", skipped=skipped))
    assert [(t.text, t.domain) for t in found[:6]] == [
        ("one", "z"),
        ("two\nlines", "z"),
        ("three", "z"),
        ("four", "x"),
        ("five", "z"),
        ("six", "y"),
    ]
    assert "Füchse" in found[6].text
    assert skipped.counts["binary"] == 1
    assert skipped.counts["empty"] == 2
    assert any(reason.startswith("decoded as") for reason in skipped.counts)
    assert [t.domain for t in read_texts({"m": ["a", "b"], "n": tmp_path / "a.txt"})] == ["m", "m", "n"]


def test_streams():
    assert [t.text for t in read_texts(Stream(io.StringIO('{"text": "a"}\nplain\n{not json\n')))] == [
        "a",
        "plain",
        "{not json",
    ]
    raw = "Ein längerer Satz über Füchse\n".encode("latin-1") + b'\n\0\1\n{"text": "half \\ud800"}\n'
    skipped = Skipped()
    assert [t.text for t in read_texts(Stream(io.BytesIO(raw)), skipped=skipped)] == [
        "Ein längerer Satz über Füchse",
        "half ?",
    ]
    assert (
        skipped.counts.pop("binary")
        == skipped.counts.pop("empty")
        == skipped.counts.pop("broken characters replaced")
        == 1
    )
    assert next(iter(skipped.counts)).startswith("decoded as")
    with pytest.raises(ValueError, match="line 1 has no field 'text'; it has 'body'"):
        list(read_texts(Stream(io.StringIO('{"body": "a"}'))))


def test_strings_of_jsonl_hold_line_separators(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\u2028two\x0cthree"}, ensure_ascii=False) + "\n")
    assert [t.text for t in read_texts(tmp_path / "a.jsonl")] == ["one\u2028two\x0cthree"]


def test_hidden_files_are_no_texts(tmp_path):
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "a").write_text("no text of the user's")
    (tmp_path / ".hidden").write_text("nor this")
    (tmp_path / "a.txt").write_text("one")
    assert [t.text for t in read_texts(tmp_path)] == ["one"]


class Bar:
    """Stands for tqdm."""

    totals: list

    def __init__(self, **options):
        self.options, self.totals, self.total = options, [], None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def refresh(self):
        self.totals.append(self.total)

    def update(self, tokens):
        pass


@pytest.mark.parametrize("options", [{}, {"shard": (1, 3)}, {"max_tokens": 6}, {"max_tokens": 6, "overflow": "split"}])
def test_the_bar_foretells_tokens(model, tmp_path, monkeypatch, options):
    """From the first window on it knows the total within a few tokens, and at the end exactly."""
    from flowroutes_fast.corpora import run

    bars = []
    monkeypatch.setattr(run, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    found = fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", window=5, progress=True, **options)
    tokens = found.progress[0].tokens
    assert len(bars[0].totals) == 5
    assert all(abs(total - tokens) <= 0.2 * tokens for total in bars[0].totals)
    assert bars[0].totals[-1] == tokens
    fr.corpus(model, Tokenizer(), iter(TEXTS), tmp_path / "stream", window=5, progress=True, **options)
    assert set(bars[1].totals) == {None}


def test_the_bar_goes_on_after_a_kill(model, tmp_path, monkeypatch):
    from flowroutes_fast.corpora import run

    write, bars = run.Folder.write, []

    def stopped(self, window, rows):
        if window.number == 2:
            raise KeyboardInterrupt
        write(self, window, rows)

    with monkeypatch.context() as patched:
        patched.setattr(run.Folder, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", window=5)
    done = fr.open_corpus(tmp_path / "run").progress[0].tokens
    monkeypatch.setattr(run, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    found = fr.corpus(model, Tokenizer(), TEXTS, tmp_path / "run", window=5, progress=True)
    assert bars[0].options["initial"] == done
    assert bars[0].totals[-1] == found.progress[0].tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{', "line 2, is not JSON"),
        ("a.jsonl", '{"body": "x"}', "no field 'text'; it has 'body'"),
        ("a.parquet", "nonsense", "no Parquet file, or damaged"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        list(read_texts(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        list(read_texts(tmp_path / "empty"))


def test_words_of_subwords():
    text = "The cat's 1234th caféteria, naïve"
    pieces_ = ["The", " ca", "t", "'s", " 12", "34", "th", " café", "ter", "ia", ",", " na", "ïve"]
    ends = np.cumsum([len(p) for p in pieces_])
    assert ends[-1] == len(text)
    word = words(text, list(zip(ends - [len(p) for p in pieces_], ends, strict=True)))
    assert later(word).tolist() == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        True,
        False,
        False,
        True,
    ]
    assert first_of_several(word).tolist() == [
        False,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert word_start(word).tolist() == [0, 1, 1, 3, 4, 4, 6, 7, 7, 7, 10, 11, 11]
    assert word[10] == -1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_everything_once(lengths, limit):
    from flowroutes_fast.corpora.run import Item

    items = [Item(n, 0, "", "", [0] * length, []) for n, length in enumerate(lengths)]
    found = list(batches(items, limit))
    assert sorted(item.number for batch in found for item in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch[0].ids) * len(batch) <= limit for batch in found)


@given(st.text(alphabet="ab \n", max_size=40))
def test_pieces_keep_every_word(text):
    for split in ("file", "paragraph", "line"):
        assert "".join(pieces(text, split)).split() == text.split() or split != "file"
        assert sorted("".join(pieces(text, split)).replace("\n", "").replace(" ", "")) == sorted(
            text.replace("\n", "").replace(" ", "")
        )


@pytest.mark.demo_model
def test_command(tmp_path):
    (tmp_path / "en.jsonl").write_text(
        "\n".join(json.dumps({"text": t}) for t in ("The cat sat on the mat.", "Paris is the capital of France."))
    )
    (tmp_path / "code.py").write_text("def add(a, b):\n    return a + b\n")
    command = [
        "corpus",
        f"english={tmp_path / 'en.jsonl'}",
        f"code={tmp_path / 'code.py'}",
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "3 texts" in result.output
    assert "tokens/s" in result.output
    assert fr.open_corpus(tmp_path / "run").domains == ["code", "english"]
    again = CliRunner().invoke(
        app, ["corpus", "-", "--out", str(tmp_path / "stdin")], input="A line of text.\nAnother one.\n"
    )
    assert again.exit_code == 0, again.output
    with pytest.raises(ValueError, match="--shard must be"):
        CliRunner().invoke(app, [*command, "--shard", "x"], catch_exceptions=False)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        CliRunner().invoke(app, ["corpus", "nowhere.txt", "--out", str(tmp_path / "no")], catch_exceptions=False)


def test_datasets_library():
    """A dataset, a streamed one and a dictionary of splits, each split a domain."""
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["a b", "c d", " "], "domain": ["x", "y", "x"]}
    wanted, skipped = [Text("a b", "x"), Text("c d", "y")], Skipped()
    made = datasets.Dataset.from_dict(rows)
    for source in (made, made.to_iterable_dataset()):
        assert [*read_texts(source, skipped=skipped)] == wanted
    assert skipped.counts == {"empty": 2}
    bare = made.remove_columns("domain")
    assert [*read_texts(datasets.DatasetDict(train=bare, test=bare))] == [
        Text(t, d) for d in ("train", "test") for t in ("a b", "c d")
    ]
    with pytest.raises(ValueError, match="a row has no field 'body'; it has 'text'"):
        [*read_texts(bare, field="body")]
