"""The interface over a TransformerLens model: here a random one, with TransformerLens's names for activations and
weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llm_transparency_tool.models.transparent_llm import ModelInfo, TransparentLlm


class ToyLens:
    """Random blocks with grouped queries; ``run_with_cache`` returns activations under TransformerLens's names."""

    def __init__(
        self, n_layers: int, d_model: int, n_heads: int, n_kv: int, d_head: int, d_mlp: int, value_bias: float = 0.0
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int, scale: float | None = None) -> Tensor:
            return torch.randn(shape, generator=generator) * (shape[-2] ** -0.5 if scale is None else scale)

        self.cfg = SimpleNamespace(n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_vocab=101, n_params=0)
        self.embedding = random(101, d_model, scale=1.0)
        self.blocks = []
        for _ in range(n_layers):
            attn = SimpleNamespace(
                W_Q=2 * random(n_heads, d_model, d_head),
                W_K=2 * random(n_kv, d_model, d_head),
                W_V=random(n_kv, d_model, d_head),
                W_O=random(n_heads, d_head, d_model) * n_heads**-0.5,
                b_V=random(n_kv, d_head, scale=value_bias).repeat_interleave(n_heads // n_kv, 0),
                b_O=random(1, d_model, scale=0.1)[0],
            )
            mlp = SimpleNamespace(W_in=random(d_model, d_mlp), W_out=random(d_mlp, d_model))
            self.blocks.append(SimpleNamespace(attn=attn, mlp=mlp))

    @torch.no_grad()
    def run_with_cache(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        state, cache = self.embedding[tokens], {}
        for layer, block in enumerate(self.blocks):
            attn, name = block.attn, f"blocks.{layer}."
            cache[name + "hook_resid_pre"] = state
            normal = torch.layer_norm(state, state.shape[-1:])
            q, k = (torch.einsum("btm,hmd->bhtd", normal, w) for w in (attn.W_Q, attn.W_K))
            v = torch.einsum("btm,hmd->bthd", normal, attn.W_V)
            group = attn.W_Q.shape[0] // attn.W_K.shape[0]
            scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            mixed = pattern @ (v.repeat_interleave(group, 2) + attn.b_V).transpose(1, 2)
            mid = state + torch.einsum("bhtd,hdm->btm", mixed, attn.W_O) + attn.b_O
            out = torch.relu(torch.layer_norm(mid, mid.shape[-1:]) @ block.mlp.W_in) @ block.mlp.W_out
            state = mid + out
            cache |= {name + "attn.hook_pattern": pattern, name + "attn.hook_v": v, name + "hook_resid_mid": mid}
            cache |= {name + "hook_mlp_out": out, name + "hook_resid_post": state}
        return state, cache


class TransformerLensTransparentLlm(TransparentLlm):
    def __init__(self, model: Any) -> None:
        self._lens, self._last_run = model, None

    @property
    def _model(self) -> Any:
        return self._lens

    def run(self, tokens: Tensor) -> None:
        logits, cache = self._model.run_with_cache(tokens)
        self._last_run = SimpleNamespace(tokens=tokens, logits=logits, cache=cache)

    def model_info(self) -> ModelInfo:
        cfg = self._model.cfg
        return ModelInfo("double", cfg.n_params, cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_vocab)

    def _kept(self, layer: int, name: str) -> Tensor:
        if self._last_run is None:
            raise RuntimeError("the model has not been run")
        return self._last_run.cache[f"blocks.{layer}.{name}"]

    def tokens(self) -> Tensor:
        if self._last_run is None:
            raise RuntimeError("the model has not been run")
        return self._last_run.tokens

    def residual_in(self, layer: int) -> Tensor:
        return self._kept(layer, "hook_resid_pre")

    def residual_after_attn(self, layer: int) -> Tensor:
        return self._kept(layer, "hook_resid_mid")

    def residual_out(self, layer: int) -> Tensor:
        return self._kept(layer, "hook_resid_post")

    def ffn_out(self, layer: int) -> Tensor:
        return self._kept(layer, "hook_mlp_out")

    def attention_matrix(self, batch_i: int, layer: int, head: int) -> Tensor:
        return self._kept(layer, "attn.hook_pattern")[batch_i][head]

    @torch.no_grad()
    def decomposed_attn(self, batch_i: int, layer: int) -> Tensor:
        attn, value = self._model.blocks[layer].attn, self._kept(layer, "attn.hook_v")[batch_i]
        value = value.repeat_interleave(attn.b_V.shape[0] // value.shape[1], 1) + attn.b_V
        weighted = torch.einsum("hqk,khd->qkhd", self._kept(layer, "attn.hook_pattern")[batch_i], value)
        return torch.einsum("qkhd,hdm->qkhm", weighted, attn.W_O)
