"""A long output attributed to its prompt: ours beside FlashTrace (Pan et al. 2026), the published method for spans, by
its own package.

The same job for each, in processes of their own, in turns: the model is loaded, libraries are imported and a short text
has gone the same way; then from prompt and output to one number per prompt token. Ours is one forward pass and
`token_attribution` of all positions that predict the output: every row at most once, within certified bounds; how far
it is from the exact figures (every sub-edge evaluated) is measured. FlashTrace: the states of the whole span added up
(`ifr-span`), its recursive hops (`flashtrace`), and each row of the span by itself (`ifr-matrix`, once: it is slow).

FlashTrace takes texts and tokenizes them again, so that prompt and output are such that the same tokens come back; the
end-of-text token that it appends is left out of its span. What it computes is another quantity: importances of a
layer's keys, summed over layers, where ours follows them down to the embeddings. `ifr-matrix` is what our exact trace
gives when its rows are summed like that: there the two must agree.

pip install flashtrace
OMP_NUM_THREADS=1 python benchmarks/span.py --prompt 512 --output 256
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from on_demand import prompt

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions, peak_bytes, result_path
from flowroutes_fast.loading.load import DEMO_NAME

ROOT = Path(__file__).parent.parent
OURS: dict[str, dict[str, Any]] = {
    "ours": {"lazy": True},
    "ours, floor 1e-4": {"lazy": True, "floor": 1e-4},
    "ours exact": {"precision": "exact", "dense": True},
}
THEIRS = ("ifr-span", "flashtrace", "ifr-matrix")
ONCE = "ifr-matrix"  # minutes
WAYS = ("forward", *OURS, *THEIRS)
TOP = 20


def job(tokens: int, output: int) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of what the model says (greedy), both of exactly that length and such that their texts are
    tokenized to them.
    """
    model, tokenizer = fr.load("demo")
    ids = prompt(tokenizer, tokens)
    batch = torch.tensor([ids])
    options = {"max_new_tokens": output, "min_new_tokens": output, "do_sample": False}
    made = model.generate(batch, attention_mask=torch.ones_like(batch), **options)
    out = again(tokenizer, made[0, tokens:].tolist())[:output]
    if again(tokenizer, ids) != ids or again(tokenizer, out) != out or len(out) != output:
        raise SystemExit("this text is not tokenized to the same tokens again: choose other lengths")
    return ids, out


def again(tokenizer: Any, ids: list[int]) -> list[int]:
    return tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def attribution(
    way: str, model: Any, tokenizer: Any, ids: list[int], out: list[int], chunk: int
) -> tuple[list[float], dict[str, Any]]:
    """A number per prompt token, and what else is to be known."""
    if way == "forward":
        with torch.no_grad():
            model(input_ids=torch.tensor([ids + out]), use_cache=False, logits_to_keep=1)
        return [], {}
    if way in OURS:
        trace = fr.trace(model, None, ids + out, **OURS[way])
        table = trace.token_attribution(range(len(ids) - 1, len(ids) + len(out) - 1))
        more: dict[str, Any] = {"unresolved": float(table.attrs["unresolved"])}
        if way == "ours exact":
            more["summed"] = summed(trace, len(ids), len(out))
        else:
            more["share_of_rows"] = trace.certificate["rows"] / (trace.n_layers * len(trace.tokens))
        return table["importance"].to_list()[: len(ids)], more
    from flashtrace import FlashTrace

    text, target = tokenizer.decode(ids), tokenizer.decode(out)
    found = FlashTrace(model, tokenizer, chunk_tokens=chunk).trace(
        prompt=text, target=target, output_span=(0, len(out) - 1), hops=1, method=way
    )
    assert (len(found.prompt_tokens), len(found.generation_tokens)) == (len(ids), len(out) + 1), "other tokens"
    return [float(score) for score in found.scores], {}


def summed(trace: Any, tokens: int, output: int) -> list[float]:
    """FlashTrace's quantity from exact figures: importances of the output's rows, summed over heads and layers, mean of
    the rows.
    """
    rows = torch.arange(tokens, tokens + output)
    total = sum(layer[:, rows].sum(0).double().mean(0) for layer in trace.dense)
    return total[:tokens].tolist()  # type: ignore[union-attr, no-any-return]


def child(way: str, saved: str, chunk: int) -> None:
    """Seconds of the clock and of the processor, what the resident peak grows by, and the figures."""
    given = json.loads(Path(saved).read_text())
    model, tokenizer = fr.load("demo")
    if way in THEIRS:
        model.set_attn_implementation("eager")  # it reads the model's own attention weights
    attribution("forward", model, tokenizer, given["prompt"], given["output"], chunk)
    attribution(way, model, tokenizer, given["prompt"][:16], given["warm"], chunk)
    before, start, worked = peak_bytes(reset=True), time.perf_counter(), time.process_time()
    found, more = attribution(way, model, tokenizer, given["prompt"], given["output"], chunk)
    times = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - worked}
    print("@" + json.dumps(times | {"mb": (peak_bytes() - before) / 1e6, "scores": found, "more": more}))


def measure(way: str, saved: Path, chunk: int) -> dict[str, Any]:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import span; span.child({way!r}, "
        f"{str(saved)!r}, {chunk})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(next(line[1:] for line in done.stdout.splitlines() if line.startswith("@")))  # type: ignore[no-any-return]


def agreement(scores: list[float], wanted: list[float]) -> dict[str, float]:
    """Spearman's correlation, how many of the first ``TOP`` are the same, Pearson's correlation."""
    one, other = pd.Series(scores), pd.Series(wanted)
    return {
        "spearman": float(one.rank().corr(other.rank())),
        "pearson": float(one.corr(other)),
        f"of_{TOP}_largest": len(set(one.nlargest(TOP).index) & set(other.nlargest(TOP).index)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=128, help="FlashTrace's chunk_tokens; 128 is its default")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/span-MACHINE-N-cores.json")
    arguments = parser.parse_args()
    ids, out = job(arguments.prompt, arguments.output)
    _, tokenizer = fr.load("demo")
    saved = ROOT / "out" / "span-job.json"
    saved.parent.mkdir(exist_ok=True)
    saved.write_text(
        json.dumps({"prompt": ids, "output": out, "warm": tokenizer("It was so.", add_special_tokens=False).input_ids})
    )
    about = conditions("cpu", "cpu") | {"model": DEMO_NAME, "flashtrace": version("flashtrace")}
    about |= {"chunk_tokens": arguments.chunk, "load_before": os.getloadavg()}
    file = arguments.out or result_path(ROOT / "benchmarks" / "results", "span", about)
    made: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for run in range(arguments.runs):
        for way in WAYS:
            if way != ONCE or not run:
                made[way].append(measure(way, saved, arguments.chunk))
                print(f"{run} {way:16} {made[way][-1]['processor_seconds']:8.2f} s", flush=True)
        found = {"conditions": about | {"load_after": os.getloadavg(), "turns": run + 1}}
        found |= {"prompt": len(ids), "output": len(out), **summary(made)}
        file.write_text(json.dumps(found, indent=1) + "\n")
    for way, row in found["ways"].items():
        text = f"{way:16} {row['seconds']:8.2f} s  {row['over_forward_mb']:8.0f} MB over a forward pass"
        print(text, row.get("with_exact", ""), row.get("worst_difference", ""), flush=True)


def summary(made: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each way, and how far its figures are from exact ones."""
    exact, rows = (made["ours exact"][0][name] for name in ("scores", "more"))
    plain = statistics.median(run["mb"] for run in made["forward"])
    ways: dict[str, Any] = {}
    for way, done in made.items():
        row = {name: statistics.median(run[name] for run in done) for name in ("seconds", "processor_seconds", "mb")}
        row |= {"over_forward_mb": row["mb"] - plain}
        row |= {f"all_{name}": [run[name] for run in done] for name in ("seconds", "processor_seconds")}
        row |= {name: value for name, value in done[0]["more"].items() if name != "summed"}
        if scores := done[0]["scores"]:
            row["with_exact"] = agreement(scores, exact)
            row["with_exact_summed_over_layers"] = agreement(scores, rows["summed"])
        if way in OURS:
            row["worst_difference"] = float(np.abs(np.subtract(scores, exact)).max())
        if way == "ifr-matrix":
            row["worst_difference_summed_over_layers"] = float(np.abs(np.subtract(scores, rows["summed"])).max())
            row["largest"] = max(rows["summed"])
        ways[way] = row
    return {"prompt_share": sum(exact), "largest_exact_share": max(exact), "ways": ways}


if __name__ == "__main__":
    main()
