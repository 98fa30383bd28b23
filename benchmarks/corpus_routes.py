"""A corpus run of routes alone beside a full one: seconds of tracing and evaluating (``Progress.seconds``) at several
lengths of text.

What every run takes once, whatever its size (digests of the model, some 1.5 s here), is left out.

In turns: the plain forward pass over the same batches, ``fr.corpus``, the same without component vectors
(``positions=False``), and ``routes_only=True``; ratios are medians over turns. Texts: the project's own pages, cut to a
number of tokens. Before anything is timed the two runs' edges are compared.

python benchmarks/corpus_routes.py --tokens 64 256 512
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import clock, conditions
from flowroutes_fast.corpora.run import Item, batches

ROOT = Path(__file__).parent.parent
TOKENS = 4096  # of a corpus, about
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, no positions": {"positions": False},
    "routes only": {"routes_only": True},
}


def texts(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """Pieces of the pages with so many tokens each, as text."""
    ids = tokenizer("\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))["input_ids"]
    return [tokenizer.decode(ids[start : start + tokens]) for start in range(0, count * tokens, tokens)]


def forward(model: Any, items: list[Item]) -> None:
    for batch in batches(items, 2048):
        longest = max(len(i.ids) for i in batch)
        ids = torch.tensor([i.ids + i.ids[-1:] * (longest - len(i.ids)) for i in batch])
        mask = torch.tensor([[1] * len(i.ids) + [0] * (longest - len(i.ids)) for i in batch])
        with torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def same_routes(mine: pd.DataFrame, theirs: pd.DataFrame) -> int:
    """How many edges both runs have, which must be the same."""
    keys = [name for name in theirs if name != "importance"]
    assert mine[keys].equals(theirs[keys]), "routes differ from those of the full run"
    assert (mine["importance"] - theirs["importance"]).abs().max() < 1e-4
    return len(theirs)


def measured(model: Any, tokenizer: Any, tokens: int, threshold: float, turns: int) -> dict[str, Any]:
    """One length, everything in turns."""
    chosen = texts(tokenizer, tokens, max(TOKENS // tokens, 4))
    items = [Item(n, 0, text, "", tokenizer(text)["input_ids"], []) for n, text in enumerate(chosen)]

    def run(options: dict[str, Any]) -> tuple[float, pd.DataFrame]:
        with tempfile.TemporaryDirectory() as folder:
            found = fr.corpus(model, tokenizer, chosen, Path(folder) / "run", threshold=threshold, **options)
            return found.progress[0].seconds, found.edges()

    edges = same_routes(run(RUNS["full"])[1], run(RUNS["routes only"])[1])
    forward(model, items)
    times: dict[str, list[float]] = {name: [] for name in ("forward", *RUNS)}
    for _ in range(turns):
        times["forward"].append(clock(lambda: forward(model, items)))
        for name, options in RUNS.items():
            times[name].append(run(options)[0])
    over = {
        f"{a} / {b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        for a, b in (
            ("full", "routes only"),
            ("full, no positions", "routes only"),
            ("full", "forward"),
            ("routes only", "forward"),
        )
    }
    return {
        "tokens_each": tokens,
        "texts": len(items),
        "tokens": sum(len(i.ids) for i in items),
        "threshold": threshold,
        "edges": edges,
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratios": over,
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.04, 0.01])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = fr.load("demo")
    report: dict[str, Any] = {"conditions": conditions("cpu", "cpu"), "corpora": []}
    for tokens in arguments.tokens:
        for threshold in arguments.thresholds:
            found = measured(model, tokenizer, tokens, threshold, arguments.turns)
            report["corpora"].append(found)
            print(tokens, threshold, {name: round(value, 2) for name, value in found["ratios"].items()}, flush=True)
    report["conditions"]["load_average_after"] = os.getloadavg()[0]
    name = f"corpus-routes-{report['conditions']['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    (arguments.out or ROOT / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
