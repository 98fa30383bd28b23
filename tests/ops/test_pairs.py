"""Exact proximities of listed sub-edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import CASES, TOLERANCE, layer, needs_native, truth

from flowroutes_fast.ops import native
from flowroutes_fast.ops.bound import bound
from flowroutes_fast.ops.pairs import pairs
from flowroutes_fast.ops.selftest import _layer

BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]


def listed(a, count, seed=0):
    """Visible and hidden sub-edges in no order, some of them twice."""
    g = torch.Generator().manual_seed(seed)
    sizes = (a.n_query, a.n_key, a.n_head)
    return torch.stack([torch.randint(0, n, (count,), generator=g) for n in sizes]).to(torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(c) or "plain")
def test_listed_sub_edges_equal_fp64(backend, case):
    a, _ = layer(11, **case)
    near, index = truth(a), listed(a, 300)
    query, key, head = index.long()
    found = pairs(a, bound(a, backend), index, backend)
    unit = float(a.whole.double().abs().sum(-1).max())
    torch.testing.assert_close(found.double(), near[head, query, key], rtol=1e-4, atol=TOLERANCE * unit)


@needs_native
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    count=st.sampled_from([1, 7, 64, 129]),
    threads=st.integers(1, 3),
    isa=st.sampled_from(native.instruction_sets()),
)
def test_a_list_in_any_order_on_any_instruction_set(seed, count, threads, isa):
    a, _ = layer(seed, n_query=13)
    index = listed(a, count, seed)
    bounds = bound(a, "cpu")
    with native.instruction_set(isa):
        found = pairs(a, bounds, index, "cpu", threads)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(pairs(a, bounds, index[:, order], "cpu"), found[order], rtol=1e-6, atol=1e-6)
    wanted = pairs(a, bounds, index, "reference")
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=TOLERANCE * float(a.whole.abs().sum(-1).max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sub_edges_have_no_proximities(backend):
    a, _ = layer(0)
    assert pairs(a, bound(a, backend), torch.empty((3, 0), dtype=torch.int32), backend).shape == (0,)


@pytest.mark.parametrize(
    "index", [torch.zeros(2, 4, dtype=torch.int32), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32)]
)
def test_an_index_that_is_none_is_refused(index):
    a, _ = layer(0)
    with pytest.raises(ValueError, match="index must hold integers"):
        pairs(a, bound(a, "reference"), index, "reference")


@needs_native
@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("value", [-1, 10_000])
def test_an_index_outside_is_refused(row, value):
    a, _ = layer(0)
    index = torch.zeros(3, 2, dtype=torch.int32)
    index[row, 1] = value
    with pytest.raises(IndexError, match="outside"):
        pairs(a, bound(a, "cpu"), index, "cpu")


@needs_native
def test_indices_outside_are_refused():
    layer = _layer((4, 2, 5, 9, 7, 6, 33))
    for wrong in ([5, 0, 0], [0, 9, 0], [0, 0, 4], [-1, 0, 0]):
        index = torch.tensor([[0, 0, 0], wrong]).T
        with pytest.raises(IndexError, match="outside 0 to"):
            pairs(layer, None, index, "cpu")
