"""``analyze()``: a corpus run in, a page with figures, their data as CSV, and every finding as a sentence with its
numbers out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowroutes_fast.analysis import figures
from flowroutes_fast.analysis.bos import attention_on, untouched
from flowroutes_fast.analysis.clusters import LEAST_POSITIONS, Tagger, clusters, countable
from flowroutes_fast.analysis.concepts import concepts
from flowroutes_fast.analysis.domains import LEAST_TEXTS, domain_heads, domain_means, domain_overlap
from flowroutes_fast.analysis.heads import positional_heads
from flowroutes_fast.corpora.results import Corpus
from flowroutes_fast.corpora.state import software
from flowroutes_fast.system.files import check_writable, write_text

SHOWN = 400  # rows of a table on the page; its file has all
POINTS = ["number", "piece", "position", "token", "tag", "subword", "digits", "pca_x", "pca_y", "x", "y"]


@dataclass
class Section:
    """One part of a report: sentences, a figure, tables."""

    title: str
    sentences: list[str]
    figure: str = ""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    searchable: bool = False


def analyze(
    corpus: Corpus,
    out: str | os.PathLike[str],
    *,
    model: Any = None,
    tokenizer: Any = None,
    general: str | None = None,
    tagger: Tagger | None = None,
    tagged_domain: str | None = None,
    method: str = "tsne",
    sample: int = 3000,
    permutations: int = 2000,
    limit: float = 0.05,
    seed: int = 0,
) -> Path:
    """Write ``report.html`` with the figures (PNG and SVG) and tables (CSV) beside it.

    Args:
        corpus: a finished run; its parts that were not kept are left out, and the page says so.
        out: a folder. model, tokenizer: for the concepts that heads write; without a model they are left out.
        general: the domain that stands for general text; None for all others together.
        tagger, tagged_domain: for the clusters, see :func:`flowroutes_fast.analysis.clusters`. method, sample:
            likewise.
        permutations: of the domain test. limit: of what an untouched position may take in, see
            :func:`flowroutes_fast.analysis.untouched`.

    Raises:
        ValueError: a run without a text or of routes alone, an unknown domain, a model or tokenizer that is not the
            run's (by content). OSError: a folder that cannot be written to.
    """
    corpus.check_all_rows("means over positions, which a report is about")
    folder = Path(out)
    check_writable(folder)
    statistics = corpus.all_domains()
    if not statistics.texts:
        raise ValueError("this run has no text yet")
    known = model is None or corpus.check_model(model, tokenizer)
    sections = [_components(corpus, folder), _positional(corpus, folder)]
    left_out = []
    if corpus.settings["positions"]:
        if (there := countable(corpus, tagged_domain)) >= LEAST_POSITIONS:
            sections.append(_clusters(corpus, folder, tagger, tagged_domain, method, sample, seed))
        else:
            left_out.append(f"Clusters need {LEAST_POSITIONS} positions, there are {there}: none are shown.")
        sections.append(_bos(corpus, limit, model))
    else:
        left_out.append("The run kept no positions: no clusters, no periods as BOS.")
    specific: pd.DataFrame | None = None
    if len(corpus.domains) > 1:
        section, specific = _domains(corpus, folder, general, permutations, seed)
        sections.append(section)
    if model is not None:
        sections.append(_concepts(model, tokenizer, specific))
    left_out += [] if len(corpus.domains) > 1 else ["The run has one domain: nothing is compared."]
    left_out += [] if model is not None else ["No model was given: no concepts."]
    left_out += (
        []
        if known
        else [
            "The run is of version 1, which noted no digest of its model: whether the model given is "
            "its own is not known."
        ]
    )
    left_out += [] if corpus.finished else ["The run is not finished: these are its texts so far."]
    return write_page(corpus, folder, sections, left_out)


def write_page(corpus: Corpus, folder: Path, sections: list[Section], left_out: list[str]) -> Path:
    """The tables as CSV, and the page."""
    for section in sections:
        for name, table in section.tables.items():
            lists = [c for c in table if len(table) and isinstance(table[c].iloc[0], list)]
            shown = table.assign(**{str(c): table[c].map(" ".join) for c in lists})
            write_text(folder / f"{name}.csv", shown.to_csv(index=False, float_format="%.6g"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True
    )
    page = environment.get_template("report.html.j2").render(
        corpus=corpus,
        statistics=corpus.all_domains(),
        sections=sections,
        left_out=left_out,
        cell=_cell,
        rows=_rows,
        shown=SHOWN,
        tokens=sum(p.tokens for p in corpus.progress),
        truncated=sum(p.truncated for p in corpus.progress),
        skipped=sum(sum(p.skipped.values()) for p in corpus.progress),
        traced_with=[_versions(one) for one in corpus.software],
        written_with=_versions(software()),
    )
    return write_text(folder / "report.html", page)


def _versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _rows(table: pd.DataFrame, whole: bool) -> Any:
    return (table if whole else table.head(SHOWN)).itertuples(index=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return " · ".join(repr(v)[1:-1] for v in value) if isinstance(value, list) else str(value)


def _components(corpus: Corpus, folder: Path) -> Section:
    statistics = corpus.all_domains()
    heads, ffn = statistics.heads(), statistics.ffn()
    layers = corpus.shape[0]
    ends = max(1, layers // 6)
    values = ffn["importance"].to_numpy()
    above, middle = values[1 : max(ends, 2)], values[ends : max(layers - 1, ends + 1)]
    best = heads.sort_values("importance", ascending=False).iloc[0]
    sentences = [
        f"FFN importance: {values[0]:.3f} in layer 0, {_mean(above):.3f} on average in layers 1 to "
        f"{max(ends, 2) - 1}, {_mean(middle):.3f} "
        f"from there to the last but one (at most {middle.max():.3f}, in layer {ends + int(middle.argmax())}), "
        f"{values[-1]:.3f} in the last.",
        f"The head with the largest mean importance is L{best['layer']:.0f}H{best['head']:.0f} "
        f"({best['importance']:.3f}); "
        f"{(heads['active'] > 0.5).sum()} of {len(heads)} heads are active (a sub-edge above "
        f"{corpus.settings['threshold']}) in more than half of the positions, "
        f"{(heads['active'] < 0.01).sum()} in less than one in a hundred.",
    ]
    return Section(
        "Components by layer",
        sentences,
        figures.save(figures.components(statistics), folder / "components"),
        {"heads": heads, "ffn": ffn},
    )


def _positional(corpus: Corpus, folder: Path) -> Section:
    statistics = corpus.all_domains()
    table = positional_heads(statistics)
    counts = table["role"].value_counts()
    sentences = [
        f"Counted in {statistics.after_first} positions (the first of a text left out); subwords of a word in "
        f"{statistics.later} later and "
        f"{statistics.first} first ones."
    ]
    for role in [r for r in counts.index if r]:
        rows = table[table["role"] == role]
        names = ", ".join(f"L{row.layer}H{row.head}" for row in rows.head(12).itertuples()) + (
            ", …" if len(rows) > 12 else ""
        )
        sentences.append(
            f"{len(rows)} {role} head{'s' * (len(rows) > 1)} ({rows['largest'].sum()} of them the most important of "
            f"their layer): {names}."
        )
    near = table.sort_values("same word", ascending=False).iloc[0]
    if not statistics.later:
        sentences.append("No word has several tokens: nothing can be said of subword-merging heads.")
    elif "subword merging" not in counts:
        sentences.append(
            f"No head is a subword-merging head by the paper's criteria. The nearest is "
            f"L{near['layer']:.0f}H{near['head']:.0f}: more than half of its "
            f"influence on earlier subwords in {near['same word']:.0%} of later subwords, quiet in "
            f"{near['quiet']:.0%} of first subwords."
        )
    figure = figures.save(figures.positional(table, corpus.shape), folder / "positional")
    return Section(
        "Heads by where they look",
        sentences,
        figure,
        {"positional": table.sort_values(["role", "layer", "head"], ascending=[False, True, True])},
    )


def _clusters(
    corpus: Corpus, folder: Path, tagger: Tagger | None, domain: str | None, method: str, sample: int, seed: int
) -> Section:
    found = clusters(corpus, tagger, domain=domain, method=method, sample=sample, seed=seed)
    sentences = [
        f"{row['labels']}: silhouette {row['silhouette']:.3f}, with shuffled labels at most "
        f"{row['shuffled largest']:.3f} ({row['points']} positions)."
        for row in found.scores.to_dict("records")
    ]
    where = f" of {domain!r}" if domain else ""
    if tagger is None and domain is None and len(corpus.domains) > 1:
        sentences.append(
            "The tagger knows English, and these positions are of all domains: choose one with tagged_domain "
            "(--tagged-domain)."
        )
    sentences.insert(
        0,
        f"{len(found.points)} positions{where}; the first two principal components explain "
        f"{found.variance[:2].sum():.0%} of the variance.",
    )
    return Section(
        "Clusters of positions",
        sentences,
        figures.save(figures.planes(found), folder / "clusters"),
        {"silhouettes": found.scores, "clusters": found.points[POINTS]},
    )


def _bos(corpus: Corpus, limit: float, model: Any) -> Section:
    found = untouched(corpus, limit)
    sentences = [str(found)]
    if model is not None and found.count:
        sentences.append(str(attention_on(corpus, model, found)))
    return Section("Periods as BOS", sentences, "", {"untouched": found.by_token})


def _domains(
    corpus: Corpus, folder: Path, general: str | None, permutations: int, seed: int
) -> tuple[Section, pd.DataFrame]:
    means = domain_means(corpus, seed=seed)
    heads = domain_heads(corpus, general, permutations=permutations, seed=seed)
    specific = heads[heads["specific"] & (heads["q"] <= 0.05)].sort_values(
        ["domain", "difference"], ascending=[True, False]
    )
    against = f"{general!r}" if general is not None else "all other domains"
    sentences = [f"Compared with {against}; {permutations} permutations of texts, q after Benjamini and Hochberg."]
    for domain in sorted(heads["domain"].unique()):
        rows = specific[specific["domain"] == domain]
        names = ", ".join(f"L{row.layer}H{row.head}" for row in rows.head(8).itertuples()) + (
            ", …" if len(rows) > 8 else ""
        )
        tested = heads.loc[heads["domain"] == domain, "q"].notna().any()
        if tested:
            sentences.append(
                f"{domain or '(none)'}: {len(rows)} specific heads" + (f": {names}." if len(rows) else ".")
            )
        else:
            cut = int(heads.loc[heads["domain"] == domain, "specific"].sum())
            sentences.append(
                f"{domain or '(none)'}: not tested, for a test takes {LEAST_TEXTS} texts on either side; {cut} heads "
                f"pass the paper's cut alone."
            )
    overlap = domain_overlap(heads).reset_index(names="domain")
    figure = figures.save(figures.domain_figure(means, heads), folder / "domains")
    return Section(
        "Domains", sentences, figure, {"domain_heads": specific, "domain_overlap": overlap, "domain_means": means}
    ), specific


def _concepts(model: Any, tokenizer: Any, specific: pd.DataFrame | None) -> Section:
    table = concepts(model, tokenizer, rank=3).table
    of_domains: dict[tuple[int, int], str] = {}
    for row in [] if specific is None else specific.to_dict("records"):
        key = (row["layer"], row["head"])
        of_domains[key] = ", ".join(filter(None, (of_domains.get(key, ""), row["domain"])))
    table.insert(2, "domains", [of_domains.get(key, "") for key in zip(table["layer"], table["head"], strict=True)])
    table = table.sort_values("domains", key=lambda names: names == "", kind="stable", ignore_index=True)
    heads = len(table[["layer", "head"]].drop_duplicates())
    sentences = [
        f"Top tokens of the first three right singular vectors of W_V W_O, both signs, for all {heads} heads; those "
        f"specific to a domain come first."
    ]
    return Section("What heads write", sentences, "", {"concepts": table}, searchable=True)


def _mean(values: Any) -> float:
    return float(values.mean()) if len(values) else float("nan")
