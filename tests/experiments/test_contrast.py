"""Templates that align, head frequencies, differences of sets and of edges."""

import numpy as np
import pandas as pd
import pytest
from families import make

import flowroutes_fast as fr
from flowroutes_fast.experiments.templates import greater_than, ioi
from flowroutes_fast.results.contrast import difference_interval, wilson
from flowroutes_fast.results.edges import COLUMNS
from flowroutes_fast.results.route import Route

PROMPTS = [[5, 17, 33, 8, 60, 71, 12], [9, 17, 2, 8, 6, 71, 12], [5, 88, 33, 4, 60, 7, 12]]


class Words:
    """A tokenizer of words; ``digits`` splits numbers into digits, ``years`` into pairs, ``rare`` words into
    letters.
    """

    def __init__(self, numbers="digits", rare=()):
        self.numbers, self.rare, self.known = numbers, rare, {}

    def pieces(self, text):
        for word in text.replace(",", " ,").split():
            if word.isdigit() and self.numbers == "digits":
                yield from word
            elif word.isdigit() and self.numbers == "pairs":
                yield from (word[i : i + 2] for i in range(0, len(word), 2))
            elif word in self.rare:
                yield from word
            else:
                yield word

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in self.pieces(text)]}


def route(edges, **known):
    rows = [(layer, "attention", key, query, head, importance) for layer, query, key, head, importance in edges]
    rows.append((0, "ffn", 1, 1, -1, 0.5))
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    given = {
        "tokens": ["a", "b"],
        "position": 1,
        "threshold": 0.04,
        "renormalize": True,
        "model": "m",
        "shapes": ["sequential"] * 2,
    }
    return Route(**(given | known), edges=table)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(scope="module")
def traces(llama):
    return fr.trace(llama, None, PROMPTS)


def test_ioi():
    examples = ioi(40, seed=3)
    assert examples == ioi(40, seed=3) != ioi(40, seed=4)
    assert len({e.prompt for e in examples}) == 40
    assert {e.template for e in examples} == {"ioi ABBA", "ioi BABA"}
    for e in examples:
        words = e.prompt.replace(",", "").split()
        to, giver = e.answer.strip(), e.wrong[0].strip()
        first, second, gives = words[1], words[3], words[8]
        assert (first, second) == ((to, giver) if e.template == "ioi ABBA" else (giver, to))
        assert gives == giver
        third = e.contrasts["third"].replace(",", "").split()
        assert third[:8] + third[9:] == words[:8] + words[9:]
        assert third[8] not in (to, giver)
        assert e.contrasts["swapped"].replace(",", "").split()[8] == to
        unrelated = e.contrasts["unrelated"].replace(",", "").split()
        assert len({unrelated[1], unrelated[3], unrelated[8], to, giver}) == 5


def test_greater_than():
    for e in greater_than(20, seed=1):
        year = e.prompt.split("year ")[1][:4]
        assert set(e.answers) == {f"{y:02d}" for y in range(int(year[2:]) + 1, 100)}
        assert len(set(e.answers) | set(e.wrong)) == 100
        assert e.contrasts["01"] == e.prompt.replace(year, f"{year[:2]}01")
        assert e.contrasts["00"] == e.prompt.replace(year, f"{year[:2]}00")
        assert e.prompt.endswith(f"to the year {year[:2]}")


def test_greater_than_of_digits_and_of_pairs():
    for e in greater_than(5, 0, Words("digits")):
        tens = int(e.prompt.split("year ")[1][2])
        assert e.answers == tuple(str(d) for d in range(tens + 1, 10))
        assert e.wrong == tuple(str(d) for d in range(tens))
    with pytest.raises(ValueError, match="no single answer token"):
        greater_than(5, 0, Words("whole"))


@pytest.mark.parametrize("make_examples", [ioi, greater_than])
def test_prompts_align(make_examples):
    tokenizer = Words("digits", rare=("Mary", "John", "store", "war", "kiss"))
    examples = make_examples(30, 0, tokenizer)
    texts = [text for e in examples for text in (e.prompt, *e.contrasts.values())]
    assert len({len(tokenizer(text)["input_ids"]) for text in texts}) == 1
    assert not any(word in text.split() for word in tokenizer.rare for text in texts)


def test_templates_refuse():
    for bad in (0, -1, 10**9):
        with pytest.raises(ValueError, match="n "):
            ioi(bad)
    with pytest.raises(ValueError, match="too few"):
        ioi(1, 0, Words(rare=fr.templates.NAMES))
    with pytest.raises(ValueError, match="no noun"):
        greater_than(1, 0, Words(rare=fr.templates.NOUNS))


@pytest.mark.demo_model
def test_templates_of_the_demo(demo):
    _, tokenizer = demo
    for examples in (ioi(12, 0, tokenizer), greater_than(12, 0, tokenizer)):
        assert len({len(tokenizer(t)["input_ids"]) for e in examples for t in (e.prompt, *e.contrasts.values())}) == 1


def test_frequencies_of_routes():
    routes = [
        route([(0, 1, 0, 2, 0.3), (0, 1, 1, 2, 0.1)]),
        route([(0, 1, 0, 2, 0.2), (1, 1, 0, 0, 0.5)]),
        route([(1, 1, 0, -1, 0.5)], renormalize=True),
    ]
    table = fr.head_frequencies(routes)
    assert table[["layer", "head"]].values.tolist() == [[0, 2], [1, 0]]
    assert table["frequency"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert table["importance"].tolist() == pytest.approx([0.2, 0.5 / 3])
    assert (table["n"] == 3).all()


def test_frequencies_of_traces_are_those_of_their_routes(traces):
    table = fr.head_frequencies(traces, threshold=0.03, position=4).set_index(["layer", "head"])
    assert len(table) == 3 * 6
    routes = [t.route(4, 0.03) for t in traces]
    for layer in range(3):
        for head in range(6):
            edges = [
                r.edges[(r.edges["kind"] == "attention") & (r.edges["layer"] == layer) & (r.edges["head"] == head)]
                for r in routes
            ]
            assert table.loc[(layer, head), "frequency"] == pytest.approx(np.mean([len(e) > 0 for e in edges]))
            assert table.loc[(layer, head), "importance"] == pytest.approx(
                np.mean([e["importance"].sum() for e in edges])
            )
    some = fr.head_frequencies(routes)
    whole = table[table["frequency"] > 0].reset_index()
    pd.testing.assert_frame_equal(some, whole)


def test_contrast_of_sets(traces):
    found = fr.contrast(traces[:2], traces[1:], threshold=0.03)
    a, b = (fr.head_frequencies(t, 0.03).set_index(["layer", "head"]) for t in (traces[:2], traces[1:]))
    assert len(found) == 18
    for row in found.itertuples():
        assert row.frequency_a == a.loc[(row.layer, row.head), "frequency"]
        assert row.frequency_b == b.loc[(row.layer, row.head), "frequency"]
        assert row.difference == row.frequency_a - row.frequency_b
        assert row.low <= row.difference <= row.high
        assert (row.n_a, row.n_b) == (2, 2)
    assert found["difference"].abs().is_monotonic_decreasing
    same = fr.contrast(traces, traces, paired=True)
    assert (same["difference"] == 0).all()


def test_the_interval_of_a_difference():
    """56/70 − 48/80: the example of Newcombe's paper, method 10."""
    x, y = np.arange(70) < 56, np.arange(80) < 48
    low, high = difference_interval(x[None], y[None], paired=False)
    assert (low[0], high[0]) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert wilson(np.array([0, 10]), 10)[0][0] == 0
    assert wilson(np.array([0, 10]), 10)[1][1] == 1
    few = np.arange(70) < 48
    alone, together = (difference_interval(x[None], few[None], paired) for paired in (False, True))
    assert alone[0] < together[0] < 8 / 70 < together[1] < alone[1]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    for paired in (False, True):
        shared = random.random((4000, 20))
        x = (shared if paired else random.random((4000, 20))) < 0.7
        y = (np.where(random.random((4000, 20)) < 0.5, shared, random.random((4000, 20)))) < 0.4
        low, high = difference_interval(x, y, paired)
        assert 0.92 < ((low <= 0.3) & (high >= 0.3)).mean() < 0.985


def test_edges_of_two_prompts(llama):
    a, b = (fr.trace(llama, None, ids, precision="exact", dense=True) for ids in PROMPTS[:2])
    table = fr.contrast(a, b, threshold=0.01)
    assert table.attrs["unknown"] == 0
    dense = [np.stack([layer.numpy() for layer in t.dense]) for t in (a, b)]
    layer, head, query, key = ((dense[0] > 0.01) | (dense[1] > 0.01)).nonzero()
    assert len(table) == len(layer)
    wanted = {
        (int(i), int(q), int(k), int(h)): dense[0][i, h, q, k] - dense[1][i, h, q, k]
        for i, h, q, k in zip(layer, head, query, key, strict=True)
    }
    for row in table.itertuples():
        assert row.difference == pytest.approx(wanted[row.layer, row.query, row.key, row.head], abs=1e-6)
        assert row.difference == pytest.approx(row.importance_a - row.importance_b)
    assert table["difference"].abs().is_monotonic_decreasing
    last = fr.contrast(a, b, threshold=0.01, position=-1)
    assert len(last) == (table["query"] == 6).sum() > 0
    assert (last["query"] == 6).all()


def test_edges_of_certified_traces(llama, traces):
    exact = fr.contrast(
        *(fr.trace(llama, None, ids, precision="exact", dense=True) for ids in PROMPTS[:2]), threshold=0.02
    )
    table = fr.contrast(traces[0], traces[1], threshold=0.02)
    assert table.attrs["unknown"] == 1e-3
    both = exact.merge(table, on=["layer", "query", "key", "head"], how="outer", suffixes=("", "_certified"))
    near = both[both[["importance_a", "importance_b"]].max(axis=1) > 0.021]
    assert len(near) > 20
    assert (near["difference"] - near["difference_certified"]).abs().max() < 5e-3


def test_edges_of_two_routes():
    a, b = route([(0, 1, 0, 2, 0.3), (1, 1, 1, 0, 0.2)]), route([(0, 1, 0, 2, 0.5), (1, 1, 0, 0, 0.1)])
    table = fr.contrast(a, b)
    assert table.attrs["unknown"] == 0.04
    rows = {tuple(r[:4]): tuple(r[4:]) for r in table.itertuples(index=False, name=None)}
    assert rows[0, 1, 0, 2] == pytest.approx((0.3, 0.5, -0.2))
    assert rows[1, 1, 1, 0] == pytest.approx((0.2, 0.0, 0.2))
    assert rows[1, 1, 0, 0] == pytest.approx((0.0, 0.1, -0.1))
    assert len(rows) == 3
    assert fr.contrast(route([]), route([])).empty
    assert fr.contrast([route([])], [route([])]).empty


def test_bad_input_is_refused(llama, traces):
    one, two = traces[:2]
    ours = [t.route() for t in traces]
    other = fr.trace(make("gpt2"), None, PROMPTS[0])
    for call, message in (
        (lambda: fr.head_frequencies([]), "is empty"),
        (lambda: fr.contrast([], [one]), "is empty"),
        (lambda: fr.head_frequencies(one), "one example is no list"),
        (lambda: fr.contrast([one], two), "one of the two is a list"),
        (lambda: fr.contrast([one], [other]), "different models"),
        (lambda: fr.head_frequencies([one, other]), "different models"),
        (lambda: fr.contrast(one, other), "different models"),
        (lambda: fr.contrast(one, fr.trace(llama, None, PROMPTS[0][:5])), "7 and 5 tokens"),
        (lambda: fr.contrast(one, two, threshold=1e-4), "below the floor"),
        (lambda: fr.contrast(one, two, threshold=1.5), r"must lie in \[0, 1\)"),
        (lambda: fr.head_frequencies([one], threshold=1e-4), "below this trace's floor"),
        (lambda: fr.head_frequencies(ours, threshold=0.03), "already"),
        (lambda: fr.contrast(ours[0], ours[1], threshold=0.03), "already"),
        (lambda: fr.contrast(one, ours[1]), "a trace and a route"),
        (lambda: fr.head_frequencies([one, ours[1]]), "all traces or all routes"),
        (lambda: fr.head_frequencies([ours[0], two.route(threshold=0.05)]), "different thresholds"),
        (lambda: fr.contrast(ours, [t.route(threshold=0.05) for t in traces]), "extracted differently"),
        (lambda: fr.contrast(traces, traces[:2], paired=True), "equal numbers"),
        (lambda: fr.contrast(one, two, paired=True), "paired= belongs to lists"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="traces or routes, got str"):
        fr.head_frequencies(["a prompt"])
    for call in (lambda: fr.contrast(one, two, position=7), lambda: fr.head_frequencies([one], position=7)):
        with pytest.raises(IndexError, match="position 7"):
            call()
