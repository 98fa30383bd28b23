"""Patching: against slow direct references, and what must hold exactly."""

import pandas as pd
import pytest
import torch
from families import make

import flowroutes_fast as fr
from flowroutes_fast.experiments.patching import Patch, patched_logits, record
from flowroutes_fast.models.families import blocks_of

CLEAN, CORRUPTED = [5, 17, 33, 8, 60, 71, 12], [5, 18, 33, 9, 60, 71, 44]
SOME = (
    "llama",
    "gpt2",
    "gemma2",
    "gpt_neox",
    "gptj",
    "bitnet",
    "gpt_oss",
    "deepseek_v3",
    "jamba",
    "qwen3_next",
    "falcon",
    "mixtral",
)
LIKE_ONE = ("llama", "gpt2", "gemma2", "gpt_neox")


@pytest.fixture(scope="module")
def llama():
    return make("llama")


def patch(model, **options):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "answer": 3, "wrong": 4} | options
    return fr.patching(model, None, **given)


@torch.no_grad()
def difference(model, ids):
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return float(logits[3] - logits[4])


@torch.no_grad()
def with_added(model, ids, layer, added):
    """The metric with ``added [token, d_model]`` added to what a layer's W_O gives."""
    output = blocks_of(model)[layer].output
    handle = output.register_forward_hook(lambda m, args, out: out + added.view(out.shape))
    try:
        return difference(model, ids)
    finally:
        handle.remove()


@torch.no_grad()
def entering(model, ids, layer):
    """What enters a layer's W_O ``[token, head * d_head]``."""
    found = []
    handle = blocks_of(model)[layer].output.register_forward_pre_hook(lambda m, args: found.append(args[0].clone()))
    model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0].view(len(ids), -1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "deepseek_v3"])
def test_a_head_is_what_its_output_projected_adds(name):
    model = make(name)
    for positions in (None, [2], [-1, 3]):
        table = patch(model, positions=positions, batch=5)
        clean, corrupted = difference(model, CLEAN), difference(model, CORRUPTED)
        assert table.attrs["clean"] == pytest.approx(clean, abs=1e-4)
        assert table.attrs["corrupted"] == pytest.approx(corrupted, abs=1e-4)
        for layer in {0, int(table["layer"].max())}:
            moved = entering(model, CORRUPTED, layer) - entering(model, CLEAN, layer)
            heads = int((table["layer"] == layer).sum())
            w_o = blocks_of(model)[layer].w_o(heads)
            for head in (0, heads - 1):
                added = moved.unflatten(-1, (heads, -1))[:, head] @ w_o[head]
                if positions is not None:
                    keep = torch.zeros(len(CLEAN), 1)
                    keep[positions] = 1
                    added = added * keep
                wanted = with_added(model, CLEAN, layer, added)
                row = table[(table["layer"] == layer) & (table["head"] == head)].iloc[0]
                assert row["metric"] == pytest.approx(wanted, abs=2e-4)
                assert row["change"] == pytest.approx(wanted - clean, abs=3e-4)
                assert row["effect"] == pytest.approx((wanted - clean) / (corrupted - clean), abs=1e-3)


@torch.no_grad()
def test_an_edge_is_its_weight_times_the_change_of_its_value():
    model = make("llama", attn_implementation="eager")
    table = patch(model, what="edges", positions=[4, 6], layers=[1])
    assert len(table) == 6 * (5 + 7)
    alpha = model(torch.tensor([CLEAN]), output_attentions=True, use_cache=False).attentions[1][0]
    values = []
    for ids in (CLEAN, CORRUPTED):
        handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(
            lambda m, args, out: values.append(out[0].clone())
        )
        model(torch.tensor([ids]), use_cache=False)
        handle.remove()
    moved = (values[1] - values[0]).unflatten(-1, (2, -1)).repeat_interleave(3, 1)  # [token, head, d_head]
    w_o = blocks_of(model)[1].w_o(6)
    for row in table.iloc[::7].itertuples():
        added = torch.zeros(len(CLEAN), 60)
        added[row.query] = alpha[row.head, row.query, row.key] * moved[row.key, row.head] @ w_o[row.head]
        assert row.metric == pytest.approx(with_added(model, CLEAN, 1, added), abs=2e-4)


@pytest.mark.parametrize("name", SOME)
def test_recorded_heads_are_weighted_values_in_every_kind_of_block(name):
    """record() refuses otherwise; and patches of a prompt by itself change nothing."""
    model = make(name)
    table = patch(model, corrupted=CLEAN)
    edges = patch(model, corrupted=CLEAN, what="edges", layers=[int(table["layer"].iloc[-1])])
    for found in (table, edges):
        assert len(found)
        assert found["change"].abs().max() < 2e-4 * max(1, abs(found.attrs["clean"]))
        assert found.attrs["clean"] == found.attrs["corrupted"]
        assert found["effect"].isna().all()


@pytest.mark.parametrize("name", LIKE_ONE)
def test_all_heads_and_the_embeddings_make_the_corrupted_prompt(name):
    model = make(name)
    layers = [block.index for block in blocks_of(model)]
    other = record(model, CORRUPTED, layers, torch.tensor([6]))
    everywhere = torch.arange(len(CLEAN))
    patches = [
        Patch(layer, head, everywhere, other.z[layer][:, head])
        for layer in layers
        for head in range(other.z[layer].shape[1])
    ]
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        wanted = model(torch.tensor([CORRUPTED]), use_cache=False).logits[0, -1]
        embedded = embeddings(torch.tensor(CORRUPTED))
    handle = embeddings.register_forward_hook(lambda m, args, out: torch.cat([embedded[None], out[1:]]))
    found = patched_logits(model, CLEAN, [patches, []])
    handle.remove()
    assert torch.allclose(found[0], wanted, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(found[1], model(torch.tensor([CLEAN]), use_cache=False).logits[0, -1], atol=1e-4)


def test_edges_of_a_query_add_up_to_its_head_in_the_first_layer(llama):
    """Where only the values of other tokens changed and attention did not: here, with queries and keys made blind."""
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                module.weight.zero_()
    a, b = (record(model, ids, [0], torch.tensor([6])) for ids in (CLEAN, CORRUPTED))
    moved = torch.einsum("hqk,hkd->qhd", a.pattern[0], b.value[0] - a.value[0])
    assert torch.allclose(moved[0], b.z[0][6] - a.z[0][6], atol=1e-5)


def test_batches_do_not_matter(llama):
    one, many = patch(llama, batch=1), patch(llama, batch=7)
    pd.testing.assert_frame_equal(one, many, atol=1e-4)
    assert one.attrs["forward_passes"] == 2 + 18
    assert many.attrs["forward_passes"] == 2 + 3
    assert one.attrs["runs"] == many.attrs["runs"] == 20


def test_restrictions(llama):
    whole = patch(llama)
    for some in (patch(llama, layers=[-1]), patch(llama, heads=[(2, h) for h in range(6)])):
        expected = whole[whole["layer"] == 2].reset_index(drop=True)
        pd.testing.assert_frame_equal(some, expected, atol=1e-4)
    assert patch(llama, heads=[(-1, 5), (0, 1)])[["layer", "head"]].values.tolist() == [[2, 5], [0, 1]]


def test_the_probability_of_several_answers(llama):
    table = patch(llama, answer=[3, 4, 5], wrong=None, metric="probability")
    with torch.no_grad():
        p = llama(torch.tensor([CLEAN])).logits[0, -1].softmax(-1)
    assert table.attrs["clean"] == pytest.approx(float(p[3:6].sum()), abs=1e-5)
    both = patch(llama, answer=[3, 4, 5], wrong=[7], metric="probability", heads=[(0, 0)])
    assert both.attrs["clean"] == pytest.approx(float(p[3:6].sum() - p[7]), abs=1e-5)


def test_the_model_comes_back(llama):
    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules())
        return hooks, llama.config._attn_implementation, llama.training

    llama.train()
    try:
        before, weights = state(), {k: v.clone() for k, v in llama.state_dict().items()}
        patch(llama, layers=[0])
        assert state() == before
        broken = llama.lm_head.register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            patch(llama)
        broken.remove()
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            patched_logits(llama, CLEAN, [[Patch(0, 0, Broken(), torch.zeros(1, 10))]])
        assert state() == before
        assert all(torch.equal(v, weights[k]) for k, v in llama.state_dict().items())
    finally:
        llama.eval()


class Broken:
    def to(self, device):
        return 1 / 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrupted": CORRUPTED[:-1]}, "7 and 6 tokens"),
        ({"what": "neurons"}, "unknown what"),
        ({"metric": "loss"}, "unknown metric"),
        ({"wrong": None}, "needs wrong="),
        ({"answer": []}, "answer is empty"),
        ({"answer": 101}, "outside the model's vocabulary"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"layers": []}, "layers is empty"),
        ({"heads": [(0, 6)]}, "has no head 6"),
        ({"heads": [(0, 0)], "layers": [0]}, "not both"),
        ({"positions": []}, "positions is empty"),
        ({"batch": 0}, "batch must be"),
        ({"clean": []}, "no tokens"),
    ],
)
def test_bad_input_is_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        patch(llama, **options)


def test_other_bad_input(llama):
    with pytest.raises(IndexError, match="position 7 is out of range"):
        patch(llama, positions=[7])
    with pytest.raises(TypeError, match="needs a tokenizer"):
        patch(llama, answer=" Mary")
    with pytest.raises(ValueError, match="layer 0 has no attention heads"):
        patch(make("jamba"), layers=[0])


@pytest.mark.demo_model
def test_demo(demo):
    model, tokenizer = demo
    example = fr.templates.ioi(1, 0, tokenizer)[0]
    given = (example.prompt, example.contrasts["third"], example.answer)
    with pytest.raises(ValueError, match="leading space"):
        fr.patching(model, tokenizer, *given, "Mary Jane Smith")
    table = fr.patching(model, tokenizer, *given, example.wrong[0], layers=[20])
    assert table.attrs["clean"] > 0
    assert table.loc[table["effect"].idxmax(), "head"] == 0
