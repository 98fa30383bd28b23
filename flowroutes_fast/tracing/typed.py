"""Types of what :func:`flowroutes_fast.trace` and :func:`flowroutes_fast.route` take, for type checkers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from flowroutes_fast.tracing.options import EvaluationOptions

OneText = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a prompt, its ids, the messages of a chat
Texts = list[str] | tuple[str, ...] | list[list[int]] | list[list[dict[str, Any]]]


class RouteOptions(EvaluationOptions, total=False):
    """What a lazy pass is given beside; see :func:`flowroutes_fast.trace`."""

    attention_mask: Any
    progress: bool
    memory: int | str | None
    past_key_values: Any


class TraceOptions(RouteOptions, total=False):
    """The same, and which rows, how closely and how safely."""

    positions: Sequence[int] | None
    resume: str | os.PathLike[str] | None
