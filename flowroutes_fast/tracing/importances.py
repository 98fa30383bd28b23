"""Importances of one captured layer: every part of the state after attention, and of the state after the FFN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flowroutes_fast.capture.conservation import check_finite
from flowroutes_fast.capture.hooks import Layer
from flowroutes_fast.ops import native, reference
from flowroutes_fast.ops.attention import Attention
from flowroutes_fast.ops.backends import interpreted
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.ops.intervals import Counts
from flowroutes_fast.ops.neurons import NeuronImportances, neuron_importances
from flowroutes_fast.system.ambient import unrounded
from flowroutes_fast.tracing.options import Options

FEW_KEYS = 256


@dataclass
class LayerImportances:
    """Importances of one layer, float32 on the CPU. In a parallel block there is one node and ``ffn_residual`` is NaN.

    Point estimates divide by the middle of the normaliser's bounds ``low``, ``high`` ``[query]``; a head of -1 among
    the edges stands for a pair's other heads, which together have between nothing and the importance it gives.
    """

    shape: str
    dense: Tensor | None  # [head, query, key]
    edges: tuple[Tensor, Tensor]  # index [3, n] (query, key, head; int32) and importance [n]
    low: Tensor  # [query]
    high: Tensor  # [query]
    heads: Tensor  # [query, head]
    heads_low: Tensor  # [query, head]
    heads_high: Tensor  # [query, head]
    attention_residual: Tensor  # [query]
    bias: Tensor  # [query]
    mixer: Tensor  # [query]
    ffn: Tensor  # [query]
    ffn_residual: Tensor  # [query]
    counts: Counts
    neurons: NeuronImportances | None = None


@dataclass
class Parts:
    """The decomposition of one node: sub-edges from (query, key, value, W_O), the residual, and constant parts or
    None.
    """

    # [kv_head, key, d_head], float32 if a bias was taken out, else as the model has it; None without attention
    value: Tensor | None
    w_o: Tensor | None  # [head, d_head, d_model] float32, norms' gains and multipliers included
    whole: Tensor  # [token, d_model] float32
    residual: Tensor  # [token, d_model] float32
    constant: Tensor | None  # [d_model], or [token, d_model] behind a norm; float32
    mixer: Tensor | None = None  # [token, d_model] float32


def parts_of(layer: Layer, bias: str = "part") -> Parts:
    """Split the state after attention (parallel block: after the block) into its parts.

    ``bias="part"`` takes b_V out of the values and b_O + Σ_h b_V[h] W_O[h] as one part without a source token
    (attention rows sum to 1); ``"value"`` leaves b_V inside each sub-edge, b_O stays a part; ``"exclude"`` drops the
    constant part. With attention sinks (rows sum to less than 1) or an output gate (the bias differs by position), b_V
    stays inside the sub-edges.
    """
    block = layer.block
    whole = (layer.resid_post if layer.resid_mid is None else layer.resid_mid).float()
    mixer = None if layer.mixer_out is None else layer.mixer_out.float()
    if layer.query is None or layer.value is None:
        return Parts(None, None, whole, layer.residual.float(), None, mixer)
    w_o = layer.output_weight().to(whole.device)
    if layer.in_scale is not None:
        w_o = w_o * layer.in_scale.view(w_o.shape[0], -1, 1)
    value = layer.value
    value_bias = block.value_bias() if bias != "value" and layer.sinks is None and layer.gate is None else None
    constant = None
    if value_bias is not None:
        value_bias = value_bias.to(value.device)
        value = value.float() - value_bias[:, None]
        per_head = value_bias.repeat_interleave(w_o.shape[0] // value.shape[0], 0)
        constant = unrounded(partial(torch.einsum, "hd,hdm->m"), per_head, w_o)
        if layer.in_scale is not None and layer.row_scale is not None and block.post_norm is None:
            constant = constant * layer.row_scale[:, None]
    output_bias = block.output_bias
    if output_bias is not None:
        constant = output_bias.to(whole.device) + (0 if constant is None else constant)
    factor: Tensor | float = layer.scale if layer.out_scale is None else layer.out_scale * layer.scale
    if layer.out_scale is not None or layer.scale != 1:
        w_o = w_o * factor
        if constant is not None:
            constant = constant * factor
            if block.post_norm is not None and layer.row_scale is not None:
                constant = constant * layer.row_scale[:, None]
    return Parts(value, w_o, whole, layer.residual.float(), None if bias == "exclude" else constant, mixer)


def importances(layer: Layer, options: Options, exact_rows: Tensor | None = None) -> LayerImportances:
    """Importances of one layer (equation 5). ``ValueError`` naming the layer if an activation is NaN or infinite.

    ``exact_rows [query]`` (bool): rows to evaluate whole, whatever the tolerance.
    """
    check_finite(layer)
    # a layer that was offloaded
    if layer.residual.device.type == "cpu" and options.backend in ("triton", "cuda") and not interpreted():
        options = replace(options, backend="cpu" if native.load()[0] is not None else "reference")
    parts = parts_of(layer, options.bias)
    share = _signed_shares if options.measure == "signed" else _proximities
    residual, constant, mixer, ffn, through = share(layer, parts, options)
    parallel = layer.resid_mid is None
    others = torch.stack([residual, constant, mixer, ffn] if parallel else [residual, constant, mixer])
    attention = attention_of(layer, parts, options.backend)
    if attention is None:
        found = _without_attention(others, options)
    else:
        found = (_exact if options.precision == "exact" else _certified)(attention, others, options, exact_rows)
    middle = torch.ones_like(residual) if options.measure == "signed" else found.low + (found.high - found.low) / 2
    ffn_share, ffn_residual = _divide(ffn, middle), torch.full_like(ffn, float("nan"))
    if not parallel:
        total = middle if options.measure == "signed" else ffn + through
        ffn_share, ffn_residual = _divide(ffn, total), _divide(through, total)
    if options.neurons:
        found.neurons = _neurons(layer, through, found.low - ffn if parallel else None, found.high - found.low, options)
    found.attention_residual, found.bias, found.mixer = (
        _divide(residual, middle),
        _divide(constant, middle),
        _divide(mixer, middle),
    )
    found.ffn, found.ffn_residual, found.shape = ffn_share, ffn_residual, layer.block.shape
    for names in (
        ("low", "high", "attention_residual", "bias", "mixer", "ffn", "ffn_residual"),
        ("heads", "heads_low", "heads_high"),
    ):
        for name, tensor in zip(names, _to_cpu([getattr(found, name) for name in names]), strict=True):
            setattr(found, name, tensor)
    found.edges = (found.edges[0].cpu(), found.edges[1].to("cpu", torch.float32))
    return found


def _to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """In float32, all with one wait for the device."""
    if tensors[0].device.type == "cpu":
        return [t.to(torch.float32) for t in tensors]
    return list(torch.stack([t.to(torch.float32) for t in tensors]).cpu())


def attention_of(layer: Layer, parts: Parts, backend: str) -> Attention | None:
    """A layer's sub-edges for the kernels; None where there are none."""
    if layer.query is None or layer.key is None or parts.value is None or parts.w_o is None:
        return None
    w_o, whole = parts.w_o, parts.whole
    if backend in ("triton", "cuda"):
        if _stored_as_it_is(layer):
            w_o = w_o.to(layer.query.dtype)
        whole = layer.resid_post if layer.resid_mid is None else layer.resid_mid  # in the model's type: half the bytes
    attention = Attention(
        layer.query,
        layer.key,
        parts.value,
        w_o,
        whole,
        layer.scaling,
        layer.mask,
        layer.sinks,
        layer.softcap,
        layer.window,
        layer.row_scale,
        layer.gate,
        layer.positions,
    )
    return attention if backend == "cpu" else attention.masked()


def _stored_as_it_is(layer: Layer) -> bool:
    """W_O is the stored weight in the attention's own 16 bits: no gain, multiplier, adapter or quantised format
    that would be rounded.
    """
    weight = getattr(layer.block.output, "weight", None)
    plain = (
        layer.in_scale is None
        and layer.out_scale is None
        and layer.scale == 1
        and type(layer.block.output).__name__ in ("Linear", "Conv1D")
    )
    return (
        plain
        and isinstance(weight, Tensor)
        and weight.dtype == layer.query.dtype  # type: ignore[union-attr]
        and weight.dtype in (torch.bfloat16, torch.float16)
    )


def _without_attention(others: Tensor, options: Options) -> LayerImportances:
    total = others.sum(0)
    nothing = total.new_zeros(len(total), 0)
    dense = nothing.new_zeros(0, len(total), len(total), device="cpu") if options.dense else None
    edges = (torch.zeros(3, 0, dtype=torch.int32), torch.zeros(0))
    return _unfinished(dense, edges, total, total, nothing, nothing, nothing, Counts())


def _neurons(
    layer: Layer, through: Tensor, parallel_rest: Tensor | None, width: Tensor, options: Options
) -> NeuronImportances:
    """Neurons as parts of the state after the FFN, in the FFN's place; a parallel block's other parts are known as
    an interval.
    """
    post, bias = layer.resid_post.float(), layer.block.down_bias
    rows = layer.neuron_rows if layer.neuron_rows is not None else torch.ones(len(post), device=post.device)
    w_down = layer.block.w_down().to(post.device)
    if layer.neuron_gain is not None:
        w_down, bias = w_down * layer.neuron_gain, None if bias is None else bias * layer.neuron_gain
    others = through if parallel_rest is None else parallel_rest
    constant = torch.zeros_like(post) if bias is None else bias.to(post.device) * rows[:, None]
    if options.measure == "proximity":
        others = others + reference.proximity(constant, post)
    tolerance = 0.0 if options.precision == "exact" else options.tolerance
    activation = layer.neurons.float() * rows[:, None]  # type: ignore[union-attr]
    if _relative(activation[-1] @ w_down + constant[-1], layer.ffn_out[-1].float()) > 0.05:
        raise ValueError(
            f"layer {layer.index}: the neurons of this {layer.block.family.name} FFN do not add up to what it adds to "
            f"the state"
        )
    found = neuron_importances(
        activation,
        w_down,
        post,
        others,
        floor=options.floor,
        tolerance=tolerance,
        measure=options.measure,
        backend=options.backend,
        threads=options.threads,
    )
    if parallel_rest is not None and options.measure == "proximity":
        before, found.high = found.low + (found.high - found.low) / 2, found.high + width
        found.importance = (
            found.importance * (before / (found.low + (found.high - found.low) / 2))[found.index[0].long()]
        )
    return NeuronImportances(*(t.cpu() for t in (found.index, found.importance, found.low, found.high)))


def _proximities(layer: Layer, parts: Parts, options: Options) -> tuple[Tensor, ...]:
    """Proximities of the residual, the constant part, the mixer, the FFN and (sequential block) the residual past
    it, ``[token]`` each.
    """
    proximity = torch.ops.flowroutes.part_proximity
    backend, threads, post = options.backend, options.threads, layer.resid_post.float()
    zero = parts.whole.new_zeros(len(parts.whole))

    def of(part: Tensor | None, whole: Tensor) -> Tensor:
        return zero if part is None else proximity(torch.atleast_2d(part.float()), whole, backend, threads)

    ffn, through = of(layer.ffn_out, post), of(layer.through, post)
    return of(parts.residual, parts.whole), of(parts.constant, parts.whole), of(parts.mixer, parts.whole), ffn, through


def _signed_shares(layer: Layer, parts: Parts, options: Options) -> tuple[Tensor, ...]:
    """The same parts' signed flow ⟨sign(y), z⟩ / ‖y‖₁."""
    post = layer.resid_post.float()
    zero = parts.whole.new_zeros(len(parts.whole))

    def of(part: Tensor | None, whole: Tensor) -> Tensor:
        return zero if part is None else reference.signed_share(torch.atleast_2d(part.float()), whole)

    ffn, through = of(layer.ffn_out, post), of(layer.through, post)
    return of(parts.residual, parts.whole), of(parts.constant, parts.whole), of(parts.mixer, parts.whole), ffn, through


def _exact(a: Attention, others: Tensor, options: Options, exact_rows: Tensor | None) -> LayerImportances:
    if options.measure == "signed":
        raise ValueError("measure='signed' is exact in precision='certified'; there is no other")
    if a.row_scale is not None or a.gate is not None or a.n_query < a.n_key:
        return _exact_in_rows(a, others, options)
    dense, heads, normaliser, index, edge = torch.ops.flowroutes.attention_layer(
        a.query.float(),
        a.key.float(),
        a.value.float(),
        a.w_o.float(),
        a.whole.float(),
        others.sum(0),
        a.mask,
        a.sinks,
        a.scaling,
        a.softcap,
        a.window,
        options.dense,
        -1.0 if options.dense else options.floor,
        options.backend,
        options.threads,
    )
    return _unfinished(
        dense.cpu() if options.dense else None, (index, edge), normaliser, normaliser, heads, heads, heads, Counts()
    )


def _exact_in_rows(a: Attention, others: Tensor, options: Options) -> LayerImportances:
    """Every sub-edge evaluated by the certified kernels, which know norms and gates behind the heads."""
    found = certified(
        a,
        others,
        floor=0.0 if options.dense else options.floor,
        tolerance=0.0,
        backend=options.backend,
        threads=options.threads,
    )
    query, key, head = found.index.long()
    edge, heads = _divide(found.value, found.low[query]), _divide(found.head_low, found.low[:, None])
    dense = None
    if options.dense:
        dense = torch.zeros(a.n_head, a.n_query, a.n_key)
        dense[head.cpu(), query.cpu(), key.cpu()] = edge.to("cpu", torch.float32)
    return _unfinished(dense, (found.index, edge), found.low, found.low, heads, heads, heads, found.counts)


def cheaper_exactly(a: Attention) -> bool:
    """Few keys: evaluating every sub-edge from all of u = v W_O costs less than bounding all and reading single
    channels of W_O for some.
    """
    return a.row_scale is None and a.gate is None and a.n_key <= FEW_KEYS


def _certified(a: Attention, others: Tensor, options: Options, exact_rows: Tensor | None) -> LayerImportances:
    if options.backend == "cpu" and options.measure == "proximity" and cheaper_exactly(a):
        whole = _exact(a, others, replace(options, dense=False), None)
        whole.counts.bounded = whole.counts.evaluated = a.n_head * a.n_query * (2 * a.n_key - a.n_query + 1) // 2
        return whole
    tolerance: float | Tensor = options.tolerance
    if exact_rows is not None:
        tolerance = torch.where(exact_rows.to(others.device), 0.0, options.tolerance)
    found = certified(
        a,
        others,
        floor=options.floor,
        thresholds=options.thresholds,
        tolerance=tolerance,
        measure=options.measure,
        backend=options.backend,
        threads=options.threads,
    )
    if options.measure == "signed":
        shares = found.head_low
        return _unfinished(
            None, (found.index, found.value), found.low, found.high, shares, shares, shares, found.counts
        )
    low, high = found.low[:, None], found.high[:, None]
    middle = found.low + (found.high - found.low) / 2
    heads = _divide((found.head_low + found.head_high) / 2, middle[:, None])
    heads_low = _divide(found.head_low, found.head_low + (high - found.head_high).clamp_min(0))
    heads_high = _divide(found.head_high, found.head_high + (low - found.head_low).clamp_min(0))
    edge = _divide(found.value, middle[found.index[0].long()])
    return _unfinished(None, (found.index, edge), found.low, found.high, heads, heads_low, heads_high, found.counts)


def _unfinished(dense, edges, low, high, heads, heads_low, heads_high, counts) -> LayerImportances:  # type: ignore[no-untyped-def]
    """The attention part of a layer's importances; the rest is filled in by :func:`importances`."""
    empty = low.new_empty(0)
    return LayerImportances(
        "", dense, edges, low, high, heads, heads_low, heads_high, empty, empty, empty, empty, empty, counts
    )


def _divide(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total, 0)


def conservation_error(layer: Layer, bias: str = "part") -> float:
    """Largest |Σ parts − state| over both nodes of a layer, relative to the state's largest magnitude."""
    if bias == "exclude":
        raise ValueError("the parts do not add up when the bias part is excluded")
    parts = parts_of(layer, bias)
    total = parts.residual
    if (a := attention_of(layer, parts, "reference")) is not None:
        a = a.float()
        mixed = a.pattern @ a.value.repeat_interleave(a.n_head // a.value.shape[0], 0)  # [head, query, d_head]
        if a.gate is not None:
            mixed = mixed * a.gate.transpose(0, 1)
        # a view where W_O views a linear layer; einsum would copy it
        flat = a.w_o.permute(2, 0, 1).reshape(a.w_o.shape[2], -1)
        added = mixed.transpose(0, 1).reshape(mixed.shape[1], -1) @ flat.T
        total = total + (added if a.row_scale is None else added * a.row_scale[:, None])
    for part in (parts.constant, parts.mixer):
        if part is not None:
            total = total + part
    post = layer.resid_post.float()
    if layer.through is None:
        return _relative(total + layer.ffn_out.float(), post)
    return max(_relative(total, parts.whole), _relative(layer.through.float() + layer.ffn_out.float(), post))


def _relative(found: Tensor, state: Tensor) -> float:
    return float((found - state).abs().max() / state.abs().max().clamp_min(1e-30))
