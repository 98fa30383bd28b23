"""Proximity of whole parts to their states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_cases import naive_components, needs_native

from flowroutes_fast import ops
from flowroutes_fast.ops import native


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 5),
    count=st.integers(1, 6),
    kept=st.integers(0, 6),
    width=st.integers(1, 70),
    zeros=st.booleans(),
    isa=st.sampled_from(native.instruction_sets() or ["auto"]),
)
def test_parts_and_components_of_any_shape(seed, rows, count, kept, width, zeros, isa):
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(rows, width, generator=g)
    if zeros:
        state[:, ::3], state[:, 1::6] = 0.0, -0.0
    outputs = (state[:, None] / 3 + torch.randn(rows, count, width, generator=g))[:, :kept]
    wanted, unit = naive_components(outputs, state), 1e-6 * (state.abs().sum(-1) + 1e-30)
    with native.instruction_set(isa):
        found = ops.component_proximity(outputs, state, backend="cpu")
        alone = [ops.part_proximity(part, state, backend="cpu") for part in outputs.unbind(1)]
    assert ((found - wanted).abs() <= unit[:, None] * 3).all()
    assert all(torch.equal(part, found[:, n]) for n, part in enumerate(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_part_proximity_of_half_precision_is_float32(backend, dtype):
    torch.manual_seed(0)
    whole = torch.randn(5, 300).to(dtype)
    part = (whole.float() + torch.randn(5, 300) / 3).to(dtype)
    found = ops.part_proximity(part, whole, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ops.part_proximity(part.double(), whole.double()).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_states_without_d_model(shape):
    state = torch.ones(shape)
    with pytest.raises(ValueError, match=r"part must be \[..., d_model\], got shape"):
        ops.part_proximity(state, state)
    with pytest.raises(ValueError, match=r"state must be \[..., d_model\], got shape"):
        ops.component_proximity(torch.ones(2, 4), state)


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("width", [1, 33, 64])
def test_not_a_number_stays_one(isa, width):
    part, whole = torch.randn(3, width), torch.randn(3, width)
    part[1, width // 2] = float("nan")
    with native.instruction_set(isa):
        found = (
            ops.part_proximity(part, whole, backend="cpu"),
            ops.component_proximity(part[:, None], whole, backend="cpu")[:, 0],
        )
    for one in found:
        assert one.isnan().tolist() == [False, True, False]
