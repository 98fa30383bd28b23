"""Rows of a lazy trace from activations that another library keeps: nothing runs again, each row is checked as it
is read.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import Layer
from flowroutes_fast.system.ambient import in_neutral
from flowroutes_fast.tracing.importances import LayerImportances, importances
from flowroutes_fast.tracing.options import Options

Read = Callable[[Any, int, Tensor], Layer]  # model, layer, rows [row] (rising) -> the layer at these rows


class ReadRows:
    """Evaluates rows of layers that ``read`` gives; see :class:`flowroutes_fast.results.lazy.RowSource`.

    Args:
        model: whose weights ``read`` needs; only a weak reference is kept. kept: per layer its activations by role, by
            reference, which nobody may write to; ``"post"``: the states that it leaves ``[token, d_model]``.
        check: refuses a layer whose parts do not add up.
    """

    tier = "activations"

    def __init__(
        self,
        model: nn.Module,
        kept: list[dict[str, Tensor]],
        read: Read,
        check: Callable[[Layer], Layer],
        options: Options,
    ) -> None:
        self.model, self.kept, self.read, self.check, self.options = weakref.ref(model), kept, read, check, options
        self.written = [[(t, t._version) for t in layer.values() if not t.is_inference()] for layer in kept]
        self.largest: dict[int, Tensor] = {}
        self.lock = threading.RLock()
        self.around = nullcontext

    @property
    def nbytes(self) -> int:
        """Bytes of the activations, each storage once."""
        return sum(
            {
                s.data_ptr(): s.nbytes() for layer in self.kept for t in layer.values() for s in [t.untyped_storage()]
            }.values()
        )

    def release(self) -> None:
        with self.lock:
            self.kept, self.written = [], []

    @contextmanager
    def session(self) -> Iterator[None]:
        """While this lasts rows are evaluated, by one thread at a time.

        Raises:
            ValueError: activations that were released, a model that is gone.
        """
        with self.lock:
            if not self.kept:
                raise ValueError(
                    "the activations of this trace were released: rows that were not evaluated before cannot be now; "
                    "trace again"
                )
            if self.model() is None:
                raise ValueError(
                    "the model of this lazy trace is gone, and rows that were not evaluated before need "
                    "its weights: keep it"
                )
            yield

    @in_neutral
    def evaluate(self, layer: int, queries: np.ndarray, whole: bool = False) -> LayerImportances:
        """Importances of some rows ``queries`` (sorted) of a layer, within :meth:`session`; ``whole``: whatever the
        tolerance.

        Raises:
            ValueError: parts that do not add up in these rows, activations that were written to.
        """
        if any(t._version != version for t, version in self.written[layer]):
            raise ValueError(
                f"layer {layer}: activations were written to after the trace was made: trace again, without lazy=True"
            )
        model, rows = self.model(), torch.from_numpy(queries)
        self.check(self.read(model, layer, torch.cat([rows, self._largest(layer)]).unique()))
        return importances(
            self.read(model, layer, rows), self.options, torch.ones(len(rows), dtype=torch.bool) if whole else None
        )

    def _largest(self, layer: int) -> Tensor:
        """The row of a layer's largest state ``[1]``: what does not add up is measured against that, whichever rows
        are read.
        """
        if layer not in self.largest:
            self.largest[layer] = self.kept[layer]["post"].abs().amax(1).argmax(0, keepdim=True).cpu()
        return self.largest[layer]
