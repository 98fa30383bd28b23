"""Types of what :func:`flowroutes_fast.trace` and :func:`flowroutes_fast.route` take, for type checkers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

OneText = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a prompt, its ids, the messages of a chat
Texts = list[str] | tuple[str, ...] | list[list[int]] | list[list[dict[str, Any]]]


class RouteOptions(TypedDict, total=False):
    """How rows are evaluated; see :func:`flowroutes_fast.trace`."""

    attention_mask: Any
    precision: str
    measure: str
    backend: str
    floor: float
    tolerance: float
    bias: str
    neurons: bool
    threads: int
    progress: bool
    memory: int | str | None
    past_key_values: Any


class TraceOptions(RouteOptions, total=False):
    """The same, and which rows, how closely and how safely."""

    positions: Sequence[int] | None
    thresholds: Sequence[float]
    dense: bool | None
    resume: str | os.PathLike[str] | None
