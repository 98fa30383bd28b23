"""Exact proximities of all sub-edges, attention recomputed from queries and keys."""

import numpy as np
import pytest
import torch
from state_cases import BACKENDS, layer_inputs, needs_native, registered

from flowroutes_fast.ops import native


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("variant", ["causal", "window", "softcap", "mask", "mask per head", "sinks"])
def test_attention_layer_recomputes_every_kind_of_attention(variant, isa):
    q, k, v, w, y, base = layer_inputs()
    mask = sinks = None
    if variant.startswith("mask"):
        mask = torch.zeros(45, 45).masked_fill_(torch.ones(45, 45).triu(1) > 0, -torch.inf)
        mask = torch.stack([mask + torch.randn(45, 45) for _ in range(4)]) if variant == "mask per head" else mask
    if variant == "sinks":
        sinks = torch.tensor([0.0, 1.0, 3.0, -2.0])
    options = (0.25, 2.0 if variant == "softcap" else 0.0, 7 if variant == "window" else 0)
    with native.instruction_set(isa):
        out = torch.ops.flowroutes.attention_layer(q, k, v, w, y, base, mask, sinks, *options, True, 0.01, "cpu")
    doubles = [t.double() for t in (q, k, v, w, y, base)]
    wanted = torch.ops.flowroutes.attention_layer(*doubles, mask, sinks, *options, True, 0.01, "reference")
    for found, expected in zip(out[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(out[2], wanted[2], rtol=1e-4)
    assert {tuple(e) for e in out[3].T.tolist()} ^ {tuple(e) for e in wanted[3].T.tolist()} == set()


@needs_native
def test_threads_do_not_change_the_answer():
    inputs = layer_inputs(tokens=100)
    one = torch.ops.flowroutes.attention_layer(*inputs, None, None, 0.25, 0.0, 0, True, -1.0, "cpu", 1)
    two = torch.ops.flowroutes.attention_layer(*inputs, None, None, 0.25, 0.0, 0, True, -1.0, "cpu", 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_with_fewer_keys_than_queries_needs_a_mask(backend):
    good = registered("attention_layer")
    few = {**good, "key": good["key"][:, :5], "value": good["value"][:, :5]}
    with pytest.raises(ValueError, match="causal attention of 9 queries needs as many keys, got 5"):
        torch.ops.flowroutes.attention_layer(**few, backend=backend)
    torch.ops.flowroutes.attention_layer(**{**few, "mask": torch.zeros(9, 5)}, backend=backend)
    for change in ({"window": -1}, {"softcap": -1.0}, {"softcap": float("nan")}):
        with pytest.raises(ValueError, match="softcap and window"):
            torch.ops.flowroutes.attention_layer(**{**good, **change}, backend=backend)


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_a_pair_at_the_floor_is_not_listed(isa):
    """One part of a state of one number, and as much beside it: an importance of one half, without rounding."""
    one = torch.ones(1, 1, 1)
    for backend in ("reference", "cpu"):
        for floor, listed in ((0.5, 0), (0.49, 1)):
            with native.instruction_set(isa):
                found = torch.ops.flowroutes.attention_layer(
                    one, one, one, one, one[0], one[0, 0], None, None, 1.0, 0.0, 0, True, floor, backend
                )
            assert float(found[0]) == 0.5
            assert found[4].shape == (listed,)
