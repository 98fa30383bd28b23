"""Importances as an attribution method of inseq, ``"information_flow_routes"``. Importing this file registers it.

inseq asks for the states that predict the generated tokens: the token at position t is explained by the state of
position t - 1. One traced forward pass of the whole text serves all of them, without attention weights and without
eager attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.capture.hooks import unwrap
from flowroutes_fast.integrations import require
from flowroutes_fast.integrations.captum import token_matrix
from flowroutes_fast.models.families import blocks_of
from flowroutes_fast.results.trace import Trace
from flowroutes_fast.tracing.options import DEFAULT_FLOOR
from flowroutes_fast.tracing.trace import trace

METHOD = "information_flow_routes"
SCORES = ("sub-edges", "tokens")
# what model.attribute(...) takes for us
OPTIONS = ("score", "precision", "measure", "bias", "backend", "floor", "tolerance", "threads")
AT_LEAST, BELOW = "0.7", "0.8"
_registered: type | None = None


def register() -> type:
    """Make ``inseq.load_model(model, "information_flow_routes")`` work; returns the method's class.

    ``model.attribute(...)`` takes, besides its own arguments:

        score: ``"sub-edges"``: the importance of every head for every (source, target) pair, ``[source, target, layer,
        head]``, which inseq
            aggregates (by default the mean over heads and layers). ``"tokens"``: one score per source and target, what
            the source token supplies to the target's whole route (:meth:`Trace.token_attribution`); a target's scores
            sum to 1.
        precision: ``"exact"``, or ``"certified"`` (default with ``measure="signed"``), where sub-edges below ``floor``
        count as 0. measure, bias, backend, tolerance, threads: as for :func:`flowroutes_fast.trace`.

    Raises ``ImportError`` when inseq is missing or of another version. The method raises ``ValueError`` for an
    encoder-decoder model, a model of an unknown family, an unknown ``score``.
    """
    global _registered
    if _registered is not None:
        return _registered
    internals = require(
        "inseq.attr.feat.internals_attribution", "inseq", package="inseq", at_least=AT_LEAST, below=BELOW
    )
    data = require("inseq.data", "inseq", package="inseq", at_least=AT_LEAST, below=BELOW)
    attribution = require("inseq.data.attribution", "inseq", package="inseq", at_least=AT_LEAST, below=BELOW)

    class InformationFlowRoutes(internals.InternalsAttributionRegistry):  # type: ignore[name-defined, misc]
        """Importances of the sub-edges into the states that predict the generated tokens."""

        method_name = METHOD

        def __init__(self, attribution_model: Any, **options: Any) -> None:
            if attribution_model is not None:
                _check_model(attribution_model)
            super().__init__(attribution_model)
            self.use_predicted_target = False  # the same for whatever token follows
            self.is_final_step_method = True  # one pass over the text holds every step
            self.first = 1

        def get_attribution_args(self, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            mine = {name: given[name] for name in OPTIONS if name in given}
            _check_options(mine)
            return mine, {name: value for name, value in given.items() if name not in mine}

        def attribute(
            self, batch: Any, attributed_fn: Any, attr_pos_start: int | None = None, *rest: Any, **known: Any
        ) -> Any:
            self.first = 1 if attr_pos_start is None else max(1, attr_pos_start)
            return super().attribute(batch, attributed_fn, attr_pos_start, *rest, **known)

        def attribute_step(
            self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
        ) -> Any:
            options = dict(attribution_args or {})
            _check_options(options)
            ids, mask = (attribute_fn_main_args["additional_forward_args"][i] for i in (0, 3))
            model = self.attribution_model.model
            if options.pop("score", SCORES[0]) == "tokens":
                return data.CoarseFeatureAttributionStepOutput(
                    target_attributions=tokens(model, ids, mask, self.first - 1, **options)
                )
            scores = sub_edges(model, ids, mask, self.first - 1, **options)
            return attribution.MultiDimensionalFeatureAttributionStepOutput(
                target_attributions=scores, _num_dimensions=2
            )

    _registered = InformationFlowRoutes  # inseq finds methods among the living subclasses
    return _registered


def sub_edges(model: Any, ids: Tensor, mask: Tensor, first: int = 0, **options: Any) -> Tensor:
    """Importances ``[batch, key, query, layer, head]`` of ids ``[batch, token]``, padded on the left; queries
    before ``first`` may be 0.
    """
    options = {"precision": _precision(options)} | options
    options.setdefault("floor", 0.0 if options["precision"] == "exact" else DEFAULT_FLOOR)
    found = _traces(model, ids, mask, first, **options)
    batch, length = ids.shape
    # pages of other queries are never touched
    scores = torch.zeros(batch, length, length, found[0].n_layers, found[0].n_heads)
    for item, (one, start) in enumerate(zip(found, _starts(mask), strict=True)):
        place = scores[item, start:][:, start:]
        for layer in range(one.n_layers):
            if one.dense is not None:
                place[: len(one.tokens), : len(one.tokens), layer, : one.dense[layer].shape[0]] = one.dense[
                    layer
                ].permute(2, 1, 0)
                continue
            (query, key, head), importance = one.sparse[layer]  # type: ignore[index]
            named = head >= 0
            place[key[named].long(), query[named].long(), layer, head[named].long()] = importance[named]
    return scores


def tokens(model: Any, ids: Tensor, mask: Tensor, first: int = 0, **options: Any) -> Tensor:
    """What every token supplies to the states of the queries from ``first`` on: ``[batch, key, query]``, 0 for
    other queries.
    """
    found = _traces(model, ids, mask, 0, **({"precision": _precision(options)} | options))
    scores = torch.zeros(ids.shape[0], ids.shape[1], ids.shape[1])
    for item, (one, start) in enumerate(zip(found, _starts(mask), strict=True)):
        rows = range(max(0, first - start), len(one.tokens))
        scores[item, start : start + len(one.tokens), start + rows.start : start + rows.stop] = torch.from_numpy(
            token_matrix(one, rows)
        ).T.float()
    return scores


def _traces(model: Any, ids: Tensor, mask: Tensor, first: int, **options: Any) -> list[Trace]:
    """Every text traced in the queries from ``first`` on; all queries where that leaves some text whole."""
    if first > max(_starts(mask)):
        options["positions"] = range(first - ids.shape[1], 0)  # all texts end together
    return list(trace(model, None, ids.cpu(), attention_mask=mask.cpu(), **options))


def _precision(options: dict[str, Any]) -> str:
    return "certified" if options.get("measure") == "signed" else "exact"


def _starts(mask: Tensor) -> list[int]:
    """Where the text begins in every row."""
    return [int(row.nonzero()[0, 0]) for row in mask.cpu()]


def _check_options(options: dict[str, Any]) -> None:
    if unknown := [name for name in options if name not in OPTIONS]:
        raise ValueError(f"{METHOD} has no option {unknown[0]!r}: it takes {', '.join(OPTIONS)}")
    if (score := options.get("score", SCORES[0])) not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose one of {', '.join(map(repr, SCORES))}")


def _check_model(attribution_model: Any) -> None:
    name = type(attribution_model.model).__name__
    if attribution_model.is_encoder_decoder:
        raise ValueError(
            f"{METHOD} is for decoder-only models; {name} is an encoder-decoder, for which inseq has method='attention'"
        )
    blocks_of(unwrap(attribution_model.model))


register()
