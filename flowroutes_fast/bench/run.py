"""``flowroutes bench``: correctness first, then kernels against plain PyTorch and the roofline, then whole traces."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from flowroutes_fast import ops
from flowroutes_fast.bench.layers import SHAPES, Case, long_prompt, random_case, real_cases
from flowroutes_fast.bench.rivals import RIVALS
from flowroutes_fast.loading.load import cache_folder
from flowroutes_fast.ops import native, reference
from flowroutes_fast.ops.bound import bound
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.system.files import check_writable, write_text

RIVAL_BYTES = 4e9
RIVAL_SECONDS = 90.0
GATE = 1e-5  # of the normaliser


class GateError(ValueError):
    """A kernel is wrong: no speed is reported."""


def kernels(case: Case, backend: str) -> dict[str, Callable[[], Any]]:
    """What is timed on one layer."""
    a, o = case.attention, case.others

    def fresh(measure: str) -> Any:
        a.__dict__.pop("gradient", None)
        return certified(
            a,
            o,
            floor=1e-3,
            thresholds=(0.01, 0.03, 0.04) if measure == "proximity" else (),
            backend=backend,
            measure=measure,
        )

    def bounds() -> Any:
        a.__dict__.pop("gradient", None)
        return bound(a, backend)

    def exact() -> Any:
        return torch.ops.flowroutes.attention_layer(
            a.query.float(),
            a.key.float(),
            a.value.float(),
            a.w_o.float(),
            a.whole,
            o[0],
            None,
            None,
            a.scaling,
            0.0,
            0,
            True,
            -1.0,
            backend,
        )

    return {"certified": lambda: fresh("proximity"), "bound": bounds, "signed": lambda: fresh("signed"), "exact": exact}


def gate(case: Case, backend: str, rows: int = 3) -> float:
    """Largest error of the exact kernel over its normaliser in the last rows, against float64; intervals must hold
    the truth.
    """
    a = case.attention.float()
    last = slice(a.n_query - rows, None) if a.n_query > rows else slice(None)
    pattern = reference.attention_pattern(a.query.double()[:, last], a.key.double(), scaling=a.scaling)
    near = reference.attention_proximity(pattern, a.value.double(), a.w_o.double(), a.whole[last].double())
    total = near.sum((0, 2)) + case.others[0, last].double()
    todo = kernels(case, backend)
    found = todo["certified"]()
    outside = max(float(((found.low[last] - total) / total).max()), float(((total - found.high[last]) / total).max()))
    query, key, head = found.index.long().cpu()
    first = a.n_query - near.shape[1]
    mine = (query >= first) & (head >= 0)
    wanted = near[head[mine], query[mine] - first, key[mine]].cpu()
    error = (
        float(((found.value.cpu()[mine] - wanted).abs() / total.cpu()[query[mine] - first]).max())
        if bool(mine.any())
        else 0.0
    )
    if case.tokens <= 2048 and "reference" not in backend:
        error = max(error, float((todo["exact"]()[0][:, last].double() - near / total[:, None]).abs().max()))
    worst = max(error, outside)
    if not worst <= GATE:
        raise GateError(
            f"{case.name} at {case.tokens} tokens: an error of {worst:.1e} of the normaliser (allowed {GATE:.0e}); no "
            f"speed is reported"
        )
    return worst


def median(function: Callable[[], Any], device: str, budget: float = 2.0) -> tuple[float, int]:
    """Median seconds of warm calls within a time budget, and how many."""
    times: list[float] = []
    function()
    while len(times) < 3 or (sum(times) < budget and len(times) < 15):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(times)


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches in this run: bytes per second of a copy, FLOP per second of a matrix product."""
    big = torch.empty(2**26, device=device)
    other = torch.empty_like(big)
    copy = median(lambda: other.copy_(big), device, 0.5)[0]
    n = 8192 if device == "cuda" else 1536
    x = torch.randn(n, n, device=device, dtype=dtype)
    product = median(lambda: x @ x, device, 1.0)[0]
    return {"bytes_per_second": 2 * big.nbytes / copy, "flops_per_second": 2 * n**3 / product}


def measure_layer(
    case: Case, backend: str, rivals: list[str], ceiling: dict[str, float], device: str
) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": case.name, "tokens": case.tokens, "gate": gate(case, backend)}
    for name, function in kernels(case, backend).items():
        if name == "exact" and case.tokens**2 * case.shape.heads * 4 > RIVAL_BYTES:
            continue
        seconds, count = median(function, device)
        row[name] = {
            "seconds": seconds,
            "repetitions": count,
            "roofline": case.flops(name) / ceiling["flops_per_second"] / seconds,
        }
    for name in rivals:
        elements = case.tokens**2 * case.shape.heads * case.shape.d_model
        need = 8 * elements if name == "materialised" else 12 * case.tokens**2 * case.shape.heads
        expected = elements / (2e8 if device == "cpu" else 2e10) * (4 if name == "materialised" else 1) / 2
        if need > RIVAL_BYTES or expected > RIVAL_SECONDS:
            row[name] = {"skipped": f"needs about {need / 1e9:.0f} GB and {expected:.0f} s"}
            continue
        a = case.attention.float()
        try:
            if name == "compiled":
                RIVALS[name](a)
            start = time.perf_counter()
            result = RIVALS[name](a)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        except Exception as error:  # a rival that this machine cannot run is a fact to report
            row[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
            continue
        difference = float(
            (result[:, -2:].sum((0, 2)) + case.others[0, -2:] - kernels(case, backend)["certified"]().high[-2:]).max()
        )
        row[name] = {
            "seconds": seconds,
            "certified_is_faster": seconds / row["certified"]["seconds"],
            "above_our_upper_bound": difference,
        }
        if "exact" in row:
            row[name]["exact_is_faster"] = seconds / row["exact"]["seconds"]
    return row


def end_to_end(tokens: int, backend: str, repetitions: int) -> dict[str, Any]:
    """A traced pass over the demo model's own forward, interleaved; medians."""
    import flowroutes_fast as fr

    model, tokenizer = fr.load("demo")
    ids = long_prompt(tokenizer, tokens)
    batch = torch.tensor([ids])
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(batch, use_cache=False),
        "forward, last logits": lambda: model(batch, use_cache=False, logits_to_keep=1),
        "certified": lambda: fr.trace(model, None, ids, backend=backend),
        "signed": lambda: fr.trace(model, None, ids, backend=backend, measure="signed"),
        "exact": lambda: fr.trace(model, None, ids, backend=backend, precision="exact"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for name in runs:
            runs[name]()
        for _ in range(repetitions):
            for name, function in runs.items():
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{name} / {base}": seconds[name] / seconds[base]
        for name in ("certified", "signed", "exact")
        for base in ("forward", "forward, last logits")
    }
    return {"tokens": tokens, "repetitions": repetitions, "seconds": seconds, "ratios": ratios}


_CHILD = """
import torch, flowroutes_fast as fr
model, _ = fr.load('demo')
ids = [(7 * i) % 4000 + 100 for i in range({tokens})]
{call}
print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))
"""
_CALLS = {
    "forward": "torch.no_grad().__enter__(); model(torch.tensor([ids]), use_cache=False)",
    "forward, last logits": (
        "torch.no_grad().__enter__(); model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)"
    ),
    "certified": "fr.trace(model, None, ids)",
}


def memory(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Peak resident megabytes of fresh processes, by what they ran."""
    rows = []
    for tokens in lengths:
        row: dict[str, Any] = {"tokens": tokens}
        for name, call in _CALLS.items():
            code = _CHILD.format(tokens=tokens, call=call)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            row[name] = int(done.stdout.split()[-1]) / 1e3
        rows.append(row)
    return rows


def write_profile(path: Path, tokens: int) -> None:
    """A Chrome trace (chrome://tracing, Perfetto) of one traced pass over the demo model."""
    import flowroutes_fast as fr
    from flowroutes_fast.system.files import write_atomically

    model, tokenizer = fr.load("demo")
    ids = long_prompt(tokenizer, tokens)
    fr.trace(model, None, ids)
    with torch.profiler.profile() as profile:
        fr.trace(model, None, ids)
    write_atomically(path, lambda temporary: profile.export_chrome_trace(str(temporary)))


def conditions(device: str, backend: str) -> dict[str, Any]:
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    found = {
        "device": name,
        "backend": backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "load_average": os.getloadavg()[0],
        "statistic": "median, warm",
    }
    if backend == "cpu":
        found["isa"] = native.extension().isa()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found | {"commit": commit.stdout.strip() or "unknown"}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def run(
    *,
    tokens: tuple[int, ...],
    shapes: tuple[str, ...],
    what: tuple[str, ...],
    out: Path,
    backend: str,
    quick: bool,
    step: Callable[[str], None],
) -> Path:
    """Measure and write ``<out>/<device>.json`` and plots; returns the JSON's path.

    ``what`` may hold ``"kernels"``, ``"end-to-end"`` and ``"memory"``. ``ValueError`` for unknown names,
    :class:`GateError` for a wrong kernel.
    """
    for name, chosen, known in (("shape", shapes, tuple(SHAPES)), ("part", what, ("kernels", "end-to-end", "memory"))):
        if unknown := [c for c in chosen if c not in known]:
            raise ValueError(f"unknown {name} {unknown[0]!r}: choose among {', '.join(known)}")
    check_writable(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = ops.choose_backend(backend, torch.empty(0, device=device))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    report: dict[str, Any] = {"conditions": conditions(device, backend)}
    label = (
        f"{report['conditions']['device']}-{torch.get_num_threads()}-cores"
        if device == "cpu"
        else report["conditions"]["device"]
    )
    path = out / f"{label.replace(' ', '-').lower()}.json"

    def save() -> None:  # after every length: an interrupted run leaves what it measured
        write_text(path, json.dumps(report, indent=1) + "\n")

    if "kernels" in what:
        step("ceilings of this machine")
        report["ceilings"] = ceiling = ceilings(device, dtype)
        report["kernels"] = []
        for n in tokens:
            cases = []
            if device == "cpu" and "smollm2-135m" in shapes and n <= 1024:
                cases += real_cases(n, cache_folder() / "activations" / "smollm2.safetensors")[: 1 if quick else None]
            cases += [
                random_case(s, n, device, dtype)
                for s in shapes
                if device == "cuda" or SHAPES[s].d_model * n <= 4096 * 512
            ]
            for place, case in enumerate(cases):
                step(f"{case.name}, {n} tokens")
                rivals = [] if quick or place != 1 else list(RIVALS)
                report["kernels"].append(measure_layer(case, backend, rivals, ceiling, device))
                save()
    if "end-to-end" in what:
        report["end_to_end"] = []
        for n in tokens:
            step(f"traced pass, {n} tokens")
            report["end_to_end"].append(end_to_end(n, "auto", 2 if quick else 5))
            save()
    if "memory" in what:
        step("peak memory")
        report["memory_megabytes"] = memory((256, 512) if quick else (512, 1024, 2048))
    save()
    return path
