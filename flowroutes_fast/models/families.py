"""What a decoder block is, family by family: one table, no if-chains elsewhere.

A family says where the modules of a block are, what multiplies what they add to the residual stream, and which of them
read the same input. Everything that only changes the attention weights (rotary embedding, q/k norm, masks, multipliers)
needs no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# attention module, output of its value module [1, token, n] -> [1, kv_head, token, d_head]
Values = Callable[[nn.Module, Tensor], Tensor]
Number = Callable[[nn.Module], float]


def _heads(x: Tensor, d_head: int) -> Tensor:
    return x.unflatten(-1, (-1, d_head)).transpose(1, 2)  # type: ignore[no-any-return]


def _plain(attention: Any, x: Tensor) -> Tensor:
    return _heads(x, attention.head_dim)


def _interleaved(attention: Any, x: Tensor) -> Tensor:
    """Heads of (query, key, value) each."""
    d_head = getattr(attention, "head_dim", None) or attention.head_size
    return x.unflatten(-1, (-1, 3, d_head))[..., 2, :].transpose(1, 2)  # type: ignore[no-any-return]


def _gpt2(attention: Any, x: Tensor) -> Tensor:
    return _heads(x.chunk(3, -1)[2], attention.head_dim)


def _bigcode(attention: Any, x: Tensor) -> Tensor:
    return (
        _heads(x[..., -attention.head_dim :], attention.head_dim)
        if attention.multi_query
        else _interleaved(attention, x)
    )


def _falcon(attention: Any, x: Tensor) -> Tensor:
    return attention._split_heads(x)[2].transpose(1, 2)  # type: ignore[no-any-return]


def _mpt(attention: Any, x: Tensor) -> Tensor:
    x = x.clamp(-attention.clip_qkv, attention.clip_qkv) if attention.clip_qkv else x
    return _heads(x.chunk(3, -1)[2], attention.head_dim)


def _codegen(attention: Any, x: Tensor) -> Tensor:
    local = attention.head_dim * attention.num_attention_heads // 4
    value = x.unflatten(-1, (4, -1)).split(local, -1)[1]
    return attention._split_heads(value, attention.num_attention_heads, attention.head_dim, mp_num=4).transpose(1, 2)  # type: ignore[no-any-return]


def _one(module: Any) -> float:
    return 1.0


def _number(name: str) -> Number:
    """A multiplier that a module carries as an attribute (a number or a one-element buffer)."""
    return lambda module: float(getattr(module, name))


def _second_half(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2, attention.head_dim))[..., 1, :].sigmoid()  # type: ignore[no-any-return]


def _sigmoid(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, attention.head_dim)).sigmoid()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Family:
    """Where a block's parts are; see MODELS in the documentation for the table made of this.

    Names are attribute paths below the decoder (``layers``), the block, or the attention module (``output``,
    ``values``, ``inner_norm``, ``gate``). Where a name is absent from a block, the block has no such part.

    Attributes:
        mid: the module whose input is the state after attention. None: there is no such state, attention and FFN read
            one input.
        ffn: modules whose outputs together are what the FFN adds.
        down: the FFN's last projection, whose inputs are its neurons.
        parallel: decides from the config whether attention and FFN both read the block's input.
        mixers: modules that mix positions without attention weights; each is one opaque part.
        post_norm, ffn_norm: norms between attention (FFN) and the residual stream; linearised: their divisor is frozen.
        inner_norm: a norm between the heads and W_O, linearised too. gate: the module whose output, through ``gate_of``
            -> [1, token, head, d_head], multiplies the heads' outputs.
        attention_scale, mixer_scale, ffn_scale: what multiplies the parts, from the block. residual_scale,
            through_scale: what multiplies the state itself on its way past attention (FFN). state_scale: what
            multiplies everything at the end of the block.
        residual: "block": the residual connection carries the block's input; "attention": the (normalised) input of
            attention; "argument": the second argument of the attention module.
        through: the module whose input passes the FFN by; default: the state after attention itself.
        post: the module whose input is the block's last sum; default: the block's output.
        values, value_of: the module that projects the values, and how its output splits into heads.
        last_logits: logits of the last positions can be asked for without leaving out states of the others.
        hooked: attention weights come from the attention module's second output, not through the attention interface.
    """

    name: str
    layers: str = "layers"
    attention: str = "self_attn"
    output: str = "o_proj"
    mid: str | None = "post_attention_layernorm"
    ffn: tuple[str, ...] = ("mlp",)
    down: str = "mlp.down_proj"
    parallel: Callable[[Any], bool] = lambda config: False
    mixers: tuple[str, ...] = ()
    post_norm: str = ""
    ffn_norm: str = ""
    inner_norm: str = ""
    gate: str = ""
    gate_of: Callable[[nn.Module, Tensor], Tensor] = _sigmoid
    attention_scale: Number = _one
    mixer_scale: Number = _one
    ffn_scale: Number = _one
    residual_scale: Number = _one
    through_scale: Number = _one
    state_scale: Number = _one
    residual: str = "block"
    through: str = ""
    post: str = ""
    values: str = "v_proj"
    value_of: Values = _plain
    hooked: bool = False
    last_logits: bool = True
    note: str = ""


def _opt(config: Any) -> Family:
    before = config.do_layer_norm_before
    return replace(
        _OPT,
        mid="final_layer_norm" if before else "self_attn_layer_norm",
        through="fc1" if not before else "",
        post="" if before else "final_layer_norm",
    )


def _bloom(config: Any) -> Family:
    return replace(_BLOOM, through="mlp") if config.apply_residual_connection_post_layernorm else _BLOOM


def _falcon_family(config: Any) -> Family:
    if config.alibi and config._attn_implementation not in (None, "eager"):
        raise ValueError(
            "falcon with ALiBi computes something else in transformers' sdpa attention than in its eager one, which "
            "alone gives its "
            "attention weights: load the model with attn_implementation='eager'"
        )
    return _FALCON


_LLAMA = Family("llama")
_GPT2 = Family(
    "gpt2",
    layers="h",
    attention="attn",
    output="c_proj",
    mid="ln_2",
    down="mlp.c_proj",
    values="c_attn",
    value_of=_gpt2,
)
_NEOX = Family(
    "gpt_neox",
    attention="attention",
    output="dense",
    down="mlp.dense_4h_to_h",
    values="query_key_value",
    value_of=_interleaved,
    parallel=lambda config: bool(getattr(config, "use_parallel_residual", True)),
    note="parallel unless use_parallel_residual=False",
)
_OPT = Family(
    "opt",
    layers="layers",
    output="out_proj",
    ffn=("fc2",),
    down="fc2",
    note="norms before, or after the sums (OPT-350m)",
)
_GEMMA2 = Family(
    "gemma2",
    mid="pre_feedforward_layernorm",
    post_norm="post_attention_layernorm",
    ffn_norm="post_feedforward_layernorm",
)
_OLMO2 = Family("olmo2", mid="mlp", post_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm")
_COHERE = Family("cohere", parallel=lambda config: True, mid=None)
_JAMBA = Family(
    "jamba",
    mid="pre_ff_layernorm",
    ffn=("feed_forward",),
    down="feed_forward.down_proj",
    mixers=("mamba",),
    note="mixture of experts",
)
_GRANITE = Family(
    "granite",
    attention_scale=_number("residual_multiplier"),
    ffn_scale=_number("residual_multiplier"),
    note="residual multiplier",
)
_GPTJ = Family(
    "gptj",
    layers="h",
    attention="attn",
    output="out_proj",
    mid=None,
    parallel=lambda config: True,
    down="mlp.fc_out",
    hooked=True,
)
_BLOOM = Family(
    "bloom",
    layers="h",
    attention="self_attention",
    output="dense",
    ffn=("mlp.dense_4h_to_h",),
    down="mlp.dense_4h_to_h",
    residual="argument",
    values="query_key_value",
    value_of=_interleaved,
    hooked=True,
    note="residual inside the attention module",
)

_FALCON = replace(
    _BLOOM,
    name="falcon",
    residual="block",
    value_of=_falcon,
    ffn=("mlp",),
    parallel=lambda config: config.new_decoder_architecture or config.parallel_attn,
    note="parallel, or sequential (falcon-rw)",
)

FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    "afmoe": replace(
        _GEMMA2,
        name="afmoe",
        mid="pre_mlp_layernorm",
        ffn_norm="post_mlp_layernorm",
        gate="gate_proj",
        note="mixture of experts",
    ),
    "apertus": replace(_LLAMA, name="apertus", mid="feedforward_layernorm"),
    "bamba": replace(_JAMBA, name="bamba", note=""),
    "bitnet": replace(_LLAMA, name="bitnet", inner_norm="attn_sub_norm", note="norm before W_O"),
    "bloom": _bloom,
    "codegen": replace(_GPTJ, name="codegen", values="qkv_proj", value_of=_codegen),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, name="cohere2"),
    "deepseek_v2": replace(_LLAMA, name="deepseek_v2", values="", note="latent attention; mixture of experts"),
    "deepseek_v3": replace(_LLAMA, name="deepseek_v3", values="", note="latent attention; mixture of experts"),
    "ernie4_5": replace(_LLAMA, name="ernie4_5"),
    "exaone4": replace(_OLMO2, name="exaone4"),
    "falcon": _falcon_family,
    "falcon_h1": replace(
        _JAMBA,
        name="falcon_h1",
        attention_scale=_number("attn_out_multiplier"),
        mixer_scale=_number("ssm_out_multiplier"),
        note="attention and Mamba side by side",
    ),
    "gemma": replace(_LLAMA, name="gemma"),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, name="gemma3_text"),
    "gemma4_text": replace(
        _GEMMA2,
        name="gemma4_text",
        ffn=("mlp", "post_per_layer_input_norm"),
        state_scale=_number("layer_scalar"),
        values="",
        last_logits=False,
        down="",
        note="layer scalar",
    ),
    "glm": replace(_LLAMA, name="glm"),
    "glm4": replace(_LLAMA, name="glm4", post_norm="post_self_attn_layernorm", ffn_norm="post_mlp_layernorm"),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, name="gpt_bigcode", value_of=_bigcode, note="multi-query"),
    "gpt_neo": replace(
        _GPT2,
        name="gpt_neo",
        attention="attn.attention",
        output="out_proj",
        values="v_proj",
        value_of=_plain,
        hooked=True,
    ),
    "gpt_neox": _NEOX,
    "gpt_oss": replace(_LLAMA, name="gpt_oss", down="", note="attention sinks; mixture of experts"),
    "gptj": _GPTJ,
    "granite": _GRANITE,
    "granitemoe": replace(
        _GRANITE, name="granitemoe", ffn=("block_sparse_moe",), down="", note="residual multiplier; mixture of experts"
    ),
    "granitemoehybrid": replace(
        _GRANITE,
        name="granitemoehybrid",
        mixer_scale=_number("residual_multiplier"),
        ffn=("block_sparse_moe", "shared_mlp"),
        down="",
        mixers=("mamba",),
        note="residual multiplier; mixture of experts",
    ),
    "helium": replace(_LLAMA, name="helium"),
    "hunyuan_v1_dense": replace(_LLAMA, name="hunyuan_v1_dense"),
    "jamba": _JAMBA,
    "lfm2": replace(
        _LLAMA,
        name="lfm2",
        output="out_proj",
        mid="ffn_norm",
        ffn=("feed_forward",),
        down="feed_forward.w2",
        mixers=("conv",),
    ),
    "llama": _LLAMA,
    "llama4_text": replace(
        _LLAMA,
        name="llama4_text",
        ffn=("feed_forward",),
        down="feed_forward.down_proj",
        note="chunked attention; mixture of experts",
    ),
    "minicpm3": replace(
        _GRANITE,
        name="minicpm3",
        attention_scale=_number("residual_scale"),
        ffn_scale=_number("residual_scale"),
        values="",
        note="latent attention",
    ),
    "minimax": replace(
        _LLAMA,
        name="minimax",
        residual="attention",
        residual_scale=_number("attn_alpha_factor"),
        attention_scale=_number("attn_beta_factor"),
        mixer_scale=_number("attn_beta_factor"),
        through="mlp",
        through_scale=_number("mlp_alpha_factor"),
        ffn_scale=_number("mlp_beta_factor"),
        down="",
        note="the residual stream is normalised before every sum",
    ),
    "mistral": replace(_LLAMA, name="mistral"),
    "mixtral": replace(_LLAMA, name="mixtral", down="", note="mixture of experts"),
    "mpt": replace(
        _BLOOM,
        name="mpt",
        layers="blocks",
        attention="attn",
        output="out_proj",
        mid="norm_2",
        residual="block",
        ffn=("ffn.down_proj",),
        down="ffn.down_proj",
        values="Wqkv",
        value_of=_mpt,
        note="",
    ),
    "nemotron": replace(_LLAMA, name="nemotron"),
    "olmo": replace(_LLAMA, name="olmo"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, name="olmo3"),
    "opt": _opt,
    "phi": replace(_LLAMA, name="phi", output="dense", mid=None, parallel=lambda config: True, down="mlp.fc2"),
    "phi3": replace(_LLAMA, name="phi3", values=""),
    "qwen2": replace(_LLAMA, name="qwen2"),
    "qwen2_moe": replace(_LLAMA, name="qwen2_moe", note="mixture of experts"),
    "qwen3": replace(_LLAMA, name="qwen3"),
    "qwen3_moe": replace(_LLAMA, name="qwen3_moe", note="mixture of experts"),
    "qwen3_next": replace(
        _LLAMA,
        name="qwen3_next",
        mixers=("linear_attn",),
        gate="q_proj",
        gate_of=_second_half,
        note="mixture of experts",
    ),
    "recurrent_gemma": replace(
        _LLAMA,
        name="recurrent_gemma",
        attention="temporal_block",
        mid="channel_pre_norm",
        ffn=("mlp_block",),
        down="mlp_block.down_proj",
        mixers=("temporal_block",),
    ),
    "seed_oss": replace(_LLAMA, name="seed_oss"),
    "smollm3": replace(_LLAMA, name="smollm3"),
    "stablelm": replace(
        _LLAMA,
        name="stablelm",
        parallel=lambda config: bool(config.use_parallel_residual),
        note="sequential unless use_parallel_residual=True",
    ),
    "starcoder2": replace(_LLAMA, name="starcoder2", down="mlp.c_proj"),
}


@dataclass(frozen=True)
class Block:
    """The modules of one layer, resolved on a real model. ``attention`` is None in a layer without attention
    weights.
    """

    index: int
    family: Family
    module: nn.Module
    attention: nn.Module | None
    output: nn.Module | None
    mixer: nn.Module | None
    ffn: tuple[nn.Module, ...]
    mid: nn.Module | None
    post_norm: nn.Module | None
    ffn_norm: nn.Module | None
    inner_norm: nn.Module | None
    gate: nn.Module | None
    values: nn.Module | None
    through: nn.Module | None
    post: nn.Module | None
    parallel: bool
    down: nn.Module | None

    @property
    def shape(self) -> str:
        return "parallel" if self.parallel else "sequential"

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.module.parameters())

    def w_o(self, heads: int) -> Tensor:
        """W_O as ``[head, d_head, d_model]`` float32, whichever way round the module stores it."""
        return _weight(self.output, self.index).unflatten(1, (heads, -1)).permute(1, 2, 0)  # type: ignore[no-any-return]

    def w_down(self) -> Tensor:
        """The down projection as ``[neuron, d_model]`` float32."""
        return _weight(self.down, self.index).T

    @property
    def down_bias(self) -> Tensor | None:
        """Bias of the down projection ``[d_model]`` float32 or None."""
        return _bias(self.down, self.index)

    @property
    def output_bias(self) -> Tensor | None:
        """b_O ``[d_model]`` float32 or None."""
        return _bias(self.output, self.index)

    def value_bias(self) -> Tensor | None:
        """b_V ``[kv_head, d_head]`` float32 or None."""
        bias = _bias(self.values, self.index)
        return None if bias is None else self.family.value_of(self.attention, bias[None, None])[0, :, 0]  # type: ignore[arg-type]


def _weight(module: Any, layer: int) -> Tensor:
    """What a linear module multiplies by, ``[out, in]`` float32, also from under adapters or a quantised format."""
    from flowroutes_fast.models.weights import effective_weight

    return effective_weight(module, layer)


def _bias(module: Any, layer: int) -> Tensor | None:
    from flowroutes_fast.models.weights import effective_bias

    return effective_bias(module, layer)


def _find(root: Any, path: str) -> Any:
    """The module at an attribute path, or None; inside torch.compile's wrapper where one of its modules was
    compiled alone.
    """
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
        root = _in_use(getattr(root, "_orig_mod", root))
        if root is None:
            return None
    return root if path else None


def _in_use(module: Any) -> Any:
    """The module that runs: PEFT's modules_to_save stand beside the original in a wrapper."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return module
    active = (
        [] if module.disable_adapters else [name for name in module.active_adapters if name in module.modules_to_save]
    )
    return module.modules_to_save[active[0]] if active else module.original_module


def family_of(config: Any) -> Family:
    """The family of a transformers config; ``ValueError`` for one that is not in the table."""
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise ValueError("this is not a transformers model (it has no config.model_type)")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder-decoder model; information flow routes are defined for decoder-only models"
        )
    if getattr(config, "is_decoder", True) is False and kind in _ENCODERS:
        raise ValueError(
            f"{kind} is an encoder; information flow routes are defined for decoders, where positions see only what "
            f"came before"
        )
    if kind in REFUSED:
        raise ValueError(f"model family {kind!r} cannot be traced: {REFUSED[kind]}")
    if kind not in FAMILIES:
        raise ValueError(
            f"model family {kind!r} is not known to flowroutes_fast; known families: {', '.join(sorted(FAMILIES))}"
        )
    found = FAMILIES[kind]
    return found if isinstance(found, Family) else found(config)


_ENCODERS = (
    "bert",
    "roberta",
    "distilbert",
    "deberta",
    "deberta-v2",
    "electra",
    "modernbert",
    "xlm-roberta",
    "albert",
    "camembert",
    "mpnet",
)
REFUSED = {
    "deepseek_v4": "it has several residual streams, and a route is defined on one",
    "gemma3n": "it has several residual streams, and a route is defined on one",
    "gemma3n_text": "it has several residual streams, and a route is defined on one",
    "diffllama": "its heads subtract two attention patterns and normalise the difference, so that sub-edges are not "
    "parts of a sum",
    "mamba": "it has no attention weights; a route needs sub-edges between positions",
    "mamba2": "it has no attention weights; a route needs sub-edges between positions",
    "falcon_mamba": "it has no attention weights; a route needs sub-edges between positions",
    "rwkv": "it has no attention weights; a route needs sub-edges between positions",
}


def text_config(model: Any) -> Any:
    """The config of the language model, below a wrapper (image-text models, PEFT) if there is one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _layers(model: Any, family: Family) -> nn.ModuleList:
    """The list of blocks: below the decoder where the model says which it is (beside a vision tower, say)."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        for name, module in root.named_modules() if isinstance(root, nn.Module) else ():
            if name.split(".")[-1] == family.layers and isinstance(module, nn.ModuleList):
                return module
    raise ValueError(
        f"this {family.name} model is not built as expected: it has no list of blocks named {family.layers!r}"
    )


def blocks_of(model: nn.Module) -> list[Block]:
    """Resolve every block of a transformers decoder; ``ValueError`` for a family that is not in the table."""
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} is not a transformers model (it has no config.model_type)")
    config = text_config(model)
    family = family_of(config)
    layers = _layers(model, family)
    if not len(layers):
        raise ValueError(f"this {family.name} model has no layers")
    return [_block(i, getattr(layer, "_orig_mod", layer), family, config) for i, layer in enumerate(layers)]


def _block(index: int, layer: nn.Module, family: Family, config: Any) -> Block:
    attention = _find(layer, family.attention)
    output = _find(attention, family.output) if attention is not None else None
    mixer = next((m for name in family.mixers if (m := _find(layer, name)) is not None), None)
    if (
        attention is not None
        and (getattr(layer, "block_type", None) == "linear_attention" or output is None)
        and (mixer or family.name == "minimax")
    ):
        mixer, attention, output = mixer or attention, None, None  # a mixer under the attention's name
    elif mixer is attention:
        mixer = None
    parallel = family.parallel(config)
    mid = None if parallel or family.mid is None else _find(layer, family.mid)
    ffn = tuple(m for name in family.ffn if (m := _find(layer, name)) is not None)
    for found, what in (
        (attention if mixer is None else mixer, family.attention),
        (output if attention is not None else mixer, family.output),
        (ffn or None, " or ".join(family.ffn)),
        (mid or (True if parallel else None), family.mid),
    ):
        if found is None:
            changed = [type(m).__name__ for m in layer.modules() if type(m).__module__.startswith("peft.")]
            why = (
                f" (an adapter has put its {changed[0]} there: remove it, or merge it where it can be)"
                if changed
                else ""
            )
            raise ValueError(f"this {family.name} model is not built as expected: layer {index} has no {what!r}{why}")
    return Block(
        index,
        family,
        layer,
        attention,
        output,
        mixer,
        ffn,
        mid,
        _find(layer, family.post_norm),
        _find(layer, family.ffn_norm),
        _find(attention, family.inner_norm),
        _find(attention, family.gate),
        _find(attention, family.values),
        _find(layer, family.through),
        _find(layer, family.post),
        parallel,
        _find(layer, family.down),
    )


def context_length(config: Any) -> int | None:
    """Longest prompt the positions of this model allow, or None if it has no limit of its own."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    ropes = _ropes(config)
    if any("dynamic" in _rope_type(rope) and not rope.get("original_max_position_embeddings") for rope in ropes):
        # stretched beyond what it was trained on
        return int(limit * max(float(rope.get("factor") or 1) for rope in ropes))
    return limit


def _ropes(config: Any) -> list[dict[str, Any]]:
    """A model's rotary parameters, one or several (by type of layer)."""
    own = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [one for one in own.values() if isinstance(one, dict)] or [own]


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "")))


def rotary_regime(config: Any, length: int) -> int:
    """Prompts of one regime are rotated alike when they run together: some rotary embeddings change with the
    longest prompt of a batch.
    """
    regime = 0
    for rope in _ropes(config):
        kind = _rope_type(rope)
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        limit = int(limit or getattr(config, "max_position_embeddings", None) or 0)
        if kind == "longrope":
            regime = max(regime, int(length > limit))
        elif "dynamic" in kind and length > limit:
            regime = max(regime, length)
    return regime


def vocabulary_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
