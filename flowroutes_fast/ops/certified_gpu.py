"""Certified importances of one layer on a GPU: two passes over bounds, one list, one evaluation, and few waits for the
device.

The first pass sums the bounds below a few cuts; from these sums every row takes the largest cut that leaves its
normaliser within the tolerance. The second lists what is above it and sums the rest. Sums over the heads of a pair come
from a pass of their own. Rows of which a decision is still open then are listed again, with smaller cuts, at last
whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flowroutes_fast.ops import pairs
from flowroutes_fast.ops.attention import Attention, visible
from flowroutes_fast.ops.bound import Bounds
from flowroutes_fast.ops.intervals import Certified, Counts
from flowroutes_fast.ops.pairs import pair_weights

SMALLER = (0.1, 0.01, 0.0)  # of the first cut, where a row is listed again; 0 is everything
EXPECTED = 0.7  # of the sum of all bounds, to guess a normaliser from; what comes of it is checked
WELL_ABOVE = 10.0  # sums over heads above this many floors are known to the tolerance


@dataclass(frozen=True, eq=False)
class _List:
    """Evaluated sub-edges: index ``[3, n]``, value ``[n]``, and how often their rows had been listed before."""

    index: Tensor
    value: Tensor
    round_: int


class Passes:
    """One layer on its way through the passes. All tensors stay on the device."""

    def __init__(
        self,
        attention: Attention,
        others: Tensor,
        floor: float,
        thresholds: tuple[float, ...],
        tolerance: float | Tensor,
        backend: str,
    ) -> None:
        from flowroutes_fast.kernels import attention as rows
        from flowroutes_fast.kernels import bound, decide, gradient

        a = self.attention = attention
        device = a.whole.device
        self.kernels, self.decide, self.backend = bound, decide, backend
        self.others, self.floor = others.float(), floor
        self.thresholds = _small(thresholds, device)
        self.tolerance = tolerance.to(device, torch.float32) if isinstance(tolerance, Tensor) else tolerance
        self.base = self.others.sum(0)
        self.lse, _ = rows.attention_rows(a.query, a.key, sinks=a.sinks, **a.triton_options)
        self.g = gradient.gradient(a.whole, a.w_o, a.gate)
        self.v = gradient.values(a.value, bound.tile_of(a.query, a.value.shape[2]).columns)
        self.inputs = (a.query, a.key, self.v, self.g, self.lse)
        self.rest, self.evaluated = (
            torch.zeros(a.n_query, a.n_head, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.last = torch.zeros(a.n_query, dtype=torch.int32, device=device)  # round of a row's list
        self.counts = Counts(bounded=visible(a))
        self.listed: list[_List] = []

    def run(self) -> Certified:
        options = self.attention.triton_options
        first = self.cut = self._first_cuts()
        rows: Tensor | None = None
        pair, rest = self.base.new_empty(0, dtype=torch.int64), self.base.new_empty(0)
        for round_ in range(len(SMALLER) + 1):
            self._list(rows, round_)
            low, high = self._normaliser()
            open_ = self._open(low, high)
            more = self.kernels.pair_rests(*self.inputs, self.cut, self.floor * low, rows, **options)
            if rows is None:
                pair, rest = more
            else:
                left = self.last[pair // self.attention.n_key] != round_
                pair, rest = torch.cat([pair[left], more[0]]), torch.cat([rest[left], more[1]])
            index, value, between = self._pairs(low, high, pair, rest)
            if round_ == len(SMALLER):
                break
            rows = ((open_ | between) & (high > low)).nonzero()[:, 0].to(torch.int32)
            if not len(rows):
                break
            self.counts.refined += len(rows) if round_ == 0 else 0
            self.counts.exhausted = len(rows) if not SMALLER[round_] else 0
            at = rows.long()
            self.cut = self.cut.index_copy(0, at, torch.minimum(first, self.floor * low)[at] * SMALLER[round_])
        return Certified(low, high, self.evaluated, self.evaluated + self.rest, index, value, self.counts)

    def _first_cuts(self) -> Tensor:
        """Cuts ``[query]``: at most the floor of what the normaliser is expected to be."""
        a, kernels = self.attention, self.kernels
        start = self.floor * torch.maximum(self.base, 0.5 * a.whole.abs().sum(1, dtype=torch.float32))
        sums = kernels.sums_below(*self.inputs, start, **a.triton_options).sum(2)  # [level, query]
        expected = self.base + EXPECTED * sums[-1]
        ratios = _small(tuple(kernels.RATIO**k for k in range(kernels.LEVELS)), start.device)
        cuts = start * ratios[:, None]
        fits = (sums[:-1] <= 1.8 * self.tolerance * expected) & (cuts <= self.floor * expected)
        fits[-1] = True
        cut = cuts.gather(0, fits.to(torch.int8).argmax(0, keepdim=True))[0]  # the first that fits
        if isinstance(self.tolerance, Tensor):
            return torch.where(self.tolerance == 0, 0, cut)
        return cut if self.tolerance else torch.zeros_like(cut)

    def _list(self, rows: Tensor | None, round_: int) -> None:
        """List and evaluate what is above the cut in these rows; it replaces what was known of them."""
        a = self.attention
        for piece in self.kernels.bounds(*self.inputs, self.cut, self.rest, rows, **a.triton_options):
            n_row = a.n_query if piece.row is None else len(piece.row)
            value = self.evaluate(piece.index, piece.start[::n_row].contiguous())
            sums = self.kernels.segment_sums(value, piece.start).view(a.n_head, n_row).T
            if piece.row is None:
                self.evaluated = sums.contiguous()
            else:
                at = piece.row.long()
                self.evaluated.index_copy_(0, at, sums)
                self.last.index_fill_(0, at, round_)
            self.counts.evaluated += len(value)
            self.listed.append(_List(piece.index, value, round_))

    def evaluate(self, index: Tensor, head_start: Tensor | None = None) -> Tensor:
        """Exact proximities of ``index [3, n]``, whose heads ascend."""
        a = self.attention
        if self.backend == "cuda" and a.value.dtype == a.w_o.dtype:
            alpha = pair_weights(a, Bounds(self.rest, self.rest, self.lse), index)
            return pairs.on_cuda(alpha, a.value, a.w_o, a.whole, index, a.gate, ordered=True)
        from flowroutes_fast.kernels.pairs import pair_proximity

        return pair_proximity(  # type: ignore[no-any-return]
            a.query,
            a.key,
            a.value,
            a.w_o,
            a.whole,
            self.lse,
            index,
            gate=a.gate,
            ordered=True,
            head_start=head_start,
            **a.triton_options,
        )

    def _normaliser(self) -> tuple[Tensor, Tensor]:
        low = self.base + self.evaluated.sum(1)
        return low, torch.where(self.cut > 0, low + self.rest.sum(1), low)

    def _open(self, low: Tensor, high: Tensor) -> Tensor:
        """Rows in which the tolerance, the floor that the cut assumed, or a part at a threshold is open."""
        found = (high - low > self.tolerance * (high + low)) | (self.cut > self.floor * low)
        if not len(self.thresholds):
            return found
        ends = self.thresholds[:, None, None] * torch.stack([low, high])  # [threshold, end, query]
        found |= ((self.others > ends[:, :1]) & (self.others <= ends[:, 1:])).any(0).any(0)
        marked = torch.zeros(len(low), dtype=torch.int32, device=low.device)
        for listed in self.listed:  # a row's earlier lists hold some of the same sub-edges
            self.decide.mark_open(listed.index, listed.value, low, high, self.thresholds, marked)
        return found | (marked > 0)

    def _pairs(self, low: Tensor, high: Tensor, pair: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sub-edges of pairs that may reach the floor, and per pair what its other heads may add (head -1), sorted.

        Also whether a sum over heads lies between a threshold's two ends ``[query]``.
        """
        n_key, size = self.attention.n_key, self.attention.n_head + 1
        index, value = torch.cat([x.index for x in self.listed], 1), torch.cat([x.value for x in self.listed])
        if len(self.listed) > 1:
            round_ = torch.cat([torch.full_like(x.index[0], x.round_) for x in self.listed])
            keep = (round_ == self.last[index[0]]).nonzero()[:, 0]
            index, value = index[:, keep], value[keep]
        names = [(index[0].long() * n_key + index[1]) * size + (index[2] + 1), pair * size]
        name, order = torch.cat(names).sort()
        value = torch.cat([value, rest])[order]
        state, open_, unclear = self._states(name, value, low, high)
        if int(unclear):
            name, value = self._completed(name, value, state == self.decide.UNCLEAR)
            state, more, _ = self._states(name, value, low, high)
            open_ |= more
        keep = ((state == self.decide.KEPT) & (value > 0)).nonzero()[:, 0]
        name, value = name[keep], value[keep]
        at = name // size
        return torch.stack([at // n_key, at % n_key, name % size - 1]).to(torch.int32), value, open_ > 0

    def _states(self, name: Tensor, value: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.attention
        return self.decide.pair_states(  # type: ignore[no-any-return]
            name,
            value,
            low,
            high,
            self.tolerance,
            self.thresholds,
            size=a.n_head + 1,
            n_key=a.n_key,
            floor=self.floor,
            well=WELL_ABOVE,
        )

    def _completed(self, name: Tensor, value: Tensor, unclear: Tensor) -> tuple[Tensor, Tensor]:
        """The same with all heads of the pairs marked evaluated."""
        n_key, n_head = self.attention.n_key, self.attention.n_head
        pairs = (name[unclear] // (n_head + 1)).unique_consecutive()
        head = torch.arange(n_head, dtype=torch.int64, device=pairs.device)[:, None].expand(-1, len(pairs))
        index = (
            torch.stack([(pairs // n_key).expand(n_head, -1), (pairs % n_key).expand(n_head, -1), head])
            .reshape(3, -1)
            .to(torch.int32)
        )
        self.counts.evaluated += index.shape[1]
        keep = (~unclear).nonzero()[:, 0]
        every = (pairs * (n_head + 1) + head + 1).reshape(-1)
        name, order = torch.cat([name[keep], every]).sort()
        return name, torch.cat([value[keep], self.evaluate(index)])[order]


@lru_cache(maxsize=64)
def _small(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Some numbers as a float32 tensor on the device, copied there once."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def one_sided_pairs(attention: Attention, lse: Tensor, cut: Tensor) -> Tensor:
    """Pairs (query · key count + key, int64) of which one sign alone takes a sub-edge, or the sum over heads, past
    ``cut [query]``.
    """
    from flowroutes_fast.kernels import bound, gradient

    a = attention
    g = gradient.gradient(a.whole, a.w_o, a.gate)
    v = gradient.values(a.value, bound.tile_of(a.query, a.value.shape[2]).columns)
    rest = torch.empty(a.n_query, a.n_head, dtype=torch.float32, device=a.whole.device)
    found = []
    for side in (g, g.mirrored()):
        for piece in bound.bounds(a.query, a.key, v, side, lse, cut, rest, **a.triton_options):
            found.append(piece.index[0].long() * a.n_key + piece.index[1])
        found.append(bound.pair_rests(a.query, a.key, v, side, lse, cut, cut, **a.triton_options)[0])
    return torch.cat(found).unique()  # type: ignore[no-any-return]
