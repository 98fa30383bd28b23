"""``corpus()``: many texts through one model, importances out as Parquet files and running sums; a killed run goes
on.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm
from typing_extensions import Unpack

from flowroutes_fast.capture.hooks import unwrap
from flowroutes_fast.corpora.state import (
    FORMAT_VERSION,
    IDENTITY,
    NAME,
    NOT_OF_A_CORPUS,
    STATE,
    SUMS,
    TABLES,
    Progress,
    Settings,
    State,
    differing,
    read_state,
    read_sums,
    software,
    text_of,
    write_sums,
)
from flowroutes_fast.corpora.statistics import Observed, Statistics, follow, observe
from flowroutes_fast.corpora.tables import write_table as _write_table
from flowroutes_fast.corpora.texts import Skipped, Text, read_texts, rereadable
from flowroutes_fast.corpora.words import words
from flowroutes_fast.loading.streaming import stream_of
from flowroutes_fast.models.families import blocks_of, context_length, text_config
from flowroutes_fast.models.identity import config_digest, tokenizer_digest, weights_digest
from flowroutes_fast.system.errors import DamagedFile
from flowroutes_fast.system.files import LOCK, claim, said, write_text
from flowroutes_fast.tracing.options import EvaluationOptions, defaults, names, shown, taken
from flowroutes_fast.tracing.routes import route
from flowroutes_fast.tracing.trace import trace

OVERFLOW = ("truncate", "split")
NO_TOKENS = "no tokens"  # why a text was left out
CHARACTERS = 4  # of a token, about: for the time that is left alone


@dataclass
class Item:
    """One text, or a piece of one, as it is traced."""

    number: int  # of the text in the source
    piece: int
    text: str
    domain: str
    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass
class Window:
    """Texts whose rows are written together, and what reading them changed."""

    number: int
    texts: int  # of all shards
    items: list[Item]
    digest: str  # of all texts up to here
    counts: dict[str, int]  # truncated, dropped, split
    skipped: dict[str, int]  # so far
    expected: int | None = None  # tokens of the whole run, as far as this and earlier windows tell


@shown(NOT_OF_A_CORPUS)
def corpus(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    out: str | os.PathLike[str],
    *,
    threshold: float = 0.04,
    max_tokens: int | None = None,
    overflow: str = "truncate",
    window: int = 256,
    batch_tokens: int = 2048,
    positions: bool | None = None,
    edges: bool = True,
    routes_only: bool = False,
    shard: tuple[int, int] = (0, 1),
    field: str = "text",
    split: str = "file",
    progress: bool = False,
    **options: Unpack[EvaluationOptions],
) -> Any:
    """Trace every text and keep what the paper's corpus experiments need (its section 5).

    Texts are taken a window at a time, sorted by length and traced in padded batches. After each window its rows are
    written and the sums brought up to date, so that the same call after a kill goes on there: no row is lost or
    doubled. It goes on with the very same model, tokenizer, options and texts only, by their content, not their names;
    a finished run is returned as it is.

    Args:
        texts: see :func:`flowroutes_fast.corpora.texts.read_texts`; a mapping of domains to sources keeps statistics
            per domain. What can be read twice (no stream) is read once before, so that other, fewer or more texts than
            the run began with are refused at once; a stream is compared as far as the run is.
        out: a new folder, or that of a run to go on with. One process at a time.
        threshold: importance above which a sub-edge counts as active and a route's edges are kept.
        options: those of :class:`flowroutes_fast.Options`, but for measure, dense, thresholds and
            neurons, which these rows have no use for.
        max_tokens: longest piece that is traced; None for the model's context, at most 1024.
        overflow: a longer text is cut (``"truncate"``) or traced in pieces (``"split"``); both are counted.
        window: texts whose rows are written at a time. batch_tokens: padded tokens of a batch.
        positions: write a row per position with its component vector; None: unless ``routes_only``. edges: write the
            route of every text's last position.
        routes_only: evaluate the rows that these routes reach, and nothing else: the same edges and ``in_routes`` for a
            part of the work. Component vectors, means and all else that is over all positions are not there and refused
            by name.
        shard: ``(i, K)``: the texts with number ≡ i modulo K alone; :func:`open_corpus` puts the folders together.
        field, split: of the texts.
        progress: show a bar with tokens per second and, for texts that can be read twice (no stream), the time that is
            left.

    Returns:
        A :class:`Corpus` on the folder.

    Raises:
        ValueError: no text at all, an unknown option, a folder that holds another run or other files (or has another
            process working in it), texts that are not those of the run. DamagedFile (a ValueError): what the run wrote
            was changed. OSError: a folder that cannot be written to, a full disk.
    """
    if tokenizer is None:
        raise TypeError("a corpus of texts needs a tokenizer")
    model = unwrap(model)
    settings = settings_of(
        model,
        tokenizer,
        threshold=threshold,
        max_tokens=max_tokens,
        overflow=overflow,
        window=window,
        batch_tokens=batch_tokens,
        positions=positions,
        edges=edges,
        routes_only=routes_only,
        shard=shard,
        **options,
    )

    def rows(windows: Iterator[Window], bar: Any) -> Iterator[tuple[Window, list[Row]]]:
        for found in windows:
            yield found, trace_items(model, found.items, settings, bar.update)

    return run(settings, tokenizer, texts, out, rows, field=field, split=split, progress=progress)


def settings_of(model: nn.Module, tokenizer: Any, **options: Any) -> Settings:
    """Settings of a run of ``model``; ``ValueError`` for those that make no sense, before its weights are read."""
    beside = inspect.signature(corpus).parameters
    evaluation = {name: value for name, value in options.items() if name in names() or name not in beside}
    checked = taken(evaluation, "corpus", NOT_OF_A_CORPUS, beside).check()
    options = {name: value for name, value in options.items() if name not in evaluation}
    config = text_config(model)
    context = context_length(config) or 1024
    longest = min(context, 1024) if options["max_tokens"] is None else options["max_tokens"]
    heads = max(int(getattr(config, "num_attention_heads", 1)), 1)
    name = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)  # type: ignore[union-attr]
    chosen = {
        "precision": checked.precision,
        "floor": checked.floor,
        "evaluation": {
            name: value
            for name, value in evaluation.items()
            if name not in ("precision", "floor") and value != defaults()[name]
        },
        "max_tokens": longest,
        "positions": not options["routes_only"] if options["positions"] is None else options["positions"],
    }
    found = Settings(name, (len(blocks_of(model)), heads), **{**options, **chosen, **dict.fromkeys(IDENTITY, "")})
    _check(found, context)
    if found.routes_only and stream_of(model) is not None:
        raise ValueError(
            "routes_only=True needs the weights in memory when rows are evaluated: load the model whole, "
            "or leave it out"
        )
    return replace(
        found, weights=weights_digest(model), config=config_digest(model), tokenizer=tokenizer_digest(tokenizer)
    )


def run(
    settings: Settings,
    tokenizer: Any,
    texts: Any,
    out: str | os.PathLike[str],
    rows: Callable[[Iterator[Window], Any], Iterator[tuple[Window, list[Row]]]],
    *,
    field: str,
    split: str,
    progress: bool,
) -> Any:
    """A run in a folder: windows of texts go to ``rows``, which gives them back traced, in their order."""
    from flowroutes_fast.corpora.results import Corpus

    skipped = Skipped()
    with Folder(out, settings) as folder, _goes_on():
        if rereadable(texts) or folder.progress.finished:
            folder.survey(read_texts(texts, field=field, split=split, skipped=skipped), skipped)
        if folder.progress.finished:
            return Corpus(folder.path)
        skipped = Skipped()
        source = read_texts(texts, field=field, split=split, skipped=skipped)
        start = time.perf_counter()
        with tqdm(
            desc="tokens", unit="tok", unit_scale=True, disable=not progress, initial=folder.progress.tokens
        ) as bar:
            for window, found in rows(_announced(folder.windows(source, tokenizer, skipped), bar), bar):
                folder.progress.seconds += time.perf_counter() - start
                folder.write(window, found)
                start = time.perf_counter()
        if not folder.progress.texts:
            why = ", ".join(f"{count} {reason}" for reason, count in skipped.counts.items())
            raise ValueError("there is no text to trace" + (f" ({why})" if why else ""))
        folder.finish(skipped)
    return Corpus(folder.path)


@contextmanager
def _goes_on() -> Iterator[None]:
    """Say of what the system refused that nothing is lost by it."""
    try:
        yield
    except FileNotFoundError:  # of the texts
        raise
    except OSError as error:
        raise OSError(
            f"{error}; once that is mended, the same call goes on after the last window that was written"
        ) from error


def _announced(windows: Iterator[Window], bar: Any) -> Iterator[Window]:
    """Tell a bar how many tokens to expect, before each window is traced."""
    for window in windows:
        bar.total = window.expected
        bar.refresh()
        yield window


def _check(s: Settings, context: int) -> None:
    if s.overflow not in OVERFLOW:
        raise ValueError(f"unknown overflow {s.overflow!r}: choose 'truncate' or 'split'")
    if not 2 <= s.max_tokens <= context:
        raise ValueError(f"max_tokens must lie between 2 and the model's context of {context}, got {s.max_tokens}")
    for name, value in (("window", s.window), ("batch_tokens", s.batch_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not (len(s.shard) == 2 and 0 <= s.shard[0] < s.shard[1]):
        raise ValueError(f"shard must be (i, K) with 0 <= i < K, got {s.shard}")
    if s.routes_only and s.positions:
        raise ValueError(
            "routes_only=True evaluates what routes reach and has no component vectors of positions: leave out one of "
            "positions and routes_only"
        )
    if not s.floor <= s.threshold < 1:
        raise ValueError(f"threshold must lie in [floor, 1) = [{s.floor}, 1), got {s.threshold}")


def _windows(source: Iterator[Text], size: int) -> Iterator[list[Text]]:
    while group := list(itertools.islice(source, size)):
        yield group


def batches(items: list[Item], batch_tokens: int) -> Iterator[list[Item]]:
    """Texts of similar lengths together, so many that their padded tokens are at most ``batch_tokens`` (or one)."""
    current: list[Item] = []
    for item in sorted(items, key=lambda item: -len(item.ids)):
        if current and len(current[0].ids) * (len(current) + 1) > batch_tokens:
            yield current
            current = []
        current.append(item)
    if current:
        yield current


Row = dict[str, Any]


def trace_items(
    model: nn.Module, items: list[Item], s: Settings, report: Callable[[int], object] = lambda tokens: None
) -> list[Row]:
    """The rows of a window, in the order of its texts; ``report`` hears of every batch's tokens.

    A batch's rows are made while the model runs on the next one.
    """
    rows: dict[tuple[int, int], Row] = {}

    def evaluate(batch: list[Item], found: list[Any]) -> None:
        for item, one in zip(batch, found, strict=True):
            rows[item.number, item.piece] = _evaluate(item, one, s)

    with ThreadPoolExecutor(1) as behind:
        before: Future[None] | None = None
        for batch in batches(items, s.batch_tokens):
            ids = [item.ids for item in batch]
            found = (
                route(model, None, ids, threshold=s.threshold, precision=s.precision, **s.evaluation)
                if s.routes_only
                else trace(
                    model,
                    None,
                    ids,
                    precision=s.precision,
                    floor=s.floor,
                    thresholds=(s.threshold,),
                    dense=False,
                    **s.evaluation,
                )
            )
            if before is not None:
                before.result()  # one batch waits at a time
            before = behind.submit(evaluate, batch, found)
            report(sum(len(item.ids) for item in batch))
        if before is not None:
            before.result()
    return [rows[key] for key in sorted(rows)]


def _evaluate(item: Item, found: Any, s: Settings) -> Row:
    """What a text's trace says; with ``routes_only``, its route."""
    word = words(item.text, item.offsets)
    observed = follow(found, word, s.shape[1]) if s.routes_only else observe(found, word, s.threshold)
    row: Row = {
        "number": item.number,
        "piece": item.piece,
        "domain": item.domain,
        "text": item.text,
        "tokens": len(item.ids),
        "observed": observed,
    }
    if isinstance(observed, Observed):
        row["mean"] = observed.components.mean(0)
    key: dict[str, Any] = {"number": np.int64(item.number), "piece": np.int32(item.piece)}
    if s.edges:
        row["edges"] = observed.edges.assign(**key)
    if s.positions and isinstance(observed, Observed):
        begin, end = np.array(item.offsets, np.int32).reshape(-1, 2).T
        row["positions"] = pd.DataFrame(
            {
                **{name: np.full(len(item.ids), value) for name, value in key.items()},
                "position": np.arange(len(item.ids), dtype=np.int32),
                "token_id": np.array(item.ids, np.int32),
                "begin": begin,
                "end": end,
                "word": word,
                "received": observed.received,
                "components": list(observed.components),
            }
        )
    return row


class Folder:
    """A run's folder: settings, progress, sums and tables. Everything is written under another name and renamed;
    the state comes last.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Settings) -> None:
        self.path, self.settings = Path(path), settings
        self.state = State(json.loads(json.dumps(asdict(settings))))
        self.sums: dict[str, Statistics] = {}
        self.characters: int | None = None  # of all this shard's texts, if they were counted

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def __enter__(self) -> Folder:
        self.lock = claim(self.path)
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.lock.release()

    def _open(self) -> None:
        try:
            names = sorted(os.listdir(self.path))
        except OSError as error:
            raise OSError(f"cannot read folder '{self.path}': {said(error)}") from error
        if STATE in names:
            known = read_state(self.path)
            self._compare(known)
            self.state, self.sums = known, read_sums(self.path, known)
        else:
            others = [
                name for name in names if name != LOCK and not name.startswith(".") and not self._left_behind(name)
            ]
            if others and NAME.fullmatch(others[0]):
                raise DamagedFile(
                    f"'{self.path / STATE}' is missing, and the folder holds windows of a run ({others[0]}): give a "
                    f"new folder"
                )
            if others:
                raise ValueError(f"'{self.path}' holds other files ({others[0]}): give an empty or a new folder")
        for name in filter(self._left_behind, names):
            _remove(self.path / name)

    def _compare(self, known: State) -> None:
        """Is the run in the folder the one that is to go on?"""
        if known.files is None:
            raise ValueError(
                f"the run in '{self.path}' is of version 1, which can be read; this release goes on with version "
                f"{FORMAT_VERSION}: give a new folder"
            )
        if unlike := differing(self.state.settings, known.settings):
            raise ValueError(
                f"'{self.path}' holds another run (differing: {', '.join(unlike)}): give a new folder, or remove "
                f"it to start again"
            )

    def _left_behind(self, name: str) -> bool:
        """Is this a file of a process that was killed: of the window it was at, or the sums of the one before?"""
        found = NAME.fullmatch(name)
        if found is None or name in (self.state.files or {}):
            return False
        done = self.progress.windows
        return int(found[2]) == done if found[1] else int(found[3]) in (done - 1, done, done + 1)

    def survey(self, source: Iterator[Text], skipped: Skipped) -> None:
        """Read all of a source: are its texts those of the run, and how long is what is to come?"""
        texts, self.characters = 0, 0
        for _, group in self._compared(source):
            self.characters += sum(map(self._size, group, itertools.count(texts)))
            texts += len(group)
        self.state.texts = texts
        known = {reason: count for reason, count in self.progress.skipped.items() if reason != NO_TOKENS}
        if self.progress.finished and known != dict(skipped.counts):
            raise ValueError(
                f"the run in '{self.path}' left out {known or 'nothing'}, of these texts "
                f"{dict(skipped.counts) or 'nothing'} is: give a new folder"
            )

    def _compared(self, source: Iterator[Text]) -> Iterator[tuple[int, list[Text]]]:
        """Windows of texts with their numbers, each compared with the run's, as far as those are known."""
        s, digests, found, texts = self.state, self.state.digests, hashlib.sha256(), 0
        for number, group in enumerate(_windows(source, self.settings.window)):
            begin, texts = texts, texts + len(group)
            for text in group:
                found.update(json.dumps([text.domain, text.text]).encode())
            if number == len(digests) and s.texts is None:
                digests.append(found.hexdigest())
            if number == len(digests) or digests[number] != found.hexdigest():
                raise self._other_texts(begin, texts, s.known(number))
            yield number, group
        if texts < (known := s.known(len(digests))):
            raise self._other_texts(texts, texts, known)

    def _other_texts(self, begin: int, end: int, known: int) -> ValueError:
        """Up to ``end``, where the run knows ``known`` texts, those from ``begin`` are not the run's."""
        every = self.progress.texts if self.state.texts is None else self.state.texts
        if end == known:
            said = f"those with numbers {begin} to {end - 1} differ (in words, order or domain)"
        else:
            said = f"it has {every}, here are {'more' if end > known else f'{end} alone'}"
        return ValueError(
            f"the texts are not those of the run in '{self.path}': {said}; a run goes on with the same texts only, "
            f"give a new folder for others"
        )

    def _size(self, text: Text, number: int) -> int:
        """Characters that count: none of other shards' texts, of a text that is cut about as many as are traced."""
        s = self.settings
        if number % s.shard[1] != s.shard[0]:
            return 0
        return min(len(text.text), CHARACTERS * s.max_tokens) if s.overflow == "truncate" else len(text.text)

    def windows(self, source: Iterator[Text], tokenizer: Any, skipped: Skipped) -> Iterator[Window]:
        """What is left to do; texts are compared with those of the run."""
        done, first, seen, tokens = self.progress.windows, 0, 0, self.progress.tokens
        no_tokens = self.progress.skipped.get(NO_TOKENS, 0)
        for number, group in self._compared(source):
            begin, first = first, first + len(group)
            seen += sum(map(self._size, group, itertools.count(begin)))
            if number < done:
                continue
            items, counts = self._itemise(group, begin, tokenizer)
            no_tokens += counts.pop(NO_TOKENS)
            tokens += sum(len(item.ids) for item in items)
            expected = round(tokens / seen * self.characters) if self.characters and seen else None
            left_out = dict(skipped.counts) | ({NO_TOKENS: no_tokens} if no_tokens else {})
            yield Window(number, len(group), items, self.state.digests[number], counts, left_out, expected)

    def _itemise(self, group: list[Text], begin: int, tokenizer: Any) -> tuple[list[Item], dict[str, int]]:
        """This shard's texts as ids, cut or split to ``max_tokens``."""
        s = self.settings
        items: list[Item] = []
        counts = dict.fromkeys(("truncated", "dropped", "split", NO_TOKENS), 0)
        for number, text in enumerate(group, begin):
            if number % s.shard[1] != s.shard[0]:
                continue
            ids, offsets = _tokenised(tokenizer, text.text)
            if not ids:
                counts[NO_TOKENS] += 1
                continue
            parts = [slice(a, a + s.max_tokens) for a in range(0, len(ids), s.max_tokens)]
            if len(parts) > 1 and s.overflow == "truncate":
                counts["truncated"] += 1
                counts["dropped"] += len(ids) - s.max_tokens
                parts = parts[:1]
            elif len(parts) > 1:
                counts["split"] += 1
            items += [Item(number, n, text.text, text.domain, ids[part], offsets[part]) for n, part in enumerate(parts)]
        return items, counts

    def add(self, domain: str, observed: Any) -> None:
        self.sums.setdefault(domain, Statistics(self.settings.shape, routes_only=self.settings.routes_only)).add(
            observed
        )
        self.progress.rows += 1
        self.progress.tokens += observed.tokens

    def write(self, window: Window, rows: list[Row]) -> None:
        """A finished window: its tables, the sums, and last the state that makes them count."""
        for row in rows:  # sums in the texts' order: a run that was cut in two adds up to the same bits
            self.add(row["domain"], row.pop("observed"))
        tables = {"texts": pd.DataFrame([{k: v for k, v in row.items() if k not in TABLES} for row in rows])}
        for name in ("positions", "edges"):
            if rows and getattr(self.settings, name):
                tables[name] = pd.concat([row[name] for row in rows], ignore_index=True)
        p, before = self.progress, f"{SUMS}.{self.progress.windows}"
        files = {name: one for name, one in (self.state.files or {}).items() if name != before}
        for name, table in tables.items():
            if len(table):
                file = f"{name}-{p.windows:06d}.parquet"
                files[file] = _write_table(self.path / file, table)
        for name, count in window.counts.items():
            setattr(p, name, getattr(p, name) + count)
        p.digest, p.skipped = window.digest, window.skipped
        p.windows, p.texts = p.windows + 1, p.texts + window.texts
        if self.sums:
            files[f"{SUMS}.{p.windows}"] = write_sums(self.path / f"{SUMS}.{p.windows}", self.sums)
        self.state.files = files
        self._write_state()
        _remove(self.path / before)

    def finish(self, skipped: Skipped) -> None:
        known = self.progress.skipped
        self.progress.finished, self.state.texts = True, self.progress.texts
        self.progress.skipped = dict(skipped.counts) | {k: v for k, v in known.items() if k == NO_TOKENS}
        self._write_state()

    def _write_state(self) -> None:
        if (here := software()) not in self.state.software[-1:]:
            self.state.software.append(here)
        write_text(self.path / STATE, text_of(self.state))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot remove '{path}': {said(error)}") from error


def _tokenised(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and, for each, the characters it stands for."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, verbose=False)
        return [int(i) for i in found["input_ids"]], [(int(a), int(b)) for a, b in found["offset_mapping"]]
    ids = [int(i) for i in tokenizer(text)["input_ids"]]
    options = {"skip_special_tokens": True}
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        options["clean_up_tokenization_spaces"] = False
    ends = [len(tokenizer.decode(ids[: n + 1], **options)) for n in range(len(ids))]
    return ids, [(a, min(b, len(text))) for a, b in itertools.pairwise([0, *ends])]
