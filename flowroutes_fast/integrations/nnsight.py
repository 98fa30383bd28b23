"""Models of nnsight and nnterp: :func:`flowroutes_fast.trace` takes them as they are.

nnsight wraps a transformers model and stays around it; we run the wrapped model with our own capture, so attention
keeps its implementation (no eager weights) and the wrapper is untouched. A trace of ours is one plain forward pass:
what a ``with model.trace():`` block or ``model.edit()`` changes is not part of it, so both are refused instead of being
ignored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flowroutes_fast.capture.hooks import unwrap
from flowroutes_fast.integrations import require
from flowroutes_fast.results.lazy import LazyTrace
from flowroutes_fast.results.trace import Refine
from flowroutes_fast.system.memory import available_memory
from flowroutes_fast.tracing.trace import trace as trace_model

AT_LEAST, BELOW = "0.7", "0.9"
ACCESSOR = "__source_accessor__"
REMOTE = "routes are computed here, from the model's own weights, also of a model whose traces run with remote=True"


def trace(model: Any, tokenizer: Any, text: Any, **options: Any) -> Any:
    """:func:`flowroutes_fast.trace` of the transformers model inside an nnsight or nnterp one.

    Args:
        model: a ``LanguageModel``, ``TransformersModel``, ``NNsight`` or ``StandardizedTransformer``; loaded first
            (``model.dispatch()``) if it has no weights yet.
        tokenizer: None for the model's own. text, options: as for :func:`flowroutes_fast.trace`.

    Raises:
        ValueError: see :func:`torch_model`, and those of :func:`flowroutes_fast.trace`. OSError: weights that cannot be
            loaded.
        ImportError: an nnsight version that is not supported.
    """
    module = torch_model(model)
    with _as_written(module):
        found = trace_model(
            module, getattr(model, "tokenizer", None) if tokenizer is None else tokenizer, text, **options
        )
    for one in found if isinstance(found, list) else [found]:
        if one.refine is not None:
            one.refine = _refiner(one.refine, weakref.ref(model))
        if isinstance(one, LazyTrace):
            one.source.around = _around(weakref.ref(model))
    return found


def torch_model(model: Any) -> nn.Module:
    """The transformers model inside an nnsight or nnterp one, with its weights, for everything else here that takes a
    model.

    Raises:
        ValueError: called inside a block of the model's ``trace()``; a model with edits; a part of a model, or one that
            is not of transformers; weights that do not fit into memory. OSError: weights that cannot be loaded.
        ImportError: an nnsight version that is not supported.
    """
    require("nnsight", "nnsight", at_least=AT_LEAST, below=BELOW)
    _check_idle(model)
    if edits := getattr(model, "_edits", None) or getattr(model, "_default_mediators", None):  # from 0.8 on, and before
        raise ValueError(
            f"this model has {len(edits)} edits (model.edit()), which routes know nothing of: trace the unedited "
            f"model (model.clear_edits())"
        )
    if not isinstance(unwrap(model._module), PreTrainedModel):
        raise ValueError(
            f"'{model.path}' of this nnsight model is a {type(model._module).__name__}, not a transformers language "
            f"model: give the whole model"
        )
    if getattr(model, "dispatched", True) is False:
        _dispatch(model)
    return model._module


def _check_idle(model: Any) -> None:
    if model.interleaver.interleaving:
        raise ValueError(
            "flowroutes_fast was called inside a block of this model's trace(): it would run a forward pass of its "
            "own, without what the "
            "block changes; call it before or after the block"
        )


@contextmanager
def _as_written(module: nn.Module) -> Iterator[None]:
    """No rewritten forwards: nnsight before 0.8 rewrites those whose ``.source`` was read, and the next pass may run a
    function kept from an earlier one instead of asking transformers for its attention function."""
    rewritten = [(m, m.__dict__.pop(ACCESSOR)) for m in module.modules() if ACCESSOR in m.__dict__]
    try:
        yield
    finally:
        for m, accessor in rewritten:
            m.__dict__[ACCESSOR] = accessor


def _refiner(refine: Refine, model: weakref.ref[Any]) -> Refine:
    """A trace's second run of the model, under the same conditions as its first."""

    def again(rows: Any) -> Any:
        if (alive := model()) is None:
            return refine(rows)
        _check_idle(alive)
        with _as_written(alive._module):
            return refine(rows)

    return again


def _around(model: weakref.ref[Any]) -> Callable[[], AbstractContextManager[None]]:
    """What holds while rows of a lazy trace run again."""

    @contextmanager
    def around() -> Iterator[None]:
        if (alive := model()) is None:
            yield
            return
        _check_idle(alive)
        with _as_written(alive._module):
            yield

    return around


def _dispatch(model: Any) -> None:
    """Load the weights of a model that nnsight has only built on the meta device."""
    name = getattr(model, "repo_id", None) or model._module.config.name_or_path
    size, room = sum(p.numel() * p.element_size() for p in model._module.parameters()), available_memory()
    if not torch.cuda.is_available() and room is not None and size > room:
        raise ValueError(
            f"the weights of {name} are not loaded; they take {size / 1e9:.1f} GB and {room / 1e9:.1f} GB of memory "
            f"are free: {REMOTE}; "
            f"stream them (flowroutes_fast.open_streaming), or load them yourself (model.dispatch()) if they will be "
            f"quantised"
        )
    try:
        model.dispatch()
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(f"the weights of {name} are not loaded and cannot be: {reason.rstrip('.:')}; {REMOTE}") from error
