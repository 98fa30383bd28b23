"""Inputs of the tests of single operations, and their definitions written out."""

import pytest
import torch

from flowroutes_fast.ops import native, reference

needs_native = pytest.mark.skipif(native.load()[0] is None, reason="native extension not built")


def case(seed, batch, tokens, heads, kv, d, width, outliers=False):
    torch.manual_seed(seed)
    q, k = torch.randn(batch, heads, tokens, d), torch.randn(batch, heads, tokens, d)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    pattern = (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
    value, w_o = torch.randn(batch, tokens, kv, d), torch.randn(heads, d, width) / d**0.5
    pre = torch.randn(batch, tokens, width)
    if outliers:
        pre[..., 0] = 1e4
    z = torch.einsum("bhqk,bkhd,hdm->bqm", pattern, value.repeat_interleave(heads // kv, 2), w_o)
    return pattern, value, w_o, pre, pre + z


def layer_inputs(tokens=45, heads=4, kv=2, d=16, width=40):
    torch.manual_seed(5)
    q, k, v = torch.randn(heads, tokens, d), torch.randn(kv, tokens, d), torch.randn(kv, tokens, d)
    return q, k, v, torch.randn(heads, d, width), torch.randn(tokens, width) * 3, torch.rand(tokens)


def bad(**changes):
    names = ("pattern", "value", "w_o", "resid_pre", "resid_mid")
    return {**dict(zip(names, case(0, 1, 5, 4, 2, 8, 16), strict=True)), **changes}


def components(shape=(2, 5, 7, 33), dtype=torch.float32):
    torch.manual_seed(2)
    outputs = torch.randn(shape, dtype=dtype)
    return outputs, outputs.sum(-2) + 0.3


def naive_components(outputs, state):
    outputs, state = outputs.double(), state.double()
    return (state.abs().sum(-1, keepdim=True) - (outputs - state[..., None, :]).abs().sum(-1)).clamp_min(0)


def registered(name):
    q, k, v, w, y, base = layer_inputs(tokens=9)
    pattern = reference.attention_pattern(q, k, scaling=0.25)
    outputs, state = components((5, 7, 33))
    return {
        "part_proximity": {"part": y * 0.5, "whole": y},
        "component_proximity": {"outputs": outputs, "state": state},
        "attention_proximity": {"pattern": pattern, "value": v, "w_o": w, "whole": y},
        "attention_layer": {
            "query": q,
            "key": k,
            "value": v,
            "w_o": w,
            "whole": y,
            "base": base,
            "mask": None,
            "sinks": torch.zeros(4),
            "scaling": 0.25,
            "softcap": 0.0,
            "window": 0,
            "dense": True,
            "floor": 0.0,
        },
    }[name]


BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
