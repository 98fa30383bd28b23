"""How many sub-edges of real layers lie above a cut, how wide the normaliser stays, and how many pairs need all their
heads; on the CPU.

python benchmarks/listed.py FILE [--out benchmarks/results/listed.json]      # FILE from
benchmarks/capture_activations.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from flowroutes_fast import reference
from flowroutes_fast.bench.layers import Case, real_cases

CUTS = (1e-3, 6e-4, 4e-4, 3e-4, 2e-4, 1e-4, 3e-5)
FLOOR, TOLERANCE, WELL_ABOVE = 1e-3, 1e-2, 10
THRESHOLDS = (0.01, 0.02, 0.03, 0.04, 0.1)


def counts(case: Case) -> dict[str, Any]:
    """Means over every 13th row from the 200th on; cuts are shares of the true normaliser."""
    a, rows = case.attention.float(), torch.arange(200, case.tokens, 13)
    pattern = reference.attention_pattern(a.query, a.key, scaling=a.scaling)[:, rows]
    whole, base = a.whole[rows], case.others[0, rows]
    upper = reference.sign_flow(pattern, a.value, a.w_o, whole).clamp_min(0)
    near = reference.attention_proximity(pattern, a.value, a.w_o, whole)
    total = base + near.sum((0, 2))
    found: dict[str, Any] = {"rows": len(rows), "share_of_residual": float((base / total).mean())}
    for cut in CUTS:
        above = upper > cut * total[:, None]
        low, rest = base + (near * above).sum((0, 2)), (upper * ~above).sum((0, 2))
        middle = low + rest / 2
        left, known, pair = (upper * ~above).sum(0), (near * above).sum(0), upper.sum(0)
        unclear = (known + left > WELL_ABOVE * FLOOR * total[:, None]) & (left > 2 * TOLERANCE * (known + left))
        for t in THRESHOLDS:
            unclear |= (known <= t * (total + rest)[:, None]) & (known + left > t * total[:, None]) & (left > 0)
        found[f"{cut:g}"] = {
            "listed": float(above.sum((0, 2)).float().mean()),
            "width": float((rest / middle).mean()),
            "rows_within_tolerance": float((rest <= 2 * TOLERANCE * middle).float().mean()),
            "pairs_above_floor": float((pair > FLOOR * total[:, None]).sum(1).float().mean()),
            "pairs_that_need_all_heads": float(unclear.sum(1).float().mean()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "listed.json")
    options = parser.parse_args()
    found = {case.name: counts(case) for case in real_cases(1024, options.activations)}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
