"""Where weights lie on disk: safetensors, sharded or not, and GGUF. One tensor at a time; what is damaged is named."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from flowroutes_fast.system.files import said

MOST_HEADER = 10**8  # bytes, as safetensors has it
MOST_LAYERS = 10_000
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
}
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
        wanted = _index(index)
        files = sorted({folder / name for name in wanted.values()})
    else:
        whole = folder / "model.safetensors"  # beside it others may lie that are not the model's
        wanted, files = {}, [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        what = f"only {pickled[0]}; convert it: load it and call save_pretrained" if pickled else "no weights"
        raise ValueError(f"'{folder}' holds no safetensors weights, {what}")
    places: Places = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"shard '{file.name}' of '{folder}' is missing")
        found = _header(file)
        if twice := sorted({*found} & {*places}):
            raise ValueError(
                f"shard '{file.name}' of '{folder}' holds {twice[0]}, and so does '{places[twice[0]].file.name}'"
            )
        places |= found
    for tensor, name in wanted.items():
        if tensor not in places or places[tensor].file.name != name:
            raise ValueError(f"the index of '{folder}' says that {name} holds {tensor}, but it does not")
    return places


def _index(file: Path) -> dict[str, str]:
    """Tensor -> file name."""
    try:
        wanted = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        for tensor, name in wanted.items():
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise ValueError(f"{tensor} lies in {name!r}, which is no file beside it")
    except OSError as error:
        raise OSError(f"'{file}' cannot be read: {said(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{file}' is damaged: {said(error)}") from error
    return wanted


def _header(file: Path) -> Places:
    """A shard's tensors; ``ValueError`` unless they fill the file one after another, with the bytes that their
    shapes take.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MOST_HEADER):
                raise ValueError(f"its header is longer than the file: {length} bytes")
            header = json.loads(stream.read(length))
        found: Places = {}
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = _place(file, 8 + length, name, entry)
    except OSError as error:
        raise OSError(f"shard '{file.name}' of '{file.parent}' cannot be read: {said(error)}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"shard '{file.name}' is damaged: {said(error)}") from error
    if found and max(place.offset + place.count for place in found.values()) > size:
        raise ValueError(f"shard '{file.name}' is cut short: {size} bytes")
    end = 8 + length
    for place in sorted(found.values(), key=lambda place: (place.offset, place.count)):
        if place.offset != end:
            raise ValueError(
                f"shard '{file.name}' is damaged: {place.tensor} starts at byte {place.offset}, the one "
                f"before ends at {end}"
            )
        end = place.offset + place.count
    if end != size:
        raise ValueError(f"shard '{file.name}' is damaged: it has {size} bytes, its tensors end at {end}")
    return found


def _place(file: Path, first: int, name: str, entry: Any) -> Place:
    start, end = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if not all(type(n) is int and n >= 0 for n in (start, end, *shape)) or end < start:
        raise ValueError(f"{name} has shape {shape} from byte {start} to {end}")
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{name} has shape {shape} of {dtype} in {end - start} bytes")
    return Place(file, first + start, end - start, name, tuple(shape))


@dataclass(frozen=True)
class GgufHead:
    """What stands before a GGUF file's tensors: digest of those bytes, numbers that all tensors hold."""

    digest: str
    elements: int


def gguf_head(path: Path) -> GgufHead:
    """Walk through a GGUF file's head; ``ValueError`` naming the file unless every count and offset lies inside it."""
    try:
        with path.open("rb") as stream:
            return _GgufWalk(stream, path.stat().st_size).head()
    except OSError as error:
        raise OSError(f"'{path}' cannot be read: {said(error)}") from error
    except (ValueError, struct.error) as error:
        raise ValueError(f"'{path}' cannot be read as a GGUF model, it is damaged: {said(error)}") from error


class _GgufWalk:
    """Little by little through the head, never beyond the end."""

    SIZES: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    STRING, ARRAY = 8, 9

    def __init__(self, stream: Any, size: int) -> None:
        self.stream, self.size, self.at, self.order = stream, size, 0, "<"
        self.digest = hashlib.sha256()

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"it has {self.size} bytes, its head goes on")
        read = self.stream.read(count)
        self.at += count
        self.digest.update(read)
        return read

    def number(self, kind: str) -> int:
        return struct.unpack(self.order + kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> None:
        if kind in self.SIZES:
            read = self.take(self.SIZES[kind])
            layers = int.from_bytes(read, "little" if self.order == "<" else "big")
            if key.endswith(".block_count") and not 0 < layers <= MOST_LAYERS:
                raise ValueError(f"it says that the model has {layers} layers")
        elif kind == self.STRING:
            self.take(self.number("Q"))
        elif kind == self.ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in self.SIZES:
                self.take(count * self.SIZES[inner])
            elif inner == self.STRING:
                for _ in range(count):
                    self.take(self.number("Q"))
            else:
                raise ValueError(f"{key!r} is a list of type {inner}")
        else:
            raise ValueError(f"{key!r} has the unknown type {kind}")

    def head(self) -> GgufHead:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        version = self.number("I")
        if version & 0xFFFF == 0:
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3 can be read")
        tensors, values = self.number("Q"), self.number("Q")
        for _ in range(values):
            key = self.text()
            self.value(self.number("I"), key)
        elements = 0
        for _ in range(tensors):
            name, dimensions = self.text(), self.number("I")
            if dimensions > 8:
                raise ValueError(f"{name!r} has {dimensions} dimensions")
            count = math.prod(self.number("Q") for _ in range(dimensions))
            self.number("I")
            if self.number("Q") > self.size or count > 16 * self.size:  # no type takes less than half a bit
                raise ValueError(f"{name!r} lies beyond its end, at {self.size} bytes: it is cut short")
            elements += count
        return GgufHead(self.digest.hexdigest(), elements)


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
        except (SafetensorError, OSError, RuntimeError) as error:
            raise OSError(
                f"{name} cannot be read from shard '{place.file.name}' of {self.label}: {said(error)}"
            ) from error


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
        except (SafetensorError, OSError, RuntimeError) as error:
            raise OSError(f"{name} of '{self.label}' cannot be read: {said(error)}") from error


class GgufSource:
    """A GGUF file whose quantised tensors are decoded one at a time, with transformers' names and transposes.

    ``ValueError`` if the file does not hold the whole model tensor by tensor (merged experts): convert it instead.
    """

    costly = True

    def __init__(self, path: Path, model: nn.Module, label: str) -> None:
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            read_field,
        )

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
                raise ValueError(
                    f"'{path.name}' is cut short: {self.size} bytes, and {name} ends at {place.offset + place.count}"
                )

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
        done = self.processor.process(
            weights=weights, name=found.name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
        )
        if done.name != found.name:
            raise ValueError(f"'{self.path.name}' cannot be read tensor by tensor: {found.name} is merged with others")
        return torch.from_numpy(np.require(done.weights, requirements=["C", "W"]))

    def _forget(self, place: Place) -> None:
        """What was read need not stay in this process; the system keeps it while it has room."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.mapped.madvise(mmap.MADV_DONTNEED, start, place.offset + place.count - start)


def check_size(file: Path, size: int) -> None:
    """``OSError`` if a file is not what it was when it was opened: reading a mapped file that was cut would kill
    the process.
    """
    now = os.stat(file).st_size
    if now != size:
        raise OSError(f"the file has {now} bytes, it had {size} when the model was opened")


def read_through(places: Iterable[Place], stop: Any = None) -> int:
    """Read the tensors' bytes and forget them, so that the system has them at hand. Returns bytes; ``OSError``
    names the file.
    """
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
