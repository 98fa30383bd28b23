"""Full tables of this tree and of another checkout, in turns: layers of real activations, and whole traces over the
forward pass that computes the last logits alone. Each turn is a process of its own for either; ratios are of medians.

    git worktree add ../before COMMIT
    (cd ../before && FLOWROUTES_CUDA=0 python setup.py build_ext --inplace)
    OMP_NUM_THREADS=2 python benchmarks/before_after.py --against ../before
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions, in_turns, result_path, write_report
from flowroutes_fast.bench.layers import long_prompt, real_cases
from flowroutes_fast.loading.load import cache_folder
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.tracing.importances import _exact
from flowroutes_fast.tracing.options import Options

ROOT = Path(__file__).parent.parent


def layers(tokens: int, runs: int) -> dict[str, float]:
    """Milliseconds of each layer's evaluation, medians."""
    found = {}
    exact = Options(precision="exact").on("cpu")
    for case in real_cases(tokens, cache_folder() / "activations" / "smollm2.safetensors"):
        given = case.attention, case.others
        calls = {
            "certified": lambda given=given: certified(*given, floor=1e-3, thresholds=(0.01, 0.03, 0.04)),
            "signed": lambda given=given: certified(*given, floor=1e-3, measure="signed"),
            "exact": lambda given=given: _exact(*given, exact, None),
        }
        for name, seconds in in_turns(calls, runs, warm=1).medians().items():
            found[f"{case.name}: {name}"] = 1e3 * seconds
    return found


def traces(tokens: int, runs: int) -> dict[str, float]:
    """Seconds of a trace over those of the forward pass in the same turn, medians."""
    model, tokenizer = fr.load("demo")
    ids = long_prompt(tokenizer, tokens)

    def forward() -> None:
        with torch.no_grad():
            model(torch.tensor([ids]), logits_to_keep=1, use_cache=False)

    found = in_turns(
        {
            "forward": forward,
            "certified": lambda: fr.trace(model, None, ids),
            "signed": lambda: fr.trace(model, None, ids, measure="signed"),
            "exact": lambda: fr.trace(model, None, ids, precision="exact", dense=False),
        },
        runs,
        warm=1,
    )
    return {name: found.ratio(name, "forward") for name in ("certified", "signed", "exact")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, built")
    parser.add_argument("--tokens", default="256,512,1024")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lengths = [int(n) for n in arguments.tokens.split(",")]
    if arguments.child:
        print(json.dumps({n: (layers(n, arguments.runs), traces(n, arguments.runs)) for n in lengths}))
        return
    if arguments.against is None:
        parser.error("--against is missing: the checkout to compare with")
    found: dict[str, list[Any]] = defaultdict(list)
    for _ in range(arguments.turns):
        for name, folder in (("before", arguments.against.resolve()), ("after", ROOT)):
            command = [sys.executable, __file__, "--child", "--tokens", arguments.tokens, "--runs", str(arguments.runs)]
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": str(folder)}, stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(done.stdout))
    table: list[dict[str, Any]] = []
    for tokens in map(str, lengths):
        for part, unit in enumerate(("ms", "of the forward pass")):
            for what in found["after"][0][tokens][part]:
                values = {name: [one[tokens][part][what] for one in found[name]] for name in found}
                middle = {name: statistics.median(of) for name, of in values.items()}
                row = {"tokens": int(tokens), "what": what if part == 0 else f"trace, {what}", "unit": unit}
                table.append(row | middle | {"ratio": middle["after"] / middle["before"], "turns": values})
                print(
                    f"{tokens:>5}  {row['what']:34} {middle['before']:7.2f} {middle['after']:7.2f}  {unit}", flush=True
                )
    about = conditions("cpu", "cpu")
    against = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=arguments.against
    ).stdout.strip()
    path = result_path(ROOT / "benchmarks" / "results", "before-after", about)
    write_report(path, about | {"before": against}, rows=table)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
