"""Layer by layer through many prompts: every layer's weights come in once, its work can be kept, and a killed run goes on.

A model's forward pass is taken apart without knowing it: once with blocks that hand their input on, which shows what else each block is
called with (masks, rotary angles); then block by block with the real states; last with blocks that hand over the final states, for logits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.capture import Layer, checker, forward_options, last_logits, prepared, watched
from flowroutes_fast.certify import Counts
from flowroutes_fast.feed import Feed
from flowroutes_fast.files import LOCK, claim, write_atomically, write_text
from flowroutes_fast.layer import LayerImportances
from flowroutes_fast.models.families import Block, blocks_of
from flowroutes_fast.neurons import NeuronImportances

FORMAT = 1
STATE = "run.json"
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


class States:
    """Residual states of the groups between two layers: in memory up to a budget, beyond it (or for a run that can go on) in files."""

    def __init__(self, folder: Path | None, budget: float) -> None:
        self.folder, self.budget = folder, budget
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.own: Path | None = None
        self.spilled = 0  # bytes written because memory was short

    def put(self, layer: int, group: int, state: Tensor) -> None:
        fits = sum(t.nbytes for t in self.kept.values()) + state.nbytes <= self.budget
        if fits:
            self.kept[layer, group] = state
        if self.folder is not None or not fits:
            _save(self._file(layer, group), {"state": state.contiguous().cpu()})
            self.spilled += 0 if fits else state.nbytes

    def get(self, layer: int, group: int, device: torch.device) -> Tensor:
        if (layer, group) in self.kept:
            return self.kept[layer, group]
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._file(layer, group), device=str(device))["state"]
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"the state of layer {layer} in '{self._file(layer, group)}' is damaged: {error}; start again") from error

    def drop(self, layer: int, groups: int) -> None:
        for group in range(groups):
            self.kept.pop((layer, group), None)
            if self.folder is not None or self.own is not None:
                self._file(layer, group).unlink(missing_ok=True)

    def _file(self, layer: int, group: int) -> Path:
        if self.folder is None and self.own is None:
            self.own = Path(tempfile.mkdtemp(prefix="flowroutes-states-"))
        return (self.folder or self.own) / f"state-{layer:03d}-{group:04d}.safetensors"  # type: ignore[operator]

    def close(self) -> None:
        self.kept.clear()
        if self.own is not None:
            shutil.rmtree(self.own, ignore_errors=True)


class Store:
    """Finished layers in a folder, so that a killed run goes on from the last one. One process at a time; removed by :meth:`finish`."""

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder), json.loads(json.dumps(identity))
        self.made = not self.folder.exists()
        self.lock = claim(self.folder)
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise

    def _open(self) -> None:
        self.finished, self.extras = 0, -1
        state = self.folder / STATE
        if not state.is_file():
            others = [p.name for p in self.folder.iterdir() if p.name != LOCK and not p.name.startswith((".", "state-", "layer-"))]
            if others:
                raise ValueError(f"'{self.folder}' holds other files ({others[0]}): give an empty or a new folder")
            return
        try:
            read = json.loads(state.read_text(encoding="utf-8"))
            before, self.finished, self.extras = read["identity"], int(read["finished"]), int(read["extras"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{state}' is damaged: {error}; remove the folder to start again") from error
        differing = sorted(k for k in {*before, *self.identity} if before.get(k) != self.identity.get(k))
        if differing:
            raise ValueError(
                f"'{self.folder}' holds another run (differing: {', '.join(differing)}): give a new folder, or remove it to start again"
            )

    def write(self, layer: int, results: list[LayerImportances | None], extras: int) -> None:
        """Keep one finished layer; the states behind it are there already."""
        tensors: dict[str, Tensor] = {}
        plain: list[Any] = []
        for prompt, result in enumerate(results):
            if result is None:
                plain.append(None)
                continue
            for name, value in _tensors_of(result):
                tensors[f"{prompt}.{name}"] = value.detach().cpu().contiguous().clone()
            plain.append({"shape": result.shape, "counts": asdict(result.counts)})
        _save(self.folder / f"layer-{layer:03d}.safetensors", tensors, {"prompts": json.dumps(plain)})
        self.finished, self.extras = layer + 1, extras
        write_text(self.folder / STATE, json.dumps({"identity": self.identity, "finished": self.finished, "extras": extras}))

    def read(self, layer: int) -> list[LayerImportances | None]:
        """The results of a finished layer, per prompt."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"layer-{layer:03d}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                plain = json.loads(file.metadata()["prompts"])
            return [None if known is None else _result(prompt, known, tensors) for prompt, known in enumerate(plain)]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is damaged: {error}; remove the folder to start again") from error

    def finish(self) -> None:
        """Remove what was kept: the run is done."""
        for path in (*self.folder.glob("layer-*.safetensors"), *self.folder.glob("state-*.safetensors"), self.folder / STATE):
            path.unlink(missing_ok=True)
        self.close()
        with suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)
            if self.made or not any(self.folder.iterdir()):
                self.folder.rmdir()

    def close(self) -> None:
        self.lock.release()


def identity_of(model: nn.Module, prompts: list[list[int]], feed: Feed | None, **settings: Any) -> dict[str, Any]:
    """What makes two runs the same."""
    if feed is not None:
        files = sorted({place.file for place in feed.source.places.values()})
        weights: list[tuple[Any, ...]] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    else:  # a few numbers of every tensor
        weights = [(n, p.detach().flatten()[:: max(1, p.numel() // 16)].double().cpu().tolist()) for n, p in model.named_parameters()]
    return {
        "format": FORMAT,
        "model": str(model.config.model_type),  # type: ignore[union-attr]
        "weights": hashlib.sha256(json.dumps(weights).encode()).hexdigest(),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        **{name: str(value) for name, value in settings.items()},
    }


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    except SafetensorError as error:
        raise OSError(f"cannot write '{path}' ({sum(t.nbytes for t in tensors.values()) / 1e6:.0f} MB): {error}") from error


def _tensors_of(result: LayerImportances) -> Iterator[tuple[str, Tensor]]:
    for entry in fields(result):
        value = getattr(result, entry.name)
        if entry.name == "edges":
            yield from (("edges index", value[0]), ("edges value", value[1]))
        elif isinstance(value, NeuronImportances):
            yield from ((f"neurons {f.name}", getattr(value, f.name)) for f in fields(value))
        elif isinstance(value, Tensor):
            yield entry.name, value


def _result(prompt: int, known: dict[str, Any], tensors: dict[str, Tensor]) -> LayerImportances:
    own = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{prompt}.")}
    edges = (own.pop("edges index"), own.pop("edges value"))
    neurons = {name.removeprefix("neurons "): own.pop(name) for name in list(own) if name.startswith("neurons ")}
    split = NeuronImportances(**neurons) if neurons else None
    dense = own.pop("dense", None)
    return LayerImportances(shape=known["shape"], counts=Counts(**known["counts"]), edges=edges, neurons=split, dense=dense, **own)


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
    """Per prompt its layers and last logits. ``importances(prompt, layer)`` is called as each layer of each prompt has run (None: left out).

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
    states = States(store.folder if store else None, budget)
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

                    def on_item(item: int, layer: Layer, members: list = members, results: list = results) -> None:
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


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
    if args:
        return Call(args[1:], kwargs, False), args[0]
    return Call((), {k: v for k, v in kwargs.items() if k != "hidden_states"}, True), kwargs["hidden_states"]


def _state_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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
    model: nn.Module, blocks: list[Block], together: list[Group], states: States, extras: int, feed: Feed | None, device: torch.device
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
