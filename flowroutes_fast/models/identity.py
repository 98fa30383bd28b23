"""What makes two models, or two tokenizers, the same: digests of their content, whatever they are called and
wherever they lie.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 2**24  # numbers that are hashed at a time
ADAPTER = ("active_adapters", "disable_adapters")  # what a PEFT layer says by properties
PASSING = (
    "training",
    "gradient_checkpointing",
    "max_seq_len_cached",
    "name_or_path",
    "hf_device_map",
    "call_super_init",
    "dump_patches",
)
# of a config: where a model comes from
UNSTABLE = ("transformers_version", "architectures", "dtype", "torch_dtype", "name_or_path")
PROBE = "A probe: 3.14 naïve cafés,\n\n\tдом 東京 🙂 def f(x):  return x_1"
SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "special_tokens_map",
    "legacy",
)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every number of every parameter and buffer with their names, shapes and dtypes, over what modules
    keep beside them, and over what was put on them (:func:`code_of`).

    Weights on disk (:func:`flowroutes_fast.open_streaming`, accelerate) come in a module at a time. The embedding and
    the unembedding count by their numbers alone: streamed, they keep the checkpoint's dtype.

    Raises:
        ValueError: weights that are nowhere (on the meta device).
    """
    ends = {
        id(end)
        for name in ("get_input_embeddings", "get_output_embeddings")
        if (end := getattr(model, name, lambda: None)()) is not None
    }
    found = hashlib.sha256()
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1), "flowroutes-digest") as pool, torch.no_grad():
        for name, module in model.named_modules():
            with _aligned(module):
                for key, tensor in _stored(module):
                    kind = "" if id(module) in ends else str(tensor.dtype)
                    numbers = list(pool.map(_digest_of, _chunks(tensor, f"{name}.{key}")))
                    _add(found, [name, key, list(tensor.shape), kind, numbers])
            _add(found, [name, type(module).__qualname__, _attributes(module), code_of(module)])
    return found.hexdigest()


def config_digest(model: nn.Module) -> str:
    """SHA-256 over a model's class and configuration, without where it comes from."""
    known = model.config.to_dict()  # type: ignore[union-attr,operator]
    known = {key: value for key, value in known.items() if not key.startswith("_") and key not in UNSTABLE}
    return _of([type(model).__name__, known])


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's serialised form, or its vocabulary, its settings, and what it makes of a text in
    several scripts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        form: Any = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")
        }
    elif hasattr(tokenizer, "get_vocab"):
        form = tokenizer.get_vocab()
    else:
        form = [
            type(tokenizer).__qualname__,
            {key: value for key, value in vars(tokenizer).items() if _is_plain(value)},
        ]
    settings = {key: str(getattr(tokenizer, key)) for key in SETTINGS if hasattr(tokenizer, key)}
    pieces: Any = getattr(tokenizer, "sp_model", None)
    if hasattr(pieces, "serialized_model_proto"):  # of SentencePiece: its scores too
        settings["sp_model"] = hashlib.sha256(pieces.serialized_model_proto()).hexdigest()
    if isinstance(ranks := getattr(tokenizer, "bpe_ranks", None), dict):  # of merges in Python
        settings["bpe_ranks"] = _of(
            [[list(pair) if isinstance(pair, tuple) else str(pair), rank] for pair, rank in ranks.items()]
        )
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
    computed = {
        key: b for key, b in module._buffers.items() if b is not None and key in module._non_persistent_buffers_set
    }
    for key, value in sorted({**saved, **computed}.items()):
        if isinstance(value, Tensor):
            yield from _parts(key, value.detach())


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps outside its tensors: an eps, a LoRA's scaling, which adapters are active."""
    found = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in PASSING}
    found |= {key: getattr(module, key) for key in ADAPTER if hasattr(module, key)}
    return {key: value for key, value in sorted(found.items()) if _is_plain(value)}


def code_of(module: nn.Module) -> list[Any]:
    """What was put on a module itself, JSON: hooks, another ``forward``, an activation that is a function; by code
    and by what they hold.
    """
    own = vars(module)
    hooks = [_said(hook) for kind in ("_forward_pre_hooks", "_forward_hooks") for hook in own.get(kind, {}).values()]
    moved = "_hf_hook" in own  # by accelerate, which keeps the forward that was there
    functions = {
        "forward" if key == "_old_forward" else key: one for key, one in own.items() if not (moved and key == "forward")
    }
    said = [
        [key, _said(one)]
        for key, one in sorted(functions.items())
        if callable(one)
        and not isinstance(one, nn.Module)
        and (key == "forward" or not (key.startswith("_") or hasattr(nn.Module, key)))
        and getattr(one, "__func__", None) is not getattr(type(module), key, one)
    ]
    return [said, hooks] if said or hooks else []


def _said(value: Any, depth: int = 6) -> Any:
    """A function with its code, defaults and closure, an object with its plain attributes: the same in every
    process.
    """
    value = getattr(value, "_torchdynamo_orig_callable", value)  # compiled
    if isinstance(value, Tensor):
        return "meta" if value.is_meta else [str(value.dtype), list(value.shape), _digest_of(value.detach())]
    if value is None or isinstance(value, (str, int, float)):
        return value
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, tuple):
        return [_said(inner, depth - 1) for inner in value]
    if isinstance(value, types.MethodType):
        return [_said(value.__func__, depth - 1), type(value.__self__).__qualname__]
    if isinstance(value, functools.partial):
        return [_said(one, depth - 1) for one in (value.func, value.args, *sorted(value.keywords.items()))]
    if isinstance(value, types.FunctionType):
        return [
            value.__qualname__,
            _code(value.__code__, depth - 1),
            *(_said(inner, depth - 1) for inner in _held(value)),
        ]
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return name
    return [
        name,
        [
            [key, _said(one, depth - 1)]
            for key, one in sorted(vars(value).items())
            if isinstance(one, (str, int, float, Tensor))
        ],
    ]


def _held(function: types.FunctionType) -> Iterator[Any]:
    """What a function brings along: defaults, variables around it, and the numbers, tensors and functions among the
    globals that it names.
    """
    yield function.__defaults__
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # empty
            yield cell.cell_contents
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, (int, float, str, Tensor, types.FunctionType)):
            yield value


def _code(code: types.CodeType, depth: int) -> Any:
    """A function's own code, without where it is written."""
    constants = [
        _code(one, depth - 1)
        if isinstance(one, types.CodeType) and depth > 0
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
        if not isinstance(one, types.CodeType) or depth > 0
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _parts(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a tensor subclass (torchao's, say) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield key, tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[operator]
        yield from _parts(f"{key}.{name}", getattr(tensor, name))


def _chunks(tensor: Tensor, name: str) -> Iterator[Tensor]:
    if tensor.is_meta:
        raise ValueError(
            f"the numbers of '{name}' are neither in memory nor on disk (meta device): load the model's weights first"
        )
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
