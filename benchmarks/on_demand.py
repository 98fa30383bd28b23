"""What a route on demand costs over the model's own forward pass (last logits only), beside a full trace and a decode
step.

All of a length are run in turns: forward pass, ``fr.route`` at each threshold (its pass and its walk apart), one decode
step, full trace. Memory: peak of a process that runs the pass, over one that runs the forward alone. Generation:
``fr.generate`` beside ``model.generate``.

python benchmarks/on_demand.py --tokens 256 1024 2048
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions
from flowroutes_fast.loading.load import DEMO_NAME

ROOT = Path(__file__).parent.parent
THRESHOLDS = (0.04, 0.02, 0.01)


def prompt(tokenizer: Any, tokens: int) -> list[int]:
    """Real text: the project's own pages, as often as needed."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer(text)["input_ids"]
    return (ids * (tokens // len(ids) + 1))[:tokens]  # type: ignore[no-any-return]


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def same(lazy: Any, full: Any) -> None:
    """Edges and, within the tolerances of both traces, importances."""
    a, b = lazy.edges, full.edges
    keys = [name for name in a if name != "importance"]
    assert a[keys].equals(b[keys]), "a route differs from the full trace's"
    assert np.allclose(a["importance"], b["importance"], rtol=0.25, atol=1e-3), "importances differ"


def walks(model: Any, ids: list[int], runs: int, full_up_to: int) -> dict[str, Any]:
    """One length, everything in turns."""
    batch = torch.tensor([ids])
    with torch.no_grad():
        cache = model(input_ids=batch, use_cache=True, logits_to_keep=1).past_key_values
    times: dict[str, list[float]] = {}
    edges: dict[str, int] = {}
    rows: dict[str, float] = {}
    states = ""
    routes: dict[float, Any] = {}

    def note(name: str, taken: float) -> None:
        times.setdefault(name, []).append(taken)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=batch[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=batch, use_cache=False, logits_to_keep=1)

    for _ in range(runs):
        note("forward", seconds(forward)[0])
        for threshold in THRESHOLDS:
            options = {"floor": threshold, "thresholds": (threshold,), "tolerance": 0.1}
            taken, trace = seconds(lambda options=options: fr.trace(model, None, ids, lazy=True, **options))
            note("pass", taken)
            taken, route = seconds(lambda trace=trace, threshold=threshold: trace.route(threshold=threshold))
            note(f"walk {threshold}", taken)
            edges[str(threshold)], rows[str(threshold)] = (
                len(route.edges),
                trace.certificate["rows"] / (trace.n_layers * len(ids)),
            )
            states = str(trace.certificate["states"])
            trace.release()
            routes[threshold] = route
        note("decode step", seconds(step)[0])
        if len(ids) <= full_up_to:
            taken, trace = seconds(lambda: fr.trace(model, None, ids))
            note("full trace", taken)
            for threshold in THRESHOLDS:
                same(routes[threshold], trace.route(threshold=threshold))
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = {str(t): (middle["pass"] + middle[f"walk {t}"]) / middle["forward"] for t in THRESHOLDS}
    steps = {str(t): middle[f"walk {t}"] / middle["decode step"] for t in THRESHOLDS}
    return {
        "tokens": len(ids),
        "states": states,
        "seconds": middle,
        "over_forward": ratios,
        "pass_over_forward": middle["pass"] / middle["forward"],
        "decode_steps": steps,
        "full_over_forward": middle["full trace"] / middle["forward"] if "full trace" in middle else None,
        "sub_edges": edges,
        "share_of_rows": rows,
        "times": times,
    }


def peak(tokens: int, lazy: bool) -> float:
    """MB of memory that a pass takes, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import on_demand; "
        f"on_demand.child({tokens}, {lazy})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(out.stdout.split()[-1])


def child(tokens: int, lazy: bool) -> None:
    """Prints by how many MB a pass goes beyond what a process has that has run a short one, lazily, before."""
    model, tokenizer = fr.load("demo")
    ids = prompt(tokenizer, tokens)
    fr.trace(model, None, ids[:16], lazy=True).route(threshold=0.04)  # imports, and the thorough check of a first trace
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmHWM")
    if lazy:
        trace = fr.trace(model, None, ids, lazy=True)
        trace.route(threshold=0.04)
    else:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    print(resident("VmHWM") - before)


def resident(name: str) -> float:
    """MB, of this process alone (``ru_maxrss`` begins with what the parent had)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) / 1e3


def generation(model: Any, ids: list[int], count: int, runs: int) -> dict[str, Any]:
    batch = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": count}
    plain, ours = [], []
    for _ in range(runs):
        taken, wanted = seconds(lambda: model.generate(batch, attention_mask=torch.ones_like(batch), **options))
        plain.append(taken)
        running = fr.generate(model, None, ids, count, do_sample=False)
        ours.append(seconds(lambda running=running: list(running))[0])
        assert running.token_ids == wanted[0, len(ids) :].tolist(), "the text differs from the model's"
    return {
        "prompt": len(ids),
        "tokens": count,
        "seconds": statistics.median(ours),
        "model_seconds": statistics.median(plain),
        "over_generate": statistics.median(ours) / statistics.median(plain),
    }


def growth(found: dict[str, Any]) -> dict[str, float]:
    """Exponents: slopes of log seconds and log bytes over log tokens, from 1,024 tokens on."""
    rows = [row for row in found["rows"] if row["tokens"] >= 1024]
    series = {
        name: [(row["tokens"], row["seconds"][name]) for row in rows]
        for name in ("forward", *(f"walk {t}" for t in THRESHOLDS), "decode step")
    } | {
        "memory over the forward": [(row["tokens"], row["over_mb"]) for row in found["memory"]],
    }
    fitted = {}
    for name, points in series.items():
        positive = np.array([(n, y) for n, y in points if y > 0 and n >= 1024])
        if len(positive) > 1:
            fitted[name] = float(np.polyfit(*np.log(positive).T, 1)[0])
    return fitted


def plot(found: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    tokens = [row["tokens"] for row in found["rows"]]
    for name, style in (
        ("forward", "k-"),
        ("walk 0.04", "C0-"),
        ("walk 0.02", "C1-"),
        ("walk 0.01", "C2-"),
        ("decode step", "k:"),
    ):
        label = name.replace("walk", "walk at τ").replace("forward", "forward pass")
        left.plot(tokens, [row["seconds"][name] for row in found["rows"]], style, marker="o", markersize=3, label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds", title="time")
    sizes = [row["tokens"] for row in found["memory"]]
    right.plot(
        sizes,
        [row["over_mb"] for row in found["memory"]],
        "C0-",
        marker="o",
        markersize=3,
        label="lazy trace and route, over the forward",
    )
    right.plot(sizes, [row["inputs_and_kv_mb"] for row in found["memory"]], "k:", label="layer inputs, keys and values")
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MB", title="memory")
    for axes, ticks in ((left, tokens), (right, sizes)):
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    conditions = found["conditions"]
    figure.suptitle(f"{conditions['model']} on {conditions['device']}, {conditions['threads']} thread(s)", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--model", default="demo", help="what fr.load takes: a name or a file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--full-up-to", type=int, default=2048, help="longest prompt that is traced whole beside it")
    parser.add_argument("--generate", type=int, default=64, help="tokens generated after a prompt of 1,024; 0 for none")
    parser.add_argument("--memory", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/on-demand-MACHINE-N-cores.json, and a .png beside it"
    )
    arguments = parser.parse_args()
    model, tokenizer = fr.load(arguments.model)
    known = DEMO_NAME if arguments.model == "demo" else Path(arguments.model).stem
    found: dict[str, Any] = {
        "conditions": conditions("cpu", "cpu") | {"model": known, "load_before": os.getloadavg()},
        "rows": [],
    }
    for tokens in arguments.tokens:
        row = walks(
            model,
            prompt(tokenizer, tokens),
            max(2, arguments.runs * (3 if tokens <= 512 else 1) - tokens // 2048),
            arguments.full_up_to,
        )
        found["rows"].append(row)
        over = "  ".join(f"τ {t}: {r:.2f} ({row['decode_steps'][t]:.1f} steps)" for t, r in row["over_forward"].items())
        full = "" if row["full_over_forward"] is None else f"  full trace {row['full_over_forward']:.2f}"
        print(f"{tokens:5} tokens ({row['states']}): pass {row['pass_over_forward']:.2f}  {over}{full}", flush=True)
    if arguments.generate:
        found["generation"] = generation(
            model, prompt(tokenizer, 1024), arguments.generate, max(2, arguments.runs // 2)
        )
        print(f"generation: {found['generation']['over_generate']:.2f} of model.generate", flush=True)
    found["memory"] = []
    for tokens in arguments.memory:
        plain, ours = peak(tokens, False), peak(tokens, True)
        config = model.config
        kv = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        floor = config.num_hidden_layers * tokens * (config.hidden_size + kv) * 4 / 1e6
        found["memory"].append(
            {"tokens": tokens, "forward_mb": plain, "lazy_mb": ours, "inputs_and_kv_mb": floor, "over_mb": ours - plain}
        )
        print(
            f"{tokens:5} tokens: {ours - plain:.0f} MB over the forward; layer inputs, keys and values are "
            f"{floor:.0f} MB",
            flush=True,
        )
    found["conditions"]["load_after"] = os.getloadavg()
    if found["memory"]:
        found["growth"] = growth(found)
        print({name: round(value, 2) for name, value in found["growth"].items()})
    which = "" if arguments.model == "demo" else f"{known}-"
    name = f"on-demand-{which}{found['conditions']['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{name}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    if found["memory"]:
        plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
