"""Do component vectors tell what kind of token stands at a position? PCA, t-SNE, and a silhouette score against
shuffled labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.corpora.results import Corpus, vectors
from flowroutes_fast.corpora.words import later

LEAST_POSITIONS = 50
FUNCTION = {
    "ADP": "function",
    "DET": "function",
    "PRON": "function",
    "CONJ": "function",
    "PRT": "function",
    "AUX": "function",
}
CONTENT = {"NOUN": "content", "VERB": "content", "ADJ": "content", "ADV": "content"}
PENN = {  # Penn treebank -> universal tagset
    "CC": "CONJ",
    "CD": "NUM",
    "DT": "DET",
    "EX": "DET",
    "FW": "X",
    "IN": "ADP",
    "JJ": "ADJ",
    "JJR": "ADJ",
    "JJS": "ADJ",
    "LS": "X",
    "MD": "VERB",
    "NN": "NOUN",
    "NNS": "NOUN",
    "NNP": "NOUN",
    "NNPS": "NOUN",
    "PDT": "DET",
    "POS": "PRT",
    "PRP": "PRON",
    "PRP$": "PRON",
    "RB": "ADV",
    "RBR": "ADV",
    "RBS": "ADV",
    "RP": "PRT",
    "SYM": "X",
    "TO": "PRT",
    "UH": "X",
    "VB": "VERB",
    "VBD": "VERB",
    "VBG": "VERB",
    "VBN": "VERB",
    "VBP": "VERB",
    "VBZ": "VERB",
    "WDT": "DET",
    "WP": "PRON",
    "WP$": "PRON",
    "WRB": "ADV",
}
Tagger = Callable[[str], list[tuple[int, int, str]]]  # a text -> (begin, end, tag) of its words


def textblob_tagger(text: str) -> list[tuple[int, int, str]]:
    """Universal tags of English words by TextBlob's pattern tagger, which carries its lexicon and needs no download."""
    try:
        from textblob.en.taggers import PatternTagger
    except ImportError as error:
        raise ImportError(
            "part-of-speech tags need TextBlob: pip install 'flowroutes_fast[analysis]', or pass your own tagger"
        ) from error
    found, place = [], 0
    for word, tag in PatternTagger().tag(text):
        begin = text.find(word, place)
        if begin >= 0:
            place = begin + len(word)
            found.append((begin, place, PENN.get(tag.split("-")[0], "." if not tag[:1].isalpha() else "X")))
    return found


@dataclass
class Clusters:
    """A sample of positions in the plane, with labels.

    ``points``: ``number, piece, position, token, tag, subword`` (``"whole"``, ``"first"``, ``"later"``), ``digits`` and
    coordinates ``pca_x``, ``pca_y``, ``x``, ``y``. ``scores``: per labelling the silhouette of the component vectors,
    its mean and largest value over shuffled labels, and the number of points. ``variance``: explained by the first
    principal components.
    """

    points: pd.DataFrame
    scores: pd.DataFrame
    variance: np.ndarray
    method: str


def clusters(
    corpus: Corpus,
    tagger: Tagger | None = None,
    *,
    domain: str | None = None,
    sample: int = 3000,
    method: str = "tsne",
    shuffles: int = 20,
    seed: int = 0,
) -> Clusters:
    """Sample positions, project their component vectors, and score how well labels separate them.

    Args:
        tagger: gives ``(begin, end, tag)`` for the words of a text; every subword gets its word's tag. None: English by
            TextBlob.
        domain: take this domain's positions alone. sample: positions. method: ``"tsne"``, ``"umap"`` (needs umap-learn)
            or ``"pca"``.
        shuffles: labels are shuffled so often for comparison.

    Raises:
        ValueError: the run kept no positions, or too few; an unknown method or domain.
    """
    if method not in ("tsne", "umap", "pca"):
        raise ValueError(f"unknown method {method!r}: choose 'tsne', 'umap' or 'pca'")
    try:
        from sklearn.decomposition import PCA
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("clusters need scikit-learn: pip install 'flowroutes_fast[analysis]'") from error
    points, components = _sample(corpus, domain, sample, seed)
    rows: Any = corpus.texts().itertuples()
    texts = {(row.number, row.piece): row.text for row in rows}
    _label(points, texts, textblob_tagger if tagger is None else tagger)
    scaled = StandardScaler().fit_transform(components)
    scaled = scaled[:, components.std(0) > 0]
    pca = PCA(n_components=min(50, *scaled.shape), random_state=seed)
    reduced = pca.fit_transform(scaled)
    points["pca_x"], points["pca_y"] = reduced[:, 0], reduced[:, 1]
    points["x"], points["y"] = _plane(reduced, method, seed).T
    scores = [_score(reduced, points[column], name, shuffles, seed) for name, column in _labellings(points).items()]
    return Clusters(points, pd.DataFrame([s for s in scores if s]), pca.explained_variance_ratio_, method)


def _texts_of(corpus: Corpus, domain: str | None) -> pd.DataFrame:
    if domain is not None and domain not in corpus.domains:
        raise ValueError(f"unknown domain {domain!r}: this run has {', '.join(map(repr, corpus.domains))}")
    texts = corpus.texts()
    return texts if domain is None else texts[texts["domain"] == domain]


def countable(corpus: Corpus, domain: str | None = None) -> int:
    """Positions that can be clustered: the first of a text has nothing before it."""
    texts = _texts_of(corpus, domain)
    return int(texts["tokens"].sum() - len(texts))


def _sample(corpus: Corpus, domain: str | None, sample: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    wanted, total = _texts_of(corpus, domain), countable(corpus, domain)
    if total < LEAST_POSITIONS:
        raise ValueError(f"clusters need at least {LEAST_POSITIONS} positions, there are {total}")
    keys = pd.MultiIndex.from_frame(wanted[["number", "piece"]])
    rng, parts = np.random.default_rng(seed), []
    for part in corpus.parts("positions", ["number", "piece", "position", "begin", "end", "word", "components"]):
        inside = pd.MultiIndex.from_frame(part[["number", "piece"]]).isin(keys)
        goes_on = later(part["word"].to_numpy()) & (part["position"] > 0).to_numpy()
        part["later"], part["starts"] = goes_on, ~goes_on & np.append(goes_on[1:], False)
        part = part[inside & (part["position"] > 0).to_numpy()]
        parts.append(part[rng.random(len(part)) < sample / total])
    table = pd.concat(parts, ignore_index=True)
    return table.drop(columns="components"), vectors(table["components"])


def _label(points: pd.DataFrame, texts: dict[tuple[int, int], str], tagger: Tagger) -> None:
    tags, tokens = [], []
    known: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    rows: Any = points.itertuples()
    for row in rows:
        key = (row.number, row.piece)
        if key not in known:
            known[key] = tagger(texts[key])
        token = texts[key][row.begin : row.end]
        begin = row.begin + len(token) - len(token.lstrip())
        tokens.append(token)
        tags.append(next((tag for a, b, tag in known[key] if a <= begin < b), "."))
    points["token"], points["tag"] = tokens, tags
    points["subword"] = np.where(points["later"], "later", np.where(points["starts"], "first", "whole"))
    points["digits"] = points["token"].str.strip().str.isdigit()
    points["class"] = points["tag"].map(FUNCTION | CONTENT).fillna("other")


def _labellings(points: pd.DataFrame) -> dict[str, str]:
    return {
        "part of speech": "tag",
        "function or content word": "class",
        "first or later subword": "subword",
        "digits": "digits",
    }


def _plane(reduced: np.ndarray, method: str, seed: int) -> np.ndarray:
    if method == "pca":
        return reduced[:, :2]
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise ImportError("method='umap' needs umap-learn: pip install 'flowroutes_fast[umap]'") from error
        return UMAP(n_components=2, random_state=seed).fit_transform(reduced)
    from sklearn.manifold import TSNE

    return TSNE(n_components=2, perplexity=min(30, (len(reduced) - 1) / 3), random_state=seed).fit_transform(reduced)


def _score(reduced: np.ndarray, labels: pd.Series, name: str, shuffles: int, seed: int) -> dict[str, Any] | None:
    """Silhouette of labels with at least 10 points each, against the same labels shuffled."""
    from sklearn.metrics import silhouette_score

    keep = labels.map(labels.value_counts()) >= 10
    if name == "first or later subword":
        keep &= labels != "whole"
    if name == "function or content word":
        keep &= labels != "other"
    chosen, points = labels[keep].to_numpy(), reduced[keep.to_numpy()]
    if len(set(chosen)) < 2:
        return None
    rng = np.random.default_rng(seed)
    shuffled = [silhouette_score(points, rng.permutation(chosen)) for _ in range(shuffles)]
    return {
        "labels": name,
        "silhouette": silhouette_score(points, chosen),
        "shuffled mean": float(np.mean(shuffled)),
        "shuffled largest": float(np.max(shuffled)),
        "points": len(chosen),
        "classes": len(set(chosen)),
    }
