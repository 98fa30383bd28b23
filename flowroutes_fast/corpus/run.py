"""``corpus()``: many texts through one model, importances out as Parquet files and running sums; a killed run goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from flowroutes_fast.capture import unwrap
from flowroutes_fast.corpus.statistics import ARRAYS, COUNTS, Statistics, observe
from flowroutes_fast.corpus.texts import Skipped, Text, read_texts, rereadable
from flowroutes_fast.corpus.words import words
from flowroutes_fast.files import LOCK, claim, write_atomically, write_text
from flowroutes_fast.models.families import blocks_of, context_length, text_config
from flowroutes_fast.trace import trace

FORMAT, FORMAT_VERSION = "flowroutes_fast.corpus", 1
STATE, SUMS = "run.json", "statistics.safetensors"
TABLES = ("texts", "positions", "edges")
OVERFLOW = ("truncate", "split")
NO_TOKENS = "no tokens"  # why a text was left out
CHARACTERS = 4  # of a token, about: for the time that is left alone


@dataclass(frozen=True)
class Settings:
    """What determines a corpus run's rows; a run in a folder goes on under the same settings only."""

    model: str
    shape: tuple[int, int]  # layers, heads
    threshold: float
    precision: str
    floor: float
    max_tokens: int
    overflow: str
    window: int
    batch_tokens: int
    positions: bool
    edges: bool
    shard: tuple[int, int]


@dataclass
class Progress:
    """How far a run is."""

    windows: int = 0  # finished
    texts: int = 0  # read, those of other shards included
    rows: int = 0  # texts of this shard that were traced, pieces of long ones counted each
    tokens: int = 0
    truncated: int = 0  # texts
    dropped: int = 0  # tokens of those
    split: int = 0
    seconds: float = 0.0  # of tracing and evaluating
    digest: str = ""  # of all texts so far
    finished: bool = False
    skipped: dict[str, int] = field(default_factory=dict)


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


def corpus(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    out: str | os.PathLike[str],
    *,
    threshold: float = 0.04,
    precision: str = "certified",
    floor: float = 1e-3,
    max_tokens: int | None = None,
    overflow: str = "truncate",
    window: int = 256,
    batch_tokens: int = 2048,
    positions: bool = True,
    edges: bool = True,
    shard: tuple[int, int] = (0, 1),
    field: str = "text",
    split: str = "file",
    progress: bool = False,
) -> Any:
    """Trace every text and keep what the paper's corpus experiments need (its section 5).

    Texts are taken a window at a time, sorted by length and traced in padded batches. After each window its rows are written and the sums
    brought up to date, so that the same call after a kill goes on there: no row is lost or doubled.

    Args:
        texts: see :func:`flowroutes_fast.corpus.texts.read_texts`; a mapping of domains to sources keeps statistics per domain.
        out: a new folder, or that of a run to go on with. One process at a time.
        threshold: importance above which a sub-edge counts as active and a route's edges are kept.
        precision, floor: as for :func:`flowroutes_fast.trace`.
        max_tokens: longest piece that is traced; None for the model's context, at most 1024.
        overflow: a longer text is cut (``"truncate"``) or traced in pieces (``"split"``); both are counted.
        window: texts whose rows are written at a time. batch_tokens: padded tokens of a batch.
        positions: write a row per position with its component vector. edges: write the route of every text's last position.
        shard: ``(i, K)``: the texts with number ≡ i modulo K alone; :func:`open_corpus` puts the folders together.
        field, split: of the texts.
        progress: show a bar with tokens per second and, for texts that can be read twice (no stream), the time that is left.

    Returns:
        A :class:`Corpus` on the folder.

    Raises:
        ValueError: no text at all, an unknown option, a folder that holds another run or other files, texts that are not those of the
            run so far. OSError: a folder that cannot be written to, a full disk.
    """
    if tokenizer is None:
        raise TypeError("a corpus of texts needs a tokenizer")
    model = unwrap(model)
    settings = settings_of(
        model, threshold=threshold, precision=precision, floor=floor, max_tokens=max_tokens, overflow=overflow, window=window,
        batch_tokens=batch_tokens, positions=positions, edges=edges, shard=shard,
    )  # fmt: skip

    def rows(windows: Iterator[Window], bar: Any) -> Iterator[tuple[Window, list[Row]]]:
        for found in windows:
            yield found, trace_items(model, found.items, settings, bar.update)

    return run(settings, tokenizer, texts, out, rows, field=field, split=split, progress=progress)


def settings_of(model: nn.Module, **options: Any) -> Settings:
    """Settings of a run of ``model``; ``ValueError`` for those that make no sense."""
    config = text_config(model)
    context = context_length(config) or 1024
    longest = min(context, 1024) if options["max_tokens"] is None else options["max_tokens"]
    heads = max(int(getattr(config, "num_attention_heads", 1)), 1)
    name = str(getattr(model.config, "_name_or_path", "") or model.config.model_type)  # type: ignore[union-attr]
    found = Settings(name, (len(blocks_of(model)), heads), **{**options, "max_tokens": longest})
    _check(found, context)
    return found


def run(
    settings: Settings, tokenizer: Any, texts: Any, out: str | os.PathLike[str],
    rows: Callable[[Iterator[Window], Any], Iterator[tuple[Window, list[Row]]]], *, field: str, split: str, progress: bool,
) -> Any:  # fmt: skip
    """A run in a folder: windows of texts go to ``rows``, which gives them back traced, in their order."""
    from flowroutes_fast.corpus.results import Corpus

    skipped = Skipped()
    source = read_texts(texts, field=field, split=split, skipped=skipped)
    with Folder(out, settings) as folder:
        if folder.progress.finished:
            return Corpus(folder.path)
        if progress and rereadable(texts):
            folder.measure(read_texts(texts, field=field, split=split))
        start = time.perf_counter()
        with tqdm(desc="tokens", unit="tok", unit_scale=True, disable=not progress, initial=folder.progress.tokens) as bar:
            for window, found in rows(_announced(folder.windows(source, tokenizer, skipped), bar), bar):
                folder.progress.seconds += time.perf_counter() - start
                try:
                    folder.write(window, found)
                except OSError as error:
                    raise OSError(f"{error}; once that is mended, the same call goes on after the last window that was written") from error
                start = time.perf_counter()
        if not folder.progress.texts:
            why = ", ".join(f"{count} {reason}" for reason, count in skipped.counts.items())
            raise ValueError("there is no text to trace" + (f" ({why})" if why else ""))
        folder.finish(skipped)
    return Corpus(folder.path)


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


def trace_items(model: nn.Module, items: list[Item], s: Settings, report: Callable[[int], object] = lambda tokens: None) -> list[Row]:
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
            found = trace(
                model, None, [item.ids for item in batch], precision=s.precision, floor=s.floor, thresholds=(s.threshold,), dense=False
            )
            if before is not None:
                before.result()  # one batch waits at a time
            before = behind.submit(evaluate, batch, found)
            report(sum(len(item.ids) for item in batch))
        if before is not None:
            before.result()
    return [rows[key] for key in sorted(rows)]


def _evaluate(item: Item, found: Any, s: Settings) -> Row:
    word = words(item.text, item.offsets)
    observed = observe(found, word, s.threshold)
    row: Row = {
        "number": item.number, "piece": item.piece, "domain": item.domain, "text": item.text, "tokens": len(item.ids),
        "mean": observed.components.mean(0), "observed": observed,
    }  # fmt: skip
    key: dict[str, Any] = {"number": np.int64(item.number), "piece": np.int32(item.piece)}
    if s.edges:
        row["edges"] = observed.edges.assign(**key)
    if s.positions:
        begin, end = np.array(item.offsets, np.int32).reshape(-1, 2).T
        row["positions"] = pd.DataFrame(
            {
                **{name: np.full(len(item.ids), value) for name, value in key.items()},
                "position": np.arange(len(item.ids), dtype=np.int32), "token_id": np.array(item.ids, np.int32), "begin": begin, "end": end,
                "word": word, "received": observed.received, "components": list(observed.components),
            }
        )  # fmt: skip
    return row


class Folder:
    """A run's folder: settings, progress, sums and tables. Everything is written under another name and renamed; the state comes last."""

    def __init__(self, path: str | os.PathLike[str], settings: Settings) -> None:
        self.path, self.settings = Path(path), settings
        self.progress, self.sums = Progress(), {}  # type: ignore[var-annotated]
        self.characters: int | None = None  # of all this shard's texts, if they were counted

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
        state = self.path / STATE
        if not state.is_file():
            others = [p.name for p in self.path.iterdir() if p.name != LOCK and not p.name.startswith((".", *TABLES, SUMS))]
            if others:
                raise ValueError(f"'{self.path}' holds other files ({others[0]}): give an empty or a new folder")
            return
        known, self.progress = read_state(self.path)
        wanted = json.loads(json.dumps(asdict(self.settings)))
        differing = sorted(name for name in wanted if known.get(name) != wanted[name])
        if differing:
            raise ValueError(
                f"'{self.path}' holds another run (differing: {', '.join(differing)}): give a new folder, or remove it to start again"
            )
        self.sums = read_sums(self.path, self.settings.shape, self.progress.windows)

    def measure(self, texts: Iterator[Text]) -> None:
        """Count characters, so that tokens can be foretold."""
        self.characters = sum(map(self._size, texts, itertools.count()))

    def _size(self, text: Text, number: int) -> int:
        """Characters that count: none of other shards' texts, of a text that is cut about as many as are traced."""
        s = self.settings
        if number % s.shard[1] != s.shard[0]:
            return 0
        return min(len(text.text), CHARACTERS * s.max_tokens) if s.overflow == "truncate" else len(text.text)

    def windows(self, source: Iterator[Text], tokenizer: Any, skipped: Skipped) -> Iterator[Window]:
        """What is left to do; texts that were done before are compared with those of the run."""
        s, done, digest, first, seen, tokens = self.settings, self.progress.windows, "", 0, 0, self.progress.tokens
        no_tokens = self.progress.skipped.get(NO_TOKENS, 0)
        for number, group in enumerate(_windows(source, s.window)):
            digest, begin, first = _digest(digest, group), first, first + len(group)
            seen += sum(map(self._size, group, itertools.count(begin)))
            if number < done:
                if number == done - 1 and digest != self.progress.digest:
                    raise ValueError(f"the texts are not those of the run in '{self.path}': give a new folder, or remove it to start again")
                continue
            items, counts = self._itemise(group, begin, tokenizer)
            no_tokens += counts.pop(NO_TOKENS)
            tokens += sum(len(item.ids) for item in items)
            expected = round(tokens / seen * self.characters) if self.characters and seen else None
            left_out = dict(skipped.counts) | ({NO_TOKENS: no_tokens} if no_tokens else {})
            yield Window(number, len(group), items, digest, counts, left_out, expected)

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
        self.sums.setdefault(domain, Statistics(self.settings.shape)).add(observed)
        self.progress.rows += 1
        self.progress.tokens += len(observed.components)

    def write(self, window: Window, rows: list[Row]) -> None:
        """A finished window: its tables, the sums, and last the state that makes them count."""
        for row in rows:  # sums in the texts' order: a run that was cut in two adds up to the same bits
            self.add(row["domain"], row.pop("observed"))
        tables = {"texts": pd.DataFrame([{k: v for k, v in row.items() if k not in TABLES} for row in rows])}
        for name in ("positions", "edges"):
            if rows and getattr(self.settings, name):
                tables[name] = pd.concat([row[name] for row in rows], ignore_index=True)
        for name, table in tables.items():
            if len(table):
                _write_table(self.path / f"{name}-{self.progress.windows:06d}.parquet", table)
        p = self.progress
        for name, count in window.counts.items():
            setattr(p, name, getattr(p, name) + count)
        p.digest, p.skipped = window.digest, window.skipped
        p.windows, p.texts = p.windows + 1, p.texts + window.texts
        self._write_state()

    def finish(self, skipped: Skipped) -> None:
        known = self.progress.skipped
        self.progress.finished = True
        self.progress.skipped = dict(skipped.counts) | {k: v for k, v in known.items() if k == NO_TOKENS}
        self._write_state()

    def _write_state(self) -> None:
        from safetensors.numpy import save_file

        names = sorted(self.sums)
        tensors = {f"{n}.{key}": np.ascontiguousarray(getattr(self.sums[d], key)) for n, d in enumerate(names) for key in ARRAYS}
        counts = {d: {key: getattr(self.sums[d], key) for key in COUNTS} for d in names}
        windows = self.progress.windows
        path = self.path / f"{SUMS}.{windows}"
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {"counts": json.dumps(counts)}))
        state = {"format": FORMAT, "version": FORMAT_VERSION, "settings": asdict(self.settings), "progress": asdict(self.progress)}
        write_text(self.path / STATE, json.dumps(state, indent=1))
        for old in self.path.glob(f"{SUMS}.*"):
            if old != path:
                old.unlink(missing_ok=True)


def _tokenised(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and, for each, the characters it stands for."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, verbose=False)
        return [int(i) for i in found["input_ids"]], [(int(a), int(b)) for a, b in found["offset_mapping"]]
    ids = [int(i) for i in tokenizer(text)["input_ids"]]
    ends = [len(tokenizer.decode(ids[: n + 1], skip_special_tokens=True)) for n in range(len(ids))]
    return ids, [(a, min(b, len(text))) for a, b in itertools.pairwise([0, *ends])]


def _digest(before: str, group: list[Text]) -> str:
    found = hashlib.sha256(before.encode())
    for text in group:
        found.update(json.dumps([text.domain, text.text]).encode())
    return found.hexdigest()


def _write_table(path: Path, table: pd.DataFrame) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {}
    for name in table.columns:
        first = table[name].iloc[0]
        if isinstance(first, np.ndarray):
            flat = pa.array(np.concatenate(table[name].to_list()))
            columns[str(name)] = pa.FixedSizeListArray.from_arrays(flat, len(first))
        else:
            columns[str(name)] = pa.array(table[name])
    try:
        write_atomically(path, lambda temporary: pq.write_table(pa.table(columns), temporary, compression="zstd"))
    except pa.ArrowException as error:
        raise OSError(f"cannot write '{path}': {error}") from error


def read_state(path: Path) -> tuple[dict[str, Any], Progress]:
    """A run's settings and progress; ``ValueError`` if the folder holds none or a damaged one."""
    file = path / STATE
    if not file.is_file():
        raise FileNotFoundError(f"'{path}' holds no corpus run ({STATE} is missing)")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        if read["format"] != FORMAT:
            raise ValueError("it is no corpus run")
        if read["version"] != FORMAT_VERSION:
            raise ValueError(f"it is of version {read['version']}; this release reads version {FORMAT_VERSION}")
        return read["settings"], Progress(**read["progress"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' cannot be read: {error}") from error


def read_sums(path: Path, shape: tuple[int, int], windows: int) -> dict[str, Statistics]:
    """The running sums per domain as they were after ``windows`` windows."""
    from safetensors import SafetensorError, safe_open

    file = path / f"{SUMS}.{windows}"
    try:
        with safe_open(file, framework="np") as stored:
            counts = json.loads(stored.metadata()["counts"])
            found = {}
            for number, domain in enumerate(sorted(counts)):
                found[domain] = Statistics(tuple(shape), **counts[domain])  # type: ignore[arg-type]
                for key in ARRAYS:
                    setattr(found[domain], key, stored.get_tensor(f"{number}.{key}"))
        return found
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{file}' is damaged or missing: {error}") from error
