"""Models that do not fit: weights stay on disk, one layer at a time comes in while a forward pass goes through the
layers.

transformers builds the model, accelerate's hooks put weights in and take them out, a
:class:`~flowroutes_fast.loading.layer_feed.Feed` supplies them. Every layer is read once for all prompts of a
``trace()``, however many (:mod:`flowroutes_fast.tracing.layer_by_layer`).
"""

from __future__ import annotations

import math
import os
import re
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowroutes_fast.loading.checkpoints import GgufSource, LoadedSource, SafetensorsSource, Source, tensor_places
from flowroutes_fast.loading.layer_feed import Feed, plan
from flowroutes_fast.loading.load import (
    CONFIG,
    DEMO,
    DEMO_NAME,
    _converted,
    _nothing,
    _quiet,
    config_of,
    demo_file,
    description_of,
    gguf_file,
    model_folder,
    named,
    open_weights,
    tokenizer_of,
)
from flowroutes_fast.models.families import blocks_of
from flowroutes_fast.system.files import said, temporary_folder
from flowroutes_fast.system.memory import available_device_memory, available_memory

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt")
PIECE_COPIES = 1.25  # of the largest module while it is put in
PIECE = 2**24  # numbers of the unembedding that are cast at a time
_feeds: weakref.WeakKeyDictionary[nn.Module, Stream] = weakref.WeakKeyDictionary()


class Stream:
    """What :func:`open_streaming` knows of a model: its feed, and how many bytes weights and waiting states may
    take (None: unknown).
    """

    def __init__(self, feed: Feed, budget: int | None, dtype: torch.dtype) -> None:
        self.feed, self.budget, self.dtype = feed, budget, dtype

    @property
    def weights(self) -> int:
        """Bytes of weights in memory at a time."""
        return self.feed.plan.weights


def stream_of(model: nn.Module) -> Stream | None:
    """The stream that feeds a model, if it was opened by :func:`open_streaming`."""
    return _feeds.get(model)


def open_streaming(
    name: str | os.PathLike[str], memory: str | int | None = None, device: str = "cpu", *, dtype: Any = None
) -> tuple[Any, Any]:
    """Open a model whose weights stay on disk; :func:`flowroutes_fast.trace` takes it like any other, with the same
    results.

    Args:
        name: a folder or hub id with safetensors weights, sharded or not; a ``.gguf`` file or ``"demo"``, whose
            quantised tensors are decoded a layer at a time.
        memory: most bytes that weights and the states of waiting prompts may take, as a number or ``"8GiB"``; None for
            what is available. A layer is held whole where it fits, else its modules come in one by one; the largest
            must fit.
        device: ``"cpu"`` or ``"cuda"``, where weights are computed with; ``memory`` is that device's.
        dtype: a torch dtype to compute with; None for float32 on the CPU, as :func:`flowroutes_fast.load` does, and the
            checkpoint's own on a GPU. Weights are cast as they come in; the checkpoint stays as it is.

    Returns:
        (transformers model, tokenizer; None if the folder has none). Temporary files, if any, go when the model does.

    Raises:
        FileNotFoundError: no such folder, a shard that the index names is missing. ValueError: weights that are not
            safetensors, a damaged file, a family that is not known, an index that names a tensor no shard holds.
            OSError: a file that cannot be read. MemoryError: the largest module does not fit. All name the file or the
            folder in one sentence.
    """
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no GPU here; choose device='cpu'")
    budget = (
        parse_memory(memory)
        if memory is not None
        else available_memory()
        if where.type == "cpu"
        else available_device_memory(where)
    )
    model, tokenizer, source, label, finish = _open(
        name, dtype if dtype is not None else torch.float32 if where.type == "cpu" else None
    )
    try:
        compute = next(p.dtype for p in model.parameters() if p.is_floating_point())
        stored = _stored_names(model, source)
        blocks = [block.module for block in blocks_of(model)]
        _ends_as_stored(model, source, stored, compute)
        found = plan(model, blocks, budget, ahead=source.costly or where.type == "cuda")
        need = int(PIECE_COPIES * found.piece)
        if budget is not None and need > budget:
            raise MemoryError(
                f"streaming {label} needs about {need / 1e9:.2f} GB for its largest piece; {budget / 1e9:.2f} GB are "
                f"allowed or available"
            )
        feed = Feed(source, model, blocks, stored, where, found)
        _attach(model, feed, where)
    except BaseException:
        finish()
        raise
    weakref.finalize(model, finish)
    model.config._name_or_path = label
    _feeds[model] = Stream(feed, budget, compute)
    return model.eval(), tokenizer


def parse_memory(text: str | int) -> int:
    """``"8GiB"``, ``"500 MB"`` or a number of bytes; ``ValueError`` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if not found or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise ValueError(f"memory must be a size like '8GiB', '500MB' or a number of bytes, got {text!r}")
    return size


def _open(name: str | os.PathLike[str], dtype: Any) -> tuple[Any, Any, Source, str, Any]:
    """An empty model, its tokenizer, where its weights come from, its name, and what to call when it goes."""
    text = os.fspath(name)
    if text == DEMO or text.endswith(".gguf"):
        file, label = (demo_file(), DEMO_NAME) if text == DEMO else (gguf_file(text), Path(text).stem)
        opened = _from_gguf(file, label, dtype)
        if opened is not None:
            return opened
        folder = _converted(file)
    else:
        folder, label = _folder(text)
    places = tensor_places(folder)
    config = config_of(folder)
    tokenizer = tokenizer_of(folder) if any(next(folder.glob(name), None) for name in TOKENIZERS) else None
    if getattr(config, "quantization_config", None) is None:
        with named(f"'{folder / CONFIG}'"):
            model = _empty(config, dtype)
        if all(n in places and places[n].shape == tuple(p.shape) for n, p in model.named_parameters()):
            return model, tokenizer, SafetensorsSource(places, label), label, _nothing
    return _by_transformers(folder, tokenizer, places, label, dtype)


def _empty(config: Any, dtype: Any) -> Any:
    """A model of meta parameters and real buffers."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    kind = dtype if dtype is not None else getattr(config.get_text_config(), "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False), _quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.tie_weights()
    return model


def _from_gguf(file: Path, label: str, dtype: Any) -> tuple[Any, Any, Source, str, Any] | None:
    """None if transformers cannot map this file tensor by tensor."""
    folder = description_of(file)
    tokenizer, config = tokenizer_of(folder), config_of(folder)
    try:
        with _quiet():
            model = _empty(config, dtype)
            source = GgufSource(file, model, label)
    except (ImportError, AttributeError, NotImplementedError, KeyError):
        return None
    except Exception as error:
        with named(f"'{file}'"):
            raise error
    parameters = dict(model.named_parameters())
    if any(n not in source or math.prod(source.places[n].shape) != p.numel() for n, p in parameters.items()):
        return None
    return model, tokenizer, source, label, _nothing


def _by_transformers(
    folder: Path, tokenizer: Any, places: Any, label: str, dtype: Any
) -> tuple[Any, Any, Source, str, Any]:
    """Checkpoints whose tensors transformers renames or merges: opened by it; what it converts goes into a
    temporary folder.
    """
    from accelerate.hooks import remove_hook_from_submodules

    offload, finish = temporary_folder("flowroutes-offload-")
    try:
        need, free = sum(p.count for p in places.values()), shutil.disk_usage(offload).free
        if need > free:
            raise OSError(
                f"opening {label} needs up to {need / 1e9:.1f} GB in '{offload.parent}' for converted weights, "
                f"{free / 1e9:.1f} GB are free"
            )
        model = open_weights(folder, f"'{folder}'", device_map={"": "disk"}, offload_folder=offload, dtype="auto")
        hooks = [getattr(m, "_hf_hook", None) for m in model.modules()]
        maps = [
            h.weights_map
            for hook in hooks
            for h in getattr(hook, "hooks", [hook])
            if getattr(h, "weights_map", None) is not None
        ]
        weights = getattr(maps[0], "dataset", maps[0])
        remove_hook_from_submodules(model)
        if dtype is not None:
            _recast(model, dtype)
    except BaseException:
        finish()
        raise
    return model, tokenizer, LoadedSource(weights, places, label), label, finish


def _recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Meta parameters in another dtype; tied ones stay tied."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                new = done.setdefault(
                    id(parameter), nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"), False)
                )
                module._parameters[name] = new
    model.config.dtype = dtype  # type: ignore[union-attr]


def _stored_names(model: nn.Module, source: Source) -> dict[str, str]:
    """Parameter -> its name in the checkpoint: of tied parameters, the one that is there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name in source:
            first.setdefault(id(parameter), name)
    missing = [name for name, p in parameters.items() if name not in source and id(p) not in first]
    if missing:
        raise ValueError(
            f"{source.label} has no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    return {name: name if name in source else first[id(p)] for name, p in parameters.items()}


def _ends_as_stored(model: Any, source: Source, stored: dict[str, str], compute: torch.dtype) -> None:
    """A plain embedding and a plain unembedding stay mapped in the checkpoint's dtype: the rows that are looked up are
    cast, and the unembedding a piece at a time, not all of it into fresh memory."""
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None or type(module) not in (nn.Embedding, nn.Linear) or source.costly:
            continue
        kind = source.read(stored[names[id(module.weight)]]).dtype
        if kind == compute:
            continue
        module.weight = nn.Parameter(torch.empty_like(module.weight, dtype=kind, device="meta"), False)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.to(compute))
        else:
            module.forward = partial(_in_pieces, module)


def _in_pieces(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x W^T + b with W cast some rows at a time."""
    rows = max(1, PIECE // module.in_features)
    buffer = torch.empty(min(rows, module.out_features), module.in_features, dtype=x.dtype, device=x.device)
    out = x.new_empty(*x.shape[:-1], module.out_features)
    for start in range(0, module.out_features, rows):
        weight = module.weight[start : start + rows]
        out[..., start : start + rows] = nn.functional.linear(x, buffer[: len(weight)].copy_(weight))
    return out if module.bias is None else out + module.bias.to(out)


def _attach(model: Any, feed: Feed, device: torch.device) -> None:
    from accelerate.hooks import attach_align_device_hook

    for name, buffer in model.named_buffers():  # those that a checkpoint holds
        if name in feed.source:
            buffer.copy_(feed.source.read(name))
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=feed)


def _folder(text: str) -> tuple[Path, str]:
    if Path(text).is_dir():
        return model_folder(text), Path(text).resolve().name
    if text.startswith(("/", "./", "../", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"no folder or file at '{text}'")
    from huggingface_hub import snapshot_download

    try:
        here = snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception as error:
        raise FileNotFoundError(f"model '{text}' cannot be fetched from the hub: {said(error)}") from error
    return model_folder(here), text
