"""Layers to measure: real activations of the demo model, and random ones at the shapes of larger models; what a
kernel must at least cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.ops.attention import Attention

REAL_LAYERS = (0, 8, 23)
REAL_TOKENS = 1024


@dataclass(frozen=True)
class Shape:
    """One attention layer: heads, key-value heads, head width, model width."""

    heads: int
    kv_heads: int
    d_head: int
    d_model: int


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64, 576),
    "llama-2-7b": Shape(32, 32, 128, 4096),
    "llama-3-8b": Shape(32, 8, 128, 4096),
    "llama-70b": Shape(64, 8, 128, 8192),
}


@dataclass
class Case:
    """A layer to measure: its sub-edges, the proximities of its other parts ``[1, query]``, and where it comes from."""

    name: str
    shape: Shape
    attention: Attention
    others: Tensor

    @property
    def tokens(self) -> int:
        return self.attention.n_query

    def flops(self, kernel: str) -> float | None:
        """Floating point operations that a kernel cannot do without: a multiply-add counts two, causal halves are
        halves. None for operations that no product of matrices bounds.
        """
        s, t = self.shape, self.tokens
        gemm = 2.0 * t * s.heads * s.d_head * s.d_model  # sign(Y) W_O
        attention = 2.0 * t * t / 2 * s.heads * 2 * s.d_head  # q k and g v
        per_element = {
            "bound": 0.0,
            "certified": 0.0,
            "signed": 0.0,
            "exact": 0.0,
            "exact, termwise": 3.0 * t * t / 2 * s.heads * s.d_model,
        }
        return gemm + attention + per_element[kernel] if kernel in per_element else None


def random_case(name: str, tokens: int, device: str, dtype: torch.dtype) -> Case:
    """Random activations: flat attention, every head alike."""
    s = SHAPES[name]
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    query, key, value = (
        normal(s.heads, tokens, s.d_head),
        normal(s.kv_heads, tokens, s.d_head),
        normal(s.kv_heads, tokens, s.d_head),
    )
    w_o = (normal(s.d_model, s.heads * s.d_head) / s.d_model**0.5).view(s.d_model, s.heads, s.d_head).permute(1, 2, 0)
    whole = normal(tokens, s.d_model).float()
    attention = Attention(query, key, value, w_o, whole, s.d_head**-0.5)
    return Case(f"{name}, random", s, attention, 0.6 * whole.abs().sum(-1)[None])


def real_cases(tokens: int, path: Path) -> list[Case]:
    """Layers of the demo model on real text, from a file made by :func:`save_activations`."""
    from safetensors.torch import load_file

    if not path.is_file():
        save_activations(path)
    stored, found = load_file(path), []
    for layer in REAL_LAYERS:
        t = {name: stored[f"{layer}.{name}"].float() for name in ("query", "key", "value", "w_o", "whole", "others")}
        query, key, value = (t[name][:, :tokens] for name in ("query", "key", "value"))
        w_o = t["w_o"].view(576, 9, 64).permute(1, 2, 0)
        attention = Attention(query, key, value, w_o, t["whole"][:tokens], 64**-0.5)
        found.append(
            Case(f"smollm2-135m, layer {layer}", SHAPES["smollm2-135m"], attention, t["others"][None, :tokens])
        )
    return found


def save_activations(path: Path) -> None:
    """Capture a few layers of the demo model at 1024 tokens of a licence text, in float32, as safetensors."""
    from safetensors.torch import save_file

    import flowroutes_fast as fr
    from flowroutes_fast.capture.hooks import Layer, capture
    from flowroutes_fast.ops import reference
    from flowroutes_fast.system.files import write_atomically
    from flowroutes_fast.tracing.importances import parts_of

    model, tokenizer = fr.load("demo")
    stored: dict[str, Tensor] = {}

    def keep(layer: Layer) -> None:
        if layer.index in REAL_LAYERS:
            parts = parts_of(layer)
            assert parts.w_o is not None
            tensors: dict[str, Any] = {
                "query": layer.query,
                "key": layer.key,
                "value": parts.value,
                "w_o": parts.w_o.permute(2, 0, 1).reshape(576, -1),
                "whole": parts.whole,
                "others": reference.proximity(parts.residual, parts.whole),
            }
            stored.update({f"{layer.index}.{name}": t.contiguous() for name, t in tensors.items()})

    capture(model, torch.tensor([long_prompt(tokenizer, REAL_TOKENS)]), keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: save_file(stored, temporary))


def long_prompt(tokenizer, tokens: int) -> list[int]:  # type: ignore[no-untyped-def]
    """Ids of English and Python text that every installation has."""
    import argparse
    import sys

    text = sys.copyright + (argparse.__doc__ or "") + Path(argparse.__file__).read_text(encoding="utf-8")
    return tokenizer(text)["input_ids"][:tokens]
