"""A corpus run's state: how far it is and what it wrote, in ``run.json``, and the sums beside it; checked whenever
they are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flowroutes_fast.corpora.statistics import COUNTS, Statistics
from flowroutes_fast.system.errors import DamagedFile
from flowroutes_fast.system.files import said, write_atomically
from flowroutes_fast.tracing.options import taken

FORMAT, FORMAT_VERSION = "flowroutes_fast.corpus", 2
STATE, SUMS = "run.json", "statistics.safetensors"
TABLES = ("texts", "positions", "edges")
# of a table, a window; of sums
NAME = re.compile(rf"(?:({'|'.join(TABLES)})-(\d{{6,}})\.parquet|{re.escape(SUMS)}\.(\d+))")
IDENTITY = ("weights", "config", "tokenizer")  # settings that version 1 did not have
NOT_OF_A_CORPUS = ("measure", "dense", "thresholds", "neurons")  # options that its rows have no use for
SLACK = 1e-3  # by which rounding may leave [0, 1]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Settings:
    """What determines a corpus run's rows; a run in a folder goes on under the same settings only (``model`` is a
    name, no more).
    """

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
    routes_only: bool
    evaluation: dict[str, Any]  # options of the evaluation beside precision and floor that are not the default
    shard: tuple[int, int]
    weights: str  # digests of what they are, see flowroutes_fast.identity
    config: str
    tokenizer: str


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


@dataclass(frozen=True)
class Stored:
    """A file of a run as it was written."""

    bytes: int
    rows: int  # of sums: domains
    sha256: str


@dataclass
class State:
    """What ``run.json`` holds.

    ``texts``: of the whole source; None while a stream has not ended. ``digests``: of all texts up to the end of each
    window, of the whole source or as far as a stream was read. ``files``: by name; None in runs of version 1, which
    kept none. ``software``: versions that worked on it.
    """

    settings: dict[str, Any]
    progress: Progress = field(default_factory=Progress)
    texts: int | None = None
    digests: list[str] = field(default_factory=list)
    files: dict[str, Stored] | None = field(default_factory=dict)
    software: list[dict[str, str]] = field(default_factory=list)

    def known(self, window: int) -> int:
        """Texts up to the end of a window whose digest is known."""
        every = self.progress.texts if self.texts is None else self.texts
        return min((window + 1) * self.settings["window"], every)


def software() -> dict[str, str]:
    """The versions that determine a run's numbers."""
    import torch
    import transformers

    from flowroutes_fast.version import __version__

    return {"flowroutes_fast": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def write_bytes(path: Path, raw: bytes, rows: int) -> Stored:
    """Write a file of a run, in one piece: libraries that write files themselves leave theirs behind when they are
    killed.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(raw))
    return Stored(len(raw), rows, hashlib.sha256(raw).hexdigest())


def read_bytes(path: Path, known: Stored | None) -> bytes:
    """A file's bytes; :class:`DamagedFile` if it cannot be read or is not the one that was written."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"'{path}' is missing: the run in '{path.parent}' wrote it") from None
    except OSError as error:
        raise DamagedFile(f"'{path}' cannot be read: {said(error)}") from error
    if known is not None and len(raw) != known.bytes:
        raise DamagedFile(f"'{path}' is damaged: it has {len(raw)} bytes, {known.bytes} were written")
    if known is not None and hashlib.sha256(raw).hexdigest() != known.sha256:
        raise DamagedFile(f"'{path}' is damaged: its SHA-256 is not that of the file that was written")
    return raw


def text_of(state: State) -> str:
    """``run.json``: what it names counts once it is written."""
    # a stream may be read ahead
    digests = state.digests if state.texts is not None else state.digests[: state.progress.windows]
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "settings": state.settings,
        "progress": asdict(state.progress),
        "texts": state.texts,
        "digests": digests,
        "files": {name: asdict(one) for name, one in sorted((state.files or {}).items())},
        "software": state.software,
    }
    return json.dumps(found | {"checksum": _checksum(found)}, indent=1)


def read_state(folder: Path) -> State:
    """A run's state, of this version or (to be read only) of version 1.

    Raises:
        FileNotFoundError: there is no run in the folder. DamagedFile: ``run.json`` is damaged, or of a later version.
    """
    file = folder / STATE
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"'{folder}' holds no corpus run ({STATE} is missing)") from None
    except OSError as error:
        raise DamagedFile(f"'{file}' cannot be read: {said(error)}") from error
    return _checked(file, "cannot be read", lambda: _state(raw))


def _state(raw: bytes) -> State:
    read = json.loads(raw.decode("utf-8"))
    _need(isinstance(read, dict) and read.get("format") == FORMAT, "it is no corpus run")
    version = read.get("version")
    if version not in (1, FORMAT_VERSION):
        raise ValueError(f"it is of version {version}; this release reads versions 1 and {FORMAT_VERSION}")
    if version == 1:
        read |= {"texts": None, "digests": [], "files": None, "software": []}
        read["settings"] = dict.fromkeys(IDENTITY, "") | dict(read["settings"])
    else:
        checksum = read.pop("checksum", None)
        _need(checksum == _checksum(read), "its checksum is not that of what it holds")
    _exactly(read, ("format", "version", "settings", "progress", "texts", "digests", "files", "software"), "")
    read["settings"] = _mapping(read["settings"], "settings")
    read["settings"].setdefault("routes_only", False)  # of a run begun before there was a choice
    read["settings"].setdefault("evaluation", {})
    state = State(
        _settings(read["settings"], version),
        _progress(read["progress"]),
        read["texts"],
        read["digests"],
        None,
        read["software"],
    )
    if version == FORMAT_VERSION:
        state.files = {name: _stored(name, one) for name, one in _mapping(read["files"], "files").items()}
        _check_whole(state)
    return state


def _checksum(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _settings(found: Any, version: int) -> dict[str, Any]:
    _exactly(found, [f.name for f in fields(Settings)], "settings")
    for name in ("model", "precision", "overflow"):
        _need(isinstance(found[name], str), f"settings: {name} is {found[name]!r}, no text")
    for name in ("shape", "shard"):
        _need(
            isinstance(found[name], list) and len(found[name]) == 2 and all(map(_whole, found[name])),
            f"settings: {name} is {found[name]!r}",
        )
    _need(
        min(found["shape"]) >= 1 and found["shard"][0] < found["shard"][1],
        f"settings: shape {found['shape']}, shard {found['shard']}",
    )
    for name in ("max_tokens", "window", "batch_tokens"):
        _need(_whole(found[name], 1), f"settings: {name} is {found[name]!r}")
    for name in ("threshold", "floor"):
        _need(_number(found[name]) and found[name] < 1, f"settings: {name} is {found[name]!r}")
    for name in ("positions", "edges", "routes_only"):
        _need(isinstance(found[name], bool), f"settings: {name} is {found[name]!r}, not true or false")
    _need(not (found["positions"] and found["routes_only"]), "settings: positions of a run of routes alone")
    _evaluation(found["evaluation"], found["precision"], found["floor"])
    for name in IDENTITY:
        _need(_is_digest(found[name]) or version == 1, f"settings: {name} is {found[name]!r}, no digest")
    return found


def _evaluation(found: Any, precision: str, floor: float) -> None:
    given = _mapping(found, "settings: evaluation")
    try:
        replace(
            taken(given, "corpus", [*NOT_OF_A_CORPUS, "precision", "floor"]), precision=precision, floor=floor
        ).check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: evaluation: {error}") from None


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the settings by which rows of two runs may differ: they do not by a model's name or by threads."""

    def of_rows(settings: dict[str, Any]) -> dict[str, Any]:
        every = settings | settings["evaluation"]
        return {name: value for name, value in every.items() if name not in ("model", "threads", "evaluation")}

    a, b = of_rows(one), of_rows(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def _progress(found: Any) -> Progress:
    _exactly(found, [f.name for f in fields(Progress)], "progress")
    for name in ("windows", "texts", "rows", "tokens", "truncated", "dropped", "split"):
        _need(_whole(found[name]), f"progress: {name} is {found[name]!r}")
    _need(_number(found["seconds"]), f"progress: seconds is {found['seconds']!r}")
    _need(isinstance(found["finished"], bool), f"progress: finished is {found['finished']!r}, not true or false")
    _need(_is_digest(found["digest"]) or not found["windows"], f"progress: digest is {found['digest']!r}")
    skipped = _mapping(found["skipped"], "progress: skipped")
    _need(all(map(_whole, skipped.values())), f"progress: skipped is {skipped!r}")
    return Progress(**found)


def _stored(name: str, found: Any) -> Stored:
    _need(NAME.fullmatch(name) is not None, f"files: {name!r} is no file of a run")
    _exactly(found, [f.name for f in fields(Stored)], f"files: {name}")
    _need(
        _whole(found["bytes"], 1) and _whole(found["rows"], 1) and _is_digest(found["sha256"]),
        f"files: {name} is {found!r}",
    )
    return Stored(**found)


def _check_whole(state: State) -> None:
    """Do the parts of a state fit together?"""
    p, window, files = state.progress, state.settings["window"], state.files or {}
    _need(isinstance(state.digests, list) and all(map(_is_digest, state.digests)), "digests: no list of digests")
    _need(isinstance(state.software, list) and all(map(_is_software, state.software)), "software: no list of versions")
    _need(state.texts is None or _whole(state.texts), f"texts is {state.texts!r}")
    every = p.texts if state.texts is None else state.texts
    _need(
        len(state.digests) == -(-every // window),
        f"{len(state.digests)} digests of {every} texts in windows of {window}",
    )
    _need(
        p.texts == min(p.windows * window, every) and p.windows == -(-p.texts // window),
        f"{p.windows} windows of {window} hold {p.texts} texts",
    )
    _need(p.texts == every or not p.finished, f"it is finished after {p.texts} of {every} texts")
    _need(p.digest == (state.digests[p.windows - 1] if p.windows else ""), "progress: digest is not that of its texts")
    rows = dict.fromkeys(TABLES, 0)
    for name, one in files.items():
        table, number, sums = NAME.fullmatch(name).groups()  # type: ignore[union-attr]
        if sums is not None:
            _need(int(sums) == p.windows, f"files: {name} is not of the last window")
            continue
        _need(int(number) < p.windows, f"files: {name} is of a window that is not finished")
        _need(table == "texts" or state.settings[table], f"files: {name}, though no {table} were kept")
        rows[table] += one.rows
    _need(rows["texts"] == p.rows, f"files: {rows['texts']} rows of texts, progress has {p.rows}")
    _need(
        rows["positions"] == (p.tokens if state.settings["positions"] else 0),
        f"files: {rows['positions']} positions, {p.tokens} tokens",
    )
    _need(not p.windows or f"{SUMS}.{p.windows}" in files or not p.rows, f"files: {SUMS}.{p.windows} is missing")


def write_sums(path: Path, sums: dict[str, Statistics]) -> Stored:
    """Write the running sums of every domain."""
    from safetensors.numpy import save

    names = sorted(sums)
    tensors = {
        f"{n}.{key}": np.ascontiguousarray(getattr(sums[d], key)) for n, d in enumerate(names) for key in sums[d].arrays
    }
    counts = {d: {key: getattr(sums[d], key) for key in COUNTS} for d in names}
    return write_bytes(path, save(tensors, {"counts": json.dumps(counts)}), len(names))


def read_sums(folder: Path, state: State) -> dict[str, Statistics]:
    """The running sums per domain; :class:`DamagedFile` if their file is damaged or missing."""
    windows = state.progress.windows
    file, name = folder / f"{SUMS}.{windows}", f"{SUMS}.{windows}"
    if state.files is not None and name not in state.files:
        return {}
    try:
        raw = read_bytes(file, state.files[name] if state.files is not None else None)
    except DamagedFile as error:
        raise DamagedFile(f"'{file}' is damaged or missing: {str(error).partition(': ')[2]}") from error
    found = _checked(
        file, "is damaged or missing", lambda: _sums(raw, tuple(state.settings["shape"]), state.settings["routes_only"])
    )
    for label, of_run in (("texts", state.progress.rows), ("positions", state.progress.tokens)):
        if (total := sum(getattr(one, label) for one in found.values())) != of_run:
            raise DamagedFile(f"'{file}' is damaged: it counts {total} {label}, {STATE} has {of_run}")
    return found


def _sums(raw: bytes, shape: tuple[int, int], routes_only: bool) -> dict[str, Statistics]:
    from safetensors.numpy import load

    tensors = load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    counts = _mapping(json.loads(header["__metadata__"]["counts"]), "counts")
    arrays = Statistics(shape, routes_only=routes_only).arrays
    _exactly(tensors, [f"{number}.{key}" for number in range(len(counts)) for key in arrays], "tensors")
    found: dict[str, Statistics] = {}
    for number, domain in enumerate(sorted(counts)):
        _exactly(counts[domain], COUNTS, f"counts of {domain!r}")
        _need(all(map(_whole, counts[domain].values())), f"counts of {domain!r} are {counts[domain]!r}")
        found[domain] = one = Statistics(shape, **counts[domain], routes_only=routes_only)
        for key in arrays:
            array, wanted = tensors[f"{number}.{key}"], getattr(one, key)
            _need(
                array.shape == wanted.shape and array.dtype == wanted.dtype,
                f"{key} of {domain!r} is {array.dtype} {array.shape}, not {wanted.dtype} {wanted.shape}",
            )
            setattr(one, key, array)
        _check_sums(domain, one)
    return found


def _check_sums(domain: str, one: Statistics) -> None:
    _need(
        one.after_first == one.positions - one.texts,
        f"{domain!r}: {one.after_first} of {one.positions} positions are not the first of {one.texts} texts",
    )
    _need(max(one.later, one.first) <= one.positions, f"{domain!r}: more subwords than positions")
    most = {
        "total": one.positions,
        "squares": one.positions,
        "active": one.positions,
        "in_routes": one.texts,
        "patterns": one.positions,
        "quiet": one.first,
    }
    for key in one.arrays:
        array, limit = getattr(one, key), most[key]
        good = np.isfinite(array).all() and (
            not array.size or (array.min() >= -SLACK * limit and array.max() <= limit * (1 + SLACK))
        )
        _need(bool(good), f"{key} of {domain!r} leaves [0, {limit}]")


def _checked(file: Path, wrong: str, read: Callable[[], Read]) -> Read:
    """``read()``, with the file's name in front of what is wrong with it."""
    from safetensors import SafetensorError

    try:
        return read()
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        said = (
            f"{error.args[0]!r} is missing"
            if isinstance(error, KeyError) and error.args
            else str(error).splitlines()[0]
            if str(error)
            else error
        )
        raise DamagedFile(f"'{file}' {wrong}: {said}") from error


def _need(true: bool, wrong: str) -> None:
    if not true:
        raise ValueError(wrong)


def _exactly(found: Any, names: Any, of: str) -> None:
    known = set(_mapping(found, of))
    where = f"{of}: " if of else ""
    _need(not known - set(names), f"{where}unknown {min(known - set(names), default='')!r}")
    _need(not set(names) - known, f"{where}{min(set(names) - known, default='')!r} is missing")


def _mapping(found: Any, of: str) -> dict[str, Any]:
    _need(isinstance(found, dict), f"{of or 'it'} is no mapping")
    return found


def _whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_software(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
