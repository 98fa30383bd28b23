"""What the check of every pass costs: processor time of ``conservation.py`` over the model's own forward pass.

OMP_NUM_THREADS=1 python benchmarks/check.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.run import conditions
from flowroutes_fast.capture import capture
from flowroutes_fast.conservation import Conservation
from flowroutes_fast.load import DEMO_NAME

ROOT = Path(__file__).parent.parent
TOKENS = (16, 64, 256, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "check.json")
    arguments = parser.parse_args()
    model, tokenizer = fr.load("demo")
    ids = tokenizer((ROOT / "LICENSE").read_text())["input_ids"]
    spent = [0.0]
    check, judge = Conservation.__call__, Conservation.judge

    def timed(method: Any) -> Any:
        def call(*args: Any) -> Any:
            if len(args) > 1 and args[1] is not None and args[1].mixed is not None:
                args[1].output_weight()  # read once for the check and the importances
            start = time.thread_time()
            found = method(*args)
            spent[0] += time.thread_time() - start
            return found

        return call

    Conservation.__call__, Conservation.judge = timed(check), timed(judge)  # type: ignore[method-assign]
    rows = []
    for tokens in TOKENS:
        batch = torch.tensor([ids[:tokens]])
        capture(model, batch)
        found = []
        for _ in range(arguments.runs):  # in turns
            start = time.thread_time()
            with torch.no_grad():
                model(input_ids=batch, logits_to_keep=1, use_cache=False)
            forward, spent[0] = time.thread_time() - start, 0.0
            capture(model, batch)
            found.append((spent[0] / forward, forward, spent[0]))
        share, forward, cost = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append({"tokens": tokens, "share": share, "forward_seconds": forward, "check_seconds": cost})
        print(f"{tokens:5} tokens: check {cost * 1e3:.1f} ms of a forward pass of {forward * 1e3:.0f} ms, {share:.1%}")
    about = conditions("cpu", "cpu") | {
        "model": DEMO_NAME,
        "statistic": f"median of {arguments.runs}, processor time of the calling thread",
    }
    arguments.out.write_text(json.dumps({"conditions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
