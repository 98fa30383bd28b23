"""``route()``: forward pass and walk in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from flowroutes_fast.results.lazy import LazyTrace
from flowroutes_fast.results.route import Route
from flowroutes_fast.system.arguments import share
from flowroutes_fast.tracing.on_demand import States
from flowroutes_fast.tracing.trace import trace, workers_for
from flowroutes_fast.tracing.workers import run_all

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flowroutes_fast.tracing.typed import OneText, RouteOptions, Texts

LOOSE = 0.1  # tolerance of a normaliser that a renormalised route divides away


@overload
def route(
    model: Any,
    tokenizer: Any,
    text: OneText,
    position: int | Sequence[int] = ...,
    threshold: float | None = ...,
    renormalize: bool = ...,
    *,
    rule: str = ...,
    keep: float | None = ...,
    **options: Unpack[RouteOptions],
) -> Route: ...
@overload
def route(
    model: Any,
    tokenizer: Any,
    text: Texts,
    position: int | Sequence[int] = ...,
    threshold: float | None = ...,
    renormalize: bool = ...,
    *,
    rule: str = ...,
    keep: float | None = ...,
    **options: Unpack[RouteOptions],
) -> list[Route]: ...
@overload
def route(
    model: Any,
    tokenizer: Any,
    text: Any,
    position: int | Sequence[int] = ...,
    threshold: float | None = ...,
    renormalize: bool = ...,
    *,
    rule: str = ...,
    keep: float | None = ...,
    **options: Unpack[RouteOptions],
) -> Any: ...
def route(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    position: int | Sequence[int] = -1,
    threshold: float | None = None,
    renormalize: bool = True,
    *,
    rule: str = "importance",
    keep: float | None = None,
    **options: Any,
) -> Any:
    """The route of ``position``'s last state from one forward pass, evaluating only the rows that it reaches.

    The same as ``trace(model, tokenizer, text).route(position, threshold, renormalize)``, for a fraction of the work.

    Args:
        model, tokenizer, text: as for :func:`flowroutes_fast.trace`; several prompts give a list of routes.
        position, threshold, renormalize, rule, keep: as for :meth:`Trace.route`; 0.04 is the threshold by default.
        options: others of :func:`flowroutes_fast.trace`: ``measure``, ``backend``, ``bias``, ``threads``, ``memory``,
            ``past_key_values`` …

    Raises:
        ValueError, IndexError, TypeError: as those two do.
    """
    if refused := {"lazy", "positions", "resume", "thresholds", "dense"} & set(options):
        raise TypeError(
            f"route() has no option {', '.join(sorted(refused))}: it evaluates what the route needs; see trace()"
        )
    if rule == "importance" and "floor" not in options:
        limit = share("threshold", 0.04 if threshold is None else threshold)
        chosen: dict[str, Any] = (
            {"floor": limit, "thresholds": (limit,)} if limit > 0 else {"precision": "exact", "floor": 0.0}
        )
        if renormalize and "tolerance" not in options and limit > 0:
            # shares of the survivors do not depend on it; decisions are refined all the same
            chosen["tolerance"] = LOOSE
        options = chosen | options
    found = trace(model, tokenizer, text, lazy=True, **options)
    traces = found if isinstance(found, list) else [found]

    def walk(one: LazyTrace) -> Route:
        made = one.route(position, threshold, renormalize, rule=rule, keep=keep)
        one.release()
        return made

    routes = run_all(
        walk,
        [(one,) for one in traces],
        _side_by_side([one.source for one in traces], [len(one.tokens) for one in traces]),
    )
    return routes if isinstance(found, list) else routes[0]


def _side_by_side(sources: Sequence[States], lengths: list[int]) -> int:
    """How many threads walk a batch's routes, each with its share of the kernels' threads; one where rows run through
    the model again.

    A walk is many short calls, and those of several threads wait long for one another where other programs are busy
    too.
    """
    if any(source.tier != "whole" for source in sources) or (model := sources[0].model()) is None:
        return 1
    workers, single = workers_for(model, sources[0].options, lengths)
    for source in sources:
        source.options = single
    return workers
