"""Figures of a corpus run, drawn with matplotlib; each is written as PNG and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.analysis.clusters import Clusters
from flowroutes_fast.corpora.statistics import Statistics
from flowroutes_fast.system.files import write_atomically, write_text

COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#555555",
    "#a6761d",
    "#7f3c8d",
    "#999933",
]  # told apart by most eyes


def _new(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'flowroutes_fast[analysis]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, stem: Path) -> str:
    """Write ``stem.png`` and ``stem.svg``; returns the SVG element for a page."""
    write_atomically(stem.with_suffix(".png"), lambda temporary: figure.savefig(temporary, dpi=140))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    write_text(stem.with_suffix(".svg"), drawn)
    return drawn[drawn.index("<svg") :]


def _heat(
    axes: Any, values: np.ndarray, title: str, figure: Any, largest: float | None = None, map_: str = "viridis"
) -> None:
    picture = axes.imshow(
        values, aspect="auto", origin="lower", cmap=map_, vmin=0, vmax=largest, interpolation="nearest"
    )
    axes.set(title=title, xlabel="head", ylabel="layer")
    if values.shape[1] <= 16:
        axes.set_xticks(range(values.shape[1]))
    figure.colorbar(picture, ax=axes)


def components(statistics: Statistics) -> Any:
    """Heads and FFNs by layer (the paper's figure 9): importance, activation, and what heads and FFNs weigh
    together.
    """
    figure = _new(12, 4.6)
    left, middle, right = figure.subplots(1, 3)
    heads, ffn = statistics.heads(), statistics.ffn()
    shape = statistics.shape
    _heat(left, heads["importance"].to_numpy().reshape(shape), "mean importance of heads", figure)
    _heat(middle, heads["active"].to_numpy().reshape(shape), "share of positions where active", figure)
    by_layer = heads.groupby("layer")["importance"].sum()
    right.barh(ffn["layer"] - 0.2, ffn["importance"], 0.4, label="FFN", color=COLOURS[1])
    right.barh(by_layer.index + 0.2, by_layer, 0.4, label="all heads", color=COLOURS[0])
    right.set(title="mean importance by layer", xlabel="importance", ylabel="layer")
    right.legend(frameon=False)
    return figure


def positional(table: pd.DataFrame, shape: tuple[int, int]) -> Any:
    """Share of positions where more than half of a head's influence is on one place; heads with that role are
    framed.
    """
    from matplotlib.patches import Rectangle

    names = ["previous token", "same word", "first token", "same token"]
    figure = _new(12, 3.8)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        values = table[name].to_numpy().reshape(shape)
        _heat(axes, values, "earlier subwords\nof the word" if name == "same word" else name, figure, 1.0)
        framed = table[table["role"] == ("subword merging" if name == "same word" else name)]
        for layer, head in zip(framed["layer"].tolist(), framed["head"].tolist(), strict=True):
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec="#ff3b30", lw=1.5, clip_on=False))
    return figure


def planes(found: Clusters) -> Any:
    """Positions in the plane, coloured by part of speech and by place in the word: principal components, and below
    them the other method.
    """
    points = found.points
    counts = points["tag"].value_counts()
    tags = [t for t in counts.index if counts[t] >= 10][: len(COLOURS)]
    kinds = points.assign(kind=points["subword"].where(~points["digits"], "digits"))
    rows = [("PCA", "pca_x", "pca_y")] + ([] if found.method == "pca" else [(METHODS[found.method], "x", "y")])
    figure = _new(12, 5.2 * len(rows))
    for (left, right), (name, x, y) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _scatter(left, points, "tag", tags, (x, y), f"{name} by part of speech")
        _scatter(right, kinds, "kind", ["whole", "first", "later", "digits"], (x, y), f"{name} by place in the word")
    return figure


METHODS = {"tsne": "t-SNE", "umap": "UMAP"}


def _scatter(
    axes: Any, points: pd.DataFrame, column: str, values: Sequence[str], plane: tuple[str, str], title: str
) -> None:
    for value, colour in zip(values, COLOURS, strict=False):
        chosen = points[points[column] == value]
        axes.scatter(
            chosen[plane[0]], chosen[plane[1]], s=5, color=colour, label=f"{value} ({len(chosen)})", linewidths=0
        )
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))


def domain_figure(means: pd.DataFrame, heads: pd.DataFrame, count: int = 24) -> Any:
    """Importance, with intervals, of the heads that differ most between domains."""
    strongest = heads[heads["specific"]].sort_values("difference", ascending=False)
    names = list(dict.fromkeys(f"L{row.layer}H{row.head}" for row in strongest.itertuples()))[:count]
    if not names:
        strongest = heads.sort_values("difference", ascending=False)
        names = list(dict.fromkeys(f"L{row.layer}H{row.head}" for row in strongest.itertuples()))[: count // 2]
    figure = _new(12, 1.6 + 0.26 * len(names))
    axes = figure.subplots()
    domains = sorted(means["domain"].unique())
    for n, domain in enumerate(domains):
        rows = means[means["domain"] == domain].set_index("component").loc[names]
        y = np.arange(len(names)) + (n - (len(domains) - 1) / 2) * 0.8 / len(domains)
        spread = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
        axes.errorbar(
            rows["mean"], y, xerr=spread, fmt="o", ms=3, lw=1, color=COLOURS[n % len(COLOURS)], label=domain or "(none)"
        )
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", alpha=0.25)
    axes.invert_yaxis()
    axes.set(xlabel="mean importance over texts, 95 % interval")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
