"""Damaged models: whatever is wrong with a file, loading says so in one sentence that names it, or the model is as
it was.
"""

import json
import random
import shutil
import struct
import subprocess
import sys

import pytest
import tiny_gguf
import torch
from families import make

import flowroutes_fast as fr
from flowroutes_fast import load as load_function  # noqa: F401
from flowroutes_fast.loading.checkpoints import gguf_head, tensor_places

loading = sys.modules["flowroutes_fast.loading.load"]
IDS = [3, 14, 15, 92, 65]
EXPECTED = (FileNotFoundError, ValueError, OSError, MemoryError)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny sharded model with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("whole")
    make("llama", num_hidden_layers=2).save_pretrained(folder, max_shard_size="60kB")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(101)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A tiny llama as a GGUF file with a tokenizer of its own."""
    pytest.importorskip("gguf")
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def one_sentence(error, *names):
    text = str(error)
    assert isinstance(error, EXPECTED), f"{type(error).__name__}: {text}"
    assert text.strip()
    assert "\n" not in text, text
    assert len(text) < 700, text
    assert any(name in text for name in names), f"{text}: names none of {names}"


def opened(path, *names):
    """What both ways to open give, or None where they refuse; a refusal is one sentence."""
    found = []
    for way in (fr.load, fr.open_streaming):
        try:
            found.append(way(path)[0])
        except BaseException as error:  # whatever a library raises
            one_sentence(error, *names)
            found.append(None)
    return found


JSON = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe{}", b"{" * 5000, b"[" * 100000, "directory"]
)
@pytest.mark.parametrize("name", JSON)
def test_a_json_file_that_is_none(copy, name, content):
    (copy / name).unlink()
    if content == "directory":
        (copy / name).mkdir()
    else:
        (copy / name).write_bytes(content)
    with pytest.raises(EXPECTED) as caught:
        fr.load(copy)
    one_sentence(caught.value, name, str(copy))


VALUES = ["60", None, [60], -1, 0, 1.5, {}, True, 10**12, 10**30, "x" * 2000]


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "model_type",
        "hidden_act",
        "rope_parameters",
        "dtype",
        "architectures",
    ],
)
def test_config_values_of_any_type(copy, key):
    """Refused, or (where transformers takes it for its default) as it was."""
    before = json.loads((copy / "config.json").read_text())
    for value in VALUES:
        (copy / "config.json").write_text(json.dumps(before | {key: value}))
        opened(copy, str(copy))


def shard_with(copy, **changes):
    """Rewrite the header of the first shard."""
    file = sorted(copy.glob("*.safetensors"))[0]
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 4]},
        {"data_offsets": [4, 0]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [0, 10**18]},
        {"data_offsets": "x"},
        {"data_offsets": [0.5, 4]},
        {"shape": [1]},
        {"shape": [-1, -4]},
        {"shape": "x"},
        {"shape": [10**12, 10**12]},
        {"dtype": "F64"},
        {"dtype": None},
        {"dtype": "NONSENSE"},
        {"data_offsets": [100, 24340]},
    ],
)
def test_offsets_and_shapes_outside(copy, changes):
    file = shard_with(copy, **changes)
    for found in opened(copy, file.name, str(copy)):
        assert found is None


@pytest.mark.parametrize("length", [0, 7, 2**63, 2**64 - 1, 10**9])
def test_lengths_of_headers(copy, length):
    file = sorted(copy.glob("*.safetensors"))[0]
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", length) + raw[8:])
    assert opened(copy, file.name) == [None, None]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "model-9.safetensors", 3, None, "", "a\0b", "."])
def test_an_index_that_points_outside(copy, name):
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    assert opened(copy, str(copy)) == [None, None]


def test_weights_that_no_file_holds_are_not_made_up(copy):
    """transformers would fill them with random numbers."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for way in (fr.load, fr.open_streaming):
        with pytest.raises(ValueError, match=r"has no weights for model.layers.2"):
            way(copy)


def mutated(raw, dice):
    """One random damage: cut, flipped bits, a byte range that is zeros or ones or gone."""
    raw = bytearray(raw)
    at = dice.randrange(len(raw)) if dice.random() < 0.5 else dice.randrange(min(len(raw), 2000))
    kind = dice.randrange(5)
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        raw[at] ^= 1 << dice.randrange(8)
    elif kind == 2:
        raw[at : at + 8] = bytes([255] * len(raw[at : at + 8]))
    elif kind == 3:
        raw[at : at + 8] = bytes(len(raw[at : at + 8]))
    else:
        del raw[at : at + dice.randrange(1, 40)]
    return bytes(raw)


@pytest.mark.parametrize("name", [*JSON, "shard"])
def test_random_damage_to_a_folder(copy, name):
    dice = random.Random(name)
    file = sorted(copy.glob("*.safetensors"))[1] if name == "shard" else copy / name
    before = file.read_bytes()
    for _ in range(10):
        file.write_bytes(mutated(before, dice))
        opened(copy, str(copy), file.name)
    file.write_bytes(before)
    assert None not in opened(copy)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWROUTES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_random_damage_to_a_gguf_file(gguf, tmp_path, own_cache):
    dice, before = random.Random(5), gguf.read_bytes()
    file = tmp_path / "tiny.gguf"
    for cut in (0, 3, 4, 8, 23, 24, 100, 1000, len(before) // 2, len(before) - 1):
        file.write_bytes(before[:cut])
        assert opened(file, "tiny.gguf") == [None, None]
    for _ in range(25):
        file.write_bytes(mutated(before, dice))
        opened(file, "tiny.gguf")
    for at, count in ((8, 2**62), (16, 2**62), (8, 0)):  # how many tensors, how many values
        file.write_bytes(before[:at] + struct.pack("<Q", count) + before[at + 8 :])
        assert opened(file, "tiny.gguf") == [None, None]
    assert not list((own_cache / "models").glob(".converting*"))


def test_a_gguf_file_is_known_by_its_content(gguf, tmp_path, own_cache):
    file = shutil.copy(gguf, tmp_path / "tiny.gguf")
    first = fr.load(file)[0].state_dict()
    raw = bytearray(gguf.read_bytes())
    middle = len(raw) - 40000  # within a tensor, not at an end
    raw[middle : middle + 4] = struct.pack("<f", 0.123)
    (tmp_path / "tiny.gguf").write_bytes(raw)
    second = fr.load(file)[0].state_dict()
    assert sum(not torch.equal(first[n], second[n]) for n in first) == 1


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "no contents", "half"])
def test_a_damaged_copy_is_made_again(gguf, own_cache, damage, monkeypatch):
    expected = {name: weight.clone() for name, weight in fr.load(gguf)[0].state_dict().items()}  # not mapped
    (folder,) = (p for p in (own_cache / "models").iterdir() if not p.name.startswith("."))
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    if damage == "bit":
        raw[-1000] ^= 1
        weights.write_bytes(raw)
    elif damage == "cut":
        weights.write_bytes(raw[:-5])
    elif damage == "gone":
        (folder / "tokenizer.json").unlink()
    elif damage == "no contents":
        (folder / loading.MANIFEST).unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    found = fr.load(gguf)[0].state_dict()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    monkeypatch.setattr(loading, "_convert", lambda *_: pytest.fail("made once more"))
    fr.load(gguf)


def test_the_description_of_another_file(gguf, tmp_path, own_cache):
    """Same name and size, another config: the head counts."""
    file = tmp_path / "tiny.gguf"
    shutil.copy(gguf, file)
    assert fr.open_streaming(file)[0].config.rms_norm_eps == pytest.approx(1e-6)
    file.write_bytes(gguf.read_bytes().replace(struct.pack("<f", 1e-6), struct.pack("<f", 1e-3)))
    assert fr.open_streaming(file)[0].config.rms_norm_eps == pytest.approx(1e-3)
    assert gguf_head(file).digest != gguf_head(gguf).digest


LOW = """
import resource, sys
import torch
import flowroutes_fast as fr
import transformers.models.llama.modeling_llama, transformers.tokenization_utils_fast
torch.zeros(3) @ torch.zeros(3)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    fr.load(sys.argv[1])
except MemoryError as error:
    print("MemoryError", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_little_memory(tmp_path):
    config = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 20000,
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).bfloat16()
    model.save_pretrained(tmp_path)
    fake = tmp_path / "tokenizer.json"
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"0": 0}, unk_token="0")).save(str(fake))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "0"})
    )
    done = subprocess.run(
        [sys.executable, "-c", LOW, str(tmp_path), str(80 * 2**20)], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.startswith(f"MemoryError '{tmp_path}' needs 0."), done.stdout + done.stderr


def test_what_libraries_say_of_memory():
    for error in (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 8 bytes"
        ),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("unable to mmap 8 bytes from file </x>: Cannot allocate memory (12)"),
    ):
        with pytest.raises(MemoryError, match=r"'x' does not fit into memory: .+"), loading.named("'x'"):
            raise error
    with pytest.raises(ValueError, match="'x' cannot be opened by transformers: AssertionError"), loading.named("'x'"):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), loading.named("'x'"):
        raise KeyboardInterrupt


def test_files_beside_the_weights_are_no_weights(whole, copy):
    single = make("llama", num_hidden_layers=2)
    for file in (*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"):
        file.unlink()
    single.save_pretrained(copy)
    (copy / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert set(tensor_places(copy)) == set(single.state_dict())
    assert None not in opened(copy)
