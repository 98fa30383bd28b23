"""Weights on disk: the same results bit for bit, and every way in which a checkpoint can be broken."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import IOI
from families import OPTIONS, VARIANTS, make

import flowroutes_fast as fr
from flowroutes_fast.loading.checkpoints import GgufSource, tensor_places
from flowroutes_fast.loading.streaming import parse_memory, stream_of
from flowroutes_fast.tracing import layer_by_layer as by_layer

pytest.importorskip("accelerate")
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5, 6, 7], [50, 40]]
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A sharded checkpoint of a tiny model with a tokenizer, and the model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    model = make("llama")
    model.save_pretrained(folder, max_shard_size="60kB")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(101)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder, model


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint[0], tmp_path / "copy")


def same_bits(a, b):
    for name in ("heads", "heads_low", "heads_high", "normaliser_low", "ffn", "attention_residual", "attention_bias"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    for (index, value), (other_index, other) in zip(a.sparse, b.sparse, strict=True):
        assert torch.equal(index, other_index)
        assert torch.equal(value, other)
    assert [text for text, _ in a.prediction] == [text for text, _ in b.prediction]
    # alignment of mapped weights
    np.testing.assert_allclose([p for _, p in a.prediction], [p for _, p in b.prediction], rtol=1e-6)


@pytest.mark.demo_model
def test_streamed_is_resident_bit_for_bit(demo):
    model, tokenizer = fr.open_streaming("demo", memory="1GiB")
    assert isinstance(stream_of(model).feed.source, GgufSource)  # decoded a layer at a time
    assert all(p.is_meta for p in model.parameters())
    prompts = [IOI, "The capital of France is"]
    for streamed, resident in zip(fr.trace(model, tokenizer, prompts), fr.trace(*demo, prompts), strict=True):
        same_bits(streamed, resident)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.demo_model
def test_streamed_routes_in_bfloat16(demo):
    model, tokenizer = fr.open_streaming("demo", dtype=torch.bfloat16)
    resident, _ = fr.load("demo", dtype=torch.bfloat16)
    a, b = (fr.trace(m, tokenizer, IOI).route(threshold=0.04).edges for m in (model, resident))
    assert a.equals(b)


def test_shards_positions_and_neurons(checkpoint):
    folder, model = checkpoint
    streamed, _ = fr.open_streaming(folder)
    options = {"positions": [-1], "neurons": True}
    a, b = fr.trace(streamed, None, IDS, **options), fr.trace(model, None, IDS, **options)
    np.testing.assert_array_equal(a.heads, b.heads)
    assert a.neurons(2).equals(b.neurons(2))


def test_temporary_files_go_with_the_model(monkeypatch, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    make("qwen3_moe").save_pretrained(folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, tokenizer = fr.open_streaming(folder)
    assert tokenizer is None
    assert list(tmp_path.iterdir())  # merged experts
    del model
    import gc

    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "bytes_"), [("8GiB", 2**33), ("500 MB", 5 * 10**8), ("1.5g", 15 * 10**8), (1000, 1000), ("64", 64)]
)
def test_memory_sizes(text, bytes_):
    assert parse_memory(text) == bytes_


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "8 GiBs", ""])
def test_bad_memory_sizes(text):
    with pytest.raises(ValueError, match="memory must be a size"):
        parse_memory(text)


def test_too_little_memory(checkpoint):
    with pytest.raises(MemoryError, match=r"needs about .* GB for its largest piece; 0.00 GB are allowed"):
        fr.open_streaming(checkpoint[0], memory="10kB")


def test_a_missing_shard(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"shard '{shard.name}' of .* is missing"):
        fr.open_streaming(copy)


@pytest.mark.parametrize("left", [4, 100, -10])
def test_a_shard_that_is_cut_short(copy, left):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"shard '{shard.name}' is (damaged|cut short)"):
        fr.open_streaming(copy)


def test_an_index_that_names_a_missing_tensor(copy):
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = sorted(copy.glob("*.safetensors"))[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"holds model.layers.9.mlp.up_proj.weight, but it does not"):
        fr.open_streaming(copy)


def test_pickled_weights_are_refused(copy):
    for shard in (*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"):
        shard.unlink()
    with pytest.raises(ValueError, match="no weights"):
        fr.open_streaming(copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin; convert it"):
        fr.open_streaming(copy)


def test_other_bad_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        fr.open_streaming("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        fr.open_streaming(tmp_path)
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        fr.open_streaming("nowhere.gguf")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'"):
        fr.open_streaming("demo", device="mps")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU here"):
            fr.open_streaming("demo", device="cuda")


def test_places_are_those_of_the_files(checkpoint):
    folder, model = checkpoint
    places = tensor_places(folder)
    assert set(places) == set(model.state_dict())
    place = places["model.layers.1.self_attn.o_proj.weight"]
    stored = torch.frombuffer(
        bytearray(place.file.read_bytes()[place.offset : place.offset + place.count]), dtype=torch.float32
    )
    assert torch.equal(stored.view(60, -1), model.model.layers[1].self_attn.o_proj.weight)


# that one needs eager attention
@pytest.mark.parametrize("name", [n for n in (*OPTIONS, *VARIANTS) if n != "falcon, sequential"])
def test_every_family_streams(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    streamed, _ = fr.open_streaming(tmp_path)
    for a, b in zip(fr.trace(streamed, None, PROMPTS[:2]), fr.trace(model, None, PROMPTS[:2]), strict=True):
        if name == "jamba":  # its Mamba rounds by where weights lie in memory
            torch.testing.assert_close(a.heads, b.heads, rtol=1e-5, atol=1e-6)
        else:
            same_bits(a, b)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A bfloat16 checkpoint of a tiny model with tied embeddings, and the model in float32."""
    folder = tmp_path_factory.mktemp("half")
    make("llama", tie_word_embeddings=True).bfloat16().save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("whole", "slots"), [(True, 1), (True, 2), (False, 1)])
def test_weights_are_cast_as_they_come_in(half, whole, slots):
    folder, model = half
    streamed, _ = fr.open_streaming(folder)
    feed = stream_of(streamed).feed
    assert feed.whole
    feed.whole, feed.slots = whole, slots  # whatever would fit
    for _ in range(2):
        for a, b in zip(fr.trace(streamed, None, PROMPTS), fr.trace(model, None, PROMPTS), strict=True):
            same_bits(a, b)
    assert not feed.arenas
    assert not feed.here


def test_a_layer_that_does_not_fit_comes_in_piece_by_piece(half):
    folder, model = half
    piece = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    streamed, _ = fr.open_streaming(folder, memory=int(1.3 * piece))
    assert not stream_of(streamed).feed.whole
    same_bits(fr.trace(streamed, None, IDS), fr.trace(model, None, IDS))


def test_an_unembedding_in_pieces(monkeypatch):
    from flowroutes_fast.loading import streaming

    monkeypatch.setattr(streaming, "PIECE", 100)
    head, x = torch.nn.Linear(16, 33).bfloat16(), torch.randn(2, 3, 16)
    with torch.no_grad():
        found = streaming._in_pieces(head, x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, head.weight.float(), head.bias.float()))


def test_many_prompts_in_groups_that_fit(half, monkeypatch, tmp_path):
    """Prompts beyond the budget wait in files; every layer is read once."""
    folder, model = half
    streamed, _ = fr.open_streaming(folder)
    stream = stream_of(streamed)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        sys.modules["flowroutes_fast.tracing.trace"], "working_memory", lambda model, tokens, options, batch: batch
    )
    stream.budget = stream.weights + 2
    read, spilled = [], []
    load, close = stream.feed._load, by_layer.States.close
    monkeypatch.setattr(stream.feed, "_load", lambda index, **more: read.append(index) or load(index, **more))
    monkeypatch.setattr(
        by_layer.States, "close", lambda self: spilled.append((self.spilled, list(tmp_path.iterdir()))) or close(self)
    )
    found = fr.trace(streamed, None, PROMPTS)
    assert read == list(range(len(model.model.layers)))
    assert spilled[0][0] > 0
    assert spilled[0][1]
    assert not list(tmp_path.iterdir())
    for a, ids in zip(found, PROMPTS, strict=True):
        b = fr.trace(model, None, ids)
        assert a.token_ids == ids
        torch.testing.assert_close(a.heads, b.heads, rtol=1e-4, atol=1e-6)
        assert [text for text, _ in a.prediction[:3]] == [text for text, _ in b.prediction[:3]]


KILLED = """
import os, sys
import flowroutes_fast as fr
from flowroutes_fast.tracing import layer_by_layer as by_layer
model, _ = fr.open_streaming(sys.argv[1])
write = by_layer.Store.write

def killed(self, layer, *rest):
    write(self, layer, *rest)
    if layer == 1:
        os.kill(os.getpid(), 9)

by_layer.Store.write = killed
fr.trace(model, None, eval(sys.argv[3]), resume=sys.argv[2], neurons=True)
"""


@pytest.fixture(scope="module")
def stopped(half, tmp_path_factory):
    """The folder of a run that was killed after its second layer."""
    store = tmp_path_factory.mktemp("killed") / "run"
    command = [sys.executable, "-c", KILLED, str(half[0]), str(store), repr(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    return store


def test_a_killed_run_goes_on(half, stopped, tmp_path, monkeypatch):
    folder, model = half
    store = shutil.copytree(stopped, tmp_path / "run")
    assert json.loads((store / "run.json").read_text())["finished"] == 2
    streamed, _ = fr.open_streaming(folder)
    seen = []
    original = by_layer.watched
    monkeypatch.setattr(by_layer, "watched", lambda block, *rest: seen.append(block.index) or original(block, *rest))
    found = fr.trace(streamed, None, PROMPTS, resume=store, neurons=True)
    assert sorted(set(seen)) == [2]
    assert (store / "run.json").exists()
    for a, b in zip(found, fr.trace(model, None, PROMPTS, neurons=True), strict=True):
        same_bits(a, b)
        assert a.neurons(0).equals(b.neurons(0))
        assert a.route(threshold=0.02).edges.equals(b.route(threshold=0.02).edges)
        assert a.work == b.work


def test_a_resident_model_goes_on_too(half, tmp_path, monkeypatch):
    model = half[1]
    expected = fr.trace(model, None, PROMPTS)
    with monkeypatch.context() as patched:
        patched.setattr(by_layer.States, "drop", lambda self, layer, groups: 1 / (1 - layer))
        with pytest.raises(ZeroDivisionError):
            fr.trace(model, None, PROMPTS, resume=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] == 2
    for a, b in zip(fr.trace(model, None, PROMPTS, resume=tmp_path / "run"), expected, strict=True):
        same_bits(a, b)


def test_another_run_in_the_folder(half, stopped, tmp_path):
    folder, _ = half
    store = shutil.copytree(stopped, tmp_path / "run")
    streamed, _ = fr.open_streaming(folder)

    def again(prompts=PROMPTS, where=store, **options):
        fr.trace(streamed, None, prompts, resume=where, **options)

    with pytest.raises(ValueError, match=r"holds another run \(differing: groups, prompts, rows\)"):
        again(IDS, neurons=True)
    with pytest.raises(ValueError, match=r"differing: options\)"):
        again()
    from filelock import FileLock

    with FileLock(store / ".lock"), pytest.raises(ValueError, match="another process is working"):
        again(neurons=True)
    (store / "layer-001.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"layer-001.safetensors' is damaged"):
        again(neurons=True)
    (store / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json' is damaged"):
        again(neurons=True)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        again(where=tmp_path)


def test_a_damaged_state(half, stopped, tmp_path):
    folder, _ = half
    shutil.copytree(stopped, tmp_path / "run")
    model, _ = fr.open_streaming(folder)
    (tmp_path / "run" / "state-002-0000.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"state of layer 2 .* is damaged"):
        fr.trace(model, None, PROMPTS, resume=tmp_path / "run", neurons=True)


def test_a_full_disk(half, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*state-000.*No space left"):
        fr.trace(half[1], None, IDS, resume=tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_read_error_in_the_middle(copy, damage):
    """The checkpoint changes while the run goes through it: a sentence with the shard's name, not a bus error."""
    model, _ = fr.open_streaming(copy)
    shard = tensor_places(copy)["model.layers.2.mlp.down_proj.weight"].file

    def spoil(*_):
        if shard.exists():
            shard.unlink() if damage == "gone" else os.truncate(shard, 2000)

    model.model.layers[0].register_forward_hook(spoil)
    with pytest.raises(OSError, match=shard.name):
        fr.trace(model, None, IDS)
    assert all(p.is_meta for p in model.parameters())


def test_a_model_that_skips_a_block_is_refused(half, monkeypatch):
    model = half[1]
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, *a, **k: forward(self, *a, **k))
    kept = model.model.config.num_hidden_layers
    monkeypatch.setattr(model.model.config, "num_hidden_layers", kept - 1)
    with pytest.raises(ValueError, match=rf"called {kept - 1} of its {kept} blocks"):
        by_layer.run(model, [IDS], [[0]], lambda prompt, layer: None)
