"""Importances from stored attention weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_cases import bad, case, needs_native

from flowroutes_fast import ops

# importances, absolute, on the rounded inputs
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def naive(pattern, value, w_o, pre, mid):
    """Two norms per sub-edge, straight from equation 4, in fp64."""
    p, v, w, x, y = (t.double() for t in (pattern, value, w_o, pre, mid))
    group = p.shape[1] // v.shape[2]
    z = torch.einsum("bhqk,bkhd,hdm->bqkhm", p, v.repeat_interleave(group, 2), w)
    y_ = y[:, :, None, None]
    edge = (y_.abs().sum(-1) - (z - y_).abs().sum(-1)).clamp_min(0)
    residual = (y.abs().sum(-1) - (x - y).abs().sum(-1)).clamp_min(0)
    total = edge.sum((2, 3)) + residual
    # 0/0: a node that no part brings closer
    return (edge / total[:, :, None, None]).nan_to_num(), (residual / total).nan_to_num()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 5, 3, 1, 7, 123), (1, 33, 6, 2, 16, 48), (1, 50, 4, 4, 80, 33)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_importances_equal_fp64(backend, shape, dtype):
    inputs = [t.to(dtype) for t in case(0, *shape)]
    edge, residual = ops.attention_importances(*inputs, backend=backend)
    wanted, wanted_residual = naive(*inputs)
    assert edge.dtype == torch.float32
    np.testing.assert_allclose(edge, wanted, atol=TOLERANCE[dtype], rtol=0)
    np.testing.assert_allclose(residual, wanted_residual, atol=TOLERANCE[dtype], rtol=0)


def test_reference_in_fp64_is_the_formula():
    inputs = [t.double() for t in case(1, 1, 9, 3, 3, 5, 21)]
    edge, residual = ops.attention_importances(*inputs)
    wanted, wanted_residual = naive(*inputs)
    assert edge.dtype == torch.float64
    np.testing.assert_allclose(edge, wanted, atol=1e-13)
    np.testing.assert_allclose(residual, wanted_residual, atol=1e-13)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.integers(1, 40),
    width=st.integers(1, 70),
    outliers=st.booleans(),
)
def test_native_equals_fp64_on_any_shape(seed, tokens, kv, group, d, width, outliers):
    inputs = case(seed, 1, tokens, kv * group, kv, d, width, outliers)
    edge, residual = ops.attention_importances(*inputs, backend="cpu")
    wanted, wanted_residual = naive(*inputs)
    np.testing.assert_allclose(edge, wanted.nan_to_num(), atol=2e-5)
    np.testing.assert_allclose(residual, wanted_residual.nan_to_num(), atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize(
    "what", ["zeros", "negative zeros", "denormal", "equal", "no output", "short rows", "not contiguous"]
)
def test_edge_cases_of_a_pattern(what, backend):
    pattern, value, w_o, pre, mid = case(3, 1, 20, 4, 2, 8, 30)
    if what == "zeros":
        mid[..., ::3] = 0.0
    elif what == "negative zeros":
        mid[..., ::3] = -0.0
    elif what == "denormal":
        mid[..., ::2] = 1e-41
    elif what == "equal":
        mid = torch.ones_like(mid)
    elif what == "no output":
        w_o[1] = 0
    elif what == "short rows":
        pattern = pattern * 0.4
    else:
        pattern = pattern.transpose(-1, -2).contiguous().transpose(-1, -2)
        value, w_o = (
            value.transpose(1, 2).contiguous().transpose(1, 2),
            w_o.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        )
    edge, residual = ops.attention_importances(pattern, value, w_o, pre, mid, backend=backend)
    wanted, wanted_residual = naive(pattern, value, w_o, pre, mid)
    np.testing.assert_allclose(edge, wanted, atol=1e-5)
    np.testing.assert_allclose(residual, wanted_residual, atol=1e-5)


def test_other_norms_and_clip():
    inputs = case(4, 1, 6, 2, 2, 4, 12)
    edge, residual = ops.attention_importances(*inputs, distance_norm=2)
    np.testing.assert_allclose(edge.sum((2, 3)) + residual, 1, atol=1e-5)
    clipped, _ = ops.attention_importances(*inputs, clip=1e-3)
    assert (clipped > 0).all()  # masked pairs count too


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"w_o": torch.zeros(4, 8)}, ValueError, "3 dimensions"),
        ({"value": torch.zeros(1, 5, 3, 8)}, ValueError, "does not divide"),
        ({"resid_mid": torch.zeros(1, 5, 17)}, ValueError, "must be"),
        ({"resid_pre": torch.full((1, 5, 16), float("nan"))}, ValueError, "NaN"),
        ({"pattern": torch.zeros(1, 4, 5, 5, dtype=torch.int64)}, TypeError, "floating point"),
        ({"pattern": [1.0]}, TypeError, r"torch\.Tensor"),
        ({"backend": "cuda9"}, ValueError, "unknown backend 'cuda9'"),
        ({"clip": -1.0}, ValueError, "clip"),
    ],
)
def test_bad_input(changes, error, says):
    with pytest.raises(error, match=says):
        ops.attention_importances(**bad(**changes))
