"""EAP-IG and MIB: the component-to-component scores of ``method="information-flow-routes"``, computed without their
broadcast.

There, every input of a component is compared in L1 with every earlier output at the same position: proximities
(equation 4) of the outputs to the input, divided by their sum, averaged over the unpadded positions. All heads of a
layer read one state, and its query, key and value inputs are that state, so one comparison per layer serves 3 × heads
inputs; the comparison itself is :func:`flowroutes_fast.ops.component_proximity`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowroutes_fast import ops
from flowroutes_fast.integrations import require

_original: list[Any] = []


def component_importances(outputs: Tensor, state: Tensor, lengths: Tensor) -> Tensor:
    """Importance of every earlier output for one state: mean over a text's tokens, summed over texts.

    Args:
        outputs: what the components before it add ``[batch, token, component, d_model]``.
        state: what is read ``[batch, token, d_model]``. lengths: tokens of each text ``[batch]``, padding on the right.

    Returns:
        ``[component]``; each text's importances sum to 1 (0 at tokens that no output is close to).

    Raises:
        ValueError: shapes that do not fit, a length outside 1 … token. TypeError: no floating point numbers.
    """
    if lengths.shape != state.shape[:1] or bool((lengths < 1).any()) or bool((lengths > state.shape[1]).any()):
        raise ValueError(
            f"lengths must be [batch] = {tuple(state.shape[:1])} numbers from 1 to {state.shape[1]}, got "
            f"{lengths.tolist()}"
        )
    proximities = ops.component_proximity(outputs, state)
    total = proximities.sum(-1, keepdim=True)
    share = torch.where(total > 0, proximities / total, 0)
    real = torch.arange(state.shape[1], device=state.device) < lengths[:, None]
    return torch.einsum("btf,bt->f", share, real / lengths[:, None].to(share.dtype))


def scores(model: Any, graph: Any, dataloader: Iterable[Any], quiet: bool = False) -> Tensor:
    """Drop-in for ``eap.attribute.get_scores_information_flow_routes``: same arguments, same ``[n_forward,
    n_backward]`` scores.

    It runs on the model's device (theirs asks for CUDA) and needs none of ``use_attn_result``, ``use_split_qkv_input``
    and ``use_hook_mlp_in`` (they are off while it runs): head outputs are made from ``hook_z`` and W_O, one layer at a
    time.

    Args:
        model: a TransformerLens ``HookedTransformer``. graph: an ``eap.graph.Graph`` of it.
        dataloader: batches ``(texts, anything, anything)``, or ``(tokens, lengths)`` where the texts are tokenised
            already.

    Raises:
        ImportError: texts, and EAP-IG is not installed. ValueError: no batch, or a graph of another model.
    """
    from tqdm.auto import tqdm

    cfg = model.cfg
    if graph.n_forward != 1 + cfg.n_layers * (cfg.n_heads + 1):
        raise ValueError(
            f"the graph has {graph.n_forward} sources, the model {1 + cfg.n_layers * (cfg.n_heads + 1)}: it is of "
            f"another model"
        )
    found = torch.zeros(graph.n_forward, graph.n_backward, device=cfg.device, dtype=torch.float32)
    texts = 0
    for batch in dataloader if quiet else tqdm(dataloader):
        tokens, mask, lengths = _tokenised(model, batch)
        texts += len(tokens)
        outputs = torch.zeros(*tokens.shape, graph.n_forward, cfg.d_model, device=cfg.device, dtype=cfg.dtype)
        hooks = model.hooks(fwd_hooks=list(_hooks(model, graph, outputs, lengths, found)))
        with torch.inference_mode(), _without_copies(cfg), hooks:
            model(tokens, attention_mask=mask, stop_at_layer=cfg.n_layers)  # no logits
    if not texts:
        raise ValueError("the dataloader gives no batch")
    return (found / texts).to(cfg.dtype)


@contextmanager
def _without_copies(cfg: Any) -> Iterator[None]:
    """EAP-IG's other methods need a copy of the residual stream per head input; this one does not, and they are
    what the pass would spend.
    """
    before = {name: getattr(cfg, name, None) for name in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")}
    for name in before:
        setattr(cfg, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(cfg, name, value)


def _tokenised(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(batch[0], Tensor):
        tokens, lengths = batch[0].to(model.cfg.device), torch.as_tensor(batch[1], device=model.cfg.device)
        return tokens, (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long(), lengths
    utils = require_eap("utils")
    tokens, mask, lengths, _ = utils.tokenize_plus(model, batch[0])
    return tokens, mask, lengths


def _hooks(model: Any, graph: Any, outputs: Tensor, lengths: Tensor, found: Tensor) -> Iterator[tuple[str, Any]]:
    heads, width, parallel = model.cfg.n_heads, model.cfg.n_heads + 1, bool(model.cfg.parallel_attn_mlp)

    def keep(index: int, activation: Tensor, hook: Any) -> None:
        outputs[:, :, index] = activation.detach()

    def keep_heads(index: int, w_o: Tensor, z: Tensor, hook: Any) -> None:
        for head in range(heads):
            torch.matmul(z[:, :, head].detach(), w_o[head], out=outputs[:, :, index + head])

    def read(before: int, where: slice, state: Tensor, hook: Any) -> None:
        found[:before, where] += component_importances(outputs[:, :, :before], state.detach(), lengths)[:, None]

    yield "hook_embed", partial(keep, 0)
    for layer in range(model.cfg.n_layers):
        first, into = 1 + layer * width, layer * (3 * heads + 1)
        yield f"blocks.{layer}.hook_resid_pre", partial(read, first, slice(into, into + 3 * heads))
        yield f"blocks.{layer}.attn.hook_z", partial(keep_heads, first, model.blocks[layer].attn.W_O)
        mlp = slice(into + 3 * heads, into + 3 * heads + 1)
        if parallel:
            yield f"blocks.{layer}.hook_resid_pre", partial(read, first, mlp)
        else:
            yield f"blocks.{layer}.hook_resid_mid", partial(read, first + heads, mlp)
        yield f"blocks.{layer}.hook_mlp_out", partial(keep, first + heads)
    last = found.shape[1] - 1
    yield f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", partial(read, graph.n_forward, slice(last, last + 1))


def require_eap(part: str) -> Any:
    """A module of EAP-IG, which is on no package index."""
    try:
        require("eap", "eap")
    except ImportError:
        advice = "pip install git+https://github.com/hannamw/EAP-IG"
        try:
            importlib.import_module("eap.attribute")  # a checkout on the path
        except ImportError as error:
            if (error.name or "eap").partition(".")[0] != "eap":
                raise ImportError(
                    f"EAP-IG (module eap) needs {error.name}, which cannot be imported: {error}"
                ) from error
            raise ImportError(f"EAP-IG (module eap) is not installed: {advice}") from error
    return importlib.import_module(f"eap.{part}")


def patch() -> None:
    """Let ``eap.attribute.attribute(..., method="information-flow-routes")`` call :func:`scores`."""
    module = require_eap("attribute")
    if not _original:
        _original.append(module.get_scores_information_flow_routes)
        module.get_scores_information_flow_routes = scores


def unpatch() -> None:
    """Undo :func:`patch`."""
    if _original:
        require_eap("attribute").get_scores_information_flow_routes = _original.pop()


@contextmanager
def patched() -> Iterator[None]:
    """:func:`patch` while this lasts; if it was patched before, it stays so afterwards."""
    before = bool(_original)
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()
