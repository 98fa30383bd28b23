"""llm-transparency-tool with this engine underneath: :func:`patch` replaces its contribution and graph functions,
:func:`unpatch` restores them.

The numbers are the tool's own, its clip and counted future pairs included (parity; float sums differ by up to 3e-4),
but its graph is built without a tensor ``[query, key, head, d_model]`` and without reading edges off the device one by
one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.ops import reference

PACKAGE = "llm_transparency_tool"
METHODS = ("model_info", "tokens", "residual_in", "residual_after_attn", "residual_out", "ffn_out", "decomposed_attn")
CLIP = 1e-5  # the tool's lower limit of a proximity
SHIFT = 1e-6  # torch.nn.functional.pairwise_distance adds it to every component of a difference


def get_contributions(parts: Tensor, whole: Tensor, distance_norm: int = 1) -> Tensor:
    """Importance of ``parts [part.., case.., d]`` for ``whole [case.., d]`` -> ``[part.., case..]``; over the parts it
    sums to 1.

    Raises:
        TypeError: no floating point tensors. ValueError: shapes that do not fit, a norm that is not positive, NaN or
            infinity.
    """
    proximities = _proximities(parts, whole, distance_norm)
    return (proximities / proximities.sum(tuple(range(parts.dim() - whole.dim())), keepdim=True)).to(
        torch.result_type(parts, whole)
    )


def get_contributions_with_one_off_part(
    parts: Tensor, one_off: Tensor, whole: Tensor, distance_norm: int = 1
) -> tuple[Tensor, Tensor]:
    """The same with one more part ``one_off [case.., d]`` -> ``[part.., case..]`` and ``[case..]``."""
    proximities = _proximities(parts, whole, distance_norm)
    single = _proximities(_tensor("one_off", one_off)[None], whole, distance_norm)[0]
    total = proximities.sum(tuple(range(parts.dim() - whole.dim()))) + single
    dtype = torch.result_type(parts, whole)
    return (proximities / total).to(dtype), (single / total).to(dtype)


def get_attention_contributions(
    resid_pre: Tensor, resid_mid: Tensor, decomposed_attn: Tensor, distance_norm: int = 1
) -> tuple[Tensor, Tensor]:
    """Importance of every sub-edge and of the residual connection for the state after attention.

    Args:
        resid_pre, resid_mid: ``[batch, query, d_model]``.
        decomposed_attn: what each head adds from each source, ``[batch, query, key, head, d_model]``; it is read in
            place, not copied.

    Returns:
        ``[batch, query, key, head]`` and ``[batch, query]``, of the inputs' dtype.

    Raises:
        TypeError, ValueError: as :func:`get_contributions`.
    """
    for name, tensor, rank in (
        ("resid_pre", resid_pre, 3),
        ("resid_mid", resid_mid, 3),
        ("decomposed_attn", decomposed_attn, 5),
    ):
        _tensor(name, tensor, rank)
    if resid_pre.shape != resid_mid.shape:
        raise ValueError(
            f"resid_pre {tuple(resid_pre.shape)} and resid_mid {tuple(resid_mid.shape)} must have one shape"
        )
    if decomposed_attn.shape[:2] != resid_mid.shape[:2] or decomposed_attn.shape[-1] != resid_mid.shape[-1]:
        raise ValueError(
            f"decomposed_attn {tuple(decomposed_attn.shape)} must be [batch, query, key, head, d_model] for resid_mid "
            f"{tuple(resid_mid.shape)}"
        )
    _check_finite(decomposed_attn=decomposed_attn, resid_mid=resid_mid)
    proximities = _proximities_of_rows(
        decomposed_attn.detach().flatten(2, 3), resid_mid.detach(), distance_norm
    ).reshape(decomposed_attn.shape[:-1])
    single = _proximities(resid_pre[None], resid_mid, distance_norm)[0]
    total = proximities.sum((2, 3)) + single
    dtype = torch.result_type(decomposed_attn, resid_mid)
    return (proximities / total[:, :, None, None]).to(dtype), (single / total).to(dtype)


def get_mlp_contributions(
    resid_mid: Tensor, resid_post: Tensor, mlp_out: Tensor, distance_norm: int = 1
) -> tuple[Tensor, Tensor]:
    """Importance of the FFN and of the residual connection past it for ``resid_post``; all ``[batch, token,
    d_model]`` -> ``[batch, token]``.
    """
    for name, tensor in (("resid_mid", resid_mid), ("resid_post", resid_post), ("mlp_out", mlp_out)):
        _tensor(name, tensor, 3)
    ffn, residual = get_contributions_with_one_off_part(mlp_out[None], resid_mid, resid_post, distance_norm)
    return ffn[0], residual


def get_decomposed_mlp_contributions(
    resid_mid: Tensor, resid_post: Tensor, decomposed_mlp_out: Tensor, distance_norm: int = 1
) -> tuple[Tensor, float]:
    """Importance of every neuron at one position: ``decomposed_mlp_out [hidden, d_model]``, states ``[d_model]`` ->
    ``[hidden]`` and a number.
    """
    for name, tensor, rank in (
        ("resid_mid", resid_mid, 1),
        ("resid_post", resid_post, 1),
        ("decomposed_mlp_out", decomposed_mlp_out, 2),
    ):
        _tensor(name, tensor, rank)
    neurons, residual = get_contributions_with_one_off_part(decomposed_mlp_out, resid_mid, resid_post, distance_norm)
    return neurons, residual.item()


@torch.no_grad()
def apply_threshold_and_renormalize(
    threshold: float, c_blocks: Tensor, c_residual: Tensor, *, repair: bool = False
) -> tuple[Tensor, Tensor]:
    """Drop what is not above ``threshold`` and divide what is left by its sum.

    Args:
        c_blocks: ``[case.., block..]``. c_residual: ``[case..]``.
        repair: with one block a case (``c_blocks [case..]``, the FFN) divide by the case's own sum, as the method says;
            the tool takes the residual plus the sum of the blocks of all cases (``Tensor.sum(dim=())`` is the sum of
            everything).

    Returns:
        the same shapes. Where nothing is left, zeros (the tool divides 0 by 0 there).
    """
    if c_blocks.dim() < c_residual.dim() or c_blocks.shape[: c_residual.dim()] != c_residual.shape:
        raise ValueError(
            f"the shape of c_residual {tuple(c_residual.shape)} must begin that of c_blocks {tuple(c_blocks.shape)}"
        )
    c_blocks, c_residual = c_blocks * (c_blocks > threshold), c_residual * (c_residual > threshold)
    blocks = tuple(range(c_residual.dim(), c_blocks.dim()))
    total = c_residual + (c_blocks if repair and not blocks else c_blocks.sum(blocks))
    total = torch.where(total > 0, total, 1)
    return c_blocks / total.reshape(total.shape + (1,) * len(blocks)), c_residual / total


def _tensor(name: str, tensor: Any, rank: int | None = None) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating point torch.Tensor, got {kind}")
    if rank is not None and tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(tensor.shape)}")
    return tensor.detach()


def _proximities(parts: Tensor, whole: Tensor, norm: float) -> Tensor:
    """Clipped proximity of ``parts [part.., case.., d]`` to ``whole [case.., d]`` -> ``[part.., case..]``."""
    parts, whole = _tensor("parts", parts), _tensor("whole", whole)
    part_dims = parts.dim() - whole.dim()
    if part_dims < 1 or not whole.dim() or parts.shape[part_dims:] != whole.shape:
        raise ValueError(
            f"parts {tuple(parts.shape)} must be one or more part dimensions followed by those of whole "
            f"{tuple(whole.shape)}"
        )
    _check_finite(parts=parts, whole=whole)
    flat, states = parts.reshape(-1, math.prod(whole.shape[:-1]), whole.shape[-1]), whole.reshape(-1, whole.shape[-1])
    if len(flat) > len(states):  # one case at a time: the kernel wants a case's parts in one block of memory
        proximities = torch.cat(
            [_proximities_of_rows(flat[None, :, case], states[case, None], norm) for case in range(len(states))]
        ).T
    else:
        proximities = torch.cat([_proximities_of_rows(part[:, None], states, norm) for part in flat], -1).T
    return proximities.reshape(parts.shape[:-1])


def _proximities_of_rows(parts: Tensor, whole: Tensor, norm: float) -> Tensor:
    """Clipped proximity of ``parts [case.., part, d]`` to ``whole [case.., d]`` -> ``[case.., part]``."""
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not norm > 0:
        raise ValueError(f"distance_norm must be a positive number, got {norm!r}")
    dtype = torch.promote_types(torch.float32, torch.result_type(parts, whole))
    if dtype == torch.float64:
        parts = parts.to(dtype)
    state, gain = _shifted(whole.to(dtype), norm)
    if norm == 1:
        proximities = torch.ops.flowroutes.component_proximity(parts, state, "auto")
    else:
        proximities = torch.stack([reference.proximity(part.to(dtype), state, norm) for part in parts.unbind(-2)], -1)
    return torch.where(proximities > 0, proximities + gain[..., None], 0).clamp_min(CLIP)


def _shifted(whole: Tensor, norm: float = 1) -> tuple[Tensor, Tensor]:
    """The state y' = y − 1e-6, whose ‖z − y'‖ is the tool's distance, and ‖y‖ − ‖y'‖, to be added to a proximity to
    y'.
    """
    state = whole - SHIFT
    if norm == 1:
        return state, (whole.abs() - state.abs()).sum(-1)
    length = torch.linalg.vector_norm
    return state, length(whole, norm, dim=-1) - length(state, norm, dim=-1)


def _check_finite(where: str = "", **named: Tensor) -> None:
    for name, tensor in named.items():
        if not math.isfinite(float(tensor.sum())) and not torch.isfinite(tensor).all():
            raise ValueError(f"{where}{name} holds NaN or infinite numbers")


def build_full_graph(
    model: Any, batch_i: int = 0, renormalizing_threshold: float | None = None, *, repair: bool = False
) -> Any:
    """The tool's graph of all layers and tokens of one text, from a model that has run.

    Args:
        model: a ``TransparentLlm``. The tool's own, over TransformerLens, is read through its cache; any other through
            ``decomposed_attn``, a layer at a time.
        batch_i: which text of the batch. renormalizing_threshold: in [0, 1): drop sub-edges and residual edges not
            above it and renormalise.
        repair: see :func:`apply_threshold_and_renormalize`.

    Returns:
        ``networkx.DiGraph`` with nodes ``X0_{token}``, ``A{layer}_{token}``, ``M{layer}_{token}``, ``I{layer}_{token}``
        and edges of every token to every token, summed over heads, ``weight`` a float. Where nothing is above the
        threshold weights are 0 (the tool: NaN).

    Raises:
        TypeError: not a ``TransparentLlm``. ValueError: a text or threshold out of range, NaN (the layer is named), a
            parallel block.
        RuntimeError: (the model's own) it has not run yet.
    """
    if missing := [name for name in METHODS if not hasattr(model, name)]:
        raise TypeError(
            f"a {PACKAGE} TransparentLlm is needed, got {type(model).__name__} without {', '.join(missing)}"
        )
    threshold = renormalizing_threshold
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"renormalizing_threshold must be in [0, 1), got {threshold}")
    tokens = model.tokens()
    if not 0 <= batch_i < len(tokens):
        raise ValueError(f"batch_i must be in [0, {len(tokens)}), got {batch_i}")
    n_layers, n_tokens = model.model_info().n_layers, len(tokens[batch_i])
    hooked = _hooked(model)
    graph = _nodes(n_layers, n_tokens)
    for layer in range(n_layers):
        _add_layer(graph, layer, *_layer_weights(model, hooked, batch_i, layer, threshold, repair))
    return graph


def build_paths_to_predictions(
    graph: Any, n_layers: int, n_tokens: int, starting_tokens: Iterable[int], threshold: float
) -> list[Any]:
    """For each starting token the part of the graph that leads to its last state over edges whose weight is above
    ``threshold``.

    Returns:
        a graph of the same class per starting token, its edges directed as in ``graph``; without nodes where no edge is
        above the threshold.

    Raises:
        TypeError: an undirected graph. ValueError: a token out of range, a last state that the graph does not have.
    """
    if not graph.is_directed():
        raise TypeError("the graph must be directed, as build_full_graph returns it")
    above: dict[str, list] = {}  # of a node: its incoming edges above the threshold; shared by the starting tokens
    found = []
    for start in starting_tokens:
        root = f"I{n_layers - 1}_{start}"
        if not 0 <= start < n_tokens:
            raise ValueError(f"a starting token must be in [0, {n_tokens}), got {start}")
        if root not in graph:
            raise ValueError(f"the graph has no node {root}: n_layers={n_layers} does not fit it")
        edges, seen, waiting = [], {root}, [root]
        while waiting:
            node = waiting.pop()
            if node not in above:
                above[node] = [
                    (source, data) for source, data in graph.pred[node].items() if data["weight"] > threshold
                ]
            for source, data in above[node]:
                edges.append((source, node, dict(data)))
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
        route = graph.__class__()
        route.graph.update(graph.graph)
        if edges:
            route.add_nodes_from((node, dict(graph.nodes[node])) for node in seen)
            route.add_edges_from(edges)
        found.append(route)
    return found


def _hooked(model: Any) -> Any | None:
    """The TransformerLens model underneath, if the tool's own class computes what its heads add; None: ask
    ``decomposed_attn``.
    """
    defined = getattr(type(model).decomposed_attn, "__module__", None)
    run = getattr(model, "_last_run", None)
    if defined != f"{PACKAGE}.models.tlens_model" or not hasattr(run, "cache"):
        return None
    hooked = model._model  # a property that looks the model up: once a graph
    if getattr(hooked.cfg, "use_normalization_before_and_after", False):
        warnings.warn(
            "this model normalises what attention adds, which llm-transparency-tool leaves out: the graph has its "
            "numbers; "
            "flowroutes_fast.trace takes the norm into account",
            RuntimeWarning,
            stacklevel=3,
        )
    return hooked


@torch.no_grad()
def _layer_weights(
    model: Any, hooked: Any | None, batch_i: int, layer: int, threshold: float | None, repair: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[source, target]`` into the states after attention (the residual included), ``[token]`` of the FFN
    and past it.
    """
    try:
        pre, mid, post, ffn = (
            getattr(model, name)(layer)[batch_i].detach()
            for name in ("residual_in", "residual_after_attn", "residual_out", "ffn_out")
        )
    except KeyError as error:
        raise ValueError(
            f"layer {layer}: the model keeps no {error} (its attention and FFN may be parallel): use "
            f"flowroutes_fast.trace"
        ) from error
    where = f"layer {layer}: "
    _check_finite(where, residual_in=pre, residual_after_attn=mid, residual_out=post, ffn_out=ffn)
    dtype = torch.promote_types(torch.float32, mid.dtype)
    with torch.autocast(mid.device.type, enabled=False):
        proximities = _sub_edges(model, hooked, batch_i, layer, mid.to(dtype))
        residual = _proximities_of_rows(pre[:, None], mid, 1)
        total = proximities.sum((1, 2))[:, None] + residual
        attention, past_attention = proximities / total[..., None], (residual / total)[:, 0]
        both = torch.cat([_proximities_of_rows(ffn[:, None], post, 1), _proximities_of_rows(mid[:, None], post, 1)], 1)
        ffn_share, past_ffn = (both / both.sum(1, keepdim=True)).unbind(1)
        if threshold is not None:
            attention, past_attention = apply_threshold_and_renormalize(threshold, attention, past_attention)
            ffn_share, past_ffn = apply_threshold_and_renormalize(threshold, ffn_share, past_ffn, repair=repair)
    weights = attention.sum(2).double().T.contiguous()
    weights.diagonal().add_(past_attention)  # the tool has one edge for a token's attention to itself and its residual
    return weights, ffn_share, past_ffn


def _sub_edges(model: Any, hooked: Any | None, batch_i: int, layer: int, mid: Tensor) -> Tensor:
    """Clipped proximity of all sub-edges ``[query, key, head]``."""
    if hooked is None:
        parts = model.decomposed_attn(batch_i, layer).detach()  # [query, key, head, d_model]
        _check_finite(f"layer {layer}: ", decomposed_attn=parts)
        return _proximities_of_rows(parts.flatten(1, 2), mid, 1).reshape(parts.shape[:-1])
    cache, attn = model._last_run.cache, hooked.blocks[layer].attn
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][batch_i]  # [head, query, key]
    value, bias = cache[f"blocks.{layer}.attn.hook_v"][batch_i], attn.b_V  # [key, kv_head, d_head], [head, d_head]
    # as the tool does; b_V is 0 where it was folded
    value = value.repeat_interleave(bias.shape[-2] // value.shape[-2], 1) + bias
    pattern, value, w_o = (t.detach().to(mid.device, mid.dtype) for t in (pattern, value, attn.W_O))
    _check_finite(f"layer {layer}: ", hook_pattern=pattern, hook_v=value)
    state, gain = _shifted(mid)
    proximities = torch.ops.flowroutes.attention_proximity(pattern, value.transpose(0, 1), w_o, state, "auto")
    known = (proximities > 0) | (pattern == 0)  # else the part is further than none; a masked pair is a part of zeros
    return torch.where(known, proximities + gain[:, None], 0).clamp_min(CLIP).permute(1, 2, 0)


def _nodes(n_layers: int, n_tokens: int) -> Any:
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(
        f"{kind}{layer}_{token}" for layer in range(n_layers) for token in range(n_tokens) for kind in "AIM"
    )
    graph.add_nodes_from(f"X0_{token}" for token in range(n_tokens))
    return graph


def _add_layer(graph: Any, layer: int, attention: Tensor, ffn: Tensor, past_ffn: Tensor) -> None:
    tokens = range(len(ffn))
    before, after, block, out = (
        [f"{kind}_{t}" for t in tokens] for kind in (_before(layer), f"A{layer}", f"M{layer}", f"I{layer}")
    )
    for source, row in zip(before, attention.tolist(), strict=True):
        graph.add_weighted_edges_from((source, target, weight) for target, weight in zip(after, row, strict=True))
    for t, share, past in zip(tokens, ffn.tolist(), past_ffn.tolist(), strict=True):
        graph.add_weighted_edges_from(
            ((after[t], block[t], share), (block[t], out[t], share), (after[t], out[t], past))
        )


def _before(layer: int) -> str:
    return f"I{layer - 1}" if layer else "X0"


SEAMS: dict[str, tuple[Callable, ...]] = {
    "routes.contributions": (
        get_contributions,
        get_contributions_with_one_off_part,
        get_attention_contributions,
        get_mlp_contributions,
        get_decomposed_mlp_contributions,
        apply_threshold_and_renormalize,
    ),
    "routes.graph": (build_full_graph, build_paths_to_predictions),
}
_stand_ins: dict[Callable, Callable] = {}  # what was put in a place -> what was there
_repair = False


def patch(*, repair: bool = False) -> None:
    """Put this engine's functions in the place of the tool's, wherever they have been imported by name. A second call
    changes nothing.

    Args:
        repair: see :func:`apply_threshold_and_renormalize`; False returns the tool's own numbers. A second call may
            choose again.

    Raises:
        ImportError: the tool is not installed, or has no such functions.
    """
    global _repair
    replace: dict[Callable, Callable] = {}
    for name, functions in SEAMS.items():
        module = _module(name)
        for ours in functions:
            theirs = getattr(module, ours.__name__, None)
            if theirs is None:
                raise ImportError(f"this {PACKAGE} has no {name}.{ours.__name__}: version 0.1 is supported")
            if theirs not in _stand_ins:
                replace[theirs] = _stand_in(ours, theirs)
    _repair = repair
    _stand_ins.update({new: old for old, new in replace.items()})
    _swap(replace)


def unpatch() -> None:
    """Restore the tool's functions everywhere, also where they were imported by name after :func:`patch`."""
    _swap(_stand_ins)
    _stand_ins.clear()


@contextmanager
def patched(*, repair: bool = False) -> Iterator[None]:
    """:func:`patch` for the length of a ``with`` block; if it was patched before, it stays so afterwards."""
    before, repair_before = bool(_stand_ins), _repair
    patch(repair=repair)
    try:
        yield
    finally:
        if before:
            patch(repair=repair_before)
        else:
            unpatch()


def _module(name: str) -> ModuleType:
    try:
        found = PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None
    except ValueError:  # a module put into sys.modules without a spec
        found = True
    if not found:
        raise ImportError(
            f"{PACKAGE} is not installed: it is on no package index; clone "
            f"https://github.com/facebookresearch/llm-transparency-tool "
            "and put the checkout on PYTHONPATH"
        )
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(PACKAGE):
            raise ImportError(f"this {PACKAGE} has no {name}: version 0.1 is supported") from None
        raise ImportError(
            f"{PACKAGE}.{name} needs {error.name}, which is not installed: pip install {error.name}"
        ) from None


def _stand_in(ours: Callable, theirs: Callable) -> Callable:
    """A function of its own, so that restoring it never touches ``ours``; name, module and signature are those of
    ``theirs``.
    """

    chooses = ours in (apply_threshold_and_renormalize, build_full_graph)

    @functools.wraps(theirs)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, repair=_repair, **kwargs) if chooses else ours(*args, **kwargs)

    return stand_in


def _swap(replace: dict[Callable, Callable]) -> None:
    """Replace functions by others in the names of all imported modules."""
    by_id = {id(old): new for old, new in replace.items()}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if type(names) is dict:
            for name, held in [item for item in names.items() if id(item[1]) in by_id]:
                names[name] = by_id[id(held)]
