"""Certified importances of one layer on a GPU: two passes over bounds, one list, one evaluation, and few waits for the device.

The first pass sums the bounds below a few cuts; from these sums every row takes the largest cut that leaves its normaliser within the
tolerance. The second lists what is above it and sums the rest. Rows of which a decision is still open are listed again, with smaller cuts, at
last whole. Sums over the heads of a pair come from a pass of their own at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowroutes_fast.bounds import Attention, Bounds, Certified, Counts, pair_weights, visible

ROUNDS = 4  # lists of one row; the last is of everything
SMALLER = 0.1  # the cut of a row that is listed again
EXPECTED = 0.7  # of the sum of all bounds, to guess a normaliser from; what comes of it is checked
WELL_ABOVE = 10.0  # sums over heads above this many floors are known to the tolerance


@dataclass
class _Listed:
    """Evaluated sub-edges, and which list of its row each comes from."""

    index: list[Tensor]
    value: list[Tensor]
    round_: list[Tensor]


class Passes:
    """One layer on its way through the passes. All tensors stay on the device."""

    def __init__(
        self, attention: Attention, others: Tensor, floor: float, thresholds: tuple[float, ...], tolerance: float | Tensor, backend: str
    ) -> None:
        from flowroutes_fast.kernels import bound, gradient

        a = self.attention = attention
        self.kernels, self.backend = bound, backend
        self.others, self.floor, self.thresholds = others.float(), floor, thresholds
        self.tolerance = tolerance.to(others.device, torch.float32) if isinstance(tolerance, Tensor) else tolerance
        self.base = self.others.sum(0)
        self.lse, _ = bound.attention_rows(a.query, a.key, sinks=a.sinks, **a.triton_options)
        self.g = gradient.gradient(a.whole, a.w_o, a.gate)
        self.v = gradient.values(a.value, bound.tile_of(a.query, a.value.shape[2]).columns)
        shape = (a.n_query, a.n_head)
        self.rest, self.evaluated = (torch.zeros(shape, dtype=torch.float32, device=a.whole.device) for _ in range(2))
        self.last = torch.full((a.n_query,), -1, dtype=torch.int32, device=a.whole.device)  # round of a row's list
        self.counts = Counts()
        self.listed = _Listed([], [], [])

    @property
    def options(self) -> dict[str, Any]:
        return self.attention.triton_options

    def run(self) -> Certified:
        a = self.attention
        self.cut, assumed = self._first_cuts()
        rows: Tensor | None = None
        for round_ in range(ROUNDS):
            self._list(rows, round_)
            low, high = self._normaliser()
            if round_ == ROUNDS - 1:
                break
            open_ = self._open(low, high, assumed)
            rows = open_.nonzero()[:, 0].to(torch.int32)
            if not len(rows):
                break
            self.counts.refined += len(rows) if round_ == 0 else 0
            self.counts.exhausted = len(rows) if round_ == ROUNDS - 2 else 0
            assumed = torch.minimum(assumed, low)
            smaller = torch.minimum(self.cut, self.floor * low) * SMALLER
            self.cut = torch.where(open_, torch.zeros_like(smaller) if round_ == ROUNDS - 2 else smaller, self.cut)
        index, value, rows = self._pairs(low, high)
        if len(rows):  # sums over heads between a threshold's two ends
            self.counts.exhausted += len(rows)
            self.cut = self.cut.index_fill(0, rows.long(), 0.0)
            self._list(rows, ROUNDS)
            low, high = self._normaliser()
            index, value, _ = self._pairs(low, high)
        self.counts.bounded = visible(a)
        return Certified(low, high, self.evaluated, self.evaluated + self.rest, index, value, self.counts)

    def _first_cuts(self) -> tuple[Tensor, Tensor]:
        """Cuts ``[query]`` and the normalisers they assume."""
        a, kernels = self.attention, self.kernels
        start = self.floor * torch.maximum(self.base, 0.5 * a.whole.float().abs().sum(1))
        sums = kernels.sums_below(a.query, a.key, self.v, self.g, self.lse, start, **self.options).sum(2)  # [level, query]
        assumed = self.base + EXPECTED * sums[-1]
        # the list must reach the floor of the true normaliser too
        level = torch.arange(kernels.LEVELS, dtype=torch.float32, device=a.whole.device)
        cuts = start * (kernels.RATIO**level)[:, None]
        fits = (sums[:-1] <= 1.8 * self.tolerance * assumed) & (cuts <= self.floor * assumed)
        first = fits.to(torch.int32).argmax(0)  # of equal ones the first
        cut = cuts.gather(0, first[None])[0]
        none = ~fits.any(0)
        cut = torch.where(none, cuts[-1], cut)
        if isinstance(self.tolerance, Tensor) or self.tolerance == 0:
            cut = torch.where(torch.as_tensor(self.tolerance, device=cut.device) == 0, torch.zeros_like(cut), cut)
        return cut, cut / self.floor if self.floor else torch.zeros_like(cut)

    def _list(self, rows: Tensor | None, round_: int) -> None:
        a = self.attention
        for piece in self.kernels.bounds(a.query, a.key, self.v, self.g, self.lse, self.cut, self.rest, rows, **self.options):
            value = self.evaluate(piece.index, ordered=True)
            sums = self.kernels.segment_sums(value, piece.start).view(a.n_head, -1).T
            if piece.row is None:
                self.evaluated.copy_(sums)
                self.last.fill_(round_)
            else:
                at = piece.row.long()
                self.evaluated[at] = sums
                self.last[at] = round_
            self.counts.evaluated += len(value)
            self.listed.index.append(piece.index)
            self.listed.value.append(value)
            self.listed.round_.append(torch.full((len(value),), round_, dtype=torch.int32, device=value.device))

    def evaluate(self, index: Tensor, ordered: bool = False) -> Tensor:
        """Exact proximities of ``index [3, n]``."""
        a = self.attention
        if self.backend == "cuda" and a.value.dtype == a.w_o.dtype:
            from flowroutes_fast.cuda import pair_proximity as cuda_pairs

            alpha = pair_weights(a, Bounds(self.rest, self.rest, self.lse), index)
            return cuda_pairs(alpha, a.value, a.w_o, a.whole, index, a.gate, ordered=ordered)
        from flowroutes_fast.kernels.pairs import pair_proximity

        return pair_proximity(
            a.query, a.key, a.value, a.w_o, a.whole, self.lse, index, gate=a.gate, ordered=ordered, **self.options
        )

    def _normaliser(self) -> tuple[Tensor, Tensor]:
        low = self.base + self.evaluated.sum(1)
        return low, torch.where(self.cut > 0, low + self.rest.sum(1), low)

    def _open(self, low: Tensor, high: Tensor, assumed: Tensor) -> Tensor:
        """Rows of which a decision is open: the tolerance, what the cut assumed, or a part between a threshold's two ends."""
        found = (high - low > self.tolerance * (high + low)) | (low < assumed)
        for threshold in self.thresholds:
            found = found | ((self.others > threshold * low) & (self.others <= threshold * high)).any(0)
        if self.thresholds:
            ambiguous = torch.zeros(len(low), dtype=torch.int32, device=low.device)
            for index, value in zip(self.listed.index, self.listed.value, strict=True):  # a row's earlier lists hold the same sub-edges
                query = index[0].long()
                inside = torch.zeros_like(value, dtype=torch.bool)
                for threshold in self.thresholds:
                    inside |= (value > threshold * low[query]) & (value <= threshold * high[query])
                ambiguous.index_add_(0, query, inside.to(torch.int32))
            found = found | (ambiguous > 0)
        return found & (high > low)

    def _pairs(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sub-edges of pairs that may reach the floor, and per pair what its other heads may add (head -1), in order.

        Also the rows (int32) of which a sum over heads lies between a threshold's two ends.
        """
        a, n_key, n_head = self.attention, self.attention.n_key, self.attention.n_head
        pair, rest = self.kernels.pair_rests(
            a.query, a.key, self.v, self.g, self.lse, self.cut, self.floor * low, **self.options
        )
        index, value = torch.cat(self.listed.index, 1), torch.cat(self.listed.value)
        if len(self.listed.index) > 1:
            keep = torch.cat(self.listed.round_) == self.last[index[0].long()]
            index, value = index[:, keep], value[keep]
        if not index.shape[1] and not len(pair):
            return index, value, index.new_empty(0)
        name = (index[0].long() * n_key + index[1]) * (n_head + 1) + index[2] + 1
        name, value, summed = self._merged(name, value, pair, rest)
        query = name // ((n_head + 1) * n_key)
        known, others, at = summed
        lowest, highest, top = low[query], high[query], known + others
        unclear = (top > WELL_ABOVE * self.floor * lowest) & (others > 2 * self._of_rows(self.tolerance, query) * top)
        for threshold in self.thresholds:
            unclear = unclear | ((known <= threshold * highest) & (top > threshold * lowest))
        unclear = unclear & (others > 0)
        first = torch.zeros_like(unclear)
        first[at] = True
        pairs = (name // (n_head + 1))[unclear & first]
        if len(pairs):  # all heads of these
            heads = torch.arange(n_head, dtype=torch.int64, device=pairs.device)
            wanted = torch.stack([(pairs // n_key).expand(n_head, -1), (pairs % n_key).expand(n_head, -1), heads[:, None].expand(-1, len(pairs))])
            wanted = wanted.reshape(3, -1).to(torch.int32)
            every = self.evaluate(wanted, ordered=True)
            self.counts.evaluated += wanted.shape[1]
            mine = ~unclear & (name % (n_head + 1) > 0)
            left = ~unclear & (name % (n_head + 1) == 0)
            whole = (wanted[0].long() * n_key + wanted[1]) * (n_head + 1) + wanted[2] + 1
            name, value, (known, others, at) = self._merged(
                torch.cat([name[mine], whole]), torch.cat([value[mine], every]), name[left] // (n_head + 1), value[left]
            )
            query = name // ((n_head + 1) * n_key)
        between = torch.zeros_like(low, dtype=torch.int32)
        for threshold in self.thresholds:
            between.index_add_(0, query, ((known > threshold * low[query]) & (known <= threshold * high[query])).to(torch.int32))
        keep = (value > 0) & (known + others > self.floor * low[query])
        name, value = name[keep], value[keep]
        rest_of, head = name // (n_head + 1), name % (n_head + 1) - 1
        ambiguous = ((between > 0) & (high > low)).nonzero()[:, 0].to(torch.int32) if self.thresholds else between[:0]
        return torch.stack([rest_of // n_key, rest_of % n_key, head]).to(torch.int32), value, ambiguous

    @staticmethod
    def _of_rows(tolerance: float | Tensor, query: Tensor) -> float | Tensor:
        return tolerance[query] if isinstance(tolerance, Tensor) else tolerance

    def _merged(self, name: Tensor, value: Tensor, pair: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Sub-edges and remainders in the order of (query, key, head); of the pair of each: its known sum, its remainder; where pairs begin."""
        size = self.attention.n_head + 1
        name, value = torch.cat([name, pair * size]), torch.cat([value, rest])
        name, order = name.sort()
        value = value[order]
        _, inverse, count = torch.unique_consecutive(name // size, return_inverse=True, return_counts=True)
        start = torch.zeros(len(count) + 1, dtype=torch.int64, device=name.device)
        torch.cumsum(count, 0, out=start[1:])
        remainder = name % size == 0
        known = self.kernels.segment_sums(torch.where(remainder, 0, value), start)
        others = self.kernels.segment_sums(torch.where(remainder, value, 0), start)
        return name, value, (known[inverse], others[inverse], start[:-1])


def one_sided_pairs(attention: Attention, lse: Tensor, cut: Tensor) -> Tensor:
    """Pairs (query · key count + key, int64) of which one sign alone takes a sub-edge, or the sum over heads, past ``cut [query]``."""
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
    return torch.cat(found).unique()
