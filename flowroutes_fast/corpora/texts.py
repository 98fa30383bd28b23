"""Texts from wherever they are: strings, dictionaries, files of text, JSONL or Parquet, standard input,
``datasets``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("file", "paragraph", "line")
# those in use
ENCODINGS = (
    "cp1252",
    "cp1250",
    "cp1251",
    "koi8_r",
    "utf_16",
    "utf_32",
    "gb18030",
    "big5",
    "shift_jis",
    "euc_jp",
    "euc_kr",
)


@dataclass(frozen=True)
class Text:
    """One text of a corpus."""

    text: str
    domain: str = ""


@dataclass
class Skipped:
    """What was not read, and why: ``counts`` per reason, and the first few names."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, name: str = "") -> None:
        self.counts[reason] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{name}: {reason}" if name else reason)


def read_texts(
    source: Any, *, field: str = "text", split: str = "file", domain: str = "", skipped: Skipped | None = None
) -> Iterator[Text]:
    """The texts of a source, one after the other.

    Args:
        source: a string (one text); a path (:class:`pathlib.Path`) to a ``.jsonl``, ``.parquet`` or text file, or to a
            folder of those; a mapping of domain names to sources; a :class:`Stream`; or anything that gives strings,
            dictionaries, paths or :class:`Text` (a ``datasets`` dataset).
        field: where dictionaries, JSONL and Parquet have the text; ``"domain"`` beside it is used.
        split: what of a text file is one text: ``"file"``, ``"paragraph"`` (between blank lines) or ``"line"``.
        domain: of texts that have none.
        skipped: collects what is left out: empty texts, binary files, rows that are no text.

    Raises:
        FileNotFoundError: no such path. ValueError: a damaged file, a field that is not there, an unknown split.
    """
    skipped = Skipped() if skipped is None else skipped
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
    if isinstance(source, dict) and field not in source:
        for name, inner in source.items():
            yield from read_texts(inner, field=field, split=split, domain=str(name), skipped=skipped)
    elif isinstance(source, Path):
        for file in _files(source):
            yield from _from_file(file, field, split, domain, skipped)
    elif isinstance(source, (str, Text, dict)):
        yield from _from_item(source, field, domain, skipped)
    elif isinstance(source, Stream):
        yield from source.texts(field, domain, skipped)
    elif isinstance(source, Iterable):
        for item in source:
            if isinstance(item, Path):
                yield from read_texts(item, field=field, split=split, domain=domain, skipped=skipped)
            else:
                yield from _from_item(item, field, domain, skipped)
    else:
        raise TypeError(f"texts must be strings, paths or dictionaries, got {type(source).__name__}")


def rereadable(source: Any) -> bool:
    """Can a source be read twice? A stream, or an iterator, cannot."""
    if isinstance(source, dict):
        return all(map(rereadable, source.values()))
    return isinstance(source, (str, Path, Text)) or hasattr(source, "__len__")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and not any(n.startswith(".") for n in p.relative_to(path).parts)
        )
        if not found:
            raise ValueError(f"folder '{path}' holds no files")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder at '{path}'")
    return [path]


def _from_item(item: Any, field: str, domain: str, skipped: Skipped) -> Iterator[Text]:
    if isinstance(item, Text):
        item, domain = item.text, item.domain or domain
    elif isinstance(item, dict):
        if field not in item:
            raise ValueError(f"a row has no field {field!r}; it has {', '.join(map(repr, item))}")
        item, domain = item[field], str(item.get("domain") or domain)
    if not isinstance(item, str):
        skipped.add(f"not a text but {type(item).__name__}")
    elif not item.strip():
        skipped.add("empty")
    else:
        try:
            item.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
            item = item.encode("utf-8", "replace").decode()
            skipped.add("broken characters replaced")
        yield Text(item, domain)


def _from_file(file: Path, field: str, split: str, domain: str, skipped: Skipped) -> Iterator[Text]:
    if file.suffix == ".parquet":
        yield from _from_parquet(file, field, domain, skipped)
        return
    text = decoded(file.read_bytes(), str(file), skipped)
    if text is None:
        return
    if file.suffix in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold U+2028
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"'{file}', line {number}, is not JSON: {error}") from error
            if isinstance(row, dict) and field not in row:
                raise ValueError(f"'{file}', line {number}, has no field {field!r}; it has {', '.join(map(repr, row))}")
            yield from _from_item(row, field, domain, skipped)
        return
    for piece in pieces(text, split):
        yield from _from_item(piece, field, domain, skipped)


def pieces(text: str, split: str) -> list[str]:
    """A text file's texts."""
    if split == "file":
        return [text]
    if split == "line":
        return [line for line in text.splitlines() if line.strip()]
    found, current = [], []  # type: ignore[var-annotated]
    for line in [*text.splitlines(keepends=True), "\n"]:
        if line.strip():
            current.append(line)
        elif current:
            found.append("".join(current).rstrip("\n"))
            current = []
    return found


def decoded(raw: bytes, name: str, skipped: Skipped) -> str | None:
    """UTF-8 (with or without a mark), else what the bytes look like; None, and counted, for what is empty or no
    text.
    """
    if not raw.strip():
        skipped.add("empty", name)
        return None
    if b"\0" in raw[:8192] and raw[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        skipped.add("binary", name)
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = from_bytes(raw, cp_isolation=list(ENCODINGS)).best()
        if best is None:
            skipped.add("unknown encoding", name)
            return None
        skipped.add(f"decoded as {best.encoding}", name)
        return str(best)


def _from_parquet(file: Path, field: str, domain: str, skipped: Skipped) -> Iterator[Text]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise ValueError(f"'{file}' has no column {field!r}; it has {', '.join(map(repr, names))}")
            columns = [field] + (["domain"] if "domain" in names and field != "domain" else [])
            for batch in table.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    yield from _from_item(row, field, domain, skipped)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"'{file}' is no Parquet file, or damaged: {error}") from error


class Stream:
    """Lines of a stream, of texts or of bytes, as a source: JSON objects with a text, or one text each. It can be
    read once.
    """

    def __init__(self, lines: Any) -> None:
        self.lines = lines

    def texts(self, field: str, domain: str, skipped: Skipped) -> Iterator[Text]:
        for number, line in enumerate(self.lines, 1):
            text = decoded(line, "", skipped) if isinstance(line, bytes) else line
            if text is None:
                continue
            row = _json_object(text)
            if row is not None and field not in row:
                raise ValueError(f"line {number} has no field {field!r}; it has {', '.join(map(repr, row))}")
            yield from _from_item(text.rstrip("\r\n") if row is None else row, field, domain, skipped)


def _json_object(line: str) -> dict[str, Any] | None:
    if not line.lstrip().startswith("{"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def named_sources(arguments: list[str]) -> dict[str, list[Path]]:
    """Command-line sources ``PATH`` or ``DOMAIN=PATH``, in their order."""
    found: dict[str, list[Path]] = {}
    for argument in arguments:
        name, sign, path = argument.partition("=")
        domain, place = (name, path) if sign and not os.path.exists(argument) else ("", argument)
        found.setdefault(domain, []).append(Path(place))
    return found
