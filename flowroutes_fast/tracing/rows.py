"""Importances of a few rows of one layer, with all that stays the same from call to call prepared once.

The same kernels and figures as :func:`flowroutes_fast.tracing.importances.importances`, for layers kept whole in
float32 on the CPU; a walk calls it once a layer for a handful of rows, where checks, casts and dispatch would cost more
than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowroutes_fast.capture.conservation import check_finite
from flowroutes_fast.capture.hooks import ROW_WISE, Layer
from flowroutes_fast.capture.kept import SAME_WEIGHTS, Changed, KeptLayer, probe
from flowroutes_fast.ops import native
from flowroutes_fast.ops.certified import CAPACITY
from flowroutes_fast.ops.certified_rounds import FIRST_CUT
from flowroutes_fast.ops.intervals import Counts
from flowroutes_fast.tracing.importances import FEW_KEYS, parts_of
from flowroutes_fast.tracing.options import Options

SCALARS = 7  # columns of a table of rows before its heads
EXACT_BELOW = 1e-2  # a looser tolerance does not ask for every sub-edge, few keys or not


@dataclass
class Prepared:
    """What rows of one layer share."""

    key: Tensor  # those that ``arguments`` points at
    first: list[int]  # where the spans begin
    spans: list[Layer]
    arguments: native.Arguments
    w_o: Tensor  # [d_model, head * d_head]
    exact: bool  # every row is evaluated whole
    answer: np.ndarray  # to the probe of W_O in the pass, [head * d_head]
    slack: float  # by how much another order of sums may change it

    def take(self, name: str, rows: Tensor, dim: int = 0) -> Tensor:
        """Rows (rising) of something that the layer has by token."""
        if len(self.first) == 1:
            return getattr(self.spans[0], name).index_select(dim, rows)  # type: ignore[no-any-return]
        cuts = np.searchsorted(rows.numpy(), [*self.first, np.iinfo(np.int64).max])
        found = [
            getattr(layer, name).index_select(dim, rows[start:end] - first)
            for layer, first, start, end in zip(self.spans, self.first, cuts, cuts[1:], strict=False)
            if end > start
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim)


def prepared(kept: KeptLayer, options: Options) -> Prepared | None:
    """For rows of this layer; None where they go the general way."""
    if options.measure != "proximity":
        return None
    found: Prepared | None = kept.prepared
    if found is not None and found.key is kept.key and len(found.spans) == len(kept.spans):
        return found
    if not _plain(kept, options):
        return None
    grown = (
        found is not None
        and kept.block.value_bias() is None
        and (found.exact == _few(kept) or options.precision == "exact")
    )
    kept.prepared = _grown(kept, found) if grown else _prepare(kept, options)  # type: ignore[arg-type]
    return kept.prepared  # type: ignore[no-any-return]


def _few(kept: KeptLayer) -> bool:
    return kept.key is not None and kept.key.shape[1] <= FEW_KEYS


def _plain(kept: KeptLayer, options: Options) -> bool:
    if options.backend != "cpu" or options.measure != "proximity" or options.neurons or kept.lean:
        return False
    if kept.key is None or kept.value is None or kept.key.dtype != torch.float32 or kept.value.dtype != torch.float32:
        return False
    expected = 0
    for span in kept.spans:
        layer = span.layer
        states = (layer.query, layer.residual, layer.resid_post, layer.ffn_out, layer.resid_mid, layer.through)
        if any(t is not None and (t.dtype != torch.float32 or t.device.type != "cpu" or t.is_neg()) for t in states):
            return False
        odd = (span.mask, layer.row_scale, layer.gate, layer.in_scale, layer.out_scale, layer.mixer_out)
        if (
            layer.query is None
            or any(t is not None for t in odd)
            or layer.scale != 1
            or int(span.positions[0]) != expected
        ):
            return False
        expected += len(span.positions)
        if int(span.positions[-1]) != expected - 1:
            return False
    return expected == kept.key.shape[1]


def _prepare(kept: KeptLayer, options: Options) -> Prepared | None:
    one = kept.with_weights(_last_row(kept), product=False)
    check_finite(one)
    parts = parts_of(one, options.bias)
    assert parts.value is not None
    assert parts.w_o is not None
    if parts.constant is not None and parts.constant.dim() != 1:
        return None
    (kv, tokens, d_v), d_qk, (heads, _, d_model) = parts.value.shape, one.key.shape[2], parts.w_o.shape  # type: ignore[union-attr]
    flat = native.contiguous(parts.w_o.permute(2, 0, 1).reshape(d_model, -1))  # a view where W_O views a linear layer
    arguments = native.Arguments(
        keys=tokens,
        heads=heads,
        group=heads // kv,
        d_v=d_v,
        d_model=d_model,
        w_row=heads * d_v,
        threads=options.threads,
        d_qk=d_qk,
        scale=one.scaling,
        softcap=one.softcap,
        window=kept.window,
    )
    arguments.take("w_o", flat, d_model, heads * d_v)
    arguments.take("sinks", None if one.sinks is None else one.sinks.float(), heads)
    exact = options.precision == "exact" or (_few(kept) and options.tolerance <= EXACT_BELOW)
    arguments |= {
        "floor": options.floor,
        "cut": min(FIRST_CUT, options.floor) or FIRST_CUT,
        "capacity": CAPACITY,
        "n_thresholds": 0 if exact else len(options.thresholds),
        "tolerance": 0.0 if exact else options.tolerance,
    }
    limits = torch.tensor(() if exact else options.thresholds, dtype=torch.float32, device="cpu")
    arguments.take("thresholds", limits, arguments["n_thresholds"])
    arguments.take("constant", parts.constant, d_model)
    arguments.take("probe", probe(d_model, flat.device), d_model)
    arguments.take_rows("key", one.key, (kv, tokens, d_qk), ("k_head", "k_row"), where="k")  # type: ignore[arg-type]
    arguments.take_rows("value", parts.value, (kv, tokens, d_v), ("v_head", "v_row"), where="v")
    assert kept.weights[0] is not None
    answer = kept.weights[0].numpy()
    return Prepared(kept.key, *_spans(kept), arguments, flat, exact, answer, SAME_WEIGHTS * float(np.abs(answer).max()))  # type: ignore[arg-type]


def _last_row(kept: KeptLayer) -> Layer:
    layer = kept.spans[-1].layer
    rows = {name: t[-1:] for name in ROW_WISE if (t := getattr(layer, name)) is not None}
    query = None if layer.query is None else layer.query[:, -1:]
    return replace(layer, key=kept.key, value=kept.value, window=kept.window, query=query, **rows)


def _spans(kept: KeptLayer) -> tuple[list[int], list[Layer]]:
    return [int(span.positions[0]) for span in kept.spans], [span.layer for span in kept.spans]


def _grown(kept: KeptLayer, found: Prepared) -> Prepared:
    """The same with more tokens."""
    assert kept.key is not None
    assert kept.value is not None
    arguments = native.Arguments()
    arguments |= found.arguments
    arguments.kept = found.arguments.kept[:-2]  # all but the keys and values of fewer tokens
    kv, tokens, d_v = kept.value.shape
    arguments["keys"] = tokens
    arguments.take_rows("key", kept.key, (kv, tokens, kept.key.shape[2]), ("k_head", "k_row"), where="k")
    arguments.take_rows("value", kept.value, (kv, tokens, d_v), ("v_head", "v_row"), where="v")
    return Prepared(kept.key, *_spans(kept), arguments, found.w_o, found.exact, found.answer, found.slack)


@dataclass
class RowTable:
    """Importances of some rows of a layer: ``table [row, 7 + 3 heads]`` (normaliser low and high, residual, bias,
    mixer, FFN, the residual past the FFN; heads, their lower and upper bounds), ``edges``: index ``[3, n]`` (row, key,
    head) and importance ``[n]``."""

    table: np.ndarray
    edges: tuple[np.ndarray, np.ndarray]
    counts: Counts


def importances_of(made: Prepared, rows: Tensor, options: Options, whole: bool) -> RowTable | None:
    """Importances of the rows at these positions (rising, int64); None where numbers are not finite."""
    layer, n = made.spans[0], len(rows)
    parallel = layer.resid_mid is None
    arguments = native.Arguments()
    arguments |= made.arguments
    heads, d_model, d_qk = (arguments[name] for name in ("heads", "d_model", "d_qk"))
    y = made.take("resid_post" if parallel else "resid_mid", rows)
    arguments.take("whole", y, n, d_model, where="y")
    if not parallel:
        arguments.take("post", made.take("resid_post", rows), n, d_model)
    names = [
        "residual",
        "ffn_out",
        *(["through"] if layer.through is not None and layer.through is not layer.resid_mid else []),
    ]
    single = len(made.spans) == 1
    given = {name: getattr(layer, name) if single else made.take(name, rows) for name in names}
    query = layer.query if single else made.take("query", rows, 1)
    assert query is not None
    stored = query.shape[1]
    for name, tensor in given.items():
        field = name.removesuffix("_out")
        arguments.take_rows(name, tensor, (stored, d_model), (f"{field}_row",), where=field)
    arguments.take_rows("query", query, (heads, stored, d_qk), ("q_head", "q_row"), where="q")
    arguments.take("positions", rows, n, dtype=torch.int64)
    if single:
        arguments["at"] = arguments["positions"]
    else:
        arguments.take("at", torch.arange(n, dtype=torch.int64, device="cpu"), n, dtype=torch.int64)
    arguments |= {"queries": n, "stored": stored, "parallel": parallel, "exact": made.exact}
    if whole:
        arguments["tolerance"] = 0.0
    answer = arguments.make("answer", heads * arguments["d_v"])
    table = arguments.make("table", n, SCALARS + 3 * heads).numpy()
    index, value, counts = arguments.call("few_rows")
    if not np.abs(answer.numpy() - made.answer).max() <= made.slack:
        raise Changed(layer.index, "weights")
    finite = np.isfinite(table)
    if parallel:
        finite[:, SCALARS - 1] = True
    return RowTable(table, (index, value), Counts(*counts)) if finite.all() else None
