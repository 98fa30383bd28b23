"""Routes against activation patching on the demo model: what both cost, and where they agree.

    python benchmarks/patching.py --examples 16

For IOI and greater-than examples that the model gets right: routes of all examples; patching of every head (all positions) against every
contrastive template; rank correlations and overlaps of the heads they find; and how far two templates agree with one another. Heads are ranked by
their frequency in routes at τ = 0.04 (and other scores of routes), and by |effect| in patching, where effect is the change of the metric
summed over examples over the summed difference of the prompts. Both are measured in one process, after a warm-up of each. Patching runs the
whole model for every patched copy, batched; a version that starts at the patched layer would save about half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.run import conditions
from flowroutes_fast.load import DEMO_NAME
from flowroutes_fast.models.families import blocks_of
from flowroutes_fast.patching import record
from flowroutes_fast.templates import Example

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
    """IOI: the answer is the most probable token. Greater-than: right answers together are more probable than wrong ones."""
    found = []
    for example in examples:
        p = model(**tokenizer(example.prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        right, wrong = ([tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ts] for ts in (example.answers, example.wrong))
        found.append(int(p.argmax()) == right[0] if task == "ioi" else bool(p[right].sum() > p[wrong].sum()))
    return found


def gate(model: Any, tokenizer: Any, example: Example, corrupted: str, table: pd.DataFrame, metric: str) -> float:
    """Largest error of three heads' patches against adding (z' − z) W_O to what W_O gives, over the metric's range."""
    ids, other = (tokenizer(text)["input_ids"] for text in (example.prompt, corrupted))
    right, wrong = ([tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ts] for ts in (example.answers, example.wrong))
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
        wanted = logits[right].mean() - logits[wrong].mean() if metric == "logit_difference" else p[right].sum() - p[wrong].sum()
        worst = max(worst, abs(float(wanted) - row.metric) / max(abs(table.attrs["clean"] - table.attrs["corrupted"]), 0.1))
    return worst


def routes(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[list[Any], dict[str, Any]]:
    start = time.perf_counter()
    for prompt in prompts:
        fr.trace(model, tokenizer, prompt).route(threshold=THRESHOLD)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    traces = fr.trace(model, tokenizer, prompts)
    for trace in traces:
        trace.route(threshold=THRESHOLD)
    together = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        for prompt in prompts:
            model(**tokenizer(prompt, return_tensors="pt"), logits_to_keep=1, use_cache=False)
    forward = time.perf_counter() - start
    return traces, {
        "seconds": alone, "seconds_one_batch": together, "seconds_plain_forward": forward, "forward_passes": len(prompts), "forward_passes_one_batch": 1,
    }  # fmt: skip


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
    return {f"top_{k}": len(set(np.argsort(-a, kind="stable")[:k]) & set(np.argsort(-b, kind="stable")[:k])) for k in TOPS}


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    return {"spearman": spearman(a, b)} | overlaps(a, b)


def effect(tables: list[pd.DataFrame]) -> np.ndarray:
    """Change of the metric over the difference of the prompts, both summed over examples, per head."""
    change = sum(t["change"].to_numpy() for t in tables)
    return change / sum(t.attrs["corrupted"] - t.attrs["clean"] for t in tables)


def run_task(model: Any, tokenizer: Any, task: str, count: int, batch: int, edges: bool) -> dict[str, Any]:
    make, metric = TASKS[task]
    drawn = make(3 * count, 0, tokenizer)
    right = solved(model, tokenizer, drawn, task)
    examples = [e for e, good in zip(drawn, right, strict=True) if good][:count]
    report: dict[str, Any] = {"drawn": len(drawn), "right": sum(right), "examples": len(examples), "metric": metric}
    if len(examples) < count:
        return report | {"refused": "the model gets too few examples right"}

    def patch(e: Example, name: str, **more: Any) -> pd.DataFrame:
        return fr.patching(model, tokenizer, e.prompt, e.contrasts[name], e.answers, e.wrong, metric=metric, batch=batch, **more)

    first, names = examples[0], list(examples[0].contrasts)
    worst = gate(model, tokenizer, first, first.contrasts[names[0]], patch(first, names[0]), metric)
    if not worst <= GATE:
        raise SystemExit(f"patching is wrong by {worst:.1e} of the metric: nothing is reported")
    routes(model, tokenizer, [first.prompt])
    traces, report["routes"] = routes(model, tokenizer, [e.prompt for e in examples])
    report |= {"gate": worst, "tokens": len(traces[0].tokens), "heads": traces[0].heads[:, 0].numel()}
    report["chance_overlap"] = {f"top_{k}": k * k / report["heads"] for k in TOPS}
    mine = scores(traces)
    halves = [scores(part) for part in (traces[::2], traces[1::2])]
    report["routes"]["halves_agree"] = {score: agreement(halves[0][score], halves[1][score]) for score in mine}
    found: dict[str, np.ndarray] = {}
    report["patching"] = {}
    for name in names:
        start = time.perf_counter()
        tables = [patch(e, name) for e in examples]
        seconds = time.perf_counter() - start
        found[name] = effect(tables)
        size, parts = np.abs(found[name]), [np.abs(effect(half)) for half in (tables[::2], tables[1::2])]
        others = [e.contrasts[name] for e in examples]
        start = time.perf_counter()
        contrasted = fr.contrast(traces, fr.trace(model, tokenizer, others), threshold=THRESHOLD, paired=True).sort_values(
            ["layer", "head"]
        )
        both = time.perf_counter() - start
        report["patching"][name] = {
            "seconds": seconds, "forward_passes": sum(t.attrs["forward_passes"] for t in tables), "runs": sum(t.attrs["runs"] for t in tables),
            "times_routes": seconds / report["routes"]["seconds"], "times_routes_one_batch": seconds / report["routes"]["seconds_one_batch"],
            "clean": float(np.mean([t.attrs["clean"] for t in tables])), "corrupted": float(np.mean([t.attrs["corrupted"] for t in tables])),
            "halves_agree": agreement(*parts), "with_routes": {score: agreement(value, size) for score, value in mine.items()},
            "with_contrastive_routes": agreement(contrasted["difference"].abs().to_numpy(), size), "seconds_of_the_contrast": both,
            "top_effects": top(found[name]), "top_differences": [
                [f"L{r.layer}H{r.head}", r.frequency_a, r.frequency_b] for r in contrasted.sort_values("difference", key=abs).iloc[:-11:-1].itertuples()
            ],
        }  # fmt: skip
        print(task, name, json.dumps(report["patching"][name]), flush=True)
    report["templates_agree"] = {
        f"{a} / {b}": {"signed_spearman": spearman(found[a], found[b])} | agreement(np.abs(found[a]), np.abs(found[b]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    report["top_frequencies"] = top(mine["frequency"])
    if edges:
        report["edges"] = edge_agreement(traces[0], patch(first, names[0], what="edges"), names[0])
    return report


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
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    model, tokenizer = fr.load("demo")
    about = conditions("cpu", "cpu") | {"model": DEMO_NAME, "statistic": "one run, warm", "threshold": THRESHOLD}
    report: dict[str, Any] = {"conditions": about, "batch": arguments.batch}
    name = f"patching-{about['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    for task in arguments.tasks.split(","):
        report[task] = run_task(model, tokenizer, task, arguments.examples, arguments.batch, edges=task == "ioi")
        (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
