"""A corpus run's folder, or several shards' together, as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.capture.hooks import unwrap
from flowroutes_fast.corpora.state import IDENTITY, TABLES, Progress, State, differing, read_state, read_sums
from flowroutes_fast.corpora.statistics import ROUTES_ONLY, Statistics
from flowroutes_fast.corpora.tables import read_table
from flowroutes_fast.models.identity import config_digest, tokenizer_digest, weights_digest
from flowroutes_fast.system.errors import DamagedFile

ROW, COMPONENT = ["number", "piece"], ["layer", "kind", "head"]


class Corpus:
    """What :func:`flowroutes_fast.corpus` wrote. Tables are read when asked for; sums are there at once.

    Attributes:
        settings: of the (first) run. progress: one :class:`~flowroutes_fast.corpora.run.Progress` per folder.
        statistics: per domain, all shards together.
    """

    def __init__(self, *folders: str | os.PathLike[str]) -> None:
        if not folders:
            raise ValueError("give at least one folder of a corpus run")
        self.folders = [Path(folder) for folder in folders]
        opened = [_opened(folder) for folder in self.folders]
        self.states: list[State] = [state for state, _ in opened]
        self.settings: dict[str, Any] = self.states[0].settings
        self.progress: list[Progress] = [state.progress for state in self.states]
        for folder, state in zip(self.folders[1:], self.states[1:], strict=True):
            self._compare(folder, state)
        if len({state.settings["shard"][0] for state in self.states}) != len(self.states):
            raise ValueError("the same shard was given twice")
        self.statistics: dict[str, Statistics] = {}
        for _, of_folder in opened:
            for domain, sums in of_folder.items():
                if domain in self.statistics:
                    self.statistics[domain].merge(sums)
                else:
                    self.statistics[domain] = sums

    def _compare(self, folder: Path, state: State) -> None:
        """Is a further folder a shard of the first one's run?"""
        first, mine = self.folders[0], self.states[0]
        unlike = [name for name in differing(state.settings, self.settings) if name != "shard"]
        if (count := state.settings["shard"][1]) != self.settings["shard"][1]:
            unlike.append(f"{count} shards and {self.settings['shard'][1]}")
        if (state.files is None) != (mine.files is None):
            unlike.append("version")
        if unlike:
            raise ValueError(f"'{folder}' is a run of another kind than '{first}' (differing: {', '.join(unlike)})")
        common = min(len(state.digests), len(mine.digests))
        whole = None not in (state.texts, mine.texts) and state.texts != mine.texts
        if whole or (
            common
            and state.known(common - 1) == mine.known(common - 1)
            and state.digests[common - 1] != mine.digests[common - 1]
        ):
            raise ValueError(f"'{folder}' is a run over other texts than '{first}'")

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, heads."""
        layers, heads = self.settings["shape"]
        return layers, heads

    @property
    def domains(self) -> list[str]:
        return sorted(self.statistics)

    @property
    def finished(self) -> bool:
        return all(p.finished for p in self.progress)

    def all_domains(self) -> Statistics:
        """The sums over every domain."""
        whole = Statistics(self.shape, routes_only=self.settings["routes_only"])
        for sums in self.statistics.values():
            whole.merge(sums)
        return whole

    def texts(self) -> pd.DataFrame:
        """One row per text (or piece): ``number, piece, domain, text, tokens, mean`` (the mean component vector;
        none with ``routes_only``).
        """
        return self._table("texts")

    def positions(self) -> pd.DataFrame:
        """One row per position: ``number, piece, position, token_id, begin, end, word, received, components``."""
        return self._table("positions")

    def edges(self) -> pd.DataFrame:
        """The sub-edges of every text's route: ``number, piece, layer, kind, source, target, head, importance``."""
        return self._table("edges")

    def frequencies(self, domain: str | None = None) -> pd.DataFrame:
        """In which share of texts (or pieces) the route has a component, from the table of edges.

        Args:
            domain: of this domain's texts alone; None for all.

        Returns:
            One row per component that occurs: ``layer, kind, head`` (-1: none), ``frequency`` in [0, 1],
            ``importance``, its edges in the route summed, averaged over texts, and ``n``, the number of texts.

        Raises:
            ValueError: a run without edges, an unknown domain, no text yet.
        """
        if domain is not None and domain not in self.statistics:
            raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(map(repr, self.domains))}")
        texts = self._table("texts", [*ROW, "domain"])
        texts = texts if domain is None else texts[texts["domain"] == domain]
        edges = self._table("edges", [*COMPONENT, *ROW, "importance"]).merge(texts[ROW], on=ROW)
        of_texts = edges.groupby([*COMPONENT, *ROW])["importance"].sum()
        table = of_texts.groupby(COMPONENT).agg(["count", "sum"]).reset_index()
        return table[COMPONENT].assign(
            frequency=table["count"] / len(texts), importance=table["sum"] / len(texts), n=len(texts)
        )

    def parts(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pd.DataFrame]:
        """A table a file at a time, in the folders' order; :class:`DamagedFile` naming a file that is not as it was
        written.
        """
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}: choose one of {', '.join(map(repr, TABLES))}")
        if name != "texts" and not self.settings[name]:
            if name == "positions":
                self.check_all_rows("component vectors of positions")
            raise ValueError(f"this run kept no {name}; run it with {name}=True")
        if "mean" in (columns or ()):
            self.check_all_rows("means over positions")
        for folder, state in zip(self.folders, self.states, strict=True):
            for window in range(state.progress.windows):
                file = folder / f"{name}-{window:06d}.parquet"
                if file.name in state.files if state.files is not None else not self._empty(folder, window):
                    yield read_table(file, name, state, columns)

    def _empty(self, folder: Path, window: int) -> bool:
        """Had this shard no text in that window? Runs of version 1 do not say it otherwise."""
        return not any(folder.glob(f"*-{window:06d}.parquet"))

    def check_model(self, model: Any, tokenizer: Any = None) -> bool:
        """Is this the model (and the tokenizer) of the run? All its weights are read for that; False: the run, of
        version 1, cannot tell.

        Raises:
            ValueError: it is not, naming what differs.
        """
        if not self.settings["weights"]:
            return False
        model = unwrap(model)
        found = {"weights": weights_digest(model), "config": config_digest(model)}
        if tokenizer is not None:
            found["tokenizer"] = tokenizer_digest(tokenizer)
        differing = [name for name in IDENTITY if name in found and found[name] != self.settings[name]]
        if differing:
            raise ValueError(
                f"the model given is not that of the run in '{self.folders[0]}', {self.settings['model']} (differing: "
                f"{', '.join(differing)})"
            )
        return True

    def check_all_rows(self, what: str) -> None:
        """``ValueError`` naming what is not there, of a run of routes alone."""
        if self.settings["routes_only"]:
            raise ValueError(ROUTES_ONLY.format(what))

    @property
    def software(self) -> list[dict[str, str]]:
        """The versions (of flowroutes_fast, torch, transformers) that worked on the run, each set once."""
        every = [one for state in self.states for one in state.software]
        return [one for n, one in enumerate(every) if one not in every[:n]]

    def _table(self, name: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        parts = list(self.parts(name, columns))
        if not parts:
            raise ValueError(f"this run has no {name} yet")
        return pd.concat(parts, ignore_index=True).sort_values(["number", "piece"], kind="stable", ignore_index=True)

    def component_names(self) -> list[str]:
        """Of the component vector's entries: ``L0H0`` … and ``FFN0`` …"""
        layers, heads = self.shape
        return [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)] + [
            f"FFN{layer}" for layer in range(layers)
        ]

    def __repr__(self) -> str:
        tokens, texts = sum(p.tokens for p in self.progress), sum(p.rows for p in self.progress)
        return f"Corpus({texts} texts, {tokens} tokens, {len(self.statistics)} domains, {self.settings['model']})"


def vectors(column: pd.Series) -> np.ndarray:
    """A column of vectors as one array ``[row, component]``."""
    return np.stack(column.to_list())


def _opened(folder: Path) -> tuple[State, dict[str, Statistics]]:
    """A run's state and sums; again, if a process that goes on with the run wrote new ones in between."""
    while True:
        state = read_state(folder)
        try:
            return state, read_sums(folder, state)
        except DamagedFile:
            if read_state(folder).progress == state.progress:
                raise
