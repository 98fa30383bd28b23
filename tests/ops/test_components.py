"""Proximity of components' outputs to the state they are added to."""

import numpy as np
import pytest
import torch
from state_cases import components, naive_components, needs_native

from flowroutes_fast import ops


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7, 33), (3, 123, 4, 5), (4, 0, 9)])
def test_component_proximity(backend, shape):
    outputs, state = components(shape)
    found = ops.component_proximity(outputs, state, backend=backend)
    assert found.shape == outputs.shape[:-1]
    np.testing.assert_allclose(found, naive_components(outputs, state), rtol=1e-5, atol=1e-5)
    # slices, strides
    for part in (outputs[..., :1, :], outputs[..., ::2, :], outputs.transpose(-1, -2).contiguous().transpose(-1, -2)):
        np.testing.assert_allclose(
            ops.component_proximity(part, state, backend=backend), naive_components(part, state), rtol=1e-5, atol=1e-5
        )
    parts = (
        torch.stack([ops.part_proximity(part, state, backend=backend) for part in outputs.unbind(-2)], -1)
        if shape[-2]
        else found
    )
    np.testing.assert_allclose(found, parts, rtol=1e-6, atol=1e-6)


def test_component_proximity_does_not_cancel():
    state = torch.full((1, 64), 1e4)
    outputs = torch.full((1, 1, 64), 1e-3)
    np.testing.assert_allclose(ops.component_proximity(outputs, state), [[64e-3]], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"state": torch.zeros(2, 5, 32)}, ValueError, r"must be \[..., component, d_model\]"),
        ({"state": torch.zeros(5, 33)}, ValueError, r"must be \[..., component, d_model\]"),
        ({"state": torch.zeros(2, 5, 33, dtype=torch.float64)}, TypeError, "both be float64"),
        ({"outputs": torch.zeros(2, 5, 7, 33, dtype=torch.int32)}, TypeError, "floating point"),
        ({"outputs": [[1.0]]}, TypeError, "supports DLPack"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
    ],
)
def test_component_proximity_bad_input(change, error, says):
    outputs, state = components()
    with pytest.raises(error, match=says):
        ops.component_proximity(**{"outputs": outputs, "state": state, **change})
