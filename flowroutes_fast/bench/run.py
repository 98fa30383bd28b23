"""``flowroutes bench``: correctness first, then kernels against plain PyTorch and the roofline, then whole traces."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowroutes_fast import ops
from flowroutes_fast.bench.harness import conditions, in_turns, result_path
from flowroutes_fast.bench.layers import SHAPES, Case, long_prompt, random_case, real_cases
from flowroutes_fast.bench.operations import OPERATIONS, certified_call, error
from flowroutes_fast.bench.rivals import RIVALS
from flowroutes_fast.loading.load import cache_folder
from flowroutes_fast.system.files import check_writable, write_text

RIVAL_BYTES = 4e9
RIVAL_SECONDS = 90.0
GATE = 1e-5  # of the normaliser
PARTS = ("kernels", "end-to-end", "memory", "import")
LARGE = ("attention", "dense")  # operations that return something of the size of [head, query, key]


class GateError(ValueError):
    """A kernel is wrong: no speed is reported."""


def kernels(case: Case, backend: str) -> dict[str, Callable[[], Any]]:
    """What is timed on one layer: every operation under its stem, signed flow, and ``exact``: the dense operation."""
    calls = {name: call for name, make in OPERATIONS.items() if (call := make(case, backend)) is not None}
    calls["exact"] = calls.pop("dense")
    return calls | {"signed": certified_call(case, backend, "signed")}


def gate(case: Case, backend: str) -> float:
    """Largest error of any operation in the last rows, in units of their states; intervals must hold the truth.

    Raises:
        GateError: one that is too large.
    """
    wrong = {}
    for name in OPERATIONS:
        if name in LARGE and (case.tokens > 2048 or "reference" in backend):
            continue
        wrong[name] = error(name, case, backend)
    name, worst = max(wrong.items(), key=lambda one: one[1] if one[1] == one[1] else float("inf"))
    if not worst <= GATE:
        raise GateError(
            f"{name} on {case.name} at {case.tokens} tokens: an error of {worst:.1e} of the normaliser (allowed "
            f"{GATE:.0e}); no speed is reported"
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
        if name in ("exact", *LARGE) and case.tokens**2 * case.shape.heads * 4 > RIVAL_BYTES:
            continue
        seconds, count = median(function, device)
        row[name] = {
            "seconds": seconds,
            "repetitions": count,
        }
        if (flops := case.flops(name)) is not None:
            row[name]["roofline"] = flops / ceiling["flops_per_second"] / seconds
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
    with torch.no_grad():
        seconds = in_turns(runs, repetitions, warm=1).medians()
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


def imports(turns: int) -> dict[str, float]:
    """Median seconds of fresh processes: Python alone, with torch, with this package, and the command's help."""
    python = [sys.executable, "-c"]
    commands = {
        "python": [*python, "pass"],
        "import torch": [*python, "import torch"],
        "import flowroutes_fast": [*python, "import flowroutes_fast"],
        "flowroutes --help": [sys.executable, "-m", "flowroutes_fast", "--help"],
    }

    def run(command: list[str]) -> Callable[[], Any]:
        return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

    return in_turns({name: run(command) for name, command in commands.items()}, turns, warm=1).medians()


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

    ``what`` may hold ``"kernels"``, ``"end-to-end"``, ``"memory"`` and ``"import"``. ``ValueError`` for unknown names,
    :class:`GateError` for a wrong kernel.
    """
    for name, chosen, known in (("shape", shapes, tuple(SHAPES)), ("part", what, PARTS)):
        if unknown := [c for c in chosen if c not in known]:
            raise ValueError(f"unknown {name} {unknown[0]!r}: choose among {', '.join(known)}")
    check_writable(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = ops.choose_backend(backend, torch.empty(0, device=device))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    report: dict[str, Any] = {"conditions": conditions(device, backend)}
    path = result_path(out, "", report["conditions"] | {"backend": "cpu" if device == "cpu" else "cuda"})

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
    if "import" in what:
        step("imports")
        report["import_seconds"] = imports(3 if quick else 9)
    save()
    return path
