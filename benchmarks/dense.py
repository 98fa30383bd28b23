"""How fast are exact importances, and what does a trace cost over the model's own forward pass?

Writes benchmarks/results/<device>.json. Real activations (SmolLM2-135M-Instruct, GPL-3 text or any file given), one process,
medians; the materialised and chunked PyTorch versions are measured in the same run as the kernels, after a correctness gate.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import flowroutes_fast as fr
from flowroutes_fast import native, reference
from flowroutes_fast.capture import capture
from flowroutes_fast.layer import parts_of

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (0, 8, 23)


def seconds(function, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def layer_arguments(model, ids, index):
    kept = []
    capture(model, torch.tensor([ids]), lambda layer: kept.append(layer) if layer.index == index else None)
    layer, parts = kept[0], parts_of(kept[0])
    base = reference.proximity(parts.residual, parts.whole)
    return layer.query, layer.key, parts.value, parts.w_o, parts.whole, base, None, None, layer.scaling, 0.0, 0


def materialised(query, key, value, w_o, whole, base, mask, sinks, scaling, softcap, window):
    """What the published tool does: a [query, key, head, d_model] tensor, then two norms."""
    pattern = reference.attention_pattern(query, key, scaling=scaling)
    group = query.shape[0] // key.shape[0]
    z = torch.einsum("hqk,hkd,hdm->qkhm", pattern, value.repeat_interleave(group, 0), w_o)
    norm = torch.nn.functional.pairwise_distance
    y = whole[:, None, None]
    edge = (y.abs().sum(-1) - norm(z, y, p=1, eps=0)).clamp_min(0)
    return (edge / (edge.sum((1, 2)) + base)[:, None, None]).permute(2, 0, 1)


def chunked(query, key, value, w_o, whole, base, mask, sinks, scaling, softcap, window, queries=32, keys=128):
    """Exact, 32 queries × 128 keys at a time, all heads of a chunk together."""
    pattern = reference.attention_pattern(query, key, scaling=scaling)
    u = value.repeat_interleave(query.shape[0] // key.shape[0], 0) @ w_o
    edge = torch.zeros_like(pattern)
    for i in range(0, query.shape[1], queries):
        y = whole[i : i + queries, None]
        for j in range(0, min(i + queries, key.shape[1]), keys):
            z = pattern[:, i : i + queries, j : j + keys, None] * u[:, None, j : j + keys]
            edge[:, i : i + queries, j : j + keys] = (y.abs().sum(-1) - (y - z).abs().sum(-1)).clamp_min(0)
    return edge / (edge.sum((0, 2)) + base)[:, None]


def chunked_by_head(query, *rest):
    """The same, a head at a time: its temporaries stay in the cache, so it is the fastest plain PyTorch we know."""
    key, value, w_o, whole, base, _, _, scaling, *_ = rest
    pattern = reference.attention_pattern(query, key, scaling=scaling)
    group = query.shape[0] // key.shape[0]
    edge = torch.zeros_like(pattern)
    for h in range(query.shape[0]):
        u = value[h // group] @ w_o[h]
        for i in range(0, query.shape[1], 32):
            y = whole[i : i + 32, None]
            for j in range(0, min(i + 32, key.shape[1]), 128):
                z = pattern[h, i : i + 32, j : j + 128, None] * u[j : j + 128]
                edge[h, i : i + 32, j : j + 128] = (y.abs().sum(-1) - (y - z).abs().sum(-1)).clamp_min(0)
    return edge / (edge.sum((0, 2)) + base)[:, None]


def ours(*arguments, dense=True, floor=-1.0):
    return torch.ops.flowroutes.attention_layer(*arguments, dense, floor, "cpu")


def gate(arguments, result, rows: int = 4) -> None:
    """No speed without correctness: the last rows against the formula in float64."""
    query, key, value, w_o, whole, base = (t.double() for t in arguments[:6])
    pattern = reference.attention_pattern(query, key, scaling=arguments[8])
    wanted = reference.attention_proximity(pattern[:, -rows:], value, w_o, whole[-rows:])
    wanted = wanted / (wanted.sum((0, 2)) + base[-rows:])[:, None]
    error = (result[:, -rows:] - wanted).abs().max().item()
    if error > 1e-5:
        sys.exit(f"importances differ from float64 by {error:.1e}: no speed is reported")


def kernels(model, ids) -> list[dict]:
    rows = []
    for tokens in (256, 512, 1024):
        for index in LAYERS:
            arguments = layer_arguments(model, ids[:tokens], index)
            elements = tokens**2 / 2 * arguments[0].shape[0] * arguments[4].shape[1]
            rivals = {}
            if index == 8 and tokens == 256:
                rivals["materialised"] = materialised
            if index == 8 and tokens == 1024:
                rivals |= {"chunked": chunked, "chunked_by_head": chunked_by_head}
            result = ours(*arguments)[0]
            gate(arguments, result)
            fast = seconds(lambda a=arguments: ours(*a), 9)
            row = {"tokens": tokens, "layer": index, "milliseconds": fast * 1e3, "giga_elements_per_second": elements / fast / 1e9}
            for name, function in rivals.items():  # one call: they take seconds
                start = time.perf_counter()
                slow_result = function(*arguments)
                slow = time.perf_counter() - start
                error = (slow_result - result).abs().max().item()  # theirs: two large norms cancel in float32
                row |= {f"{name}_seconds": slow, f"times_faster_than_{name}": slow / fast, f"{name}_max_difference": error}
                if error > 1e-3:
                    sys.exit(f"{name} at {tokens} tokens differs by {error:.1e}: no speed is reported")
            rows.append(row)
            print(row)
    return rows


def traces(model, ids) -> list[dict]:
    rows = []
    for tokens in (256, 512, 1024):
        batch, prompt = torch.tensor([ids[:tokens]]), ids[:tokens]
        fr.trace(model, None, prompt)
        forward, traced, share = [], [], []
        with torch.no_grad():
            for _ in range(3):
                forward.append(seconds(lambda b=batch: model(b, use_cache=False), 1))
                trace = None
                start = time.perf_counter()
                trace = fr.trace(model, None, prompt)
                traced.append(time.perf_counter() - start)
                share.append(trace.timings["importances"])
        row = {"tokens": tokens, "forward_seconds": statistics.median(forward), "trace_seconds": statistics.median(traced)}
        row |= {"trace_over_forward": row["trace_seconds"] / row["forward_seconds"], "importances_seconds": statistics.median(share)}
        rows.append(row)
        print(row)
    return rows


def peak(kind: str, tokens: int) -> float:
    """Peak resident gigabytes of a fresh process that loads the demo model and runs one pass."""
    code = (
        "import torch, flowroutes_fast as fr\n"
        "model, _ = fr.load('demo')\n"
        f"ids = [(7 * i) % 4000 + 100 for i in range({tokens})]\n"
        + (
            "fr.trace(model, None, ids)\n"
            if kind == "trace"
            else "torch.no_grad().__enter__(); model(torch.tensor([ids]), use_cache=False)\n"
        )
        + "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]) / 1e6


def main() -> None:
    model, tokenizer = fr.load("demo")
    text = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "LICENSE").read_text()
    ids = tokenizer(text)["input_ids"]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    report = {
        "conditions": {
            "device": cpu, "threads": torch.get_num_threads(), "isa": native.extension().isa(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit, "model": "SmolLM2-135M-Instruct fp32", "statistic": "median", "cache": "warm",
        },
        "kernels": kernels(model, ids),
        "traces": traces(model, ids),
    }  # fmt: skip
    del model
    report["peak_gigabytes_at_2048"] = {kind: peak(kind, 2048) for kind in ("forward", "trace")}
    print(report["peak_gigabytes_at_2048"])
    name = f"{cpu}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print("wrote", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
