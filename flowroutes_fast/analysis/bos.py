"""Periods as BOS: positions whose state is left almost untouched between the first and the last layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.corpora.results import Corpus, vectors

FIRST, LAST = 0.15, 0.15  # of the layers at both ends that do not count
LIMIT, MOST = 0.05, 0.8  # of a state's mass, in this share of the layers between
SENTENCE_ENDS = ".。！？!?"


@dataclass
class Untouched:
    """``positions``: those that are left untouched, with their token and place; ``by_token``: per token, how many and
    which share of them.

    ``first_period``: of the untouched positions that are not the text's first, the share that is its first period;
    ``expected``: the same share if untouched positions were drawn from all positions. ``beginnings``: untouched
    positions that begin their text, and their share of all that do. ``first_periods``: all of them. ``received``: mean
    influence on later positions, of the untouched and of all.
    """

    positions: pd.DataFrame
    by_token: pd.DataFrame
    first_period: float
    expected: float
    count: int
    others: int
    received: tuple[float, float]
    periods_untouched: float
    beginnings: int
    beginnings_share: float
    first_periods: pd.DataFrame

    def __str__(self) -> str:
        if not self.count:
            return (
                f"None of {self.others} positions is left untouched between the first and last layers: heads or "
                f"FFNs add more than the limit to each."
            )
        inside = (
            f"Of the other {self.count - self.beginnings}, {self.first_period:.0%} are their text's first period (all "
            f"positions: {self.expected:.0%})."
            if self.count > self.beginnings
            else "There is no other."
        )
        periods = (
            "There is no first period."
            if np.isnan(self.periods_untouched)
            else f"{self.periods_untouched:.1%} of all first periods are untouched."
        )
        return (
            f"{self.count} of {self.count + self.others} positions are left untouched between the first and last "
            f"layers; {self.beginnings} of them "
            f"begin their text, which is {self.beginnings_share:.1%} of all beginnings. {inside} An untouched "
            f"position gives {self.received[0]:.4f} of "
            f"importance to each later one, summed over layers, an average position {self.received[1]:.4f}. {periods}"
        )


def untouched(
    corpus: Corpus, limit: float = LIMIT, most: float = MOST, skip: tuple[float, float] = (FIRST, LAST)
) -> Untouched:
    """Positions whose residual connections carry at least ``1 - limit`` in nearly every layer between the first and the
    last ones.

    The importance of all heads together, and that of the FFN, is at most ``limit`` in the share ``most`` of those
    layers: not in all, for the layers that write and erase a massive activation (in SmolLM2 the 12th FFN) take the
    whole state of just these positions. ``skip`` is the share of layers left out at the bottom and at the top.

    Raises:
        ValueError: the run kept no positions; no layer is left; a share outside [0, 1].
    """
    layers, heads = corpus.shape
    low, high = int(np.ceil(skip[0] * layers)), layers - int(np.ceil(skip[1] * layers))
    if not 0 <= most <= 1:
        raise ValueError(f"most must lie in [0, 1], got {most}")
    if low >= high:
        raise ValueError(f"no layer is left between the first {low} and the last {layers - high} of {layers}")
    rows: Any = corpus.texts().itertuples()
    texts = {(row.number, row.piece): row.text for row in rows}
    found: list[pd.DataFrame] = []
    columns = ["number", "piece", "position", "begin", "end", "received", "components"]
    for part in corpus.parts("positions", columns):
        components = vectors(part["components"])
        by_head = components[:, : layers * heads].reshape(len(part), layers, heads)
        taken = np.maximum(by_head.sum(2), components[:, layers * heads :])[:, low:high]
        most_layers = np.quantile(taken, most, axis=1, method="higher")
        text = [texts[key] for key in zip(part["number"], part["piece"], strict=True)]
        token = [t[a:b] for t, a, b in zip(text, part["begin"], part["end"], strict=True)]
        found.append(part.drop(columns="components").assign(taken=most_layers, token=token))
    table = pd.concat(found, ignore_index=True)
    table["untouched"] = table["taken"] <= limit
    ends = table["token"].str.strip().isin(list(SENTENCE_ENDS)) & (table["position"] > 0)
    first = ends & ~table[ends].duplicated(["number", "piece"]).reindex(table.index, fill_value=True)
    table["first period"] = first
    inside = table[table["position"] > 0]
    outliers = inside[inside["untouched"]]
    by_token = table.groupby("token").agg(positions=("untouched", "size"), untouched=("untouched", "sum")).reset_index()
    by_token["share"] = by_token["untouched"] / by_token["positions"]
    count = int(table["untouched"].sum())
    return Untouched(
        table[table["untouched"]].drop(columns=["untouched"]).reset_index(drop=True),
        by_token[by_token["untouched"] > 0].sort_values("untouched", ascending=False, ignore_index=True),
        float(outliers["first period"].mean()) if len(outliers) else float("nan"),
        float(inside["first period"].mean()),
        count,
        len(table) - count,
        (float(table.loc[table["untouched"], "received"].mean()), float(table["received"].mean())),
        float(table.loc[first, "untouched"].mean()) if first.any() else float("nan"),
        count - len(outliers),
        float(table.loc[table["position"] == 0, "untouched"].mean()),
        table.loc[first, ["number", "piece", "position", "untouched"]].reset_index(drop=True),
    )


@dataclass
class Attention:
    """``untouched, first_periods, others``: attention weight that a position gets from each later one, mean over those,
    all heads and layers and the positions of a kind (NaN: there are none); ``texts``: how many were run."""

    untouched: float
    first_periods: float
    others: float
    texts: int

    def __str__(self) -> str:
        parts = {
            "untouched positions": self.untouched,
            "first periods": self.first_periods,
            "other positions": self.others,
        }
        said = ", ".join(f"{name} {value:.4f}" for name, value in parts.items() if not np.isnan(value))
        return (
            f"Mean attention weight from each later position, in {self.texts} texts with untouched positions: {said}."
        )


def attention_on(corpus: Corpus, model: Any, found: Untouched, texts: int = 50) -> Attention:
    """The attention that lands on untouched positions, on first periods and on all others, from new forward passes over
    some of the texts.

    Texts are spread evenly over those with an untouched position; the last position, with none after it, does not
    count.

    Raises:
        ValueError: the model is not that of the run.
    """
    from flowroutes_fast.experiments.ablation import clean

    corpus.check_model(model)
    keys = found.positions[["number", "piece"]].drop_duplicates()
    keys = keys.iloc[np.unique(np.linspace(0, len(keys) - 1, min(texts, len(keys))).astype(int))]
    wanted, kinds, names = (
        pd.MultiIndex.from_frame(keys),
        ("untouched", "first_periods", "others"),
        ["number", "piece", "position"],
    )
    special = {
        "untouched": set(found.positions[names].itertuples(index=False, name=None)),
        "first_periods": set(found.first_periods[names].itertuples(index=False, name=None)),
    }
    weights: dict[str, list[float]] = {kind: [] for kind in kinds}
    for part in corpus.parts("positions", [*names, "token_id"]):
        part = part[pd.MultiIndex.from_frame(part[["number", "piece"]]).isin(wanted)]
        for key, rows in part.groupby(["number", "piece"]):
            count = len(rows)
            patterns = [p.float() for p in clean(model, rows["token_id"].tolist()).patterns if p.numel()]
            landed = [(p.sum(1) - p.diagonal(0, 1, 2)).mean(0).cpu().numpy() for p in patterns]  # from other positions
            mean = np.mean(landed, 0)[: count - 1] / np.arange(count - 1, 0, -1)
            for position, weight in enumerate(mean):
                kind = next((k for k, members in special.items() if (*key, position) in members), "others")
                weights[kind].append(float(weight))
    means = {kind: float(np.mean(values)) if values else float("nan") for kind, values in weights.items()}
    return Attention(**means, texts=len(keys))
