"""The graph of a whole text as llm-transparency-tool builds it, and with its functions patched: seconds and memory.

    python benchmarks/integrations/llm_transparency_tool.py --tokens 64,100,160

The model has SmolLM2-135M's shape and random weights. The tool is on no package index, so its side is the double of the
tests (its interface and arithmetic in our words), which forms the same ``[query, key, head, d_model]`` tensors and adds
edges one by one. Every side and length runs in a fresh process. Weights must be those of the tool computed in float64
within 3e-4, or nothing is written; the tool's own float32 sums over thousands of clipped parts are further from that
than ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from flowroutes_fast.bench.harness import conditions, in_turns, peak_bytes, write_report

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/integrations/llm_transparency_tool.json"
SHAPE = {"n_layers": 30, "d_model": 576, "n_heads": 9, "n_kv": 3, "d_head": 64, "d_mlp": 1536}
ROUTE, LIMIT = 0.03, 3e-4
SIDES = ("tool", "patched", "float64")


def side(name: str, tokens: int, repeats: int, weights: str) -> dict:
    """Figures of one side, in this process: seconds of the graph and of the routes of all tokens, memory above that
    of the finished run.
    """
    from flowroutes_fast.integrations import llm_transparency_tool as integration

    sys.path.insert(0, str(ROOT / "tests/integrations/transparency_double"))
    lens = importlib.import_module("llm_transparency_tool.models.tlens_model")
    routes = importlib.import_module("llm_transparency_tool.routes.graph")
    model = lens.TransformerLensTransparentLlm(lens.ToyLens(**SHAPE))
    model.run(torch.randint(0, 101, (1, tokens), generator=torch.Generator().manual_seed(0)))
    if name == "float64":
        repeats = 1
        model._last_run.cache = {key: tensor.double() for key, tensor in model._last_run.cache.items()}
        for block in model._model.blocks:
            vars(block.attn).update({key: tensor.double() for key, tensor in vars(block.attn).items()})
    if name == "patched":
        integration.patch()
    before = peak_bytes(reset=True)
    built = in_turns({"graph": lambda: routes.build_full_graph(model)}, repeats)
    peak, graph = peak_bytes() - before, built.found["graph"]
    last = SHAPE["n_layers"]
    walked = in_turns(
        {"routes": lambda: routes.build_paths_to_predictions(graph, last, tokens, range(tokens), ROUTE)}, repeats
    )
    found = walked.found["routes"]
    np.save(weights, np.array([weight for *_, weight in graph.edges(data="weight")]))
    return {
        "graph_seconds": built.medians()["graph"],
        "routes_seconds": walked.medians()["routes"],
        "graph_peak_mb": peak / 2**20,
        "edges": graph.number_of_edges(),
        "route_edges": sum(route.number_of_edges() for route in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="64,100,160", help="lengths of the text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats; the median counts (default: %(default)s)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(side(given.side, int(given.tokens), given.repeats, given.weights)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in map(int, given.tokens.split(",")):
            row: dict = {"tokens": tokens}
            for name in SIDES:
                command = [
                    sys.executable,
                    __file__,
                    "--side",
                    name,
                    "--tokens",
                    str(tokens),
                    "--repeats",
                    str(given.repeats),
                ]
                done = subprocess.run(
                    [*command, "--weights", f"{folder}/{name}.npy"], stdout=subprocess.PIPE, text=True, check=True
                )
                row[name] = json.loads(done.stdout)
            tool, ours, true = (np.load(f"{folder}/{name}.npy") for name in SIDES)
            del row["float64"]
            row["largest_difference"] = {
                "tool, patched": float(abs(tool - ours).max()),
                "tool, tool in float64": float(abs(tool - true).max()),
                "patched, tool in float64": (worst := float(abs(ours - true).max())),
            }
            if worst > LIMIT:
                raise SystemExit(f"{tokens} tokens: the weights differ by {worst:.2g}: nothing is written")
            rows.append(row)
            print(json.dumps(row), flush=True)
    import networkx

    found = conditions("cpu", "cpu") | {
        "networkx": networkx.__version__,
        "shape": SHAPE,
        "repeats": given.repeats,
        "statistic": "median",
    }
    write_report(RESULT, found, rows=rows)


if __name__ == "__main__":
    main()
