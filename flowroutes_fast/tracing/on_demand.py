"""Routes on demand: a pass whose layers are kept, and rows of them evaluated when a route reaches them."""

from __future__ import annotations

import inspect
import math
import mmap
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import Layer
from flowroutes_fast.capture.kept import (
    Changed,
    KeptLayer,
    can_be_lean,
    check_first_keys,
    close_rows,
    run_positions,
    running,
)
from flowroutes_fast.models.families import blocks_of
from flowroutes_fast.models.weights import state_and_places
from flowroutes_fast.system.ambient import in_neutral
from flowroutes_fast.system.memory import available_device_memory, available_memory
from flowroutes_fast.tracing.importances import LayerImportances, importances
from flowroutes_fast.tracing.options import Options
from flowroutes_fast.tracing.rows import RowTable, importances_of, prepared

WHOLE_BYTES = (
    2**31
    # all that layers leave is kept by reference up to here and a quarter of the free memory, unless a budget says
    # otherwise
)
TIERS = ("whole", "inputs", "host", "disk", "cache")


class States:
    """What a pass over one prompt left, layer by layer, for rows to be evaluated from.

    Args:
        model: the model, of which only a weak reference is kept.
        options: how rows are evaluated.
        n_layers: of the model. budget: most bytes that may be kept in memory; None: what :data:`WHOLE_BYTES` and the
            free memory say.
        prompts: of the same pass, each with states of its own, that share the memory.
    """

    def __init__(self, model: nn.Module, options: Options, n_layers: int, budget: int | None, prompts: int = 1) -> None:
        self.model, self.options, self.n_layers, self.prompts = weakref.ref(model), options, n_layers, prompts
        self.budget = None if budget is None else budget // prompts
        self.layers: list[KeptLayer] = []
        self.traced = state_and_places(model)
        self._last: tuple[KeptLayer, Tensor] | None = None  # the layer before, and what it gave
        self.tier = ""
        self.lock = threading.RLock()
        self.around: Callable[[], AbstractContextManager[Any]] = (
            nullcontext  # what must hold while the model is asked, see the integrations
        )

    def keep(self, layer: Layer) -> None:
        """Take a layer as it was captured; the first one decides what is kept of all."""
        if not self.tier:
            self.tier = self._tier_for(layer)
        kept = KeptLayer(layer, self.tier != "whole" and can_be_lean(layer), self.options.neurons)
        follows = self._last is not None and layer.state is not None and torch.equal(self._last[1], layer.state)
        if self.tier == "host":
            _move(kept, torch.device("cpu"))
        elif self.tier == "disk":
            _to_disk(kept)
        self.layers.append(kept)
        if self._last is not None:
            self._expect(*self._last, kept, follows)
        self._last = kept, layer.resid_post
        if len(self.layers) == self.n_layers:
            self._expect(*self._last, None, False)
            self._last = None

    def _expect(self, kept: KeptLayer, output: Tensor, after: KeptLayer | None, follows: bool) -> None:
        """What rows of a layer must give when they run again; where the layer after it does not have it, it is kept
        too.
        """
        kept.expect(output, after, follows)
        if kept.lean and not (follows and after is not None and after.lean) and self.tier in ("host", "disk"):
            span = kept.spans[-1]
            span.output = output.detach().cpu() if self.tier == "host" else _mapped(output)
            kept.note_versions()

    def append(self, layers: list[Layer]) -> None:
        """All layers of the tokens that follow."""
        with self.lock:
            for kept, layer in zip(self.layers, layers, strict=True):
                kept.append(layer)
            for kept, after, layer, following in zip(
                self.layers, [*self.layers[1:], None], layers, [*layers[1:], None], strict=True
            ):
                follows = (
                    following is not None
                    and following.state is not None
                    and torch.equal(layer.resid_post, following.state)
                )
                kept.expect(layer.resid_post, after, follows)

    def _tier_for(self, layer: Layer) -> str:
        whole, lean = (size_of([KeptLayer(layer, kept)]) * self.n_layers for kept in (False, can_be_lean(layer)))
        device = layer.resid_post.device
        elsewhere = "host" if device.type != "cpu" else "disk"
        if self.budget is not None:
            return "whole" if whole <= self.budget else "inputs" if lean <= self.budget else elsewhere
        free, free_there = available_memory(), available_device_memory(device) if device.type == "cuda" else None
        host = math.inf if free is None else free / self.prompts  # unknown: as much as is asked for
        there = host if free_there is None else free_there / self.prompts
        if whole <= min(WHOLE_BYTES / self.prompts, there / 4):
            return "whole"
        if lean <= there / 2:
            return "inputs"
        return elsewhere if lean <= host / 2 else "disk"

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory (tier ``disk``: of the files)."""
        return size_of(self.layers)

    def release(self) -> None:
        with self.lock:
            self.layers.clear()

    def by(self, options: Options) -> States:
        """The same states, rows of which are evaluated with other options; they are released together."""
        made = copy(self)
        made.options = options
        return made

    def rows(self, layer: int, positions: np.ndarray) -> Layer:
        """A layer at some positions (sorted), as it was captured, within :meth:`session`."""
        alive = self.model()
        assert alive is not None
        return self.layers[layer].rows(alive, torch.from_numpy(positions), False)

    @contextmanager
    def session(self) -> Iterator[None]:
        """While this lasts rows are evaluated, by one thread at a time.

        Raises:
            ValueError: states that were released, a model that is gone or has changed.
        """
        with self.lock, self.around():  # a bridge of TransformerLens has other weights in its model's place
            alive = self._alive()
            lean = [kept.block for kept in self.layers if kept.lean]
            with running(alive, lean) if lean else nullcontext():
                yield

    def _alive(self) -> nn.Module:
        if not self.layers:
            raise ValueError(
                "the states of this trace were released: rows that were not evaluated before cannot be now; trace again"
            )
        alive = self.model()
        if alive is None:
            raise ValueError(
                "the model of this lazy trace is gone, and rows that were not evaluated before need it: keep it, or "
                "trace again"
            )
        if state_and_places(alive) != self.traced:
            raise ValueError(
                "the model has changed since it was traced (its weights, where they are, or which "
                "adapters act): trace again"
            )
        return alive

    @in_neutral
    def evaluate(self, layer: int, queries: np.ndarray, whole: bool = False) -> LayerImportances | RowTable:
        """Importances of some rows ``queries`` (sorted) of a layer, within :meth:`session`; ``whole``: whatever the
        tolerance.
        """
        alive = self.model()
        assert alive is not None
        rows = torch.from_numpy(queries)
        kept = self.layers[layer]
        kept.check_written()
        if (made := prepared(kept, self.options)) is not None and (
            found := importances_of(made, rows, self.options, whole)
        ) is not None:
            return found
        taken = kept.with_weights(kept.rows(alive, rows, self.options.neurons))
        return importances(taken, self.options, torch.ones(len(rows), dtype=torch.bool) if whole else None)


def size_of(layers: Sequence[KeptLayer]) -> int:
    """Bytes of the storages that layers keep alive, each once."""
    storages = {s.data_ptr(): s.nbytes() for kept in layers for t in kept.tensors() for s in [t.untyped_storage()]}
    return sum(storages.values())


def _move(kept: KeptLayer, device: torch.device) -> None:
    """Keys, values and inputs of a lean layer to another device, where nothing else of it is."""
    if not kept.lean:
        return
    kept.key, kept.value = (None if t is None else t.to(device) for t in (kept.key, kept.value))
    for span in kept.spans:
        assert span.layer.state is not None
        span.layer = replace(span.layer, state=span.layer.state.to(device))
    kept.note_versions()


def _to_disk(kept: KeptLayer) -> None:
    """The same into a file without a name, mapped back: its pages leave memory when others need it. OSError for a
    full disk.
    """
    if not kept.lean:
        return
    kept.key, kept.value = (None if t is None else _mapped(t) for t in (kept.key, kept.value))
    for span in kept.spans:
        assert span.layer.state is not None
        span.layer = replace(span.layer, state=_mapped(span.layer.state))
    kept.note_versions()


def _mapped(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    with tempfile.TemporaryFile(prefix="flowroutes-states-") as file:
        try:
            file.write(flat.numpy().data)
            file.flush()
        except OSError as error:
            raise OSError(
                error.errno, f"states of a lazy trace cannot be written to {tempfile.gettempdir()}: {error.strerror}"
            ) from error
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(found, dtype=tensor.dtype).view(tensor.shape)


class CachedStates(States):
    """Keys and values that the caller's cache has, and nothing else: positions that a route reaches run once more,
    through the layers below.

    Args:
        model, options: as for :class:`States`. ids: the prompt. cache: of transformers (``past_key_values``), one
            sequence.

    Raises:
        ValueError: a cache that does not hold these ids (keys and values of a few positions are computed and compared),
            or not all of them; a model with layers that have no keys and values, or without ``position_ids``.
    """

    def __init__(self, model: nn.Module, options: Options, ids: list[int], cache: Any) -> None:
        blocks = blocks_of(model)
        super().__init__(model, options, len(blocks), None)
        self.tier, self.blocks, self.ids = "cache", blocks, torch.tensor(ids, dtype=torch.int64, device="cpu")
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"past_key_values cannot be used with {type(model).__name__}, which takes no position_ids: leave it out"
            )
        if odd := [b.index for b in blocks if b.attention is None or b.mixer is not None or b.family.hooked]:
            raise ValueError(
                f"past_key_values cannot be used with this model: layer {odd[0]} does not call transformers' "
                f"attention interface"
            )
        self.cache = [_of_cache(cache, layer, len(ids)) for layer in range(len(blocks))]
        self.output = self._begin()

    def _begin(self) -> Any:
        """A few positions, the last one with them."""
        tokens = len(self.ids)
        some = torch.tensor(sorted({0, tokens // 3, tokens // 2, tokens - 1}), dtype=torch.int64, device="cpu")
        alive = self.model()
        assert alive is not None
        try:
            check_first_keys(alive, self.ids, self.cache)
            layers, output = run_positions(alive, self.blocks, self.ids, some, self.cache, self.options.neurons)
        except Changed as error:
            raise ValueError(
                f"past_key_values does not belong to these ids and this model: {str(error).split(':')[0]} computes "
                f"other keys and values"
            ) from error
        self.layers = [
            KeptLayer.of_rows(layer, some, *kv, self.options.neurons)
            for layer, kv in zip(layers, self.cache, strict=True)
        ]
        return output

    @in_neutral
    def evaluate(self, layer: int, queries: np.ndarray, whole: bool = False) -> LayerImportances | RowTable:
        alive, positions = self.model(), torch.from_numpy(queries)
        assert alive is not None
        missing = positions[~self.layers[layer].known(positions)]
        if len(missing):
            last = len(self.ids) - 1
            # one that is known, to compare
            running = torch.cat([missing, torch.tensor([last], dtype=torch.int64, device="cpu")])
            layers, _ = run_positions(
                alive, self.blocks[: layer + 1], self.ids, running, self.cache, self.options.neurons
            )
            for kept, found in zip(self.layers, layers, strict=False):
                if not close_rows(found.resid_post[-1:], kept.spans[0].layer.resid_post[-1:]):
                    raise Changed(found.index, "outputs")
                kept.take(found, running)
        return super().evaluate(layer, queries, whole)


def _of_cache(cache: Any, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values ``[kv_head, token, d]`` in a cache of transformers; ``ValueError`` where they are
    not all there.
    """
    try:
        held = cache.layers[layer] if hasattr(cache, "layers") else cache[layer]
        key, value = (held.keys, held.values) if hasattr(held, "keys") and not callable(held.keys) else held[:2]
        shape = tuple(key.shape)
    except (IndexError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"past_key_values has no keys and values of layer {layer}: give the cache that the model returned"
        ) from error
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(
            f"past_key_values must be of one sequence [1, kv_head, token, d], got keys {list(shape)} in layer {layer}"
        )
    if shape[2] < tokens:
        raise ValueError(
            f"past_key_values holds {shape[2]} of {tokens} tokens in layer {layer} (a sliding window, or another "
            f"prompt): leave it out"
        )
    return key[0, :, :tokens].detach(), value[0, :, :tokens].detach()
