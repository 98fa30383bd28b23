"""Estimates against fresh processes, against shapes that are known, and the refusal that follows from them."""

import json
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError

import pytest
import torch
from conftest import KINDS, tiny
from transformers import BertConfig, GPT2Config, LlamaConfig
from typer.testing import CliRunner

import flowroutes_fast as fr
from flowroutes_fast.cli import app
from flowroutes_fast.system import memory
from flowroutes_fast.tracing.memory import check_memory
from flowroutes_fast.tracing.options import Options

module = sys.modules[check_memory.__module__]  # fr.estimate is the function

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
SMALL = LlamaConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    vocab_size=1000,
    max_position_embeddings=65536,
)

_ESTIMATE = """
import json, flowroutes_fast as fr
print(json.dumps([fr.estimate('demo', n, precision=p).total for n, p in {cases}]))
"""
_MEASURE = """
import flowroutes_fast as fr
model, _ = fr.load('demo')
fr.trace(model, None, [(7 * i) % 4000 + 100 for i in range({tokens})], precision={precision!r})
print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))
"""


def _child(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_little_address_space_is_refused(monkeypatch):
    """Threads that libraries start then would end the process."""
    monkeypatch.setattr(module, "address_space", lambda: 100 * 2**20)
    with pytest.raises(MemoryError, match=r"the address space of this process is limited .*: 105 MB are left"):
        check_memory(tiny("llama"), 3, Options())


def test_within_a_fifth_of_fresh_processes(demo):
    cases = [(256, "certified"), (1024, "certified"), (2048, "certified"), (256, "exact"), (2048, "exact")]
    estimates = json.loads(_child(_ESTIMATE.format(cases=cases)))
    for (tokens, precision), estimated in zip(cases, estimates, strict=True):
        measured = int(_child(_MEASURE.format(tokens=tokens, precision=precision))) * 1024
        assert abs(estimated / measured - 1) < 0.2, (tokens, precision, estimated, measured)


def test_weights_of_a_70b_model():
    found = fr.estimate(LLAMA_70B, 2048, dtype="bfloat16", backend="triton")
    assert 140e9 < found.weights < 142e9
    assert found.device == "cuda"
    assert found.total == found.weights + found.process + found.additional < 150e9
    assert "datasheet" in found.throughput_source
    assert 0.1 < found.seconds < 60


def test_certified_is_linear_in_tokens_and_exact_is_not():
    for part in ("activations", "buffers", "results"):
        a, b, c = (getattr(fr.estimate(SMALL, n, backend="cpu"), part) for n in (2048, 4096, 8192))
        assert c - b == pytest.approx(2 * (b - a), rel=0.1), part
    dense = [fr.estimate(SMALL, n, backend="cpu", precision="exact", dense=True).results for n in (2048, 4096)]
    assert dense[1] > 3.5 * dense[0]


def test_options_count():
    plain = fr.estimate(SMALL, 1024, backend="cpu")
    assert fr.estimate(SMALL, 1024, backend="cpu", batch=4).activations == 4 * plain.activations
    assert fr.estimate(SMALL, 1024, backend="cpu", neurons=True).additional > plain.additional
    assert fr.estimate(SMALL, 1024, backend="cpu", floor=1e-4).results > plain.results
    assert fr.estimate(SMALL, 1024, backend="cpu", dtype=torch.bfloat16).weights == plain.weights // 2
    assert fr.estimate(SMALL, 1024, backend="reference").buffers > plain.buffers
    with pytest.raises(FrozenInstanceError):
        plain.weights = 0


def test_a_loaded_model_counts_once():
    model = tiny("llama")
    expected = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    found = fr.estimate(model, 10)
    assert (found.weights, found.dtype) == (expected, "float32")
    assert "measured" in str(found)
    assert "predicted" in str(found)


def test_a_folder_needs_its_config_alone(tmp_path):
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=128).save_pretrained(tmp_path)
    found = fr.estimate(tmp_path, 100)
    assert found.dtype == "float32"
    assert found.weights > 4 * 2 * 12 * 64 * 64


@pytest.mark.parametrize(
    ("model", "tokens", "options", "error", "message"),
    [
        (SMALL, 0, {}, ValueError, "tokens must be at least 1"),
        (SMALL, 70000, {}, ValueError, "context of llama holds 65536"),
        (SMALL, 10, {"batch": 0}, ValueError, "batch must be at least 1"),
        (SMALL, 10, {"precision": "rough"}, ValueError, "unknown precision"),
        (SMALL, 10, {"backend": "tpu"}, ValueError, "unknown backend"),
        (SMALL, 10, {"dtype": "int7"}, ValueError, "unknown dtype"),
        (SMALL, 10, {"measure": "signed", "precision": "exact"}, ValueError, "signed"),
        ("./nowhere", 10, {}, FileNotFoundError, "no folder or file at './nowhere'"),
        (3, 10, {}, TypeError, "a config or a name"),
    ],
)
def test_what_is_refused(model, tokens, options, error, message):
    with pytest.raises(error, match=message):
        fr.estimate(model, tokens, **options)


def test_unknown_names_and_families(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"'no-such-model-anywhere' cannot be opened: .*[^.]\. Give 'demo'"):
        fr.estimate("no-such-model-anywhere", 10)
    with pytest.raises(ValueError, match="bert"):
        fr.estimate(
            BertConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True
            ),
            10,
        )


def test_command(tmp_path):
    SMALL.save_pretrained(tmp_path)
    done = CliRunner().invoke(
        app, ["estimate", str(tmp_path), "--tokens", "300", "--dtype", "bfloat16"], catch_exceptions=False
    )
    assert done.exit_code == 0
    for word in ("weights", "activations", "results", "total", "time", "measured", "predicted"):
        assert word in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_trace_refuses_what_does_not_fit(kind, monkeypatch):
    model, ids = tiny(kind), list(range(1, 30))
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(
        MemoryError,
        match=r"tracing 29 tokens needs about .*activations .* 0 MB are available; ways out: fewer "
        r"tokens, precision='c",
    ):
        fr.trace(model, None, ids, precision="exact", backend="reference")
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert fr.trace(model, None, ids, backend="reference").heads.isfinite().all()


def test_check_is_cheap_and_silent():
    model = tiny("llama")
    start = time.perf_counter()
    for _ in range(20):
        check_memory(model, 64, Options())
    assert (time.perf_counter() - start) / 20 < 0.1  # some milliseconds; generous, for a busy machine
    check_memory(torch.nn.Linear(2, 2), 64, Options())


def test_available_memory_reads_cgroups(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    for folder, limit, usage in ((inner, "max", 100), (inner.parent, "1000", 900)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
    (inner.parent / "memory.stat").write_text("anon 600\ninactive_file 200\nactive_file 50\n")
    assert memory._cgroup_memory(tmp_path / "cgroup", tmp_path) == 350
    old = tmp_path / "memory"
    old.mkdir()
    # a path of the host's, not visible in a container
    (tmp_path / "cgroup1").write_text("5:cpu:/x\n4:memory:/docker/xyz\n")
    (old / "memory.limit_in_bytes").write_text("500\n")
    (old / "memory.usage_in_bytes").write_text("100\n")
    assert memory._cgroup_memory(tmp_path / "cgroup1", tmp_path) == 400
    assert memory._cgroup_memory(tmp_path / "none", tmp_path) is None
    assert memory._system_memory(tmp_path / "none") is None


def test_address_space_is_respected():
    code = (
        "import resource; from flowroutes_fast.system.memory import address_space as f; a = f(); "
        "resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36)); print(a, f() < 2**36)"
    )
    assert _child(code) == "None True"


def test_streaming_of_a_config():
    found = fr.estimate(LLAMA_70B, 64, memory="8GiB", dtype="bfloat16", backend="cpu")
    layer = 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192)
    # and buffers
    assert found.read == pytest.approx(fr.estimate(LLAMA_70B, 64, dtype="bfloat16", backend="cpu").weights, rel=1e-6)
    assert layer <= found.weights < 1.3 * layer  # the unembedding is larger
    assert (found.bandwidth, found.floor) == (None, None)
    assert 7e10 * 2 * 64 < found.flops < 1.2 * 7e10 * 2 * 64
    assert "Streaming reads 141.11 GB" in str(found)
    # module by module
    assert fr.estimate(LLAMA_70B, 64, memory="1GiB", dtype="bfloat16", backend="cpu").weights < 2.2e9


def test_streaming_of_a_checkpoint(tmp_path):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(SMALL)
    model.save_pretrained(tmp_path)
    found = fr.estimate(tmp_path, 64, memory="1GiB")
    assert found.read == sum(p.nbytes for p in model.parameters())
    assert found.floor == pytest.approx(found.read / found.bandwidth)
    assert found.seconds >= found.floor
    result = CliRunner().invoke(app, ["estimate", str(tmp_path), "--tokens", "64", "--memory", "1GiB"])
    assert "Streaming reads" in result.output
    assert "measured here" in result.output


_STREAM = """
import flowroutes_fast as fr
model, _ = fr.open_streaming('demo', memory='1GiB')
fr.trace(model, None, [(7 * i) % 4000 + 100 for i in range(256)])
print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))
"""


@pytest.mark.demo_model
def test_streaming_peak_of_a_process():
    def output(code):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]

    code = "import flowroutes_fast as fr; e = fr.estimate('demo', 256, memory='1GiB'); print(e.total, e.read)"
    estimated, mapped = map(int, output(code).split())
    peak = 1024 * int(output(_STREAM))
    assert 0.75 * (peak - mapped) < estimated < 1.33 * peak  # the system keeps pages of the mapped file as it likes
