"""Files that a stranger may hand over: each is refused at once, in one sentence that names it."""

import json
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from mutations import IDS, make, parts_of, write_parts

import flowroutes_fast as fr
from flowroutes_fast.system import documents

LOADERS = (fr.load_trace, fr.load_route)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trace and a route of it, as files."""
    folder = tmp_path_factory.mktemp("saved")
    trace = fr.trace(make("llama"), None, IDS, backend="reference", neurons=True)
    return trace.save(folder / "trace.safetensors"), trace.route().save(folder / "route.json")


def refused(load, file, says=""):
    with pytest.raises(fr.DamagedFile, match=says or None) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def with_header(file, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return file


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"{",
        b"hello",
        b"\xff\xfe{\0}\0",
        b"\xef\xbb\xbf{}",
        b"{}",
        b"[]",
        b"null",
        b"1e999",
        b"PK\x03\x04" + bytes(200),
        b"\x89HDF\r\n",
        pickle.dumps({"format": "flowroutes_fast.route"}),
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        bytes(100_000),
    ],
)
def test_files_of_other_kinds(load, content, tmp_path):
    file = tmp_path / "trace.safetensors"
    file.write_bytes(content)
    refused(load, file)


@pytest.mark.parametrize("load", LOADERS)
def test_what_is_no_plain_file(load, saved, tmp_path):
    good = saved[LOADERS.index(load)]
    link = tmp_path / "link"
    link.symlink_to(good)
    assert load(link).tokens
    assert load(str(link)).tokens
    assert load(os.fsencode(link)).tokens
    dangling, loop = tmp_path / "dangling", tmp_path / "loop"
    dangling.symlink_to(tmp_path / "nowhere")
    loop.symlink_to(loop)
    for missing in (dangling, tmp_path / "nowhere", good / "below", "", "a\0b"):
        with pytest.raises(FileNotFoundError, match=r"no (trace|route) file at"):
            load(missing)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(OSError, match="loop"):
        load(loop)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to the pipe").symlink_to(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", tmp_path / "to the pipe", "/dev/zero"):
        refused(load, endless, "pipe or a device")
    with pytest.raises(TypeError):
        load(0)  # no file descriptors


def test_headers_that_promise_what_is_not_there(saved, tmp_path):
    file, about = (
        tmp_path / "a.safetensors",
        {"format": "flowroutes_fast.trace", "version": "3", "trace": parts_of(saved[0])[0]["trace"]},
    )
    huge = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    tracemalloc.start()
    for tensor in (
        huge,
        huge | {"shape": [2**63, 2]},
        huge | {"shape": [0, 10**12], "data_offsets": [0, 0]},
        huge | {"data_offsets": [4, 0]},
        huge | {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
        huge | {"dtype": "I7"},
        huge | {"shape": [-1]},
        huge | {"shape": [1], "data_offsets": [2**64, 2**64 + 4]},
    ):
        refused(fr.load_trace, with_header(file, {"__metadata__": about, "heads": tensor}, bytes(64)))
    one = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    refused(fr.load_trace, with_header(file, {"__metadata__": about, "heads": one, "ffn": one}, bytes(32)))
    refused(
        fr.load_trace,
        with_header(file, {"__metadata__": about, "heads": one, "ffn": one | {"data_offsets": [16, 48]}}, bytes(48)),
    )
    refused(fr.load_trace, with_header(file, {"__metadata__": about, "heads": one}, bytes(64)))
    refused(fr.load_trace, with_header(file, {"__metadata__": about | {"trace": "[" * 100_000}}), "nested")
    refused(fr.load_trace, with_header(file, {"__metadata__": about | {"trace": "null"}}), "no table")
    refused(fr.load_trace, with_header(file, {"__metadata__": {"format": 3}}))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_many_tokens_take_no_memory_before_they_are_checked(saved, tmp_path):
    metadata, tensors = parts_of(saved[0])
    header = json.loads(metadata["trace"])
    metadata["trace"] = json.dumps(header | {"tokens": ["x"] * 10**6, "token_ids": []})
    write_parts(tmp_path / "a", metadata, tensors, "right")
    refused(fr.load_trace, tmp_path / "a", "has shape")


TRACE_FIELDS = [
    ({"tokens": ["a"] * 5}, "token ids"),
    ({"tokens": "abcdef"}, "no list"),
    ({"tokens": [1] * 6}, "no text"),
    ({"tokens": ["\ud800"] * 6}, "Unicode"),
    ({"token_ids": [True] * 6}, "integers"),
    ({"token_ids": [-1] * 6}, "outside"),
    ({"token_ids": [1.0] * 6}, "integers"),
    ({"token_ids": [2**63] * 6}, "outside"),
    ({"shapes": ["sequential"] * 2}, ""),
    ({"shapes": ["round"] * 3}, "round"),
    ({"shapes": []}, "0 layers"),
    ({"floor": 1.0}, "floor"),
    ({"floor": -0.1}, "floor"),
    ({"floor": "0.1"}, "floor"),
    ({"floor": True}, "floor"),
    ({"floor": None}, "floor"),
    ({"thresholds": [2]}, "thresholds"),
    ({"thresholds": 0.1}, "thresholds"),
    ({"precision": "rough"}, "precision"),
    ({"measure": ["signed"]}, "measure"),
    ({"measure": "signed", "precision": "exact"}, "exclude"),
    ({"backend": "abacus"}, "backend"),
    ({"bias": ""}, "bias"),
    ({"tolerance": -1}, "tolerance"),
    ({"work": {"bounded": -1}}, "work"),
    ({"work": {"bounded": 1.5}}, "work"),
    ({"work": []}, "work"),
    ({"timings": {"total": -1}}, "timings"),
    ({"timings": {"total": "1"}}, "timings"),
    ({"mixers": ["Mamba"]}, "mixers"),
    ({"prediction": [["a", 2]]}, "prediction"),
    ({"prediction": [["a"]]}, "prediction"),
    ({"prediction": [[1, 0.5]]}, "prediction"),
    ({"prediction": {"a": 0.5}}, "prediction"),
    ({"refine": 1}, "nothing is known"),
    ({"dense": []}, "nothing is known"),
    ({"model": None}, "model"),
    ({"model": "\x1b[2J"}, "control"),
]


@pytest.mark.parametrize(("fields", "says"), TRACE_FIELDS)
@pytest.mark.parametrize("checksum", ["right", "none"])
def test_fields_of_traces(fields, says, checksum, saved, tmp_path):
    metadata, tensors = parts_of(saved[0])
    metadata["trace"] = json.dumps(json.loads(metadata["trace"]) | fields)
    write_parts(tmp_path / "a.trace", metadata, tensors, checksum)
    refused(fr.load_trace, tmp_path / "a.trace", says)


@pytest.mark.parametrize("name", ["precision", "measure", "floor", "bias", "shapes", "timings"])
def test_no_field_of_a_trace_has_a_default(name, saved, tmp_path):
    """Without its precision, a certified trace would pass for an exact one, and its open decisions for made."""
    metadata, tensors = parts_of(saved[0])
    header = json.loads(metadata["trace"])
    del header[name]
    write_parts(tmp_path / "a.trace", metadata | {"trace": json.dumps(header)}, tensors, "right")
    refused(fr.load_trace, tmp_path / "a.trace", f"{name} is missing")


@pytest.mark.parametrize("name", ["measure", "rule", "keep", "positions", "renormalize"])
def test_no_field_of_a_route_has_a_default(name, saved, tmp_path):
    document = json.loads(saved[1].read_text())
    del document[name], document["sha256"]
    (tmp_path / "a.json").write_text(json.dumps(document))
    refused(fr.load_route, tmp_path / "a.json", f"{name} is missing")


@pytest.mark.parametrize(
    "text",
    [
        '{"floor": NaN}',
        '{"floor": 1e999}',
        '{"floor": ' + "1" * 10_000 + "}",
        '{"floor": 1, "floor": 0}',
        "[" * 100_000,
        "{",
        '"\\ud800"',
    ],
)
def test_json_that_python_would_take(text, saved, tmp_path):
    metadata, tensors = parts_of(saved[0])
    write_parts(tmp_path / "a.trace", metadata | {"trace": text}, tensors, "right")
    refused(fr.load_trace, tmp_path / "a.trace")
    (tmp_path / "a.json").write_text(text)
    refused(fr.load_route, tmp_path / "a.json")


def changed(name, at, value):
    def change(tensors):
        tensors[name][at] = value

    return change


def scaled(name, factor):
    def change(tensors):
        tensors[name] = tensors[name] * factor

    return change


def put(name, value):
    def change(tensors):
        tensors[name] = value(tensors)

    return change


ARRAYS = [
    (changed("heads", (0, 0, 0), float("nan")), "numbers where nothing"),
    (changed("normaliser_low", (0, 3), float("nan")), "numbers where"),
    (changed("ffn", (1, 2), float("inf")), "finite"),
    (changed("mixer", (1, 2), -0.5), "outside"),
    (changed("attention_residual", (1, 2), 3.0), "outside"),
    (scaled("heads", 0.5), "heads_low"),
    (scaled("attention_residual", 0.5), "sum to 1"),
    (scaled("ffn", 0.9), "sum to 1"),
    (scaled("normaliser_high", 0.01), "above normaliser_high"),
    (changed("heads_low", (2, 3, 1), 0.99), "heads_low"),
    (changed("edge_index.1", (0, 3), 6), "names queries"),
    (changed("edge_index.1", (0, 3), -1), "names queries"),
    (changed("edge_index.1", (1, 0), 5), "keys after"),
    (changed("edge_index.1", (2, 3), 6), "names queries"),
    (changed("edge_index.1", (2, 3), -2), "names queries"),
    (changed("edge_index.0", (0, 0), 2**31 - 1), "names queries"),
    (put("edge_index.1", lambda t: t["edge_index.1"][:, [0, *range(t["edge_index.1"].shape[1] - 1)]]), "twice"),
    (put("edge_index.1", lambda t: t["edge_index.1"].long()), "type I64"),
    (put("heads", lambda t: t["heads"].double()), "type F64"),
    (put("edge_index.1", lambda t: t["edge_index.1"][:, :-1]), "shape"),
    (put("edge_importance.1", lambda t: t["edge_importance.1"][:-1]), "shape"),
    (changed("edge_importance.1", 2, float("nan")), "finite"),
    (changed("edge_importance.1", 2, -0.1), "negative"),
    (changed("edge_importance.1", 2, 1.5), "above 1"),
    (scaled("edge_importance.1", 1.5), ""),
    (put("ffn", lambda t: t["ffn"][:, :-1]), "shape"),
    (put("ffn", lambda t: t["ffn"][None]), "shape"),
    (put("ffn2", lambda t: t["ffn"].clone()), "nothing is known"),
    (put("dense.0", lambda t: torch.zeros(6, 6, 6)), ""),
    (lambda t: t.pop("edge_index.2"), "missing"),
    (lambda t: t.pop("heads"), "missing"),
    (lambda t: t.pop("neuron_low.0"), "missing"),
    (changed("neuron_index.0", (0, 0), 6), "positions that there are not"),
    (changed("neuron_importance.0", 0, 2.0), "outside"),
    (changed("neuron_low.0", 1, float("nan")), "no bound"),
    (changed("neuron_low.0", 1, 1e30), "above"),
]


@pytest.mark.parametrize(("change", "says"), ARRAYS)
@pytest.mark.parametrize("checksum", ["right", "none"])
def test_arrays_of_traces(change, says, checksum, saved, tmp_path):
    metadata, tensors = parts_of(saved[0])
    change(tensors)
    write_parts(tmp_path / "a.trace", metadata, tensors, checksum)
    refused(fr.load_trace, tmp_path / "a.trace", says)


def test_the_checksum_finds_what_could_have_been(saved, tmp_path):
    metadata, tensors = parts_of(saved[0])
    tensors["ffn"][0, 0] += 1e-6
    write_parts(tmp_path / "a.trace", metadata, tensors, "stale")
    refused(fr.load_trace, tmp_path / "a.trace", "checksum")
    write_parts(tmp_path / "a.trace", metadata, tensors, "none")  # as earlier releases wrote it
    assert fr.load_trace(tmp_path / "a.trace").tokens
    document = json.loads(saved[1].read_text())
    (tmp_path / "a.json").write_text(json.dumps(document | {"model": "another"}))
    refused(fr.load_route, tmp_path / "a.json", "checksum")
    del document["sha256"]
    (tmp_path / "a.json").write_text(json.dumps(document, indent=3))
    assert fr.load_route(tmp_path / "a.json").tokens


ROUTE_FIELDS = [
    {"tokens": []},
    {"tokens": ["\udfff"] * 6},
    {"position": 6},
    {"position": -1},
    {"position": True},
    {"position": 2.0},
    {"position": 2},
    {"positions": [5, 2]},
    {"positions": [5, 5]},
    {"positions": "5"},
    {"threshold": 1.5},
    {"threshold": -1},
    {"threshold": "0"},
    {"threshold": False},
    {"renormalize": 1},
    {"shapes": []},
    {"shapes": ["x"] * 3},
    {"measure": "x"},
    {"rule": "x"},
    {"keep": 0.5},
    {"keep": 2, "rule": "flow"},
    {"token_ids": [1]},
    {"prediction": [["a", -1]]},
    {"model": 3},
    {"model": "a\nb"},
    {"edges": []},
    {"edges": {}},
    {"version": 0},
    {"version": 99},
    {"version": True},
    {"version": "2"},
    {"format": "x"},
    {"unknown": 1},
    {"rule": "flow", "renormalize": False},
]
EDGES = [
    ("layer", 3),
    ("layer", -1),
    ("layer", 0.0),
    ("layer", True),
    ("kind", "x"),
    ("kind", 1),
    ("source", 6),
    ("source", "0"),
    ("target", -1),
    ("head", -2),
    ("head", 2**40),
    ("importance", 2),
    ("importance", -0.1),
    ("importance", "1"),
    ("importance", True),
    ("importance", None),
]


@pytest.mark.parametrize("fields", ROUTE_FIELDS)
def test_fields_of_routes(fields, saved, tmp_path):
    document = json.loads(saved[1].read_text()) | fields
    del document["sha256"]
    document["sha256"] = documents.digest_of(document)
    (tmp_path / "a.json").write_text(json.dumps(document))
    refused(fr.load_route, tmp_path / "a.json")


@pytest.mark.parametrize(("column", "value"), EDGES)
def test_edges_of_routes(column, value, saved, tmp_path):
    document = json.loads(saved[1].read_text())
    del document["sha256"]
    document["edges"][column][0] = value
    (tmp_path / "a.json").write_text(json.dumps(document))
    refused(fr.load_route, tmp_path / "a.json", "edges")


def test_tables_of_routes(saved, tmp_path):
    whole = json.loads(saved[1].read_text())
    del whole["sha256"]
    edges = whole["edges"]
    for spoilt in (
        {**edges, "head": edges["head"][:-1]},
        {**edges, "more": edges["head"]},
        {name: [*values, values[0]] for name, values in edges.items()},
        {**edges, "source": [0] * len(edges["source"])},
        {name: dict(enumerate(values)) for name, values in edges.items()},
    ):
        (tmp_path / "a.json").write_text(json.dumps({**whole, "edges": spoilt}))
        refused(fr.load_route, tmp_path / "a.json", "edges|'more'")


def test_names_that_are_no_unicode_are_written_and_read(saved, tmp_path):
    trace = fr.load_trace(saved[0])
    trace.model = os.fsdecode(b"caf\xe9\n\x1b[31m")
    assert fr.load_trace(trace.save(tmp_path / "a.trace")).model == "caf???[31m"
    assert fr.load_route(trace.route().save(tmp_path / "a.json")).model == "caf???[31m"


def test_what_a_users_trace_may_hold_is_written(saved, tmp_path):
    """Numbers of numpy among its settings, arrays that share their memory."""
    trace = fr.load_trace(saved[0])
    trace.floor, trace.tolerance, trace.token_ids = np.float32(trace.floor), np.float64(0.01), list(np.array(IDS))
    trace.mixer = trace.attention_bias = torch.zeros(4, *trace.ffn.shape)[1]
    trace.attention_residual = 1 - trace.heads.sum(-1)
    trace.heads_low = trace.heads_high = trace.heads
    again = fr.load_trace(trace.save(tmp_path / "a.trace"))
    assert again.token_ids == IDS
    assert again.floor == trace.floor
    assert torch.equal(again.heads_low, trace.heads)
    assert fr.load_route(trace.route().save(tmp_path / "a.json")).token_ids == IDS


def test_a_metadata_file_of_graphs(saved, tmp_path):
    route = fr.load_route(saved[1])
    for text in (
        "[" * 100_000,
        '{"graphs": 3}',
        '{"graphs": ["a"]}',
        "1" * 10_000,
        '{"graphs": [{"slug": NaN}]}',
        "\xff",
        '{"graphs": null}',
    ):
        (tmp_path / "graph-metadata.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="lists no graphs"):
            route.to_circuit_tracer(tmp_path, slug="a")
    os.remove(tmp_path / "graph-metadata.json")
    os.mkfifo(tmp_path / "graph-metadata.json")
    with pytest.raises(ValueError, match="lists no graphs"):
        route.to_circuit_tracer(tmp_path, slug="a")
