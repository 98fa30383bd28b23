"""Random routes of lazy traces beside those of full traces, over every family of ``tests/families.py``: do the same
sub-edges come out?

A case is a model, a prompt (or a batch of them), options and a way of keeping states; of each pair of traces many
routes are walked, in any order, with rows evaluated before. Both kinds of trace compare float32 figures with the
threshold, strictly, and neither reports what rounding may turn: a route that differs only at figures within rounding of
its threshold (``NEAR``) is counted apart, any other difference is a fault.

What certified traces know as intervals is compared as such: which of a pair's heads are told apart
(``renormalize=False``) and estimates depend on which rows were refined before, in both kinds of trace. Flows multiply
estimates, so that they are compared where all rows are exact.

OMP_NUM_THREADS=1 python benchmarks/random_routes.py --routes 20000
OMP_NUM_THREADS=1 python benchmarks/random_routes.py --only llama --case 17      # one case again
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions
from flowroutes_fast.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import OPTIONS, VARIANTS, make  # noqa: E402

NAMES = sorted(FAMILIES) + sorted(VARIANTS)
TIERS = ("whole", "inputs", "disk", "cache", "generated")
# what rounding may do to an importance
NEAR = {"whole": 2e-6, "inputs": 2e-5, "disk": 2e-5, "cache": 1e-4, "generated": 2e-5}
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")  # names of the longest prompt in configs
LITTLE = 1000  # bytes: nothing is kept in memory

Edge = tuple[int, str, int, int, int]  # layer, kind, source, target, head


@dataclass
class Counts:
    """What came out for one family."""

    routes: int = 0
    edges: int = 0
    at_threshold: int = 0  # routes that differ at figures within rounding of the threshold alone
    differ: list[str] = field(default_factory=list)
    worst: float = 0.0  # difference of an importance, over what the certificates allow
    tiers: Counter[str] = field(default_factory=Counter)


class Models:
    """The tiny models, made once; ``long``: for prompts of more than 256 tokens, whose rows are bounded rather than
    evaluated whole.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[str, bool], Any] = {}

    def get(self, name: str, long: bool) -> Any:
        if (name, long) not in self.made:
            kind = VARIANTS.get(name, (name, {}))[0]
            more = {option: 512 for option in CONTEXT if option in OPTIONS[kind]} if long else {}
            model = make(name, **more)
            model.generation_config.eos_token_id = None
            self.made[name, long] = model
        return self.made[name, long]


@dataclass
class Case:
    """One draw: everything that decides a pair of traces."""

    name: str
    number: int
    rng: random.Random
    long: bool
    prompts: list[list[int]]
    tier: str
    options: dict[str, Any]

    @classmethod
    def draw(cls, seed: int, name: str, number: int) -> Case:
        rng = random.Random(f"{seed}/{name}/{number}")
        long = rng.random() < 0.06
        batch = 1 if long or rng.random() < 0.75 else rng.randint(2, 4)
        lengths = [
            rng.randint(257, 330) if long else rng.choice((rng.randint(1, 8), rng.randint(1, 60))) for _ in range(batch)
        ]
        prompts = [[rng.randrange(3, 101) for _ in range(n)] for n in lengths]
        tier = rng.choice(TIERS[:3] if batch > 1 else TIERS[:4] if long else TIERS)
        return cls(name, number, rng, long, prompts, tier, _options(rng))

    def __str__(self) -> str:
        return f"{self.name} case {self.number}: {[len(p) for p in self.prompts]} tokens, {self.tier}, {self.options}"


def _options(rng: random.Random) -> dict[str, Any]:
    measure = "signed" if rng.random() < 0.25 else "proximity"
    precision = "exact" if measure == "proximity" and rng.random() < 0.2 else "certified"
    return {
        "measure": measure,
        "precision": precision,
        "bias": rng.choice(["part", "part", "value", "exclude"]),
        "neurons": rng.random() < 0.12,
        "floor": rng.choice([1e-3, 1e-3, 3e-4, 1e-2]),
        "tolerance": rng.choice([1e-2, 1e-2, 1e-3, 0.1]),
        "thresholds": rng.choice([(0.01, 0.03, 0.04), (), (0.02,)]),
        "backend": "reference" if rng.random() < 0.08 else "auto",
    }


# --- the two traces of a case


def traces(case: Case, model: Any) -> list[tuple[str, Any, Any]]:
    """Pairs ``(tier, lazy, full)``; a tier that a model does not offer becomes another."""
    whole = {"dense": False} if case.options["precision"] == "exact" else {}
    if case.tier == "generated" and (found := _generated(case, model)) is not None:
        lazy, ids = found
        return [("generated", lazy, fr.trace(model, None, ids, **case.options, **whole))]
    if case.tier == "cache" and (found := _cached(case, model)) is not None:
        return [("cache", found, fr.trace(model, None, case.prompts[0], **case.options, **whole))]
    text = case.prompts if len(case.prompts) > 1 else case.prompts[0]
    memory: int | None = LITTLE if case.tier == "disk" else None
    if case.tier == "inputs":
        first = fr.trace(model, None, text, lazy=True, **case.options)
        memory = int(sum(t.certificate["state_bytes"] for t in _several(first)) * 0.9)
    lazy = _several(fr.trace(model, None, text, lazy=True, memory=memory, **case.options))
    if case.rng.random() < 0.5:
        full = _several(fr.trace(model, None, text, **case.options, **whole))
    else:
        full = [fr.trace(model, None, ids, **case.options, **whole) for ids in case.prompts]
    return [(str(one.certificate["states"]), one, other) for one, other in zip(lazy, full, strict=True)]


def _several(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _generated(case: Case, model: Any) -> tuple[Any, list[int]] | None:
    """A trace of prompt and generated tokens, and their ids; None where the model's own generate() does not do it."""
    room = 64 - len(case.prompts[0])
    ours = ("measure", "bias", "floor", "tolerance", "backend")
    options = {name: case.options[name] for name in ours} | {"memory": case.rng.choice([None, LITTLE])}
    case.options = case.options | {"precision": "certified", "neurons": False, "thresholds": (0.04,)}
    case.options["floor"] = options["floor"] = min(options["floor"], 0.04)
    running = fr.generate(model, None, case.prompts[0], min(room, case.rng.randint(1, 12)), do_sample=False, **options)
    for _ in running:
        pass
    return running.trace, list(running.trace.token_ids)


def _cached(case: Case, model: Any) -> Any:
    """A lazy trace from the model's own cache; None where that is refused."""
    ids = case.prompts[0]
    with torch.no_grad():
        cache = getattr(model(torch.tensor([ids]), use_cache=True), "past_key_values", None)
    if cache is None:
        return None
    try:
        return fr.trace(model, None, ids, lazy=True, past_key_values=cache, **case.options)
    except ValueError as error:
        if "past_key_values" not in str(error):
            raise
        return None


# --- one route of both


def table(route: Any) -> dict[Edge, float]:
    edges = route.edges
    columns = [edges[name].tolist() for name in ("layer", "kind", "source", "target", "head")]
    return dict(zip(zip(*columns, strict=True), edges["importance"].tolist(), strict=True))


def node(edge: Edge, shapes: list[str]) -> tuple[int, str, int]:
    """The state that an edge enters."""
    layer, kind, _, target, _ = edge
    return layer, "out" if shapes[layer] == "parallel" or kind in ("ffn", "ffn_residual") else "mid", target


def reached(edges: dict[Edge, float], roots: tuple[int, ...], shapes: list[str]) -> set[tuple[int, str, int]]:
    found = {(len(shapes) - 1, "out", root) for root in roots}
    for layer, kind, source, _, _ in edges:
        inner = shapes[layer] != "parallel" and kind in ("ffn", "ffn_residual")
        found.add((layer, "mid", source) if inner else (layer - 1, "out", source))
    return found


def figure(trace: Any, edge: Edge, renormalize: bool) -> tuple[float, float]:
    """What is compared with the threshold for this edge: its least and its largest magnitude."""
    layer, kind, source, target, head = edge
    row = np.array([target])
    trace.reach(layer, row)
    below, above = (float(one[0]) for one in trace.factors(layer, row))
    if kind != "attention":
        value = rest = abs(float(trace.values(kind, layer, row)[0]))
        above = below = 1.0 if kind.startswith("ffn") and trace.shapes[layer] != "parallel" else above
        return value * below, rest * above
    _, key, heads, value = trace.sub_edges(layer, row)
    if renormalize:
        one = abs(float(value[(key == source) & (heads == head)].sum()))
        return one * below, one * above
    value, lumped = value[key == source].astype(np.float64), heads[key == source] < 0
    known = abs(float(value[~lumped].sum()))
    return known * below, (known + float(value[lumped].sum())) * above


def pairs_of(edges: dict[Edge, float]) -> tuple[dict[Edge, float], dict[Edge, float]]:
    """Edges with heads summed; and for each pair how far off its sum may be, because heads of it are known together
    only.
    """
    sums, loose = dict[Edge, float](), dict[Edge, float]()
    for (layer, kind, source, target, head), value in edges.items():
        pair = (layer, kind, source, target, -1)
        sums[pair] = sums.get(pair, 0.0) + value
        loose[pair] = loose.get(pair, 0.0) + (abs(value) if kind == "attention" and head < 0 else 0.0)
    return sums, loose


def compare(counts: Counts, what: str, lazy: Any, full: Any, mine: Any, theirs: Any, near: float) -> None:
    """Count one route, and what differs between a lazy trace's and a full one's."""
    found, wanted = table(mine), table(theirs)
    loose: dict[Edge, float] = {}
    error = 0.0
    if mine.rule == "importance" and not mine.renormalize and mine.measure != "signed":
        (found, one), (wanted, other) = pairs_of(found), pairs_of(wanted)
        loose = {edge: one.get(edge, 0.0) + other.get(edge, 0.0) for edge in one.keys() | other.keys()}
        error = float(full.certificate["worst_error"]) + float(lazy.certificate["worst_error"])
    shapes, flips = full.shapes, set[tuple[int, str, int]]()
    counts.routes, counts.edges = counts.routes + 1, counts.edges + len(wanted)
    if found.keys() != wanted.keys():
        both = reached(found, theirs.positions, shapes) & reached(wanted, theirs.positions, shapes)
        flips = {node(edge, shapes) for edge in found.keys() ^ wanted.keys()}
        for edge in found.keys() ^ wanted.keys():
            if node(edge, shapes) not in both:
                continue  # below another difference
            if mine.rule == "flow":
                off = abs(found.get(edge, wanted.get(edge, 0.0)) - theirs.threshold)
            else:
                intervals = [figure(t, edge, theirs.renormalize) for t in (lazy, full)]
                off = min(max(low - theirs.threshold, theirs.threshold - high, 0.0) for low, high in intervals)
            if not off <= near:
                counts.differ.append(
                    f"{what}: {edge} is {'not ' * (edge not in found)}in the lazy route, {off:.1e} from the threshold"
                )
                return
        counts.at_threshold += 1
    for edge in found.keys() & wanted.keys():
        if node(edge, shapes) in flips or (mine.rule == "flow" and flips):
            continue
        off = abs(found[edge] - wanted[edge]) - loose.get(edge, 0.0) - error * abs(wanted[edge])
        counts.worst = max(counts.worst, off)
        if not off <= near:
            counts.differ.append(f"{what}: {edge} has {found[edge]:.7f}, in the full trace {wanted[edge]:.7f}")
            return


def draw_walk(rng: random.Random, lazy: Any, full: Any) -> tuple[Any, dict[str, Any]]:
    """Root and options of a route."""
    # few keys: evaluated whole
    exact = full.certificate["worst_error"] == 0 and (lazy.tolerance <= 1e-2 or lazy.precision == "exact")
    tokens = len(full.tokens)
    several = rng.random() < 0.15
    root = [rng.randrange(-tokens, tokens) for _ in range(rng.randint(1, 4))] if several else rng.randrange(tokens)
    if exact and rng.random() < 0.15:
        share = {"keep": rng.uniform(0.01, 0.5)} if rng.random() < 0.5 else {"threshold": 10 ** rng.uniform(-3, -0.5)}
        return root, {"rule": "flow", **share}
    threshold = full.floor if rng.random() < 0.1 else 10 ** rng.uniform(math.log10(full.floor), -0.1)
    if rng.random() < 0.15:  # exactly at a figure
        row = np.array([rng.randrange(tokens)])
        layer = rng.randrange(full.n_layers)
        figures = [float(full.values(name, layer, row)[0]) for name in ("ffn", "attention_residual", "mixer")]
        figures += full.sub_edges(layer, row)[3].tolist()
        fitting = [abs(one) for one in figures if full.floor <= abs(one) < 1]
        threshold = rng.choice(fitting) if fitting else threshold
    return root, {"threshold": threshold, "renormalize": rng.random() < 0.5}


def before(rng: random.Random, lazy: Any) -> None:
    """Rows that are evaluated by something else than a route."""
    layer, position = rng.randrange(lazy.n_layers), rng.randrange(len(lazy.tokens))
    what = rng.randrange(6)
    if what == 0:
        lazy.evaluate(layer, position)
    elif what == 1:
        lazy.heads[layer, position:]
    elif what == 2:
        lazy.edges(layer, positions=[position])
    elif what == 3:
        lazy.evaluate(None, sorted({position, rng.randrange(len(lazy.tokens))}))
    elif what == 4:
        lazy.token_attribution(position)


def walk(case: Case, counts: Counts, tier: str, lazy: Any, full: Any, walks: int) -> None:
    rng, near = case.rng, NEAR.get(tier, 2e-5)
    for number in range(walks):
        if rng.random() < 0.05:
            lazy = copy.deepcopy(lazy)
        root, options = draw_walk(rng, lazy, full)
        what = f"{case}, walk {number}: {root}, {options}"
        try:
            if rng.random() < 0.2:
                before(rng, lazy)
            mine, theirs = lazy.route(root, **options), full.route(root, **options)
        except Exception as error:
            counts.routes += 1
            counts.differ.append(f"{what}: {type(error).__name__}: {error}")
            continue
        counts.tiers[tier] += 1
        compare(counts, what, lazy, full, mine, theirs, near)


def arrays(counts: Counts, case: Case, tier: str, lazy: Any, full: Any) -> None:
    """All figures that were evaluated, beside those of the full trace."""
    near = NEAR.get(tier, 2e-5)
    error = float(full.certificate["worst_error"]) + float(lazy.certificate["worst_error"])
    for name in ("heads", "attention_residual", "attention_bias", "mixer", "ffn", "ffn_residual"):
        mine, theirs = lazy._array(name), getattr(full, name)
        known = torch.stack([torch.from_numpy(rows.place >= 0) for rows in lazy.layers])
        off = ((mine - theirs).abs() - 2 * error * theirs.abs())[known].nan_to_num(0)
        if name == "heads" and error:  # sums of what was evaluated and what was not
            off = (
                torch.maximum(lazy._array("heads_low") - full.heads_high, full.heads_low - lazy._array("heads_high"))
            )[known]
        counts.worst = max(counts.worst, float(off.max()) if off.numel() else 0.0)
        if off.numel() and not float(off.max()) <= near:
            counts.differ.append(f"{case}: {name} differs by {float(off.max()):.1e}")
    if case.options["neurons"]:
        for layer in range(full.n_layers):
            known = np.flatnonzero(lazy.layers[layer].place >= 0)
            mine, theirs = lazy._neuron_parts()[layer], full.neurons(layer)
            theirs = theirs[theirs["position"].isin(known)]
            found = {(p, n): v for p, n, v in zip(*mine.index.tolist(), mine.importance.tolist(), strict=True)}
            wanted = {
                (p, n): v
                for p, n, v in zip(*(theirs[c].tolist() for c in ("position", "neuron", "importance")), strict=True)
            }
            edge = {
                key: abs(abs(found.get(key, wanted.get(key, 0))) - full.floor) for key in found.keys() ^ wanted.keys()
            }
            off = max(
                (
                    abs(found[key] - wanted[key]) - 2 * full.tolerance * abs(wanted[key])
                    for key in found.keys() & wanted.keys()
                ),
                default=0.0,
            )
            if off > near or any(v > near + 2 * full.tolerance * full.floor for v in edge.values()):
                counts.differ.append(f"{case}: neurons of layer {layer} differ by {off:.1e}, {len(edge)} at the floor")


def run_case(models: Models, counts: Counts, case: Case, walks: int) -> None:
    try:
        pairs = traces(case, models.get(case.name, case.long))
    except Exception as error:
        if "has no down projection" in str(error):  # this family has no neurons
            case.options["neurons"] = False
            return run_case(models, counts, case, walks)
        counts.differ.append(f"{case}: {type(error).__name__}: {error}")
        return
    for tier, lazy, full in pairs:
        walk(case, counts, tier, lazy, full, max(1, walks // len(pairs)))
        arrays(counts, case, tier, lazy, full)


def family(models: Models, name: str, seed: int, routes: int, walks: int, first: int = 0) -> Counts:
    """Cases of one family until there are so many routes."""
    counts, number = Counts(), first
    while counts.routes < routes:
        run_case(models, counts, Case.draw(seed, name, number), walks)
        number += 1
        if number - first > 10 * routes:
            raise RuntimeError(f"{name}: no case gives routes: {counts.differ[:3]}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routes", type=int, default=20000, help="of all families together")
    parser.add_argument("--walks", type=int, default=24, help="routes of one pair of traces (batches: of all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=NAMES, help="these families (names of tests/families.py)")
    parser.add_argument("--case", type=int, help="this case of each alone; writes nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "random_routes.json")
    arguments = parser.parse_args()
    about = conditions("cpu", "cpu") | {
        "seed": arguments.seed,
        "walks_per_trace": arguments.walks,
        "statistic": "counts",
    }
    rows, start = {}, time.perf_counter()
    for name in arguments.only:
        models = Models()
        if arguments.case is not None:
            counts = Counts()
            run_case(models, counts, Case.draw(arguments.seed, name, arguments.case), arguments.walks)
        else:
            counts = family(
                models, name, arguments.seed, math.ceil(arguments.routes / len(arguments.only)), arguments.walks
            )
        rows[name] = {
            "routes": counts.routes,
            "sub_edges": counts.edges,
            "differ": len(counts.differ),
            "differ_at_rounding_of_the_threshold": counts.at_threshold,
            "worst_importance_difference": counts.worst,
            "kept": dict(sorted(counts.tiers.items())),
        }
        print(
            f"{name:32} {counts.routes:5} routes, {len(counts.differ)} differ, {counts.at_threshold} at rounding of "
            f"the threshold, "
            f"importances within {counts.worst:.1e}",
            flush=True,
        )
        for line in counts.differ[:5]:
            print(f"    {line}", flush=True)
    if arguments.case is not None:
        return
    together = {
        name: sum(row[name] for row in rows.values())
        for name in ("routes", "sub_edges", "differ", "differ_at_rounding_of_the_threshold")
    }
    together["worst_importance_difference"] = max(row["worst_importance_difference"] for row in rows.values())
    kept: Counter[str] = sum((Counter(row["kept"]) for row in rows.values()), Counter())
    about |= {"seconds": time.perf_counter() - start, "load_after": os.getloadavg()[0], "rounding": NEAR}
    found = {"conditions": about, "all": together | {"kept": dict(sorted(kept.items()))}, "families": rows}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(rows)} families: {together}")


if __name__ == "__main__":
    main()
