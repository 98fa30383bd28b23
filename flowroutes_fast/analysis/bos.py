"""Periods as BOS: positions whose state is left almost untouched between the first and the last layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.corpus.results import Corpus, vectors

FIRST, LAST = 0.15, 0.15  # of the layers at both ends that do not count
LIMIT, MOST = 0.05, 0.8  # of a state's mass, in this share of the layers between
SENTENCE_ENDS = ".。！？!?"


@dataclass
class Untouched:
    """``positions``: those that are left untouched, with their token and place; ``by_token``: per token, how many and which share of them.

    ``first_period``: of the untouched positions that are not the text's first, the share that is its first period; ``expected``: the same
    share if untouched positions were drawn from all positions. ``beginnings``: untouched positions that begin their text, and their share of all
    that do. ``received``: mean influence on later positions, of the untouched and of all.
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

    def __str__(self) -> str:
        if not self.count:
            return f"None of {self.others} positions is left untouched between the first and last layers: heads or FFNs add more than the limit to each."
        inside = (
            f"Of the other {self.count - self.beginnings}, {self.first_period:.0%} are their text's first period (all positions: {self.expected:.0%})."
            if self.count > self.beginnings
            else "There is no other."
        )
        return (
            f"{self.count} of {self.count + self.others} positions are left untouched between the first and last layers; {self.beginnings} of them "
            f"begin their text, which is {self.beginnings_share:.1%} of all beginnings. {inside} They give {self.received[0]:.4f} of importance to each "
            f"later position, an average one {self.received[1]:.4f}. {self.periods_untouched:.1%} of all first periods are untouched."
        )


def untouched(corpus: Corpus, limit: float = LIMIT, most: float = MOST, skip: tuple[float, float] = (FIRST, LAST)) -> Untouched:
    """Positions whose residual connections carry at least ``1 - limit`` in nearly every layer between the first and the last ones.

    The importance of all heads together, and that of the FFN, is at most ``limit`` in the share ``most`` of those layers: not in all, for the
    layers that write and erase a massive activation (in SmolLM2 the 12th FFN) take the whole state of just these positions. ``skip`` is the
    share of layers left out at the bottom and at the top.

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
        float(outliers["first period"].mean()) if len(outliers) else float("nan"), float(inside["first period"].mean()), count, len(table) - count,
        (float(table.loc[table["untouched"], "received"].mean()), float(table["received"].mean())),
        float(table.loc[first, "untouched"].mean()) if first.any() else float("nan"),
        count - len(outliers), float(table.loc[table["position"] == 0, "untouched"].mean()),
    )  # fmt: skip
