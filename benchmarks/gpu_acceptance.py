"""Acceptance of the GPU engine on a machine that was just switched on: no network, nothing but torch, triton,
transformers and pytest.

    python benchmarks/gpu_acceptance.py right --activations FILE --out out/gpu    # is it right? at most nine minutes
    python benchmarks/gpu_acceptance.py fast --activations FILE --out out/gpu     # what does it cost? at most nine
    minutes

Every step runs in a process of its own with a limit, so that a crash or a hang costs that step alone, and writes
OUT/STEP.json at its end. ``--steps`` chooses some. FILE is written by benchmarks/capture_activations.py; without it the
step on real layers is left out. ``--dry`` runs the steps ``layers``, ``traces``, ``timing`` and ``model`` on tiny
random shapes in Triton's interpreter, to see that they run at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RIGHT = (
    ("device",),
    ("build", "kernels"),
    ("native", "layers", "traces"),
    ("sanitizer",),
)  # side by side: correctness needs no quiet machine
FAST = (("device",), ("build",), ("timing",), ("model",))
LIMITS = {
    "build": 200,
    "kernels": 240,
    "native": 120,
    "layers": 200,
    "traces": 150,
    "sanitizer": 100,
    "timing": 200,
    "model": 250,
}


DEVICE = "cpu" if "--dry" in sys.argv else "cuda"
BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("triton",)


def wait() -> None:
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak(function: Callable[[], Any]) -> int:
    """Most bytes that a call held on the device, with what was there before."""
    import torch

    if DEVICE == "cpu":
        function()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def link_kernels() -> None:
    """The package's kernels are a folder beside it: in a source tree without an installation, a link."""
    place = ROOT / "flowroutes_fast" / "kernels"
    if importlib.util.find_spec("flowroutes_fast.kernels") is None and not place.exists():
        place.symlink_to("../kernels")


def device(_: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers
    import triton

    from flowroutes_fast.bench.run import ceilings

    properties = torch.cuda.get_device_properties(0)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "transformers": transformers.__version__,
        "smi": smi.stdout.strip(),
        **ceilings("cuda", torch.bfloat16),
    }


def build(_: argparse.Namespace) -> dict[str, Any]:
    import torch

    start = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"FLOWROUTES_CUDA_ARCHS": f"{major}{minor}"}
    made = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    from flowroutes_fast.ops import cuda

    reason = cuda.missing()
    return {
        "seconds": time.perf_counter() - start,
        "missing": reason,
        "failed": reason is not None or made.returncode,
        "log": (made.stdout + made.stderr)[-3000:] if reason else "",
    }


def pytest(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=0", "--tb=short", *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return {
        "failed": ran.returncode != 0,
        "summary": ran.stdout.strip().splitlines()[-1:],
        "log": ran.stdout[-9000:] if ran.returncode else "",
    }


def kernels(_: argparse.Namespace) -> dict[str, Any]:
    return pytest("-n", "10", "tests/ops/test_kernels.py")


def native(_: argparse.Namespace) -> dict[str, Any]:
    return pytest("-m", "gpu", "tests/ops/test_cuda.py")


def real_layers(path: Path, dtype: Any) -> list[Any]:
    """Stored layers with operands in ``dtype`` and states in float32, on the GPU."""
    from dataclasses import replace

    import torch

    from flowroutes_fast.bench.layers import random_case, real_cases

    found = []
    for case in [random_case(tiny_shape(), 24, "cpu", torch.float32)] if DEVICE == "cpu" else real_cases(1024, path):
        a = case.attention
        a = type(a)(*(t.to(DEVICE, dtype) for t in (a.query, a.key, a.value, a.w_o)), a.whole.to(DEVICE), a.scaling)
        found.append(replace(case, attention=a, others=case.others.to(DEVICE)))
    return found


def tiny_shape() -> str:
    from flowroutes_fast.bench.layers import SHAPES, Shape

    SHAPES["tiny"] = Shape(4, 2, 16, 64)
    return "tiny"


def layers(options: argparse.Namespace) -> dict[str, Any]:
    """Intervals and lists of real layers against float64, in three types; twice; under other settings; on another
    stream.
    """
    import torch

    from flowroutes_fast.ops.certified import certified

    report: dict[str, Any] = {"failed": []}
    how = {"floor": 1e-3, "thresholds": (0.01, 0.03, 0.04)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in real_layers(options.activations, dtype):
            a, others = case.attention, case.others
            exact = attention64(a)
            total = exact.sum((0, 2)) + others[0].double()
            for backend in BACKENDS:
                name = f"{case.name}, {str(dtype)[6:]}, {backend}"

                def run(backend: str = backend, a: Any = a, others: Any = others) -> Any:
                    return certified(a, others, backend=backend, **how)

                try:
                    first = run()
                    row = {
                        "interval": max(
                            float(((first.low - total) / total).max()), float(((total - first.high) / total).max())
                        ),
                        "width": float(((first.high - first.low) / total).mean()),
                    }
                    query, key, head = first.index.long()
                    listed = torch.zeros_like(exact, dtype=torch.bool)
                    some = head >= 0
                    listed[head[some], query[some], key[some]] = True
                    row["value"] = float(
                        (
                            (first.value[some] - exact[head[some], query[some], key[some]]).abs() / total[query[some]]
                        ).max()
                    )
                    row["missing"] = int(((exact > 1.001e-3 * total[:, None]) & ~listed).sum())
                    left = torch.zeros_like(exact[0])
                    left[query[~some], key[~some]] = first.value[~some].double()
                    short = (exact * ~listed).sum(0) - left - 1e-5 * total[:, None]
                    row["pairs_missing"] = int(((exact.sum(0) > 1.001e-3 * total[:, None]) & (short > 0)).sum())
                    row["widest_pair"] = float((left / total[:, None]).max())
                    row["evaluated_per_row"] = first.counts.evaluated / len(total)
                    row["refined"], row["exhausted"], row["listed"] = (
                        first.counts.refined,
                        first.counts.exhausted,
                        len(first.value) / len(total),
                    )
                    row["same_twice"] = same(first, run())
                    torch.backends.cuda.matmul.allow_tf32 = True
                    row["same_with_tf32"] = same(first, run())
                    torch.backends.cuda.matmul.allow_tf32 = False
                    row["same_on_a_stream"] = same(first, on_a_stream(run))
                    bad = (
                        row["interval"] > 1e-5
                        or row["value"] > 1e-5
                        or row["missing"]
                        or row["pairs_missing"]
                        or not (row["same_twice"] and row["same_with_tf32"] and row["same_on_a_stream"])
                    )
                except Exception:
                    row, bad = {"error": traceback.format_exc()[-1500:]}, True
                report[name] = row
                if bad:
                    report["failed"].append(name)
    return report


def on_a_stream(run: Callable[[], Any]) -> Any:
    import torch

    if DEVICE == "cpu":
        return run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run()
    stream.synchronize()
    return found


def same(one: Any, other: Any) -> bool:
    import torch

    return all(
        torch.equal(getattr(one, n), getattr(other, n))
        for n in ("low", "high", "head_low", "head_high", "index", "value")
    )


def attention64(a: Any) -> Any:
    from flowroutes_fast import reference

    pattern = reference.attention_pattern(a.query.double(), a.key.double(), scaling=a.scaling)
    return reference.attention_proximity(pattern, a.value.double(), a.w_o.double(), a.whole.double())


def traces(_: argparse.Namespace) -> dict[str, Any]:
    """Small models of several families on the GPU against the same models on the CPU."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import KINDS, tiny

    import flowroutes_fast as fr

    report: dict[str, Any] = {"failed": []}
    torch.manual_seed(1)
    ids = torch.randint(101, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    for kind in KINDS if DEVICE == "cuda" else KINDS[:1]:
        model = tiny(kind)
        wanted = fr.trace(model, None, ids, attention_mask=mask, backend="reference", precision="exact")
        for backend in BACKENDS:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{kind}, {backend}, {str(dtype)[6:]}"
                try:
                    on_gpu = tiny(kind).to(DEVICE, dtype)
                    found = fr.trace(on_gpu, None, ids, attention_mask=mask, backend=backend)
                    row: dict[str, Any] = {"heads": [], "routes": []}
                    for w, f in zip(wanted, found, strict=True):
                        row["heads"].append(float((w.heads - f.heads).abs().max()))
                        a, b = (set(edges_of(t.route(threshold=0.04))) for t in (w, f))
                        row["routes"].append(len(a ^ b))
                    bad = dtype == torch.float32 and (max(row["heads"]) > 6e-3 or sum(row["routes"]) > 0)
                except Exception:
                    row, bad = {"error": traceback.format_exc()[-1500:]}, True
                report[name] = row
                if bad:
                    report["failed"].append(name)
    return report


def edges_of(route: Any) -> list[Any]:
    return list(route.to_networkx().edges(keys=True))


def sanitizer(_: argparse.Namespace) -> dict[str, Any]:
    """compute-sanitizer's memory checker on small cases of every kernel."""
    command = [
        "compute-sanitizer",
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=0",
        "tests/ops/test_kernels.py",
        "-k",
        "odd and bfloat16",
    ]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    return {"failed": ran.returncode != 0, "log": ran.stdout[-3000:]}


def milliseconds(function: Callable[[], Any], budget: float = 1.0) -> float:
    """Median milliseconds on the device, by events."""
    import torch

    if DEVICE == "cpu":
        begun = time.perf_counter()
        function()
        return (time.perf_counter() - begun) * 1e3
    function()
    function()
    torch.cuda.synchronize()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begun < budget and len(times) < 30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sharp_case(name: str, tokens: int, listed: float = 100.0) -> tuple[Any, float]:
    """A random layer whose attention is sharp: about ``listed`` sub-edges of a row are above 1e-3 of what is known
    of its normaliser; how many.
    """
    import torch

    from flowroutes_fast.bench.layers import random_case
    from flowroutes_fast.ops.certified_gpu import Passes

    case = random_case(name, tokens, DEVICE, torch.bfloat16)
    a = case.attention
    a.query.mul_(4.0)
    mean = 0.0
    while mean < listed:
        a.w_o.mul_(1.25)
        passes = Passes(a, case.others, 1e-3, (), 1e-2, "triton")
        pieces = passes.kernels.bounds(*passes.inputs, 1e-3 * case.others[0], passes.rest, **a.triton_options)
        mean = sum(piece.index.shape[1] for piece in pieces) / tokens
    return case, mean


def timing(options: argparse.Namespace) -> dict[str, Any]:
    """Kernels one by one at the shapes of large models, and whole layers."""
    import torch

    from flowroutes_fast.kernels import attention, bound, gradient
    from flowroutes_fast.ops.certified import certified
    from flowroutes_fast.ops.certified_gpu import Passes

    attend = torch.nn.functional.scaled_dot_product_attention
    report: dict[str, Any] = {}
    shapes = [
        ("llama-2-7b", 2048),
        ("llama-3-8b", 2048),
        ("llama-70b", 2048),
        ("llama-2-7b", 8192),
        ("llama-3-8b", 8192),
    ]
    if DEVICE == "cpu":
        shapes = [(tiny_shape(), 40)]
    for name, tokens in shapes:
        case, listed = sharp_case(name, tokens, 100.0 if DEVICE == "cuda" else 5.0)
        a, how = case.attention, case.attention.triton_options
        passes = Passes(a, case.others, 1e-3, (), 1e-2, "triton")
        passes.cut = passes._first_cuts()
        pieces = list(bound.bounds(*passes.inputs, passes.cut, passes.rest, **how))
        piece, low = pieces[0], case.others[0].float() + passes.rest.sum(1)
        head_start = piece.start[:: tokens if piece.row is None else len(piece.row)].contiguous()
        flat = torch.randn(tokens, a.n_head * a.value.shape[2], device=DEVICE, dtype=torch.bfloat16)
        w = a.w_o.permute(2, 0, 1).reshape(a.w_o.shape[2], -1)
        work = {
            "gradient": lambda a=a: gradient.gradient(a.whole, a.w_o),
            "values": lambda a=a: gradient.values(a.value, bound.tile_of(a.query, a.value.shape[2]).columns),
            "log_sum_exp": lambda a=a, how=how: attention.attention_rows(a.query, a.key, **how),
            "first_cuts": passes._first_cuts,
            "bounds_and_list": lambda p=passes, how=how: list(bound.bounds(*p.inputs, p.cut, p.rest, **how)),
            "pair_rests": lambda p=passes, low=low, how=how: bound.pair_rests(*p.inputs, p.cut, 1e-3 * low, **how),
            "sdpa": lambda a=a: attend(a.query[None], a.key[None], a.value[None], is_causal=True, enable_gqa=True),
            "o_proj": lambda flat=flat, w=w: flat @ w.T,
            "certified": lambda a=a, o=case.others: certified(
                a, o, floor=1e-3, thresholds=(0.01, 0.03, 0.04), backend="triton"
            ),
        }
        row: dict[str, Any] = {
            "listed_above_floor": listed,
            "listed_per_row": sum(p.index.shape[1] for p in pieces) / tokens,
        }
        row |= {each: milliseconds(function) for each, function in work.items()}
        row["pairs_evaluated"] = piece.index.shape[1]
        for backend in BACKENDS:
            passes.backend = backend
            row[f"pairs_{backend}"] = milliseconds(
                lambda p=passes, piece=piece, start=head_start: p.evaluate(piece.index, start)
            )
        row["counts"] = vars(work["certified"]().counts)
        before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        row["peak_over_inputs"] = peak(work["certified"]) - before
        report[f"{name}, {tokens}"] = row
    return report


def model(options: argparse.Namespace) -> dict[str, Any]:
    """Four layers of Llama-2-7B's shape with random weights and sharp attention: forward pass against trace,
    interleaved.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM, LlamaConfig

    import flowroutes_fast as fr

    config, lengths = LlamaConfig(num_hidden_layers=4, max_position_embeddings=32768), (2048, 8192)
    if DEVICE == "cpu":
        small = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4, "vocab_size": 50}
        config, lengths = LlamaConfig(num_hidden_layers=1, **small), (20,)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        net = AutoModelForCausalLM.from_config(config).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(6)
    report: dict[str, Any] = {}
    for tokens in lengths:
        ids = torch.randint(config.vocab_size, (1, tokens), device=DEVICE)

        def forward(ids: Any = ids) -> None:
            with torch.no_grad():
                net(input_ids=ids, logits_to_keep=1, use_cache=False)

        def traced(ids: Any = ids) -> Any:
            return fr.trace(net, None, ids[0].tolist(), backend="triton")

        forward(), traced()
        wait()
        row: dict[str, Any] = {"forward": [], "trace": []}
        for _ in range(4):
            row["forward"].append(milliseconds(forward, 0.2))
            start = time.perf_counter()
            found = traced()
            wait()
            row["trace"].append((time.perf_counter() - start) * 1e3)
        row |= {"work": found.work, "peak": peak(traced), "peak_forward": peak(forward)}
        report[str(tokens)] = row
        if DEVICE == "cpu":
            continue
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            traced()
            wait()
        averages = seen.key_averages()
        row["profile"] = averages.table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60)[-9000:]
        calls = (
            "cudaStreamSynchronize",
            "cudaMemcpyAsync",
            "cudaLaunchKernel",
            "cuLaunchKernelEx",
            "cudaDeviceSynchronize",
        )
        row["waits"] = {e.key: e.count for e in averages if e.key in calls}
    return report


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    f.__name__: f for f in (device, build, kernels, native, layers, traces, sanitizer, timing, model)
}


def step(name: str, options: argparse.Namespace) -> int:
    link_kernels()
    start = time.perf_counter()
    try:
        found = STEPS[name](options)
    except Exception:
        found = {"failed": True, "error": traceback.format_exc()[-4000:]}
    found["step_seconds"] = time.perf_counter() - start
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1, default=str))
    return 0


def begin(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, name, "--one", "--out", str(options.out)]
    if options.dry:
        command += ["--dry"]
    if options.activations:
        command += ["--activations", str(options.activations)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if options.dry else {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(name: str, process: subprocess.Popen[str], options: argparse.Namespace, since: float) -> None:
    try:
        output = process.communicate(timeout=max(1.0, LIMITS.get(name, 60) - (time.perf_counter() - since)))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + "\nkilled: it took too long"
    place = options.out / f"{name}.json"
    if not place.exists():
        place.write_text(json.dumps({"failed": True, "error": output[-4000:]}))
    found = json.loads(place.read_text())
    failed = found.get("failed")
    print(
        f"{name}: {'FAILED ' + str(failed)[:300] if failed else 'ok'} ({found.get('step_seconds', 0):.0f} s)",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["right", "fast", *STEPS])
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", default="")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--one", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        return step(options.what, options)
    groups = {"right": RIGHT, "fast": FAST}.get(options.what, ((options.what,),))
    chosen = options.steps.split(",") if options.steps else [name for group in groups for name in group]
    if options.activations is None and not options.dry:
        chosen = [name for name in chosen if name != "layers"]
    for group in groups:
        since = time.perf_counter()
        running = {name: begin(name, options) for name in group if name in chosen}
        for name, process in running.items():
            finish(name, process, options, since)
    return 0


if __name__ == "__main__":
    sys.exit(main())
