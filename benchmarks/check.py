"""What the check of every pass costs: processor time of ``capture/conservation.py`` over the model's own forward pass,
natively and in PyTorch.

Reading W_O, which the importances need too, does not count.

OMP_NUM_THREADS=1 python benchmarks/check.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions, write_report
from flowroutes_fast.capture import conservation
from flowroutes_fast.capture.conservation import Conservation
from flowroutes_fast.capture.hooks import capture
from flowroutes_fast.loading.load import DEMO_NAME

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
    native = conservation._native_errors
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
            forward, costs = time.thread_time() - start, []
            for conservation._native_errors in (native, lambda *_: None):
                spent[0] = 0.0
                capture(model, batch)
                costs.append(spent[0])
            found.append((forward, *costs, *(cost / forward for cost in costs)))
        columns = ("forward_seconds", "check_seconds", "check_seconds_pytorch", "share", "share_pytorch")
        row = dict(zip(columns, map(statistics.median, zip(*found, strict=True)), strict=True))
        rows.append({"tokens": tokens, **row})
        print(
            f"{tokens:5} tokens: {row['share']:.1%} of a forward pass of {row['forward_seconds'] * 1e3:.0f} ms; in "
            f"PyTorch {row['share_pytorch']:.1%}"
        )
    about = conditions("cpu", "cpu") | {
        "model": DEMO_NAME,
        "statistic": f"median of {arguments.runs}, processor time of the calling thread",
    }
    write_report(arguments.out, about, rows=rows)


if __name__ == "__main__":
    main()
