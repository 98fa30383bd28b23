"""A long output attributed to its prompt: ours beside FlashTrace (Pan et al. 2026), the published method for spans, by
its own package.

The same job for each, in a process of its own, in turns: the model is loaded and warm; from prompt and output as text
to one number per prompt token. Ours is one forward pass and `token_attribution` of all positions that predict the
output: every row at most once, within certified bounds; how far it is from the exact figures (every sub-edge evaluated)
is measured once. FlashTrace: one proximity pass of the whole span (`ifr-span`), and its recursive hops (`flashtrace`).

pip install flashtrace
python benchmarks/span.py --prompt 512 --output 256
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from on_demand import prompt

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions
from flowroutes_fast.loading.load import DEMO_NAME

ROOT = Path(__file__).parent.parent
WAYS = ("forward", "ours", "ours exact", "ifr-span", "flashtrace")


def job(tokens: int, output: int) -> tuple[Any, Any, list[int], list[int]]:
    """Model, tokenizer, ids of prompt and output (greedy, of exactly that length)."""
    model, tokenizer = fr.load("demo")
    ids = prompt(tokenizer, tokens)
    batch = torch.tensor([ids])
    options = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False}
    made = model.generate(batch, attention_mask=torch.ones_like(batch), **options)
    return model, tokenizer, ids, made[0, tokens:].tolist()


def attribution(way: str, model: Any, tokenizer: Any, ids: list[int], out: list[int]) -> list[float]:
    if way == "forward":
        with torch.no_grad():
            model(input_ids=torch.tensor([ids + out]), use_cache=False, logits_to_keep=1)
        return []
    if way.startswith("ours"):
        options = {"precision": "exact", "dense": True} if way == "ours exact" else {"lazy": True}
        trace = fr.trace(model, None, ids + out, **options)
        table = trace.token_attribution(range(len(ids) - 1, len(ids) + len(out) - 1))
        return table["importance"].to_list()[: len(ids)]  # type: ignore[no-any-return]
    from flashtrace import FlashTrace

    model.set_attn_implementation("eager")  # it reads the model's own attention weights
    text, target = tokenizer.decode(ids), tokenizer.decode(out)
    found = FlashTrace(model, tokenizer).trace(prompt=text, target=target, hops=1, method=way)
    return [float(score) for score in found.scores]


def child(way: str, saved: str, runs: int) -> None:
    """Seconds, what the resident peak grew by, and the figures."""
    given = json.loads(Path(saved).read_text())
    model, tokenizer = fr.load("demo")
    attribution("forward", model, tokenizer, given["prompt"], given["output"])
    before, times, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], []
    for _ in range(runs):
        start = time.perf_counter()
        found = attribution(way, model, tokenizer, given["prompt"], given["output"])
        times.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print("@" + json.dumps({"seconds": times, "over_forward_mb": grown / 1e3, "scores": found}))


def measure(way: str, saved: Path) -> dict[str, Any]:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import span; span.child({way!r}, "
        f"{str(saved)!r}, 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(next(line[1:] for line in done.stdout.splitlines() if line.startswith("@")))  # type: ignore[no-any-return]


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "span.json")
    arguments = parser.parse_args()
    _, _, ids, out = job(arguments.prompt, arguments.output)
    saved = ROOT / "out" / "span-job.json"
    saved.parent.mkdir(exist_ok=True)
    saved.write_text(json.dumps({"prompt": ids, "output": out}))
    found: dict[str, Any] = {
        "conditions": conditions("cpu", "cpu") | {"model": DEMO_NAME, "load_before": os.getloadavg()}
    }
    made: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for run in range(arguments.runs):
        for way in WAYS:
            if way != "ours exact" or not run:
                made[way].append(measure(way, saved))
    exact = made["ours exact"][0]["scores"]
    found |= {"prompt": len(ids), "output": len(out), "ways": {}}
    for way, done in made.items():
        seconds = statistics.median(run["seconds"][0] for run in done)
        row = {"seconds": seconds, "over_forward_mb": statistics.median(run["over_forward_mb"] for run in done)}
        if scores := done[0]["scores"]:
            row["prompt_tokens"] = len(scores)
            if len(scores) == len(exact):
                row["rank_correlation_with_exact"] = float(np.corrcoef(ranks(scores), ranks(exact))[0, 1])
            if way.startswith("ours"):
                row["worst_difference_from_exact"] = float(np.abs(np.subtract(scores, exact)).max())
        found["ways"][way] = row
        print(f"{way:12} {seconds:8.2f} s  {row['over_forward_mb']:8.0f} MB over a forward pass", flush=True)
    found["conditions"]["load_after"] = os.getloadavg()
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
