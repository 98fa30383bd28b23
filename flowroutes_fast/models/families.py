"""What a decoder block is, family by family: one table, no if-chains elsewhere.

A family says where the modules of a block are, whether attention and FFN run one after the other or side by side, and where
the value bias lies. Everything that only changes the attention weights (rotary embedding, q/k norm, masks) needs no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


def _separate(name: str) -> Callable[[nn.Module, int, int], Tensor | None]:
    """Value bias of an attention module whose value projection is a module of its own."""

    def bias(attention: nn.Module, kv_heads: int, d_head: int) -> Tensor | None:
        found = getattr(getattr(attention, name), "bias", None)
        return None if found is None else found.view(kv_heads, d_head)

    return bias


def _none(attention: nn.Module, kv_heads: int, d_head: int) -> Tensor | None:
    return None


def _gpt2(attention: nn.Module, kv_heads: int, d_head: int) -> Tensor | None:
    return attention.c_attn.bias[-kv_heads * d_head :].view(kv_heads, d_head)  # type: ignore[union-attr, index]


def _neox(attention: nn.Module, kv_heads: int, d_head: int) -> Tensor | None:
    found = attention.query_key_value.bias  # type: ignore[union-attr]
    return None if found is None else found.view(kv_heads, 3, d_head)[:, 2]  # type: ignore[operator, union-attr, return-value]


@dataclass(frozen=True)
class Family:
    """Where a block's parts are. Names are attribute paths below the decoder, the block, or the attention module.

    ``mid`` is the module whose input is the state after attention (None where there is no such state).
    ``parallel`` decides from the config whether attention and FFN both read the block's input.
    """

    name: str
    layers: str = "layers"
    attention: str = "self_attn"
    output: str = "o_proj"
    ffn: str = "mlp"
    mid: str = "post_attention_layernorm"
    down: str = "down_proj"
    parallel: Callable[[Any], bool] = lambda config: False
    value_bias: Callable[[nn.Module, int, int], Tensor | None] = _none


_LLAMA = Family("llama", value_bias=_separate("v_proj"))
_GPT2 = Family("gpt2", layers="h", attention="attn", output="c_proj", ffn="mlp", mid="ln_2", down="c_proj", value_bias=_gpt2)
_NEOX = Family(
    "gpt_neox",
    attention="attention",
    output="dense",
    down="dense_4h_to_h",
    parallel=lambda config: bool(getattr(config, "use_parallel_residual", True)),
    value_bias=_neox,
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": Family("phi3"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": replace(_LLAMA, name="starcoder2", down="c_proj"),
}


@dataclass(frozen=True)
class Block:
    """The modules of one layer, resolved on a real model."""

    index: int
    family: Family
    module: nn.Module
    attention: nn.Module
    output: nn.Module
    ffn: nn.Module
    mid: nn.Module
    parallel: bool
    down: nn.Module | None  # the FFN's last projection, where there is one

    @property
    def shape(self) -> str:
        return "parallel" if self.parallel else "sequential"

    def w_o(self, heads: int) -> Tensor:
        """W_O as ``[head, d_head, d_model]`` float32, whichever way round the module stores it."""
        weight: Tensor = self.output.weight  # type: ignore[assignment]
        if not weight.is_floating_point() or weight.is_meta:
            raise ValueError(
                f"layer {self.index}: the attention output weight is stored as {weight.dtype} on {weight.device}, which cannot be read"
            )
        weight = weight.detach().float()
        if type(self.output).__name__ == "Conv1D":  # [head * d_head, d_model]
            return weight.view(heads, -1, weight.shape[1])
        return weight.view(weight.shape[0], heads, -1).permute(1, 2, 0)

    def w_down(self) -> Tensor:
        """The down projection as ``[neuron, d_model]`` float32."""
        weight: Tensor = self.down.weight.detach().float()  # type: ignore[union-attr, operator, assignment]
        return weight if type(self.down).__name__ == "Conv1D" else weight.T

    @property
    def down_bias(self) -> Tensor | None:
        """Bias of the down projection ``[d_model]`` float32 or None."""
        bias = getattr(self.down, "bias", None)
        return None if bias is None else bias.detach().float()

    @property
    def output_bias(self) -> Tensor | None:
        """b_O ``[d_model]`` float32 or None."""
        bias = getattr(self.output, "bias", None)
        return None if bias is None else bias.detach().float()

    def value_bias(self, kv_heads: int, d_head: int) -> Tensor | None:
        """b_V ``[kv_head, d_head]`` float32 or None."""
        bias = self.family.value_bias(self.attention, kv_heads, d_head)
        return None if bias is None else bias.detach().float()


def blocks_of(model: nn.Module) -> list[Block]:
    """Resolve every block of a transformers decoder; ``ValueError`` for a family that is not in the table."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise ValueError(f"{type(model).__name__} is not a transformers model (it has no config.model_type)")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder model; information flow routes are defined for decoder-only models")
    if kind not in FAMILIES:
        raise ValueError(f"model family {kind!r} is not known to flowroutes_fast; known families: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    decoder = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    try:
        layers = getattr(decoder, family.layers)
        return [
            Block(
                i, family, layer, getattr(layer, family.attention), getattr(getattr(layer, family.attention), family.output),
                getattr(layer, family.ffn), getattr(layer, family.mid), family.parallel(config), getattr(getattr(layer, family.ffn), family.down, None),
            )
            for i, layer in enumerate(layers)
        ]  # fmt: skip
    except AttributeError as error:
        raise ValueError(f"this {kind} model is not built as expected: {error}") from error


def context_length(config: Any) -> int | None:
    """Longest prompt the positions of this model allow, or None if it has no limit of its own."""
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def vocabulary_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
