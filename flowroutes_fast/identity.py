"""What makes two models, or two tokenizers, the same: digests of their content, whatever they are called and wherever they lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 2**24  # numbers that are hashed at a time
ADAPTER = ("active_adapters", "disable_adapters")  # what a PEFT layer says by properties
PASSING = ("training", "gradient_checkpointing", "max_seq_len_cached", "name_or_path", "hf_device_map", "call_super_init", "dump_patches")
UNSTABLE = ("transformers_version", "architectures", "dtype", "torch_dtype", "name_or_path")  # of a config: where a model comes from
PROBE = "A probe: 3.14 naïve cafés,\n\n\tдом 東京 🙂 def f(x):  return x_1"
SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "special_tokens_map", "legacy")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every number of every parameter and buffer with their names, shapes and dtypes, and over what modules keep beside them.

    Weights on disk (:func:`flowroutes_fast.open_streaming`, accelerate) come in a module at a time. The embedding and the unembedding count by
    their numbers alone: streamed, they keep the checkpoint's dtype.

    Raises:
        ValueError: weights that are nowhere (on the meta device).
    """
    ends = {
        id(end) for name in ("get_input_embeddings", "get_output_embeddings") if (end := getattr(model, name, lambda: None)()) is not None
    }
    found = hashlib.sha256()
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1), "flowroutes-digest") as pool, torch.no_grad():
        for name, module in model.named_modules():
            with _aligned(module):
                for key, tensor in _stored(module):
                    kind = "" if id(module) in ends else str(tensor.dtype)
                    numbers = list(pool.map(_digest_of, _chunks(tensor, f"{name}.{key}")))
                    _add(found, [name, key, list(tensor.shape), kind, numbers])
            _add(found, [name, _attributes(module)])
    return found.hexdigest()


def config_digest(model: nn.Module) -> str:
    """SHA-256 over a model's class and configuration, without where it comes from."""
    known = model.config.to_dict()  # type: ignore[union-attr,operator]
    known = {key: value for key, value in known.items() if not key.startswith("_") and key not in UNSTABLE}
    return _of([type(model).__name__, known])


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's serialised form, or its vocabulary, its settings, and what it makes of a text in several scripts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        form: Any = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    elif hasattr(tokenizer, "get_vocab"):
        form = tokenizer.get_vocab()
    else:
        form = [type(tokenizer).__qualname__, {key: value for key, value in vars(tokenizer).items() if _is_plain(value)}]
    settings = {key: str(getattr(tokenizer, key)) for key in SETTINGS if hasattr(tokenizer, key)}
    probe = " ".join([PROBE, *map(str, getattr(tokenizer, "all_special_tokens", []))])
    try:
        ids = [int(i) for i in tokenizer(probe)["input_ids"]]
    except (ValueError, KeyError, TypeError, IndexError):  # one that knows few characters
        ids = []
    return _of([form, settings, ids])


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors: what it saves (quantised ones with their scales), and buffers that it computes."""
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    computed = {key: b for key, b in module._buffers.items() if b is not None and key in module._non_persistent_buffers_set}
    for key, value in sorted({**saved, **computed}.items()):
        if isinstance(value, Tensor):
            yield from _parts(key, value.detach())


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps outside its tensors: an eps, a LoRA's scaling, which adapters are active."""
    found = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in PASSING}
    found |= {key: getattr(module, key) for key in ADAPTER if hasattr(module, key)}
    return {key: value for key, value in sorted(found.items()) if _is_plain(value)}


def _parts(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor subclass (torchao's, say) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield key, tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[operator]
        yield from _parts(f"{key}.{name}", getattr(tensor, name))


def _chunks(tensor: Tensor, name: str) -> Iterator[Tensor]:
    if tensor.is_meta:
        raise ValueError(f"the numbers of '{name}' are neither in memory nor on disk (meta device): load the model's weights first")
    yield from tensor.reshape(-1).split(CHUNK)


def _digest_of(chunk: Tensor) -> str:
    """Of half precision as float32: the same numbers give the same digest, and dtypes are noted beside it."""
    if chunk.is_floating_point() and chunk.itemsize == 2:
        chunk = chunk.float()
    return hashlib.sha256(chunk.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, (str, int, float))


def _add(found: Any, entry: Any) -> None:
    found.update(json.dumps(entry).encode() + b"\n")


def _of(entry: Any) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()


def _aligned(module: nn.Module) -> Any:
    """While it lasts, offloaded weights of the module itself are in memory."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device, has_offloaded_params

    return align_module_device(module) if has_offloaded_params(module) else contextlib.nullcontext()
