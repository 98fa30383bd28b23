"""The traced pass: parts add up, the model comes back, figures equal the reference tool's and fp64."""

import copy
import multiprocessing
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IOI, KINDS, tiny
from safetensors.torch import load_file

import flowroutes_fast as fr
from flowroutes_fast import ops
from flowroutes_fast.capture.hooks import capture
from flowroutes_fast.ops.reference import attention_pattern
from flowroutes_fast.tracing.importances import conservation_error, parts_of

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bias", ["part", "value"])
def test_parts_add_up_to_the_states(kind, attention, bias):
    model = tiny(kind, attn_implementation=attention)
    errors = []
    capture(model, torch.tensor([IDS]), lambda layer: errors.append(conservation_error(layer, bias)))
    assert len(errors) == 3
    assert max(errors) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_importances_equal_an_fp64_evaluation(kind):
    model = tiny(kind)
    trace = fr.trace(model, None, IDS, precision="exact")

    def compare(layer):
        parts = parts_of(layer)
        pattern = attention_pattern(
            layer.query.double(), layer.key.double(), scaling=layer.scaling, mask=layer.mask, window=layer.window
        )
        group = parts.w_o.shape[0] // parts.value.shape[0]
        z = torch.einsum(
            "hqk,hkd,hdm->qkhm", pattern, parts.value.double().repeat_interleave(group, 0), parts.w_o.double()
        )
        y = parts.whole.double()

        def proximity(part, whole):
            return (whole.abs().sum(-1) - (part - whole).abs().sum(-1)).clamp_min(0)

        edge, residual = proximity(z, y[:, None, None]), proximity(parts.residual.double(), y)
        total = edge.sum((1, 2)) + residual
        if parts.constant is not None:
            total = total + proximity(parts.constant.double(), y)
        if layer.resid_mid is None:
            ffn = proximity(layer.ffn_out.double(), y)
            total = total + ffn
            np.testing.assert_allclose(trace.ffn[layer.index], ffn / total, atol=1e-5)
        np.testing.assert_allclose(trace.attention(layer.index), edge / total[:, None, None], atol=1e-5)
        np.testing.assert_allclose(trace.attention_residual[layer.index], residual / total, atol=1e-5)

    capture(model, torch.tensor([IDS]), compare)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_sum_to_one(kind):
    trace = fr.trace(tiny(kind), None, IDS, precision="exact")
    total = trace.heads.sum(-1) + trace.attention_residual + trace.attention_bias
    if kind == "neox":
        assert trace.shapes == ["parallel"] * 3
        assert trace.ffn_residual.isnan().all()
        total = total + trace.ffn
    else:
        np.testing.assert_allclose(trace.ffn + trace.ffn_residual, 1, atol=1e-5)
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_the_model_comes_back_unchanged():
    model = tiny("llama").train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fr.trace(model, None, IDS)
    with pytest.raises(KeyError, match="stop"):
        capture(model, torch.tensor([IDS]), lambda layer: (_ for _ in ()).throw(KeyError("stop")))
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.demo_model
@pytest.mark.parametrize(("name", "text"), [("ioi", IOI), ("capital", "The capital of France is")])
def test_parity_with_the_reference_tool(demo, name, text):
    model, tokenizer = demo
    wanted = load_file(Path(__file__).parents[1] / "data/reference_tool_smollm2.safetensors")
    ids = tokenizer(text)["input_ids"]
    assert ids == wanted[f"{name}.input_ids"].tolist()

    def compare(layer):
        parts, i = parts_of(layer), layer.index
        pattern = attention_pattern(layer.query, layer.key, scaling=layer.scaling)
        edge, residual = ops.attention_importances(
            pattern[None],
            parts.value.transpose(0, 1)[None],
            parts.w_o,
            parts.residual[None],
            parts.whole[None],
            clip=1e-5,
        )
        assert (edge[0] - wanted[f"{name}.attention"][i]).abs().max() < 3e-4
        assert (residual[0] - wanted[f"{name}.attention_residual"][i]).abs().max() < 3e-4
        ffn = torch.ops.flowroutes.part_proximity(layer.ffn_out, layer.resid_post, "auto").clamp_min(1e-5)
        through = torch.ops.flowroutes.part_proximity(layer.resid_mid, layer.resid_post, "auto").clamp_min(1e-5)
        assert (ffn / (ffn + through) - wanted[f"{name}.ffn"][i]).abs().max() < 3e-4

    capture(model, torch.tensor([ids]), compare)


@pytest.mark.demo_model
def test_the_demo_prediction_and_route(demo):
    trace = fr.trace(*demo, IOI, precision="exact")
    assert trace.prediction[0][0] == " Mary"
    assert trace.prediction[0][1] == pytest.approx(0.92, abs=0.01)
    route = trace.route()
    assert len(route.token_edges) == 377
    edges = {(e.layer, e.source, e.target) for e in route.edges[route.edges.kind == "attention"].itertuples()}
    assert {(20, 9, 13), (23, 1, 13)} <= edges  # John -> to, Mary -> to (the name mover)


def test_dense_or_edges_say_the_same():
    model = tiny("llama")
    dense, sparse = (
        fr.trace(model, None, IDS, precision="exact"),
        fr.trace(model, None, IDS, precision="exact", dense=False, floor=0.01),
    )
    for renormalize in (True, False):
        a, b = (t.route(threshold=0.02, renormalize=renormalize).edges for t in (dense, sparse))
        keys = ["layer", "kind", "target", "source", "head"]
        a, b = (t.sort_values(keys, ignore_index=True) for t in (a, b))
        assert a[keys].equals(b[keys])
        np.testing.assert_allclose(a.importance, b.importance, atol=1e-6)
    with pytest.raises(ValueError, match="dense=True"):
        sparse.attention(0)
    with pytest.raises(ValueError, match="floor"):
        sparse.route(threshold=0.001)


@pytest.mark.parametrize("dense", [True, False])
def test_saving_and_loading(tmp_path, dense):
    trace = fr.trace(tiny("gpt2"), None, IDS, precision="exact", dense=dense)
    again = fr.load_trace(trace.save(tmp_path / "a.trace"))
    assert again.route().edges.equals(trace.route().edges)
    assert again.tokens == trace.tokens
    whole = (tmp_path / "a.trace").read_bytes()
    (tmp_path / "cut.trace").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.trace").write_text("hello")
    for name in ("cut.trace", "other.trace"):
        with pytest.raises(ValueError, match=name):
            fr.load_trace(tmp_path / name)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    trace = fr.trace(tiny("llama"), None, IDS)
    trace.save(tmp_path / "a.trace")
    before = (tmp_path / "a.trace").read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"cannot write '.*a\.trace'.*No space left"):
        trace.save(tmp_path / "a.trace")
    assert [file.name for file in tmp_path.iterdir()] == ["a.trace"]
    assert (tmp_path / "a.trace").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ([], {}, ValueError, "no tokens"),
        ([5, 101], {}, ValueError, "token id 101 at position 1"),
        ([5] * 65, {}, ValueError, "65 tokens but the model's context holds 64"),
        ([[[1, 2]]], {}, ValueError, r"shape \[token\]"),
        ([1.5], {}, TypeError, "integers"),
        ("hello", {}, TypeError, "needs a tokenizer"),
        ([5], {"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
        ([5], {"precision": "rough"}, ValueError, "unknown precision 'rough'"),
        ([5], {"bias": "no"}, ValueError, "unknown bias mode"),
    ],
)
def test_bad_input(text, options, error, says):
    with pytest.raises(error, match=says):
        fr.trace(tiny("llama"), None, text, **options)


def test_nan_names_the_layer():
    model = tiny("llama")
    fr.trace(model, None, IDS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1"):
        fr.trace(model, None, IDS)


def test_unknown_families_and_wrong_parts_are_refused():
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match="bert is an encoder"):
        fr.trace(
            BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)),
            None,
            [1],
        )
    model = tiny("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 1.5, *out[1:]))
    with pytest.raises(ValueError, match="layer 1: the captured parts miss"):
        fr.trace(model, None, IDS)


def same(a, b):
    """Are two values of a trace the same, NaN included?"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "refine"
        )
    return a == b


@pytest.fixture(scope="module")
def open_trace():
    """A model and a certified trace with rows that its intervals leave open at other thresholds."""
    model = tiny("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowroutes_fast.tracing.importances.FEW_KEYS", 0)  # also where evaluating everything is cheaper
        return model, fr.trace(model, None, list(range(7, 36)), tolerance=0.3, thresholds=(), neurons=True)


def open_threshold(trace):
    """A threshold between the ends of what the root's residual connection may be."""
    low, high = (t[-1, -1].double() for t in (trace.normaliser_low, trace.normaliser_high))
    assert low < high
    return float(trace.attention_residual[-1, -1] * (low + high) / 2 / high) * 1.0001


def test_a_pickled_trace_keeps_no_model(open_trace):
    _, trace = open_trace
    trace = copy.deepcopy(trace)
    again = pickle.loads(pickle.dumps(trace))
    assert same(trace, again)
    assert again.refine is None
    threshold = open_threshold(trace)
    with pytest.raises(ValueError, match="its model is gone"):
        again.route(threshold=threshold)
    assert len(trace.route(threshold=threshold).edges)
    for options in ({"precision": "exact"}, {"measure": "signed"}, {"positions": [3]}):
        trace = fr.trace(tiny("gpt2"), None, IDS, **options)
        assert same(trace, pickle.loads(pickle.dumps(trace, protocol=2)))
    route = trace.route(3, 0.05)
    again = pickle.loads(pickle.dumps(route))
    assert again.to_dict() == route.to_dict()
    assert again.token_edges.equals(route.token_edges)


def test_a_copied_trace_settles_with_the_same_model(open_trace):
    model, trace = open_trace
    deep = copy.deepcopy(trace)
    assert copy.copy(trace).refine is deep.refine is trace.refine
    assert same(trace, deep)
    assert deep.heads is not trace.heads
    before = copy.deepcopy(deep)
    assert len(deep.route(threshold=open_threshold(deep)).edges)
    assert deep.work["exhausted"] > before.work["exhausted"]
    assert same(trace, before)  # the copy alone was refined
    two = copy.deepcopy([trace, trace])
    assert two[0] is two[1]
    assert model is not None


def test_traces_go_to_other_processes_and_back(open_trace):
    _, trace = open_trace
    route = trace.route(threshold=0.3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        again, route_again = pool.apply(copy.copy, ([trace, route],))
    assert same(trace, again)
    assert again.route(threshold=0.3).edges.equals(route.edges)
    assert route_again.to_dict() == route.to_dict()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: t.route(True), TypeError, "position must be an integer, got True"),
        (lambda t: t.route(1.0), TypeError, "position must be an integer, got 1.0"),
        (lambda t: t.route("1"), TypeError, "position must be an integer, got '1'"),
        (lambda t: t.route(None), TypeError, "position must be an integer, got None"),
        (lambda t: t.route([1, "2"]), TypeError, "got '2'"),
        (lambda t: t.route([[1]]), TypeError, "position must be an integer"),
        (lambda t: t.route({1: 2}), TypeError, "position must be an integer"),
        (lambda t: t.route(np.array([])), ValueError, "needs a root"),
        (lambda t: t.route(torch.tensor([0.5])), TypeError, "position must be an integer"),
        (lambda t: t.route(29), IndexError, "position 29 is out of range"),
        (lambda t: t.route(2**70), IndexError, "is out of range"),
        (lambda t: t.route(threshold=float("nan")), ValueError, "threshold must lie in"),
        (lambda t: t.route(threshold=float("inf")), ValueError, "threshold must lie in"),
        (lambda t: t.route(threshold="0.1"), TypeError, "threshold must be a number, got '0.1'"),
        (lambda t: t.route(threshold=10**400), ValueError, "threshold must be a finite number"),
        (lambda t: t.route(threshold=True), TypeError, "threshold must be a number"),
        (lambda t: t.route(threshold=False), TypeError, "threshold must be a number"),
        (lambda t: t.route(threshold=[0.1]), TypeError, "threshold must be a number"),
        (lambda t: t.route(renormalize="no"), TypeError, "renormalize must be True or False, got 'no'"),
        (lambda t: t.route(rule="flow", keep=float("nan")), ValueError, "keep must be a finite number"),
        (lambda t: t.route(rule="flow", keep="all"), TypeError, "keep must be a number"),
        (lambda t: t.route(rule=["flow"]), ValueError, "unknown rule"),
        (lambda t: t.edges(1.5), TypeError, "layer must be an integer, got 1.5"),
        (lambda t: t.edges(True), TypeError, "layer must be an integer"),
        (lambda t: t.edges(3), IndexError, "layer 3 is out of range"),
        (lambda t: t.edges(0, float("nan")), ValueError, "floor must lie in"),
        (lambda t: t.edges(0, -0.1), ValueError, "floor must lie in"),
        (lambda t: t.edges(0, 1), ValueError, "floor must lie in"),
        (lambda t: t.edges(0, "x"), TypeError, "floor must be a number"),
        (lambda t: t.attention("0"), TypeError, "layer must be an integer"),
        (lambda t: t.neurons(None), TypeError, "layer must be an integer"),
        (lambda t: t.has_mixer(9), IndexError, "layer 9 is out of range"),
        (lambda t: t.token_attribution(slice(3, 3)), ValueError, "holds no position"),
        (lambda t: t.token_attribution(slice(0, 5, 0)), ValueError, "slice step"),
        (lambda t: t.token_attribution(slice("a", "b")), TypeError, "slice indices"),
        (lambda t: t.token_attribution(0.5), TypeError, "position must be an integer"),
        (lambda t: t.to_html("x.html", threshold=float("nan")), ValueError, "threshold must lie in"),
        (lambda t: t.to_html("x.html", position=[1]), TypeError, "position must be an integer"),
        (lambda t: t.to_html("x.html", other=[t]), TypeError, "other must be a trace, got a list"),
        (
            lambda t: t.to_html("x.html", signed=t.route(threshold=0.3)),
            TypeError,
            "signed must be a trace, got a Route",
        ),
        (lambda t: t.save(None), TypeError, "path must be"),
        (lambda t: t.save(3), TypeError, "path must be"),
        (lambda t: t.route(threshold=0.3).to_text("wide"), TypeError, "width must be an integer"),
        (
            lambda t: t.route(threshold=0.3).to_circuit_tracer("x", min_weight="0"),
            TypeError,
            "min_weight must be a number",
        ),
        (lambda t: t.route(threshold=0.3).to_circuit_tracer("x", slug=3), TypeError, "slug must be a text"),
    ],
)
def test_arguments_that_make_no_sense(open_trace, call, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says) as caught:
        call(open_trace[1])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_numbers_of_other_libraries_are_taken(open_trace):
    _, trace = open_trace
    wanted = trace.route(28, 0.3)
    for position in (
        np.int64(28),
        np.uint8(28),
        torch.tensor(28),
        [np.int32(-1)],
        np.array([28]),
        torch.tensor([28]),
        range(28, 29),
        np.array(28),
    ):
        for threshold in (np.float64(0.3), 0.3):
            route = trace.route(position, threshold, np.bool_(True))
            assert route.edges.equals(wanted.edges)
            assert route.to_dict() == wanted.to_dict()
    assert trace.edges(np.int64(2), np.float32(0.25)).equals(trace.edges(2, 0.25))
    assert trace.token_attribution(slice(np.int64(3), None)).equals(trace.token_attribution(range(3, 29)))
