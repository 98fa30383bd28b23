"""Our functions in llm-transparency-tool's places: its graph and its numbers, against a double with its interface
and arithmetic.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flowroutes_fast.integrations import llm_transparency_tool as integration

HERE = Path(__file__).parent
NAMES = [(name, function.__name__) for name, functions in integration.SEAMS.items() for function in functions]
PARITY = 3e-4


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == integration.PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def tool(monkeypatch):
    """The double, imported afresh under the tool's name."""
    forget()
    monkeypatch.syspath_prepend(HERE / "transparency_double")
    importlib.invalidate_caches()
    yield SimpleNamespace(
        graph=importlib.import_module("llm_transparency_tool.routes.graph"),
        contributions=importlib.import_module("llm_transparency_tool.routes.contributions"),
        lens=importlib.import_module("llm_transparency_tool.models.tlens_model"),
    )
    integration.unpatch()
    forget()


def ran(tool, n_kv=2, value_bias=0.3, batch=2, tokens=11, cls=None, **change):
    shape = {
        "n_layers": 3,
        "d_model": 60,
        "n_heads": 6,
        "n_kv": n_kv,
        "d_head": 10,
        "d_mlp": 77,
        "value_bias": value_bias,
    } | change
    model = (cls or tool.lens.TransformerLensTransparentLlm)(tool.lens.ToyLens(**shape))
    model.run(torch.randint(0, 101, (batch, tokens), generator=torch.Generator().manual_seed(3)))
    return model


def without_decomposition(model, monkeypatch):
    def decomposed_attn(self, batch_i, layer):
        raise AssertionError("the tensor [query, key, head, d_model] was asked for")

    decomposed_attn.__module__ = type(model).decomposed_attn.__module__
    monkeypatch.setattr(type(model), "decomposed_attn", decomposed_attn)


def difference(found, expected):
    assert list(found.nodes) == list(expected.nodes)
    assert list(found.edges) == list(expected.edges)
    assert type(found) is type(expected)
    assert all(type(weight) is float for *_, weight in found.edges(data="weight"))
    return max(abs(weight - expected.edges[edge]["weight"]) for *edge, weight in found.edges(data="weight"))


@pytest.mark.parametrize("threshold", [None, 0.0, 0.02])
@pytest.mark.parametrize(("n_kv", "value_bias"), [(6, 0.0), (2, 0.3), (1, 0.0)])
def test_graph_is_theirs_without_the_large_tensor(tool, monkeypatch, n_kv, value_bias, threshold):
    model = ran(tool, n_kv, value_bias)
    expected = tool.graph.build_full_graph(model, 0, threshold)
    without_decomposition(model, monkeypatch)
    with integration.patched():
        found = tool.graph.build_full_graph(model, batch_i=0, renormalizing_threshold=threshold)
    assert difference(found, expected) < PARITY


def test_second_text_of_a_batch_is_as_if_it_were_alone(tool, monkeypatch):
    model = ran(tool)
    both = integration.build_full_graph(model, 1, 0.02)
    model.run(model.tokens()[1:])
    assert difference(both, tool.graph.build_full_graph(model, 0, 0.02)) < PARITY


@pytest.mark.parametrize("threshold", [None, 0.02])
def test_other_models_are_asked_for_one_layer_at_a_time(tool, threshold):
    calls = []

    class Own(tool.lens.TransformerLensTransparentLlm):
        def decomposed_attn(self, batch_i, layer):
            calls.append(layer)
            return 0.5 * super().decomposed_attn(batch_i, layer)  # an overridden definition is what counts

    model = ran(tool, cls=Own)
    found = integration.build_full_graph(model, 0, threshold)
    assert calls == [0, 1, 2]
    assert difference(found, tool.graph.build_full_graph(model, 0, threshold)) < PARITY


def test_low_precision_models_are_computed_in_float32(tool):
    model = ran(tool)
    expected = tool.graph.build_full_graph(model)
    cache = model._last_run.cache
    model._last_run.cache = {name: tensor.bfloat16() for name, tensor in cache.items()}
    assert difference(integration.build_full_graph(model), expected) < 0.01
    model._last_run.cache = {name: tensor.double() for name, tensor in cache.items()}
    assert difference(integration.build_full_graph(model), expected) < PARITY


def test_autocast_does_not_reach_the_numbers(tool):
    model = ran(tool)
    expected = integration.build_full_graph(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(integration.build_full_graph(model), expected) == 0


def test_nothing_above_the_threshold_is_zero_not_nan(tool):
    model = ran(tool)
    graph = integration.build_full_graph(model, 0, 0.99)
    assert {weight for *_, weight in graph.edges(data="weight")} <= {0.0, 1.0}
    blocks, residual = integration.apply_threshold_and_renormalize(0.5, torch.full((2, 3), 0.1), torch.full((2,), 0.2))
    assert not blocks.any()
    assert not residual.any()


def test_repair_makes_ffn_weights_sum_to_one_at_each_token(tool):
    model = ran(tool)
    with integration.patched():
        as_theirs = tool.graph.build_full_graph(model, 0, 0.01)
        with integration.patched(repair=True):
            repaired = tool.graph.build_full_graph(model, 0, 0.01)
        assert difference(tool.graph.build_full_graph(model, 0, 0.01), as_theirs) == 0
    for t in range(11):
        assert sum(repaired.edges[f"{kind}1_{t}", f"I1_{t}"]["weight"] for kind in "AM") == pytest.approx(1)
        assert sum(as_theirs.edges[f"{kind}1_{t}", f"I1_{t}"]["weight"] for kind in "AM") < 0.5
        assert sum(weight for *_, weight in repaired.in_edges(f"A1_{t}", data="weight")) == pytest.approx(1)


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.2, 0.999])
def test_paths_are_theirs(tool, threshold):
    graph = tool.graph.build_full_graph(ran(tool), 0, 0.01)
    graph.graph["text"] = "kept"
    graph.nodes["X0_0"]["label"] = "kept"
    expected = tool.graph.build_paths_to_predictions(graph, 3, 11, range(11), threshold)
    with integration.patched():
        found = tool.graph.build_paths_to_predictions(graph, 3, 11, range(11), threshold)
    assert len(found) == len(expected) == 11
    for ours, theirs in zip(found, expected, strict=True):
        assert dict(ours.nodes(data=True)) == dict(theirs.nodes(data=True))
        assert {(u, v): d for u, v, d in ours.edges(data=True)} == {(u, v): d for u, v, d in theirs.edges(data=True)}
        assert ours.graph == theirs.graph
        assert type(ours) is type(theirs)
    source, target, data = next(iter(found[5].edges(data=True)), (None, None, None))
    if data is not None:  # a route is a copy
        data["weight"] = -1.0
        assert graph.edges[source, target]["weight"] >= 0


def contribution_calls():
    """Arguments for each function of ``routes.contributions``."""
    torch.manual_seed(1)
    pre, mid, post, ffn = (3 * torch.randn(2, 5, 33) for _ in range(4))
    parts = torch.randn(2, 5, 7, 3, 33)
    neurons = torch.randn(123, 33)
    return {
        "get_contributions": [
            (torch.randn(4, 3, 2, 5, 33), mid),
            (torch.randn(2, 2, 5, 33), mid),
            (neurons, mid[0, 0]),
        ],
        "get_contributions_with_one_off_part": [
            (torch.randn(4, 3, 2, 5, 33), pre, mid),
            (neurons, pre[0, 0], mid[0, 0]),
        ],
        "get_attention_contributions": [(pre, mid, parts)],
        "get_mlp_contributions": [(mid, post, ffn)],
        "get_decomposed_mlp_contributions": [(mid[0, 0], post[0, 0], neurons)],
    }


@pytest.mark.parametrize("name", contribution_calls())
@pytest.mark.parametrize("distance_norm", [1, 2])
def test_contributions_are_theirs(tool, name, distance_norm):
    def as_tuple(result):
        return result if isinstance(result, tuple) else (result,)

    for arguments in contribution_calls()[name]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            given = [tensor.to(dtype) for tensor in arguments]
            expected = as_tuple(
                getattr(tool.contributions, name)(*(t.double() for t in given), distance_norm=distance_norm)
            )
            with integration.patched():
                found = as_tuple(getattr(tool.contributions, name)(*given, distance_norm=distance_norm))
            for ours, theirs in zip(found, expected, strict=True):
                assert type(ours) is type(theirs)
                if isinstance(ours, torch.Tensor):
                    assert ours.dtype == dtype
                    assert not ours.requires_grad
                    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
                    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
                else:
                    assert ours == pytest.approx(theirs, rel=4e-3, abs=4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_threshold_is_strict_and_theirs(tool):
    blocks, residual = torch.rand(2, 4, 5, 3), torch.rand(2, 4)
    blocks[0, 0, 0, 0] = residual[1, 1] = 0.5
    for given in (blocks, blocks[..., 0, 0]):
        expected = tool.contributions.apply_threshold_and_renormalize(0.5, given, residual)
        for ours, theirs in zip(
            integration.apply_threshold_and_renormalize(0.5, given, residual), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs.nan_to_num(0))
    assert integration.apply_threshold_and_renormalize(0.5, blocks, residual)[0][0, 0, 0, 0] == 0


def test_patch_reaches_names_imported_by_value_and_unpatch_restores_them(tool, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("app_before", "app_after"):
        (tmp_path / f"{name}.py").write_text(
            "from llm_transparency_tool.routes.graph import build_full_graph as build\n"
            "from llm_transparency_tool.routes.contributions import get_contributions\n"
        )
        monkeypatch.delitem(sys.modules, name, raising=False)
    originals = {
        (module, name): getattr(importlib.import_module(f"llm_transparency_tool.{module}"), name)
        for module, name in NAMES
    }
    before = importlib.import_module("app_before")
    model = ran(tool)
    integration.patch()
    integration.patch()
    after = importlib.import_module("app_after")
    for module, name in NAMES:
        replaced = getattr(importlib.import_module(f"llm_transparency_tool.{module}"), name)
        assert replaced is not originals[module, name]
        assert inspect.signature(replaced) == inspect.signature(originals[module, name])
        assert (replaced.__name__, replaced.__module__) == (name, f"llm_transparency_tool.{module}")
    assert before.build is after.build is tool.graph.build_full_graph
    assert before.get_contributions is tool.contributions.get_contributions
    without = ran(tool)
    without_decomposition(without, monkeypatch)
    assert difference(before.build(without), after.build(without)) == 0
    integration.unpatch()
    for module, name in NAMES:
        assert getattr(importlib.import_module(f"llm_transparency_tool.{module}"), name) is originals[module, name]
    assert before.build is after.build is originals["routes.graph", "build_full_graph"]
    assert after.get_contributions is originals["routes.contributions", "get_contributions"]
    integration.unpatch()
    with pytest.raises(AssertionError, match="was asked for"):
        before.build(model)
    assert integration.build_full_graph is not before.build  # ours stays ours
    monkeypatch.delitem(sys.modules, "app_before")
    monkeypatch.delitem(sys.modules, "app_after")


def test_patched_restores_after_an_error_and_leaves_an_outer_patch(tool):
    original = tool.graph.build_full_graph
    with pytest.raises(RuntimeError, match="stop"), integration.patched():
        raise RuntimeError("stop")
    assert tool.graph.build_full_graph is original
    integration.patch()
    replaced = tool.graph.build_full_graph
    with integration.patched():
        assert tool.graph.build_full_graph is replaced
    assert tool.graph.build_full_graph is replaced


def test_not_installed(monkeypatch):
    forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError,
        match=r"^llm_transparency_tool is not installed: it is on no package index; clone "
        r"https://.*PYTHONPATH$",
    ):
        integration.patch()
    integration.unpatch()


def test_another_version_is_refused(tool, monkeypatch):
    original = tool.graph.build_full_graph
    monkeypatch.delattr(tool.contributions, "get_mlp_contributions")
    with pytest.raises(
        ImportError, match=r"has no routes.contributions.get_mlp_contributions: version 0.1 is supported"
    ):
        integration.patch()
    assert tool.graph.build_full_graph is original


def test_a_missing_module_or_dependency_is_named(tool, monkeypatch):
    forget()
    monkeypatch.setitem(sys.modules, "llm_transparency_tool.routes.contributions", None)
    with pytest.raises(ImportError, match=r"has no routes.contributions: version 0.1"):
        integration.patch()
    forget()
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"routes.graph needs networkx, which is not installed"):
        integration.patch()


def test_bad_models(tool):
    with pytest.raises(TypeError, match="TransparentLlm is needed, got str without model_info, tokens"):
        integration.build_full_graph("a model")
    with pytest.raises(RuntimeError, match="has not been run"):
        integration.build_full_graph(tool.lens.TransformerLensTransparentLlm(tool.lens.ToyLens(1, 8, 1, 1, 8, 8)))
    model = ran(tool)
    for batch_i in (2, -1):
        with pytest.raises(ValueError, match=rf"batch_i must be in \[0, 2\), got {batch_i}"):
            integration.build_full_graph(model, batch_i)
    for threshold in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="renormalizing_threshold must be in"):
            integration.build_full_graph(model, 0, threshold)
    cache = dict(model._last_run.cache)
    for name in ("hook_mlp_out", "hook_resid_mid", "attn.hook_v"):
        model._last_run.cache = cache | {f"blocks.1.{name}": torch.full_like(cache[f"blocks.1.{name}"], float("nan"))}
        with pytest.raises(ValueError, match=r"layer 1: \w+ holds NaN"):
            integration.build_full_graph(model)
    model._last_run.cache = {name: tensor for name, tensor in cache.items() if name != "blocks.2.hook_resid_mid"}
    with pytest.raises(ValueError, match=r"layer 2: .*hook_resid_mid.*parallel.*flowroutes_fast.trace"):
        integration.build_full_graph(model)


def test_post_norm_is_said(tool):
    model = ran(tool)
    model._model.cfg.use_normalization_before_and_after = True
    with pytest.warns(RuntimeWarning, match="normalises what attention adds"):
        integration.build_full_graph(model)


def test_bad_paths(tool):
    graph = integration.build_full_graph(ran(tool))
    with pytest.raises(ValueError, match=r"starting token must be in \[0, 11\), got 11"):
        integration.build_paths_to_predictions(graph, 3, 11, [11], 0.1)
    with pytest.raises(ValueError, match="no node I3_0"):
        integration.build_paths_to_predictions(graph, 4, 11, [0], 0.1)
    with pytest.raises(TypeError, match="must be directed"):
        integration.build_paths_to_predictions(graph.to_undirected(), 3, 11, [0], 0.1)


def test_bad_contributions():
    parts, whole = torch.randn(4, 2, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match="must be one or more part dimensions"):
        integration.get_contributions(whole, whole)
    with pytest.raises(ValueError, match="must be one or more part dimensions"):
        integration.get_contributions(parts, whole[:1])
    with pytest.raises(TypeError, match=r"parts must be a floating point torch.Tensor, got torch.int64"):
        integration.get_contributions(parts.long(), whole)
    with pytest.raises(TypeError, match=r"whole must be a floating point torch.Tensor, got list"):
        integration.get_contributions(parts, [1.0])
    for norm in (0, -1, "1", float("nan")):
        with pytest.raises(ValueError, match="distance_norm must be a positive number"):
            integration.get_contributions(parts, whole, norm)
    with pytest.raises(ValueError, match="parts holds NaN"):
        integration.get_contributions(parts * float("nan"), whole)
    with pytest.raises(ValueError, match="resid_pre must have 3 dimensions"):
        integration.get_attention_contributions(whole, whole[None], torch.randn(1, 2, 2, 1, 8))
    with pytest.raises(ValueError, match=r"must be \[batch, query, key, head, d_model\]"):
        integration.get_attention_contributions(whole[None], whole[None], torch.randn(1, 3, 2, 1, 8))
    with pytest.raises(ValueError, match="must have one shape"):
        integration.get_attention_contributions(whole[None, :1], whole[None], torch.randn(1, 2, 2, 1, 8))
    with pytest.raises(ValueError, match="must begin that of c_blocks"):
        integration.apply_threshold_and_renormalize(0.1, torch.rand(3, 2), torch.rand(2))


@pytest.mark.demo_model
@pytest.mark.parametrize("text", ["ioi", "capital"])
def test_graph_of_a_real_model_has_the_tools_recorded_figures(tool, demo, monkeypatch, text):
    recorded = load_file(HERE.parent / "data" / "reference_tool_smollm2.safetensors")
    model, _ = demo
    lens = tool.lens.TransformerLensTransparentLlm(None)
    lens._lens, lens._last_run = hooked(model, recorded[f"{text}.input_ids"].long())
    without_decomposition(lens, monkeypatch)
    graph = integration.build_full_graph(lens)
    n_token = recorded[f"{text}.input_ids"].shape[0]
    for layer, attention in enumerate(recorded[f"{text}.attention"]):  # [query, key, head]
        expected = attention.double().sum(-1) + torch.diag(recorded[f"{text}.attention_residual"][layer].double())
        before = f"I{layer - 1}" if layer else "X0"
        for query in range(n_token):
            found = [graph.edges[f"{before}_{key}", f"A{layer}_{query}"]["weight"] for key in range(n_token)]
            assert found == pytest.approx(expected[query].tolist(), abs=PARITY)
            ffn, residual = (graph.edges[f"{kind}{layer}_{query}", f"I{layer}_{query}"]["weight"] for kind in "MA")
            assert ffn == pytest.approx(float(recorded[f"{text}.ffn"][layer, query]), abs=PARITY)
            assert residual == pytest.approx(float(recorded[f"{text}.ffn_residual"][layer, query]), abs=PARITY)


@torch.no_grad()
def hooked(model, ids):
    """A transformers Llama's activations and weights under TransformerLens's names."""
    cache, handles, blocks = {}, [], []
    config = model.config
    d_head = config.hidden_size // config.num_attention_heads

    def keep(name, first):
        def hook(module, args, output):
            cache[name] = args[0] if first else output[0] if isinstance(output, tuple) else output

        return hook

    for layer, block in enumerate(model.model.layers):
        name = f"blocks.{layer}."
        for module, kept, first in (
            (block.input_layernorm, "hook_resid_pre", True),
            (block.post_attention_layernorm, "hook_resid_mid", True),
            (block.mlp, "hook_mlp_out", False),
            (block, "hook_resid_post", False),
            (block.self_attn.v_proj, "attn.hook_v", False),
        ):
            handles.append(module.register_forward_hook(keep(name + kept, first)))
        w_o = block.self_attn.o_proj.weight.T.reshape(config.num_attention_heads, d_head, -1)
        attn = SimpleNamespace(W_O=w_o, b_V=torch.zeros(config.num_attention_heads, d_head))
        blocks.append(SimpleNamespace(attn=attn))
    implementation = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        patterns = model(ids[None], output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
        for handle in handles:
            handle.remove()
    for layer, pattern in enumerate(patterns):
        cache[f"blocks.{layer}.attn.hook_pattern"] = pattern
        cache[f"blocks.{layer}.attn.hook_v"] = cache[f"blocks.{layer}.attn.hook_v"].unflatten(-1, (-1, d_head))
    cfg = SimpleNamespace(
        n_layers=len(blocks), n_heads=config.num_attention_heads, d_model=config.hidden_size, d_vocab=0, n_params=0
    )
    return SimpleNamespace(cfg=cfg, blocks=blocks), SimpleNamespace(tokens=ids[None], cache=cache)
