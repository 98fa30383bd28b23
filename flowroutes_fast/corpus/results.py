"""A corpus run's folder, or several shards' together, as tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flowroutes_fast.corpus.run import Progress, read_state, read_sums
from flowroutes_fast.corpus.statistics import Statistics


class Corpus:
    """What :func:`flowroutes_fast.corpus` wrote. Tables are read when asked for; sums are there at once.

    Attributes:
        settings: of the (first) run. progress: one :class:`~flowroutes_fast.corpus.run.Progress` per folder.
        statistics: per domain, all shards together.
    """

    def __init__(self, *folders: str | os.PathLike[str]) -> None:
        if not folders:
            raise ValueError("give at least one folder of a corpus run")
        self.folders = [Path(folder) for folder in folders]
        states = [read_state(folder) for folder in self.folders]
        self.settings: dict[str, Any] = states[0][0]
        self.progress: list[Progress] = [progress for _, progress in states]
        for folder, (settings, _) in zip(self.folders[1:], states[1:], strict=True):
            differing = sorted(k for k in settings if k != "shard" and settings[k] != self.settings.get(k))
            if differing:
                raise ValueError(f"'{folder}' is a run of another kind than '{self.folders[0]}' (differing: {', '.join(differing)})")
        shards = [tuple(settings["shard"]) for settings, _ in states]
        if len(set(shards)) != len(shards):
            raise ValueError("the same shard was given twice")
        self.statistics: dict[str, Statistics] = {}
        for folder, (settings, progress) in zip(self.folders, states, strict=True):
            for domain, sums in read_sums(folder, settings["shape"], progress.windows).items():
                if domain in self.statistics:
                    self.statistics[domain].merge(sums)
                else:
                    self.statistics[domain] = sums

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
        whole = Statistics(self.shape)
        for sums in self.statistics.values():
            whole.merge(sums)
        return whole

    def texts(self) -> pd.DataFrame:
        """One row per text (or piece): ``number, piece, domain, text, tokens, mean`` (the mean component vector)."""
        return self._table("texts")

    def positions(self) -> pd.DataFrame:
        """One row per position: ``number, piece, position, token_id, begin, end, word, received, components``."""
        return self._table("positions")

    def edges(self) -> pd.DataFrame:
        """The sub-edges of every text's route: ``number, piece, layer, kind, source, target, head, importance``."""
        return self._table("edges")

    def parts(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pd.DataFrame]:
        """A table a file at a time; ``ValueError`` naming a damaged file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for folder, progress in zip(self.folders, self.progress, strict=True):
            for window in range(progress.windows):
                file = folder / f"{name}-{window:06d}.parquet"
                if not file.is_file():
                    if name == "texts" or self.settings[name]:
                        if self._empty(folder, window):
                            continue
                        raise ValueError(f"'{file}' is missing: the run in '{folder}' wrote it")
                    raise ValueError(f"this run kept no {name}; run it with {name}=True")
                try:
                    yield pq.read_table(file, columns=list(columns) if columns else None).to_pandas()
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"'{file}' is damaged: {error}") from error

    def _empty(self, folder: Path, window: int) -> bool:
        """Had this shard no text in that window?"""
        return not any(folder.glob(f"*-{window:06d}.parquet"))

    def _table(self, name: str) -> pd.DataFrame:
        parts = list(self.parts(name))
        if not parts:
            raise ValueError(f"this run has no {name} yet")
        return pd.concat(parts, ignore_index=True).sort_values(["number", "piece"], kind="stable", ignore_index=True)

    def component_names(self) -> list[str]:
        """Of the component vector's entries: ``L0H0`` … and ``FFN0`` …"""
        layers, heads = self.shape
        return [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)] + [f"FFN{layer}" for layer in range(layers)]

    def __repr__(self) -> str:
        tokens, texts = sum(p.tokens for p in self.progress), sum(p.rows for p in self.progress)
        return f"Corpus({texts} texts, {tokens} tokens, {len(self.statistics)} domains, {self.settings['model']})"


def vectors(column: pd.Series) -> np.ndarray:
    """A column of vectors as one array ``[row, component]``."""
    return np.stack(column.to_list())
