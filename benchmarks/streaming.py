"""A Llama-3-70B-shaped model from disk under a hard limit of 8 GiB: peak, time, and time against reading and against
accelerate's offload.

    python benchmarks/streaming.py --layers 8,40,80 --folder /a/disk/with/room

Eight layers are written, 1.71 GB each; further ones are hard links to them, read under other names. Every figure comes
from a fresh process, in a memory cgroup of 8 GiB where one can be made (root), which holds the page cache too: with 8
files of 13.7 GB every read is a disk's. Elsewhere RLIMIT_DATA limits what the process allocates.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save

ROOT = Path(__file__).parent.parent
LIMIT = 8 * 2**30
DISTINCT = 8
GROUP = Path("/sys/fs/cgroup/memory/flowroutes-benchmark")
SHAPE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
TEXT = " ".join(["In the depths of winter I finally learned that within me there lay an invincible summer ."] * 4)
CHILD = """
import contextlib, io, json, re, resource, sys, threading, time
from dataclasses import replace
if {rlimit}:
    resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
import torch, flowroutes_fast as fr
from flowroutes_fast.loading import streaming
places = streaming.tensor_places

def linked(folder):  # hard links: the tensors of layer n are there under the names of layer n % {distinct}
    found = {{}}
    for name, place in places(folder).items():
        n = re.search(r"layers[.](\\d+)", name)
        if n is None:
            found[name] = place
        for copy in range(int(n[1]), {layers}, {distinct}) if n else ():
            file = place.file.with_name(f"layer-{{copy:02d}}.safetensors")
            found[name.replace(n[0], f"layers.{{copy}}")] = replace(place, file=file)
    return found

streaming.tensor_places = linked
ids = [[(7 * i + 31 * p) % 16000 + 100 for i in range({tokens})] for p in range({prompts})]
start = time.perf_counter()
if {what!r} == "command":
    from flowroutes_fast import cli
    sys.argv = ["flowroutes", "trace", {text!r}, "--model", {folder!r}, "--memory", "6GiB"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main()
    assert "tokens" in out.getvalue(), out.getvalue()
elif {what!r} == "forward":
    from transformers import AutoModelForCausalLM
    import tempfile
    options = dict(device_map={{"": "disk"}}, offload_folder=tempfile.mkdtemp(), dtype="auto")
    model = AutoModelForCausalLM.from_pretrained({folder!r}, **options)
    start = time.perf_counter()
    with torch.no_grad():
        model(torch.tensor(ids), use_cache=False, logits_to_keep=1)
else:
    model, _ = fr.open_streaming({folder!r}, memory="6GiB")
    start = time.perf_counter()
    fr.trace(model, None, ids)
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps(dict(seconds=seconds, peak=int(status["VmHWM"].split()[0]) * 1024)))
"""


def build(folder: Path, layers: int) -> None:
    """Random weights: one layer is drawn, the others are its bytes under other names."""
    from transformers import AutoTokenizer, LlamaConfig

    from flowroutes_fast.loading.load import _converted, demo_file

    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(_converted(demo_file())).save_pretrained(folder)
    d, f, kv, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], 1024, SHAPE["vocab_size"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16) * shape[-1] ** -0.5

    ends = {
        "model.embed_tokens.weight": normal(v, d),
        "lm_head.weight": normal(v, d),
        "model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
    }
    (folder / "ends.safetensors").write_bytes(save(ends))
    index = dict.fromkeys(ends, "ends.safetensors")
    layer = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    tensors = {f"{name}.weight": normal(*shape) for name, shape in layer.items()}
    tensors |= {
        f"{name}.weight": torch.ones(d, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    whole = save(tensors)
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), memoryview(whole)[8 + length :]
    for n in range(layers):
        name = f"layer-{n:02d}.safetensors"
        file = folder / name
        if n < DISTINCT:
            index |= dict.fromkeys((f"model.layers.{n}.{key}" for key in tensors), name)
        if n >= DISTINCT and not file.exists():
            file.hardlink_to(folder / f"layer-{n % DISTINCT:02d}.safetensors")
        if file.is_file() and file.stat().st_size > len(data):
            continue
        own = json.dumps(
            {f"model.layers.{n}.{key}": entry for key, entry in header.items() if key != "__metadata__"}
        ).encode()
        own += b" " * (-len(own) % 8)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(own)) + own)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def forget(folder: Path) -> None:
    """Ask the system to drop the checkpoint from its cache."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def bandwidth(folder: Path) -> float:
    """Bytes per second of reading two shards from a cold cache."""
    forget(folder)
    start, count = time.perf_counter(), 0
    for file in sorted(folder.glob("layer-*"))[:2]:
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(2**24):
                count += len(chunk)
    return count / (time.perf_counter() - start)


def limited() -> bool:
    """Is there a memory cgroup to run in?"""
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "memory.limit_in_bytes").write_text(str(LIMIT))
    except OSError:
        return False
    return True


def child(folder: Path, what: str, layers: int, tokens: int, prompts: int) -> dict[str, float]:
    forget(folder)
    group = limited()
    code = CHILD.format(
        limit=LIMIT,
        rlimit=not group,
        folder=str(folder),
        tokens=tokens,
        prompts=prompts,
        what=what,
        layers=layers,
        distinct=DISTINCT,
        text=TEXT,
    )
    enter = ["sh", "-c", f'echo $$ > {GROUP}/tasks && exec "$@"', "sh"] if group else []
    done = subprocess.run([*enter, sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{what} of {folder} failed ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"limit": "cgroup" if group else "RLIMIT_DATA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="8,40,80")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16, help="of the batch that is compared with one prompt")
    arguments = parser.parse_args()
    from flowroutes_fast.bench.harness import conditions

    out = ROOT / "benchmarks" / "results"
    rows: list[dict] = []
    report = {
        "conditions": conditions("cpu", "cpu"),
        "shape": SHAPE,
        "tokens": arguments.tokens,
        "limit": LIMIT,
        "rows": rows,
    }
    folder = arguments.folder / "llama-70b"
    for layers in (int(n) for n in arguments.layers.split(",")):
        build(folder, layers)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        row = {"layers": layers, "bytes": size, "bandwidth": bandwidth(folder)}
        row["command"] = child(folder, "command", layers, arguments.tokens, 1)
        if layers <= DISTINCT:  # what transformers itself can open
            row["trace"] = child(folder, "trace", layers, arguments.tokens, 1)
            row["forward"] = child(folder, "forward", layers, arguments.tokens, 1)
            row["trace_over_floor"] = row["trace"]["seconds"] / max(size / row["bandwidth"], row["forward"]["seconds"])
            if arguments.prompts > 1:
                row["batch"] = {"prompts": arguments.prompts} | child(
                    folder, "trace", layers, arguments.tokens, arguments.prompts
                )
        row["seconds_over_reading"] = row["command"]["seconds"] / (size / row["bandwidth"])
        rows.append(row)
        print(json.dumps(row), flush=True)
        name = f"streaming-{report['conditions']['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
