"""How faithful is a route? The model is run on its sub-edges alone, beside random and top-attention ones of the
same number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from flowroutes_fast.capture.hooks import Layer, capture, unwrap
from flowroutes_fast.experiments.ablation import Clean, clean, kept_logits, mask_gradient, value_means
from flowroutes_fast.models.families import rotary_regime, text_config
from flowroutes_fast.ops.reference import sign_flow
from flowroutes_fast.results.flow import push
from flowroutes_fast.system.ambient import neutral
from flowroutes_fast.tracing.importances import attention_of, parts_of
from flowroutes_fast.tracing.prompts import check_tokens_alone, token_ids
from flowroutes_fast.tracing.trace import trace

if TYPE_CHECKING:
    from flowroutes_fast.results.route import Route
    from flowroutes_fast.results.trace import Trace

ABLATIONS = ("mean", "zero")
RULES = (
    "local proximity",
    "flow proximity",
    "local signed",
    "flow signed",
    "flow centred",
    "gradient",
    "attention",
    "random",
)
EVERY_RULE = (*RULES, "local centred")
ROUTES = {"importance": "route", "flow": "flow route"}  # rule of Trace.route -> its name in curves
STEPS = 4  # of the integrated gradient
SHARES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.5)
SIGNED_FLOOR = 1e-6
RESAMPLES = 2000


@dataclass(eq=False)
class Faithfulness:
    """What a prediction becomes when only some sub-edges are kept.

    ``table`` has a row for the route, one for as many sub-edges per layer with the highest attention weights, and one
    per random draw of as many per layer; columns ``which, draw, kl`` (of the full prediction from this one, nats),
    ``probability`` and ``rank`` (of the answer, 1 is the most probable), ``same_top`` (is the most probable token that
    of the whole model?).
    """

    table: pd.DataFrame = field(repr=False)
    position: int
    answer: int
    full_probability: float
    full_rank: int
    kept: int
    sub_edges: int
    ablation: str
    attention: str

    @property
    def share(self) -> float:
        """Share of the prompt's sub-edges that the route keeps."""
        return self.kept / self.sub_edges

    def of(self, which: str = "route") -> pd.Series:
        """Means of a row's (of all random draws') figures: ``"route"``, ``"attention"`` or ``"random"``."""
        rows = self.table[self.table["which"] == which]
        if rows.empty:
            raise ValueError(f"there is no {which!r} among {', '.join(map(repr, self.table['which'].unique()))}")
        return rows[["kl", "probability", "rank", "same_top"]].astype(float).mean()

    @property
    def kl(self) -> float:
        return float(self.of()["kl"])

    @property
    def probability(self) -> float:
        return float(self.of()["probability"])

    @property
    def rank(self) -> int:
        return int(self.of()["rank"])

    def __repr__(self) -> str:
        parts = [
            f"{w} {self.of(w)['probability']:.3f} (KL {self.of(w)['kl']:.2f})" for w in self.table["which"].unique()
        ]
        return (
            f"Faithfulness({self.kept} of {self.sub_edges} sub-edges, {self.share:.2%}; probability of token "
            f"{self.answer}: "
            f"{self.full_probability:.3f}; kept by {', '.join(parts)}; {self.ablation} ablation)"
        )


def route_masks(route: Route, patterns: Sequence[Tensor]) -> list[Tensor]:
    """The sub-edges of a route up to its position, per layer ``[head, query, key]`` bool. Edges whose heads are not
    told apart keep all heads.
    """
    tokens = patterns[0].shape[-1]
    masks = [torch.zeros(p.shape, dtype=torch.bool) for p in patterns]
    edges = route.edges[(route.edges["kind"] == "attention") & (route.edges["target"] < tokens)]
    for layer in edges["layer"].unique().tolist():
        part = edges[edges["layer"] == layer]
        head, query, key = (torch.tensor(part[name].to_numpy(np.int64)) for name in ("head", "target", "source"))
        if layer >= len(masks) or (len(head) and int(head.max()) >= masks[layer].shape[0]):
            raise ValueError(
                f"the route has sub-edges that this model has not (layer {layer}): it belongs to {route.model!r}"
            )
        masks[layer][head[head >= 0], query[head >= 0], key[head >= 0]] = True
        masks[layer][:, query[head < 0], key[head < 0]] = True
    return masks


@neutral()
def verify(
    route: Route,
    model: Any,
    *,
    ablation: str = "mean",
    means: Sequence[Tensor] | None = None,
    answer: int | None = None,
    random: int = 5,
    seed: int = 0,
    attention: str = "live",
    ids: Sequence[int] | None = None,
) -> Faithfulness:
    """See :meth:`flowroutes_fast.Route.verify`."""
    _check(ablation, means)
    if random < 0:
        raise ValueError(f"random must be a number of draws, got {random}")
    check_tokens_alone(route, "it cannot be verified on the tokens alone")
    ids = list(route.token_ids if ids is None else ids)
    if not ids:
        raise ValueError("this route holds no token ids; pass ids=, those of its prompt")
    if len(ids) != len(route.tokens):
        raise ValueError(f"ids has {len(ids)} tokens, the route has {len(route.tokens)}")
    _check_regime(model, len(ids), route.position + 1)
    run = clean(model, ids[: route.position + 1])
    if len(run.patterns) != route.n_layers:
        raise ValueError(
            f"the route has {route.n_layers} layers, this model has {len(run.patterns)}: it belongs to {route.model!r}"
        )
    masks = route_masks(route, run.patterns)
    counts = [int(m.sum()) for m in masks]
    generator = torch.Generator().manual_seed(seed)
    rivals = [per_layer([p.cpu() for p in run.patterns], counts)]
    rivals += [
        per_layer([torch.rand(p.shape, generator=generator) for p in run.patterns], counts) for _ in range(random)
    ]
    keep = [torch.stack([m, *(rival[layer] for rival in rivals)]) for layer, m in enumerate(masks)]
    logits = kept_logits(
        model,
        run.ids,
        keep,
        means=_means(model, run, ablation, means),
        attention=attention,
        patterns=run.patterns if attention == "frozen" else None,
    )
    answer = int(run.logits.argmax()) if answer is None else int(answer)
    if not 0 <= answer < len(run.logits):
        raise ValueError(f"answer {answer} is outside the model's vocabulary of {len(run.logits)}")
    table = pd.DataFrame(outcomes(run.logits, logits, answer))
    table.insert(0, "which", ["route", "attention", *["random"] * random])
    table.insert(1, "draw", [0, 0, *range(random)])
    full = outcomes(run.logits, run.logits[None], answer)
    return Faithfulness(
        table,
        route.position,
        answer,
        float(full["probability"][0]),
        int(full["rank"][0]),
        sum(counts),
        run.sub_edges,
        ablation,
        attention,
    )


def _check_regime(model: Any, traced: int, run: int) -> None:
    """``ValueError`` where a prompt's first tokens have other states than they had in the whole prompt."""
    if rotary_regime(config := text_config(unwrap(model)), traced) != rotary_regime(config, run):
        raise ValueError(
            f"the rotary embedding of this model changes with the prompt's length, so that its first {run} tokens "
            f"alone have other states than "
            f"among all {traced}: trace those {run} tokens, and verify that route"
        )


def outcomes(full: Tensor, kept: Tensor, answer: int) -> dict[str, np.ndarray]:
    """Compare predictions ``kept [batch, vocabulary]`` with the full one ``[vocabulary]`` (logits): KL(full ‖ kept)
    in nats and the rest.
    """
    full, kept = full.detach().double().log_softmax(-1), kept.detach().double().log_softmax(-1)
    mine = kept[:, answer]
    return {
        "kl": (full.exp() * (full - kept)).sum(-1).clamp_min(0).cpu().numpy(),
        "probability": mine.exp().cpu().numpy(),
        "rank": (1 + (kept > mine[:, None]).sum(-1)).cpu().numpy(),
        "same_top": (kept.argmax(-1) == full.argmax()).cpu().numpy(),
    }


def per_layer(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """In every layer the ``counts[layer]`` causal sub-edges with the highest scores ``[head, query, key]``, as
    masks.
    """
    found = []
    for score, count in zip(scores, counts, strict=True):
        causal = torch.ones(score.shape[-2:], dtype=torch.bool).tril().expand(score.shape)
        mask = torch.zeros(score.shape, dtype=torch.bool)
        best = score[causal].argsort(descending=True, stable=True)[:count]
        mask.view(-1)[causal.reshape(-1).nonzero()[best, 0]] = True
        found.append(mask)
    return found


def strongest(scores: Sequence[Tensor], shares: Sequence[float]) -> list[Tensor]:
    """The causal sub-edges with the highest scores over all layers: masks ``[share, head, query, key]`` per layer,
    at least one sub-edge each.
    """
    tokens = scores[0].shape[-1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    flat = torch.cat([s[:, causal].reshape(-1) for s in scores])
    place = torch.empty(len(flat), dtype=torch.int64)
    place[flat.argsort(descending=True, stable=True)] = torch.arange(len(flat))
    counts = torch.tensor([max(1, round(share * len(flat))) for share in shares])
    found = []
    for score, part in zip(scores, place.split([s.shape[0] * int(causal.sum()) for s in scores]), strict=True):
        rank = torch.full(score.shape, len(flat))
        rank[:, causal] = part.view(score.shape[0], -1)
        found.append(rank < counts[:, None, None, None])
    return found


@neutral()
def rank_sub_edges(
    model: Any,
    run: Clean,
    rules: Sequence[str],
    *,
    means: Sequence[Tensor] | None = None,
    attention: str = "live",
    seed: int = 0,
) -> dict[str, list[Tensor]]:
    """How rules order the sub-edges of a prompt for the prediction after its last position: per rule and layer scores
    ``[head, query, key]``.

    ``"local …"``: importance (by proximity, or the absolute value of signed flow); ``"flow …"``: importance times the
    mass that arrives at its target when mass 1 starts at the last position's last state
    (:mod:`flowroutes_fast.results.flow`). ``"… centred"``: signed flow of α·(v − v̄)·W_O, what mean ablation takes
    away, with the ``means`` v̄. ``"gradient"``: −∂KL(full ‖ kept)/∂mask, averaged over masks that are the same
    everywhere, from 1/8 to 7/8: what a sub-edge does for the prediction, which takes four forward and backward passes.
    ``"attention"``: attention weight; ``"random"``.
    """
    _check_rules(rules)
    found: dict[str, list[Tensor]] = {}
    for measure in ("proximity", "signed", "centred"):
        if not any(measure in rule for rule in rules):
            continue
        traced = _trace(model, run.ids, "signed" if measure == "centred" else measure)
        if measure == "centred":
            traced = replace(traced, dense=centred_shares(model, run, means), sparse=None)
        found[f"local {measure}"] = local_scores(traced, run)
        if f"flow {measure}" in rules:
            found[f"flow {measure}"] = flow_scores(traced, run)
    if "gradient" in rules:
        found["gradient"] = integrated_gradient(model, run, means, attention)
    found["attention"] = [p.detach().cpu() for p in run.patterns]
    generator = torch.Generator().manual_seed(seed)
    found["random"] = [torch.rand(p.shape, generator=generator) for p in run.patterns]
    return {rule: found[rule] for rule in rules}


def _trace(model: Any, ids: list[int], measure: str) -> Trace:
    if measure == "signed":
        return trace(model, None, ids, measure="signed", floor=SIGNED_FLOOR)
    return trace(model, None, ids, precision="exact", dense=True)


def centred_shares(model: Any, run: Clean, means: Sequence[Tensor] | None) -> list[Tensor]:
    """Signed flow ⟨sign(y), α·(v − v̄)·W_O⟩ / ‖y‖₁ of every sub-edge, per layer ``[head, query, key]``; without
    means v̄ is 0.
    """
    found: list[Tensor] = []

    def add(layer: Layer) -> None:
        a = attention_of(layer, parts_of(layer, "value"), "reference").float()  # type: ignore[union-attr]
        value = a.value.repeat_interleave(a.n_head // len(a.value), 0)
        if means is not None:
            value = value - means[layer.index].to(value)[:, None]
        flow = sign_flow(a.pattern, value, a.w_o, a.whole, row_scale=a.row_scale, gate=a.gate)
        found.append((flow / a.whole.abs().sum(-1)[:, None].clamp_min(torch.finfo(flow.dtype).tiny)).cpu().contiguous())

    capture(model, torch.tensor([run.ids], device=run.logits.device), add)
    return found


def integrated_gradient(
    model: Any, run: Clean, means: Sequence[Tensor] | None, attention: str = "live"
) -> list[Tensor]:
    """−∂KL(full ‖ kept)/∂mask, the mean over uniform masks; positive where a sub-edge brings the prediction closer
    to the full one.
    """
    full = run.logits.log_softmax(-1)

    def closeness(logits: Tensor) -> Tensor:
        return -(full.exp() * (full - logits.log_softmax(-1))).sum()

    total = [torch.zeros(p.shape) for p in run.patterns]
    for step in range(STEPS):
        keep = [torch.full(p.shape, (step + 0.5) / STEPS) for p in run.patterns]
        patterns = run.patterns if attention == "frozen" else None
        for sum_, slope in zip(
            total,
            mask_gradient(model, run.ids, keep, closeness, means=means, attention=attention, patterns=patterns),
            strict=True,
        ):
            sum_ += slope / STEPS
    return total


def local_scores(traced: Trace, run: Clean) -> list[Tensor]:
    found = []
    for layer, pattern in enumerate(run.patterns):
        query, key, head, value = traced.sub_edges(layer, np.arange(len(run.ids)))
        score = torch.zeros(pattern.shape)
        score[head, query, key] = torch.from_numpy(np.abs(value)).float()
        found.append(score)
    return found


def flow_scores(traced: Trace, run: Clean) -> list[Tensor]:
    """Mass that every sub-edge carries to the last position's last state."""
    _, flows, _ = push(traced, [len(run.ids) - 1])
    found = []
    for pattern, flow in zip(run.patterns, flows, strict=True):
        score = torch.zeros(pattern.shape)
        for part in flow.attention:
            if part.kind == "attention":
                score[part.head, part.target, part.source] = torch.from_numpy(part.importance).float()
        found.append(score)
    return found


@neutral()
def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    rules: Sequence[str] = RULES,
    shares: Sequence[float] = SHARES,
    thresholds: Sequence[float] = (),
    ablation: str = "mean",
    means: Sequence[Tensor] | None = None,
    attention: str = "live",
    seed: int = 0,
    step: Callable[[], None] | None = None,
) -> pd.DataFrame:
    """Every prompt under every rule and share: what the prediction after its last position becomes.

    Columns ``prompt, tokens, rule, size, share, answer, full`` (the answer's probability in the whole model; the answer
    is its most probable token), ``probability, kept`` (their quotient, at most 1), ``kl`` (nats), ``rank, same_top``.
    ``size`` is what was asked for: the share, or, for ``"route proximity"``, ``"route signed"``, ``"flow route
    proximity"`` and ``"flow route signed"``, the threshold of a route (:meth:`Trace.route`). Arguments as for
    :func:`curve`.
    """
    _check(ablation, means)
    _check_rules(rules)
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError("a curve needs a list of prompts, at least one")
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"shares must lie in (0, 1], got {share}")
    every = [token_ids(model, tokenizer, prompt) for prompt in prompts]
    if ablation == "mean" and means is None:
        means = value_means(model, None, every)
    tables = []
    for number, ids in enumerate(every):
        run = clean(model, ids)
        names, masks = [], []
        for rule, scores in rank_sub_edges(
            model, run, rules, means=means, attention=attention, seed=seed + number
        ).items():
            names += [(rule, share) for share in shares]
            masks.append(strongest(scores, shares))
        for kind in ("proximity", "signed") if thresholds else ():
            traced = _trace(model, ids, kind)
            for rule, label in ROUTES.items():
                for threshold in thresholds:
                    names.append((f"{label} {kind}", threshold))
                    masks.append(
                        [m[None] for m in route_masks(traced.route(threshold=threshold, rule=rule), run.patterns)]
                    )
        keep = [torch.cat([m[layer] for m in masks]) for layer in range(len(run.patterns))]
        logits = kept_logits(
            model,
            ids,
            keep,
            means=means,
            attention=attention,
            patterns=run.patterns if attention == "frozen" else None,
        )
        answer = int(run.logits.argmax())
        table = pd.DataFrame(outcomes(run.logits, logits, answer))
        full = float(run.logits.double().softmax(-1)[answer])
        sizes = torch.stack([k.flatten(1).sum(1) for k in keep]).sum(0).numpy()
        about = pd.DataFrame(names, columns=["rule", "size"]).assign(
            prompt=number,
            tokens=len(ids),
            share=sizes / run.sub_edges,
            answer=answer,
            full=full,
            kept=(table["probability"] / full).clip(upper=1),
        )
        tables.append(about.join(table))
        if step is not None:
            step()
    return pd.concat(tables, ignore_index=True)[
        ["prompt", "tokens", "rule", "size", "share", "answer", "full", "probability", "kept", "kl", "rank", "same_top"]
    ]


def summary(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Means over prompts of what :func:`measure` gave, with 95 % bootstrap intervals (percentiles of resampled
    prompts).

    Columns ``rule, size, share, prompts`` and, each with ``_low`` and ``_high``: ``kept, kl, same_top``; and the median
    ``rank``.
    """
    rows = []
    for (rule, size), part in table.groupby(["rule", "size"], sort=False):
        draws = np.random.default_rng(seed).integers(0, len(part), (RESAMPLES, len(part)))
        row: dict[str, Any] = {"rule": rule, "size": size, "share": part["share"].mean(), "prompts": len(part)}
        for name in ("kept", "kl", "same_top"):
            values = part[name].to_numpy(float)
            low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row | {"rank": part["rank"].median()})
    return pd.DataFrame(rows)


@neutral()
def curve(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    rules: Sequence[str] = RULES,
    shares: Sequence[float] = SHARES,
    thresholds: Sequence[float] = (),
    ablation: str = "mean",
    means: Sequence[Tensor] | None = None,
    attention: str = "live",
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the prediction remains when the strongest sub-edges alone are kept, by rule and by share.

    Args:
        model, tokenizer: a transformers decoder and its tokenizer (None where prompts are lists of ids).
        prompts: texts or lists of ids; the prediction after the last token of each is explained.
        rules: how sub-edges are ranked, see :func:`rank_sub_edges`; all of a prompt's compete, at all positions and in
            all layers.
        shares: shares of all sub-edges that are kept, in (0, 1].
        thresholds: also the routes at these thresholds of importance, and of flow, by proximity and by signed flow.
        ablation: ``"mean"`` or ``"zero"``: what takes the place of the others.
        means: see :func:`flowroutes_fast.experiments.ablation.value_means`; None: of the prompts themselves.
        attention: ``"live"`` or ``"frozen"``, see :func:`flowroutes_fast.experiments.ablation.kept_logits`.
        seed: of the random sub-edges and of the bootstrap.

    Returns:
        Means over prompts with 95 % bootstrap intervals, see :func:`summary`. ``kept`` is the answer's probability
        divided by the whole model's, at most 1.
    """
    options: dict[str, Any] = {
        "rules": rules,
        "shares": shares,
        "thresholds": thresholds,
        "ablation": ablation,
        "means": means,
    }
    return summary(measure(model, tokenizer, prompts, **options, attention=attention, seed=seed), seed=seed)


def _means(model: Any, run: Clean, ablation: str, means: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    if ablation == "zero":
        return None
    return value_means(model, None, [run.ids]) if means is None else means


def _check(ablation: str, means: Sequence[Tensor] | None) -> None:
    if ablation not in ABLATIONS:
        raise ValueError(f"unknown ablation {ablation!r}: choose 'mean' or 'zero'")
    if ablation == "zero" and means is not None:
        raise ValueError("means belong to ablation='mean'")


def _check_rules(rules: Sequence[str]) -> None:
    for rule in rules:
        if rule not in EVERY_RULE:
            raise ValueError(f"unknown rule {rule!r}: choose among {', '.join(map(repr, EVERY_RULE))}")
