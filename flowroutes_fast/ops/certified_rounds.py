"""Certification in whole passes, for backends whose kernels do not go row by row, and signed flow in passes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowroutes_fast.ops import reference
from flowroutes_fast.ops.attention import Attention, visible
from flowroutes_fast.ops.bound import Bounds, bound, candidates
from flowroutes_fast.ops.intervals import Certified, Counts
from flowroutes_fast.ops.pairs import pair_weights, pairs

FIRST_CUT = 3e-4  # of what the normaliser is known to reach
REFINE = 0.2  # factor of the cut from one round to the next
ROUNDS = 4  # then a row is evaluated whole
EXACT_BYTES = 256 * 2**20  # candidate lists of rows that are evaluated whole


class Rounds:
    """Certification in whole passes: bound, list, evaluate, and again with a smaller cut for the rows that need it."""

    def __init__(
        self,
        attention: Attention,
        others: Tensor,
        floor: float,
        thresholds: tuple[float, ...],
        tolerance: float | Tensor,
        backend: str,
        capacity: int,
        slack: float,
        threads: int,
    ) -> None:
        self.attention, self.others, self.floor, self.thresholds, self.tolerance = (
            attention,
            others,
            floor,
            thresholds,
            tolerance,
        )
        self.backend, self.capacity, self.slack, self.threads = backend, capacity, slack, threads
        self.base = others.sum(0)
        self.counts = Counts(bounded=visible(attention))
        self.bounds: Bounds = bound(attention, backend, slack, threads)
        zero = torch.zeros_like(self.bounds.upper)
        self.evaluated = zero.clone()  # sums per row and head: of proximities, and of the same sub-edges' bounds
        self.covered = zero.clone()
        self.whole_rows = torch.zeros(attention.n_query, dtype=torch.bool, device=zero.device)
        self.found: dict[str, Tensor] = {}

    def run(self) -> Certified:
        ceiling = self.base + self.bounds.upper.sum(1)
        assumed = torch.maximum(self.base, 0.75 * ceiling)  # the normaliser is expected to reach this; checked below
        rows = torch.ones_like(self.whole_rows)
        cut = FIRST_CUT
        for round_ in range(ROUNDS):
            self._evaluate(rows, cut * assumed, self.floor * assumed)
            low, high = self._normaliser()
            rows = self._unrefined(low, high, assumed) & ~self.whole_rows
            if not bool(rows.any()):
                break
            self.counts.refined += int(rows.sum()) if round_ == 0 else 0
            assumed = torch.minimum(assumed, low)
            cut *= REFINE
        else:
            self._exhaust(rows)
        low, high = self._normaliser()
        return self._result(low, high)

    def _normaliser(self) -> tuple[Tensor, Tensor]:
        exact = self.base + self.evaluated.sum(1)
        rest = (self.bounds.upper - self.covered).clamp_min(0).sum(1)
        return exact, torch.where(self.whole_rows, exact, exact + rest)

    def _unrefined(self, low: Tensor, high: Tensor, assumed: Tensor) -> Tensor:
        open_ = high > low
        found = (high - low > self.tolerance * (high + low)) | (low < assumed)
        query, key, _ = self.found["index"].long()
        pair, first = torch.unique(query * self.attention.n_key + key, return_inverse=True)
        sums = torch.zeros(len(pair), dtype=low.dtype, device=low.device).index_add_(
            0, first, self.found["value"].to(low.dtype)
        )
        rows = torch.cat([query, pair // self.attention.n_key])
        values = torch.cat([self.found["value"].to(low.dtype), sums])
        for threshold in self.thresholds:
            inside = (self.others > threshold * low) & (self.others <= threshold * high)
            found = found | inside.any(0)
            at = rows[(values > threshold * low[rows]) & (values <= threshold * high[rows])]
            found[at] = True
        return found & open_

    def _evaluate(self, rows: Tensor, cut: Tensor, pair_cut: Tensor) -> None:
        """List and evaluate the given rows; rows that overflow are evaluated whole."""
        never = torch.full_like(cut, torch.inf)
        listed = candidates(
            self.attention,
            self.bounds,
            torch.where(rows, cut, never),
            torch.where(rows, pair_cut, never),
            self.backend,
            self.slack,
            self.capacity,
            self.threads,
        )
        overflowed = (listed.counts > self.capacity) & rows if self.capacity else torch.zeros_like(rows)
        keep = ~overflowed[listed.index[0].long()]
        self._take(rows & ~overflowed, listed.index[:, keep], listed.bound[keep])
        if bool(overflowed.any()):
            self._exhaust(overflowed)

    def _take(self, rows: Tensor, index: Tensor, upper: Tensor) -> None:
        """Evaluate a complete list of some rows' candidates; it replaces what was known of them."""
        value = pairs(self.attention, self.bounds, index, self.backend, self.threads)
        self.counts.evaluated += index.shape[1]
        for sums in (self.evaluated, self.covered):
            sums[rows] = 0
        at = (index[0].long(), index[2].long())
        self.evaluated.index_put_(at, value.to(self.evaluated.dtype), accumulate=True)
        self.covered.index_put_(at, upper.to(self.covered.dtype), accumulate=True)
        if self.found:
            keep = ~rows[self.found["index"][0].long()]
            index, value = (
                torch.cat([self.found["index"][:, keep], index], 1),
                torch.cat([self.found["value"][keep], value]),
            )
        self.found = {"index": index, "value": value}

    def _exhaust(self, rows: Tensor) -> None:
        """Evaluate every sub-edge with a positive bound of these rows, a few rows at a time."""
        row_bytes = 12 * self.attention.n_key * self.attention.n_head
        at_once = max(1, EXACT_BYTES // row_bytes)
        never = torch.full_like(self.base, torch.inf)
        for some in rows.nonzero()[:, 0].split(at_once):
            chosen = torch.zeros_like(rows)
            chosen[some] = True
            cut = torch.where(chosen, torch.zeros_like(never), never)
            everything = self.attention.n_key * self.attention.n_head
            listed = candidates(
                self.attention, self.bounds, cut, never, self.backend, self.slack, everything, self.threads
            )
            self._take(chosen, listed.index, listed.bound)
        self.whole_rows |= rows
        self.counts.exhausted += int(rows.sum())

    def _result(self, low: Tensor, high: Tensor) -> Certified:
        rest = torch.where(self.whole_rows[:, None], 0, (self.bounds.upper - self.covered).clamp_min(0))
        index, value = self.found["index"], self.found["value"]
        query, key, _ = index.long()
        pair, first = torch.unique(query * self.attention.n_key + key, return_inverse=True)
        sums = torch.zeros(len(pair), dtype=value.dtype, device=value.device).index_add_(0, first, value)
        # a pair's unlisted heads: none, if it was a candidate as a whole; such pairs alone can reach the floor
        keep = (value > 0) & (sums[first] > self.floor * low[query])
        return Certified(low, high, self.evaluated, self.evaluated + rest, index[:, keep], value[keep], self.counts)


def signed(attention: Attention, floor: float, backend: str, slack: float, threads: int) -> Certified:
    """Signed flow: known exactly from the bound pass; both signs are listed by bounding with g and with −g."""
    norm = attention.whole.abs().sum(-1)
    scale = torch.where(norm > 0, 1 / norm, 0)
    bounds = bound(attention, backend, 0.0, threads)
    if backend == "reference":
        share = _reference_shares(attention) * scale[:, None]
        listed = ((share.abs() > floor) | (share.sum(0).abs() > floor)) & (share != 0)
        index = listed.permute(1, 2, 0).nonzero().T
        value = share[index[2], index[0], index[1]]
        index = index.to(torch.int32)
    else:
        index, value = _both_signs(attention, bounds, floor, norm, backend, slack, threads)
    heads = bounds.flow * scale[:, None]
    return Certified(norm, norm, heads, heads, index, value, Counts(bounded=visible(attention)))


def _reference_shares(attention: Attention) -> Tensor:
    a = attention
    return reference.sign_flow(a.pattern, a.value, a.w_o, a.whole, row_scale=a.row_scale, gate=a.gate)


def _both_signs(
    attention: Attention, bounds: Bounds, floor: float, norm: Tensor, backend: str, slack: float, threads: int
) -> tuple[Tensor, Tensor]:
    """Sub-edges of all (query, key) pairs that one sign alone takes past the floor; a sum of both signs cannot pass
    it otherwise.
    """
    if backend == "cpu":
        mirrored = replace(attention)
        mirrored.__dict__["gradient"] = -attention.gradient
        lists = [
            candidates(side, bounds, floor * norm, floor * norm, backend, slack, 0, threads).index
            for side in (attention, mirrored)
        ]
        pair = torch.cat([index[0].long() * attention.n_key + index[1].long() for index in lists]).unique()
    else:
        from flowroutes_fast.ops.certified_gpu import one_sided_pairs

        assert bounds.lse is not None
        pair = one_sided_pairs(attention, bounds.lse, floor * norm)
    i, j = pair // attention.n_key, pair % attention.n_key
    heads = torch.arange(attention.n_head, dtype=torch.int64, device=pair.device)
    index = torch.stack([i.repeat_interleave(len(heads)), j.repeat_interleave(len(heads)), heads.repeat(len(pair))])
    if backend == "cpu":
        group = attention.n_head // attention.value.shape[0]
        weight = attention.pattern[index[2], index[0], index[1]]
        weight = weight if attention.row_scale is None else weight * attention.row_scale[index[0]]
    else:
        group = attention.n_head // attention.value.shape[0]
        weight = pair_weights(attention, bounds, index)
    dot = (attention.value[index[2] // group, index[1]].float() * attention.gradient[index[0], index[2]]).sum(-1)
    share = weight * dot / norm[index[0]].clamp_min(1e-38)
    table = share.view(len(pair), -1)
    keep = ((table.abs() > floor) | (table.sum(1, keepdim=True).abs() > floor)).flatten() & (share != 0)
    return index[:, keep].to(torch.int32), share[keep]
