"""Models that do not fit: weights stay on disk as safetensors, and come in module by module while a forward pass runs.

transformers opens the model, accelerate's hooks load and drop the weights; ours tell the system which bytes come next, so that reading
overlaps computing. A forward pass reads every weight once, whatever the number of prompts in it: trace many prompts in one call.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from flowroutes_fast.estimate import available_memory
from flowroutes_fast.load import DEMO, DEMO_NAME, _converted, _quiet, demo_file
from flowroutes_fast.models.families import blocks_of

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
COPIES = 2.5  # of the largest piece: its weights, those of the next in the page cache, W_O in float32


def open_streaming(
    name: str | os.PathLike[str], memory: str | int | None = None, device: str = "cpu", *, dtype: Any = None
) -> tuple[Any, Any]:
    """Open a model whose weights stay on disk; :func:`flowroutes_fast.trace` takes it like any other, with the same results.

    Args:
        name: a folder or hub id with safetensors weights, sharded or not; a ``.gguf`` file or ``"demo"`` (converted once).
        memory: most bytes that weights may take at a time, as a number or ``"8GiB"``; None for what is available. At least one layer and the
            embedding must fit, or ``MemoryError`` says how much is needed.
        device: ``"cpu"``. Weights are computed with there.
        dtype: a torch dtype; None for the checkpoint's own. Another one than the checkpoint's needs a converted copy on disk.

    Returns:
        (transformers model, tokenizer). Temporary files go when the model does.

    Raises:
        FileNotFoundError: no such folder, a shard that the index names is missing. ValueError: weights that are not safetensors, a damaged shard,
            a family that is not known, an index that names a tensor no shard holds.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device != "cpu":
        raise ValueError(f"streaming to {device!r} is not there yet: choose device='cpu', or load with device_map= (accelerate)")
    limit = parse_memory(memory) if memory is not None else available_memory()
    folder, label = _folder(name)
    places = tensor_places(folder)
    offload = Path(tempfile.mkdtemp(prefix="flowroutes-offload-"))
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder, device_map={"": "disk"}, offload_folder=offload, dtype="auto" if dtype is None else dtype
            )
        blocks = blocks_of(model)
        need = int(COPIES * _largest_piece(places))
        if limit is not None and need > limit:
            raise MemoryError(
                f"streaming {label} needs about {need / 1e9:.2f} GB for its largest piece; {limit / 1e9:.2f} GB are allowed or available"
            )
    except BaseException:
        shutil.rmtree(offload, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, offload, True)
    model.config._name_or_path = label
    _read_ahead([block.module for block in blocks], [_prefix(model, block.module) for block in blocks], places)
    return model.eval(), tokenizer


def parse_memory(text: str | int) -> int:
    """``"8GiB"``, ``"500 MB"`` or a number of bytes; ``ValueError`` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if not found or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise ValueError(f"memory must be a size like '8GiB', '500MB' or a number of bytes, got {text!r}")
    return size


def _folder(name: str | os.PathLike[str]) -> tuple[Path, str]:
    text = os.fspath(name)
    if text == DEMO:
        return _converted(demo_file()), DEMO_NAME
    if text.endswith(".gguf"):
        if not Path(text).is_file():
            raise FileNotFoundError(f"no GGUF file at '{text}'")
        return _converted(Path(text)), Path(text).stem
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise FileNotFoundError(f"folder '{text}' holds no model: config.json is missing")
        return Path(text), Path(text).resolve().name
    if text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no folder or file at '{text}'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])), text
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model '{text}' cannot be fetched from the hub: {str(error).splitlines()[0]}") from error


Places = dict[str, tuple[Path, int, int]]  # tensor -> file, offset, bytes


def tensor_places(folder: Path) -> Places:
    """Where every tensor of a safetensors checkpoint lies. Reads headers alone; names what is missing or damaged."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
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
        if tensor not in places or places[tensor][0].name != name:
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
        found = {name: (file, 8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items() if name != "__metadata__"}  # fmt: skip
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"shard '{file.name}' is damaged: {error}") from error
    if found and max(offset + count for _, offset, count in found.values()) > size:
        raise ValueError(f"shard '{file.name}' is cut short: {size} bytes")
    return found


def _largest_piece(places: Places) -> int:
    """Bytes of the largest module that comes in at a time (accelerate loads leaf modules) and of the largest whole layer read ahead."""
    by_layer: dict[str, int] = {}
    for name, (_, _, count) in places.items():
        found = re.search(r"(?:^|\.)\d+\.", name)
        by_layer[name[: found.end()] if found else name] = by_layer.get(name[: found.end()] if found else name, 0) + count
    return max(by_layer.values())


def _prefix(model: nn.Module, block: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is block) + "."


def _read_ahead(modules: list[nn.Module], prefixes: list[str], places: Places) -> None:
    """Before a block runs, ask the system to read the next one's weights."""
    if not hasattr(os, "posix_fadvise"):
        return

    def spans(prefix: str) -> dict[Path, tuple[int, int]]:
        short = prefix.split(".", 1)[1]
        found: dict[Path, tuple[int, int]] = {}
        for name, (file, start, count) in places.items():
            if name.startswith((prefix, short)):
                a, b = found.get(file, (start, start + count))
                found[file] = (min(a, start), max(b, start + count))
        return found

    ahead = [spans(prefix) for prefix in prefixes]

    def hook(which: dict[Path, tuple[int, int]]) -> Any:
        def advise(*_: Any) -> None:
            for file, (start, end) in which.items():
                handle = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, start, end - start, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

        return advise

    for module, following in zip(modules, ahead[1:], strict=False):
        module.register_forward_pre_hook(hook(following))
