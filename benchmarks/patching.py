"""Routes against activation patching on the demo model: what both cost, and where they agree.

    python benchmarks/patching.py --examples 8

For IOI and greater-than examples that the model gets right: routes of all examples; patching of every head (all
positions) against every contrastive template; rank correlations and overlaps of the heads they find; and how far two
templates agree with one another. Heads are ranked by their frequency in routes at τ = 0.04 (and other scores of
routes), and by |effect| in patching, where effect is the change of the metric summed over examples over the summed
difference of the prompts. Times are medians over examples, in one process, after a warm-up, taken in turns. Patching
runs the whole model for every patched copy, batched; a version that starts at the patched layer would save about half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import clock, conditions
from flowroutes_fast.experiments.patching import record
from flowroutes_fast.experiments.templates import Example
from flowroutes_fast.loading.load import DEMO_NAME
from flowroutes_fast.models.families import blocks_of

ROOT = Path(__file__).parent.parent
THRESHOLD = 0.04
TOPS = (10, 20)
GATE = 1e-3  # of the metric
TASKS: dict[str, tuple[Callable[..., list[Example]], str]] = {
    "ioi": (fr.templates.ioi, "logit_difference"),
    "greater-than": (fr.templates.greater_than, "probability"),
}


@torch.no_grad()
def solved(model: Any, tokenizer: Any, examples: list[Example], task: str) -> list[bool]:
    """IOI: the answer is the most probable token. Greater-than: right answers together are more probable than wrong
    ones.
    """
    found = []
    for example in examples:
        p = model(**tokenizer(example.prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        right, wrong = (
            [tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ts]
            for ts in (example.answers, example.wrong)
        )
        found.append(int(p.argmax()) == right[0] if task == "ioi" else bool(p[right].sum() > p[wrong].sum()))
    return found


def gate(model: Any, tokenizer: Any, example: Example, corrupted: str, table: pd.DataFrame, metric: str) -> float:
    """Largest error of three heads' patches against adding (z' − z) W_O to what W_O gives, over the metric's range."""
    ids, other = (tokenizer(text)["input_ids"] for text in (example.prompt, corrupted))
    right, wrong = (
        [tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ts] for ts in (example.answers, example.wrong)
    )
    worst = 0.0
    for row in table.iloc[[0, len(table) // 2, len(table) - 1]].itertuples():
        a, b = (record(model, x, [row.layer], torch.tensor([len(ids) - 1])) for x in (ids, other))
        block = blocks_of(model)[row.layer]
        added = (b.z[row.layer] - a.z[row.layer])[:, row.head] @ block.w_o(a.z[row.layer].shape[1])[row.head]
        handle = block.output.register_forward_hook(lambda m, args, out, added=added: out + added)  # type: ignore[union-attr]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        handle.remove()
        p = logits.softmax(-1)
        wanted = (
            logits[right].mean() - logits[wrong].mean()
            if metric == "logit_difference"
            else p[right].sum() - p[wrong].sum()
        )
        worst = max(
            worst, abs(float(wanted) - row.metric) / max(abs(table.attrs["clean"] - table.attrs["corrupted"]), 0.1)
        )
    return worst


def scores(traces: list[Any]) -> dict[str, np.ndarray]:
    """One number per head [layer * head], four ways; equal frequencies are ordered by importance."""
    table = fr.head_frequencies(traces, THRESHOLD).sort_values(["layer", "head"])
    n = traces[0].heads.shape[-1]
    flow = np.zeros(len(table))
    for trace in traces:
        edges = trace.route(rule="flow", threshold=1e-4).edges
        edges = edges[(edges["kind"] == "attention") & (edges["head"] >= 0)]
        np.add.at(flow, (edges["layer"] * n + edges["head"]).to_numpy(), edges["importance"].to_numpy())
    return {
        "frequency": (table["frequency"] + 1e-6 * table["importance"]).to_numpy(),
        "importance_in_route": table["importance"].to_numpy(),
        "flow": flow / len(traces),
        "importance_at_last_position": torch.stack([t.heads[:, -1] for t in traces]).mean(0).flatten().numpy(),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank."""
    return float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])


def overlaps(a: np.ndarray, b: np.ndarray) -> dict[str, int]:
    """How many heads are among the k largest of both."""
    return {
        f"top_{k}": len(set(np.argsort(-a, kind="stable")[:k]) & set(np.argsort(-b, kind="stable")[:k])) for k in TOPS
    }


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    return {"spearman": spearman(a, b)} | overlaps(a, b)


def effect(tables: list[pd.DataFrame]) -> np.ndarray:
    """Change of the metric over the difference of the prompts, both summed over examples, per head."""
    change = sum(t["change"].to_numpy() for t in tables)
    return change / sum(t.attrs["corrupted"] - t.attrs["clean"] for t in tables)


def in_turns(
    model: Any, tokenizer: Any, examples: list[Example], patch: Callable[..., pd.DataFrame], task: str
) -> tuple[list[Any], dict[str, list[pd.DataFrame]], dict[str, Any]]:
    """Traces, patching tables by contrast, and seconds; what is compared takes turns, so that it meets the same
    machine.
    """
    prompts, names = [e.prompt for e in examples], list(examples[0].contrasts)
    traces: list[Any] = []

    def alone(prompt: str) -> None:
        fr.trace(model, tokenizer, prompt).route(threshold=THRESHOLD)

    def together() -> None:
        traces[:] = fr.trace(model, tokenizer, prompts)
        for trace in traces:
            trace.route(threshold=THRESHOLD)

    @torch.no_grad()
    def forward(prompt: str) -> None:
        model(**tokenizer(prompt, return_tensors="pt"), logits_to_keep=1, use_cache=False)

    alone(prompts[0])
    together()
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
    times: dict[str, list[float]] = {"route": [], "forward": [], "batch": []}
    for n, example in enumerate(examples):
        for name in names:
            times["route"].append(clock(lambda example=example: alone(example.prompt)))
            times["forward"].append(clock(lambda example=example: forward(example.prompt)))
            tables[name].append(patch(example, name))
        times["batch"].append(clock(together))
        print(task, n + 1, "of", len(examples), flush=True)
    return (
        traces,
        tables,
        {
            "seconds_per_example": float(np.median(times["route"])),
            "seconds_per_example_in_one_batch": float(np.median(times["batch"])) / len(examples),
            "seconds_per_plain_forward": float(np.median(times["forward"])),
            "forward_passes_per_example": 1,
        },
    )


def run_task(model: Any, tokenizer: Any, task: str, count: int, batch: int, edges: bool) -> dict[str, Any]:
    make, metric = TASKS[task]
    drawn = make(3 * count, 0, tokenizer)
    right = solved(model, tokenizer, drawn, task)
    examples = [e for e, good in zip(drawn, right, strict=True) if good][:count]
    report: dict[str, Any] = {"drawn": len(drawn), "right": sum(right), "examples": len(examples), "metric": metric}
    if len(examples) < count:
        return report | {"refused": "the model gets too few examples right"}

    def patch(e: Example, name: str, **more: Any) -> pd.DataFrame:
        return fr.patching(
            model, tokenizer, e.prompt, e.contrasts[name], e.answers, e.wrong, metric=metric, batch=batch, **more
        )

    first, names = examples[0], list(examples[0].contrasts)
    worst = gate(model, tokenizer, first, first.contrasts[names[0]], patch(first, names[0]), metric)
    if not worst <= GATE:
        raise SystemExit(f"patching is wrong by {worst:.1e} of the metric: nothing is reported")
    traces, tables, about = in_turns(model, tokenizer, examples, patch, task)
    report |= {"gate": worst, "tokens": len(traces[0].tokens), "heads": traces[0].heads[:, 0].numel()}
    report["chance_overlap"] = {f"top_{k}": k * k / report["heads"] for k in TOPS}
    report["routes"] = about
    mine = scores(traces)
    halves = [scores(part) for part in (traces[::2], traces[1::2])]
    about["halves_agree"] = {score: agreement(halves[0][score], halves[1][score]) for score in mine}
    report["patching"] = {}
    for name in names:
        others = fr.trace(model, tokenizer, [e.contrasts[name] for e in examples])
        report["patching"][name] = compared(tables[name], traces, others, mine, about)
        print(task, name, json.dumps(report["patching"][name]), flush=True)
    found = {name: effect(tables[name]) for name in names}
    report["templates_agree"] = {
        f"{a} / {b}": {"signed_spearman": spearman(found[a], found[b])} | agreement(np.abs(found[a]), np.abs(found[b]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    report["top_frequencies"] = top(mine["frequency"])
    report["by_head"] = {"frequency": [round(float(x), 3) for x in mine["frequency"]]}
    report["by_head"] |= {f"effect, {name}": [round(float(x), 4) for x in values] for name, values in found.items()}
    if edges:
        report["edges"] = edge_agreement(
            traces[0], patch(first, names[0], what="edges", layers=range(0, len(blocks_of(model)), 3)), names[0]
        )
    return report


def compared(
    tables: list[pd.DataFrame],
    traces: list[Any],
    others: list[Any],
    mine: dict[str, np.ndarray],
    routes: dict[str, Any],
) -> dict[str, Any]:
    """Patching with one template against routes: cost, and agreement."""
    size, halves = np.abs(effect(tables)), [np.abs(effect(half)) for half in (tables[::2], tables[1::2])]
    seconds = float(np.median([t.attrs["seconds"] for t in tables]))
    contrasted = fr.contrast(traces, others, threshold=THRESHOLD, paired=True)
    by_head = contrasted.sort_values(["layer", "head"])["difference"].abs().to_numpy()
    return {
        "seconds_per_example": seconds,
        "forward_passes_per_example": tables[0].attrs["forward_passes"],
        "runs_per_example": tables[0].attrs["runs"],
        "times_routes": seconds / routes["seconds_per_example"],
        "times_routes_in_one_batch": seconds / routes["seconds_per_example_in_one_batch"],
        "clean": float(np.mean([t.attrs["clean"] for t in tables])),
        "corrupted": float(np.mean([t.attrs["corrupted"] for t in tables])),
        "halves_agree": agreement(*halves),
        "with_routes": {score: agreement(value, size) for score, value in mine.items()},
        "with_contrastive_routes": agreement(by_head, size),
        "top_effects": top(effect(tables)),
        "top_differences": [
            [f"L{r.layer}H{r.head}", r.frequency_a, r.frequency_b] for r in contrasted.head(10).itertuples()
        ],
    }


def top(values: np.ndarray, heads: int = 9) -> list[list[Any]]:
    order = np.argsort(-np.abs(values), kind="stable")[:10]
    return [[f"L{i // heads}H{i % heads}", round(float(values[i]), 4)] for i in order]


def edge_agreement(trace: Any, table: pd.DataFrame, name: str) -> dict[str, Any]:
    """Edges into the last position: local importance (0 below the floor) against |effect|."""
    last = len(trace.tokens) - 1
    known = pd.concat([trace.edges(layer).assign(layer=layer) for layer in range(trace.n_layers)])
    known = known[known["query"] == last][["layer", "query", "key", "head", "importance"]]
    both = table.merge(known, how="left", on=["layer", "query", "key", "head"]).fillna({"importance": 0.0})
    found = agreement(both["importance"].to_numpy(), both["effect"].abs().to_numpy())
    size = {
        "edges": len(both),
        "seconds": table.attrs["seconds"],
        "forward_passes": table.attrs["forward_passes"],
        "runs": table.attrs["runs"],
    }
    return {"contrast": name, "examples": 1} | size | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    model, tokenizer = fr.load("demo")
    about = conditions("cpu", "cpu") | {
        "model": DEMO_NAME,
        "statistic": "median over examples, warm, in turns",
        "threshold": THRESHOLD,
    }
    report: dict[str, Any] = {"conditions": about, "batch": arguments.batch}
    name = f"patching-{about['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    for task in arguments.tasks.split(","):
        report[task] = run_task(model, tokenizer, task, arguments.examples, arguments.batch, edges=task == "ioi")
        (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
