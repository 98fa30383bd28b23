"""Do a layer's captured parts add up to what the model computed? Asked on every pass, of every layer.

The parts of a node must add up to its state, x_i + Σ_h z_ih W_O[h] + rest_i = y_i, with z_ih what the attention
function returned; z_ih must be Σ_j α_hij v_hj with the α that importances are made of; and the state that enters a
layer must be the one that left the layer before. A plain model does alike at all positions: a few positions and
channels are looked at, the first and the last position among them. Where something may act on single ones (hooks,
replaced forwards, foreign attention functions, a model seen for the first time), all are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flowroutes_fast.ops import native

if TYPE_CHECKING:
    from flowroutes_fast.capture.hooks import Layer
    from flowroutes_fast.models.families import Block

ROWS, CHANNELS = 12, 32  # looked at in a plain model
PATTERN_BYTES = 64 * 2**20  # of attention weights at a time, where all rows are computed again
KNOWN = ("", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
MOST_ROUNDING = 1e-3  # of attention weights that large scores explain
SMALLEST = 1e-3  # sizes of channels are told apart down to this share of the largest
TOLERANCE = {  # int8 and float8 stand for layers that round their inputs to so many bits
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
    torch.int8: 3e-2,
    torch.float8_e4m3fn: 5e-2,
}
Explain = Callable[["Block"], "list[str]"]
Coarsest = Callable[["Block", torch.dtype], torch.dtype]


class _Places(NamedTuple):
    """Positions and channels that are looked at."""

    rows: Tensor
    channels: Tensor


@dataclass
class _Sample:
    """Parts and states of one layer at some positions and channels, to be compared later; ``weights``: see
    :func:`weights_error`.
    """

    block: Block
    dtype: torch.dtype
    sums: list[tuple[str, Tensor]]  # per node: the state and its parts [1 + part, row, channel]
    weights: Tensor | None
    errors: list[tuple[str, float]]  # what the native kernel found already


class Conservation:
    """The check of one forward pass; call it with every layer of every sequence, then :meth:`finish`."""

    def __init__(self, layers: int, coarsest: Coarsest, explain: Explain, thorough: bool) -> None:
        self.layers, self.coarsest, self.explain, self.thorough = layers, coarsest, explain, thorough
        self.seen: set[int] = set()
        # batch -> the state that left its last layer, and how often it had been written to
        self.left: dict[Any, tuple[Tensor, int]] = {}
        self.open: list[_Sample] = []
        self.chosen: dict[tuple[Any, ...], _Places] = {}

    def __call__(self, layer: Layer, computing: torch.dtype | None = None) -> None:
        """Take what has to be compared from a layer; everything together is compared in :meth:`judge`.

        ``computing``: the type that the model computed in, where it is not that of its states.
        """
        self.seen.add(layer.index)
        places = self._places(layer.resid_post)
        if not self.thorough and (errors := _native_errors(layer, places)) is not None:
            self.open.append(_Sample(layer.block, computing or layer.resid_post.dtype, [], None, errors))
            return
        weights = None
        if layer.mixed is not None:
            weights = weights_error(layer, self._rows_of_weights(layer))
        self.open.append(_Sample(layer.block, computing or layer.resid_post.dtype, _sums(layer, *places), weights, []))
        if self.thorough and layer.resid_post.device.type == "cpu":
            self.judge(layer)

    def _places(self, state: Tensor) -> _Places:
        """Positions and channels to look at."""
        key = state.shape, state.device
        if (found := self.chosen.get(key)) is None:
            tokens, width = state.shape
            rows = _spread(tokens, tokens if self.thorough else ROWS, state.device)
            self.chosen[key] = found = _Places(rows, _drawn(width, width if self.thorough else CHANNELS, state.device))
        return found

    def _rows_of_weights(self, layer: Layer) -> Tensor | None:
        """Positions whose attention weights are looked at; None for all, of all heads."""
        if layer.attention_function not in KNOWN:
            return None
        return self._few(layer) if self.thorough else self._places(layer.resid_post)[0]

    def _few(self, layer: Layer) -> Tensor:
        return _spread(len(layer.resid_post), 4 * ROWS, layer.resid_post.device)

    def enters(self, sequence: Any, block: Block, state: Tensor) -> None:
        """The whole state that enters a block; ``ValueError`` unless it is the one that left the block before."""
        before = self.left.pop(sequence, None)
        if before is None or (state is before[0] and state._version == before[1]):
            return  # (a copy is never the state itself)
        if (
            state.shape == before[0].shape
            and (state is not before[0])
            and torch.equal(state, before[0].to(state.device, state.dtype))
        ):
            return
        raise ValueError(_message(block, "entered", 1.0, 0.0, state.dtype, self.explain(block)))

    def leaves(self, sequence: Any, state: Tensor) -> None:
        """Note it; tensors of inference mode do not count how often they are written to, so that a copy is kept."""
        self.left[sequence] = (state.clone(), 0) if state.is_inference() else (state, state._version)

    def finish(self) -> None:
        """The whole pass has run: was every layer seen, and did all add up?"""
        self.left.clear()
        if len(self.seen) != self.layers:
            raise ValueError(f"{len(self.seen)} layers were captured but the model has {self.layers}")
        self.judge()

    def judge(self, layer: Layer | None = None) -> None:
        """``ValueError`` naming the first layer taken so far whose parts do not add up."""
        taken, self.open = self.open, []
        alike: dict[Any, list[Tensor]] = {}
        for sample in taken:
            for _, parts in sample.sums:
                alike.setdefault((parts.shape, parts.dtype, parts.device), []).append(parts)
        misses = {key: iter(_miss(torch.stack(parts)).tolist()) for key, parts in alike.items()}
        for sample in taken:
            errors = sample.errors if sample.weights is None else [("weights", float(sample.weights))]
            errors += [(where, next(misses[parts.shape, parts.dtype, parts.device])) for where, parts in sample.sums]
            for where, error in errors:
                if error <= TOLERANCE[sample.dtype]:
                    continue
                if layer is not None:
                    check_finite(layer)
                # looked for where it matters: it may be a coarser one that computes
                dtype = self.coarsest(sample.block, sample.dtype)
                if not error <= TOLERANCE[dtype]:
                    raise ValueError(
                        _message(sample.block, where, error, TOLERANCE[dtype], dtype, self.explain(sample.block))
                    )


def _sums(layer: Layer, rows: Tensor, channels: Tensor) -> list[tuple[str, Tensor]]:
    """Per node its state and its parts, as (where, ``[1 + part, row, channel]``)."""
    flat = rows[:, None] * layer.resid_post.shape[1] + channels

    def at(part: Tensor) -> Tensor:
        return torch.take(part, flat).float()

    after, ffn = at(layer.resid_post if layer.resid_mid is None else layer.resid_mid), at(layer.ffn_out)
    parts = [after, at(layer.residual)]
    if layer.mixer_out is not None:
        parts.append(at(layer.mixer_out))
    if layer.mixed is not None:
        parts.append(_attention(layer, rows, channels))
    if layer.through is None:
        return [("attention", torch.stack([*parts, ffn]))]
    through = after if layer.through is layer.resid_mid else at(layer.through)
    return [("attention", torch.stack(parts)), ("ffn", torch.stack([at(layer.resid_post), through, ffn]))]


def _miss(parts: Tensor) -> Tensor:
    """Largest ‖Σ part_i − state_i‖ / (‖state_i‖ + Σ ‖part_i‖) over positions, of ``[layer, 1 + part, row, channel]`` ->
    ``[layer]``.

    Channels count in units of their size in the state, so that outliers hide nothing.
    """
    size = parts[:, 0].square().mean(1).sqrt()  # [layer, channel]
    size = torch.maximum(size, size.amax(1, keepdim=True) * SMALLEST).clamp_min(1e-30)[:, None]
    missing = torch.linalg.vector_norm((parts[:, 1:].sum(1) - parts[:, 0]) / size, dim=-1)
    sizes = torch.linalg.vector_norm(parts / size[:, None], dim=-1).sum(1)
    return (missing / sizes.clamp_min(1e-30)).amax(1)  # type: ignore[no-any-return]


def _attention(layer: Layer, rows: Tensor, channels: Tensor) -> Tensor:
    """What attention adds to the state ``[row, channel]``, from what the attention function returned."""
    block = layer.block
    mixed = layer.mixed.index_select(0, rows).float()  # type: ignore[union-attr]
    if layer.gate is not None:
        mixed = mixed * layer.gate[rows].flatten(1)
    if layer.in_scale is not None:
        mixed = mixed * layer.in_scale
    # a view where W_O views a linear layer
    weight = layer.output_weight().permute(2, 0, 1).reshape(layer.resid_post.shape[1], -1)
    added = mixed @ weight.index_select(0, channels.to(weight.device)).to(mixed.device).T
    scale = 1.0 if layer.row_scale is None else layer.row_scale[rows, None]
    bias = block.output_bias
    constant = 0 if bias is None else bias.to(mixed.device)[channels]
    added = (added + constant) * scale if block.post_norm is not None else added * scale + constant
    return added * layer.scale if layer.out_scale is None else added * (layer.out_scale[channels] * layer.scale)


def _native_errors(layer: Layer, places: _Places) -> list[tuple[str, float]] | None:
    """What :func:`weights_error` and :func:`_miss` say of a float32 layer on the CPU, in one call; None for others."""
    state, query, key, value, mixed, mask = (
        layer.resid_post,
        layer.query,
        layer.key,
        layer.value,
        layer.mixed,
        layer.mask,
    )
    if (
        state.dtype is not torch.float32
        or not state.is_cpu
        or mixed is None
        or query is None
        or key is None
        or value is None
    ):
        return None
    if layer.attention_function not in KNOWN or native.load()[0] is None:
        return None
    tokens, width = state.shape
    heads, _, d_qk = query.shape
    kv_heads, _, d_v = value.shape
    block, mid, through = layer.block, layer.resid_mid, layer.through
    a = native.Arguments(
        tokens=tokens,
        heads=heads,
        group=heads // kv_heads,
        d_v=d_v,
        d_model=width,
        d_qk=d_qk,
        kv_head=block.index % kv_heads,
        scale=layer.scaling,
        softcap=layer.softcap,
        window=layer.window,
        scale_out=layer.scale,
        smallest=SMALLEST,
        bias_is_scaled=block.post_norm is not None,
        n_rows=len(places.rows),
        n_channels=len(places.channels),
    )
    try:
        a.take_rows("query", query, (heads, tokens, d_qk), ("q_head", "q_row"), where="q")
        a.take_rows("key", key, (kv_heads, tokens, d_qk), ("k_head", "k_row"), where="k")
        a.take_rows("value", value, (kv_heads, tokens, d_v), ("v_head", "v_row"), where="v")
        a.take_rows("mixed", mixed, (tokens, heads * d_v), ("mixed_row",))
        weight = layer.output_weight().permute(2, 0, 1)
        if weight.stride()[1:] != (d_v, 1):
            weight, a["w_is_sampled"] = weight.index_select(0, places.channels.to(weight.device)), True
        a.take_rows(
            "the output projection",
            weight,
            (len(places.channels) if a.get("w_is_sampled") else width, heads, d_v),
            ("w_row",),
            where="w_o",
        )
        a.take("residual", layer.residual, tokens, width)
        a.take("ffn_out", layer.ffn_out, tokens, width)
        a.take("resid_post", state, tokens, width)
        a.take("resid_mid", mid, tokens, width)
        if through is mid and mid is not None:
            a["through"] = a["resid_mid"]
        else:
            a.take("through", through, tokens, width)
        a.take("rows", places.rows, len(places.rows), dtype=torch.int64)
        a.take("channels", places.channels, len(places.channels), dtype=torch.int64)
        a.take("bias", block.output_bias, width)
        if mask is not None:
            strides = ("mask_query",) if mask.dim() == 2 else ("mask_head", "mask_query")
            a.take_rows("mask", mask, (heads, tokens, tokens)[-mask.dim() :], strides)
        a.take("mixer_out", layer.mixer_out, tokens, width)
        a.take("sinks", layer.sinks, heads)
        a.take("gate", layer.gate, tokens, heads, d_v)
        a.take("in_scale", layer.in_scale, heads * d_v)
        a.take("row_scale", layer.row_scale, tokens)
        a.take("out_scale", layer.out_scale, width)
    except (TypeError, ValueError):  # another type, device or shape somewhere
        return None
    weights, attention, ffn = a.call("conservation")
    if weights > TOLERANCE[state.dtype]:
        kv = block.index % kv_heads
        weights = max(0.0, weights - float(_score_rounding(layer, places.rows, slice(kv, kv + 1))))
    return [("weights", weights), ("attention", attention), ("ffn", ffn)]


def recomputes(layer: Layer) -> bool:
    """Whether attention weights computed again from queries and keys are all those of the model, up to the rounding
    of their type.
    """
    return float(weights_error(layer, None)) <= TOLERANCE[layer.query.dtype]  # type: ignore[union-attr]


def weights_error(layer: Layer, rows: Tensor | None) -> Tensor:
    """Largest |Σ_j α_hij v_hj − z_ih| over some rows and the heads of one key-value head, relative to the largest
    value, less what the rounding of scores explains; rows None: over all.
    """
    if rows is not None:
        kv = layer.index % len(layer.key)  # type: ignore[arg-type]
        return _weights_error(layer, rows, slice(kv, kv + 1))
    tokens = layer.key.shape[1]  # type: ignore[union-attr]
    each = max(1, PATTERN_BYTES // (4 * len(layer.query) * tokens))  # type: ignore[arg-type]
    every = torch.arange(tokens, device=layer.key.device, dtype=torch.int64)  # type: ignore[union-attr]
    return torch.stack([_weights_error(layer, part, slice(None)) for part in every.split(each)]).amax()


def _weights_error(layer: Layer, rows: Tensor, of: slice) -> Tensor:
    every, key, value = layer.query, layer.key[of].float(), layer.value[of].float()  # type: ignore[index]
    group = len(every) // len(layer.key)  # type: ignore[arg-type]
    heads = slice(0, len(every)) if of.start is None else slice(of.start * group, of.stop * group)  # type: ignore[arg-type]
    query = every[heads, rows].float()  # type: ignore[index]
    n, tokens = len(rows), key.shape[1]
    scores = (query.reshape(len(key), -1, query.shape[-1]) @ key.mT).view(-1, n, tokens).mul_(layer.scaling)
    if layer.softcap:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if layer.mask is not None:
        scores = scores + (layer.mask[rows] if layer.mask.dim() == 2 else layer.mask[heads, rows]).float()
    else:
        age = rows[:, None] - torch.arange(tokens, device=rows.device, dtype=torch.int64)
        scores.masked_fill_((age < 0) | (age >= layer.window) if layer.window else age < 0, float("-inf"))
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks[heads].float()[:, None, None].expand(-1, n, 1)], -1)
    alpha = scores.softmax(-1)[..., :tokens]
    mixed = (alpha.reshape(len(value), -1, tokens) @ value).view(len(query), n, -1)
    given = layer.mixed[rows].float().view(n, len(every), -1)[:, heads].transpose(0, 1)  # type: ignore[index, arg-type]
    error = (mixed - given).abs().amax() / value.abs().amax().clamp_min(1e-30)
    return (error - _score_rounding(layer, rows, of)).clamp_min(0)


def _score_rounding(layer: Layer, rows: Tensor, of: slice) -> Tensor:
    """By how much sums of float32 in another order may change weights: 2⁻²³ of the largest |q||k| · scaling, which
    bounds the sizes of a score's terms. Some models (Qwen 2) have keys with biases so large that scores have few bits
    left.
    """
    group = len(layer.query) // len(layer.key)  # type: ignore[arg-type]
    heads = slice(0, None) if of.start is None else slice(of.start * group, of.stop * group)
    query, key = layer.query[heads, rows], layer.key[of]  # type: ignore[index]
    size = query.float().norm(dim=-1).amax() * key.float().norm(dim=-1).amax() * abs(layer.scaling)
    return (size * 2.0**-23).clamp_max(MOST_ROUNDING)  # type: ignore[no-any-return]


def check_finite(layer: Layer) -> None:
    """``ValueError`` naming the layer if an activation is NaN or infinite."""
    names = ("residual", "resid_mid", "ffn_out", "resid_post", "mixer_out", "value")
    tensors = [(name, tensor) for name in names if (tensor := getattr(layer, name)) is not None]
    if layer.residual.is_cuda:  # one wait for all
        sums = [tensor.sum(dtype=torch.float32) for _, tensor in tensors if tensor.device == layer.residual.device]
        if len(sums) == len(tensors) and math.isfinite(float(torch.stack(sums).sum())):
            return
    for name, tensor in tensors:
        if not math.isfinite(float(tensor.sum())) and not torch.isfinite(tensor).all():
            raise ValueError(
                f"layer {layer.index}: {name} holds NaN or infinite numbers; nothing can be said about "
                f"this forward pass"
            )


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most so many of ``count`` places, the first and the last among them."""
    if count <= most:
        return torch.arange(count, device=device, dtype=torch.int64)
    return torch.linspace(0, count - 1, most, device=device, dtype=torch.float64).round().long()


def _drawn(count: int, most: int, device: torch.device) -> Tensor:
    drawn = sorted(random.Random(0).sample(range(count), min(count, most)))
    return torch.tensor(drawn, device=device, dtype=torch.int64)


def _message(block: Any, where: str, error: float, allowed: float, dtype: torch.dtype, causes: list[str]) -> str:
    if not math.isfinite(error):
        return (
            f"layer {block.index}: its states hold NaN or infinite numbers; nothing can be said about this forward pass"
        )
    says = {
        "weights": "the attention weights that are recomputed are not those that the model used",
        "attention": "the captured parts miss the state after attention",
        "ffn": "the captured parts miss the residual state after the FFN",
        "entered": "the state that enters it is not the one that left the layer before",
    }[where]
    by = f" by {error:.1e} relative (allowed for {str(dtype).removeprefix('torch.')}: {allowed:.0e})" if allowed else ""
    why = (
        "; ".join(causes)
        if causes
        else (f"this model does something that the adapter of the {block.family.name} family does not know")
    )
    return f"layer {block.index}: {says}{by}, so its routes would be wrong: {why}"
