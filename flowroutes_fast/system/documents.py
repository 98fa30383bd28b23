"""Reading what another process, or anyone, may have written: plain files only, strict JSON, every field checked.

Everything here raises :class:`DamagedFile` with what is wrong; :func:`named` puts the file's name before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flowroutes_fast.system.errors import DamagedFile

MAX_DIGITS = 20  # of an integer: int64 has 19
INT64 = 2**63 - 1
ROUNDING = 1e-3  # by which a share may miss 0 or 1


def plain_file(path: str | os.PathLike[str], what: str) -> Path:
    """The path of a regular file that is not empty.

    Raises ``FileNotFoundError``, ``IsADirectoryError``, ``PermissionError``; ``DamagedFile`` for a pipe or a device,
    which would hang.
    """
    name = os.fspath(path)
    try:
        found = os.stat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null byte
        raise FileNotFoundError(f"no {what} at {str(name)!r}") from error
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"'{path}' is a folder, not a {what}")
    if not stat.S_ISREG(found.st_mode):
        raise DamagedFile(f"'{path}' is a pipe or a device, not a {what}")
    with open(name, "rb"):
        pass
    if not found.st_size:
        raise DamagedFile(f"'{path}' is a damaged {what}: it is empty")
    return Path(os.fsdecode(name))


@contextmanager
def named(path: Any, sentence: str) -> Iterator[None]:
    """Put the file's name and what it should be before what is wrong: ``'a.json' is a damaged route file: ...``."""
    try:
        yield
    except DamagedFile as error:
        raise DamagedFile(f"'{path}' {sentence}: {error}") from error


def parse(text: str) -> Any:
    """JSON without what Python's reader lets pass: NaN and infinities, names given twice, endless integers, endless
    nesting.
    """
    try:
        return json.loads(
            text, parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_once
        )
    except RecursionError:
        raise DamagedFile("its JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DamagedFile(f"it is no whole JSON ({error})") from error


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise DamagedFile(f"it holds an integer of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise DamagedFile(f"it holds the number {text[:MAX_DIGITS]}, which is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise DamagedFile(f"it holds {text} where numbers are finite")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DamagedFile("its JSON gives a name twice")
    return found


def digest_of(document: dict[str, Any]) -> str:
    """SHA-256 of a JSON document, whatever the order of its names and its spacing."""
    return hashlib.sha256(
        json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def written(document: Any) -> str:
    """JSON that can be written as UTF-8: what is no Unicode (a file's name in another encoding) becomes ``?``;
    numpy's numbers are plain.
    """
    return (
        json.dumps(document, ensure_ascii=False, allow_nan=False, default=_plain)
        .encode("utf-8", "replace")
        .decode("utf-8")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def one_line(text: str) -> str:
    """A model's name as files hold it: control characters, which a terminal would obey, become ``?``."""
    return "".join("?" if unicodedata.category(c) == "Cc" else c for c in text)


def check_names(found: dict[str, Any], required: set[str], known: set[str]) -> None:
    if missing := sorted(required - set(found)):
        raise DamagedFile(f"{', '.join(missing)} is missing")
    if unknown := sorted(set(found) - known):
        raise DamagedFile(f"nothing is known of its {', '.join(repr(name)[:60] for name in unknown[:3])}")


def check(holds: Any, says: str) -> None:
    if not holds:
        raise DamagedFile(says)


def a_text(name: str, value: Any) -> str:
    check(isinstance(value, str), f"{name} is no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DamagedFile(f"{name} holds what is no Unicode") from None
    return str(value)


def a_name(name: str, value: Any) -> str:
    check(one_line(a_text(name, value)) == value, f"{name} holds control characters")
    return str(value)


def texts(name: str, value: Any, count: int | None = None) -> list[str]:
    values = a_list(name, value, count)
    for one in values:
        a_text(name, one)
    return values


def a_list(name: str, value: Any, count: int | None = None) -> list[Any]:
    check(isinstance(value, list), f"{name} is no list")
    check(count is None or len(value) == count, f"{name} has {len(value)} entries where there are {count}")
    return list(value)


def integers(name: str, value: Any, low: int, high: int, count: int | None = None) -> list[int]:
    """Integers from ``low`` to ``high``, both included; true and false are none."""
    values = a_list(name, value, count)
    check(all(type(one) is int for one in values), f"{name} holds something else than integers")
    check(not values or (low <= min(values) and max(values) <= high), f"{name} holds integers outside {low} ... {high}")
    return values


def an_integer(name: str, value: Any, low: int, high: int) -> int:
    return integers(name, [value], low, high)[0]


def numbers(name: str, value: Any, low: float, high: float, count: int | None = None) -> list[float]:
    """Finite numbers from ``low`` to ``high``, both included."""
    values = a_list(name, value, count)
    check(all(type(one) in (int, float) for one in values), f"{name} holds something else than numbers")
    check(all(map(math.isfinite, values)), f"{name} holds numbers that are not finite")
    check(
        not values or (low <= min(values) and max(values) <= high), f"{name} holds numbers outside {low:g} ... {high:g}"
    )
    return [float(one) for one in values]


def a_number(name: str, value: Any, low: float, high: float) -> float:
    return numbers(name, [value], low, high)[0]


def a_flag(name: str, value: Any) -> bool:
    check(isinstance(value, bool), f"{name} is neither true nor false")
    return bool(value)


def one_of(*known: str) -> Callable[[str, Any], str]:
    def checked(name: str, value: Any) -> str:
        check(isinstance(value, str) and value in known, f"{name} is {repr(value)[:60]}, none of {', '.join(known)}")
        return str(value)

    return checked


def shapes(name: str, value: Any) -> list[str]:
    """Of a model's layers."""
    known = one_of("sequential", "parallel")
    return [known(name, one) for one in a_list(name, value)]


def probabilities(name: str, value: Any) -> list[tuple[str, float]]:
    """Pairs of a text and its probability."""
    pairs = [a_list(name, pair, 2) for pair in a_list(name, value)]
    return [(a_text(name, text), a_number(name, p, 0, 1 + ROUNDING)) for text, p in pairs]


def messages(name: str, value: Any) -> list[tuple[str, int, int]]:
    """Role, first token and the one after the last of the messages of a chat."""
    rows = [a_list(name, row, 3) for row in a_list(name, value)]
    return [
        (a_text(name, role), an_integer(name, first, 0, INT64), an_integer(name, stop, 0, INT64))
        for role, first, stop in rows
    ]


def check_messages(found: list[tuple[str, int, int]], tokens: int) -> None:
    """Are they tokens of the prompt, one after another?"""
    at = 0
    for role, first, stop in found:
        check(at <= first < stop <= tokens, f"its chat has a message ({role[:20]}) at tokens {first} to {stop}")
        at = stop


def table_of(name: str, value: Any, check_value: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A JSON object whose values are all of one kind."""
    check(isinstance(value, dict), f"{name} is no table of names and values")
    return {a_text(name, key): check_value(f"{name}[{key[:40]!r}]", one) for key, one in value.items()}
