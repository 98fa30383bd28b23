"""How much of a prediction do the strongest sub-edges carry? Rules against each other, mean and zero ablation, on the
demo model.

    python benchmarks/faithfulness.py --per-kind 30 --fortunes /usr/share/games/fortunes

Prompts of 12 to 40 tokens: facts, indirect objects, years, series, repeated word lists, lines of Python's own library,
the licence's sentences, and fortunes where they are installed. The prediction after the last token is the one
explained. Mean values are taken over other texts.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import textwrap
import time
from pathlib import Path

import pandas as pd
import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions
from flowroutes_fast.experiments import ablation, faithfulness

ROOT = Path(__file__).parent.parent
TITLES = {"mean": "mean ablation", "zero": "zero ablation", "positions": "mean ablation, mean over positions"}
SHORTEST, LONGEST, CUT = 12, 40, 20
NAMES = (
    "Mary",
    "John",
    "Tom",
    "Anna",
    "James",
    "Sarah",
    "Peter",
    "Laura",
    "David",
    "Emma",
    "Paul",
    "Kate",
    "Mark",
    "Lisa",
    "Simon",
    "Alice",
)
PLACES = ("store", "park", "school", "station", "beach", "office", "garden", "library")
THINGS = ("drink", "book", "ball", "ring", "letter", "computer", "kiss", "bag")
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Iran": "Tehran",
    "Ireland": "Dublin",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Kenya": "Nairobi",
}
FACTS = (
    "The Eiffel Tower is one of the most famous buildings in the city of",
    "Water is made of two elements, which are called hydrogen and",
    "The first president of the United States of America was George",
    "The largest planet in our solar system is the gas giant called",
    "William Shakespeare wrote many plays, among them Romeo and",
    "The theory of relativity was published by the physicist Albert",
    "The opposite of hot is cold, and the opposite of day is",
    "A year has twelve months, and a week has seven",
    "The chemical symbol of gold is Au and that of silver is",
    "The Great Wall is a very long wall in the north of",
    "The sun rises in the east every morning and sets in the",
    "The author of the Harry Potter books is the writer J. K.",
    "The Second World War in Europe ended in the year 19",
    "Bees fly from flower to flower and collect nectar to make",
    "The human heart is an organ that pumps the",
    "To be, or not to be, that is the",
    "The first man who walked on the surface of the moon was Neil",
    "The currency that is used in Japan is called the Japanese",
    "The Pacific is the largest ocean in the world, and the second largest is the",
    "Plants take in carbon dioxide from the air and give off",
)
SERIES = (
    "one two three four five six seven eight nine",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday,",
    "January, February, March, April, May, June, July,",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "10, 20, 30, 40, 50, 60,",
    "2, 4, 6, 8, 10, 12,",
    "A B C D E F G H I J K L",
    "first, second, third, fourth, fifth, sixth, seventh,",
    "9, 8, 7, 6, 5, 4, 3,",
    "red blue red blue red blue red blue red blue red",
)
WORDS = (
    "lamp",
    "river",
    "stone",
    "cloud",
    "apple",
    "window",
    "horse",
    "paper",
    "green",
    "music",
    "table",
    "winter",
    "bread",
    "silver",
    "mountain",
    "flower",
    "engine",
    "market",
    "dog",
    "king",
)


def prompts(tokenizer, per_kind: int, fortunes: Path | None) -> list[tuple[str, str]]:
    """(kind, text), at most ``per_kind`` of each kind, always the same ones."""
    draw = random.Random(0)
    kinds: dict[str, list[str]] = {}
    capitals = list(CAPITALS)
    kinds["facts"] = list(FACTS) + [
        f"The capital of {a} is {CAPITALS[a]}, and the capital of {b} is"
        for a, b in zip(capitals[1:] + capitals[:1], capitals, strict=True)
    ]
    kinds["indirect objects"] = []
    for _ in range(100):
        a, b = draw.sample(NAMES, 2)
        kinds["indirect objects"].append(
            f"When {a} and {b} went to the {draw.choice(PLACES)}, {draw.choice((a, b))} gave a {draw.choice(THINGS)} to"
        )
    nouns = ("war", "siege", "dynasty", "expedition", "strike", "project", "voyage", "reign")
    kinds["years"] = [
        f"The {draw.choice(nouns)} lasted from the year {(c := draw.choice((15, 16, 17, 18)))}{draw.randint(11, 88)} "
        f"to the year {c}"
        for _ in range(100)
    ]
    kinds["series"] = list(SERIES)
    kinds["repeated words"] = []
    for _ in range(100):
        words = draw.sample(WORDS, draw.randint(7, 10))
        kinds["repeated words"].append(" ".join([*words, *words[: draw.randint(4, 6)]]))
    source = [line for module in (textwrap, json.decoder, inspect) for line in _statements(inspect.getsource(module))]
    kinds["Python"] = draw.sample(source, len(source))
    licence = re.sub(r"\s+", " ", (ROOT / "LICENSE").read_text())
    kinds["licence"] = _sentences(licence)
    if fortunes is not None:
        files = [
            f
            for f in sorted(fortunes.iterdir())
            if f.name in ("wisdom", "science", "literature", "computers", "people")
        ]
        found = [
            one
            for f in files
            for one in _sentences(re.sub(r"\s+", " ", f.read_text(errors="replace").replace("\n%\n", "\n")))
        ]
        kinds["fortunes"] = draw.sample(found, min(len(found), 200))
    found = []
    for kind, texts in kinds.items():
        fitting = []
        for text in dict.fromkeys(texts):
            ids = tokenizer(text)["input_ids"]
            if kind in ("Python", "licence", "fortunes"):  # anywhere in a sentence
                text = tokenizer.decode(ids[: min(len(ids) - 1, CUT)]).rstrip()
                ids = tokenizer(text)["input_ids"]
            if SHORTEST <= len(ids) <= LONGEST:
                fitting.append(text)
        found += [(kind, text) for text in fitting[:per_kind]]
    return found


def _statements(source: str) -> list[str]:
    return [
        line.strip()
        for line in source.splitlines()
        if 40 < len(line.strip()) < 110 and not line.strip().startswith(("#", '"'))
    ]


def _sentences(text: str) -> list[str]:
    return [s.strip() for s in re.split(r"(?<=[.!?;])\s", text) if 60 < len(s) < 160]


def corpus() -> list[str]:
    """Texts for the mean values, none of them a prompt."""
    import argparse
    import difflib

    found = [
        inspect.getdoc(o) or ""
        for m in (argparse, difflib, random, re, json)
        for o in (m, *vars(m).values())
        if inspect.isclass(o) or o is m
    ]
    found += [inspect.getsource(difflib)[start : start + 500] for start in range(0, 10000, 1000)]
    prose = [s for s in dict.fromkeys(found) if len(s) > 150]
    stories = [
        f"{a} and {b} lived near the {p}. One morning {a} found a {t} there and showed it to {b}, who laughed and "
        f"said that it was a good day."
        for a, b, p, t in zip(NAMES, NAMES[3:] + NAMES[:3], PLACES * 2, THINGS * 2, strict=True)
    ]
    return [s[:600] for s in prose[:24]] + stories


def picture(table: pd.DataFrame, path: Path) -> None:
    import matplotlib.figure as figure

    drawn = figure.Figure(figsize=(11, 7.5), layout="constrained")
    axes = drawn.subplots(2, table["ablation"].nunique(), sharex=True, squeeze=False)
    for column, (kind, part) in enumerate(table.groupby("ablation", sort=False)):
        order = {rule: n for n, rule in enumerate(table["rule"].unique())}
        for row, (name, label) in enumerate(
            (("kept", "answer's probability, kept ÷ full"), ("kl", "KL(full ‖ kept), nats"))
        ):
            ax = axes[row, column]
            for rule, points in part.groupby("rule", sort=False):
                number = order[rule]
                style = {
                    "color": f"C{number % 10}",
                    "ls": "--" if rule in ("attention", "random") else ":" if "route" in rule else "-",
                }
                points = points.sort_values("share")
                ax.plot(points["share"], points[name], marker="o", ms=3, label=rule, **style)
                ax.fill_between(
                    points["share"],
                    points[f"{name}_low"],
                    points[f"{name}_high"],
                    color=f"C{number % 10}",
                    alpha=0.15,
                    lw=0,
                )
            ax.set(xscale="log", ylabel=label, title=TITLES[kind] if row == 0 else "")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            if row:
                ax.set_xlabel("share of the prompt's sub-edges that is kept")
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
    axes[0, -1].legend(
        *axes[0, 0].get_legend_handles_labels(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    drawn.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-kind", type=int, default=30)
    parser.add_argument("--fortunes", type=Path, default=None, help="folder of the fortune program's texts")
    parser.add_argument("--rules", default=",".join(faithfulness.RULES))
    parser.add_argument("--shares", default=",".join(map(str, faithfulness.SHARES)))
    parser.add_argument("--zero-shares", default="0.05,0.2")
    parser.add_argument("--thresholds", default="0.01")
    parser.add_argument(
        "--ablations", default="mean,zero", help="of mean, zero, positions (mean values over positions)"
    )
    parser.add_argument("--name", default="faithfulness")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    fortunes = arguments.fortunes
    if fortunes is None and (installed := Path("/usr/share/games/fortunes")).is_dir():
        fortunes = installed
    started = conditions("cpu", "cpu")
    model, tokenizer = fr.load("demo")
    chosen = prompts(tokenizer, arguments.per_kind, fortunes)
    ids = [tokenizer(text)["input_ids"] for _, text in chosen]
    given = (arguments.shares, arguments.zero_shares, arguments.thresholds)
    shares, zero_shares, thresholds = ([float(x) for x in part.split(",") if x] for part in given)
    tables: list[pd.DataFrame] = []
    seconds: dict[str, float] = {}
    for kind in arguments.ablations.split(","):
        weights = {"mean": "attention", "positions": "positions"}.get(kind)
        means = ablation.value_means(model, tokenizer, corpus(), weights=weights) if weights else None
        left_out = (
            () if means is not None else ("flow centred", "local centred", "gradient")
        )  # zero: nothing to centre by; no better than signed
        rules = [r for r in arguments.rules.split(",") if r and r not in left_out]
        start, done = time.perf_counter(), []

        def step(done: list = done, start: float = start, kind: str = kind) -> None:
            done.append(0)
            if len(done) % 20 == 0:
                print(f"{kind}: {len(done)} of {len(chosen)} prompts, {time.perf_counter() - start:.0f} s", flush=True)

        table = faithfulness.measure(
            model,
            None,
            ids,
            rules=rules,
            shares=shares if means is not None else zero_shares,
            thresholds=thresholds,
            ablation="zero" if means is None else "mean",
            means=means,
            step=step,
        )
        seconds[kind] = time.perf_counter() - start
        tables.append(table.assign(ablation=kind, kind=[chosen[p][0] for p in table["prompt"]]))
        write(pd.concat(tables, ignore_index=True), chosen, started, seconds, arguments.out, arguments.name)


def write(
    table: pd.DataFrame, chosen: list[tuple[str, str]], started: dict, seconds: dict[str, float], out: Path, label: str
) -> None:
    def summed(columns: list[str]) -> pd.DataFrame:
        parts = [
            faithfulness.summary(part).assign(**dict(zip(columns, key, strict=True)))
            for key, part in table.groupby(columns, sort=False)
        ]
        return pd.concat(parts, ignore_index=True)

    curves, by_kind = summed(["ablation"]), summed(["ablation", "kind"])
    print(curves.round(3).to_string(), flush=True)
    once = table.drop_duplicates(["prompt"])
    report = {
        "conditions": started | {"statistic": "mean over prompts, 95 % bootstrap interval"},
        "prompts": {
            "count": len(chosen),
            "tokens": [int(once["tokens"].min()), float(once["tokens"].mean()), int(once["tokens"].max())],
            "full_probability": float(once["full"].mean()),
            "of_kind": pd.Series([k for k, _ in chosen]).value_counts().to_dict(),
        },
        "seconds": seconds,
        "curves": curves.to_dict("records"),
        "by_kind": by_kind[by_kind["size"].isin([0.05, 0.2])].to_dict("records"),
    }
    name = f"{label}-{started['device']}-{torch.get_num_threads()}-cores".replace(" ", "-").lower()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    picture(curves, out / f"{name}.png")


if __name__ == "__main__":
    main()
