"""Valid traces and routes of many kinds, and seeded ways to spoil their files."""

import copy
import json
import random
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import flowroutes_fast as fr
from flowroutes_fast.results import trace_file
from flowroutes_fast.system import documents

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import make

IDS = [3, 14, 15, 92, 65, 35]  # few, so that thousands of files can be tried
KINDS = {
    "exact": ("llama", {"precision": "exact"}),
    "listed": ("gpt_neox", {"precision": "exact", "dense": False, "floor": 0.0, "neurons": True}),
    "certified": ("llama", {"tolerance": 0.3, "thresholds": (), "neurons": True}),
    "signed": ("gpt2", {"measure": "signed", "backend": "reference", "neurons": True}),
    "some rows": ("gpt_neox", {"positions": [2, 5]}),
    "mixers": ("jamba", {}),
}
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    2**31,
    2**63,
    -(2**63),
    10**18,
    0.5,
    -0.5,
    1.5,
    1e308,
    1e-320,
    "",
    "x",
    "\x00",
    "signed",
    "exact",
    "parallel",
    "\U0001f600" * 9,
    [],
    [[]],
    {},
    [1],
    {"a": 1},
    ["x", 0.5],
    float("nan"),
    float("inf"),
]
FIGURES = [float("nan"), float("inf"), float("-inf"), -1.0, -1e-3, 0.0, 1e-45, 1e-30, 0.5, 0.999, 1.0, 1.01, 2.0, 3e38]
WHOLE = [-(2**31), -2, -1, 0, 1, 2, 5, 6, 7, 100, 2**31 - 1]


def valid_traces():
    models = {name: make(name) for name, _ in KINDS.values()}
    with pytest.MonkeyPatch.context() as patch:
        # intervals also where evaluating everything is cheaper
        patch.setattr("flowroutes_fast.tracing.importances.FEW_KEYS", 0)
        found = {kind: fr.trace(models[name], None, IDS, **options) for kind, (name, options) in KINDS.items()}
    assert (found["certified"].normaliser_low < found["certified"].normaliser_high).any()
    assert any((index[2] < 0).any() for index, _ in found["certified"].sparse)
    return found


def valid_routes(traces):
    found = []
    for trace in traces.values():
        trace = copy.copy(trace)
        for options in (
            {"threshold": 0.04},
            {"threshold": 0.04, "renormalize": False},
            {"position": [2, -1], "rule": "flow", "keep": 0.3},
        ):
            try:
                found.append(trace.route(**options))
            except ValueError:  # rows that were not traced
                continue
    return found


def parts_of(file):
    """Metadata and tensors of a trace file."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata()), {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def write_parts(file, metadata, tensors, checksum):
    """``checksum``: "right" for what is written now, "none", or "stale"."""
    metadata = dict(metadata)
    if checksum == "none":
        metadata.pop("sha256", None)
    elif checksum == "right":
        metadata["sha256"] = trace_file.checksum(metadata.get("trace", ""), tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def spoil_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 3000))
        way = rng.randrange(5)
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[at] = rng.choice(b'\x00\xff"{}[]0919-,:')
        elif way == 2:
            del data[at : at + rng.choice([1, 7, 400])]
        elif way == 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8])))
        else:
            del data[at:]
        if not data:
            data = bytearray(b"{")
    return bytes(data)


def spoil_json(document, rng):
    """One place of a JSON document replaced, removed, repeated or added to."""
    parent, key = None, None
    node = document
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.75):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    way = rng.randrange(6)
    if way < 3 or parent is None:
        value = copy.deepcopy(rng.choice(VALUES))
        if parent is None:
            return value
        parent[key] = value
    elif way == 3:
        del parent[key]
    elif way == 4 and isinstance(parent, dict):
        parent[rng.choice(["x", "edges", "dense", key + " "])] = copy.deepcopy(node)
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(node))
    return document


def spoil_tensors(tensors, rng):
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    way = rng.randrange(9)
    if way < 4 and tensor.numel():
        flat = tensor.flatten().clone()
        for _ in range(rng.choice([1, 1, 3, 50])):
            flat[rng.randrange(len(flat))] = rng.choice(WHOLE) if tensor.dtype == torch.int32 else rng.choice(FIGURES)
        tensors[name] = flat.view(tensor.shape)
    elif way == 4:
        tensors[name] = (tensor * rng.choice([0, 0.5, 2, -1])).to(tensor.dtype)
    elif way == 5:
        tensors[name] = tensor.to(
            rng.choice([torch.float64, torch.float16, torch.bool, torch.int64, torch.int32, torch.float32])
        )
    elif way == 6:
        tensors[name] = rng.choice(
            [
                tensor[:0],
                tensor[:1],
                tensor[None],
                tensor.flatten(),
                tensor.T.contiguous() if tensor.dim() == 2 else tensor[..., :0],
            ]
        )
    elif way == 7:
        del tensors[name]
    else:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()


def spoil_trace(file, target, rng):
    """Write a spoilt copy of a trace file; its kind of damage."""
    way = rng.choice(["bytes", "json", "json", "tensors", "tensors", "tensors"])
    if way == "bytes":
        target.write_bytes(spoil_bytes(file.read_bytes(), rng))
        return way
    metadata, tensors = parts_of(file)
    if way == "json":
        metadata["trace"] = json.dumps(spoil_json(json.loads(metadata["trace"]), rng))
    else:
        for _ in range(rng.choice([1, 1, 2])):
            if tensors:
                spoil_tensors(tensors, rng)
    checksum = rng.choice(["right", "right", "none", "stale"])
    write_parts(target, metadata, tensors, checksum)
    return f"{way}, checksum {checksum}"


def spoil_route(document, target, rng):
    if rng.random() < 0.25:
        target.write_bytes(spoil_bytes(json.dumps(document).encode(), rng))
        return "bytes"
    spoilt = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2])):
        spoilt = spoil_json(spoilt, rng)
    checksum = rng.choice(["right", "right", "none", "stale"])
    if isinstance(spoilt, dict) and checksum != "stale":
        spoilt.pop("sha256", None)
        if checksum == "right":
            with suppress(ValueError):  # NaN
                spoilt["sha256"] = documents.digest_of(spoilt)
    target.write_text(json.dumps(spoilt))
    return f"json, checksum {checksum}"


def attempt(call, *arguments, **options):
    """Call; None where it refuses with a sentence of ours. Anything raw, and any warning, goes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return call(*arguments, **options)
        except ValueError as error:
            if type(error) is not ValueError or not str(error) or "\n" in str(error):
                raise
            return None


def use_route(route, folder):
    for width in (None, 30, 200):
        attempt(route.to_text, width)
    attempt(route.to_html, folder / "route.html")
    attempt(route.to_circuit_tracer, folder / "graphs", slug="a")
    attempt(route.to_networkx)
    attempt(route._repr_html_)
    attempt(lambda: (repr(route), route.roots, route.token_edges))
    again = attempt(fr.load_route, route.save(folder / "again.json"))
    assert again is not None
    assert again.edges.equals(route.edges)


def use_trace(trace, folder, pages=True):
    attempt(lambda: (repr(trace), trace.certificate, trace.normaliser_bounds))
    for layer in range(trace.n_layers):
        attempt(trace.edges, layer)
        attempt(trace.edges, layer, 0.5)
        attempt(trace.neurons, layer)
        attempt(trace.attention, layer)
        attempt(trace.has_mixer, layer)
    for position in (-1, 0, [0, len(trace.tokens) - 1]):
        attempt(trace.token_attribution, position)
        for threshold in (None, 0.0, 0.01, 0.3):
            for renormalize in (True, False):
                route = attempt(trace.route, position, threshold, renormalize)
            attempt(trace.route, position, 0.3 if threshold is None else threshold, rule="flow")
        attempt(trace.route, position, rule="flow", keep=0.2)
    if route is not None:
        use_route(route, folder)
    if pages:
        attempt(trace.to_html, folder / "trace.html")
        attempt(trace._repr_html_)
    attempt(fr.head_frequencies, [trace])
    attempt(fr.contrast, trace, trace)
    again = attempt(fr.load_trace, trace.save(folder / "again.trace"))
    assert again is not None
    assert all(np.array_equal(getattr(again, name), getattr(trace, name), equal_nan=True) for name in trace_file.ARRAYS)


def generator(seed):
    return random.Random(seed)
