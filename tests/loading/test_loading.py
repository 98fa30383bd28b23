"""The ways people hold a model: batches, padding, positions, precisions, adapters, quantised and offloaded weights;
and what is refused.
"""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from conftest import tiny
from families import make

import flowroutes_fast as fr

IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 7, 51]
PROMPTS = [IDS, IDS[:5], [9, 8], [44] * 9]
KEYS = ["layer", "kind", "source", "target", "head"]


def needs(*packages):
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def same(a, b, atol=2e-5):
    assert a.tokens == b.tokens
    for name in ("heads", "attention_residual", "attention_bias", "ffn"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=atol)
    for threshold in (0.01, 0.04):
        mine, theirs = (t.route(threshold=threshold).edges.sort_values(KEYS, ignore_index=True) for t in (a, b))
        assert mine[KEYS].equals(theirs[KEYS])
        np.testing.assert_allclose(mine["importance"], theirs["importance"], atol=10 * atol)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "opt", "olmo3", "jamba", "gpt_oss"])
def test_a_batch_equals_single_runs(name):
    model = make(name)
    many = fr.trace(model, None, PROMPTS, tolerance=0)
    assert [len(t.tokens) for t in many] == [13, 5, 2, 9]
    for trace, ids in zip(many, PROMPTS, strict=True):
        alone = fr.trace(model, None, ids, tolerance=0)
        same(trace, alone)
        np.testing.assert_allclose([p for _, p in trace.prediction], [p for _, p in alone.prediction], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part(side):
    model = tiny("qwen2")
    pads = [[0] * (13 - len(ids)) for ids in PROMPTS]
    rows = [
        (p + i, [0] * len(p) + [1] * len(i)) if side == "left" else (i + p, [1] * len(i) + [0] * len(p))
        for i, p in zip(PROMPTS, pads, strict=True)
    ]
    encoded = {"input_ids": torch.tensor([r[0] for r in rows]), "attention_mask": torch.tensor([r[1] for r in rows])}
    for trace, ids in zip(fr.trace(model, None, encoded, tolerance=0), PROMPTS, strict=True):
        same(trace, fr.trace(model, None, ids, tolerance=0))


def test_a_batch_in_exact_precision_and_signed():
    model = tiny("llama")
    for options in ({"precision": "exact"}, {"measure": "signed"}, {"neurons": True, "tolerance": 0}):
        for trace, ids in zip(fr.trace(model, None, PROMPTS, **options), PROMPTS, strict=True):
            alone = fr.trace(model, None, ids, **options)
            same(trace, alone)
            if "neurons" in options:
                assert len(trace.neurons(1)) == len(alone.neurons(1))


def test_a_generated_text_is_explained_token_by_token():
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        text = model.generate(torch.tensor([IDS[:6]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    trace = fr.trace(model, None, text)
    assert len(trace.tokens) == 11
    for k in range(5, 11):
        shorter = fr.trace(model, None, text[: k + 1], tolerance=0)
        a, b = (t.route(position=k).edges.sort_values(KEYS, ignore_index=True) for t in (trace, shorter))
        assert a[KEYS].equals(b[KEYS])
        if k < 10:
            assert int(shorter.prediction[0][0]) == int(text[k + 1])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_neox", "bloom", "jamba", "qwen3_next"])
@pytest.mark.parametrize("positions", [[-1], [2, 7], [11, 12]])
def test_positions_limit_the_rows(name, positions):
    model = make(name)
    whole, some = (
        fr.trace(model, None, IDS, tolerance=0, neurons=name == "llama"),
        fr.trace(model, None, IDS, tolerance=0, positions=positions, neurons=name == "llama"),
    )
    rows = [p % 13 for p in positions]
    others = [p for p in range(13) if p not in rows]
    for field in ("heads", "attention_residual", "mixer", "ffn"):
        np.testing.assert_allclose(getattr(some, field)[:, rows], getattr(whole, field)[:, rows], atol=2e-5)
        assert getattr(some, field)[:, others].isnan().all()
    for layer in range(len(whole.shapes)):
        mine, theirs = some.edges(layer), whole.edges(layer)
        theirs = theirs[theirs["query"].isin(rows)].reset_index(drop=True)
        assert mine[["query", "key", "head"]].equals(theirs[["query", "key", "head"]])
        if name == "llama":
            assert set(some.neurons(layer)["position"]) == set(rows)
    assert some.certificate["worst_error"] < 1e-5
    with pytest.raises(ValueError, match=r"position .* was not traced"):
        some.route(position=positions[0], threshold=0.001)


def test_positions_in_exact_precision():
    model = tiny("llama")
    some, whole = (fr.trace(model, None, IDS, precision="exact", positions=p) for p in ([4, 9], None))
    np.testing.assert_allclose(some.heads[:, [4, 9]], whole.heads[:, [4, 9]], atol=1e-6)
    with pytest.raises(ValueError, match="dense"):
        fr.trace(model, None, IDS, precision="exact", dense=True, positions=[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "qwen3_next", "bitnet"])
def test_half_precision(name, dtype):
    whole = {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "shared_expert_intermediate_size": 32,
    }
    model = make(name, **(whole if name == "qwen3_next" else {}))
    reference = fr.trace(model, None, IDS, precision="exact")
    model = model.to(dtype)
    exact, certified = fr.trace(model, None, IDS, precision="exact"), fr.trace(model, None, IDS)
    np.testing.assert_allclose(exact.heads, reference.heads, atol=0.1)
    a, b = (t.route(threshold=0.04).edges.sort_values(KEYS, ignore_index=True) for t in (exact, certified))
    assert a[KEYS].equals(b[KEYS])


def test_a_model_in_training_mode_is_put_back():
    model = tiny("gpt2").train()
    trace = fr.trace(model, None, IDS)
    assert model.training
    same(trace, fr.trace(model.eval(), None, IDS))


def test_compiled_models():
    model = tiny("llama")
    plain = fr.trace(model, None, IDS)
    same(fr.trace(torch.compile(model, backend="eager"), None, IDS), plain)
    model.compile(backend="eager")
    same(fr.trace(model, None, IDS), plain)
    assert model._compiled_call_impl is not None


@needs("peft")
@pytest.mark.parametrize("merged", [False, True])
def test_lora_adapters(merged):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny("llama"), LoraConfig(r=3, target_modules=["o_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    expected = fr.trace(copy.deepcopy(model).merge_and_unload(), None, IDS, neurons=True, tolerance=0)
    if merged:
        model.merge_adapter()
    found = fr.trace(model, None, IDS, neurons=True, tolerance=0)
    same(found, expected)
    assert found.neurons(1)["neuron"].tolist() == expected.neurons(1)["neuron"].tolist()
    with model.disable_adapter():
        same(
            fr.trace(model, None, IDS, tolerance=0), fr.trace(tiny("llama"), None, IDS, tolerance=0)
        ) if not merged else None


@needs("accelerate")
@pytest.mark.parametrize("place", ["disk", "some"])
def test_offloaded_weights(place, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    device_map = (
        {"": "disk"}
        if place == "disk"
        else {
            "model.embed_tokens": "cpu",
            "lm_head": "cpu",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
        }
    )
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    same(
        fr.trace(offloaded, None, IDS, tolerance=0, neurons=True), fr.trace(model, None, IDS, tolerance=0, neurons=True)
    )


@needs("torchao")
@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights(bits):
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    model = make("llama", hidden_size=64, head_dim=16, num_attention_heads=4, intermediate_size=128).to(torch.bfloat16)
    before = fr.trace(model, None, IDS, precision="exact")
    try:
        quantize_(
            model,
            Int8WeightOnlyConfig()
            if bits == 8
            else Int4WeightOnlyConfig(group_size=32, int4_packing_format="plain_int32"),
        )
    except (ValueError, ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        pytest.skip(f"torchao cannot make {bits}-bit weights here: {str(error).splitlines()[0][:80]}")
    trace = fr.trace(model, None, IDS, neurons=True)
    np.testing.assert_allclose(trace.heads, before.heads, atol=0.05 if bits == 8 else 0.5)


@needs("bitsandbytes")
def test_bitsandbytes_weights():
    import bitsandbytes as bnb

    # bitsandbytes packs in blocks
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 128}
    model = make("llama", **sizes).to(torch.bfloat16)
    weights = {name: module.weight for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))}
    for name in list(weights):
        parent, child = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(parent, child)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        new.load_state_dict(old.state_dict())
        try:
            setattr(parent, child, new.to("cpu"))
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"bitsandbytes cannot quantise here: {str(error).splitlines()[0][:80]}")
    trace = fr.trace(model, None, IDS, neurons=True)
    assert bool(trace.heads.isfinite().all())


def test_tied_weights():
    model = make("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert fr.trace(model, None, IDS).certificate["worst_error"] < 0.011


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (torch.tensor([[1, 2], [3, 4]]), {"attention_mask": [[1, 1]]}, r"mask has shape \[1, 2\]"),
        (
            torch.tensor([[1, 2, 3], [3, 4, 5]]),
            {"attention_mask": [[1, 1, 1], [1, 0, 1]]},
            "prompt 1: the attention mask has holes",
        ),
        (torch.tensor([[1, 2, 3], [3, 4, 5]]), {"attention_mask": [[1, 1, 1], [0, 0, 0]]}, "prompt 1: .*padding only"),
        ([[1, 2], []], {}, "prompt 1: .*no tokens"),
        ([[1, 2], [500]], {}, "prompt 1: token id 500"),
        ([1, 2], {"attention_mask": [1]}, r"mask has shape \[1\], the ids have \[2\]"),
        ([1, 2, 3], {"attention_mask": [1, 0, 1]}, "mask has holes"),
        ([1, 2], {"positions": [2]}, "position 2 is out of range"),
        ([1, 2], {"positions": []}, "positions is empty"),
    ],
)
def test_bad_batches(text, options, says):
    with pytest.raises(ValueError, match=says):
        fr.trace(tiny("llama"), None, text, **options)


def test_models_without_weights_are_refused():
    from transformers import AutoModelForCausalLM

    config = tiny("llama").config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"no weights for model.embed_tokens.weight"):
        fr.trace(empty, None, IDS)
    half = tiny("llama")
    half.model.layers[2].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match=r"no weights for model.layers.2.mlp.down_proj"):
        fr.trace(half, None, IDS)


def test_falcon_with_alibi_needs_its_eager_attention():
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        fr.trace(make("falcon, sequential", attn_implementation="sdpa"), None, IDS)


def test_every_way_to_write_ids():
    model = tiny("llama")
    expected = fr.trace(model, None, IDS)
    for ids in (
        tuple(IDS),
        np.array(IDS),
        torch.tensor(IDS),
        list(np.array(IDS)),
        {"input_ids": IDS, "attention_mask": [1] * 13},
    ):
        same(fr.trace(model, None, ids), expected)
    for ids in ([IDS], np.array([IDS]), torch.tensor([IDS]), [torch.tensor(IDS)], {"input_ids": [IDS]}):
        (trace,) = fr.trace(model, None, ids)
        same(trace, expected)


def test_a_language_model_beside_a_vision_tower():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = make("gemma3_text")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    same(fr.trace(model, None, IDS, tolerance=0), fr.trace(text, None, IDS, tolerance=0))


@needs("peft")
def test_adapters_of_virtual_tokens_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="virtual tokens"):
        fr.trace(model, None, IDS)
