"""A Llama-3-70B-shaped model from disk on little memory: peak, time, and time against reading and against accelerate's own offload.

    python benchmarks/streaming.py --layers 2,4,8 --folder /a/disk/with/room

Every layer takes 1.71 GB of disk. Each figure comes from a fresh process that may not allocate more than 8 GiB (RLIMIT_DATA).
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
SHAPE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 16384,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "dtype": "bfloat16",
}  # fmt: skip
CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
import torch, flowroutes_fast as fr
from flowroutes_fast.streaming import open_streaming
ids = [[(7 * i + 31 * p) % 16000 + 100 for i in range({tokens})] for p in range({prompts})]
model, _ = open_streaming({folder!r}, memory={limit})
start = time.perf_counter()
if {what!r} == "trace":
    fr.trace(model, None, ids)
else:
    with torch.no_grad():
        model(torch.tensor(ids), use_cache=False, logits_to_keep=1)
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(json.dumps(dict(seconds=seconds, peak=int(status["VmHWM"].split()[0]) * 1024, anonymous=int(status["RssAnon"].split()[0]) * 1024)))
"""


def build(folder: Path, layers: int) -> None:
    """Random weights: one layer is drawn, the others are its bytes under other names."""
    from transformers import AutoTokenizer, LlamaConfig

    from flowroutes_fast.load import _converted, demo_file

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
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    tensors = {f"{name}.weight": normal(*shape) for name, shape in layer.items()}
    tensors |= {f"{name}.weight": torch.ones(d, dtype=torch.bfloat16) for name in ("input_layernorm", "post_attention_layernorm")}
    whole = save(tensors)
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), memoryview(whole)[8 + length :]
    for n in range(layers):
        name = f"layer-{n:02d}.safetensors"
        index |= dict.fromkeys((f"model.layers.{n}.{key}" for key in tensors), name)
        if (folder / name).is_file() and (folder / name).stat().st_size > len(data):
            continue
        own = json.dumps({f"model.layers.{n}.{key}": entry for key, entry in header.items() if key != "__metadata__"}).encode()
        own += b" " * (-len(own) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(own)) + own)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
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


def child(folder: Path, what: str, tokens: int, prompts: int) -> dict[str, float]:
    forget(folder)
    code = CHILD.format(limit=LIMIT, folder=str(folder), tokens=tokens, prompts=prompts, what=what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{what} of {folder} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16, help="of the batch that is compared with one prompt")
    arguments = parser.parse_args()
    from flowroutes_fast.bench.run import conditions

    rows = []
    counts = [int(n) for n in arguments.layers.split(",")]
    out = ROOT / "benchmarks" / "results"
    report = {"conditions": conditions("cpu", "cpu"), "shape": SHAPE, "tokens": arguments.tokens, "limit": LIMIT, "rows": rows}
    for layers in counts:
        folder = arguments.folder / f"llama-70b-{layers}"
        build(folder, layers)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        row = {"layers": layers, "bytes": size, "bandwidth": bandwidth(folder)}
        row["trace"] = child(folder, "trace", arguments.tokens, 1)
        row["forward"] = child(folder, "forward", arguments.tokens, 1)
        if layers == counts[-1] and arguments.prompts > 1:
            row["batch"] = {"prompts": arguments.prompts} | child(folder, "trace", arguments.tokens, arguments.prompts)
        floor = max(size / row["bandwidth"], row["forward"]["seconds"])
        row["trace_over_floor"] = row["trace"]["seconds"] / floor
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(folder)
        name = f"streaming-{report['conditions']['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
