"""Sign bounds, and lists of the sub-edges above a cut."""

import pytest
import torch
from layer_cases import CASES, TOLERANCE, check, doubled, layer, needs_native, truth

from flowroutes_fast.ops import reference
from flowroutes_fast.ops.attention import Attention
from flowroutes_fast.ops.bound import bound, candidates
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.ops.pairs import pairs


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(c) or "plain")
def test_bound_candidates_and_pairs(backend, case):
    a, others = layer(3, **case)
    near, exact = truth(a), doubled(a)
    flow = reference.sign_flow(
        exact.pattern, exact.value, exact.w_o, exact.whole, row_scale=exact.row_scale, gate=exact.gate
    )
    unit = float(a.whole.double().abs().sum(-1).max())
    bounds = bound(a, backend)
    torch.testing.assert_close(bounds.upper.double(), flow.clamp_min(0).sum(-1).T, rtol=1e-4, atol=TOLERANCE * unit)
    torch.testing.assert_close(bounds.flow.double(), flow.sum(-1).T, rtol=1e-4, atol=TOLERANCE * unit)
    cut = 0.01 * (others.sum(0) + bounds.upper.sum(1))
    listed = candidates(a, bounds, cut, cut, backend)
    query, key, head = listed.index.long()
    upper = flow.clamp_min(0)
    wanted = ((upper > cut.double()[:, None] * 1.0001) | (upper.sum(0) > cut.double()[:, None] * 1.0001)) & (
        upper > 1e-6 * unit
    )
    got = torch.zeros_like(wanted)
    got[head, query, key] = True
    assert not (wanted & ~got).any()
    value = pairs(a, bounds, listed.index, backend)
    torch.testing.assert_close(value.double(), near[head, query, key], rtol=1e-4, atol=TOLERANCE * unit)
    assert (value.double() <= listed.bound.double() + TOLERANCE * unit).all()


def _with_slack(a, slack):
    flow = reference.sign_flow(a.pattern, a.value, a.w_o, a.whole)
    return (flow + reference.bound_slack(a.pattern, a.value, a.gradient, slack)).clamp_min(0)


def test_low_precision_needs_slack_and_has_it():
    """A gradient rounded to bfloat16 breaks the bound where signs cancel; a slack of 2^-8 |v||g| mends it."""
    broken = mended = 0
    for seed in range(20):
        a, others = layer(seed, 24, outliers=seed % 2 == 0, d_model=512)
        rounded = Attention(a.query, a.key, a.value, a.w_o, a.whole, a.scaling)
        rounded.__dict__["gradient"] = a.gradient.bfloat16().float()
        flow = rounded.pattern * torch.einsum("hkd,qhd->hqk", a.value.repeat_interleave(3, 0), rounded.gradient)
        near, unit = truth(a), TOLERANCE * float(a.whole.abs().sum(-1).max())
        broken += int((near > flow.clamp_min(0) + unit).sum())
        slack = reference.bound_slack(rounded.pattern, a.value, rounded.gradient, 2.0**-8)
        mended += int((near > (flow + slack).clamp_min(0) + unit).sum())
        torch.testing.assert_close(bound(a, "reference", 2.0**-8).upper, _with_slack(a, 2.0**-8).sum(-1).T)
        check(certified(a, others, floor=1e-3, backend="reference", slack=2.0**-8), a, others, 1e-3)
    assert broken > 0
    assert mended == 0
