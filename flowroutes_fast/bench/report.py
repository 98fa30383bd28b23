"""A benchmark report as tables for the terminal and as plots."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from flowroutes_fast.system.files import write_atomically

KERNELS = ("certified", "bound", "signed", "exact")


def tables(report: dict[str, Any]) -> list[Any]:
    """Rich tables of a report."""
    from rich.table import Table

    found = []
    if report.get("kernels"):
        table = Table(title="kernels, one layer: milliseconds (share of the roofline)")
        for name in ("layer", "tokens", *KERNELS, "plain PyTorch / certified", "… / exact"):
            table.add_column(name, justify="left" if name == "layer" else "right")
        for row in report["kernels"]:
            mine = [f"{row[k]['seconds'] * 1e3:.1f} ({row[k]['roofline']:.0%})" if k in row else "–" for k in KERNELS]
            rivals = {n: r for n, r in row.items() if isinstance(r, dict) and "certified_is_faster" in r}
            cells = [
                "\n".join(f"{n} {r[key]:.0f}×" for n, r in rivals.items() if key in r)
                for key in ("certified_is_faster", "exact_is_faster")
            ]
            table.add_row(row["layer"], str(row["tokens"]), *mine, *cells)
        found.append(table)
    if report.get("end_to_end"):
        table = Table(title="traced pass over the model's own forward (all logits · last logits)")
        for name in ("tokens", "forward, s", "certified", "signed", "exact"):
            table.add_column(name, justify="right")
        for row in report["end_to_end"]:
            ratios = [
                f"{row['ratios'][f'{k} / forward']:.2f} · {row['ratios'][f'{k} / forward, last logits']:.2f}"
                for k in ("certified", "signed", "exact")
            ]
            table.add_row(str(row["tokens"]), f"{row['seconds']['forward']:.2f}", *ratios)
        found.append(table)
    if report.get("import_seconds"):
        table = Table(title="fresh processes, seconds")
        for name in report["import_seconds"]:
            table.add_column(name, justify="right")
        table.add_row(*(f"{seconds:.2f}" for seconds in report["import_seconds"].values()))
        found.append(table)
    if report.get("memory_megabytes"):
        table = Table(title="peak resident memory, MB")
        for name in report["memory_megabytes"][0]:
            table.add_column(name, justify="right")
        for row in report["memory_megabytes"]:
            table.add_row(*(f"{value:.0f}" for value in row.values()))
        found.append(table)
    return found


def plots(report: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what the report holds; returns the PNG files. ``ImportError`` says how to get matplotlib."""
    try:
        import matplotlib.figure as figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flowroutes_fast[bench]'") from error
    written = []
    for name, draw in (("kernels", _kernels), ("end_to_end", _end_to_end)):
        if len({row["tokens"] for row in report.get(name) or []}) > 1:
            picture = figure.Figure(figsize=(7, 4.2), layout="constrained")
            draw(picture.subplots(), report[name])
            path = stem.with_name(f"{stem.name}-{name.replace('_', '-')}.png")
            written.append(write_atomically(path, functools.partial(picture.savefig, dpi=130)))
    return written


def _kernels(axes: Any, rows: list[dict[str, Any]]) -> None:
    layers = {row["layer"] for row in rows}
    layer = next((name for name in sorted(layers) if "layer 8" in name), sorted(layers)[0])
    rows = [row for row in rows if row["layer"] == layer]
    for name in sorted({n for row in rows for n, value in row.items() if isinstance(value, dict)}):
        points = [(row["tokens"], row[name]["seconds"] * 1e3) for row in rows if "seconds" in row.get(name, {})]
        if points:
            mine = name in KERNELS
            axes.plot(*zip(*points, strict=True), marker="o", label=name, lw=2 if mine else 1, ls="-" if mine else "--")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds", title=f"one layer ({layer})")
    _finish(axes, rows)


def _end_to_end(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("certified", "signed", "exact"):
        axes.plot(
            [row["tokens"] for row in rows],
            [row["ratios"][f"{name} / forward"] for row in rows],
            marker="o",
            label=name,
        )
    axes.axhline(1, color="0.6", lw=1)
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="traced pass / plain forward",
        title="cost of a trace (demo model, all logits)",
    )
    axes.set_ylim(bottom=0.9)
    _finish(axes, rows)


def _finish(axes: Any, rows: list[dict[str, Any]]) -> None:
    tokens = sorted({row["tokens"] for row in rows})
    axes.set_xticks(tokens, [str(n) for n in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
