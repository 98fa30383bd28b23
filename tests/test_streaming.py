"""Weights on disk: the same results bit for bit, and every way in which a checkpoint can be broken."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import IOI
from families import make

import flowroutes_fast as fr
from flowroutes_fast.checkpoints import tensor_places
from flowroutes_fast.streaming import parse_memory

pytest.importorskip("accelerate")
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
    assert a.prediction == b.prediction


@pytest.mark.demo_model
def test_streamed_is_resident_bit_for_bit(demo):
    model, tokenizer = fr.open_streaming("demo", memory="1GiB")
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


def test_temporary_files_go_with_the_model(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, _ = fr.open_streaming(checkpoint[0])
    assert list(tmp_path.iterdir())
    del model
    import gc

    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "bytes_"), [("8GiB", 2**33), ("500 MB", 5 * 10**8), ("1.5g", 15 * 10**8), (1000, 1000), ("64", 64)])
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
    with pytest.raises(ValueError, match="streaming to 'cuda'"):
        fr.open_streaming("demo", device="cuda")


def test_places_are_those_of_the_files(checkpoint):
    folder, model = checkpoint
    places = tensor_places(folder)
    assert set(places) == set(model.state_dict())
    place = places["model.layers.1.self_attn.o_proj.weight"]
    stored = torch.frombuffer(bytearray(place.file.read_bytes()[place.offset : place.offset + place.count]), dtype=torch.float32)
    assert torch.equal(stored.view(60, -1), model.model.layers[1].self_attn.o_proj.weight)
