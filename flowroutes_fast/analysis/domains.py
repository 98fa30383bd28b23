"""Domains: what heads and FFNs weigh in each, with intervals; heads that belong to a domain, by the paper's cut and
by a test.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from flowroutes_fast.corpora.results import Corpus, vectors

CUT, GENERAL = 0.015, 0.015  # the paper's: importance in the domain above, in general text below
LEAST_TEXTS = 20


def _per_text(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean component vector of every text (pieces together), its domain, and its tokens."""
    corpus.check_all_rows("means over positions")
    table = corpus.texts()
    means, tokens = vectors(table["mean"]).astype(np.float64), table["tokens"].to_numpy()
    first = ~table["number"].duplicated()
    number = np.cumsum(first.to_numpy()) - 1
    weight = np.bincount(number, tokens)
    summed = np.zeros((number[-1] + 1, means.shape[1]))
    np.add.at(summed, number, means * tokens[:, None])
    return summed / weight[:, None], table.loc[first, "domain"].to_numpy(), weight


def domain_means(corpus: Corpus, draws: int = 1000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Mean importance of every component in every domain, over texts, with a bootstrap interval.

    Columns ``domain, component, mean, low, high, texts``. Texts weigh the same, whatever their lengths.
    """
    means, domains, _ = _per_text(corpus)
    rng, names, rows = np.random.default_rng(seed), corpus.component_names(), []
    for domain in sorted(set(domains)):
        own = means[domains == domain]
        counts = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws)
        low, high = np.quantile(counts @ own / len(own), [(1 - level) / 2, (1 + level) / 2], axis=0)
        rows.append(
            pd.DataFrame(
                {"domain": domain, "component": names, "mean": own.mean(0), "low": low, "high": high, "texts": len(own)}
            )
        )
    return pd.concat(rows, ignore_index=True)


def domain_heads(
    corpus: Corpus,
    general: str | None = None,
    cut: float = CUT,
    low: float = GENERAL,
    permutations: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Heads whose importance in a domain is above ``cut`` while it is at most ``low`` in general text, and how sure
    that is.

    Args:
        general: the domain that stands for general text; None for all other domains together.
        permutations: of texts between the domain and general text. ``p`` is the share of permutations (one-sided, the
            observed one counted) with a difference of means as large; ``q`` is p after Benjamini and Hochberg over all
            heads and domains.

    Returns:
        Columns ``domain, layer, head, importance, elsewhere, difference, p, q, specific`` (above the cut, low
        elsewhere), every head of every domain; domains with fewer than 20 texts have no p.

    Raises:
        ValueError: fewer than two domains, an unknown one.
    """
    from scipy.stats import false_discovery_control

    means, domains, _ = _per_text(corpus)
    layers, heads = corpus.shape
    means = means[:, : layers * heads]
    known = sorted(set(domains))
    if len(known) < 2:
        raise ValueError(f"domains are compared with one another; this run has {known or 'none'}")
    if general is not None and general not in known:
        raise ValueError(f"unknown domain {general!r}: this run has {', '.join(map(repr, known))}")
    rng, rows = np.random.default_rng(seed), []
    for domain in known:
        if domain == general:
            continue
        own, rest = (
            means[domains == domain],
            means[domains == general] if general is not None else means[domains != domain],
        )
        difference = own.mean(0) - rest.mean(0)
        p = np.full(layers * heads, np.nan)
        if min(len(own), len(rest)) >= LEAST_TEXTS:
            p = _permuted(own, rest, difference, permutations, rng)
        rows.append(
            pd.DataFrame(
                {
                    "domain": domain,
                    "layer": np.repeat(np.arange(layers), heads),
                    "head": np.tile(np.arange(heads), layers),
                    "importance": own.mean(0),
                    "elsewhere": rest.mean(0),
                    "difference": difference,
                    "p": p,
                }
            )
        )
    table = pd.concat(rows, ignore_index=True)
    tested = table["p"].notna()
    table["q"] = np.nan
    if tested.any():
        table.loc[tested, "q"] = false_discovery_control(table.loc[tested, "p"].to_numpy())
    table["specific"] = (table["importance"] > cut) & (table["elsewhere"] <= low)
    return table


def _permuted(
    own: np.ndarray, rest: np.ndarray, difference: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    pooled = np.concatenate([own, rest])
    total, n = pooled.sum(0), len(own)
    larger = np.ones(len(difference))
    for start in range(0, permutations, 100):
        count = min(100, permutations - start)
        chosen = np.zeros((count, len(pooled)))
        for row in chosen:
            row[rng.permutation(len(pooled))[:n]] = 1
        sums = chosen @ pooled
        larger += (sums / n - (total - sums) / len(rest) >= difference - 1e-15).sum(0)
    return larger / (permutations + 1)


def domain_overlap(table: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """Shared heads of every two domains: ``|A ∩ B| / |A ∪ B|`` of those that are specific and have q at most
    ``level`` (NaN: neither has any).
    """
    keep = table[table["specific"] & (table["q"] <= level)]
    sets = {domain: set(zip(rows["layer"], rows["head"], strict=True)) for domain, rows in keep.groupby("domain")}
    names = sorted(table["domain"].unique())
    values = [[_jaccard(sets.get(a, set()), sets.get(b, set())) for b in names] for a in names]
    return pd.DataFrame(values, index=names, columns=names)


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else float("nan")
