"""Every family: parts add up at every node, exact equals an independent float64 evaluation, certified routes are
exact routes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import OPTIONS, VARIANTS, make

import flowroutes_fast as fr
from flowroutes_fast.capture.hooks import capture
from flowroutes_fast.models.families import FAMILIES, REFUSED, blocks_of
from flowroutes_fast.models.table import markdown, rows
from flowroutes_fast.tracing.importances import conservation_error

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 7, 51]
NAMES = sorted(FAMILIES) + sorted(VARIANTS)


def proximity(part, whole):
    return (whole.abs().sum(-1) - (part - whole).abs().sum(-1)).clamp_min(0)


def truth(layer):
    """Exact importances of one layer in float64, from what the model's own modules gave: [query, key, head],
    residual, the FFN's two.
    """
    block, d = layer.block, torch.float64
    y, post = (layer.resid_post if layer.resid_mid is None else layer.resid_mid).to(d), layer.resid_post.to(d)
    residual, ffn = proximity(layer.residual.to(d), y), proximity(layer.ffn_out.to(d), post)
    others = residual.clone()
    if layer.mixer_out is not None:
        others += proximity(layer.mixer_out.to(d), y)
    edge = torch.zeros(len(y), len(y), 1, dtype=d)
    if layer.query is not None:
        heads, group = layer.query.shape[0], layer.query.shape[0] // layer.key.shape[0]
        key, value = (t.to(d).repeat_interleave(group, 0) for t in (layer.key, layer.value))
        scores = layer.query.to(d) @ key.mT * layer.scaling
        if layer.softcap:
            scores = layer.softcap * (scores / layer.softcap).tanh()
        age = torch.arange(len(y))[:, None] - torch.arange(len(y))
        hidden = (age < 0) | ((age >= layer.window) if layer.window else False)
        scores = scores.masked_fill(hidden, -torch.inf) if layer.mask is None else scores + layer.mask.to(d)
        if layer.sinks is not None:
            scores = torch.cat([scores, layer.sinks.to(d)[:, None, None].expand(-1, len(y), 1)], -1)
        alpha = scores.softmax(-1)[..., : len(y)]
        term = torch.einsum("hqk,hkd->qkhd", alpha, value)
        if layer.gate is not None:
            term = term * layer.gate.to(d)[:, None]
        weight = block.output.weight.to(d)
        weight = weight if type(block.output).__name__ == "Conv1D" else weight.T
        z = torch.einsum("qkhd,hdm->qkhm", term, weight.view(heads, -1, y.shape[1]))
        if block.inner_norm is not None:  # rows and gains of the norm, from its definition
            mixed = term.sum(1).flatten(1)
            scale = torch.rsqrt(mixed.square().mean(-1) + block.inner_norm.variance_epsilon)
            gain = block.inner_norm.weight.to(d).view(heads, -1)
            z = (
                torch.einsum("qkhd,hdm->qkhm", term * gain, weight.view(heads, -1, y.shape[1]))
                * scale[:, None, None, None]
            )
        bias = (
            block.output.bias.to(d)
            if getattr(block.output, "bias", None) is not None
            else torch.zeros(y.shape[1], dtype=d)
        )
        if block.post_norm is not None:
            total = z.sum((1, 2)) + bias
            eps = getattr(block.post_norm, "eps", getattr(block.post_norm, "variance_epsilon", None))
            gain = block.post_norm.weight.to(d) + (
                1 if type(block.post_norm).__name__.startswith(("Gemma2", "Gemma3")) else 0
            )
            scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * gain
            z, bias = z * scale[:, None, None], bias * scale
        z, bias = z * layer.scale, bias * layer.scale
        edge = proximity(z, y[:, None, None])
        others += proximity(bias.expand_as(y), y)
    if layer.resid_mid is None:
        others += ffn
        both = (ffn, None)
    else:
        through = proximity(layer.through.to(d), post)
        both = (ffn / (ffn + through), through / (ffn + through))
    total = edge.sum((1, 2)) + others
    return edge / total[:, None, None], residual / total, both[0] / total if both[1] is None else both[0]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return make(request.param)


def test_parts_add_up_at_every_node(model):
    found = []
    output = capture(
        model,
        torch.tensor([IDS]),
        lambda layer: found.append((layer.index, conservation_error(layer), layer.mixer_out, layer.query)),
    )
    assert [index for index, *_ in found] == list(range(len(found)))
    assert len(found) >= 2
    assert max(error for _, error, *_ in found) < 1e-5
    kinds = getattr(model.config, "layer_types", None) or []
    for (_, _, mixer, query), kind in zip(found, kinds, strict=False):
        assert (query is None) == (kind in ("linear_attention", "mamba", "conv"))
        assert mixer is not None or query is not None
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(output.logits[0, -1], plain, atol=2e-4, rtol=2e-4)


def test_exact_equals_float64(model):
    trace = fr.trace(model, None, IDS, precision="exact", bias="value")
    layers = []

    def compare(layer):
        edge, residual, ffn = truth(layer)
        mine = trace.attention(layer.index)[..., : edge.shape[2]]
        np.testing.assert_allclose(mine, edge, atol=2e-5)
        np.testing.assert_allclose(trace.attention_residual[layer.index], residual, atol=2e-5)
        np.testing.assert_allclose(trace.ffn[layer.index], ffn, atol=2e-5)
        layers.append(layer.index)

    capture(model, torch.tensor([IDS]), compare)
    assert len(layers) == len(trace.shapes)
    shares = trace.heads.sum(-1) + trace.attention_residual + trace.attention_bias + trace.mixer
    parallel = [s == "parallel" for s in trace.shapes]
    shares[parallel] += trace.ffn[parallel]
    np.testing.assert_allclose(shares, 1, atol=2e-5)


def test_certified_routes_are_exact_routes(model):
    exact, certified = fr.trace(model, None, IDS, precision="exact"), fr.trace(model, None, IDS)
    keys = ["layer", "kind", "source", "target", "head"]
    for threshold in (0.01, 0.04, 0.11):
        a, b = (t.route(threshold=threshold).edges.sort_values(keys, ignore_index=True) for t in (exact, certified))
        assert a[keys].equals(b[keys])
        np.testing.assert_allclose(a["importance"], b["importance"], rtol=0.03)
    low, high = certified.heads_low, certified.heads_high
    assert bool(((exact.heads >= low - 2e-5) & (exact.heads <= high + 2e-5)).all())


def test_neurons_add_up_to_the_ffn(model):
    """Where the table says so, neurons exist; their exact proximities are those of activation times column of the
    down projection.
    """
    table = {row[0]: row[4] for row in rows()}[model.config.model_type]
    if table == "no":
        with pytest.raises(ValueError, match=r"no down projection|do not add up"):
            fr.trace(model, None, IDS, neurons=True)
        return
    if table == "dense layers only" and any(block.down is None for block in blocks_of(model)):
        with pytest.raises(ValueError, match="no down projection"):
            fr.trace(model, None, IDS, neurons=True)
        return
    trace = fr.trace(model, None, IDS, neurons=True, precision="exact", floor=1e-4)
    layers = []

    def compare(layer):
        d = torch.float64
        post = layer.resid_post.to(d)
        rows_, gain = (1.0 if t is None else t.to(d) for t in (layer.neuron_rows, layer.neuron_gain))
        scale = rows_[:, None] if isinstance(rows_, torch.Tensor) else rows_
        part = (layer.neurons.to(d) * scale)[..., None] * layer.block.w_down().to(d) * gain
        bias = 0 if layer.block.down_bias is None else layer.block.down_bias.to(d) * scale * gain
        torch.testing.assert_close(part.sum(1) + bias, layer.ffn_out.to(d), atol=1e-4, rtol=1e-4)
        found = trace.neurons(layer.index)
        near = proximity(part, post[:, None])[found["position"].to_numpy(), found["neuron"].to_numpy()]
        ratio = found["importance"].to_numpy() / near.numpy()
        for position in set(found["position"]):  # one normaliser per position
            mine = ratio[found["position"] == position]
            np.testing.assert_allclose(mine, mine[0], rtol=1e-3)
        layers.append(layer.index)

    capture(model, torch.tensor([IDS]), compare, neurons=True)
    assert len(layers) == len(trace.shapes)


def test_every_family_of_the_table_is_tested():
    assert set(OPTIONS) == set(FAMILIES)


@pytest.mark.parametrize("kind", ["diffllama", "mamba", "t5", "bert"])
def test_families_without_an_answer_are_refused(kind):
    from transformers import AutoConfig

    from flowroutes_fast.models.families import family_of

    with pytest.raises(ValueError, match=REFUSED.get(kind, "encoder")[:30]):
        family_of(AutoConfig.for_model(kind))


def test_the_table_in_the_documentation_is_the_adapters():
    assert (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8") == markdown()
