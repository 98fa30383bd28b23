"""A run is known by its content: nothing but the very same model, tokenizer, options and texts goes on in its
folder, and none of its files changes.
"""

import json
import os
import shutil
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_corpus import TEXTS, Tokenizer, make

import flowroutes_fast as fr
from flowroutes_fast.corpora import run as runs
from flowroutes_fast.corpora import state
from flowroutes_fast.corpora.state import read_state, text_of
from flowroutes_fast.corpora.texts import Stream, Text
from flowroutes_fast.models.identity import config_digest, tokenizer_digest, weights_digest
from flowroutes_fast.system.errors import DamagedFile

TEXTS = TEXTS[:13]
OPTIONS = {"window": 5, "batch_tokens": 100}


@pytest.fixture(scope="module")
def model():
    return make("llama")


def traced(model, folder, texts=TEXTS, tokenizer=None, **options):
    return fr.corpus(model, tokenizer or Tokenizer(), texts, folder, **OPTIONS | options)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished run; copy it before changing it."""
    return traced(model, tmp_path_factory.mktemp("done") / "run").folders[0]


def stop_after(model, folder, windows, texts=TEXTS, error=KeyboardInterrupt):
    write = runs.Folder.write

    def stopped(self, window, rows):
        if window.number == windows:
            raise error
        write(self, window, rows)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs.Folder, "write", stopped)
        with pytest.raises(error):
            traced(model, folder, texts)


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """A run whose second of three windows is written."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    stop_after(model, folder, 2)
    return folder


@pytest.fixture(params=["done", "begun"])
def folder(request, tmp_path):
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "run")


def changed(texts, place, **new):
    found = list(texts)
    found[place] = Text(**{"text": found[place].text, "domain": found[place].domain} | new)
    return found


OTHER_TEXTS = {
    "first": (changed(TEXTS, 0, text="alpha!"), "numbers 0 to 4 differ"),
    "middle": (changed(TEXTS, 7, text=TEXTS[7].text + " "), "numbers 5 to 9 differ"),
    "last": (changed(TEXTS, 12, text="omega"), "numbers 10 to 12 differ"),
    "order": ([TEXTS[1], TEXTS[0], *TEXTS[2:]], "numbers 0 to 4 differ"),
    "domain": (changed(TEXTS, 7, domain="c"), "numbers 5 to 9 differ"),
    "last domain": (changed(TEXTS, 12, domain="c"), "numbers 10 to 12 differ"),
    "fewer": (TEXTS[:-1], "has 13, here are 12 alone"),
    "a window fewer": (TEXTS[:10], "has 13, here are 10 alone"),
    "far fewer": (TEXTS[:3], "has 13, here are 3 alone"),
    "none": ([], "has 13, here are 0 alone"),
    "more": ([*TEXTS, Text("one more", "a")], "has 13, here are more"),
    "a window more": ([*TEXTS, *TEXTS[:5]], "has 13, here are more"),
    "moved": (
        changed(changed(TEXTS, 0, text=TEXTS[0].text + TEXTS[1].text[:1]), 1, text=TEXTS[1].text[1:]),
        "numbers 0 to 4 differ",
    ),
}


@pytest.mark.parametrize("name", OTHER_TEXTS)
def test_other_texts(model, folder, name):
    texts, said = OTHER_TEXTS[name]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match=f"the texts are not those of the run in '.*run': .*{said}"):
        traced(model, folder, texts)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert traced(model, folder).progress[0].texts == 13


@pytest.mark.parametrize("name", sorted(OTHER_TEXTS))
def test_other_texts_of_streams(model, folder, name):
    """What can be read once is compared window by window, before any of it is traced."""
    texts, said = OTHER_TEXTS[name]
    with pytest.raises(ValueError, match=f"the texts are not those of the run in '.*run': .*{said}"):
        traced(model, folder, iter(texts))
    assert traced(model, folder).texts()["text"].tolist() == [t.text for t in TEXTS]


def test_a_stream_goes_on(model, done, tmp_path):
    lines = [json.dumps({"text": t.text, "domain": t.domain}) + "\n" for t in TEXTS]
    stop_after(model, tmp_path / "run", 2, iter(TEXTS))
    with pytest.raises(ValueError, match="has 10, here are 9 alone"):
        traced(model, tmp_path / "run", Stream(lines[:9]))
    with pytest.raises(ValueError, match="numbers 5 to 9 differ"):
        traced(model, tmp_path / "run", iter(changed(TEXTS, 9, text="x y")))
    again = traced(model, tmp_path / "run", Stream(lines))
    assert again.states[0].files == read_state(done).files
    assert traced(model, tmp_path / "run", Stream(lines)).finished
    with pytest.raises(ValueError, match="has 13, here are more"):
        traced(model, tmp_path / "run", Stream([*lines, "more\n"]))


def test_a_stream_that_had_ended(model, tmp_path):
    """Killed between its last, short, window and its end, it takes no more texts either."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs.Folder, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            traced(model, tmp_path / "run", iter(TEXTS))
    with pytest.raises(ValueError, match="has 13, here are more"):
        traced(model, tmp_path / "run", iter([*TEXTS, *TEXTS]))


def test_inputs_left_out_are_part_of_a_run(model, tmp_path):
    run = tmp_path / "run"
    traced(model, run, [*TEXTS[:3], "", "  "])
    traced(model, run, [*TEXTS[:3], "", "  "])
    with pytest.raises(ValueError, match=r"left out \{'empty': 2\}, of these texts \{'empty': 1\}"):
        traced(model, run, [*TEXTS[:3], ""])


@pytest.mark.parametrize(
    "name",
    [
        "threshold",
        "precision",
        "floor",
        "max_tokens",
        "overflow",
        "window",
        "batch_tokens",
        "positions",
        "edges",
        "shard",
        "bias",
        "tolerance",
        "backend",
    ],
)
def test_other_options(model, folder, name):
    other = {
        "threshold": 0.041,
        "precision": "exact",
        "floor": 2e-3,
        "max_tokens": 63,
        "overflow": "split",
        "window": 6,
        "batch_tokens": 101,
        "positions": False,
        "edges": False,
        "shard": (0, 2),
        "bias": "value",
        "tolerance": 0.02,
        "backend": "reference",
    }[name]
    with pytest.raises(ValueError, match=rf"holds another run \(differing: {name}\)"):
        traced(model, folder, **{name: other})


def test_options_of_the_evaluation_reach_it(model, done, tmp_path):
    """All but those that rows have no use for; how many threads make them is not part of a run."""
    assert fr.open_corpus(done).settings["evaluation"] == {}
    run = traced(model, tmp_path / "run", bias="exclude", threads=1, tolerance=1e-2)
    assert run.settings["evaluation"] == {"bias": "exclude", "threads": 1}
    assert not run.positions().equals(fr.open_corpus(done).positions())
    assert traced(model, tmp_path / "run", bias="exclude").states[0].files == run.states[0].files
    for name, value in {"measure": "signed", "dense": True, "thresholds": (0.1,), "neurons": True}.items():
        with pytest.raises(TypeError, match=rf"corpus\(\) got an unexpected keyword argument '{name}'"):
            traced(model, tmp_path / "other", **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'windw': did you mean 'window'"):
        traced(model, tmp_path / "other", windw=3)
    with pytest.raises(ValueError, match="unknown bias mode"):
        traced(model, tmp_path / "other", bias="none")
    assert not (tmp_path / "other").exists()


PLACES = {
    "an embedding": lambda m: m.model.embed_tokens.weight.view(-1)[1207:1208],
    "the last number": lambda m: m.model.layers[2].mlp.down_proj.weight.view(-1)[-1:],
    "a bias": lambda m: m.model.layers[0].self_attn.q_proj.bias[3:4],
    "a norm": lambda m: m.model.norm.weight[5:6],
    "a buffer": lambda m: m.model.rotary_emb.inv_freq[1:2],
    "the unembedding": lambda m: m.lm_head.weight.view(-1)[1234:1235],
}


@pytest.mark.parametrize("place", PLACES)
def test_another_weight(folder, place):
    other = make("llama")
    with torch.no_grad():
        PLACES[place](other).mul_(1.0001)
    with pytest.raises(ValueError, match=r"differing: weights\)"):
        traced(other, folder)


def test_another_model_of_the_same_name(model, folder):
    other = make("llama", rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"differing: config, weights\)"):
        traced(other, folder)
    with pytest.raises(ValueError, match=r"differing: weights\)"):
        traced(make("llama").to(torch.bfloat16), folder)
    other = make("llama")
    other.model.layers[0].input_layernorm.variance_epsilon = 1e-3
    with pytest.raises(ValueError, match=r"differing: weights\)"):
        traced(other, folder)
    other = make("llama")
    other.config._name_or_path = "elsewhere/final"  # the same under another name
    assert traced(other, folder).finished


def test_an_adapter_belongs_to_the_model(folder):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    other = peft.get_peft_model(
        make("llama"), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    ).eval()
    seen = {weights_digest(other.get_base_model())}
    with pytest.raises(ValueError, match=r"differing: weights\)"):
        traced(other, folder)
    with other.disable_adapter():
        seen.add(weights_digest(other.get_base_model()))
    other.base_model.model.model.layers[1].self_attn.v_proj.scaling["default"] *= 2
    seen.add(weights_digest(other.get_base_model()))
    assert len(seen) == 3


def test_another_tokenizer(model, folder):
    class Other(Tokenizer):
        def __call__(self, text, **options):
            found = super().__call__(text, **options)
            return found | {"input_ids": [(i + 1) % 100 for i in found["input_ids"]]}

    Other.__qualname__ = "Tokenizer"
    with pytest.raises(ValueError, match=r"differing: tokenizer\)"):
        traced(model, folder, tokenizer=Other())


def test_digests_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    def made(vocabulary, bos=False):
        found = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
        found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        if bos:
            found.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="?", bos_token="<s>")

    words = {"?": 0, "<s>": 1, "a": 2, "b": 3}
    one = made(words)
    digest = tokenizer_digest(one)
    one(["a b", "a"], padding=False, truncation=True, max_length=1)  # what a call leaves behind is no difference
    assert tokenizer_digest(one) == digest == tokenizer_digest(made(words))
    assert len({digest, tokenizer_digest(made(words | {"a": 3, "b": 2})), tokenizer_digest(made(words, bos=True))}) == 3


def test_digests_of_models_are_of_their_content(model, tmp_path):
    """The same saved and opened again, and left on disk."""
    model.save_pretrained(tmp_path / "final")
    loaded = type(model).from_pretrained(tmp_path / "final")
    streamed, _ = fr.open_streaming(tmp_path / "final")
    for other in (loaded, streamed):
        assert weights_digest(other) == weights_digest(model)
        assert config_digest(other) == config_digest(model)
    assert weights_digest(loaded.to(torch.bfloat16)) != weights_digest(model)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        weights_digest(make("llama"))


def test_shards_of_one_run_only(model, done, tmp_path):
    def shard(i, count=2, texts=TEXTS, name="", **options):
        return traced(model, tmp_path / f"{i}of{count}{name}", texts, shard=(i, count), **options).folders[0]

    first, second = shard(0), shard(1)
    assert fr.open_corpus(first, second).all_domains().texts == 13
    for other, said in [
        (shard(1, 3), "3 shards and 2"),
        (shard(1, name="x", threshold=0.1), "differing: threshold"),
        (shard(1, texts=changed(TEXTS, 12, text="omega"), name="y"), "over other texts"),
        (shard(1, texts=TEXTS[:10], name="z"), "over other texts"),
    ]:
        with pytest.raises(ValueError, match=said):
            fr.open_corpus(first, other)
    with torch.no_grad():
        other = make("llama")
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="differing: weights"):
        fr.open_corpus(first, traced(other, tmp_path / "other", shard=(1, 2)).folders[0])


def test_two_processes(model, folder):
    with (
        runs.Folder(folder, runs.settings_of(model, Tokenizer(), **runs_options())),
        pytest.raises(ValueError, match="another process is working in"),
    ):
        traced(model, folder)
    assert traced(model, folder).finished


def runs_options():
    from flowroutes_fast.corpora.on_ray import DEFAULTS

    return DEFAULTS | OPTIONS


def rewritten(folder, change):
    """``run.json`` changed by one who knows how it is checked."""
    found = json.loads((folder / "run.json").read_text())
    found.pop("checksum")
    change(found)
    (folder / "run.json").write_text(json.dumps(found | {"checksum": state._checksum(found)}))


STATES = {
    "unknown key": lambda s: s.update(more=1),
    "no progress": lambda s: s.pop("progress"),
    "a float": lambda s: s["progress"].update(tokens=1.5),
    "true": lambda s: s["progress"].update(rows=True),
    "negative": lambda s: s["progress"].update(dropped=-1),
    "NaN": lambda s: s["progress"].update(seconds=float("nan")),
    "shape": lambda s: s["settings"].update(shape=[0, 6]),
    "shard": lambda s: s["settings"].update(shard=[2, 2]),
    "setting": lambda s: s["settings"].pop("floor"),
    "an option": lambda s: s["settings"]["evaluation"].update(bais="value"),
    "a wrong option": lambda s: s["settings"]["evaluation"].update(tolerance="low"),
    "a second floor": lambda s: s["settings"]["evaluation"].update(floor=0.1),
    "a list of options": lambda s: s["settings"].update(evaluation=[]),
    "tokens": lambda s: s["progress"].update(tokens=s["progress"]["tokens"] + 1),
    "texts": lambda s: s["progress"].update(texts=12),
    "a window": lambda s: s["progress"].update(windows=2),
    "digest": lambda s: s["digests"].pop(),
    "a path": lambda s: s["files"].update({"../x": s["files"]["texts-000000.parquet"]}),
    "rows": lambda s: s["files"]["texts-000001.parquet"].update(rows=4),
    "sums": lambda s: s["files"].pop("statistics.safetensors.3"),
    "list": lambda s: s.update(files=[]),
    "version": lambda s: s.update(version=3),
    "huge": lambda s: s["progress"].update(windows=10**30),
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_cannot_be(done, tmp_path, name):
    folder = shutil.copytree(done, tmp_path / "run")
    rewritten(folder, STATES[name])
    with pytest.raises(DamagedFile, match=r"run.json' cannot be read: "):
        fr.open_corpus(folder)


@pytest.mark.parametrize("raw", [b"", b"[" * 10**5, b"\xff{}", b"null", b'{"format": 3}'])
def test_states_that_are_none(done, tmp_path, raw):
    folder = shutil.copytree(done, tmp_path / "run")
    (folder / "run.json").write_bytes(raw)
    with pytest.raises(DamagedFile, match=r"run.json' cannot be read: "):
        fr.open_corpus(folder)


def read_all(folder):
    every = fr.open_corpus(folder)
    return every.texts(), every.positions(), every.edges()


def test_every_file_is_the_one_that_was_written(done, tmp_path):
    """One bit, anywhere; a file that is shorter, longer, missing or another's."""
    folder = shutil.copytree(done, tmp_path / "run")
    rng = np.random.default_rng(0)
    for file in sorted(folder.glob("[!.]*")):
        raw = file.read_bytes()
        place = int(rng.integers(len(raw)))
        for changed_to in (raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :], raw[:-1], raw + b"\0", None):
            file.unlink()
            if changed_to is not None:
                file.write_bytes(changed_to)
            with pytest.raises((DamagedFile, FileNotFoundError), match=file.name):
                read_all(folder)
            file.write_bytes(raw)
    assert len(fr.open_corpus(folder).texts()) == 13
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run.json' is missing, and the folder holds windows of a run"):
        traced(make("llama"), folder)


def version_1(done, folder):
    """A run as the version before wrote it."""
    shutil.copytree(done, folder)
    found = json.loads((folder / "run.json").read_text())
    for name in ("texts", "digests", "files", "software", "checksum"):
        found.pop(name)
    for name in ("weights", "config", "tokenizer"):
        found["settings"].pop(name)
    (folder / "run.json").write_text(json.dumps(found | {"version": 1}))
    return folder


def test_runs_of_version_1_are_read(model, done, tmp_path):
    old = fr.open_corpus(version_1(done, tmp_path / "run"))
    assert old.edges().equals(fr.open_corpus(done).edges())
    assert old.check_model(model) is False
    with pytest.raises(ValueError, match="of version 1, which can be read; this release goes on with version 2"):
        traced(model, tmp_path / "run")
    with pytest.raises(ValueError, match="another kind"):
        fr.open_corpus(tmp_path / "run", done)


TABLES = {
    "texts": {"number": 13, "tokens": 0, "piece": -1, "mean": float("nan")},
    "positions": {
        "position": 64,
        "token_id": -1,
        "word": -2,
        "received": -1.0,
        "components": float("inf"),
        "number": -1,
    },
    "edges": {"layer": 3, "head": 6, "kind": "attack", "source": -1, "target": 64, "importance": 1.5},
}


@pytest.mark.parametrize(("name", "column"), [(name, column) for name, columns in TABLES.items() for column in columns])
def test_tables_that_cannot_be(done, tmp_path, name, column):
    """Of version 1, whose files have no digests: what is in them is checked all the same."""
    folder = version_1(done, tmp_path / "run")
    file = folder / f"{name}-000001.parquet"
    table, value = pq.read_table(file), TABLES[name][column]
    kind, values = table.schema.field(column).type, table[column].to_pylist()
    values[1] = [value] * len(values[1]) if isinstance(values[1], list) else value
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array(values, kind)), file)
    with pytest.raises(DamagedFile, match=rf"{name}-000001.parquet' is damaged: column '{column}'"):
        getattr(fr.open_corpus(folder), name)()
    values[1] = None
    pq.write_table(table.set_column(place, column, pa.array(values, kind)), file)
    with pytest.raises(DamagedFile, match="empty values"):
        getattr(fr.open_corpus(folder), name)()
    for wrong in (
        table.drop_columns([column]),
        table.append_column("more", table[column]),
        table.set_column(place, column, pa.array(map(str, values))),
    ):
        pq.write_table(wrong, file)
        with pytest.raises(DamagedFile, match=rf"{name}-000001.parquet' is damaged"):
            getattr(fr.open_corpus(folder), name)()


def test_a_run_that_goes_on_meanwhile_is_read(model, begun, tmp_path, monkeypatch):
    """Between its state and its sums another process wrote the next window."""
    from flowroutes_fast.corpora import results

    folder, read = shutil.copytree(begun, tmp_path / "run"), results.read_sums

    def late(where, state):
        monkeypatch.undo()
        traced(model, folder)
        return read(where, state)

    monkeypatch.setattr(results, "read_sums", late)
    assert fr.open_corpus(folder).finished


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (runs, "_tokenised", 7),
        (runs, "trace", 1),
        (runs, "_evaluate", 7),
        (runs, "_write_table", 4),
        (state, "write_atomically", 6),
        (runs, "write_text", 1),
        (runs, "_remove", 1),
    ],
)
def test_ctrl_c_in_every_phase(model, done, tmp_path, monkeypatch, where, name, calls):
    """Texts are read, a model runs, rows are made, files are written: what is finished stays, and the same call
    goes on.
    """
    left, original = [calls], getattr(where, name)

    def stopped(*rest, **more):
        left[0] -= 1
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*rest, **more)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                traced(model, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.endswith(".partial")]
    assert traced(model, tmp_path / "run").states[0].files == read_state(done).files


def test_a_state_reads_as_it_was_written(done):
    assert (done / "run.json").read_text() == text_of(read_state(done))
