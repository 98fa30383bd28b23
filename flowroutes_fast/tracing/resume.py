"""A run that can go on: finished layers in a folder, states between layers, and what makes two runs the same.

``run.json`` is written last and says how many layers are finished; every file carries the digest of its content and of
the run it belongs to, so that what is damaged or another run's is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowroutes_fast.loading.layer_feed import Feed
from flowroutes_fast.loading.load import cache_folder
from flowroutes_fast.models.identity import code_of
from flowroutes_fast.ops.intervals import Counts
from flowroutes_fast.ops.neurons import NeuronImportances
from flowroutes_fast.system.files import (
    LOCK,
    claim,
    digest_of,
    said,
    state_of,
    temporary_folder,
    write_atomically,
    write_text,
)
from flowroutes_fast.tracing.importances import LayerImportances
from flowroutes_fast.version import __version__

FORMAT = 2
STATE = "run.json"
START_AGAIN = "remove the folder to start again"
SHOWN = 3  # differences that a refusal names
_OURS = re.compile(r"layer-\d{3,}\.safetensors|state-\d{3,}-\d{4,}\.safetensors")
_PASSING = {
    "training",
    "gradient_checkpointing",
    "max_seq_len_cached",
    "call_super_init",
    "_is_hf_initialized",
    "name_or_path",
    "warnings_issued",
}


class States:
    """Residual states of the groups between two layers: in memory up to a budget, beyond it (or for a run that can
    go on) in files.
    """

    def __init__(self, folder: Path | None, budget: float, run: str = "") -> None:
        self.folder, self.budget, self.run = folder, budget, run
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.own: tuple[Path, Callable[[], None]] | None = None
        self.spilled = 0  # bytes written because memory was short

    def put(self, layer: int, group: int, state: Tensor) -> None:
        fits = sum(t.nbytes for t in self.kept.values()) + state.nbytes <= self.budget
        if fits:
            self.kept[layer, group] = state
        if self.folder is not None or not fits:
            _save(self._file(layer, group), {"state": state}, self.run, durable=self.folder is not None)
            self.spilled += 0 if fits else state.nbytes

    def get(self, layer: int, group: int, device: torch.device) -> Tensor:
        if (layer, group) in self.kept:
            return self.kept[layer, group]
        file = self._file(layer, group)
        tensors, _ = _read(file, self.run, f"the state of layer {layer} in '{file}'")
        return tensors["state"].to(device)

    def drop(self, layer: int, groups: int) -> None:
        for group in range(groups):
            self.kept.pop((layer, group), None)
            if self.folder is not None or self.own is not None:
                with suppress(OSError):  # not needed any more, and removed at the next start
                    self._file(layer, group).unlink(missing_ok=True)

    def _file(self, layer: int, group: int) -> Path:
        if self.folder is None and self.own is None:
            self.own = temporary_folder("flowroutes-states-")
        folder = self.folder if self.folder is not None else self.own[0]  # type: ignore[index]
        return folder / f"state-{layer:03d}-{group:04d}.safetensors"

    def close(self) -> None:
        self.kept.clear()
        if self.own is not None:
            self.own[1]()
            self.own = None


class Store:
    """Finished layers in a folder, so that a killed run goes on from the last one, and a finished one is there at once.

    One process at a time. Nothing is removed when the run ends: the result is not written yet. :func:`discard` removes
    it.

    Raises:
        ValueError: the folder holds another run (what differs is named), other files, or damaged ones. OSError: it
            cannot be worked in.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(os.path.abspath(folder)), json.loads(json.dumps(identity))
        self.run = _digest_of_text(self.identity)
        self.files: dict[Path, tuple[int, ...]] = getattr(identity, "files", {})
        self.lock = claim(self.folder)
        try:
            self._open()
        except OSError as error:
            self.lock.release()
            raise OSError(f"cannot work in folder '{self.folder}': {said(error)}") from error
        except BaseException:
            self.lock.release()
            raise

    def _open(self) -> None:
        self.finished, self.extras = 0, -1
        names = sorted(path.name for path in self.folder.iterdir())
        if STATE in names:
            self._go_on(_state_in(self.folder / STATE))
        else:
            others = [name for name in names if not name.startswith(".") and not _OURS.fullmatch(name)]
            if others:
                raise ValueError(f"'{self.folder}' holds other files ({others[0]}): give an empty or a new folder")
        for name in names:  # of a killed run, behind what it had finished
            number = re.match(r"(layer|state)-(\d+)", name) if _OURS.fullmatch(name) else None
            if number and (
                int(number[2]) >= self.finished if number[1] == "layer" else int(number[2]) != self.finished
            ):
                with suppress(OSError):
                    (self.folder / name).unlink()

    def _go_on(self, read: dict[str, Any]) -> None:
        differing = differences(read["identity"], self.identity)
        if differing:
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            raise ValueError(
                f"'{self.folder}' holds another run (differing: {', '.join(differing[:SHOWN])}{more}): give a new "
                f"folder, or remove it to "
                "start again"
            )
        self.finished, self.extras = read["finished"], read["extras"]

    def write(self, layer: int, results: list[LayerImportances | None], extras: int) -> None:
        """Keep one finished layer; the states behind it are there already."""
        for file, then in self.files.items():
            if not file.exists() or state_of(file) != then:
                raise ValueError(f"'{file}' changed while the run went through it: {START_AGAIN}")
        tensors: dict[str, Tensor] = {}
        plain: list[Any] = []
        for prompt, result in enumerate(results):
            if result is None:
                plain.append(None)
                continue
            for name, value in _tensors_of(result):
                tensors[f"{prompt}.{name}"] = value.detach().cpu().contiguous().clone()
            plain.append({"shape": result.shape, "counts": asdict(result.counts)})
        _save(self.folder / f"layer-{layer:03d}.safetensors", tensors, self.run, {"prompts": json.dumps(plain)})
        self.finished, self.extras = layer + 1, extras
        state = {"identity": self.identity, "finished": self.finished, "extras": extras}
        write_text(self.folder / STATE, json.dumps(state | {"digest": _digest_of_text(state)}))

    def read(self, layer: int) -> list[LayerImportances | None]:
        """The results of a finished layer, per prompt."""
        path = self.folder / f"layer-{layer:03d}.safetensors"
        tensors, metadata = _read(path, self.run, f"'{path}'")
        plain = json.loads(metadata["prompts"])
        return [None if known is None else _result(prompt, known, tensors) for prompt, known in enumerate(plain)]

    def finish(self) -> None:
        """The run is done; its layers stay until the result is written: the same call gives it at once,
        :func:`discard` removes it.
        """
        self.close()

    def close(self) -> None:
        self.lock.release()


def discard(folder: str | os.PathLike[str]) -> None:
    """Remove what a run left in its folder, and the folder if nothing else is in it. Other files stay.

    Raises ``ValueError`` if another process is working there, ``OSError`` naming the folder if it cannot be removed.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        return
    lock = claim(folder)
    try:
        (folder / STATE).unlink(missing_ok=True)  # first: without it the rest is nothing
        for path in sorted(folder.iterdir()):
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        if os.name != "posix":
            lock.release()
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it has lost its name
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise OSError(f"cannot remove the finished run in '{folder}': {said(error)}") from error
    finally:
        lock.release()


def _state_in(path: Path) -> dict[str, Any]:
    """What ``run.json`` says; ``ValueError`` if it is damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        digest = read.pop("digest", None)
        if read["identity"]["format"] == FORMAT and digest != _digest_of_text(read):
            raise ValueError("its digest is another")
        read["finished"], read["extras"] = int(read["finished"]), int(read["extras"])
        return read  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged: {said(error)}; {START_AGAIN}") from error


def differences(before: Any, now: Any) -> list[str]:
    """Names of what differs between two identities; of nested ones their entries, ``"weights model.norm.weight"``."""
    found: list[str] = []
    for name in sorted({*before, *now}):
        a, b = before.get(name), now.get(name)
        if a == b:
            continue
        inside = differences(a, b) if isinstance(a, dict) and isinstance(b, dict) else []
        found += [f"{name} {entry}" for entry in inside] or [name]
    return found


class Identity(dict[str, Any]):
    """See :func:`identity_of`. ``files``: a streamed checkpoint's, as they were when they were hashed."""

    files: dict[Path, tuple[int, ...]]


def identity_of(model: nn.Module, prompts: list[list[int]], feed: Feed | None, **settings: Any) -> dict[str, Any]:
    """What makes two runs the same, JSON: digests of every weight and buffer, the config, what modules say of
    themselves, the prompts, settings and versions.

    Weights in memory are hashed each time (about 1 GB per second and core). Of a streamed checkpoint its files are, and
    those that have not been touched since are not read again.
    """
    import transformers

    identity = Identity(
        {
            "format": FORMAT,
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
            "versions": {
                "flowroutes_fast": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "config": _config_of(model),
            "modules": _digests_of_modules(model),
            "prompts": _digest_of_text(prompts),
            **{name: str(value) for name, value in settings.items()},
        }
    )
    if feed is not None:
        identity.files = {file: state_of(file) for file in feed.source.files}
        identity["weights"] = {file.name: digest_of(file, cache_folder() / "digests") for file in feed.source.files}
    tensors = _tensors_in(model, weights=feed is None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for kind in ("weights", "buffers"):
            identity.setdefault(kind, {})
            wanted = [(name, read) for at, name, read in tensors if at == kind]
            identity[kind] |= dict(
                zip([n for n, _ in wanted], pool.map(lambda one: _digest_of(one[1]()), wanted), strict=True)
            )
    return identity


def _config_of(model: Any) -> dict[str, str]:
    config = model.config
    found = {name: json.dumps(value, sort_keys=True, default=str) for name, value in config.to_dict().items()}
    for name in ("_name_or_path", "transformers_version"):
        found.pop(name, None)
    kinds = {
        str(getattr(module.config, "_attn_implementation", None))
        for module in model.modules()
        if hasattr(module, "config")
    }
    return found | {"attn_implementation": ", ".join(sorted(kinds))}


def _digests_of_modules(model: nn.Module) -> dict[str, str]:
    """Per module its class, its plain attributes (an eps, a LoRA scaling, active adapters), and what was put on it:
    hooks, another forward.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in _PASSING and _is_plain(value)}
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        found[name or "model"] = _digest_of_text([kind, sorted(plain.items()), code_of(module)])
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _tensors_in(model: nn.Module, weights: bool) -> list[tuple[str, str, Callable[[], Tensor]]]:
    """(kind, name, what gives it) of every parameter, tied ones once, buffer and quantisation state; offloaded ones
    as accelerate has them.
    """
    found: list[tuple[str, str, Callable[[], Tensor]]] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        kinds: list[tuple[str, Iterable[tuple[str, Tensor]]]] = [("buffers", module.named_buffers(recurse=False))]
        if weights:
            kinds.append(("weights", module.named_parameters(recurse=False)))
        for kind, tensors in kinds:
            for short, tensor in tensors:
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                name = f"{prefix}.{short}" if prefix else short
                held = _offloaded(module, short) if tensor.is_meta else None
                if tensor.is_meta and held is None:
                    continue  # of a streamed model
                found += [
                    (kind, f"{name} {part}".rstrip(), read)
                    for part, read in (_parts(tensor) if held is None else [("", held)])
                ]
    return found


def _offloaded(module: nn.Module, name: str) -> Callable[[], Tensor] | None:
    """What reads a tensor that accelerate has on disk or in another memory."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        held = getattr(one, "weights_map", None)
        if held is not None:
            return lambda held=held: held[name]  # type: ignore[misc]
    return None


def _parts(tensor: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """A tensor; of quantised ones (tensor subclasses, bitsandbytes) everything that they are made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, plain = tensor.__tensor_flatten__()
        yield "form", lambda: _as_bytes(f"{type(tensor).__qualname__} {plain}")
        for name in names:
            for inner, read in _parts(getattr(tensor, name)):
                yield f"{name} {inner}".rstrip(), read
        return
    yield "", lambda: tensor
    for name, value in sorted(vars(tensor).items()):
        if isinstance(value, Tensor):
            yield name, lambda value=value: value  # type: ignore[misc]
        elif hasattr(value, "as_dict"):
            for key, inner in sorted(value.as_dict().items()):
                yield f"{name} {key}", partial(_tensor_or_bytes, inner)


def _tensor_or_bytes(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else _as_bytes(repr(value))


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _digest_of(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and every byte."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        found.update(_bytes_of(tensor))
    return found.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _digest_of_text(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _digest_of_all(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return _digest_of_text([sorted(metadata.items()), {name: _digest_of(tensor) for name, tensor in tensors.items()}])


def _save(
    path: Path, tensors: dict[str, Tensor], run: str, metadata: dict[str, str] | None = None, durable: bool = True
) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    known = {"run": run, **(metadata or {})}
    known["digest"] = _digest_of_all(tensors, known)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, known), durable=durable)


def _read(path: Path, run: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one of our files; ``ValueError`` if it is damaged, missing or of another run,
    ``OSError`` if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{what} is missing; {START_AGAIN}") from error
    except OSError as error:
        raise OSError(f"{what} cannot be read: {said(error)}") from error
    try:
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if metadata.pop("digest") != _digest_of_all(tensors, metadata):
            raise ValueError("its digest is another")
        if metadata["run"] != run:
            raise ValueError("it is of another run")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what} is damaged: {said(error)}; {START_AGAIN}") from error
    return tensors, metadata


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
    return LayerImportances(
        shape=known["shape"], counts=Counts(**known["counts"]), edges=edges, neurons=split, dense=dense, **own
    )
