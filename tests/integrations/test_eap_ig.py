"""Component-to-component scores against the broadcast they replace, and in a real TransformerLens model where that
is installed.
"""

import importlib.metadata
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from flowroutes_fast.integrations import eap_ig


def broadcast(outputs, state, lengths):
    """Written out: L1 distances of every output to the state, per position."""
    total = torch.zeros(outputs.shape[2], dtype=torch.float64)
    for text, length in enumerate(lengths.tolist()):
        for position in range(length):
            y, z = state[text, position].double(), outputs[text, position].double()
            near = (y.abs().sum() - (z - y).abs().sum(-1)).clamp_min(0)
            total += (near / near.sum() if near.sum() > 0 else near * 0) / length
    return total


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 7, 33), (3, 9, 20, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_the_broadcast(shape, dtype):
    torch.manual_seed(0)
    outputs = torch.randn(*shape, dtype=dtype)
    state = outputs.sum(2) + 0.1
    lengths = torch.randint(1, shape[1] + 1, (shape[0],))
    found = eap_ig.component_importances(outputs, state, lengths)
    torch.testing.assert_close(found.double(), broadcast(outputs, state, lengths), atol=1e-6, rtol=0)
    part = eap_ig.component_importances(outputs[:, :, :1], state, lengths)  # a slice of the first components
    torch.testing.assert_close(part.double(), broadcast(outputs[:, :, :1], state, lengths), atol=1e-6, rtol=0)


def test_positions_nothing_is_close_to_count_as_zero():
    outputs, state = -torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4)
    assert eap_ig.component_importances(outputs, state, torch.tensor([2])).tolist() == [0, 0, 0]


def test_bad_lengths():
    with pytest.raises(ValueError, match="numbers from 1 to 2"):
        eap_ig.component_importances(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4), torch.tensor([3]))


def test_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("flowroutes_fast.integrations.version", missing)
    monkeypatch.setitem(sys.modules, "eap.attribute", None)
    with pytest.raises(ImportError, match=r"EAP-IG .* is not installed: pip install git"):
        eap_ig.patch()


@pytest.fixture
def checkout(monkeypatch):
    """A module ``eap.attribute`` on the path, of no installed package."""
    attribute, theirs = types.ModuleType("eap.attribute"), object()
    attribute.get_scores_information_flow_routes = theirs
    monkeypatch.setitem(sys.modules, "eap", types.ModuleType("eap"))
    monkeypatch.setitem(sys.modules, "eap.attribute", attribute)
    return attribute, theirs


def test_patch_and_unpatch(checkout):
    attribute, theirs = checkout
    with eap_ig.patched():
        assert attribute.get_scores_information_flow_routes is eap_ig.scores
    assert attribute.get_scores_information_flow_routes is theirs
    eap_ig.patch()
    eap_ig.patch()
    with eap_ig.patched():
        pass
    assert attribute.get_scores_information_flow_routes is eap_ig.scores  # as before the block
    eap_ig.unpatch()
    eap_ig.unpatch()
    assert attribute.get_scores_information_flow_routes is theirs


def test_a_checkout_without_what_it_needs(monkeypatch, tmp_path):
    (tmp_path / "eap").mkdir()
    (tmp_path / "eap" / "attribute.py").write_text("import a_library_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("eap", "eap.attribute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"EAP-IG .* needs a_library_that_is_missing"):
        eap_ig.patch()
    sys.modules.pop("eap", None)


def graph_of(cfg):
    return SimpleNamespace(
        n_forward=1 + cfg.n_layers * (cfg.n_heads + 1), n_backward=cfg.n_layers * (3 * cfg.n_heads + 1) + 1
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_in_a_model(parallel):
    lens = pytest.importorskip("transformer_lens")
    torch.manual_seed(0)
    cfg = lens.HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=8,
        d_head=4,
        n_heads=4,
        d_vocab=20,
        act_fn="gelu",
        parallel_attn_mlp=parallel,
        device="cpu",
    )
    model = lens.HookedTransformer(cfg)
    tokens, lengths = torch.randint(0, 20, (2, 6)), torch.tensor([6, 4])
    found = eap_ig.scores(model, graph_of(cfg), [(tokens, lengths)], quiet=True)
    mask = (torch.arange(6) < lengths[:, None]).long()
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    sources = [cache["hook_embed"][:, :, None]]
    for layer in range(2):
        sources += [cache[f"blocks.{layer}.attn.hook_result"], cache[f"blocks.{layer}.hook_mlp_out"][:, :, None]]
    sources = torch.cat(sources, 2)
    wanted = torch.zeros_like(found, dtype=torch.float64)
    for layer in range(2):
        first, into = 1 + layer * 5, layer * 13
        reads = broadcast(sources[:, :, :first], cache[f"blocks.{layer}.hook_resid_pre"], lengths)
        wanted[:first, into : into + 12] = reads[:, None]
        if parallel:
            wanted[:first, into + 12] = reads
        else:
            wanted[: first + 4, into + 12] = broadcast(
                sources[:, :, : first + 4], cache[f"blocks.{layer}.hook_resid_mid"], lengths
            )
    wanted[:, -1] = broadcast(sources, cache["blocks.1.hook_resid_post"], lengths)
    torch.testing.assert_close(found.double(), wanted / 2, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="another model"):
        eap_ig.scores(model, SimpleNamespace(n_forward=3, n_backward=3), [(tokens, lengths)], quiet=True)
    with pytest.raises(ValueError, match="no batch"):
        eap_ig.scores(model, graph_of(cfg), [], quiet=True)
