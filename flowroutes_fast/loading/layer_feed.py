"""Weights of one layer at a time: read ahead, cast or decoded once, kept in buffers that every layer uses again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.loading.checkpoints import Source, read_through

ALIGNED = 64  # bytes


LAYER_SHARE = 0.75  # of the budget that a whole layer, or two, may take; the rest is for activations and waiting states


@dataclass(frozen=True)
class Plan:
    """How weights come in: bytes of the largest layer and of the largest single module; layers whole or not; how
    many at a time.
    """

    layer: int
    piece: int
    whole: bool
    slots: int

    @property
    def weights(self) -> int:
        """Bytes of weights in memory at a time."""
        return max(self.slots * self.layer if self.whole else 0, self.piece)


def plan(
    model: Any,
    blocks: list[nn.Module],
    budget: int | None,
    ahead: bool,
    dtype: torch.dtype | None = None,
    ends: torch.dtype | None = None,
) -> Plan:
    """What fits into ``budget`` bytes (None: anything). ``ahead``: is a second layer worth having (decoded, or on a
    GPU)?

    ``dtype`` of the floating point parameters and ``ends`` of the (un)embedding, if not as the model has them.
    """
    outside = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}

    def size(p: Tensor) -> int:
        other = ends if id(p) in outside and ends is not None else dtype
        kind = other if other is not None and p.is_floating_point() else p.dtype
        return -(-p.numel() * kind.itemsize // ALIGNED) * ALIGNED

    layer = max(sum(size(p) for p in block.parameters()) for block in blocks)
    piece = max(sum(size(p) for p in module.parameters(recurse=False)) for module in model.modules())
    room = float("inf") if budget is None else LAYER_SHARE * budget
    return Plan(layer, piece, layer <= room, 2 if ahead and 2 * layer <= room else 1)


class Arena:
    """One allocation that a layer's tensors are laid out in. Fresh pages cost more than the numbers that are
    written to them.
    """

    def __init__(self, size: int, device: torch.device, pinned: bool = False) -> None:
        self.flat = torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.used = 0

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        start, end = self.used, self.used + shape.numel() * dtype.itemsize
        self.used = -(-end // ALIGNED) * ALIGNED
        return self.flat[start:end].view(dtype).view(shape)


class Feed(Mapping[str, Tensor]):
    """A model's weights by name, as accelerate's hooks ask for them: in the model's dtype, on the device it computes
    with.

    Within :meth:`layer` those of one block are at hand, and the next block's are on their way: always in the system's
    cache; with ``slots=2`` decoded, cast and on the device as well. On a GPU they go through pinned memory, on a stream
    of their own.
    """

    def __init__(
        self,
        source: Source,
        model: nn.Module,
        blocks: list[nn.Module],
        stored: dict[str, str],
        device: torch.device,
        plan: Plan,
    ) -> None:
        self.source, self.device, self.plan = source, device, plan
        self.whole, self.slots = plan.whole, plan.slots
        self.stored = stored
        self.dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        prefixes = {id(module): f"{name}." for name, module in model.named_modules()}
        self.names = [[n for n in self.dtypes if n.startswith(prefixes[id(block)])] for block in blocks]
        self.here: dict[str, Tensor] = {}  # of the layer
        self.held: dict[str, Tensor] = {}  # of modules outside the layers that stay for a while
        self.holding = 0
        self.arenas: dict[int, tuple[Arena, Arena | None]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: dict[int, torch.cuda.Event] = {}  # slot -> when the layer that used it last had finished
        self.pool: ThreadPoolExecutor | None = None
        self.ahead: tuple[int, Future[Any]] | None = None
        self.stop = threading.Event()

    def __getitem__(self, name: str) -> Tensor:
        if name in self.here:
            return self.here[name]
        stored = self.stored[name]
        if stored in self.held:  # tied: the same tensor twice
            return self.held[stored]
        found = self.source.read(stored).to(self.device, self.dtypes[name])
        if self.holding:
            self.held[stored] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def bytes_of(self, layer: int) -> int:
        """Bytes on disk of one layer."""
        return sum(self.source.places[n].count for n in self._stored(layer) if n in self.source.places)

    def _stored(self, layer: int) -> list[str]:
        return list(dict.fromkeys(self.stored[name] for name in self.names[layer]))

    @contextmanager
    def layer(self, index: int, module: nn.Module, following: int | None) -> Iterator[None]:
        """One block's weights are in the module while this lasts; ``following``: the block to bring in meanwhile."""
        ready = self._take(index)
        try:
            if self.whole:
                self.here = ready if isinstance(ready, dict) else self._load(index, warm=ready is None)
                if self.stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self.stream)
            with self.module(module) if self.whole else nullcontext():
                if following is not None:
                    self._send(following)
                yield
        finally:
            self.here = {}
            if self.stream is not None:
                self.free[index % self.slots] = torch.cuda.Event()
                self.free[index % self.slots].record(torch.cuda.current_stream(self.device))

    @contextmanager
    def module(self, module: nn.Module) -> Iterator[None]:
        """A module outside the layers stays in memory while this lasts."""
        hooks = list(_hooks(module))
        self.holding += 1
        try:
            for part, hook in hooks:
                hook.pre_forward(part)
                hook.offload = False
            yield
        finally:
            self.holding -= 1
            if not self.holding:
                self.held.clear()
            for part, hook in hooks:
                hook.offload = True
                if hasattr(hook, "tied_pointers_to_remove"):
                    hook.post_forward(part, None)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The thread that reads ahead lives within this; buffers go when it ends."""
        self.stop.clear()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="flowroutes-read")
        try:
            yield
        finally:
            self.stop.set()
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = self.ahead = None
            self.arenas.clear()

    def release(self) -> None:
        """Let the layers' buffers go: none will come in any more."""
        self.arenas.clear()

    def _send(self, index: int) -> None:
        if self.pool is not None:
            ahead = self._load if self.whole and self.slots > 1 else self._warm
            self.ahead = (index, self.pool.submit(ahead, index))

    def _take(self, index: int) -> Any:
        """What was done ahead for this layer: its tensors, True if its bytes are at hand, None for nothing."""
        if self.ahead is None:
            return None
        which, future = self.ahead
        self.ahead = None
        found = future.result()
        return found if which == index else None

    def _warm(self, index: int) -> bool:
        return (
            read_through((self.source.places[n] for n in self._stored(index) if n in self.source.places), self.stop)
            >= 0
        )

    def _load(self, index: int, warm: bool = True) -> dict[str, Tensor]:
        """One layer in this slot's buffers, aligned as torch aligns its own: matrix products round by alignment."""
        if warm:
            self._warm(index)
        slot = index % self.slots
        if slot in self.free:
            self.free[slot].synchronize()
        arena, pinned = self._arenas(slot)
        found: dict[str, Tensor] = {}
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for name in self.names[index]:
                stored, dtype = self.stored[name], self.dtypes[name]
                if stored in found:
                    continue
                read = self.source.read(stored)
                if pinned is not None:
                    read = pinned.take(read.shape, dtype).copy_(read)
                found[stored] = arena.take(read.shape, dtype).copy_(read, non_blocking=True)
                del read  # its pages are unmapped before the next tensor's come
        return {name: found[self.stored[name]] for name in self.names[index]}

    def _arenas(self, slot: int) -> tuple[Arena, Arena | None]:
        if slot not in self.arenas:
            size = self.plan.layer
            pinned = Arena(size, torch.device("cpu"), pinned=True) if self.device.type == "cuda" else None
            self.arenas[slot] = (Arena(size, self.device), pinned)
        for arena in self.arenas[slot]:
            if arena is not None:
                arena.used = 0
        return self.arenas[slot]


def _hooks(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None and getattr(hook, "offload", False):
            yield part, hook
