"""The file of a trace: one safetensors file, with what is no array as JSON in its metadata, and a checksum of both.

Whatever is read is checked as if a stranger had written it: the checksum finds damage, the checks here find what cannot
have been traced.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowroutes_fast.results.route import MAX_HEADS
from flowroutes_fast.system import documents as doc
from flowroutes_fast.system.documents import INT64, ROUNDING, check
from flowroutes_fast.system.errors import DamagedFile
from flowroutes_fast.system.files import write_atomically

FORMAT = "flowroutes_fast.trace"
FORMAT_VERSION = 3
ARRAYS = (
    "heads",
    "heads_low",
    "heads_high",
    "normaliser_low",
    "normaliser_high",
    "attention_residual",
    "attention_bias",
    "mixer",
    "ffn",
    "ffn_residual",
)
NEURON = ("index", "importance", "low", "high")
MAX_TOKENS, MAX_LAYERS = 2**22, 2**14  # codes of (query, key, head) fit into 63 bits
_SHARES = ("heads", "heads_low", "heads_high", "attention_residual", "attention_bias", "mixer", "ffn", "ffn_residual")
_METADATA = {"format", "version", "trace", "sha256"}
_count = lambda name, value: doc.an_integer(name, value, 0, INT64)  # noqa: E731
_seconds = lambda name, value: doc.a_number(name, value, 0, 1e12)  # noqa: E731
_FIELDS: dict[str, Any] = {
    "tokens": doc.texts,
    "token_ids": lambda name, value: doc.integers(name, value, 0, INT64),
    "model": doc.a_name,
    "shapes": doc.shapes,
    "mixers": doc.texts,
    "floor": lambda name, value: doc.a_number(name, value, 0, np.nextafter(1, 0)),
    "precision": doc.one_of("certified", "exact"),
    "measure": doc.one_of("proximity", "signed"),
    "backend": doc.one_of("reference", "cpu", "triton", "cuda"),
    "bias": doc.one_of("part", "value", "exclude"),
    "tolerance": lambda name, value: doc.a_number(name, value, 0, 1),
    "thresholds": lambda name, value: tuple(doc.numbers(name, value, 0, np.nextafter(1, 0))),
    "work": lambda name, value: doc.table_of(name, value, _count),
    "prediction": doc.probabilities,
    "timings": lambda name, value: doc.table_of(name, value, _seconds),
    "inputs": lambda name, value: doc.table_of(name, value, doc.a_text),
    "chat": doc.messages,
    "lazy": doc.a_flag,
}
PLAIN = tuple(_FIELDS)
# fields that older files of this version lack; what a figure means must not hang on a default
_LATER = {"inputs", "chat", "lazy"}


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write a trace's plain fields and arrays; ``OSError`` with the file's name when it cannot be written."""
    from safetensors.torch import save_file

    tensors = _alone(tensors)
    text = doc.written(header | {"model": doc.one_line(header["model"])})
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "trace": text, "sha256": checksum(text, tensors)}
    return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, each with memory of its own: safetensors takes no others."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        own = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() not in taken
        found[name] = tensor if own else tensor.clone()
        taken.add(tensor.data_ptr())
    return found


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain fields and arrays of a trace file, all checked. Raises :class:`DamagedFile`; ``OSError`` where
    nothing can be read.
    """
    file = doc.plain_file(path, "trace file")
    if file.suffix in (".json", ".html") and file.read_bytes()[:1] in (b"{", b"<"):
        raise DamagedFile(f"'{path}' is no trace: give the trace.safetensors that was written with it")
    with doc.named(path, "is a damaged trace file, or none"):
        return _read(path, file)


def _read(path: str | os.PathLike[str], file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            check(metadata.get("format") == FORMAT, "it is not a trace file of flowroutes_fast")
            check(
                metadata.get("version") == str(FORMAT_VERSION),
                f"it is of version {metadata.get('version', '')[:20]}; this release reads version {FORMAT_VERSION}",
            )
            doc.check_names(metadata, {"trace"}, _METADATA)
            header = check_header(doc.parse(metadata["trace"]))
            check_shapes(header, {name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118  (a handle is no dict)
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFile(str(error)) from error
    if "sha256" in metadata:  # files of earlier releases have none
        check(
            checksum(metadata["trace"], tensors) == metadata["sha256"],
            "its content is not what was written (the checksum differs)",
        )
    check_arrays(header, tensors)
    return header, tensors


def checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the metadata's JSON and of all arrays with their names, types and shapes."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().numpy().data)
    return digest.hexdigest()


def check_header(header: Any) -> dict[str, Any]:
    """The plain fields, in the types that a trace has."""
    check(isinstance(header, dict), "its metadata is no table of names and values")
    doc.check_names(header, set(_FIELDS) - _LATER, set(_FIELDS))
    found = {name: _FIELDS[name](name, value) for name, value in header.items()}
    tokens, layers = len(found["tokens"]), len(found["shapes"])
    check(0 < tokens <= MAX_TOKENS, f"it has {tokens} tokens")
    check(0 < layers <= MAX_LAYERS, f"it has {layers} layers")
    check(len(found["token_ids"]) in (0, tokens), f"it has {len(found['token_ids'])} token ids for {tokens} tokens")
    doc.check_messages(found.get("chat", []), tokens)
    check(len(found["mixers"]) in (0, layers), f"it names the mixers of {len(found['mixers'])} of {layers} layers")
    check(
        found["measure"] != "signed" or found["precision"] != "exact",
        "measure signed and precision exact exclude each other",
    )
    return found


def check_shapes(header: dict[str, Any], slices: dict[str, Any]) -> None:
    """Which arrays there are, of which types and shapes, before any is read."""
    layers, tokens = len(header["shapes"]), len(header["tokens"])
    dense, neurons = "dense.0" in slices, "neuron_index.0" in slices
    kinds = {"dense": "F32"} if dense else {"edge_index": "I32", "edge_importance": "F32"}
    kinds |= {f"neuron_{name}": "I32" if name == "index" else "F32" for name in NEURON} if neurons else {}
    types = dict.fromkeys(ARRAYS, "F32") | {f"{kind}.{layer}": kinds[kind] for kind in kinds for layer in range(layers)}
    doc.check_names(slices, set(types), set(types))
    shapes = {name: list(slices[name].get_shape()) for name in types}
    heads = shapes["heads"][-1] if len(shapes["heads"]) == 3 else 0
    check(heads <= MAX_HEADS, f"it has {heads} heads")
    edges, found = ({}, {})
    for layer in range(layers):
        edges[layer] = (shapes.get(f"edge_importance.{layer}") or [0])[0]
        found[layer] = (shapes.get(f"neuron_importance.{layer}") or [0])[0]
    for name, kind in types.items():
        stem, _, at = name.partition(".")
        layer = int(at or 0)
        wanted = {
            "dense": [heads, tokens, tokens],
            "edge_index": [3, edges[layer]],
            "edge_importance": [edges[layer]],
            "neuron_index": [2, found[layer]],
            "neuron_importance": [found[layer]],
            "neuron_low": [tokens],
            "neuron_high": [tokens],
        }.get(stem, [layers, tokens, heads] if stem.startswith("heads") else [layers, tokens])
        check(slices[name].get_dtype() == kind, f"{name} is of type {slices[name].get_dtype()}, not {kind}")
        check(shapes[name] == wanted, f"{name} has shape {shapes[name]}, not {wanted}")


def check_arrays(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Could a pass have given these numbers?"""
    signed = header["measure"] == "signed"
    parallel = torch.tensor([shape == "parallel" for shape in header["shapes"]])
    known = ~tensors["normaliser_low"].isnan()  # [layer, query]
    if not header.get("lazy"):  # all layers at the same positions
        known = known[:1].expand(known.shape)
    check(header.get("lazy") or bool(known.any()), "no position was traced")
    _check_tracedness(tensors, known, parallel)
    whole = {name: tensors[name][known] for name in ARRAYS}  # [row] or [row, head]
    alone = parallel[:, None].expand(known.shape)[known]  # [row]: of a parallel block
    whole["ffn_residual"] = whole["ffn_residual"].masked_fill(alone, 0)
    for name, values in whole.items():
        check(values.isfinite().all(), f"{name} holds numbers that are not finite")
        if name not in _SHARES:
            check((values >= 0).all(), f"{name} holds negative numbers")
        elif not signed:
            check(((values >= 0) & (values <= 1 + ROUNDING)).all(), f"{name} holds shares outside 0 ... 1")
    _check_ordered(whole, signed)
    if not signed:
        _check_sums(whole, alone)
    for layer, traced in enumerate(known):
        if "dense.0" in tensors:
            _check_dense(layer, tensors, traced, signed)
        else:
            _check_edges(layer, tensors, traced, signed)
        if "neuron_index.0" in tensors:
            _check_neurons(layer, tensors, traced, signed)


def _check_tracedness(tensors: dict[str, Tensor], known: Tensor, parallel: Tensor) -> None:
    for name in ARRAYS:
        values, missing = tensors[name], ~known
        if name == "ffn_residual":
            missing = missing | parallel[:, None]
        missing = missing[..., None] if values.dim() == 3 else missing
        check(
            (values.isnan() == missing).all(),
            f"{name} has numbers where nothing was traced, or none where something was",
        )


def _check_ordered(whole: dict[str, Tensor], signed: bool) -> None:
    slack = ROUNDING * (1 + whole["heads"].abs()) if signed else ROUNDING
    between = (whole["heads_low"] <= whole["heads"] + slack) & (whole["heads"] <= whole["heads_high"] + slack)
    check(between.all(), "heads lie outside heads_low ... heads_high")
    check((whole["normaliser_low"] <= whole["normaliser_high"]).all(), "normaliser_low is above normaliser_high")


def _check_sums(whole: dict[str, Tensor], parallel: Tensor) -> None:
    """Proximities of a node sum to 1; to 0 where nothing is near the state."""
    ffn = whole["ffn"] * parallel
    total = whole["heads"].sum(-1) + whole["attention_residual"] + whole["attention_bias"] + whole["mixer"] + ffn
    empty = (total == 0) & (whole["normaliser_low"] == 0)
    check((((total - 1).abs() <= ROUNDING) | empty).all(), "the importances of a state after attention do not sum to 1")
    total = (whole["ffn"] + whole["ffn_residual"])[~parallel]
    check(
        (((total - 1).abs() <= ROUNDING) | (total == 0)).all(),
        "the importances of a state after an FFN do not sum to 1",
    )


def _check_dense(layer: int, tensors: dict[str, Tensor], traced: Tensor, signed: bool) -> None:
    values = tensors[f"dense.{layer}"]
    check(traced.all(), "all sub-edges were kept, but not all positions traced")
    check(values.isfinite().all(), f"dense.{layer} holds numbers that are not finite")
    check(not values.triu(1).any(), f"dense.{layer} has sub-edges from later tokens")
    if not signed:
        check((values >= 0).all(), f"dense.{layer} holds negative importances")
        off = (values.sum(-1).T - tensors["heads"][layer]).abs()
        check((off <= ROUNDING).all(), f"the sub-edges of dense.{layer} do not sum to their heads")


def _check_edges(layer: int, tensors: dict[str, Tensor], traced: Tensor, signed: bool) -> None:
    tokens, heads = tensors["heads"].shape[1:]
    value = tensors[f"edge_importance.{layer}"].numpy()
    query, key, head = tensors[f"edge_index.{layer}"].numpy().astype(np.int64)
    inside = (key >= 0) & (key <= query) & (query < tokens) & (head >= -1) & (head < heads)
    check(
        inside.all(), f"edge_index.{layer} names queries, keys or heads that there are not, or keys after their query"
    )
    check(traced.numpy()[query].all(), f"edge_index.{layer} has sub-edges of positions that were not traced")
    _check_once((query * tokens + key) * (heads + 1) + head + 1, f"edge_index.{layer}")
    check(np.isfinite(value).all(), f"edge_importance.{layer} holds numbers that are not finite")
    if signed:
        check((head >= 0).all(), f"edge_index.{layer} has heads without a name, which signed flow does not have")
        return
    check((value >= 0).all(), f"edge_importance.{layer} holds negative importances")
    check((value <= np.where(head < 0, 2, 1) + ROUNDING).all(), f"edge_importance.{layer} holds importances above 1")
    named = head >= 0
    total = np.bincount((query * heads + head)[named], value[named], tokens * heads)
    most = tensors["heads"][layer].nan_to_num().flatten().numpy()
    check((total <= most + ROUNDING).all(), f"the sub-edges of edge_importance.{layer} sum to more than their heads")


def _check_neurons(layer: int, tensors: dict[str, Tensor], traced: Tensor, signed: bool) -> None:
    value, low, high = (tensors[f"neuron_{name}.{layer}"].numpy() for name in ("importance", "low", "high"))
    position, neuron = tensors[f"neuron_index.{layer}"].numpy().astype(np.int64)
    check(
        ((position >= 0) & (position < len(traced)) & (neuron >= 0)).all(),
        f"neuron_index.{layer} names positions that there are not",
    )
    check(traced.numpy()[position].all(), f"neuron_index.{layer} has neurons of positions that were not traced")
    _check_once(position * 2**31 + neuron, f"neuron_index.{layer}")
    check(np.isfinite(value).all(), f"neuron_importance.{layer} holds numbers that are not finite")
    if not signed:
        check(((value >= 0) & (value <= 1 + ROUNDING)).all(), f"neuron_importance.{layer} holds shares outside 0 ... 1")
    for name, bound in (("low", low), ("high", high)):
        known = traced.numpy()
        right = np.isfinite(bound) & (bound >= 0)
        check((right == known).all() and np.isnan(bound[~known]).all(), f"neuron_{name}.{layer} holds what is no bound")
    check((low[known] <= high[known]).all(), f"neuron_low.{layer} is above neuron_high.{layer}")


def _check_once(codes: np.ndarray, name: str) -> None:
    rising = np.diff(codes) > 0
    if not rising.all():
        rising = np.diff(np.sort(codes)) > 0
    check(rising.all(), f"{name} lists a row twice")
