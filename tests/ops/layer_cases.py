"""Random layers, their float64 truth, and the ways to certify them."""

import pytest
import torch

from flowroutes_fast.ops import native, reference
from flowroutes_fast.ops.attention import Attention

needs_native = pytest.mark.skipif(native.load()[0] is None, reason="native extension not built")


TOLERANCE = 3e-6  # of |y|_1: float32 sums of what is added up


def layer(
    seed,
    n_query=19,
    n_key=None,
    heads=6,
    kv=2,
    d_qk=16,
    d_v=12,
    d_model=48,
    outliers=False,
    wide=False,
    dtype=torch.float32,
    **options,
):
    """A random layer whose parts add up to its state; options are those of Attention, or True for a random mask,
    sinks, row_scale or gate.
    """
    g = torch.Generator().manual_seed(seed)
    n_key = n_key or n_query

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    random = {
        "mask": lambda: torch.zeros(n_query, n_key).masked_fill(
            torch.rand(n_query, n_key, generator=g) < 0.3, -torch.inf
        ),
        "sinks": lambda: normal(heads),
        "row_scale": lambda: normal(n_query).abs() + 0.1,
        "gate": lambda: normal(n_query, heads, d_v).sigmoid(),
    }
    options = {name: random[name]() if value is True else value for name, value in options.items()}
    query, key, value = normal(heads, n_query, d_qk) * 2, normal(kv, n_key, d_qk), normal(kv, n_key, d_v)
    w_o, rest = normal(heads, d_v, d_model) / d_v**0.5, normal(n_query, d_model)
    if outliers:
        rest[:, 1] = 1e4
    if wide:
        w_o[..., ::16] *= 30
    query, key, value, w_o, rest = (t.to(dtype) for t in (query, key, value, w_o, rest))
    attention = Attention(query, key, value, w_o, rest, d_qk**-0.5, **options)
    a = doubled(attention)
    z = torch.einsum("hqk,hkd,hdm->hqm", a.pattern, a.value.repeat_interleave(heads // kv, 0), a.w_o)
    if a.gate is not None:
        v = torch.einsum("hqk,hkd->qhd", a.pattern, a.value.repeat_interleave(heads // kv, 0)) * a.gate
        z = torch.einsum("qhd,hdm->hqm", v, a.w_o)
    if a.row_scale is not None:
        z = z * a.row_scale[:, None]
    whole = (z.sum(0) + rest).to(dtype)
    return Attention(query, key, value, w_o, whole, d_qk**-0.5, **options), reference.proximity(
        rest.float(), whole.float()
    )[None]


def doubled(a):
    names = ("query", "key", "value", "w_o", "whole", "mask", "sinks", "row_scale", "gate")
    tensors = {n: None if getattr(a, n) is None else getattr(a, n).double() for n in names}
    return Attention(**tensors, scaling=a.scaling, softcap=a.softcap, window=a.window)


def truth(a):
    """Proximities ``[head, query, key]`` in fp64."""
    a = doubled(a)
    return reference.attention_proximity(a.pattern, a.value, a.w_o, a.whole, row_scale=a.row_scale, gate=a.gate)


def check(found, a, others, floor):
    """Intervals hold the truth; every pair above the floor is there, its values are exact and its missing heads fit
    what is left open.
    """
    near = truth(a)
    total = near.sum((0, 2)) + others.double().sum(0)
    exact = doubled(a)
    flow = reference.sign_flow(
        exact.pattern, exact.value, exact.w_o, exact.whole, row_scale=exact.row_scale, gate=exact.gate
    )
    unit = TOLERANCE * torch.maximum(exact.whole.abs().sum(-1), flow.abs().sum((0, 2)))
    assert (found.low.double() <= total + unit).all()
    assert (total <= found.high.double() + unit).all()
    by_head = near.sum(-1).T
    assert (found.head_low.double() <= by_head + unit[:, None]).all()
    assert (by_head <= found.head_high.double() + unit[:, None]).all()
    query, key, head = found.index.long()
    named = head >= 0
    error = (near[head[named], query[named], key[named]] - found.value[named]).abs() / unit[query[named]] * TOLERANCE
    assert not error.numel() or float(error.max()) <= TOLERANCE
    listed = torch.zeros_like(near)
    listed[head[named], query[named], key[named]] = found.value[named].double()
    rest = torch.zeros_like(near[0])
    rest[query[~named], key[~named]] = found.value[~named].double()
    pair = near.sum(0)
    reached = pair > floor * total[:, None] + unit[:, None]
    missing = pair - listed.sum(0)
    assert (missing[reached] <= rest[reached] + unit[:, None].expand_as(pair)[reached]).all()
    assert (missing[reached] >= -unit[:, None].expand_as(pair)[reached]).all()


CASES = [
    {},
    {"n_query": 1},
    {"n_query": 1, "heads": 1, "kv": 1, "d_qk": 1, "d_v": 1, "d_model": 1},
    {"window": 5},
    {"mask": True},
    {"softcap": 3.0},
    {"sinks": True},
    {"row_scale": True},
    {"gate": True},
    {"gate": True, "row_scale": True, "sinks": True, "window": 7},
    {"n_query": 5, "n_key": 40},
    {"d_qk": 80, "d_v": 112, "d_model": 123, "heads": 3, "kv": 1},
    {"d_qk": 256, "d_v": 192, "d_model": 33, "heads": 2, "kv": 2},
    {"n_query": 150, "d_model": 200},
    {"outliers": True},
    {"wide": True, "d_model": 100},
    {"dtype": torch.bfloat16, "outliers": True},
    {"dtype": torch.float16},
]
