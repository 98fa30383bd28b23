"""What is kept of a pass, so that rows of its layers can be had afterwards: everything by reference, or block inputs,
keys and values alone.

In the second case the rows that are asked for run once more through their block's own modules, their queries meeting
the stored keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import (
    ROW_WISE,
    Call,
    Layer,
    Stored,
    _here,
    forward_options,
    prepared,
    some_rows,
    watched,
)
from flowroutes_fast.models.causes import put_on
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.ops.attention import causal_mask

MANY = 32  # spans, before all but the first are joined
FIRST_ROOM = 64  # rows that a span of tokens to come has memory for
NAMES = tuple(f.name for f in fields(Layer))
# of a row that ran twice, relative
SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Changed(ValueError):
    """A layer does not compute what it did in the pass that was traced."""

    def __init__(self, layer: int, what: str) -> None:
        super().__init__(
            f"layer {layer}: {what} differ from those of the traced pass: the model, or a hook on it, has changed "
            f"since; trace again"
        )


@dataclass
class Span:
    """Some rows of a layer: a prompt's, those of a token that was generated after it, or those that ran on a cache."""

    positions: Tensor  # [row], rising, on the CPU
    layer: Layer  # without keys and values; of a lean span without more than ``state`` and ``call``
    mask: Tensor | None  # additive [query, key] or [head, query, key], for the keys there were
    lean: bool
    output: Tensor | None = None  # of a lean span: [row, d_model], what its rows must give when they run again


class Growing:
    """Rows of tokens that follow one another, in memory that doubles where it is full: one span however many they are.

    ``layer``: all rows so far, without keys and values.
    """

    def __init__(self, layer: Layer) -> None:
        self.names = [name for name in (*ROW_WISE, "query") if getattr(layer, name) is not None]
        self.of = {name: self._first(layer, name) for name in self.names}  # the same tensor under several names
        self.room: dict[str, Tensor] = {}
        self.count, self.layer = 0, layer
        self.add(layer)

    def _first(self, layer: Layer, name: str) -> str:
        return next(other for other in self.names if getattr(layer, other) is getattr(layer, name))

    def fits(self, layer: Layer) -> bool:
        """Has the layer the same tensors, of the same types, under the same names?"""
        return all((getattr(layer, name) is not None) == (name in self.of) for name in (*ROW_WISE, "query")) and all(
            getattr(layer, name) is getattr(layer, other)
            and getattr(layer, name).dtype == self.room[other].dtype
            and getattr(layer, name).device == self.room[other].device
            for name, other in self.of.items()
        )

    def add(self, layer: Layer) -> None:
        start, self.count = self.count, self.count + len(layer.resid_post)
        views: dict[str, Tensor] = {}
        for name in set(self.of.values()):
            rows, dim = getattr(layer, name), int(name == "query")
            if name not in self.room or self.room[name].shape[dim] < self.count:
                shape = list(rows.shape)
                shape[dim] = max(2 * self.count, FIRST_ROOM)
                larger = torch.empty(shape, dtype=rows.dtype, device=rows.device)
                if start:
                    larger.narrow(dim, 0, start).copy_(self.room[name].narrow(dim, 0, start))
                self.room[name] = larger
            self.room[name].narrow(dim, start, self.count - start).copy_(rows)
            views[name] = self.room[name].narrow(dim, 0, self.count)
        rows_of_all: dict[str, Any] = {name: views[other] for name, other in self.of.items()}
        self.layer = replace(layer, state=None, **rows_of_all)


class KeptLayer:
    """One layer of a pass, of which rows are taken; more rows may be appended.

    Args:
        layer: as captured; lean: keep ``state``, keys and values alone (see :func:`can_be_lean`). neurons: of the FFN
            will be asked for.
    """

    def __init__(self, layer: Layer, lean: bool, neurons: bool = False) -> None:
        self.block: Block = layer.block
        self.lean = lean
        self.key, self.value = (None if t is None else _own(t) if lean else t for t in (layer.key, layer.value))
        self.window, self.device = layer.window, layer.resid_post.device
        self.n_heads = 0 if layer.query is None else len(layer.query)
        self.spans: list[Span] = []
        self.growing: Growing | None = None  # the span of tokens that were generated
        self.prepared: Any = None  # see tracing/rows.py
        self.neurons = neurons
        self.weights = weights_of(layer, neurons)
        self.take(layer, torch.arange(len(layer.resid_post), dtype=torch.int64, device="cpu"))

    @classmethod
    def of_rows(cls, layer: Layer, positions: Tensor, key: Tensor, value: Tensor, neurons: bool) -> KeptLayer:
        """Rows of a layer at some positions, and keys and values of all."""
        made = cls(replace(layer, key=key, value=value, mask=None), False, neurons)
        made.spans[0].positions = positions
        return made

    def append(self, layer: Layer) -> None:
        """The layer of the tokens that follow; its keys and values are those of all tokens, or of the new ones
        alone.
        """
        if layer.key is not None and layer.value is not None:
            assert self.key is not None
            assert self.value is not None
            new, before = len(layer.resid_post), self.key.shape[1]
            whole = layer.key.shape[1] == before + new
            key, value = layer.key, layer.value
            if not whole:  # a cache that keeps the last keys alone, or attention that gave its weights
                layer = replace(layer, mask=_last_keys(layer, before + new))
            self.key = key if whole else torch.cat([self.key, key[:, -new:]], 1)
            self.value = value if whole else torch.cat([self.value, value[:, -new:]], 1)
        last = int(self.spans[-1].positions[-1]) + 1
        positions = torch.arange(last, last + len(layer.resid_post), dtype=torch.int64, device="cpu")
        if self.lean or layer.mask is not None or not self._grow(layer, positions):
            self.take(layer, positions)

    def _grow(self, layer: Layer, positions: Tensor) -> bool:
        """Rows that follow in the span of those that followed before; False where they do not go together."""
        layer = replace(layer, key=None, value=None, mixed=None, weight=None, call=None)
        if self.growing is None:
            if len(self.spans) != 1:
                return False
            self.growing = Growing(layer)
            self.spans.append(Span(positions, self.growing.layer, None, False))
        elif self.spans[-1].layer is self.growing.layer and self.growing.fits(layer):
            self.growing.add(layer)
            self.spans[-1] = Span(torch.cat([self.spans[-1].positions, positions]), self.growing.layer, None, False)
        else:
            return False
        self.note_versions()
        return True

    def take(self, layer: Layer, positions: Tensor) -> None:
        """Rows of the layer, at these positions; those that are there already stay."""
        if self.spans and bool((known := self.known(positions)).any()):
            layer, positions = some_rows(layer, (~known).nonzero()[:, 0]), positions[~known]
        if not len(positions):
            return
        if self.lean:
            assert layer.state is not None
            empty: dict[str, Any] = dict.fromkeys((*ROW_WISE, "query", "key", "value", "mask", "weight", "sinks"))
            kept = replace(layer, **empty, state=_own(layer.state))
        else:
            kept = replace(layer, key=None, value=None, mask=None, mixed=None, weight=None, call=None)
        self.spans.append(Span(positions, kept, layer.mask, self.lean))
        if len(self.spans) > MANY and not self.lean and all(span.mask is None for span in self.spans[1:]):
            later = self.spans[1:]
            places = [span.positions for span in later]
            merged = _joined([replace(span.layer, key=None, window=self.window) for span in later], places)
            self.spans[1:] = [Span(torch.cat(places).sort().values, merged, None, False)]
        self.note_versions()

    def note_versions(self) -> None:
        """How often each tensor has been written to by now: from here on nobody may."""
        self.written = [(t, t._version) for t in self.tensors() if not t.is_inference()]

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept, for its size."""
        for tensor in (self.key, self.value):
            if tensor is not None:
                yield tensor
        for span in self.spans:
            values = [span.mask, span.output, *(getattr(span.layer, name) for name in NAMES)]
            yield from (t for t in values if isinstance(t, Tensor))

    def rows(self, model: nn.Module, positions: Tensor, neurons: bool) -> Layer:
        """The layer at these positions (sorted). A lean layer's block runs again on them (within :func:`running`).

        Raises:
            Changed: its keys, values or states are not those of the pass.
        """
        self.check_written()
        found, places = [], []
        for span in self.spans:
            at = torch.searchsorted(span.positions, positions).clamp_max_(len(span.positions) - 1)
            inside = span.positions[at] == positions
            if bool(inside.all()):
                return self._of_span(span, positions, at, neurons)
            if bool(inside.any()):
                places.append(positions[inside])
                found.append(self._of_span(span, places[-1], at[inside], neurons))
        return _joined(found, places)

    def with_weights(self, layer: Layer, product: bool = True) -> Layer:
        """Rows of the layer, with W_O read once; :class:`Changed` if its weights are not those of the pass.

        ``product``: W_O is compared; False where the kernel that reads it does so.
        """
        if layer.query is not None:
            w_o = layer.output_weight()
            layer = replace(layer, weight=lambda: w_o)
        self.check_weights(weights_of(layer, self.neurons, None if product or not self.weights else self.weights[0]))
        return layer

    def check_weights(self, found: list[Tensor | None]) -> None:
        """:class:`Changed` unless these are what the first weights gave."""
        same = len(found) <= len(self.weights) and all(map(same_weights, found, self.weights))
        if not same:
            raise Changed(self.block.index, "weights")

    def check_written(self) -> None:
        """``ValueError`` if something that is kept has been written to."""
        if any(t._version != version for t, version in self.written):
            raise ValueError(
                f"layer {self.block.index}: states of the traced pass were written to after it (by the model, or a "
                f"hook on it): trace without lazy=True"
            )

    def known(self, positions: Tensor) -> Tensor:
        """Which of these positions it has rows of ``[position]`` (bool)."""
        return torch.isin(positions, torch.cat([span.positions for span in self.spans]))

    def _of_span(self, span: Span, positions: Tensor, at: Tensor, neurons: bool) -> Layer:
        n_key = 0 if self.key is None else self.key.shape[1]
        mask = None if span.mask is None else _padded(span.mask[..., at.to(span.mask.device), :], n_key)
        layer = (
            self._again(span, positions, at, mask, neurons)
            if span.lean
            else replace(some_rows(span.layer, at), state=None)
        )
        alone = None if mask is not None or self.key is None else positions
        key, value = (None if t is None else t.to(self.device) for t in (self.key, self.value))
        return replace(
            layer, key=key, value=value, mask=mask, positions=alone, window=self.window if mask is None else 0
        )

    def _again(self, span: Span, positions: Tensor, at: Tensor, mask: Tensor | None, neurons: bool) -> Layer:
        state, call = span.layer.state, span.layer.call
        assert self.key is not None
        assert self.value is not None
        assert state is not None
        assert call is not None
        device = self.device
        seen = causal_mask(positions.to(device), self.key.shape[1], self.window) if mask is None else mask
        stored = Stored(self.key.to(device), self.value.to(device), seen, positions)
        layer, key, value = run_rows(self.block, state[at.to(state.device)].to(device), call, at, stored, neurons)
        check_own(self.block.index, key, value, stored)
        if span.output is not None and not close_rows(layer.resid_post, span.output[at.to(span.output.device)]):
            raise Changed(self.block.index, "outputs")
        return layer

    def expect(self, output: Tensor, after: KeptLayer | None, follows: bool) -> None:
        """What the newest rows gave: by reference where the next layer (``after``) ``follows``, has it for its
        input.
        """
        if self.lean:
            span = self.spans[-1]
            span.output = after.spans[-1].layer.state if after is not None and after.lean and follows else _own(output)
            self.note_versions()


def can_be_lean(layer: Layer) -> bool:
    """Can rows of this layer run alone? Not those of mixers, which carry a state along, nor where attention gave
    its weights itself.
    """
    return (
        layer.query is not None
        and layer.block.mixer is None
        and layer.attention_function != ""
        and layer.state is not None
    )


def check_own(layer: int, key: Tensor, value: Tensor, stored: Stored) -> None:
    """:class:`Changed` unless rows that ran have the keys and values that are stored of them."""
    for what, own, kept in (("keys", key, stored.key), ("values", value, stored.value)):
        shared = kept[:, : own.shape[1]]  # those of an earlier layer, which the block was given
        if not (close(own, kept[:, stored.positions.to(kept.device)]) or close(own, shared)):
            raise Changed(layer, what)


PROBES = 997  # numbers that a probe repeats
SAME_WEIGHTS = 1e-4  # of products with a probe, relative to the largest


@functools.lru_cache(maxsize=8)
def probe(size: int, device: torch.device) -> Tensor:
    """Fixed numbers ``[size]`` between -1 and 1, float32; not to be written to."""
    return torch.arange(size, dtype=torch.int64, device=device).remainder(PROBES).float().mul(1.7).cos()


def weights_of(layer: Layer, neurons: bool, product: Tensor | None = None) -> list[Tensor | None]:
    """What rows of a layer are evaluated with beside what is kept of it, to be known again: products of matrices with a
    probe, and biases.

    ``product``: that of W_O ``[head * d_head]``, where it is compared elsewhere.
    """
    block, found = layer.block, list[Tensor | None]()
    if layer.query is not None and layer.value is not None:
        if product is None:
            flat = layer.output_weight().permute(2, 0, 1).flatten(1)  # a view where W_O views a linear layer
            product = probe(len(flat), flat.device) @ flat
        found = [product, *_biases(block.value_bias(), block.output_bias)]
    if neurons and block.down is not None:
        w_down = block.w_down()
        found += [w_down @ probe(w_down.shape[1], w_down.device), *_biases(block.down_bias)]
    return found


def _biases(*given: Tensor | None) -> list[Tensor | None]:
    return [None if bias is None else bias.clone() for bias in given]


def same_weights(found: Tensor | None, wanted: Tensor | None) -> bool:
    """Equal up to another order of sums."""
    if found is wanted:
        return True
    if found is None or wanted is None or found.shape != wanted.shape:
        return False
    return bool(
        (found.float() - wanted.to(found.device).float()).abs().max() <= SAME_WEIGHTS * wanted.float().abs().max()
    )


def close_rows(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to what another order of sums does in this type, row by row ``[row, d]``."""
    off = (found.float() - wanted.to(found.device).float()).abs().amax(1)
    return bool(
        (off <= SAME.get(found.dtype, 1e-3) * wanted.to(found.device).float().abs().amax(1).clamp_min(1e-6)).all()
    )


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to what another order of sums does in this type."""
    worst = (found.float() - wanted.to(found.device).float()).abs().max()
    return bool(worst <= SAME.get(found.dtype, 1e-3) * wanted.float().abs().max().clamp_min(1e-6))


@contextmanager
def running(model: nn.Module, blocks: list[Block]) -> Iterator[None]:
    """While this lasts, rows of lean layers can run."""
    with prepared(model, blocks):
        yield


def run_rows(
    block: Block, state: Tensor, call: Call, at: Tensor, stored: Stored, neurons: bool
) -> tuple[Layer, Tensor, Tensor]:
    """A block, run on the rows ``at`` of a sequence, whose inputs are ``state``: their layer, and their own keys
    and values.
    """
    found: list[Layer] = []
    spans = [slice(0, len(state))]
    here = (at + call.first).to(state.device)
    args = tuple(_at_rows(value, here, call) for value in call.args)
    kwargs = {name: _at_rows(value, here, call) for name, value in call.kwargs.items()}
    if "attention_mask" in kwargs:
        kwargs["attention_mask"] = None
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    with watched(block, spans, neurons, lambda item, layer: found.append(layer), _Unchecked()):  # type: ignore[arg-type]
        _here.stored[id(block.attention)] = stored
        try:
            block.module(state[None], *args, **kwargs)
        finally:
            del _here.stored[id(block.attention)]
    (layer,) = found
    assert layer.key is not None
    assert layer.value is not None
    return replace(layer, weight=None, mixed=None, state=None, call=None), layer.key, layer.value


class _Unchecked:
    """In the place of the check that parts add up, which the pass went through; rows that run again are compared
    with it.
    """

    def enters(self, *_: Any) -> None: ...
    def leaves(self, *_: Any) -> None: ...
    def __call__(self, *_: Any) -> None: ...


def _at_rows(value: Any, rows: Tensor, call: Call) -> Any:
    """What a block is given per token (positions, rotations), at some rows of one sequence."""
    from transformers.cache_utils import Cache

    if isinstance(value, Cache):
        return None  # the rows' keys and values are in it already, and must not get into it again
    if isinstance(value, Tensor):
        if value.dim() == 4 and value.shape[-2:] == (call.tokens, call.tokens):
            return None  # a mask: the stored one is taken (rotations have three dimensions)
        if value.dim() >= 2 and value.shape[1] == call.tokens and value.shape[0] in (1, call.batch):
            return value[call.item if value.shape[0] > 1 else 0][rows.to(value.device)][None]
        return value[rows.to(value.device)] if value.dim() == 1 and len(value) == call.tokens else value
    if isinstance(value, (list, tuple)):
        return type(value)(_at_rows(one, rows, call) for one in value)
    if type(value) is dict:
        return {name: _at_rows(one, rows, call) for name, one in value.items()}
    if isinstance(value, MutableMapping):  # keys and values that layers share: a block writes its own there
        found = copy(value)
        found.update({name: _of_item(one, call) for name, one in value.items()})
        return found
    return value


def _of_item(value: Any, call: Call) -> Any:
    """What layers share of one sequence of a batch, without the padding before it."""
    if isinstance(value, (list, tuple)):
        return type(value)(_of_item(one, call) for one in value)
    if isinstance(value, Tensor) and value.dim() == 4 and len(value) == call.batch:
        return value[call.item : call.item + 1, :, call.first :]
    return value


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of something larger."""
    return (
        tensor
        if tensor.untyped_storage().nbytes() <= tensor.nbytes
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _last_keys(layer: Layer, tokens: int) -> Tensor:
    """The mask of rows that saw the last keys of ``tokens`` alone."""
    mask = layer.mask
    n_key = layer.key.shape[1] if mask is None else mask.shape[-1]  # type: ignore[union-attr]
    if mask is None:
        queries = torch.arange(n_key - len(layer.resid_post), n_key, dtype=torch.int64, device=layer.resid_post.device)
        mask = causal_mask(queries, n_key)
    return torch.nn.functional.pad(mask, (tokens - n_key, 0), value=float("-inf"))


def _padded(mask: Tensor, n_key: int) -> Tensor:
    """A mask with the keys that came later hidden."""
    return torch.nn.functional.pad(mask, (0, n_key - mask.shape[-1]), value=float("-inf"))


def _joined(parts: list[Layer], places: list[Tensor]) -> Layer:
    """Rows of several spans as one layer, in the order of their ``places`` (positions ``[row]`` of each part)."""
    order = torch.cat(places).argsort()

    def cat(name: str, dim: int = 0) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim).index_select(dim, order.to(tensors[0].device))

    first = parts[0]
    mask = None
    if any(part.mask is not None for part in parts):
        n_key = first.key.shape[1]  # type: ignore[union-attr]
        masks = [
            causal_mask(place.to(first.resid_post.device), n_key, part.window) if part.mask is None else part.mask
            for part, place in zip(parts, places, strict=True)
        ]
        heads = max((len(m) for m in masks if m.dim() == 3), default=0)
        if heads:
            masks = [m if m.dim() == 3 else m.expand(heads, *m.shape) for m in masks]
        mask = torch.cat(masks, -2).index_select(-2, order.to(first.resid_post.device))
    positions = None if mask is not None or first.key is None else torch.cat(places)[order]
    rows = {name: cat(name) for name in ROW_WISE}
    query = None if first.query is None else cat("query", 1)
    return replace(
        first, query=query, mask=mask, positions=positions, window=0 if mask is not None else first.window, **rows
    )


def check_first_keys(model: nn.Module, ids: Tensor, cache: list[tuple[Tensor, Tensor]]) -> None:
    """:class:`Changed` unless the first layer's keys and values of all tokens are those of a cache; nothing behind
    them is computed.
    """
    blocks = blocks_of(model)[:1]
    positions = torch.arange(len(ids), dtype=torch.int64, device="cpu")

    def compare(key: Tensor, value: Tensor) -> None:
        check_own(0, key[0], value[0], Stored(*cache[0], None, positions))
        raise Enough

    options = forward_options(model, None, 1, blocks[0].family.last_logits) | {
        "position_ids": positions[None].to(cache[0][0].device)
    }
    with prepared(model, blocks):
        _here.kept[id(blocks[0].attention)] = {}
        _here.stored[id(blocks[0].attention)] = Stored(*cache[0], None, positions, compare)
        try:
            model(input_ids=ids[None].to(cache[0][0].device), **options)
        except Enough:
            pass
        finally:
            del _here.stored[id(blocks[0].attention)], _here.kept[id(blocks[0].attention)]


class Enough(Exception):
    """Ends a forward pass whose further layers are not asked for."""


def run_positions(
    model: nn.Module,
    blocks: list[Block],
    ids: Tensor,
    positions: Tensor,
    cache: list[tuple[Tensor, Tensor]],
    neurons: bool,
) -> tuple[list[Layer], Any]:
    """The first ``blocks`` of a model at some positions of a prompt, whose keys and values ``cache`` has: their layers,
    the model's output.

    Args:
        ids: ``[token]``; positions: ``[row]``, rising; cache: per layer keys and values ``[kv_head, token, d]``. The
            output is None where not all blocks run.

    Raises:
        Changed: keys or values of these rows are not those of the cache.
    """
    every, found = blocks_of(model), list[Layer]()
    device = cache[0][0].device

    def take(item: int, layer: Layer) -> None:
        key, value = cache[layer.index]
        assert layer.key is not None
        assert layer.value is not None
        check_own(layer.index, layer.key, layer.value, Stored(key, value, None, positions))
        found.append(replace(layer, weight=None, mixed=None, state=None, call=None))
        if len(found) == len(blocks) < len(every):
            raise Enough

    options = forward_options(model, None, 1, blocks[0].family.last_logits) | {
        "position_ids": positions[None].to(device)
    }
    with prepared(model, blocks), ExitStack() as stack:
        for block in blocks:
            if found_on := put_on(model, block):
                raise ValueError(
                    f"layer {block.index}: {found_on} would act on other rows than in the pass that filled "
                    f"past_key_values: remove them, or "
                    "leave past_key_values out"
                )
            stack.enter_context(watched(block, [slice(0, len(positions))], neurons, take, _Unchecked()))  # type: ignore[arg-type]
            _here.stored[id(block.attention)] = Stored(*cache[block.index], None, positions)
            stack.callback(_here.stored.pop, id(block.attention), None)
        try:
            return found, model(input_ids=ids[positions][None].to(device), **options)
        except Enough:
            return found, None
