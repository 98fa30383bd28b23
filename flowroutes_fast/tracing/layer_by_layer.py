"""Layer by layer through many prompts: every layer's weights come in once, its work can be kept, and a killed run goes
on.

A model's forward pass is taken apart without knowing it: once with blocks that hand their input on, which shows what
else each block is called with (masks, rotary angles); then block by block with the real states; last with blocks that
hand over the final states, for logits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import Layer, checker, forward_options, last_logits, prepared, watched
from flowroutes_fast.loading.layer_feed import Feed
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.tracing.importances import LayerImportances
from flowroutes_fast.tracing.resume import States, Store, identity_of

__all__ = ["Store", "identity_of", "run"]
Importances = Callable[[int, Layer], "LayerImportances | None"]


@dataclass
class Call:
    """What a block is called with beside the states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # are the states an argument with a name?

    def __call__(self, block: nn.Module, state: Tensor) -> Any:
        return block(hidden_states=state, **self.kwargs) if self.by_name else block(state, *self.args, **self.kwargs)


@dataclass
class Group:
    """Prompts that pass a layer together, padded on the right."""

    members: list[int]
    ids: Tensor  # [prompt, token]
    mask: Tensor | None  # [prompt, token]; None without padding
    lengths: list[int]
    calls: list[Call] = field(default_factory=list)  # per block


def group_of(prompts: list[list[int]], members: list[int], device: torch.device) -> Group:
    """Some prompts, padded on the right with their last token."""
    chosen = [prompts[i] for i in members]
    longest = max(map(len, chosen))
    ids = torch.tensor([p + p[-1:] * (longest - len(p)) for p in chosen], device=device)
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in chosen], device=device)
    lengths = [len(p) for p in chosen]
    return Group(members, ids, mask if len(set(lengths)) > 1 else None, lengths)


def run(
    model: nn.Module,
    prompts: list[list[int]],
    groups: list[list[int]],
    importances: Importances,
    *,
    neurons: bool = False,
    feed: Feed | None = None,
    device: torch.device | None = None,
    step: Callable[[], Any] | None = None,
    store: Store | None = None,
    budget: float = float("inf"),
) -> list[tuple[list[LayerImportances], Tensor | None]]:
    """Per prompt its layers and last logits. ``importances(prompt, layer)`` is called as each layer of each prompt has
    run (None: left out).

    Args:
        groups: which prompts pass a layer together.
        feed: where weights come from, if they are not in memory.
        step: called after each layer.
        store: where finished layers are kept and found.
        budget: bytes of states that may wait in memory.
    """
    device = torch.device("cpu") if device is None else device
    blocks = blocks_of(model)
    found: list[list[LayerImportances]] = [[] for _ in prompts]
    together = [group_of(prompts, members, device) for members in groups]
    states = States(store.folder if store else None, budget, store.run if store else "")
    done = store.finished if store else 0
    check = checker(model, blocks)
    check.seen.update(range(done))

    def keep(results: list[LayerImportances | None]) -> None:
        for prompt, result in enumerate(results):
            if result is not None:
                found[prompt].append(result)
        if step is not None:
            step()

    with prepared(model, blocks), feed.running() if feed else nullcontext(), ExitStack() as stack:
        stack.callback(states.close)
        extras = store.extras if store else -1
        with _ends(model, feed):
            for g, group in enumerate(together):
                first = _rehearse(model, blocks, group, extras, upto=len(blocks) if done else 1)
                if not done:
                    states.put(0, g, first)
        for n in range(done):
            keep(store.read(n))  # type: ignore[union-attr]
        for n, block in enumerate(blocks[done:], done):
            results: list[LayerImportances | None] = [None] * len(prompts)
            following = n + 1 if n + 1 < len(blocks) else None
            with feed.layer(n, block.module, following) if feed else nullcontext():
                for g, group in enumerate(together):
                    members = group.members

                    def on_item(
                        item: int, layer: Layer, members: list[Any] = members, results: list[Any] = results
                    ) -> None:
                        results[members[item]] = importances(members[item], layer)

                    spans = [slice(0, length) for length in group.lengths]
                    with watched(block, spans, neurons, on_item, check, g):
                        output = group.calls[n](block.module, states.get(n, g, device))
                    states.put(n + 1, g, _state_of(output))
                    if n == 0 and isinstance(output, tuple):
                        extras = len(output) - 1
                    del output
            check.judge()  # before anything of this layer is kept
            if n == 0:  # now it is known what blocks return
                with _ends(model, feed):
                    for group in together:
                        _rehearse(model, blocks, group, extras, upto=len(blocks))
            if store:
                store.write(n, results, extras)
            states.drop(n, len(together))
            keep(results)
        if feed:
            feed.release()
        check.finish()
        last = _logits(model, blocks, together, states, extras, feed, device)
    return [(layers, last.get(prompt)) for prompt, layers in enumerate(found)]


class _Caught(Exception):
    """Enough of a forward pass has been seen."""


@contextmanager
def _instead(block: Block, forward: Callable[..., Any]) -> Iterator[None]:
    """A block that does something else, on this thread."""
    before, own, owner = block.module.__dict__.get("forward"), block.module.forward, threading.get_ident()

    def here(*args: Any, **kwargs: Any) -> Any:
        return (forward if threading.get_ident() == owner else own)(*args, **kwargs)

    block.module.forward = here  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del block.module.forward
        else:
            block.module.forward = before  # type: ignore[method-assign]


@contextmanager
def _ends(model: nn.Module, feed: Feed | None, last: bool = False) -> Iterator[None]:
    """The embedding, and with ``last`` the unembedding, stay in memory while every group passes them."""
    with ExitStack() as stack:
        if feed is not None:
            stack.enter_context(feed.module(model.get_input_embeddings()))  # type: ignore[operator]
            head = model.get_output_embeddings() if last else None  # type: ignore[operator]
            if head is not None:
                stack.enter_context(feed.module(head))
        yield


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
    if args:
        return Call(args[1:], kwargs, False), args[0]
    return Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"}, True), kwargs["hidden_states"]


def _state_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _as_output(state: Tensor, extras: int) -> Any:
    """As blocks of this model return states: alone (extras < 0) or first in a tuple."""
    return state if extras < 0 else (state, *[None] * extras)


def _forward(model: nn.Module, blocks: list[Block], group: Group) -> Any:
    lasts = sorted({length - 1 for length in group.lengths})
    keep = 1 if group.mask is None else torch.tensor(lasts, device=group.ids.device)
    return model(input_ids=group.ids, **forward_options(model, group.mask, keep, blocks[0].family.last_logits))


def _rehearse(model: nn.Module, blocks: list[Block], group: Group, extras: int, upto: int) -> Tensor:
    """Note what each of the first ``upto`` blocks is called with; returns the states that enter the first."""
    entered: list[Tensor] = []
    group.calls.clear()

    def note(*args: Any, **kwargs: Any) -> Any:
        call, state = _split(args, kwargs)
        entered.append(state)
        group.calls.append(call)
        if len(entered) == upto:
            raise _Caught
        return _as_output(state, extras)

    try:
        with ExitStack() as stack:
            for block in blocks[:upto]:
                stack.enter_context(_instead(block, note))
            _forward(model, blocks, group)
    except _Caught:
        return entered[0]
    raise ValueError(f"this model called {len(entered)} of its {len(blocks)} blocks")


def _logits(
    model: nn.Module,
    blocks: list[Block],
    together: list[Group],
    states: States,
    extras: int,
    feed: Feed | None,
    device: torch.device,
) -> dict[int, Tensor]:
    """Last logits per prompt: the model's own end on the final states."""
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(_ends(model, feed, last=True))
        for block in blocks[:-1]:
            stack.enter_context(_instead(block, lambda *args, **kwargs: _as_output(_split(args, kwargs)[1], extras)))
        for g, group in enumerate(together):
            final = states.get(len(blocks), g, device)
            with _instead(blocks[-1], lambda *args, final=final, **kwargs: _as_output(final, extras)):
                output = _forward(model, blocks, group)
            lasts = [length - 1 for length in group.lengths]
            for item, logits in last_logits(output, sorted(set(lasts)), lasts).items():
                found[group.members[item]] = logits
    return found
