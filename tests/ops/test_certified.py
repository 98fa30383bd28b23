"""Certified intervals against float64: figures, decisions, routes, memory."""

import gc
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import IOI, KINDS, tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from layer_cases import CASES, TOLERANCE, check, doubled, layer, needs_native, truth

import flowroutes_fast as fr
from flowroutes_fast.ops import native, reference
from flowroutes_fast.ops.attention import Attention
from flowroutes_fast.ops.bound import bound
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.ops.pairs import pairs

WAYS = ["reference", pytest.param("cpu", marks=needs_native), pytest.param("cpu, in passes", marks=needs_native)]


IDS = list(range(7, 36))


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Certify also where evaluating everything is cheaper, as it is for the few keys of these tests."""
    monkeypatch.setattr("flowroutes_fast.tracing.importances.FEW_KEYS", 0)


def run(a, others, way, **options):
    options = {"floor": 1e-3, **options}
    return certified(a, others, backend=way.split(",")[0], fused="," not in way, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(c) or "plain")
def test_intervals_hold_the_truth(way, case):
    a, others = layer(0, **case)
    for options in ({}, {"floor": 0.02, "thresholds": (0.05,)}):
        check(run(a, others, way, **options), a, others, options.get("floor", 1e-3))


@pytest.mark.parametrize("way", WAYS)
def test_tolerance_zero_evaluates_rows_whole(way):
    a, others = layer(1, 40)
    found = run(a, others, way, tolerance=0.0)
    assert found.counts.refined > 0
    torch.testing.assert_close(found.low, found.high, rtol=1e-6, atol=0)
    total = truth(a).sum((0, 2)) + others.double().sum(0)
    torch.testing.assert_close(found.low.double(), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_the_normaliser_is_known_to_the_tolerance(way, tolerance, much_open):
    a, others = layer(1, 40)
    found = run(a, others, way, tolerance=tolerance, floor=0.1)
    error = (found.high - found.low) / (found.high + found.low)
    assert tolerance * 0.1 < float(error.max()) <= tolerance * (1 + 1e-5)
    check(found, a, others, 0.1)


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize(("d_model", "small"), [(48, 1.0), (67, 0.2), (130, 0.02)])
def test_channels_told_apart_by_u_in_steps(isa, d_model, small):
    """Where u of all keys is at hand in 8 bits, evaluations leave out no channel that counts: every sub-edge is the
    float64 one, also where u = 0 or is tiny.
    """
    a, others = layer(4, 40, d_model=d_model)
    a.whole[:, ::3] *= small  # many channels that parts pass
    a.value[:, 3], a.value[:, 5] = 0, a.value[:, 5] * 1e-25
    wanted = truth(a)
    with native.instruction_set(isa):
        found = run(a, others, "cpu", tolerance=0.0, floor=1e-6)
    query, key, head = found.index.long()[:, found.index[2] >= 0]
    unit = a.whole.double().abs().sum(-1)[query]
    error = (found.value[found.index[2] >= 0].double() - wanted[head, query, key]).abs() / unit
    assert len(query) > 1000
    assert float(error.max()) < 5e-7
    total = wanted.sum((0, 2)) + others.double().sum(0)
    torch.testing.assert_close(found.low.double(), total, rtol=1e-5, atol=0)


@pytest.fixture
def much_open(monkeypatch):
    """Wide intervals: what a row is expected to have in sub-edges of no account is evaluated only where it must be."""
    for name in ("certified", "certified_rounds"):
        monkeypatch.setattr(f"flowroutes_fast.ops.{name}.FIRST_CUT", 0.05)


@pytest.mark.parametrize("way", WAYS)
def test_pairs_that_may_reach_the_floor_are_listed(way, much_open):
    between = 0
    for seed in range(4):
        a, others = layer(seed, 40, heads=12)
        found = run(a, others, way, tolerance=0.4, floor=0.03)
        check(found, a, others, 0.03)
        total, pair = truth(a).sum((0, 2)) + others.double().sum(0), truth(a).sum(0)
        between += int(((pair > 0.03 * total[:, None]) & (pair < 0.03 * found.high[:, None])).sum())
    assert between > 3  # the floor of the upper end would miss these


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_the_lower_end_where_all_signs_agree(isa, much_open):
    """A hundred equal sub-edges as long as the values of a class may be: what a chord takes off their bounds is
    what is to be taken off.
    """
    ones, nothing = torch.ones(1, 100, 1), torch.zeros(1, 100, 1)
    whole = torch.tensor([0.001] * 6 + [0.01001] + [2.0] * 89)[None]
    a = Attention(nothing[:, :1], nothing, ones, torch.ones(1, 1, 96), whole, 1.0)
    with native.instruction_set(isa):
        found = run(a, torch.tensor([[30.0]]), "cpu", tolerance=0.4, floor=0.05)
    assert found.counts.evaluated == 0
    total = 30 + float(truth(a).sum())
    assert total * (1 - 1e-4) <= float(found.low) <= total * (1 + 1e-6)
    assert float(found.high) == pytest.approx(30 + 96, rel=1e-5)


@needs_native
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join(c) or "plain")
def test_every_instruction_set_holds_the_truth(isa, case):
    a, others = layer(1, **case)
    with native.instruction_set(isa):
        check(run(a, others, "cpu", floor=0.02, thresholds=(0.05,)), a, others, 0.02)


@pytest.mark.parametrize("way", WAYS)
def test_tolerance_per_row(way):
    a, others = layer(1, 40)
    tolerance = torch.full((40,), 0.5)
    tolerance[[3, 30]] = 0
    found = run(a, others, way, tolerance=tolerance)
    width = found.high - found.low
    assert width[[3, 30]].max() <= 1e-6 * found.high.max()
    assert width.max() > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_full_candidate_buffer_falls_back_to_exact(way):
    a, others = layer(2, 25)
    found = run(a, others, way, capacity=1, tolerance=0.5)
    assert found.counts.exhausted > 15
    check(found, a, others, 1e-3)
    torch.testing.assert_close(found.low[5:], found.high[5:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("floor", [1e-3, 0.03])
def test_nothing_is_ambiguous_at_the_thresholds_asked_for(way, floor, much_open):
    wanted = tuple(t for t in (0.01, 0.02, 0.03, 0.05, 0.1) if t >= floor)
    for seed in range(5):
        a, others = layer(seed, 30, heads=12)
        found = run(a, others, way, thresholds=wanted, tolerance=0.3, floor=floor)
        check(found, a, others, floor)
        near = torch.cat([truth(a).permute(1, 0, 2).flatten(1), truth(a).sum(0), others.T.double()], 1)
        for threshold in wanted:
            low, high = threshold * found.low.double()[:, None], threshold * found.high.double()[:, None]
            slack = 1e-6 * high
            assert not ((near > low + slack) & (near <= high - slack)).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "what", ["zeros in y", "denormals", "tiny numbers", "a head that writes nothing", "all equal", "a state of zeros"]
)
def test_edge_cases(way, what):
    a, others = layer(4, 20)
    if what == "zeros in y":
        a.whole[:, ::3] = 0
        a.whole[:, 1::6] = -0.0
    elif what == "denormals":
        a.whole.mul_(1e-41)
        a.value.mul_(1e-41)
    elif what == "tiny numbers":  # whose squares are nothing
        a.whole.mul_(1e-25)
        a.value.mul_(1e-25)
        others = others * 1e-25
    elif what == "a head that writes nothing":
        a.w_o[2] = 0
    elif what == "all equal":
        for t in (a.query, a.key, a.value, a.w_o, a.whole):
            t.fill_(0.5)
    else:
        a.whole.zero_()
    others = others * 0 if what == "a state of zeros" else others
    found = run(a, others, way)
    assert torch.isfinite(found.low).all()
    check(found, a, others, 1e-3)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 60),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.integers(1, 40),
    width=st.integers(1, 90),
    window=st.integers(0, 9),
    outliers=st.booleans(),
    floor=st.sampled_from([1e-4, 1e-3, 0.05]),
)
def test_random_layers(seed, tokens, kv, group, d, width, window, outliers, floor):
    a, others = layer(
        seed,
        tokens,
        heads=kv * group,
        kv=kv,
        d_qk=d,
        d_v=d,
        d_model=width + 2 * outliers,
        outliers=outliers,
        window=window,
    )
    check(run(a, others, "cpu", floor=floor, thresholds=(0.06,)), a, others, floor)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_query=st.integers(1, 30),
    more=st.integers(0, 20),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d_qk=st.integers(1, 24),
    d_v=st.integers(1, 24),
    width=st.integers(1, 60),
    window=st.integers(0, 6),
    softcap=st.sampled_from([0.0, 3.0]),
    extra=st.sets(st.sampled_from(["mask", "sinks", "row_scale", "gate"])),
    isa=st.sampled_from(native.instruction_sets() or ["auto"]),
)
def test_random_layers_of_every_kind(seed, n_query, more, kv, group, d_qk, d_v, width, window, softcap, extra, isa):
    """Intervals, listed pairs, bounds and signed flow, with everything that attention may have."""
    options = dict.fromkeys(extra - {"mask"}, True)
    if "mask" in extra:
        hidden = torch.rand(n_query, n_query + more, generator=torch.Generator().manual_seed(seed)) < 0.3
        hidden[:, 0] = False  # every row sees something
        options["mask"] = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    a, others = layer(
        seed,
        n_query,
        n_query + more,
        heads=kv * group,
        kv=kv,
        d_qk=d_qk,
        d_v=d_v,
        d_model=width,
        window=window,
        softcap=softcap,
        **options,
    )
    exact, near = doubled(a), truth(a)
    flow = reference.sign_flow(
        exact.pattern, exact.value, exact.w_o, exact.whole, row_scale=exact.row_scale, gate=exact.gate
    )
    norm = exact.whole.abs().sum(-1)
    unit = TOLERANCE * torch.maximum(norm, flow.abs().sum((0, 2)))
    index = torch.stack(
        [
            torch.randint(n, (40,), generator=torch.Generator().manual_seed(seed))
            for n in (n_query, n_query + more, len(near))
        ]
    )
    query, key, head = index
    with native.instruction_set(isa):
        check(run(a, others, "cpu", thresholds=(0.06,)), a, others, 1e-3)
        found = bound(a, "cpu")
        assert ((found.upper - flow.clamp_min(0).sum(-1).T).abs() <= unit[:, None]).all()
        assert ((found.flow - flow.sum(-1).T).abs() <= unit[:, None]).all()
        assert ((pairs(a, found, index, "cpu") - near[head, query, key]).abs() <= unit[query]).all()
        signed = run(a, others, "cpu", measure="signed")
        assert ((signed.head_low * norm[:, None] - flow.sum(-1).T).abs() <= unit[:, None]).all()


@pytest.mark.parametrize("measure", ["proximity", "signed"])
def test_backends_agree_on_a_signed_and_on_a_bounded_layer(measure):
    a, others = layer(5, 33, window=9)
    tables = []
    for backend in ("reference", "cpu"):
        found = certified(a, others, floor=0.01, backend=backend, measure=measure)
        rows = zip(*found.index.tolist(), found.value.tolist(), strict=True)
        tables.append(
            {
                (q, k, h): v
                for q, k, h, v in rows
                if h >= 0 and abs(v) > 0.02 * (1 if measure == "signed" else float(found.high[q]))
            }
        )
    assert tables[0].keys() == tables[1].keys()
    for at, value in tables[0].items():
        assert value == pytest.approx(tables[1][at], rel=1e-4, abs=1e-5)


def same_route(a, b):
    columns = ["layer", "kind", "source", "target"]
    x, y = (route.token_edges.sort_values(columns, ignore_index=True) for route in (a, b))
    assert x[columns].equals(y[columns])
    if not a.renormalize:  # sums over heads, of which the small ones are known as an interval
        np.testing.assert_allclose(x.importance, y.importance, rtol=0.5)
        clear = y.importance > 0.011
        np.testing.assert_allclose(x.importance[clear], y.importance[clear], rtol=0.03)
    else:
        np.testing.assert_allclose(x.importance, y.importance, rtol=1e-4)
        every = [*columns, "head"]
        p, q = (route.edges.sort_values(every, ignore_index=True) for route in (a, b))
        assert p[every].equals(q[every])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_certified_routes_are_exact_routes(kind, renormalize):
    model = tiny(kind)
    a, b = fr.trace(model, None, IDS), fr.trace(model, None, IDS, precision="exact")
    torch.testing.assert_close(
        a.heads.sum(-1) + a.attention_residual + a.attention_bias + (a.ffn if kind == "neox" else 0),
        torch.ones(3, len(IDS)),
    )
    assert (a.heads_low <= b.heads + 1e-5).all()
    assert (b.heads <= a.heads_high + 1e-5).all()
    for threshold in (0.0013, 0.01, 0.0222, 0.04, 0.11):
        same_route(
            a.route(threshold=threshold, renormalize=renormalize), b.route(threshold=threshold, renormalize=renormalize)
        )


@example(
    seed=203687, kind="neox", threshold=0.0078125, renormalize=False, tokens=39
)  # rows whose normaliser is known before all its pairs are
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    threshold=st.floats(0.001, 0.3),
    renormalize=st.booleans(),
    tokens=st.integers(1, 40),
)
def test_random_routes(seed, kind, threshold, renormalize, tokens):
    ids = torch.randint(0, 101, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    model = tiny(kind)
    a = fr.trace(model, None, ids, tolerance=0.2, thresholds=())
    same_route(
        a.route(threshold=threshold, renormalize=renormalize),
        fr.trace(model, None, ids, precision="exact").route(threshold=threshold, renormalize=renormalize),
    )


def test_open_decisions_are_settled_or_refused(tmp_path):
    model = tiny("llama")
    exact = fr.trace(model, None, IDS, precision="exact")
    trace = fr.trace(model, None, IDS, tolerance=0.3, thresholds=())
    trace.save(tmp_path / "a.trace")
    low, high = (t[2, -1].double() for t in (trace.normaliser_low, trace.normaliser_high))
    assert high > low
    share = float(trace.attention_residual[2, -1])
    threshold = share * float((low + high) / 2 / high) * 1.0001  # between what the residual may be
    with pytest.raises(ValueError, match=r"leaves \d+ rows open .* trace again with thresholds="):
        fr.load_trace(tmp_path / "a.trace").route(threshold=threshold)
    before = trace.work["exhausted"]
    same_route(trace.route(threshold=threshold), exact.route(threshold=threshold))
    assert trace.work["exhausted"] > before
    assert trace.normaliser_low[2, -1] == trace.normaliser_high[2, -1]
    again = fr.trace(model, None, IDS, tolerance=0.3, thresholds=())
    del model
    gc.collect()
    with pytest.raises(ValueError, match="its model is gone"):
        again.route(threshold=threshold)


def test_a_changed_model_refines_nothing():
    model = tiny("llama")
    trace = fr.trace(model, None, IDS, tolerance=0.3, thresholds=())
    low, high = (t[2, -1].double() for t in (trace.normaliser_low, trace.normaliser_high))
    threshold = float(trace.attention_residual[2, -1]) * float((low + high) / 2 / high) * 1.0001
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="does not compute what it did when it was traced"):
        trace.route(threshold=threshold)


def test_certificate_edges_and_refusals():
    trace = fr.trace(tiny("llama"), None, IDS)
    summary = trace.certificate
    assert summary["rows"] == 3 * len(IDS)
    assert summary["pairs_bounded"] == 3 * 6 * len(IDS) * (len(IDS) + 1) // 2
    assert 0 < summary["pairs_evaluated"] < summary["pairs_bounded"]
    assert 0 <= summary["mean_error"] <= summary["worst_error"] <= 0.01
    assert trace.normaliser_bounds.shape == (3, len(IDS), 2)
    edges = trace.edges(1)
    assert list(edges) == ["query", "key", "head", "importance", "low", "high"]
    assert (edges.low <= edges.importance).all()
    assert (edges.importance <= edges.high).all()
    assert (edges["head"] >= 0).all()
    assert (edges.high > 1e-3).all()
    with pytest.raises(ValueError, match="precision='exact', dense=True"):
        trace.attention(0)
    with pytest.raises(ValueError, match=r"below this trace's floor 0.001; trace again with floor=0.0005"):
        trace.route(threshold=0.0005)
    with pytest.raises(ValueError, match=r"sub-edges below 0\.001 were not kept"):
        trace.edges(0, floor=1e-4)


def test_signed_flow():
    model = tiny("qwen2")
    trace, exact = fr.trace(model, None, IDS, measure="signed"), fr.trace(model, None, IDS, precision="exact")
    ones = torch.ones(3, len(IDS))
    torch.testing.assert_close(
        trace.heads.sum(-1) + trace.attention_residual + trace.attention_bias, ones, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(trace.ffn + trace.ffn_residual, ones, rtol=0, atol=1e-5)
    assert float(trace.heads.min()) < 0
    edges = trace.edges(1)
    assert (edges.importance < 0).any()
    assert (edges.importance.abs() > 1e-3).all()
    norm = exact.normaliser_low[1]  # proximities are at most the positive flow
    near = exact.attention(1) * norm[:, None, None]
    for row in edges[edges.importance > 0.01].itertuples():
        state = float(trace.normaliser_low[1, row.query])
        assert float(near[row.query, row.key, row.head]) <= row.importance * state * 1.0001 + 1e-5
    for renormalize in (True, False):
        route = trace.route(threshold=0.005, renormalize=renormalize)
        assert route.measure == "signed"
        assert (route.edges.importance < 0).any()
    with pytest.raises(ValueError, match="measure='signed' is known exactly"):
        fr.trace(model, None, IDS, measure="signed", precision="exact")


@pytest.mark.demo_model
def test_demo_model(demo):
    certified_, exact = fr.trace(*demo, IOI), fr.trace(*demo, IOI, precision="exact")
    for renormalize in (True, False):
        same_route(certified_.route(renormalize=renormalize), exact.route(renormalize=renormalize))
    assert certified_.certificate["worst_error"] <= 0.01


_GROWTH = """
import sys, torch
from flowroutes_fast.ops.attention import Attention
from flowroutes_fast.ops.certified import certified

def peak():
    return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))

torch.manual_seed(0)
T, H, d, D = int(sys.argv[1]), 8, 16, 128
query, key, value = torch.randn(H, T, d) * 3, torch.randn(H, T, d), torch.randn(H, T, d)
a = Attention(query, key, value, torch.randn(H, d, D) / 4, torch.randn(T, D), d**-0.5)
few = Attention(a.query[:, :8], a.key[:, :8], a.value[:, :8], a.w_o, a.whole[:8], a.scaling)
certified(few, torch.ones(1, 8), floor=0.02, threads=2)
before = peak()
certified(a, a.whole.abs().sum(-1)[None], floor=0.02, threads=2)
print((peak() - before) / 1e3)
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_in_tokens():
    """Twice the tokens take about twice the megabytes, far below the four bytes per (query, key, head) that a dense
    result would take.
    """
    small, large = (
        float(
            subprocess.run([sys.executable, "-c", _GROWTH, str(n)], capture_output=True, text=True, check=True).stdout
        )
        for n in (2000, 4000)
    )
    assert large < 3 * small
    assert large < 0.2 * 8 * 4000**2 * 4 / 1e6


@needs_native
@pytest.mark.parametrize("width", [64, 2048])
def test_few_keys_are_evaluated_whole(width, monkeypatch):
    """Where that is cheaper than bounding: the certificate is exact, and the results are those of precision='exact'."""
    from families import make

    monkeypatch.setattr("flowroutes_fast.tracing.importances.FEW_KEYS", 256)
    model = make(
        "llama", hidden_size=width, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, head_dim=16
    )
    certified, exact = fr.trace(model, None, IDS), fr.trace(model, None, IDS, precision="exact")
    assert certified.certificate["worst_error"] == 0
    assert certified.certificate["pairs_evaluated"] == certified.certificate["pairs_bounded"] == 2 * 4 * 29 * 30 // 2
    assert torch.equal(certified.heads, exact.heads)
    for renormalize in (True, False):
        a, b = (t.route(threshold=0.005, renormalize=renormalize).edges for t in (certified, exact))
        assert a.sort_values(list(a.columns[:5]), ignore_index=True).equals(
            b.sort_values(list(b.columns[:5]), ignore_index=True)
        )
