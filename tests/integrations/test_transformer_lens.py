"""fr.trace on bridges, hooked transformers and activation caches of TransformerLens; head results without the large
broadcast.
"""

import contextlib
import importlib.util
import logging
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import flowroutes_fast as fr
from flowroutes_fast import integrations
from flowroutes_fast.integrations import transformer_lens as ours

ROOT = Path(__file__).parents[2]
WORDS = [str(i) for i in range(61)]
TEXT = "3 4 5 17 4 5 22 8 3 9 40 17"
IDS = [int(word) for word in TEXT.split()]
PARTS = ("heads", "ffn", "ffn_residual", "attention_residual", "attention_bias", "normaliser_low", "normaliser_high")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 32,
}
PLAIN = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32),
    "neox": lambda: GPTNeoXConfig(**PLAIN, use_parallel_residual=True),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "granite": lambda: GraniteConfig(**SIZES, residual_multiplier=0.5),
    "gpt_oss": lambda: GptOssConfig(**SIZES, head_dim=8, num_local_experts=4),
}
HOOKED = {
    "plain": {"act_fn": "gelu"},
    "attention only": {"act_fn": "gelu", "attn_only": True},
    "parallel": {"act_fn": "gelu", "parallel_attn_mlp": True},
    "grouped": {
        "act_fn": "silu",
        "gated_mlp": True,
        "n_key_value_heads": 2,
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "normalization_type": "RMS",
    },
    "norms behind": {
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
    },
    "norms behind under other names": {
        "act_fn": "gelu",
        "normalization_type": "RMS",
        "original_architecture": "Olmo2ForCausalLM",
    },
}


def test_missing_or_unsupported(monkeypatch):
    foreign = type("TransformerBridge", (torch.nn.Module,), {"__module__": "transformer_lens.model_bridge"})()

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(integrations, "version", missing)
    with pytest.raises(
        ImportError,
        match=r"transformer-lens is not installed: pip install "
        r"'flowroutes-fast\[transformer-lens\]'",
    ):
        fr.trace(foreign, None, TEXT)
    for found in ("2.16.1", "5.0.0"):
        monkeypatch.setattr(integrations, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=rf"transformer-lens {found} is not supported.*>=3.9,<5"):
            fr.trace(foreign, None, TEXT)


def test_other_things_of_the_library_are_refused(monkeypatch):
    monkeypatch.setattr(integrations, "version", lambda name: "4.3.0")
    monkeypatch.setitem(sys.modules, "transformer_lens", types.ModuleType("transformer_lens"))
    foreign = type("HookedEncoder", (torch.nn.Module,), {"__module__": "transformer_lens.HookedEncoder"})()
    with pytest.raises(ValueError, match="HookedEncoder of TransformerLens cannot be traced: give a TransformerBridge"):
        fr.trace(foreign, None, TEXT)


logging.getLogger().setLevel(logging.ERROR)  # TransformerLens warns through the root logger


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("transformer_lens")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2", pad_token="2"
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tiny(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 2:
                parameter.mul_(4)
    return model


def bridge_of(model, tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer, device="cpu")


def hooked(name):
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("needs TransformerLens 3: from 4.0 on there is no HookedTransformer")
    sizes = {"n_layers": 2, "d_model": 32, "n_ctx": 32, "d_head": 8, "n_heads": 4, "d_vocab": 61, "seed": 1}
    model = HookedTransformer(HookedTransformerConfig(**sizes, **HOOKED[name]))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.rsplit(".", 1)[-1].lstrip("_").startswith("b"):
                parameter.normal_(0, 0.3)
            elif path.endswith(".w"):
                parameter.normal_(1, 0.3)
            else:
                parameter.mul_(8)
    return model


def near(a, b, atol=2e-6):
    assert a.shapes == b.shapes
    for part in PARTS:
        torch.testing.assert_close(
            getattr(a, part),
            getattr(b, part),
            rtol=atol,
            atol=atol,
            equal_nan=True,
            msg=lambda text, part=part: part + text,
        )


def state_of(bridge):
    return [
        (path, id(module), module.training, len(module._forward_hooks))
        for path, module in bridge.original_model.named_modules()
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_bridge_equals_its_transformers_model(name, tokenizer):
    model = tiny(name)
    expected = fr.trace(model, tokenizer, TEXT)
    bridge = bridge_of(model, tokenizer)
    logits = bridge(torch.tensor([IDS]))  # wires its hooks
    before = state_of(bridge)
    found = fr.trace(bridge, tokenizer, TEXT)
    near(found, expected, 0)
    assert found.tokens == expected.tokens
    assert found.prediction == expected.prediction
    assert state_of(bridge) == before
    assert torch.equal(bridge(torch.tensor([IDS])), logits)


def test_options_batches_and_second_run(tokenizer):
    model = tiny("llama")
    prompts, options = [TEXT, "5 6 7"], {"precision": "exact", "positions": [1, -1], "bias": "value"}
    expected = fr.trace(model, tokenizer, prompts, **options)
    bridge = bridge_of(model, tokenizer)
    for a, b in zip(fr.trace(bridge, tokenizer, prompts, **options), expected, strict=True):
        near(a, b, 0)
    trace = fr.trace(bridge, None, IDS)
    rows = {0: trace.heads[0, :, 0].argsort()[:2].numpy()}
    assert list(trace.refine(rows)) == [0]
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: tensor)
    found = fr.trace(bridge, None, [IDS, IDS[:3]], neurons=True)
    near(found[0], fr.trace(model_of(bridge), None, IDS))
    assert found[1].tokens == trace.tokens[:3]
    assert len(found[0].neuron_parts) == 2
    assert list(found[0].refine(rows)) == [0]
    with pytest.raises(ValueError, match="resume="):
        fr.trace(bridge, None, IDS, resume="somewhere")
    with pytest.raises(ValueError, match="outside the model's vocabulary of 61"):
        fr.trace(bridge, None, [3, 61])


def model_of(bridge):
    """A transformers model of its own with a bridge's weights."""
    with ours.transformers_model(bridge) as inside:
        copy = type(inside)(inside.config).eval()
        copy.load_state_dict(inside.state_dict(), strict=False)  # the bridge gives lm_head a bias of zeros
    return copy


def test_a_model_inside_a_bridge_is_refused_by_itself(tokenizer):
    bridge = bridge_of(model := tiny("llama"), tokenizer)
    with pytest.raises(ValueError, match="give its TransformerBridge instead"):
        fr.trace(model, tokenizer, TEXT)
    assert fr.trace(bridge, None, IDS).heads.isfinite().all()


def test_own_tokenizer_prepends_as_the_model_does(tokenizer):
    bridge = bridge_of(tiny("llama"), tokenizer)
    found = fr.trace(bridge, None, TEXT)
    assert found.token_ids == bridge.to_tokens(TEXT)[0].tolist()
    assert found.token_ids[0] == 1
    near(found, fr.trace(bridge, tokenizer, found.token_ids), 0)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt_oss"])
def test_through_hooks_and_from_a_cache(name, tokenizer):
    model = tiny(name)
    expected = fr.trace(model, None, IDS, precision="exact")
    bridge = bridge_of(model, tokenizer)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]), names_filter=ours.hooks_for(bridge))
    # its hooks do not show what is added
    if name in ("olmo2", "granite") and version("transformer-lens").startswith("3."):
        with pytest.raises(ValueError, match="misses the residual states"):
            fr.trace(cache, None, IDS)
        return
    found = fr.trace(cache, None, IDS, precision="exact")
    # the divisors of OLMo 2's norms are recovered from what they left: 6e-6 from float64 where others are below 1e-6
    room = 2e-5 if name == "olmo2" else 5e-6
    near(found, expected, room)
    assert found.tokens == [str(i) for i in IDS]
    assert found.prediction == []
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: tensor)
    seen = fr.trace(bridge, None, IDS, precision="exact")
    near(seen, expected, room)
    assert seen.model == found.model == expected.model
    assert [token for token, _ in seen.prediction] == [
        tokenizer.decode([int(token)]) for token, _ in expected.prediction
    ]


def test_a_hook_that_changes_the_state_is_part_of_the_trace(tokenizer):
    bridge = bridge_of(tiny("llama"), tokenizer)
    plain = fr.trace(bridge, None, IDS)
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_v", lambda value, hook: value * 0)]):
        changed = fr.trace(bridge, None, IDS)
        expected = fr.trace(bridge.run_with_cache(torch.tensor([IDS]))[1], None, IDS)
    near(changed, expected)
    assert not torch.allclose(changed.heads[0], plain.heads[0], atol=1e-2)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda out, hook: out * 0)]):
        near(fr.trace(bridge, None, IDS), fr.trace(bridge.run_with_cache(torch.tensor([IDS]))[1], None, IDS))
    with (
        bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda out, hook: out * 0)]),
        pytest.raises(ValueError, match=r"layer 1: what heads .* a hook changes this forward pass"),
    ):
        fr.trace(bridge, None, IDS)
    near(fr.trace(bridge, None, IDS), plain, 0)


def test_sinks_are_refused_where_only_hooks_tell(tokenizer):
    bridge = bridge_of(tiny("gpt_oss"), tokenizer)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]))
    with pytest.raises(ValueError, match="misses the residual states"):
        fr.trace(cache, None, IDS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_processed_weights(name, tokenizer):
    """Routes of a bridge are those of the weights it runs with; a cache made before does not belong to them."""
    bridge = bridge_of(tiny(name), tokenizer)
    _, before = bridge.run_with_cache(torch.tensor([IDS]))
    fr.trace(bridge, None, IDS)
    bridge.enable_compatibility_mode()
    _, after = bridge.run_with_cache(torch.tensor([IDS]))
    near(fr.trace(bridge, None, IDS), fr.trace(after, None, IDS))
    with pytest.raises(ValueError, match=r"layer 0: .* does not belong to the model's present weights"):
        fr.trace(before, None, IDS)


def test_caches(tokenizer):
    model = tiny("llama")
    expected = fr.trace(model, tokenizer, [TEXT, "5 6 7"])
    bridge = bridge_of(model, tokenizer)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        padded = tokenizer([TEXT, "5 6 7"], padding=True, return_tensors="pt")
        with torch.no_grad():
            _, cache = bridge.run_with_cache(padded["input_ids"], attention_mask=padded["attention_mask"])
        traces = fr.trace(cache, None, padded["input_ids"], attention_mask=padded["attention_mask"])
        for a, b in zip(traces, expected, strict=True):
            near(a, b)
            assert a.token_ids == b.token_ids
    _, cache = bridge.run_with_cache(TEXT, remove_batch_dim=True)
    found = fr.trace(cache, None, None)
    near(found, fr.trace(bridge, None, TEXT))
    near(fr.trace(cache, None, TEXT), found, 0)
    assert found.tokens == [str(i) for i in range(len(bridge.to_tokens(TEXT)[0]))]
    rows = {1: found.heads[1, :, 0].argsort()[:2].numpy()}
    assert list(found.refine(rows)) == [1]
    with pytest.raises(ValueError, match=r"the text has \[12\] tokens but the cache was made from \[1\d\]"):
        fr.trace(cache, None, IDS)
    with pytest.raises(ValueError, match="attention mask has shape"):
        fr.trace(cache, None, None, attention_mask=[[1, 1]])
    del cache
    assert found.refine(rows) is None


def test_caches_without_what_is_needed(tokenizer):
    bridge = bridge_of(tiny("llama"), tokenizer)
    names = [name for name in ours.hooks_for(bridge) if not name.endswith("hook_v")]
    _, cache = bridge.run_with_cache(torch.tensor([IDS]), names_filter=names)
    with pytest.raises(
        ValueError,
        match=r"the cache has no blocks.0.attn.hook_v, blocks.1.attn.hook_v: add them to "
        r"names_filter.*hooks_for",
    ):
        fr.trace(cache, None, None)
    with pytest.raises(ValueError, match=r"layer must be -1 or from 0 to 2, got 3"):
        ours.stack_head_results(cache, layer=3)
    with pytest.raises(ValueError, match=r"no blocks.0.attn.hook_z.*lets attn.hook_z pass"):
        ours.stack_head_results(cache)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]), pos_slice=-1)
    with pytest.raises(ValueError, match=r"layer 0: attention weights of 1 queries to 12 keys: cache all positions"):
        fr.trace(cache, None, None)
    cache.model = None
    with pytest.raises(ValueError, match="lost its model"):
        fr.trace(cache, None, None)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]))
    cache.cache_dict["blocks.1.attn.hook_pattern"] = torch.full_like(cache["pattern", 1], 1 / 12)
    with pytest.raises(ValueError, match="layer 1: attention looks ahead"):
        fr.trace(cache, None, None)


@pytest.mark.parametrize("name", HOOKED)
def test_hooked_transformer(name):
    """Against the paper's formula on TransformerLens' own cache, in float64."""
    model = hooked(name)
    found = fr.trace(model, None, IDS, precision="exact", neurons=not HOOKED[name].get("attn_only"))
    _, cache = model.run_with_cache(torch.tensor([IDS]))
    for layer, block in enumerate(model.blocks):
        pre, post = cache["resid_pre", layer][0].double(), cache["resid_post", layer][0].double()
        state = cache["resid_mid", layer][0].double() if found.shapes[layer] == "sequential" else post
        attention, weight = block.attn, block.attn.W_O.double()
        value = cache["v", layer][0].double()
        value = value.repeat_interleave(4 // value.shape[1], 1) - attention.b_V.double()
        parts = torch.einsum("hqk,khd,hdm->qkhm", cache["pattern", layer][0].double(), value, weight)
        constant = torch.einsum("hd,hdm->m", attention.b_V.double(), weight) + attention.b_O.double()
        constant = constant.expand_as(state)
        if "norms behind" in name:
            norm = block.ln1_post if name == "norms behind" else block.ln1
            key = "ln1_post" if name == "norms behind" else "ln1"
            factor = norm.w.double() / cache[f"blocks.{layer}.{key}.hook_scale"][0].double()
            parts, constant = parts * factor[:, None, None], constant * factor
        others = [pre, constant] + ([cache["mlp_out", layer][0].double()] if name == "parallel" else [])
        size = state.abs().sum(-1)
        edges = (size[:, None, None] - (state[:, None, None] - parts).abs().sum(-1)).clamp_min(0)
        rest = [(size - (state - part).abs().sum(-1)).clamp_min(0) for part in others]
        total = edges.sum((1, 2)) + sum(rest)
        torch.testing.assert_close(found.heads[layer].double(), edges.sum(1) / total[:, None], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.attention_residual[layer].double(), rest[0] / total, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.attention_bias[layer].double(), rest[1] / total, rtol=0, atol=1e-5)
    certified = fr.trace(model, None, torch.tensor(IDS), thresholds=[0.02])
    routes = [t.route(threshold=0.02).edges[["layer", "kind", "source", "target", "head"]] for t in (certified, found)]
    assert len(routes[0]) > 2
    assert set(routes[0].itertuples(index=False)) == set(routes[1].itertuples(index=False))
    near(fr.trace(cache, None, IDS, precision="exact"), found, 1e-6)
    top = model(torch.tensor([IDS]))[0, -1].softmax(-1).max(-1)
    assert found.prediction[0] == (str(int(top.indices)), pytest.approx(float(top.values), abs=1e-6))


def test_hooked_transformer_with_changed_weights():
    model = hooked("plain")
    _, cache = model.run_with_cache(torch.tensor([IDS]))
    model.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    with pytest.raises(ValueError, match="does not belong to the model's present weights"):
        fr.trace(cache, None, IDS)
    fr.trace(model, None, IDS)


@pytest.fixture(scope="module")
def runs(tokenizer):
    """Caches without head results, each model built once."""
    bridges = {}

    def run(name, batch):
        if name not in bridges:
            bridges[name] = bridge_of(tiny(name), tokenizer)
        return bridges[name].run_with_cache(
            torch.tensor([IDS, IDS[::-1]] if batch else [IDS]), remove_batch_dim=not batch
        )[1]

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": 1, "return_labels": True, "incl_remainder": True},
        {"layer": None, "return_labels": True},
        {"layer": 0, "incl_remainder": True, "return_labels": True},
        {"layer": 0},
        {"pos_slice": -1, "incl_remainder": True},
        {"pos_slice": (2, 5)},
        {"pos_slice": [1, 3], "apply_ln": True, "incl_remainder": True},
        {"layer": 1, "apply_ln": True},
    ],
)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_stack_head_results(name, options, batch, runs):
    cache = runs(name, batch)
    found = ours.stack_head_results(cache, **options)
    assert not any(
        key.endswith("hook_result") and cache.cache_dict[key].dim() == (4 if batch else 3)
        for key in list(cache.cache_dict)
    )
    expected = cache.stack_head_results(**options)
    if options.get("return_labels"):
        assert found[1] == expected[1]
        found, expected = found[0], expected[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_the_benchmarks_other_side():
    """The documentation shows what the benchmark times."""
    source = (ROOT / "benchmarks" / "integrations" / "transformer_lens.py").read_text(encoding="utf-8")
    code = source[source.index("def head_importances") : source.index("\n\n\n", source.index("def head_importances"))]
    assert code.strip() in (ROOT / "docs" / "integrations" / "transformer_lens.md").read_text(encoding="utf-8")


def test_the_benchmarks_heads(tokenizer):
    path = ROOT / "benchmarks" / "integrations" / "transformer_lens.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_transformer_lens", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    bridge = bridge_of(tiny("qwen2"), tokenizer)
    with contextlib.suppress(AttributeError), torch.no_grad():
        for block in bridge.original_model.model.layers:
            block.self_attn.v_proj.bias.zero_()
    heads = benchmark.head_importances(bridge, torch.tensor(IDS))
    torch.testing.assert_close(heads, fr.trace(bridge, None, IDS, precision="exact").heads, atol=1e-5, rtol=0)


def same_route(found, wanted):
    keys = ["layer", "kind", "source", "target", "head"]
    assert found.edges[keys].equals(wanted.edges[keys])
    assert len(wanted.edges)
    torch.testing.assert_close(
        torch.tensor(found.edges["importance"]), torch.tensor(wanted.edges["importance"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_rows_on_demand(name, tokenizer):
    """Routes of a bridge and of a cache evaluate the rows they reach, and are those of full traces."""
    model = tiny(name)
    full = fr.trace(model, None, IDS)
    bridge = bridge_of(model, tokenizer)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]), names_filter=ours.hooks_for(bridge))
    for source in (bridge, cache):
        full = fr.trace(source, None, IDS)
        for renormalize in (True, False):
            lazy = fr.trace(source, None, IDS, lazy=True)
            assert lazy.certificate["rows"] == 0
            same_route(lazy.route(-1, 0.05, renormalize), full.route(-1, 0.05, renormalize))
            assert 0 < lazy.certificate["rows"] < lazy.n_layers * len(IDS)
            same_route(lazy.route(5, 0.01, renormalize), full.route(5, 0.01, renormalize))
        same_route(fr.route(source, None, IDS, threshold=0.05), full.route(threshold=0.05))
        signed = fr.trace(source, None, IDS, lazy=True, measure="signed").token_attribution()
        wanted = fr.trace(source, None, IDS, measure="signed").token_attribution()
        torch.testing.assert_close(
            torch.tensor(signed["importance"]), torch.tensor(wanted["importance"]), rtol=0, atol=1e-5
        )
        near(lazy.complete(), full, 1e-5)
    assert lazy.certificate["states"] == "activations"


def test_caches_on_demand_of_a_padded_batch(tokenizer):
    bridge = bridge_of(tiny("llama"), tokenizer)
    tokenizer.padding_side = "left"
    padded = tokenizer([TEXT, "5 6 7"], padding=True, return_tensors="pt")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(padded["input_ids"], attention_mask=padded["attention_mask"])
    given = (None, padded["input_ids"])
    routes = fr.route(cache, *given, attention_mask=padded["attention_mask"])
    for found, one in zip(routes, fr.trace(cache, *given, attention_mask=padded["attention_mask"]), strict=True):
        same_route(found, one.route())


def test_caches_on_demand_say_what_changed(tokenizer):
    bridge = bridge_of(tiny("llama"), tokenizer)
    _, cache = bridge.run_with_cache(torch.tensor([IDS]))

    def lazy(**options):
        return fr.trace(cache, None, IDS, lazy=True, **options)

    for options, said in (
        ({"memory": "1GiB"}, "memory= is for models that run"),
        ({"positions": [3]}, "leave out positions="),
        ({"dense": True, "precision": "exact"}, "leave out lazy=True or dense=True"),
    ):
        with pytest.raises(ValueError, match=said):
            lazy(**options)
    found = lazy()
    found.route(3)
    found.release()
    found.route(3)
    with pytest.raises(ValueError, match="activations of this trace were released"):
        found.route(-1)
    found = lazy()
    cache.cache_dict["blocks.1.attn.hook_v"].mul_(1)
    with pytest.raises(ValueError, match="layer 1: activations were written to after the trace was made"):
        found.route(-1)
    found = lazy()
    with torch.no_grad():
        bridge.original_model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"layer 1: what heads .* does not belong to the model's present weights"):
        found.route(-1)
    pattern = torch.full_like(cache["pattern", 1], 1 / 12)
    cache.cache_dict["blocks.1.attn.hook_pattern"] = pattern
    with pytest.raises(ValueError, match="layer 1: attention looks ahead"):
        lazy().route(4)
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: tensor)
    with pytest.raises(ValueError, match=r"lazy= needs the transformers model inside .* or give its cache"):
        fr.trace(bridge, None, IDS, lazy=True)
