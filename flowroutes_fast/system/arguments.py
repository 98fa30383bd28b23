"""Arguments of public methods: each check returns the value as a plain number, or raises one sentence that names
the argument.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np


def integer(name: str, value: Any) -> int:
    """``TypeError`` for anything but an integer (numpy's and torch's are some, booleans are none)."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # torch: "only integer tensors of a single element ..."
            pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def integers(name: str, value: Any) -> list[int]:
    """One integer or several (list, tuple, range, array) as a list; ``TypeError`` for anything else."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return [integer(name, value)]
    return [integer(name, one) for one in value]


def number(name: str, value: Any) -> float:
    """``TypeError`` for anything but a real number, ``ValueError`` for NaN and infinities."""
    if not math.isfinite(found := _real(name, value)):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return found


def share(name: str, value: Any) -> float:
    """A number in [0, 1); ``ValueError`` outside."""
    if not 0 <= (found := _real(name, value)) < 1:  # NaN too
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return found


def _real(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, got one that is too large") from None


def file_path(path: Any) -> Path:
    """``TypeError`` for anything but a text, bytes or a path."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"path must be a text or a pathlib.Path, got {path!r}")
    return Path(os.fsdecode(path))


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)
