"""The traced pass: parts add up, the model comes back, figures equal the reference tool's and fp64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IOI, KINDS, tiny
from safetensors.torch import load_file

import flowroutes_fast as fr
from flowroutes_fast import ops
from flowroutes_fast.capture import capture
from flowroutes_fast.layer import conservation_error, parts_of
from flowroutes_fast.reference import attention_pattern

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
        pattern = attention_pattern(layer.query.double(), layer.key.double(), scaling=layer.scaling, mask=layer.mask, window=layer.window)
        group = parts.w_o.shape[0] // parts.value.shape[0]
        z = torch.einsum("hqk,hkd,hdm->qkhm", pattern, parts.value.double().repeat_interleave(group, 0), parts.w_o.double())
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
    wanted = load_file(Path(__file__).parent / "data/reference_tool_smollm2.safetensors")
    ids = tokenizer(text)["input_ids"]
    assert ids == wanted[f"{name}.input_ids"].tolist()

    def compare(layer):
        parts, i = parts_of(layer), layer.index
        pattern = attention_pattern(layer.query, layer.key, scaling=layer.scaling)
        edge, residual = ops.attention_importances(
            pattern[None], parts.value.transpose(0, 1)[None], parts.w_o, parts.residual[None], parts.whole[None], clip=1e-5
        )
        assert (edge[0] - wanted[f"{name}.attention"][i]).abs().max() < 3e-4
        assert (residual[0] - wanted[f"{name}.attention_residual"][i]).abs().max() < 3e-4
        ffn = ops._part_proximity(layer.ffn_out, layer.resid_post, "auto").clamp_min(1e-5)
        through = ops._part_proximity(layer.resid_mid, layer.resid_post, "auto").clamp_min(1e-5)
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
    dense, sparse = fr.trace(model, None, IDS, precision="exact"), fr.trace(model, None, IDS, precision="exact", dense=False, floor=0.01)
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
        fr.trace(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)), None, [1])
    model = tiny("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 1.5, *out[1:]))
    with pytest.raises(ValueError, match="layer 1: the captured parts miss"):
        fr.trace(model, None, IDS)
