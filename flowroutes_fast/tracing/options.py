"""The options of an evaluation: named, explained, given a default and checked here alone.

``trace()``, ``route()``, ``generate()``, ``estimate()``, the adapters and the command line take them from
:class:`Options`; whoever adds one adds a field, and a line of :class:`EvaluationOptions` for type checkers.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, TypeVar

import torch
from typing_extensions import TypedDict

from flowroutes_fast.ops.backends import choose_backend
from flowroutes_fast.ops.certified import MEASURES

BIAS_MODES = ("part", "value", "exclude")
PRECISIONS = ("certified", "exact")
DEFAULT_FLOOR = 1e-3
DEFAULT_THRESHOLDS = (0.01, 0.03, 0.04)  # those of the paper
F = TypeVar("F", bound=Callable[..., Any])


class EvaluationOptions(TypedDict, total=False):
    """The fields of :class:`Options`, for type checkers."""

    precision: str
    measure: str
    backend: str
    dense: bool | None
    floor: float
    thresholds: Sequence[float]
    tolerance: float
    bias: str
    threads: int
    neurons: bool


@dataclass(frozen=True)
class Options:
    """How importances are evaluated. Every function that evaluates some takes these as keywords.

    Attributes:
        precision: ``"certified"``: every sub-edge is bounded, those that matter are evaluated, and everything carries
            an interval; routes are those of exact importances. ``"exact"``: every sub-edge by the paper's formula, to
            float32 rounding.
        measure: ``"proximity"``, the paper's; or ``"signed"``: ⟨sign(y), z⟩ / ‖y‖₁, which sums to 1 over all parts, is
            at least the paper's proximity / ‖y‖₁ wherever that is positive, and is negative for parts that push the
            state away (suppression).
        backend: ``"auto"``, ``"cpu"`` (native), ``"triton"``, ``"cuda"`` or ``"reference"`` (PyTorch).
        dense: exact: keep the importances of all sub-edges; None: while all layers together take less than 1 GB.
        floor: importance above which sub-edges are kept; routes can be extracted at any threshold from here on.
        thresholds: certified: rows are refined until no decision at these is open. At other thresholds, a route that
            meets an open decision runs the model once more to refine it.
        tolerance: certified: largest relative error of a normaliser's estimate, and so of every importance.
        bias: ``"part"``: output and value biases are one part without a source token; ``"value"``: the value bias stays
            inside the sub-edges; ``"exclude"``: the constant part is left out of the normalisation.
        threads: threads of the native kernels; 0 for OpenMP's default (``OMP_NUM_THREADS``).
        neurons: also split every FFN into its neurons (``trace.neurons(layer)``).
    """

    precision: str = "certified"
    measure: str = "proximity"
    backend: str = "auto"
    dense: bool | None = None
    floor: float = DEFAULT_FLOOR
    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    tolerance: float = 1e-2
    bias: str = "part"
    threads: int = 0
    neurons: bool = False

    def check(self) -> Options:
        """Itself; ``ValueError`` or ``TypeError`` for a value that makes no sense, by its name."""
        one_of("precision", self.precision, PRECISIONS)
        one_of("measure", self.measure, MEASURES)
        one_of("bias mode", self.bias, BIAS_MODES)
        if self.measure == "signed" and self.precision == "exact":
            raise ValueError(
                "measure='signed' is known exactly with precision='certified'; precision='exact' is about proximities"
            )
        if self.dense and self.precision == "certified":
            raise ValueError(
                "dense importances need precision='exact'; 'certified' keeps sub-edges above the floor and "
                "stores nothing else"
            )
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must lie in [0, 1), got {self.floor}")
        if self.floor == 0 and self.precision == "certified":
            raise ValueError(
                "floor must be above 0 with precision='certified'; to have all sub-edges, use precision='exact'"
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {self.tolerance}")
        for threshold in self.thresholds:
            if not 0 <= threshold < 1:
                raise ValueError(f"thresholds must lie in [0, 1), got {threshold}")
        return self

    def on(self, device: Any) -> Options:
        """For tensors on a device: with the backend that serves them, and the thresholds that are of use."""
        backend = choose_backend(self.backend, torch.empty(0, dtype=torch.float32, device=device))
        use = sorted({float(t) for t in self.thresholds if t >= self.floor}) if self.measure == "proximity" else ()
        return replace(self, backend=backend, thresholds=tuple(use), dense=bool(self.dense))


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """``ValueError`` unless it is one of these."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, known))}")


def names(but: Iterable[str] = ()) -> tuple[str, ...]:
    """Of all options, but for some."""
    return tuple(f.name for f in fields(Options) if f.name not in set(but))


def defaults(but: Iterable[str] = ()) -> dict[str, Any]:
    return {f.name: f.default for f in fields(Options) if f.name in names(but) and f.default is not MISSING}


def taken(given: Mapping[str, Any], function: str, but: Iterable[str] = (), beside: Iterable[str] = ()) -> Options:
    """The options that keywords give, not checked yet; ``TypeError`` for one that there is not, with the nearest of
    them and of what the function takes ``beside``.
    """
    known = names(but)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *beside], 1)
            also = f": did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{also}")
    return Options(**given)


def shown(but: Iterable[str] = ()) -> Callable[[F], F]:
    """A decorator: the signature that ``help()`` and editors show has the options in the place of ``**options``."""

    def show(function: F) -> F:
        plain = inspect.signature(function)
        given = [p for p in plain.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        own = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(Options)
            if f.name in names(but) and f.name not in plain.parameters
        ]
        function.__signature__ = plain.replace(parameters=[*given, *own])  # type: ignore[attr-defined]
        return function

    return show
