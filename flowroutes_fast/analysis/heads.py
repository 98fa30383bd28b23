"""Heads by where they look: previous-token, subword-merging and other positional heads (section 5 of the paper)."""

from __future__ import annotations

import pandas as pd

from flowroutes_fast.corpora.statistics import PATTERNS, Statistics

SHARE = 0.7  # of positions, the paper's
PLACES = tuple(name for name in PATTERNS if name != "same word")


def positional_heads(statistics: Statistics, share: float = SHARE) -> pd.DataFrame:
    """One row per head: its importance and activation, the share of positions of every pattern, and its ``role``.

    A *positional* head has more than half of its influence on one place (previous token, two or three before, same
    token, first token) in at least ``share`` of the positions. A *subword-merging* head is not a previous-token head;
    more than half of its influence is on earlier subwords of the same word in at least ``share`` of the later subwords,
    and its influence is at most 0.005 in at least ``share`` of the first subwords. ``largest`` says whether it is the
    most important head of its layer. Roles are empty for heads with none.

    Raises:
        ValueError: share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    table = statistics.heads()
    places = table[list(PLACES)].fillna(0.0)
    table["role"] = places.idxmax(axis=1).where(places.max(axis=1) >= share, "")
    merging = (table["same word"] >= share) & (table["quiet"] >= share) & (table["previous token"] < share)
    table.loc[merging, "role"] = "subword merging"
    table["largest"] = table.groupby("layer")["importance"].transform("max") == table["importance"]
    return table
