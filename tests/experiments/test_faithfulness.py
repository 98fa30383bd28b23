"""Ablated runs against plain loops, and what is made of them: verify, curves, rankings."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import IOI
from families import make

import flowroutes_fast as fr
from flowroutes_fast.experiments import ablation, faithfulness
from flowroutes_fast.experiments.ablation import clean, kept_logits, mask_gradient, value_means
from flowroutes_fast.experiments.faithfulness import curve, measure, per_layer, rank_sub_edges, strongest, summary

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]
FAMILIES = [
    "llama",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "gpt_oss",
    "deepseek_v3",
    "phi",
    "gpt_neox",
    "mistral",
    "bitnet",
]


def full_masks(run, value=True):
    return [torch.full(p.shape, value) for p in run.patterns]


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture(scope="module")
def run(llama):
    return clean(llama, IDS)


def plain(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_kept_is_the_model(name):
    model = make(name)
    run = clean(model, IDS)
    means = value_means(model, None, [IDS, IDS[:4]])
    for options in (
        {},
        {"means": means},
        {"attention": "frozen", "means": means},
        {"attention": "frozen", "patterns": run.patterns},
    ):
        logits = kept_logits(model, IDS, full_masks(run), **options)
        torch.testing.assert_close(logits, plain(model), atol=1e-4, rtol=1e-4)


def by_hand(model, keep, means, frozen=None):
    """A llama-shaped model, position by position and sub-edge by sub-edge; logits after the last position."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder = model.model
    state = decoder.embed_tokens(torch.tensor(IDS))
    cos, sin = decoder.rotary_emb(state[None], torch.arange(len(IDS))[None])
    for n, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        d = attention.head_dim
        x = layer.input_layernorm(state)
        q, k, v = (
            p(x).view(len(IDS), -1, d).transpose(0, 1) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (t[0] for t in apply_rotary_pos_emb(q[None], k[None], cos, sin))
        heads = []
        for h in range(len(q)):
            group = h // (len(q) // len(k))
            rows = []
            for i in range(len(IDS)):
                alpha = (q[h, i] @ k[group, : i + 1].T * attention.scaling).softmax(-1)
                if frozen is not None:
                    alpha = frozen[n][h, i, : i + 1]
                row = torch.zeros(d)
                for j in range(i + 1):
                    if keep[n][h, i, j]:
                        row = row + alpha[j] * v[group, j]
                    elif means is not None:
                        row = row + alpha[j] * means[n][h]
                rows.append(row)
            heads.append(torch.stack(rows))
        state = state + attention.o_proj(torch.cat(heads, -1))
        state = state + layer.mlp(layer.post_attention_layernorm(state))
    return model.lm_head(decoder.norm(state))[-1]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_against_a_loop_over_sub_edges(llama, run, mean, frozen):
    means = value_means(llama, None, [IDS[:7], IDS[3:]]) if mean else None
    generator = torch.Generator().manual_seed(1)
    for keep in (full_masks(run, False), [torch.rand(p.shape, generator=generator) < 0.4 for p in run.patterns]):
        logits = kept_logits(llama, IDS, keep, means=means, attention="frozen" if frozen else "live")
        with torch.no_grad():
            expected = by_hand(llama, keep, means, run.patterns if frozen else None)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_masks_in_a_batch_are_masks_alone(llama, run, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    keep = [torch.rand(5, *p.shape, generator=generator) < 0.3 for p in run.patterns]
    monkeypatch.setattr(ablation, "BATCH_TOKENS", 2 * len(IDS))
    together = kept_logits(llama, IDS, keep)
    for n in range(5):
        torch.testing.assert_close(together[n], kept_logits(llama, IDS, [k[n] for k in keep]), atol=1e-5, rtol=1e-5)


def test_means(llama, run):
    found = {}
    texts = [IDS, IDS[:4]]
    for weights in ("positions", "attention"):
        means = value_means(llama, None, texts, weights=weights)
        totals, weight = 0, 0
        for ids in texts:
            with torch.no_grad():
                attention = llama.model.layers[0].self_attn
                x = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(torch.tensor(ids)))
                v = attention.v_proj(x).view(len(ids), -1, attention.head_dim).transpose(0, 1).repeat_interleave(3, 0)
            paid = clean(llama, ids).patterns[0].sum(1) if weights == "attention" else torch.ones(6, len(ids))
            totals, weight = totals + (paid[..., None] * v).sum(1), weight + paid.sum(1, keepdim=True)
        torch.testing.assert_close(means[0], totals / weight, atol=1e-5, rtol=1e-5)
        found[weights] = means[0]
    assert not torch.allclose(found["positions"], found["attention"])


def test_the_model_comes_back_as_it_was(llama, run, monkeypatch):
    llama.train()
    before = llama.config._attn_implementation
    try:
        mlp = llama.model.layers[1].mlp
        monkeypatch.setattr(type(mlp), "forward", lambda self, x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kept_logits(llama, IDS, full_masks(run))
        assert llama.training
    finally:
        llama.eval()
    assert llama.config._attn_implementation == before
    assert not ablation._here.jobs
    monkeypatch.undo()
    torch.testing.assert_close(plain(llama), run.logits, atol=1e-5, rtol=1e-5)


def test_gradient_is_the_slope(llama, run):
    keep = [torch.full(p.shape, 0.5) for p in run.patterns]

    def answer(logits):
        return logits.log_softmax(-1)[7]

    slope = mask_gradient(llama, IDS, keep, answer)
    for layer, h, i, j in ((0, 2, 10, 3), (2, 5, 10, 0), (1, 0, 4, 4)):
        ends = []
        for change in (1e-2, -1e-2):
            moved = [k.clone() for k in keep]
            moved[layer][h, i, j] += change
            ends.append(float(answer(kept_logits(llama, IDS, moved))))
        assert float(slope[layer][h, i, j]) == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-3)
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("options", [{}, {"ablation": "zero"}, {"attention": "frozen", "answer": 5}, {"random": 0}])
def test_verify(llama, run, options):
    route = fr.trace(llama, None, IDS).route(threshold=0.02)
    found = route.verify(llama, **options)
    n_random = options.get("random", 5)
    assert found.table["which"].tolist() == ["route", "attention", *["random"] * n_random]
    attention = route.edges[route.edges["kind"] == "attention"]
    assert found.kept == len(attention)
    assert found.sub_edges == 3 * 6 * 11 * 12 // 2
    assert found.answer == options.get("answer", int(run.logits.argmax()))
    assert found.full_probability == pytest.approx(float(run.logits.softmax(-1)[found.answer]), abs=1e-5)
    keep = full_masks(run, False)
    for layer, head, query, key in attention[["layer", "head", "target", "source"]].itertuples(index=False):
        keep[layer][head, query, key] = True
    means = None if options.get("ablation") == "zero" else value_means(llama, None, [IDS])
    expected = (
        kept_logits(llama, IDS, keep, means=means, attention=options.get("attention", "live")).double().log_softmax(-1)
    )
    full = run.logits.double().log_softmax(-1)
    assert found.kl == pytest.approx(float((full.exp() * (full - expected)).sum()), abs=1e-5)
    assert found.probability == pytest.approx(float(expected[found.answer].exp()), abs=1e-5)
    assert found.rank == 1 + int((expected > expected[found.answer]).sum())
    assert "sub-edges" in repr(found)


def test_verify_everything_keeps_everything(llama):
    trace = fr.trace(llama, None, IDS, precision="exact", dense=True)
    route = trace.route(threshold=0.0)
    route.edges = pd.DataFrame(
        [(n, "attention", j, i, h, 1.0) for n in range(3) for h in range(6) for i in range(11) for j in range(i + 1)],
        columns=["layer", "kind", "source", "target", "head", "importance"],
    )
    found = route.verify(llama, random=1)
    assert found.share == 1
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.of("random")["same_top"] == 1


def test_verify_an_earlier_position_and_a_loaded_route(llama, tmp_path):
    route = fr.trace(llama, None, IDS).route(position=6, threshold=0.02)
    loaded = fr.load_route(route.save(tmp_path / "route.json"))
    assert loaded.token_ids == IDS
    pd.testing.assert_frame_equal(loaded.verify(llama).table, route.verify(llama).table)
    assert loaded.verify(llama).full_probability == pytest.approx(
        float(plain(llama, IDS[:7]).softmax(-1).max()), abs=1e-5
    )
    loaded.token_ids = []
    with pytest.raises(ValueError, match="holds no token ids"):
        loaded.verify(llama)
    assert loaded.verify(llama, ids=IDS).kl == pytest.approx(route.verify(llama).kl, abs=1e-6)


def test_pairs_without_known_heads_keep_all_heads(llama, run):
    route = fr.trace(llama, None, IDS).route(threshold=0.02)
    route.edges = pd.DataFrame(
        [(1, "attention", 2, 8, -1, 0.1)], columns=["layer", "kind", "source", "target", "head", "importance"]
    )
    masks = faithfulness.route_masks(route, run.patterns)
    assert [int(m.sum()) for m in masks] == [0, 6, 0]
    assert masks[1][:, 8, 2].all()


def test_baselines_have_the_size_asked_for(run):
    scores = [torch.rand(p.shape) for p in run.patterns]
    masks = per_layer(scores, [5, 0, 40])
    assert [int(m.sum()) for m in masks] == [5, 0, 40]
    shares = (1e-9, 0.01, 0.3, 1.0)
    masks = strongest(scores, shares)
    total = run.sub_edges
    assert torch.stack([m.flatten(1).sum(1) for m in masks]).sum(0).tolist() == [
        1,
        round(0.01 * total),
        round(0.3 * total),
        total,
    ]
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    cut = np.sort(np.concatenate([s[:, causal].flatten().numpy() for s in scores]))[-round(0.3 * total)]
    for score, mask in zip(scores, masks, strict=True):
        assert torch.equal(mask[2], (score >= float(cut)) & causal)
        assert not (mask & ~causal).any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_rankings(name):
    model = make(name)
    run = clean(model, IDS)
    means = value_means(model, None, [IDS])
    scores = rank_sub_edges(model, run, faithfulness.EVERY_RULE, means=means)
    assert set(scores) == set(faithfulness.EVERY_RULE)
    exact = fr.trace(model, None, IDS, precision="exact", dense=True)
    signed = fr.trace(model, None, IDS, measure="signed", floor=1e-6, bias="value")
    for layer, pattern in enumerate(run.patterns):
        torch.testing.assert_close(scores["local proximity"][layer], exact.dense[layer])
        for rule in scores:
            assert scores[rule][layer].shape == pattern.shape
            assert scores[rule][layer].isfinite().all()
        if layer == 2:  # only the root has mass in the last layer
            assert (scores["flow signed"][layer][:, :-1] == 0).all()
    zero = rank_sub_edges(model, run, ["local centred"])["local centred"]
    query, key, head, value = signed.sub_edges(1, np.arange(11))
    np.testing.assert_allclose(zero[1][head, query, key], np.abs(value), atol=1e-5)


def test_curve(llama):
    prompts = [IDS, IDS[2:9], IDS[::-1]]
    table = measure(llama, None, prompts, shares=(0.1, 1.0), thresholds=(0.02,))
    assert len(table) == 3 * (len(faithfulness.RULES) * 2 + 4)
    for rule, name in (("importance", "route proximity"), ("flow", "flow route proximity")):
        route = fr.trace(llama, None, IDS, precision="exact").route(threshold=0.02, rule=rule)
        row = table[(table["rule"] == name) & (table["prompt"] == 0)].iloc[0]
        seen = route.verify(llama, means=value_means(llama, None, prompts), random=0)
        assert row["share"] == seen.share
        assert row["kl"] == pytest.approx(seen.kl, rel=1e-3, abs=1e-6)
    whole = table[table["size"] == 1.0]
    np.testing.assert_allclose(whole["kl"], 0, atol=1e-6)
    np.testing.assert_allclose(whole["kept"], 1, atol=1e-4)
    assert (whole["rank"] == 1).all()
    found = curve(llama, None, prompts, shares=(0.1, 1.0), thresholds=(0.02,))
    pd.testing.assert_frame_equal(found, summary(table))
    for name in ("kept", "kl", "same_top"):
        assert (found[f"{name}_low"] <= found[name] + 1e-12).all()
        assert (found[name] <= found[f"{name}_high"] + 1e-12).all()
    assert set(found["rule"]) == {
        *faithfulness.RULES,
        *(f"{r} {m}" for r in ("route", "flow route") for m in ("proximity", "signed")),
    }
    assert (found["prompts"] == 3).all()


def test_curve_under_zero_ablation(llama):
    found = curve(
        llama, None, [IDS], rules=["flow signed", "random"], shares=(0.2,), ablation="zero", attention="frozen"
    )
    assert len(found) == 2
    assert np.isfinite(found["kl"]).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, r: kept_logits(m, IDS, full_masks(r)[:2]), "masks for 2 layers, the model has 3"),
        (lambda m, r: kept_logits(m, IDS[:5], full_masks(r)), r"\[head, query, key\] of 5 tokens"),
        (lambda m, r: kept_logits(m, IDS, [k[:4] for k in full_masks(r)]), "has 4 heads"),
        (lambda m, r: kept_logits(m, IDS, full_masks(r), attention="cold"), "choose 'live' or 'frozen'"),
        (lambda m, r: kept_logits(m, IDS, full_masks(r), means=[torch.zeros(6, 12)]), "belong to another model"),
        (lambda m, r: kept_logits(m, IDS, full_masks(r), means=[torch.zeros(2, 12)] * 3), r"must be \[head, d_head\]"),
        (lambda m, r: value_means(m, None, "a text"), "a list of texts"),
        (lambda m, r: value_means(m, None, [IDS], weights="some"), "choose 'positions' or 'attention'"),
        (lambda m, r: curve(m, None, []), "at least one"),
        (lambda m, r: curve(m, None, [IDS], rules=["magic"]), "unknown rule 'magic'"),
        (lambda m, r: curve(m, None, [IDS], shares=[0]), r"\(0, 1\]"),
        (lambda m, r: curve(m, None, [IDS], ablation="noise"), "choose 'mean' or 'zero'"),
        (lambda m, r: curve(m, None, [IDS], ablation="zero", means=[]), "means belong to ablation='mean'"),
        (lambda m, r: fr.trace(m, None, IDS).route().verify(m, answer=1000), "outside the model's vocabulary of 101"),
        (lambda m, r: fr.trace(m, None, IDS).route().verify(m, random=-1), "number of draws"),
        (lambda m, r: fr.trace(m, None, IDS).route().verify(m, ids=IDS[:3]), "ids has 3 tokens, the route has 11"),
        (lambda m, r: fr.trace(m, None, IDS).route().verify(make("llama", num_hidden_layers=2)), "this model has 2"),
        (lambda m, r: clean(make("gptj"), IDS), "does not go through transformers' attention interface"),
        (lambda m, r: clean(make("jamba"), IDS), "layer 0 of this jamba model has no attention weights"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(llama, run, call, says):
    with pytest.raises(ValueError, match=says):
        call(llama, run)


@pytest.mark.demo_model
def test_on_the_real_model(demo):
    model, tokenizer = demo
    found = fr.trace(model, tokenizer, IOI).route(rule="flow", keep=0.05).verify(model, random=2)
    assert 0 < found.share < 0.1
    assert found.kl < found.of("random")["kl"]
    assert found.full_probability > 0.5
    assert found.full_rank == 1
