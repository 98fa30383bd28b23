"""FFN neurons: against a dense fp64 evaluation, and captured from real blocks."""

import numpy as np
import pytest
import torch
from conftest import KINDS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import flowroutes_fast as fr
from flowroutes_fast.capture.hooks import capture
from flowroutes_fast.ops import reference
from flowroutes_fast.ops.backends import interpreted
from flowroutes_fast.ops.neurons import neuron_importances

IDS = list(range(7, 30))


def problem(seed, tokens=7, neurons=50, width=33, outliers=False):
    g = torch.Generator().manual_seed(seed)
    activation, w_down = (
        torch.randn(tokens, neurons, generator=g).relu(),
        torch.randn(neurons, width, generator=g) / neurons**0.5,
    )
    rest = torch.randn(tokens, width, generator=g)
    if outliers:
        rest[:, 0] = 1e4
    whole = activation @ w_down + rest
    return activation, w_down, whole, reference.proximity(rest, whole)


def dense(activation, w_down, whole):
    part = activation.double()[..., None] * w_down.double()
    return reference.proximity(part, whole.double()[:, None])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 9),
    neurons=st.integers(1, 80),
    width=st.integers(1, 60),
    outliers=st.booleans(),
    backend=st.sampled_from(["reference", "auto"]),
    tolerance=st.sampled_from([0.0, 0.01, 0.3]),
    floor=st.sampled_from([1e-4, 1e-3, 0.05]),
)
def test_intervals_and_values(seed, tokens, neurons, width, outliers, tolerance, floor, backend):
    activation, w_down, whole, others = problem(seed, tokens, neurons, width, outliers)
    found = neuron_importances(activation, w_down, whole, others, floor=floor, tolerance=tolerance, backend=backend)
    near = dense(activation, w_down, whole)
    total, unit = near.sum(-1) + others.double(), 3e-6 * whole.double().abs().sum(-1)
    assert (found.low <= total + unit).all()
    assert (total <= found.high + unit).all()
    assert (found.high - found.low <= tolerance * (found.high + found.low) + unit).all()
    row, neuron = found.index.long()
    middle = (found.low + found.high).double() / 2
    assert ((found.importance * middle[row] - near[row, neuron]).abs() <= unit[row]).all()
    listed = torch.zeros_like(near, dtype=torch.bool)
    listed[row, neuron] = True
    assert not ((near > floor * total[:, None] + unit[:, None]) & ~listed).any()


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_neurons_are_known_to_the_tolerance(tolerance, monkeypatch):
    """Also where much is left open at first; and neurons that may reach the floor are listed."""
    monkeypatch.setattr("flowroutes_fast.ops.neurons.FIRST_CUT", 0.008)
    activation, w_down, whole, others = problem(0, tokens=300, neurons=400)
    activation, others = activation.pow(3) / 20, others / 50
    found = neuron_importances(activation, w_down, whole, others, floor=0.008, tolerance=tolerance, backend="reference")
    error = (found.high - found.low) / (found.high + found.low)
    assert tolerance * 0.3 < float(error.max()) <= tolerance * (1 + 1e-5)
    near = dense(activation, w_down, whole)
    total = near.sum(-1) + others.double()
    assert (found.low <= total * (1 + 1e-5)).all()
    assert (total <= found.high * (1 + 1e-5)).all()
    listed = torch.zeros_like(near, dtype=torch.bool)
    listed[tuple(found.index.long())] = True
    reached = near > 0.008 * total[:, None] * (1 + 1e-5)
    assert (reached <= listed).all()
    # the floor of the upper end would miss these
    assert tolerance < 0.1 or (reached & (near < 0.008 * found.high[:, None])).any()


def test_signed_shares_add_up():
    activation, w_down, whole, _ = problem(0)
    found = neuron_importances(activation, w_down, whole, torch.zeros(7), floor=0.0, measure="signed")
    total = torch.zeros(7).index_add_(0, found.index[0].long(), found.importance)
    torch.testing.assert_close(total + reference.signed_share(whole - activation @ w_down, whole), torch.ones(7))
    assert (found.importance < 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_captured_neurons_are_the_ffn(kind):
    model, layers = tiny(kind), []
    capture(model, torch.tensor([IDS]), layers.append, neurons=True)
    for layer in layers:
        written = layer.neurons @ layer.block.w_down()
        if layer.block.down_bias is not None:
            written = written + layer.block.down_bias
        torch.testing.assert_close(written, layer.ffn_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_traced_neurons(kind, tmp_path):
    model, layers = tiny(kind), []
    trace = fr.trace(model, None, IDS, neurons=True)
    exact = fr.trace(model, None, IDS, neurons=True, precision="exact")
    capture(model, torch.tensor([IDS]), layers.append, neurons=True)
    for layer in layers:
        table, sure = trace.neurons(layer.index), exact.neurons(layer.index)
        near = dense(layer.neurons, layer.block.w_down(), layer.resid_post)
        bias = (
            0 if layer.block.down_bias is None else reference.proximity(layer.block.down_bias[None], layer.resid_post)
        )
        if kind == "neox":
            rest = exact.normaliser_low[layer.index] * (1 - exact.ffn[layer.index])
        else:
            rest = reference.proximity(layer.resid_mid, layer.resid_post)
        share = near / (near.sum(-1) + rest + bias)[:, None]
        for found in (table, sure):
            wanted = share[found.position.tolist(), found.neuron.tolist()]
            assert ((found.low <= wanted.numpy() + 1e-5) & (wanted.numpy() <= found.high + 1e-5)).all()
        assert int((share > 1.001e-3).sum()) <= len(sure) <= len(table) + 1
        np.testing.assert_allclose(sure.importance, share[sure.position.tolist(), sure.neuron.tolist()], atol=1e-5)
    again = fr.load_trace(trace.save(tmp_path / "a.trace"))
    assert again.neurons(1).equals(trace.neurons(1))
    with pytest.raises(ValueError, match="neurons=True"):
        fr.trace(model, None, IDS).neurons(0)


def test_neurons_that_are_not_the_ffn_are_refused(monkeypatch):
    model, layers = tiny("llama"), []
    capture(model, torch.tensor([IDS]), layers.append)
    down = type(layers[0].block).w_down
    monkeypatch.setattr(type(layers[0].block), "w_down", lambda block: 1.2 * down(block))
    with pytest.raises(ValueError, match="layer 0: the neurons of this llama FFN do not add up"):
        fr.trace(model, None, IDS, neurons=True)


@pytest.mark.parametrize("measure", ["proximity", "signed"])
@pytest.mark.parametrize(("backend", "error"), [("triton", RuntimeError), ("Triton", ValueError), (None, ValueError)])
def test_backends_that_cannot_be_used_here(measure, backend, error):
    if backend == "triton" and (torch.cuda.is_available() or interpreted()):
        backend = "cuda on the CPU"
        error = ValueError
    activation, w_down, whole = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    with pytest.raises(error, match="backend"):
        neuron_importances(activation, w_down, whole, torch.ones(3), backend=backend, measure=measure)


def test_neurons_check_their_shapes():
    activation, w_down, whole = torch.ones(3, 5), torch.ones(5, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="do not fit"):
        neuron_importances(activation, w_down.T, whole, torch.ones(3))
    with pytest.raises(TypeError, match="activation must be floating point"):
        neuron_importances(activation.long(), w_down, whole, torch.ones(3))
    with pytest.raises(ValueError, match="measure must be"):
        neuron_importances(activation, w_down, whole, torch.ones(3), measure="both")
