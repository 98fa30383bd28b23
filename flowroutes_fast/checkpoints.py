"""Where weights lie on disk: safetensors, sharded or not, and GGUF. One tensor at a time; what is damaged is named."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CHUNK = 2**23  # bytes that are read at a time to bring a file into memory


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie. ``tensor`` is its name inside the file."""

    file: Path
    offset: int
    count: int
    tensor: str
    shape: tuple[int, ...]


Places = dict[str, Place]


class Source(Protocol):
    """Tensors of a checkpoint under the model's names."""

    label: str
    costly: bool  # does read() compute, beside reading?
    places: Places  # empty where unknown
    files: list[Path]  # all of the checkpoint

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor:
        """The tensor as the checkpoint has it, on the CPU. ``OSError`` naming the file if it cannot be read."""
        ...


def tensor_places(folder: Path) -> Places:
    """Where every tensor of a safetensors checkpoint lies. Reads headers alone; names what is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{index}' is damaged: {error}") from error
        files = sorted({folder / name for name in wanted.values()})
    else:
        wanted, files = {}, sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        what = f"only {pickled[0]}; convert it: load it and call save_pretrained" if pickled else "no weights"
        raise ValueError(f"'{folder}' holds no safetensors weights, {what}")
    places: Places = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"shard '{file.name}' of '{folder}' is missing")
        places |= _header(file)
    for tensor, name in wanted.items():
        if tensor not in places or places[tensor].file.name != name:
            raise ValueError(f"the index of '{folder}' says that {name} holds {tensor}, but it does not")
    return places


def _header(file: Path) -> Places:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        found: Places = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = Place(file, 8 + length + start, end - start, name, tuple(entry["shape"]))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"shard '{file.name}' is damaged: {error}") from error
    if found and max(place.offset + place.count for place in found.values()) > size:
        raise ValueError(f"shard '{file.name}' is cut short: {size} bytes")
    return found


class SafetensorsSource:
    """A safetensors checkpoint whose tensors have the model's names and shapes; they are mapped, not copied."""

    costly = False

    def __init__(self, places: Places, label: str) -> None:
        self.places, self.label = places, label
        self.files = sorted({place.file for place in places.values()})
        self.sizes = {file: file.stat().st_size for file in self.files}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        place = self.places[name]
        try:
            check_size(place.file, self.sizes[place.file])
            with safe_open(place.file, framework="pt") as file:
                return file.get_tensor(place.tensor)
        except (SafetensorError, OSError) as error:
            raise OSError(f"{name} cannot be read from shard '{place.file.name}' of {self.label}: {error}") from error


class LoadedSource:
    """Weights that transformers renamed, merged or converted while opening: through accelerate's own loader."""

    costly = False

    def __init__(self, weights: Mapping[str, Tensor], places: Places, label: str) -> None:
        self.weights, self.label = weights, label
        self.files = sorted({place.file for place in places.values()})
        self.places = {name: place for name, place in places.items() if name in weights}

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def read(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self.weights[name]
        except (SafetensorError, OSError) as error:
            raise OSError(f"{name} of {self.label} cannot be read: {error}") from error


class GgufSource:
    """A GGUF file whose quantised tensors are decoded one at a time, with transformers' names and transposes.

    ``ValueError`` if the file does not hold the whole model tensor by tensor (merged experts): convert it instead.
    """

    costly = True

    def __init__(self, path: Path, model: nn.Module, label: str) -> None:
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map, read_field

        self.label, self.path, self.size, self.files = label, path, path.stat().st_size, [path]
        reader = GGUFReader(path)
        architecture = read_field(reader, "general.architecture")[0]
        self.mapped = getattr(reader.data, "_mmap", None)
        self.processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())  # type: ignore[union-attr, operator]
        self.names: dict[str, str] = get_gguf_hf_weights_map(model, self.processor)
        self.tensors = {self.names[t.name]: t for t in reader.tensors if t.name in self.names}
        self.places = {
            name: Place(path, int(t.data_offset), int(t.n_bytes), t.name, tuple(int(n) for n in reversed(t.shape)))
            for name, t in self.tensors.items()
        }
        for name, place in self.places.items():
            if place.offset + place.count > self.size:
                raise ValueError(f"'{path.name}' is cut short: {self.size} bytes, and {name} ends at {place.offset + place.count}")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        import numpy as np
        from gguf import dequantize

        found = self.tensors[name]
        check_size(self.path, self.size)
        rows = found.data.reshape(-1, found.data.shape[-1])
        step = max(1, CHUNK // max(1, rows.shape[-1] * 8))  # decoding takes several copies of what it decodes
        first = dequantize(rows[:step], found.tensor_type)
        weights = np.empty((len(rows), first.shape[-1]), first.dtype)
        weights[:step] = first
        for start in range(step, len(rows), step):
            weights[start : start + step] = dequantize(rows[start : start + step], found.tensor_type)
        weights = weights.reshape(*found.data.shape[:-1], -1)
        self._forget(self.places[name])
        done = self.processor.process(weights=weights, name=found.name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}})
        if done.name != found.name:
            raise ValueError(f"'{self.path.name}' cannot be read tensor by tensor: {found.name} is merged with others")
        return torch.from_numpy(np.require(done.weights, requirements=["C", "W"]))

    def _forget(self, place: Place) -> None:
        """What was read need not stay in this process; the system keeps it while it has room."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.mapped.madvise(mmap.MADV_DONTNEED, start, place.offset + place.count - start)


def check_size(file: Path, size: int) -> None:
    """``OSError`` if a file is not what it was when it was opened: reading a mapped file that was cut would kill the process."""
    now = os.stat(file).st_size
    if now != size:
        raise OSError(f"the file has {now} bytes, it had {size} when the model was opened")


def read_through(places: Iterable[Place], stop: Any = None) -> int:
    """Read the tensors' bytes and forget them, so that the system has them at hand. Returns bytes; ``OSError`` names the file."""
    buffer, total = memoryview(bytearray(CHUNK)), 0
    by_file: dict[Path, list[Place]] = {}
    for place in places:
        by_file.setdefault(place.file, []).append(place)
    for file, wanted in by_file.items():
        try:
            with file.open("rb", buffering=0) as stream:
                for place in sorted(wanted, key=lambda p: p.offset):
                    stream.seek(place.offset)
                    done = 0
                    while done < place.count and not (stop is not None and stop.is_set()):
                        got = stream.readinto(buffer[: min(CHUNK, place.count - done)])
                        if not got:
                            raise OSError(f"it ends within {place.tensor}")
                        done += got
                    total += done
        except OSError as error:
            raise OSError(f"'{file.name}' cannot be read: {error}") from error
    return total
