"""Runs that go on: nothing lost under any fault, nothing mixed with another run's, and what is finished stays until
it is removed.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest
import torch
from families import make
from faults import Scenario, every_fault, one_sentence

import flowroutes_fast as fr
from flowroutes_fast.loading.streaming import stream_of
from flowroutes_fast.models.identity import weights_digest
from flowroutes_fast.system import files
from flowroutes_fast.tracing import layer_by_layer as by_layer
from flowroutes_fast.tracing import resume

IDS = [3, 14, 15, 92, 65]
PROMPTS = [IDS, [9, 8]]


def bits(traces):
    """Everything that must be the same, comparable."""
    names = (
        "heads",
        "heads_low",
        "heads_high",
        "normaliser_low",
        "ffn",
        "ffn_residual",
        "attention_residual",
        "attention_bias",
    )
    return [
        [getattr(t, n).numpy().tobytes() for n in names] + [v.numpy().tobytes() for pair in t.sparse for v in pair]
        for t in traces
    ]


def left_over(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".partial") or p.name.startswith(".tmp"))


class Resuming(Scenario):
    """A resident model; the user's own file lies beside the run."""

    def prepare(self):
        self.model = make("llama", num_hidden_layers=2)
        self.expected = bits(fr.trace(self.model, None, PROMPTS))

    def start(self, folder):
        (folder / "thesis.txt").write_text("mine")

    def run(self, folder):
        assert bits(fr.trace(self.model, None, PROMPTS, resume=folder / "run")) == self.expected
        resume.discard(folder / "run")

    def check(self, folder, outcome):
        one_sentence(outcome, "OSError", "ValueError")
        assert (folder / "thesis.txt").read_text() == "mine"
        assert bits(fr.trace(self.model, None, PROMPTS, resume=folder / "run")) == self.expected
        assert not left_over(folder / "run")
        resume.discard(folder / "run")
        assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


class Streaming(Scenario):
    """A streamed model (``qwen3_moe``: converted into a temporary folder), whose states wait in files."""

    def __init__(self, kind):
        self.kind = kind

    def prepare(self):
        self.saved = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        make(self.kind, num_hidden_layers=2).save_pretrained(self.saved)
        self.expected = bits(self.traced(self.saved))

    def traced(self, where):
        model, _ = fr.open_streaming(where)
        stream_of(model).budget = stream_of(model).weights
        return fr.trace(model, None, [IDS])

    def start(self, folder):
        shutil.copytree(self.saved, folder / "model")
        (folder / "tmp").mkdir()
        tempfile.tempdir = str(folder / "tmp")

    def run(self, folder):
        assert bits(self.traced(folder / "model")) == self.expected

    def check(self, folder, outcome):
        one_sentence(outcome, "OSError", "ValueError", "FileNotFoundError")
        tempfile.tempdir = str(folder / "tmp")
        assert bits(self.traced(folder / "model")) == self.expected
        gc.collect()
        assert not list((folder / "tmp").iterdir())
        for file in self.saved.iterdir():
            assert (folder / "model" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("kind", "faults"), [("llama", ("ENOSPC", "EIO", "kill")), ("qwen3_moe", ("kill",))])
def test_every_fault_of_streaming(kind, faults, tmp_path):
    found = every_fault("test_resume:Streaming", tmp_path, faults, kind)
    assert {"open", "write", "rename", "mkdir"} <= {o.operation.split()[0] for o in found}


def test_every_fault_of_a_run_that_can_go_on(tmp_path):
    found = every_fault("test_resume:Resuming", tmp_path, ("ENOSPC", "EIO", "kill"))
    assert {"open", "write", "fsync", "rename", "unlink", "mkdir", "rmdir", "lock"} <= {
        o.operation.split()[0] for o in found
    }


@pytest.fixture
def model():
    return make("llama", num_hidden_layers=2)


@pytest.fixture
def stopped(model, tmp_path, monkeypatch):
    """The folder of a run that failed after its first layer."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(by_layer.States, "drop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fr.trace(model, None, PROMPTS, resume=folder)
    return folder


def test_a_finished_run_stays_until_it_is_discarded(model, tmp_path, monkeypatch):
    expected = bits(fr.trace(model, None, PROMPTS, resume=tmp_path / "run"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr(by_layer, "watched", lambda *_: 1 / 0)  # no layer is run again
        assert bits(fr.trace(model, None, PROMPTS, resume=tmp_path / "run")) == expected
    resume.discard(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    resume.discard(tmp_path / "run")  # nothing to do
    resume.discard(tmp_path / "nowhere")


def last_of_the_middle(model):
    model.model.layers[1].mlp.up_proj.weight.data.view(-1)[-1] += 1e-3


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)).eval()
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    return wrapped


CHANGES = {
    "weights model.layers.1.mlp.up_proj.weight": last_of_the_middle,
    "weights model.embed_tokens.weight": lambda m: m.model.embed_tokens.weight.data[7, 3].add_(1),
    "buffers model.rotary_emb.inv_freq": lambda m: m.model.rotary_emb.inv_freq.data[-1].mul_(1.01),
    "config rms_norm_eps": lambda m: setattr(m.config, "rms_norm_eps", 1e-4),
    "config attn_implementation": lambda m: m.set_attn_implementation("eager"),
    "modules model.layers.1.input_layernorm": lambda m: setattr(
        m.model.layers[1].input_layernorm, "variance_epsilon", 1e-3
    ),
    "modules model.layers.0.mlp.act_fn": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    "modules model.layers.0": lambda m: m.model.layers[0].register_forward_hook(lambda *_: None),
    "dtype": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("named", CHANGES)
def test_another_model_is_refused_by_name(model, stopped, named):
    CHANGES[named](model)
    with pytest.raises(ValueError, match=rf"holds another run \(differing: .*{named}"):
        fr.trace(model, None, PROMPTS, resume=stopped)
    assert json.loads((stopped / "run.json").read_text())["finished"] == 1


@pytest.mark.parametrize(
    ("named", "prompts", "options"),
    [
        ("prompts", [[*IDS[:-1], 66], [9, 8]], {}),
        ("prompts", [IDS, [8, 9]], {}),
        ("options", PROMPTS, {"floor": 2e-3}),
        ("options", PROMPTS, {"bias": "value"}),
        ("rows", PROMPTS, {"positions": [-1]}),
    ],
)
def test_another_text_or_option_is_refused_by_name(model, stopped, named, prompts, options):
    with pytest.raises(ValueError, match=rf"differing: .*{named}"):
        fr.trace(model, None, prompts, resume=stopped, **options)


def test_adapters_count():
    pytest.importorskip("peft")
    wrapped = lora(make("llama", num_hidden_layers=2))
    layer = wrapped.base_model.model.model.layers[1].self_attn.v_proj

    def identity():
        return resume.identity_of(wrapped.get_base_model(), PROMPTS, None)

    def differ(a, b):
        return " ".join(resume.differences(a, b))

    before = identity()
    assert not resume.differences(before, identity())
    wrapped.set_adapter("other")
    assert "modules model.layers.1.self_attn.v_proj" in differ(before, identity())
    wrapped.set_adapter("default")
    assert not resume.differences(before, identity())
    layer.scaling["default"] *= 2
    assert differ(before, identity()) == "modules model.layers.1.self_attn.v_proj"
    layer.scaling["default"] /= 2
    layer.lora_B["default"].weight.data[-1, -1] += 1e-3
    assert differ(before, identity()) == "weights model.layers.1.self_attn.v_proj.lora_B.default.weight"


def test_quantised_weights_count():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    names = {name for _, name, _ in resume._tensors_in(linear, weights=True)}
    assert {"weight", "weight quant_state absmax"} <= names
    before = {name: resume._digest_of(read()) for _, name, read in resume._tensors_in(linear, weights=True)}
    linear.weight.quant_state.absmax[-1] += 1
    after = {name: resume._digest_of(read()) for _, name, read in resume._tensors_in(linear, weights=True)}
    assert {name for name in before if before[name] != after[name]} == {"weight quant_state absmax"}


@pytest.mark.parametrize("place", ["disk", "some"])
def test_an_offloaded_model_goes_on(model, tmp_path, monkeypatch, place):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path / "model")
    where = (
        {"": "disk"}
        if place == "disk"
        else {
            "model.embed_tokens": "cpu",
            "lm_head": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
        }
    )

    def opened():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=where, offload_folder=tmp_path / "offload"
        )

    with monkeypatch.context() as patched:
        patched.setattr(by_layer.States, "drop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fr.trace(opened(), None, PROMPTS, resume=tmp_path / "run")
    assert bits(fr.trace(opened(), None, PROMPTS, resume=tmp_path / "run")) == bits(fr.trace(opened(), None, PROMPTS))
    last_of_the_middle(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"differing: weights model.layers.1.mlp.up_proj.weight"):
        fr.trace(opened(), None, PROMPTS, resume=tmp_path / "run")


def test_a_streamed_checkpoint_counts_whole(model, tmp_path):
    model.save_pretrained(tmp_path / "model", max_shard_size="60kB")
    streamed, _ = fr.open_streaming(tmp_path / "model")
    expected = bits(fr.trace(streamed, None, PROMPTS, resume=tmp_path / "run"))
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    with shard.open("r+b") as file:  # in place, and with the time it had
        file.write(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    streamed, _ = fr.open_streaming(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"differing: weights {shard.name}"):
        fr.trace(streamed, None, PROMPTS, resume=tmp_path / "run")
    content[-1] ^= 1
    shard.write_bytes(content)
    streamed, _ = fr.open_streaming(tmp_path / "model")
    assert bits(fr.trace(streamed, None, PROMPTS, resume=tmp_path / "run")) == expected


def test_a_checkpoint_that_changes_while_it_is_streamed(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model", max_shard_size="60kB")
    streamed, _ = fr.open_streaming(tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    streamed.model.layers[0].register_forward_hook(lambda *_: os.utime(shard))
    with pytest.raises(ValueError, match=rf"{shard.name}' changed while the run went through it"):
        fr.trace(streamed, None, PROMPTS, resume=tmp_path / "run")


def changed(path, at, by=1):
    content = bytearray(path.read_bytes())
    content[at] ^= by
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["layer-000.safetensors", "state-001-0000.safetensors"])
def test_one_bit_of_what_was_kept(model, stopped, name):
    changed(stopped / name, -1)
    with pytest.raises(ValueError, match=rf"{name}' is damaged: its digest is another; remove the folder"):
        fr.trace(model, None, PROMPTS, resume=stopped)


def test_what_was_kept_of_another_run(model, stopped, tmp_path):
    fr.trace(model, None, PROMPTS, resume=tmp_path / "other", floor=2e-3)
    shutil.copy(tmp_path / "other" / "layer-000.safetensors", stopped)
    with pytest.raises(ValueError, match="is of another run"):
        fr.trace(model, None, PROMPTS, resume=stopped)
    (stopped / "layer-000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layer-000.safetensors' is missing"):
        fr.trace(model, None, PROMPTS, resume=stopped)


def test_the_state_of_a_run_has_a_digest(model, stopped):
    text = (stopped / "run.json").read_text()
    (stopped / "run.json").write_text(text.replace('"finished": 1', '"finished": 0'))
    with pytest.raises(ValueError, match="its digest is another"):
        fr.trace(model, None, PROMPTS, resume=stopped)


def test_files_of_other_programs_stay(model, tmp_path):
    (tmp_path / "state-of-the-art.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(state-of-the-art.txt\)"):
        fr.trace(model, None, PROMPTS, resume=tmp_path)


def test_a_lock_whose_file_was_removed_locks_nothing(tmp_path, monkeypatch):
    """One process opens the lock file, another removes it and a third makes a new one, before the first has its
    lock.
    """
    first, removed = files.Lock(tmp_path / ".lock"), []
    opened = os.open

    def late(path, *rest):
        handle = opened(path, *rest)
        if not removed and str(path).endswith(".lock"):
            removed.append(os.unlink(path))
            third = files.Lock(tmp_path / ".lock")
            removed.append(third)
            assert third.acquire()
        return handle

    monkeypatch.setattr(files.os, "open", late)
    assert not first.acquire()
    removed[1].release()
    assert first.acquire()


def test_one_holder_at_a_time(tmp_path):
    """Threads claim, check that they are alone, and discard, all at once."""
    inside, worst, errors = [0], [0], []
    guard = threading.Lock()

    def work():
        for _ in range(60):
            try:
                lock = files.claim(tmp_path / "run")
            except (ValueError, OSError):  # taken, or its folder is going just now
                continue
            with guard:
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
            with guard:
                inside[0] -= 1
            try:
                (tmp_path / "run" / ".lock").unlink(missing_ok=True)
                (tmp_path / "run").rmdir()
            except OSError as error:
                errors.append(error)
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst[0] == 1


def test_files_have_the_mode_that_the_umask_leaves(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the process's umask is not ours"))
    plain = tmp_path / "plain"
    plain.write_text("")
    files.write_text(tmp_path / "text", "x")
    files.write_atomically(tmp_path / "x.safetensors", lambda path: save_file({"x": torch.zeros(3)}, path))
    assert {(tmp_path / name).stat().st_mode for name in ("plain", "text", "x.safetensors")} == {plain.stat().st_mode}


def scaled(model, by):
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, output: output * by)


def steered(model, by):
    vector = torch.full((model.config.hidden_size,), by)
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, output, vector=vector: output * vector)


def bent(model, by):
    model.model.layers[1].mlp.act_fn = (lambda x: torch.relu(x)) if by > 1 else (lambda x: torch.sigmoid(x))


def replaced(model, by):
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * by, mlp)


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, module, given, output):
        return output * self.by


def called(model, by):
    model.model.layers[1].mlp.register_forward_hook(Scale(by))


@pytest.mark.parametrize("put", [scaled, steered, bent, replaced, called])
def test_what_is_put_on_a_model_counts_by_what_it_does(put, tmp_path):
    """Hooks of one name that differ in a number around them, another activation, another forward."""

    def made(by):
        model = make("llama", num_hidden_layers=2)
        if put is bent:
            del model.model.layers[1].mlp.act_fn
        if by is not None:
            put(model, by)
        return model

    fr.trace(made(1.0), None, PROMPTS, resume=tmp_path)
    before = weights_digest(made(1.0))
    for by in (1.25, *([] if put is bent else [None])):
        with pytest.raises(ValueError, match=r"another run \(differing: modules model.layers.1.mlp\)"):
            fr.trace(made(by), None, PROMPTS, resume=tmp_path)
        assert weights_digest(made(by)) != before
    fr.trace(made(1.0), None, PROMPTS, resume=tmp_path)
    assert weights_digest(made(1.0)) == before


def test_code_is_known_in_every_process():
    code = """if 1:
        import os, sys, torch
        sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
        from families import make
        from test_resume import called, replaced, scaled, steered
        from flowroutes_fast.models.identity import code_of
        found = []
        for put in (scaled, steered, replaced, called):
            model = make("llama", num_hidden_layers=2)
            put(model, 2.0)
            mlp = model.model.layers[1].mlp
            mlp.register_forward_hook(lambda *given: given[2] if 3 in {1, 2, 3} else print("a", "b"))
            found.append(code_of(model.model.layers[1].mlp))
        print(found)"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(said) == 1


def test_what_stands_where_a_file_is_written(tmp_path):
    """Links stay links, a file keeps its mode, devices and pipes stay what they are; long names in any script."""
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_text("old")
    kept.chmod(0o600)
    link.symlink_to("kept")
    assert files.write_text(link, "new") == link
    assert (link.is_symlink(), kept.read_text(), kept.stat().st_mode & 0o777) == (True, "new", 0o600)
    (tmp_path / "dangling").symlink_to("made")
    files.write_text(tmp_path / "dangling", "x")
    assert (tmp_path / "made").read_text() == "x"
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, why in (("loop", "symbolic links"), ("pipe", "a pipe or a device"), ("folder", "directory")):
        with pytest.raises(OSError, match=f"cannot write '{tmp_path / name}': .*{why}"):
            files.write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()
    files.write_text(tmp_path / f"{'日' * 80}.txt", "x")
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".partial"]


def test_one_process_at_a_time_puts_a_copy_into_the_cache(tmp_path):
    inside = []

    def work():
        with files.only_one(tmp_path / ".lock"):
            inside.append(1)
            assert sum(inside) == 1
            inside.append(-1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), sum(inside)) == (8, 0)


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("FLOWROUTES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert str(resume.cache_folder()) == "/.cache/flowroutes_fast"


def test_digests_of_files(tmp_path, monkeypatch):
    file, kept = tmp_path / "file", tmp_path / "digests"
    file.write_bytes(bytes(3 * 10**5))
    monkeypatch.setattr(files, "PIECE", 10**5)
    monkeypatch.setattr(files, "REMEMBERED", 1)
    first = files.digest_of(file, kept)
    assert not kept.exists()  # changed just now: its times would not show another change
    monkeypatch.setattr(files, "SETTLED", 0)
    assert files.digest_of(file, kept) == first
    monkeypatch.setattr(files, "_piece", lambda *_: pytest.fail("read again"))
    assert files.digest_of(file) == first
    files._digests.clear()
    assert files.digest_of(file, kept) == first  # another process
    monkeypatch.undo()
    next(kept.iterdir()).write_text("nonsense")
    files._digests.clear()
    assert files.digest_of(file, kept) is not None
    for at in (0, 10**5, -1):
        changed(file, at)
        assert files.digest_of(file, kept) != first
        changed(file, at)
    with pytest.raises(OSError, match="nowhere' cannot be read"):
        files.digest_of(tmp_path / "nowhere")


def test_what_killed_processes_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, other = tmp_path / "flowroutes-states-abc", tmp_path / "flowroutes-other"
    for folder in (left, other):
        folder.mkdir()
        (folder / ".lock").touch()
    mine, finish = files.temporary_folder("flowroutes-states-")
    again, also = files.temporary_folder("flowroutes-states-")
    assert {p.name for p in tmp_path.iterdir()} == {"flowroutes-other", mine.name, again.name}
    finish()
    also()
    assert [p.name for p in tmp_path.iterdir()] == ["flowroutes-other"]
