"""A trace whose rows are evaluated when a route, a table or an index asks for them, each once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowroutes_fast.ops.neurons import NeuronImportances
from flowroutes_fast.results.route import Route
from flowroutes_fast.results.trace import Trace
from flowroutes_fast.results.trace_file import ARRAYS, NEURON

# of a row's importances, where it differs
FIELD = {"normaliser_low": "low", "normaliser_high": "high", "attention_bias": "bias"}
HEADS = ("heads", "heads_low", "heads_high")
SCALARS = ("normaliser_low", "normaliser_high", "attention_residual", "attention_bias", "mixer", "ffn", "ffn_residual")


def _table(found: Any) -> np.ndarray:
    """Importances of some rows of a layer as one array."""
    columns = [getattr(found, FIELD.get(name, name)).numpy()[:, None] for name in SCALARS]
    return np.concatenate([*columns, *(getattr(found, name).numpy() for name in HEADS)], 1)


class RowSource(Protocol):
    """Evaluates rows of a trace's layers: :class:`flowroutes_fast.tracing.on_demand.States`."""

    tier: str
    around: Any  # a context that holds while the model is asked

    @property
    def nbytes(self) -> int: ...
    def session(self) -> AbstractContextManager[None]: ...
    def evaluate(self, layer: int, queries: np.ndarray, whole: bool = False) -> Any: ...
    def release(self) -> None: ...


class Rows:
    """What is known of one layer: rows in the order in which they were evaluated, and their sub-edges."""

    def __init__(self, tokens: int) -> None:
        self.place = np.full(tokens, -1, np.int64)  # where a position's row is, -1: nowhere yet
        self.chunk = np.full(tokens, -1, np.int64)  # which of ``edges`` has its sub-edges
        self.table = np.zeros((0, 0), np.float32)  # [row, SCALARS, then heads, heads_low, heads_high]
        self._room = self.table  # the table and room for more rows
        # positions [row], index [3, n], importance [n] by evaluation
        self.edges: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.neurons: dict[str, np.ndarray] = {}

    @property
    def known(self) -> np.ndarray:
        """Positions that have been evaluated, rising."""
        return np.flatnonzero(self.place >= 0)

    def column(self, name: str) -> Any:
        """Where one of the arrays is in the table."""
        if name in HEADS:
            heads = (self.table.shape[1] - len(SCALARS)) // 3
            start = len(SCALARS) + HEADS.index(name) * heads
            return slice(start, start + heads)
        return SCALARS.index(name)

    def put(self, queries: np.ndarray, found: Any) -> None:
        """Rows as they were evaluated; they replace what was known of the same positions. All or nothing."""
        table = found.table if hasattr(found, "table") else _table(found)
        index, value = found.edges if hasattr(found, "table") else (t.numpy() for t in found.edges)
        index[0] = queries[index[0]]
        edges = self.edges
        if len(self.table) and (self.place[queries] >= 0).any():
            again = np.zeros(len(self.place), bool)
            again[queries] = True
            edges = [
                (rows[~again[rows]], old[:, keep], values[keep])
                for rows, old, values in edges
                for keep in [~again[old[0]]]
            ]
        start, stop = len(self.table), len(self.table) + len(queries)
        neurons = self._with_neurons(queries, getattr(found, "neurons", None))
        room = self._room
        if len(room) < stop:
            room = np.empty((2 * stop if start else stop, table.shape[1]), np.float32)
            if start:
                room[:start] = self.table
        room[start:stop] = table
        place, chunk = self.place.copy(), self.chunk.copy()
        place[queries], chunk[queries] = np.arange(start, stop), len(edges)
        self._room, self.table, self.neurons = room, room[:stop], neurons
        self.edges, self.chunk, self.place = [*edges, (queries, index, value)], chunk, place

    def sub_edges(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index ``[3, n]`` and importance ``[n]`` of some rows, in the order that a full trace lists them."""
        chunks = [self.edges[at] for at in np.unique(self.chunk[queries]) if at >= 0]
        if not chunks:
            return np.zeros((3, 0), np.int32), np.zeros(0, np.float32)
        if len(chunks) == 1 and np.array_equal(chunks[0][0], queries):
            index, value = chunks[0][1:]
            return index, value
        wanted = np.zeros(len(self.place), bool)
        wanted[queries] = True
        parts = [(index[:, keep], value[keep]) for _, index, value in chunks for keep in [wanted[index[0]]]]
        index, value = np.concatenate([i for i, _ in parts], 1), np.concatenate([v for _, v in parts])
        order = np.argsort(index[0], kind="stable")
        return index[:, order], value[order]

    def _with_neurons(self, queries: np.ndarray, found: Any) -> dict[str, np.ndarray]:
        if found is None:
            return {}
        new = {name: getattr(found, name).numpy() for name in NEURON}
        new["index"] = np.concatenate([queries[new["index"][0]][None].astype(new["index"].dtype), new["index"][1:]])
        known = self.neurons or self.no_neurons()
        keep = ~np.isin(known["index"][0], queries)
        index = np.concatenate([known["index"][:, keep], new["index"]], 1)
        importance = np.concatenate([known["importance"][keep], new["importance"]])
        order = np.argsort(index[0], kind="stable")
        merged = {"index": index[:, order], "importance": importance[order]}
        for name in ("low", "high"):
            merged[name] = known[name].copy()
            merged[name][queries] = new[name]
        return merged

    def no_neurons(self) -> dict[str, np.ndarray]:
        unknown = np.full(len(self.place), np.nan, np.float32)
        return {
            "index": np.zeros((2, 0), np.int32),
            "importance": np.zeros(0, np.float32),
            "low": unknown,
            "high": unknown.copy(),
        }

    def grow(self, tokens: int) -> None:
        """More positions, none of them known."""
        more = np.full(tokens - len(self.place), -1, np.int64)
        self.place, self.chunk = np.concatenate([self.place, more]), np.concatenate([self.chunk, more])
        for name in ("low", "high"):
            if name in self.neurons:
                more = np.full(tokens - len(self.neurons[name]), np.nan, np.float32)
                self.neurons[name] = np.concatenate([self.neurons[name], more])


class OnDemand(Tensor):
    """An array ``[layer, query, ...]`` of a lazy trace: an index evaluates the rows that it names, everything else
    those of all positions.
    """

    of_trace: LazyTrace
    array: str

    @staticmethod
    def of(trace: LazyTrace, name: str) -> OnDemand:
        shape = (trace.n_layers, len(trace.tokens), *((trace.n_heads,) if name in HEADS else ()))
        made = torch.zeros((), dtype=torch.float32, device="cpu").expand(shape).as_subclass(OnDemand)  # no memory
        made.of_trace, made.array = trace, name
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (
            func is Tensor.__getitem__
            and type(args[0]) is cls
            and isinstance(args[1], (int, np.integer, slice, tuple, list))
        ):
            return args[0].of_trace.at(args[0].array, args[1])
        args, kwargs = _all_rows(args), _all_rows(kwargs)
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self.array} {list(self.shape)} of a lazy trace: an index evaluates the rows it names>"


_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_sparse")
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.is_complex,
}


def _all_rows(value: Any) -> Any:
    if isinstance(value, OnDemand):
        return value.of_trace.whole(value.array)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_all_rows, value))
    return {name: _all_rows(one) for name, one in value.items()} if isinstance(value, dict) else value


class LazyTrace(Trace):
    """A :class:`Trace` whose rows are evaluated from kept states when they are reached (``trace(..., lazy=True)``).

    ``route``, ``token_attribution``, ``edges(layer, positions=…)`` and an index such as ``trace.heads[layer,
    position]`` evaluate the rows they need, once. Whole arrays (``trace.heads.sum()``), ``to_html``, ``edges(layer)``
    and ``neurons(layer)`` need all rows (of a layer) and evaluate them. States are kept until :meth:`release`.

    Raises:
        ValueError: rows that were not evaluated while the model was there and the same: it is gone, has changed, or
            states were released.
    """

    def __init__(self, source: RowSource, n_heads: int, neurons: bool, **known: Any) -> None:
        self.__dict__.update(
            {
                "precision": "exact",
                "measure": "proximity",
                "backend": "reference",
                "bias": "part",
                "tolerance": 0.0,
                "thresholds": (),
                "work": {},
                "mixers": [],
                "prediction": [],
                "timings": {},
                "inputs": {},
                "chat": [],
                "dense": None,
                "refine": None,
            }
            | known
            | {"lazy": True, "source": source, "_n_heads": n_heads, "_neurons": neurons}
        )
        self.layers = [Rows(len(self.tokens)) for _ in self.shapes]

    @property
    def n_heads(self) -> int:
        return int(self.__dict__["_n_heads"])

    def __getattr__(self, name: str) -> Any:
        """The arrays ``[layer, query, ...]``."""
        if name in ARRAYS and "layers" in self.__dict__:
            return OnDemand.of(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def sparse(self) -> list[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """As a full trace has them: all rows are evaluated."""
        self.evaluate()
        return self._sparse()

    @property
    def neuron_parts(self) -> list[NeuronImportances] | None:  # type: ignore[override]
        """As a full trace has them: all rows are evaluated."""
        if not self.split_neurons:
            return None
        self.evaluate()
        return self._neuron_parts()

    @property
    def split_neurons(self) -> bool:
        """Were FFNs split into neurons?"""
        return bool(self.__dict__["_neurons"])

    def _neuron_parts(self) -> list[NeuronImportances]:
        found = []
        for rows in self.layers:
            arrays = rows.neurons or rows.no_neurons()
            found.append(NeuronImportances(*(torch.from_numpy(arrays[name]) for name in NEURON)))
        return found

    # --- evaluating rows

    def evaluate(
        self,
        layers: int | Sequence[int] | np.ndarray | None = None,
        positions: int | Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Evaluate rows, those that have not been before: of these layers and positions, None for all."""
        chosen = range(self.n_layers) if layers is None else [self._layer(one) for one in np.atleast_1d(layers)]
        queries = np.arange(len(self.tokens)) if positions is None else np.asarray(self._positions(positions), np.int64)  # type: ignore[arg-type]
        if any((self.layers[layer].place[queries] < 0).any() for layer in chosen):
            with self._session():
                for layer in chosen:
                    self.reach(layer, queries)

    def reach(self, layer: int, queries: np.ndarray) -> None:
        missing = queries[self.layers[layer].place[queries] < 0]
        if len(missing):
            with self._session():
                missing = queries[self.layers[layer].place[queries] < 0]  # another thread may have been faster
                if len(missing):
                    self._take(layer, missing, False)

    def decide(self, layer: int, queries: np.ndarray) -> None:
        with self._session():
            self._take(layer, queries, True)

    def _take(self, layer: int, queries: np.ndarray, whole: bool) -> None:
        found = self.source.evaluate(layer, queries, whole)
        self.layers[layer].put(queries, found)
        for name in ("bounded", "evaluated", "refined", "exhausted"):
            self.work[name] = self.work.get(name, 0) + getattr(found.counts, name)

    def extend(self, tokens: list[str], token_ids: list[int]) -> None:
        """Tokens that were generated, whose states have been kept; in a chat they are the assistant's message."""
        if self.chat:
            role, first, stop = self.chat[-1]
            going_on = role == "assistant" and stop == len(self.tokens)
            first = first if going_on else len(self.tokens)
            self.chat = [
                *(self.chat[:-1] if going_on else self.chat),
                ("assistant", first, len(self.tokens) + len(tokens)),
            ]
        self.tokens, self.token_ids = [*self.tokens, *tokens], [*self.token_ids, *token_ids]
        for rows in self.layers:
            rows.grow(len(self.tokens))

    def complete(self) -> Trace:
        self.evaluate()
        known = {
            f.name: getattr(self, f.name)
            for f in fields(Trace)
            if f.name not in (*ARRAYS, "sparse", "neuron_parts", "lazy")
        }
        arrays: dict[str, Any] = {name: self._array(name) for name in ARRAYS}
        neurons = self._neuron_parts() if self.split_neurons else None
        return Trace(**known, **arrays, sparse=self._sparse(), neuron_parts=neurons)

    def release(self) -> None:
        """Let the kept states go; what has been evaluated stays, other rows are refused from now on."""
        self.source.release()

    # --- what was evaluated

    def counts(self) -> list[int]:
        """Rows evaluated so far, per layer, each time one was: what :meth:`evaluated` counts from."""
        return [len(rows.table) for rows in self.layers]

    def evaluated(self, layer: int, since: int = 0) -> np.ndarray:
        """Positions (rising) whose rows of a layer have been evaluated, or evaluated anew, after its first
        ``since`` (see :meth:`counts`).
        """
        return np.flatnonzero(self.layers[layer].place >= since)

    def values(self, name: str, layer: int, queries: np.ndarray) -> np.ndarray:
        rows = self.layers[layer]
        found: np.ndarray = rows.table[rows.place[queries], rows.column(name)]
        return found

    def sub_edges(self, layer: int, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        self.reach(layer, queries)
        index, value = self.layers[layer].sub_edges(queries)
        query, key, head = index.astype(np.int64)
        return query, key, head, value

    def at(self, name: str, index: Any) -> Tensor:
        """An array, indexed: the rows that the first two places of the index name are evaluated."""
        chosen = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(one, (int, np.integer, slice, list)) for one in chosen)
        layers: Any = np.arange(self.n_layers)
        positions: Any = np.arange(len(self.tokens))
        if plain and Ellipsis not in chosen and len(chosen) <= 3:
            layers = np.atleast_1d(layers[chosen[0]])
            positions = np.atleast_1d(positions[chosen[1]]) if len(chosen) > 1 else positions
        self.evaluate(layers, np.unique(positions))
        return self._array(name)[index]

    def whole(self, name: str) -> Tensor:
        """An array with all rows evaluated."""
        self.evaluate()
        return self._array(name)

    def _array(self, name: str) -> Tensor:
        """``[layer, query, ...]``, NaN where nothing was evaluated."""
        shape = (self.n_layers, len(self.tokens), *((self.n_heads,) if name in HEADS else ()))
        out = np.full(shape, np.nan, np.float32)
        for layer, rows in enumerate(self.layers):
            if len(known := rows.known):
                found = rows.table[rows.place[known], rows.column(name)]
                if found.ndim == 2:  # a layer with fewer heads than others has zeros
                    out[layer, known] = 0
                    out[layer, known, : found.shape[1]] = found
                else:
                    out[layer, known] = found
        return torch.from_numpy(out)

    def _sparse(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.from_numpy(index), torch.from_numpy(value))
            for rows in self.layers
            for index, value in [rows.sub_edges(rows.known)]
        ]

    def _normalisers(self) -> tuple[Tensor, Tensor]:
        low, high = (
            np.concatenate(
                [
                    np.zeros(0, np.float32),
                    *(self.values(name, i, rows.known) for i, rows in enumerate(self.layers) if len(rows.table)),
                ]
            )
            for name in ("normaliser_low", "normaliser_high")
        )
        return torch.from_numpy(low).double(), torch.from_numpy(high).double()

    @property
    def certificate(self) -> dict[str, float | int | str]:
        """As of a full trace, for the rows evaluated so far; ``states``: what was kept (``whole``, ``inputs``, ``host``
        or ``disk``), ``state_bytes``: how much."""
        return super().certificate | {"states": self.source.tier, "state_bytes": self.source.nbytes}

    def route(self, *args: Any, **options: Any) -> Route:
        with self._walk():
            return super().route(*args, **options)

    def token_attribution(self, *args: Any, **options: Any) -> Any:
        with self._walk():
            return super().token_attribution(*args, **options)

    def _stored(self) -> dict[str, Tensor]:
        tensors = {name: self._array(name) for name in ARRAYS}
        for layer, (index, value) in enumerate(self._sparse()):
            tensors[f"edge_index.{layer}"], tensors[f"edge_importance.{layer}"] = index, value
        for layer, found in enumerate(self._neuron_parts() if self.split_neurons else []):
            tensors |= {f"neuron_{name}.{layer}": getattr(found, name) for name in NEURON}
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: what has been evaluated, no states and no model."""
        return vars(self) | {"source": Released(self.source.tier), "refine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> LazyTrace:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__ | {"layers": deepcopy(self.layers), "work": dict(self.work)})
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyTrace:
        """A copy that evaluates from the same states."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(
            {name: value if name == "source" else deepcopy(value, memo) for name, value in self.__dict__.items()}
        )
        return made

    # --- one session per walk, entered when its first row is missing

    @contextmanager
    def _walk(self) -> Iterator[None]:
        if _walks.stack is not None:
            yield
            return
        with ExitStack() as _walks.stack:
            try:
                yield
            finally:
                _walks.entered.clear()
                stack, _walks.stack = _walks.stack, None
                stack.close()

    @contextmanager
    def _session(self) -> Iterator[None]:
        if _walks.stack is None:
            with self.source.session():
                yield
            return
        if id(self) not in _walks.entered:
            _walks.stack.enter_context(self.source.session())
            _walks.entered.add(id(self))
        yield

    def __repr__(self) -> str:
        known = sum(int((rows.place >= 0).sum()) for rows in self.layers)
        return f"Lazy{super().__repr__()[:-1]}, {known} of {self.n_layers * len(self.tokens)} rows evaluated)"


class _Walks(threading.local):
    """The walk that this thread is on."""

    def __init__(self) -> None:
        self.stack: ExitStack | None = None
        self.entered: set[int] = set()


_walks = _Walks()


class Released:
    """In the place of states that are not there any more: of a pickled trace."""

    nbytes = 0

    def __init__(self, tier: str) -> None:
        self.tier, self.around = tier, None

    @contextmanager
    def session(self) -> Iterator[None]:
        raise ValueError(
            "a trace from another process has no states: rows that were not evaluated before it was "
            "pickled cannot be now"
        )
        yield

    def evaluate(self, layer: int, queries: np.ndarray, whole: bool = False) -> Any:
        raise AssertionError("rows are evaluated within a session")

    def release(self) -> None: ...
