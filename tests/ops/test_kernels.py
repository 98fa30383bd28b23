"""GPU kernels against the reference in fp64 on the same rounded inputs: on a GPU if there is one, in Triton's
interpreter otherwise.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
# The interpreter must be asked for before triton is imported, which other tests may have done: then a child process
# runs this file.
IN_CHILD = not ON_GPU and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not ON_GPU and not IN_CHILD:
    os.environ["TRITON_INTERPRET"] = "1"

# Largest error relative to |y|_1. 16-bit inputs are exact in the reference too; what is left is g (or a gated v) in two
# 16-bit numbers.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 2e-5}
DTYPES = tuple(TOLERANCE)
pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICE = "cuda" if ON_GPU else "cpu"

if IN_CHILD:

    def test_in_the_interpreter():
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", __file__], env=environment, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stdout[-5000:]

else:
    from flowroutes_fast.kernels import attention, bound, decide, dense, gradient, pairs, parts
    from flowroutes_fast.kernels.common import Tile
    from flowroutes_fast.ops import reference


class Case:
    """Random inputs of one layer, and fp64 copies of them."""

    def __init__(self, heads, group, queries, keys, d_qk, d_v, width, dtype=torch.float32, seed=0, **options):
        torch.manual_seed(seed)
        self.query, self.key = torch.randn(heads, queries, d_qk), torch.randn(heads // group, keys, d_qk)
        # heads adjacent in memory, and W_O as a linear layer stores it
        self.value = torch.randn(keys, heads // group, d_v).transpose(0, 1)
        self.w_o = (torch.randn(width, heads, d_v) / d_v**0.5).permute(1, 2, 0)
        self.whole = torch.randn(queries, width)
        self.gate = torch.rand(queries, heads, d_v) if options.pop("gate", False) else None
        self.row_scale = torch.rand(queries) + 0.5 if options.pop("row_scale", False) else None
        self.options = {"scaling": d_qk**-0.5, **options}
        self.sinks = torch.randn(heads) if self.options.pop("sinks", False) else None
        mask = self.options.pop("mask", None)
        if mask is not None:
            hidden = torch.rand((heads, queries, keys) if mask == "heads" else (queries, keys)) < 0.4
            hidden[..., 0, :] = queries > 1  # a row that sees nothing
            lowest = -torch.inf if mask == "heads" else torch.finfo(torch.float32).min
            self.options["mask"] = torch.randn(hidden.shape).masked_fill(hidden, lowest)
        for name in ("query", "key", "value", "w_o"):
            setattr(self, name, getattr(self, name).to(dtype))
        self.dtype, self.norm = dtype, self.whole.abs().sum(-1).double()
        self.to_device()
        mask = self.options.get("mask")
        exact = self.options | ({} if mask is None else {"mask": mask.double().masked_fill(mask < -1e30, -torch.inf)})
        sinks = None if self.sinks is None else self.sinks.double()
        self.pattern = reference.attention_pattern(
            self.query.double(), self.key.double(), sinks=sinks, **exact
        ).nan_to_num(0)
        self.extra = {
            k: None if t is None else t.double() for k, t in (("row_scale", self.row_scale), ("gate", self.gate))
        }
        self.exact = (self.pattern, self.value.double(), self.w_o.double(), self.whole.double())
        self.g = reference.sign_gradient(self.whole.double(), self.w_o.double(), self.extra["gate"])

    def to_device(self):
        for name, item in vars(self).items():
            if isinstance(item, torch.Tensor):
                setattr(self, name, item.to(DEVICE))
        self.options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}

    def rows(self, **options):
        return attention.attention_rows(
            self.query,
            self.key,
            self.value,
            self.g.float(),
            sinks=self.sinks,
            row_scale=self.row_scale,
            **self.options,
            **options,
        )

    def halves(self, tile=None):
        """What the passes take."""
        tile = tile or bound.tile_of(self.query, self.value.shape[2])
        g = gradient.gradient(self.whole, self.w_o, self.gate)
        return self.query, self.key, gradient.values(self.value, tile.columns), g, self.rows(tile=tile)[0]

    def bounds(self):
        """Exact sign bounds [head, query, key], and what the passes may add to them."""
        flow = reference.sign_flow(*self.exact, **self.extra)
        scale = 1 if self.row_scale is None else self.row_scale.double()[:, None]
        return flow.clamp_min(0), reference.bound_slack(self.pattern * scale, self.value.double(), self.g, 2.0**-9)

    def close(self, found, wanted, query_dim):
        """Within tolerance of |y|_1, everywhere."""
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        norm = self.norm.view([-1 if d == query_dim else 1 for d in range(found.dim())])
        error = ((found.double() - wanted).abs() / norm).nan_to_num(torch.inf)
        assert error.max() <= TOLERANCE[self.dtype], error.max()


# heads, group, queries, keys, d_qk, d_v, D
CASES = {
    "one": ((1, 1, 1, 1, 16, 16, 1), {}),
    "odd": ((6, 3, 33, 33, 20, 12, 123), {}),
    "offset": ((2, 1, 5, 33, 16, 24, 33), {"row_scale": True}),
    "window": ((4, 2, 33, 49, 8, 16, 33), {"window": 9, "softcap": 2.0, "sinks": True}),
    "mask": ((2, 2, 18, 33, 16, 5, 33), {"mask": "all", "sinks": True}),
    "head_mask": ((3, 1, 17, 5, 16, 16, 33), {"mask": "heads", "softcap": 5.0}),
    "wide": ((2, 2, 5, 18, 80, 112, 40), {"row_scale": True}),
    "gate": ((4, 2, 18, 18, 16, 16, 33), {"gate": True, "row_scale": True, "window": 30}),
}
KINDS = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# everything on a GPU; the interpreter takes seconds for each, so there every shape meets one type and one shape meets
# all
EVERY = [
    (s, t) for n, s in enumerate(CASES) for m, t in enumerate(DTYPES) if ON_GPU or s == "odd" or m == n % len(DTYPES)
]
SHAPES = pytest.mark.parametrize(("shape", "dtype"), EVERY, ids=lambda x: str(x).removeprefix("torch."))


def make(shape, dtype=torch.float32):
    sizes, options = CASES[shape]
    return Case(*sizes, dtype=dtype, **options)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fresh memory is full of NaN: whatever is not written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))


def every_edge(case):
    heads, queries, keys = case.pattern.shape
    index = torch.cartesian_prod(torch.arange(queries), torch.arange(keys), torch.arange(heads)).T.to(
        DEVICE, torch.int32
    )
    order = torch.randperm(index.shape[1])
    return index[:, (order if ON_GPU else order[:300]).to(DEVICE)]


if not IN_CHILD:

    @SHAPES
    def test_rows(shape, dtype):
        case = make(shape, dtype)
        lse, signed = case.rows()
        flow = reference.sign_flow(*case.exact, **case.extra)
        case.close(signed, flow.sum(-1).T, 0)
        total = case.pattern.sum(-1)
        assert ((lse == -torch.inf) <= (total == 0)).all()
        alone, nothing = attention.attention_rows(case.query, case.key, sinks=case.sinks, **case.options)
        assert nothing is None
        torch.testing.assert_close(alone, lse)

    @SHAPES
    def test_halves(shape, dtype):
        """What 16 bits stand for, and how far they are from it: never less than the truth, and little more."""
        case = make(shape, dtype)
        _, _, v, g, _ = case.halves()
        error = torch.linalg.vector_norm(case.g - g.half.double() * g.scale.double()[..., None], dim=-1)
        size = torch.linalg.vector_norm(case.g, dim=-1)
        assert (error <= g.error * g.scale).all()
        assert (g.error * g.scale <= 2.0**-10 * size + 1e-30).all()
        assert (size <= (g.length + g.error) * g.scale * (1 + 1e-6)).all()
        block = bound.tile_of(case.query, v.half.shape[2]).columns
        of_block = torch.arange(case.key.shape[1], device=DEVICE) // block
        scale = v.scale[:, of_block]
        error = torch.linalg.vector_norm(case.value.double() - v.half.double() * scale.double()[..., None], dim=-1)
        assert (error <= v.error[:, of_block] * scale).all()
        assert (torch.linalg.vector_norm(v.half.double(), dim=-1) <= v.length[:, of_block]).all()
        assert dtype == torch.float32 or float((v.error / v.length.clamp_min(1e-30)).max()) < 1e-6

    @SHAPES
    def test_bounds(shape, dtype):
        case = make(shape, dtype)
        exact, slack = case.bounds()
        cut = exact.amax((0, 2)).float() * 0.3
        inputs = case.halves()
        rest = torch.full_like(case.rows()[1], torch.nan)
        heads, queries, keys = exact.shape
        (piece,) = bound.bounds(*inputs, cut, rest, row_scale=case.row_scale, **case.options)
        i, j, h = piece.index.long()
        assert (((h * queries + i) * keys + j).diff() > 0).all(), "sorted by head, query, key, without duplicates"
        torch.testing.assert_close(
            piece.start.diff().view(heads, queries),
            torch.zeros(heads, queries, dtype=torch.int64, device=DEVICE).index_put_(
                (h, i), torch.ones_like(h), accumulate=True
            ),
        )
        listed = torch.zeros(exact.shape, dtype=torch.bool, device=DEVICE)
        listed[h, i, j] = True
        margin = TOLERANCE[dtype] * case.norm[:, None]
        assert ((exact > cut[:, None] + margin) <= listed).all()
        assert (listed <= (exact + slack > cut[:, None] - margin)).all()
        left = (exact * ~listed).sum(-1).T
        assert (rest.double() >= left - margin).all()
        assert (rest.double() <= (1 + 2.0**-11) * (left + slack.sum(-1).T) + margin).all()
        # some rows, in pieces; the others keep what they had
        some = torch.arange(0, queries, 2, dtype=torch.int32, device=DEVICE)
        again = torch.full_like(rest, -1.0)
        columns = bound.tile_of(case.query, case.value.shape[2]).columns
        n_word = -(-keys // columns) * (columns // 32)
        before, bound.BITS = bound.BITS, 4 * heads * n_word * 3
        try:
            pieces = list(bound.bounds(*inputs, cut, again, some, row_scale=case.row_scale, **case.options))
        finally:
            bound.BITS = before
        assert len(pieces) == -(-len(some) // 3)
        torch.testing.assert_close(again[some.long()], rest[some.long()])
        assert (again[1::2] == -1).all()
        index = torch.cat([p.index for p in pieces], 1).long()
        mine = set(zip(*index.tolist(), strict=True))
        assert mine == {t for t in zip(*piece.index.tolist(), strict=True) if t[0] % 2 == 0}

    @SHAPES
    def test_sums_below(shape, dtype):
        case = make(shape, dtype)
        exact, slack = case.bounds()
        cut = exact.amax((0, 2)).float() * 0.7
        found = bound.sums_below(*case.halves(), cut, row_scale=case.row_scale, **case.options).double()
        margin = TOLERANCE[dtype] * case.norm[:, None]
        low, high = exact.permute(1, 0, 2), (exact + slack).permute(1, 0, 2)
        for level in range(bound.LEVELS + 1):
            limit = cut.double()[:, None, None] * bound.RATIO**level if level < bound.LEVELS else torch.inf
            assert (found[level] >= torch.where(high <= limit * (1 - 1e-6), low, 0).sum(2) - margin).all()
            assert (
                found[level] <= (1 + 2.0**-11) * torch.where(low <= limit * (1 + 1e-6), high, 0).sum(2) + margin
            ).all()

    @SHAPES
    def test_pair_rests(shape, dtype):
        case = make(shape, dtype)
        exact, slack = case.bounds()
        keys = exact.shape[2]
        cut, pair_cut = exact.amax((0, 2)).float() * 0.5, exact.sum(0).amax(-1).float() * 0.4
        margin = TOLERANCE[dtype] * case.norm[:, None] * len(exact)
        for capacity in (0, 1):  # too small a buffer is made again
            pair, rest = bound.pair_rests(
                *case.halves(), cut, pair_cut, row_scale=case.row_scale, capacity=capacity, **case.options
            )
            pair, order = pair.sort()
            rest = rest[order]
            assert (pair.diff() > 0).all()
            i, j = pair // keys, pair % keys
            low = torch.where(exact + slack <= cut[:, None] * (1 - 1e-6), exact, 0).sum(0)
            high = torch.where(exact <= cut[:, None] * (1 + 2.0**-10), exact + slack, 0).sum(0)
            assert (rest.double() >= low[i, j] - margin[i, 0]).all()
            assert (rest.double() <= (1 + 2.0**-11) * high[i, j] + margin[i, 0]).all()
            listed = torch.zeros_like(low, dtype=torch.bool)
            listed[i, j] = True
            assert (((exact.sum(0) > pair_cut[:, None] + margin) & (low > margin)) <= listed).all()
            assert (listed <= ((exact + slack).sum(0) * (1 + 2.0**-11) > pair_cut[:, None] - margin)).all()

    @SHAPES
    def test_pair_rests_of_some_rows(shape, dtype):
        case = make(shape, dtype)
        exact, _ = case.bounds()
        keys, inputs = exact.shape[2], case.halves()
        cut, pair_cut = exact.amax((0, 2)).float() * 0.5, exact.sum(0).amax(-1).float() * 0.4
        row = torch.arange(0, exact.shape[1], 3, dtype=torch.int32, device=DEVICE)
        options = {"row_scale": case.row_scale, **case.options}
        every, some = (
            {int(p): float(r) for p, r in zip(*bound.pair_rests(*inputs, cut, pair_cut, which, **options), strict=True)}
            for which in (None, row)
        )
        assert some.keys() == {p for p in every if p // keys % 3 == 0}
        assert all(every[p] == pytest.approx(r, rel=1e-5) for p, r in some.items())

    def test_segment_sums():
        start = torch.tensor([0, 0, 5, 40, 40, 100], device=DEVICE)
        value = torch.randn(100, device=DEVICE)
        wanted = torch.stack([value[a:b].sum() for a, b in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)])
        torch.testing.assert_close(bound.segment_sums(value, start), wanted)

    @SHAPES
    def test_pairs(shape, dtype):
        case = make(shape, dtype)
        lse, index = case.rows()[0], every_edge(case)
        exact = reference.pair_proximity(*case.exact, index, **case.extra)
        found = pairs.pair_proximity(
            case.query,
            case.key,
            case.value,
            case.w_o,
            case.whole,
            lse,
            index,
            row_scale=case.row_scale,
            gate=case.gate,
            **case.options,
        )
        assert ((found - exact).abs() <= TOLERANCE[dtype] * case.norm[index[0].long()]).all()

    @SHAPES
    def test_dense(shape, dtype):
        case = make(shape, dtype)
        exact = reference.attention_proximity(*case.exact, **case.extra)
        inputs = (case.query, case.key, case.value, case.w_o, case.whole, case.rows()[0])
        case.close(dense.dense_proximity(*inputs, row_scale=case.row_scale, gate=case.gate, **case.options), exact, 1)
        if case.gate is None:
            case.close(dense.dense_heads(*inputs, row_scale=case.row_scale, **case.options), exact.sum(-1).T, 0)

    @pytest.mark.parametrize("tile", [(16, 32, 8, 2, 16), (32, 16, 4, 1, 0)], ids=["chunks", "whole"])
    @pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[-1:], ids=lambda d: str(d)[6:])
    def test_tiles_agree(tile, dtype):
        """Any tile gives the same numbers: here the head's width is taken in pieces, and at once."""
        case = Case(4, 2, 33, 33, 40, 33, 70, dtype=dtype, gate=True)
        tile = Tile(*tile)
        if dtype == torch.float32 and not tile.chunk:
            tile = tile._replace(chunk=64)
        exact, _slack = case.bounds()
        cut = exact.amax((0, 2)).float() * 0.3
        tile = tile._replace(columns=32)
        inputs = case.halves(tile)
        rest = torch.empty(33, 4, device=DEVICE)
        (piece,) = bound.bounds(*inputs, cut, rest, tile=tile, **case.options)
        i, j, h = piece.index.long()
        listed = torch.zeros(exact.shape, dtype=torch.bool, device=DEVICE)
        listed[h, i, j] = True
        margin = TOLERANCE[dtype] * case.norm[:, None]
        assert ((exact > cut[:, None] + margin) <= listed).all()
        assert (rest.double() >= (exact * ~listed).sum(-1).T - margin).all()
        exact = reference.pair_proximity(*case.exact, piece.index, **case.extra)
        inputs = (case.query, case.key, case.value, case.w_o, case.whole, inputs[4], piece.index)
        found = pairs.pair_proximity(*inputs, gate=case.gate, tile=tile, ordered=True, **case.options)
        assert ((found - exact).abs() <= TOLERANCE[dtype] * case.norm[i]).all()

    def test_pairs_of_wide_values():
        """Values in fp32 (a bias was taken out) with W_O in 16 bits: multiplied as two 16-bit numbers."""
        case = Case(4, 2, 20, 20, 16, 24, 60, dtype=torch.bfloat16)
        value = case.value.float() + torch.randn(2, 1, 24).to(DEVICE) / 3
        exact = reference.pair_proximity(case.pattern, value.double(), *case.exact[2:], index := every_edge(case))
        found = pairs.pair_proximity(
            case.query, case.key, value, case.w_o, case.whole, case.rows()[0], index, **case.options
        )
        assert ((found - exact).abs() <= TOLERANCE[torch.bfloat16] * case.norm[index[0].long()]).all()

    @pytest.mark.parametrize("per_row", [False, True])
    def test_decisions(per_row):
        """Every pair of random lists, by the rules in plain Python."""
        g = torch.Generator().manual_seed(0)
        rows, keys, heads = 7, 50, 5
        name = torch.randint(rows * keys * (heads + 1), (700,), generator=g).unique()
        value = torch.rand(len(name), generator=g) * 0.08
        low = 0.5 + torch.rand(rows, generator=g)
        high, thresholds = low * (1 + 0.2 * torch.rand(rows, generator=g)), torch.tensor([0.02, 0.05])
        high[3] = low[3]
        tolerance = torch.rand(rows, generator=g) * 0.2 if per_row else 0.1
        moved = [
            t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in (name, value, low, high, tolerance, thresholds)
        ]
        state, open_, unclear = decide.pair_states(*moved, size=heads + 1, n_key=keys, floor=0.01, well=4.0)
        pairs_ = {}
        for n, v in zip(name.tolist(), value.tolist(), strict=True):
            known, rest = pairs_.get(n // (heads + 1), (0.0, 0.0))
            pairs_[n // (heads + 1)] = (known + v, rest) if n % (heads + 1) else (known, rest + v)
        wanted, opened, count = {}, [0] * rows, 0
        for pair, (known, rest) in pairs_.items():
            q = pair // keys
            a, b, share = float(low[q]), float(high[q]), float(tolerance[q]) if per_row else 0.1
            vague = any(known <= t * b and known + rest > t * a for t in thresholds.tolist())
            vague = rest > 0 and (vague or (known + rest > 0.04 * a and rest > 2 * share * (known + rest)))
            opened[q] |= rest == 0 and b > a and any(t * a < known <= t * b for t in thresholds.tolist())
            wanted[pair] = decide.UNCLEAR if vague else decide.KEPT if known + rest > 0.01 * a else decide.DROPPED
            count += vague
        assert state.tolist() == [wanted[n // (heads + 1)] for n in name.tolist()]
        assert open_.tolist() == opened
        assert int(unclear) == count > 0
        assert any(opened)
        index = torch.stack([name // ((heads + 1) * keys), name, name]).to(torch.int32).to(DEVICE)
        marked = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        decide.mark_open(index, moved[1], moved[2], moved[3], moved[5], marked)
        a, b = low[index[0].long().cpu()], high[index[0].long().cpu()]
        inside = ((value > 0.02 * a) & (value <= 0.02 * b)) | ((value > 0.05 * a) & (value <= 0.05 * b))
        assert marked.nonzero()[:, 0].tolist() == index[0].cpu()[inside].unique().tolist()
        empty = decide.pair_states(
            name[:0].to(DEVICE), value[:0].to(DEVICE), *moved[2:], size=6, n_key=keys, floor=0.01, well=4.0
        )
        assert not empty[1].any()
        assert not len(empty[0])

    @pytest.mark.parametrize("of", ["values", "gradient"])
    @KINDS
    def test_bounds_hold_where_16_bits_lose_most(of, dtype):
        """Every number lies half a step of float16 above one, and is rounded down: without slack no bound would
        hold.
        """
        if of == "values" and dtype != torch.float32:
            return  # float16 holds values of 16 bits
        case = Case(2, 1, 9, 9, 16, 16, 40, dtype=dtype)
        half_step = 1 + 2.0**-11
        case.whole[:] = 1e3  # nothing is clipped, and all signs agree
        case.value[:] = half_step if of == "values" else 1.0
        case.w_o[:] = 0
        case.w_o[:, :, 0] = 1.0
        case.w_o[:, :, 1] = 2.0**-11 if of == "gradient" else 0.0
        case.exact = (case.pattern, case.value.double(), case.w_o.double(), case.whole.double())
        inputs = case.halves()
        rest = torch.empty(9, 2, device=DEVICE)
        next(bound.bounds(*inputs, torch.full((9,), torch.inf, device=DEVICE), rest, **case.options))
        by_head = reference.attention_proximity(*case.exact).sum(-1).T
        torch.testing.assert_close(by_head, torch.full_like(by_head, 16 * half_step), rtol=1e-5, atol=0)
        assert (rest.double() >= by_head).all()
        assert (rest.double() <= by_head * 1.002).all()
        levels = bound.sums_below(*inputs, torch.zeros(9, device=DEVICE), **case.options)[-1]
        assert (levels.double() >= by_head).all()

    def test_a_gradient_that_cancels_says_how_far_it_may_be_off():
        """Sums of large numbers that leave little: what fp32 adds up wrongly is part of the error."""
        case = Case(1, 1, 3, 3, 16, 16, 64)
        case.whole[:] = 1.0
        case.w_o *= 1e6
        case.w_o[..., 32:] = torch.randn(1, 16, 32) - case.w_o[..., :32]
        g = reference.sign_gradient(case.whole.double(), case.w_o.double())
        found = gradient.gradient(case.whole, case.w_o)
        error = torch.linalg.vector_norm(g - found.half.double() * found.scale.double()[..., None], dim=-1)
        assert (error > 2.0**-11 * torch.linalg.vector_norm(g, dim=-1)).all()  # far more than 16 bits lose
        assert (error <= found.error * found.scale).all()

    @pytest.mark.parametrize("outliers", [False, True])
    @KINDS
    def test_bounds_hold(dtype, outliers):
        """No bound is below its proximity where all signs agree and nothing is clipped: there they are equal."""
        case = Case(4, 2, 33, 33, 16, 24, 60, dtype=dtype)
        if outliers:
            case.w_o[:, ::3] *= 300
            case.value[:, ::5] *= 1e4
            case.exact = (case.pattern, case.value.double(), case.w_o.double(), case.exact[3])
        case.whole *= 1e6  # terms are not clipped
        case.exact = (*case.exact[:3], case.whole.double())
        inputs = case.halves()
        rest = torch.empty(33, 4, device=DEVICE)
        infinite = torch.full((33,), torch.inf, device=DEVICE)
        assert next(bound.bounds(*inputs, infinite, rest, **case.options)).index.shape == (3, 0)
        by_head = reference.attention_proximity(*case.exact).sum(-1).T
        assert (rest.double() >= by_head).all()

    @pytest.mark.parametrize("width", [1, 33, 123, 2050])
    @KINDS
    def test_parts(width, dtype):
        torch.manual_seed(0)
        whole = torch.randn(5, width + 7).to(DEVICE, dtype)[:, :width]
        for part in (torch.randn(5, width), torch.randn(1, width), torch.randn(width, 5).T):
            part = part.to(DEVICE, dtype)
            found = parts.part_proximity(part, whole)
            exact = reference.proximity(part.double(), whole.double())
            assert ((found - exact).abs() <= TOLERANCE[dtype] * whole.double().abs().sum(-1)).all()

    def test_signs_of_zero():
        part, whole = torch.tensor([[-1.0, 2.0]], device=DEVICE), torch.tensor([[-0.0, 4.0]], device=DEVICE)
        torch.testing.assert_close(parts.part_proximity(part, whole), reference.proximity(part, whole))

    def test_nothing_to_do():
        case = make("odd")
        index = torch.zeros(3, 0, dtype=torch.int32, device=DEVICE)
        inputs = (case.query, case.key, case.value, case.w_o, case.whole, case.rows()[0])
        assert pairs.pair_proximity(*inputs, index, **case.options).shape == (0,)

    def test_certified_layer():
        """Bound, list, evaluate, refine: intervals hold the exact normaliser, and everything above the floor is
        listed with its value.
        """
        from flowroutes_fast.ops.attention import Attention
        from flowroutes_fast.ops.certified import certified

        case = Case(4, 2, 20, 20, 16, 16, 48, dtype=torch.bfloat16, sinks=True, row_scale=True)
        a = Attention(
            case.query,
            case.key,
            case.value,
            case.w_o,
            case.whole,
            case.options["scaling"],
            sinks=case.sinks,
            row_scale=case.row_scale,
        )
        others = case.whole.abs().sum(-1)[None] * 0.1
        found = certified(a, others, floor=0.01, thresholds=(0.05,), backend="triton")
        exact = reference.attention_proximity(*case.exact, **case.extra)
        total, slack = exact.sum((0, 2)) + others[0], TOLERANCE[torch.bfloat16] * case.norm
        assert (found.low <= total + slack).all()
        assert (total <= found.high + slack).all()
        query, key, head = found.index.long()
        named = head >= 0
        query, key, head, value = query[named], key[named], head[named], found.value[named]
        assert ((value - exact[head, query, key]).abs() <= slack[query]).all()
        listed, rest = torch.zeros_like(exact), torch.zeros_like(exact[0])
        listed[head, query, key] = value.double()
        rest[found.index[0][~named].long(), found.index[1][~named].long()] = found.value[~named].double()
        missing = exact.sum(0) - listed.sum(0)
        assert ((missing <= rest + slack[:, None]) | (exact.sum(0) <= 0.0101 * total[:, None])).all()
