"""What every benchmark shares: calls timed in turns, peak memory of processes of their own, the conditions of a run and
where its result goes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from flowroutes_fast.ops import native
from flowroutes_fast.system.files import write_text


@dataclass
class Turns:
    """Seconds of every call by its name, in the order of the turns; ``system``: those spent in the kernel; ``found``:
    what each returned last.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    system: dict[str, list[float]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        return medians(self.seconds)

    def ratio(self, name: str, base: str) -> float:
        """Median over the turns of one call's seconds by another's of the same turn."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))


def medians(times: Mapping[str, Iterable[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def clock(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: Mapping[str, Callable[[], Any]], turns: int, warm: int = 0) -> Turns:
    """Every call once a turn, in this order; the first ``warm`` turns do not count. What a call returned is let go
    before it is called again.
    """
    kept = Turns({name: [] for name in calls}, {name: [] for name in calls})
    for turn in range(warm + turns):
        for name, call in calls.items():
            kept.found.pop(name, None)
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
            kept.found[name] = call()
            if turn >= warm:
                kept.seconds[name].append(time.perf_counter() - start)
                kept.system[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_stime - before)
    return kept


def peak_bytes(reset: bool = False) -> int:
    """Largest resident bytes of this process since the last reset (Linux); at a reset, memory that is free is given
    back before.
    """
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def peak_of(script: str | Path, prepare: str, run: str) -> int:
    """Peak bytes of ``run`` above what ``prepare`` left, in a process of its own.

    Both are Python in which ``b`` is the benchmark ``script``, whose folder is not on the path: its files may have the
    names of libraries.
    """
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p != {str(Path(script).resolve().parent)!r}]\n"
        "import importlib.util as u\n"
        f"s = u.spec_from_file_location('benchmark', {str(Path(script).resolve())!r})\n"
        "b = u.module_from_spec(s); s.loader.exec_module(b)\n"
        f"b.torch.set_num_threads({torch.get_num_threads()}) if hasattr(b, 'torch') else None\n"
        "from flowroutes_fast.bench.harness import peak_bytes\n"
        f"{prepare}\nbefore = peak_bytes(reset=True)\n{run}\nprint(peak_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def without_folder(script: str | Path) -> None:
    """Take the script's folder off the path: its files have the names of the libraries they measure."""
    here = Path(script).parent.resolve()
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != here]


def conditions(device: str, backend: str) -> dict[str, Any]:
    """Machine, versions, threads, load and commit of this run."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
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


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def result_path(folder: Path, what: str, about: Mapping[str, Any]) -> Path:
    """``<folder>/[<what>-]<device>[-<threads>-cores].json`` of a run with these conditions."""
    cores = "" if about["backend"] in ("triton", "cuda") else f"-{about['threads']}-cores"
    return folder / f"{what}{'-' if what else ''}{about['device']}{cores}.json".replace(" ", "-").lower()


def write_report(path: str | Path | None, about: Mapping[str, Any], **parts: Any) -> None:
    """Write conditions and parts as JSON, in whole or not at all; nothing without a path."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), json.dumps({"conditions": dict(about), **parts}, indent=1) + "\n")
