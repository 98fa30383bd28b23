"""What is given to a trace is used or refused by name; what the model really attends to is what the figures are
made of.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from test_process_state import IDS, LONG, same, tiny

import flowroutes_fast as fr
from flowroutes_fast.models.tokens import single_token, token_texts


def llama4(implementation):
    options = {
        "attention_chunk_size": 16,
        "head_dim": 16,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 1, 0],
    }
    model = tiny("llama4_text", **options)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["flex_attention", "eager"])
@pytest.mark.parametrize("kind", ["chunks", "windows", "causal"])
def test_attention_implementations_agree(implementation, kind):
    def make(name):
        if kind == "chunks":
            return llama4(name)
        model = tiny("mistral", sliding_window=7 if kind == "windows" else None)
        model.set_attn_implementation(name)
        return model

    prompts = [LONG[:40], LONG[3:24]]
    for a, b in zip(fr.trace(make("sdpa"), None, prompts), fr.trace(make(implementation), None, prompts), strict=True):
        same(a, b, 1e-5)


def test_windows_without_a_mask():
    """As flash attention has them: no mask, but a number of keys that are seen."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def windowed(module, query, key, value, mask, scaling, sliding_window=None, **options):
        assert mask is None
        age = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
        seen = (age >= 0) & (age < sliding_window)
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
        return found.transpose(1, 2), None

    AttentionInterface.register("windowed", windowed)
    AttentionMaskInterface.register("windowed", flash_attention_mask)
    model = tiny("mistral", sliding_window=7)
    expected = fr.trace(model, None, LONG[:40])
    model.set_attn_implementation("windowed")
    same(expected, fr.trace(model, None, LONG[:40]), 1e-5)


def test_chunks_are_those_of_the_model():
    """Keys of an earlier chunk have no influence: no sub-edge crosses a chunk where attention is chunked."""
    trace = fr.trace(llama4("flex_attention"), None, LONG[:40], precision="exact", dense=True)
    crossing = torch.arange(40)[:, None] // 16 != torch.arange(40) // 16
    assert trace.attention(0)[crossing].max() == 0
    assert trace.attention(2)[crossing & torch.ones(40, 40).tril().bool()].max() > 0  # full attention


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("tokens", [2, 16])
def test_two_sided_attention_is_refused(implementation, tokens):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        "gemma3_text",
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        head_dim=12,
        use_bidirectional_attention=True,
        attn_implementation=implementation,
    )
    model = AutoModel.from_config(config).eval()
    fr.trace(model, None, [5])  # one token sees itself, either way
    for _ in range(2):
        with pytest.raises(ValueError, match="two-sided"):
            fr.trace(model, None, (IDS * 2)[:tokens])


def test_two_sided_modules_are_refused():
    model = tiny()
    fr.trace(model, None, IDS)
    for block in model.model.layers:
        block.self_attn.is_causal = False
    with pytest.raises(ValueError, match="two-sided"):
        fr.trace(model, None, IDS)


def rope(kind):
    if kind == "longrope":
        return {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 6,
            "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        }
    return {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_batch_equals_single_runs(kind, resume, tmp_path):
    lengths = (8, 32, 11, 40, 16, 17)
    prompts = [LONG[n : n + n_tokens] for n, n_tokens in enumerate(lengths)]
    model = tiny(rope_parameters=rope(kind))
    singles = [fr.trace(model, None, ids) for ids in prompts]
    together = fr.trace(model, None, prompts, resume=tmp_path / "run" if resume else None)
    for single, one in zip(singles, together, strict=True):
        assert (single.heads - one.heads).abs().max() < 1e-5


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("by_layer", [False, True])
def test_dynamic_rotations_are_those_of_a_fresh_model(by_layer, resume, tmp_path):
    """Beyond its training length a model is stretched by the prompt's own length, not by that of the longest prompt
    so far.
    """
    own = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

    def make():
        if not by_layer:
            return tiny(max_position_embeddings=16, rope_parameters=own)
        ropes = {"full_attention": own, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        kinds = ["sliding_attention", "full_attention", "full_attention"]
        return tiny(
            "gemma3_text",
            head_dim=12,
            max_position_embeddings=16,
            rope_parameters=ropes,
            layer_types=kinds,
            sliding_window=9,
        )

    prompts = [LONG[:40], LONG[3:20], LONG[5:21], LONG[:64], LONG[2:10]]
    model = make()
    together = fr.trace(model, None, prompts, resume=tmp_path / "run" if resume else None)
    for ids, one in zip(prompts, together, strict=True):
        expected = fr.trace(make(), None, ids)
        assert (expected.heads - one.heads).abs().max() < 1e-5
        assert (expected.heads - fr.trace(model, None, ids).heads).abs().max() < 1e-5
    with pytest.raises(ValueError, match="context holds 64"):
        fr.trace(model, None, LONG[:65])


def test_a_models_rotations_come_back():
    model = tiny(max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    with torch.no_grad():
        model(torch.tensor([LONG[:40]]))
        before = model(torch.tensor([LONG[:20]])).logits
        fr.trace(model, None, LONG[:60])
        assert torch.equal(model(torch.tensor([LONG[:20]])).logits, before)


def test_routes_of_other_rotations_are_not_verified():
    model = tiny(rope_parameters=rope("longrope"))
    trace = fr.trace(model, None, LONG[:40])
    trace.route(threshold=0.02).verify(model, random=0)
    with pytest.raises(ValueError, match="changes with the prompt's length"):
        trace.route(7, threshold=0.02).verify(model)


@pytest.mark.parametrize("how", ["in place", "data", "adapter"])
def test_rows_are_not_settled_by_a_changed_model(how):
    """Rows of two models would be mixed in one route."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)).eval()
    trace = fr.trace(model, None, LONG, tolerance=0.3, thresholds=())
    fr.trace(model, None, LONG[:9])
    trace.route(threshold=0.003)
    assert trace.work["exhausted"] > 0  # refined by the model as it was
    weight = model.base_model.model.model.layers[0].self_attn.o_proj.base_layer.weight
    if how == "in place":
        with torch.no_grad():
            weight[0, 0] += 0.01
    elif how == "data":
        weight.data.mul_(3)
    else:
        model.disable_adapter_layers()
    with pytest.raises(ValueError, match="trace again"):
        trace.route(threshold=0.0021)


def test_inputs_that_the_model_fails_with():
    from transformers import GPT2Config, GPT2DoubleHeadsModel

    model = GPT2DoubleHeadsModel(
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=101, n_positions=64, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(ValueError, match=r"GPT2DoubleHeadsModel fails with 'mc_token_ids' \[1, 1\]"):
        fr.trace(model, None, {"input_ids": [IDS], "mc_token_ids": [[7]]})
    assert model.training


def test_longrope_differs_beyond_its_limit():
    """The prompts above really are rotated in two ways."""
    model = tiny(rope_parameters=rope("longrope"))
    short, long = fr.trace(model, None, LONG[:16], positions=[15]), fr.trace(model, None, LONG[:17], positions=[15])
    assert (short.heads[:, 15] - long.heads[:, 15]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"pixel_values": torch.zeros(1, 3, 16, 16)}, "'pixel_values' is not used"),
        ({"inputs_embeds": torch.zeros(1, 8, 48)}, "'inputs_embeds' is not used"),
        ({"labels": torch.tensor([IDS])}, "'labels' is not used"),
        ({"past_key_values": object()}, "'past_key_values' is not used"),
        ({"position_ids": torch.arange(1, 9)[None]}, "'position_ids' is not used"),
        ({"token_type_ids": torch.ones(1, 8, dtype=torch.long)}, "'token_type_ids' is not used"),
        ({"something": 3}, "'something' is not used"),
    ],
)
def test_what_is_not_used_is_refused(extra, says):
    with pytest.raises(ValueError, match=says):
        fr.trace(tiny(), None, {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 8), **extra})


def test_what_says_nothing_is_no_matter():
    model, expected = tiny(), fr.trace(tiny(), None, IDS)
    given = {
        "input_ids": torch.tensor([IDS]),
        "position_ids": torch.arange(8)[None],
        "token_type_ids": torch.zeros(1, 8),
        "pixel_values": None,
    }
    same(expected, fr.trace(model, None, given)[0])
    same(expected, fr.trace(model, None, {"input_ids": np.array(IDS)}))


def test_token_types_are_used_where_the_model_takes_them():
    model = tiny("gpt2", n_embd=48, n_layer=2, n_head=4)
    plain = fr.trace(model, None, IDS)
    typed = fr.trace(
        model, None, {"input_ids": torch.tensor([IDS]), "token_type_ids": torch.tensor([[1] * 4 + [2] * 4])}
    )[0]
    assert (plain.heads - typed.heads).abs().max() > 1e-4
    with torch.no_grad():
        logits = model(torch.tensor([IDS]), token_type_ids=torch.tensor([[1] * 4 + [2] * 4])).logits[0, -1]
    assert typed.prediction[0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)
    with pytest.raises(ValueError, match="one prompt at a time"):
        fr.trace(
            model, None, {"input_ids": torch.tensor([IDS, IDS]), "token_type_ids": torch.ones(2, 8, dtype=torch.long)}
        )


LEFT, MASK = [0, 0, 0, *IDS], [0] * 3 + [1] * 8


@pytest.mark.parametrize(
    "mask", [MASK, [MASK], torch.tensor([MASK]).bool(), torch.tensor(MASK).float(), np.array([MASK], np.int8)]
)
@pytest.mark.parametrize("ids", [LEFT, [LEFT], np.array(LEFT), torch.tensor([LEFT])])
def test_padding_of_one_prompt(ids, mask):
    found = fr.trace(tiny(), None, {"input_ids": ids, "attention_mask": mask})
    same(fr.trace(tiny(), None, IDS), found[0] if isinstance(found, list) else found)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([[1, 1, 1, 1, 2, 2, 2, 2]], "also holds 2: documents"),
        ([[0.5] * 8], "also holds 0.5"),
        ([[-1e9] * 3 + [0.0] * 5], "also holds -1000000000.0"),
        ([[float("nan")] * 8], "also holds nan"),
        ([[1, 1, 1, 0, 1, 1, 1, 1]], "holes"),
        ([[0] * 8], "padding only"),
        ([1] * 7, "shape"),
        ([[1] * 8] * 2, "shape"),
        (torch.ones(1, 1, 8, 8), "shape"),
        (torch.ones(1, 8, device="meta"), "meta device"),
        ([[1], [1, 1]], "must be an array"),
        ({"full_attention": None}, "must be an array"),
        ("11111111", "must be an array"),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("ids", [IDS, [IDS]])
def test_masks_that_are_none(mask, says, inside, ids):
    with pytest.raises(ValueError, match=says):
        fr.trace(tiny(), None, {"input_ids": ids, "attention_mask": mask}) if inside else fr.trace(
            tiny(), None, ids, attention_mask=mask
        )


def test_two_masks_that_differ():
    given = {"input_ids": [LEFT], "attention_mask": [[1] * 11]}
    with pytest.raises(ValueError, match="another 'attention_mask'"):
        fr.trace(tiny(), None, given, attention_mask=[MASK])
    same(
        fr.trace(tiny(), None, IDS),
        fr.trace(tiny(), None, given | {"attention_mask": [MASK]}, attention_mask=[MASK])[0],
    )


def test_positions_are_those_of_the_trace():
    """gpt2's positions are learned: counting the padding gives other states."""
    model = tiny("gpt2", n_embd=48, n_layer=2, n_head=4)
    given = {"input_ids": [LEFT], "attention_mask": [MASK]}
    same(fr.trace(model, None, IDS), fr.trace(model, None, given | {"position_ids": [[1, 1, 1, *range(8)]]})[0], 1e-6)
    for positions in ([list(range(11))], list(range(8)), [list(range(8))], torch.arange(11).expand(3, 1, 11)):
        with pytest.raises(ValueError, match="'position_ids' is not used"):
            fr.trace(model, None, given | {"position_ids": positions})


def test_token_types_go_without_their_padding():
    model = tiny("gpt2", n_embd=48, n_layer=2, n_head=4)
    types = [1] * 4 + [2] * 4
    expected = fr.trace(model, None, {"input_ids": [IDS], "token_type_ids": [types]})[0]
    given = {"input_ids": [LEFT], "attention_mask": [MASK]}
    same(expected, fr.trace(model, None, given | {"token_type_ids": [[5, 5, 5, *types]]})[0])
    for wrong, says in (([types], "has shape"), ([[0.5] * 11], "must hold integers")):
        with pytest.raises(ValueError, match=f"'token_type_ids' {says}"):
            fr.trace(model, None, given | {"token_type_ids": wrong})


@pytest.mark.parametrize(
    "ids", [torch.zeros(8, dtype=torch.long, device="meta"), torch.zeros(1, 8, dtype=torch.long, device="meta")]
)
def test_ids_without_numbers(ids):
    with pytest.raises(ValueError, match="meta device"):
        fr.trace(tiny(), None, ids)


def test_what_runs_the_model_again_needs_what_it_was_given(tmp_path):
    """A trace does not keep the image: neither page details nor an ablation may be made from the tokens alone."""
    model = llava()
    given = {"input_ids": torch.tensor([[5, 100, 100, 100, 100, 7, 8, 9]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    (trace,) = fr.trace(model, None, given)
    (signed,) = fr.trace(model, None, given | {"pixel_values": given["pixel_values"] + 1}, measure="signed")
    assert list(trace.inputs) == ["pixel_values"]
    kept = fr.load_trace(trace.save(tmp_path / "trace.safetensors"))
    route = trace.route(threshold=0.02)
    again = fr.load_route(route.save(tmp_path / "route.json"))
    assert trace.inputs == kept.inputs == route.inputs == again.inputs != signed.inputs
    for one in (trace, kept):
        with pytest.raises(ValueError, match="'pixel_values', which the trace does not keep"):
            one.to_html(tmp_path / "page.html", model=model)
    for one in (route, again):
        with pytest.raises(ValueError, match="'pixel_values', which the route does not keep"):
            one.verify(model)
    with pytest.raises(ValueError, match="another prompt"):
        trace.to_html(tmp_path / "page.html", signed=signed)
    trace.to_html(tmp_path / "page.html")


def llava():
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=100, image_token_id=100, vision_feature_layer=-1
    )
    return AutoModelForImageTextToText.from_config(config).eval()


def test_images():
    """An image takes the place of its tokens: the figures are those of the text model on what the vision tower gave."""
    model = llava()
    ids, pixels = [5, 100, 100, 100, 100, 7, 8, 9], torch.randn(1, 3, 16, 16)
    given = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "pixel_values": pixels,
    }
    (trace,) = fr.trace(model, None, given)
    with torch.no_grad():
        logits = model(input_ids=given["input_ids"], pixel_values=pixels).logits[0, -1]
    assert trace.prediction[0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)
    assert trace.tokens[1:5] == ["100"] * 4
    (other,) = fr.trace(model, None, given | {"pixel_values": pixels + 1})
    assert (trace.heads - other.heads).abs().max() > 1e-5
    route = trace.route(threshold=0.0123)  # refined by a second pass, with the same image
    assert len(route.edges)
    with pytest.raises(ValueError, match="one prompt at a time"):
        fr.trace(model, None, {"input_ids": torch.tensor([ids, ids]), "pixel_values": pixels})
    with pytest.raises(ValueError, match="resume="):
        fr.trace(model, None, given, resume="nowhere")


@pytest.mark.parametrize("wanted", ["sequence", "tokens", "several", "regression", "questions", "base"])
def test_heads_that_predict_no_tokens(wanted):
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    kinds = {"tokens": AutoModelForTokenClassification, "questions": AutoModelForQuestionAnswering, "base": AutoModel}
    labels = (
        {"num_labels": 1}
        if wanted == "regression"
        else {"id2label": {0: "good", 1: "bad", 2: "ugly"}, "label2id": {"good": 0, "bad": 1, "ugly": 2}}
    )
    if wanted == "several":
        labels["problem_type"] = "multi_label_classification"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=512,
        pad_token_id=0,
        **labels,
    )
    model = kinds.get(wanted, AutoModelForSequenceClassification).from_config(config).eval()
    prompts = [IDS, LONG[:20]]
    for ids, trace in zip(prompts, fr.trace(model, None, prompts), strict=True):
        same(fr.trace(model, None, ids), trace, 1e-6)
        if wanted in ("regression", "questions", "base"):
            assert trace.prediction == []
        else:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits
            logits = logits[0] if wanted != "tokens" else logits[0, -1]
            scores = logits.sigmoid() if wanted == "several" else logits.softmax(-1)
            assert trace.prediction[0][0] == ["good", "bad", "ugly"][int(scores.argmax())]
            assert dict(trace.prediction) == pytest.approx(
                {["good", "bad", "ugly"][i]: float(p) for i, p in enumerate(scores)}, abs=1e-5
            )
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM"):
        trace.route(threshold=0.02).verify(model)
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM"):
        fr.patching(model, None, IDS, IDS[::-1], answer=5, wrong=6)


class Tokenizer:
    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    def decode(self, ids):
        return "".join(map(str, ids))


class Processor:
    def __init__(self):
        self.tokenizer, self.image_processor = Tokenizer(), object()

    def __call__(self, images=None, text=None):
        raise AssertionError("not to be called")


@pytest.mark.parametrize(
    "text",
    [
        None,
        5,
        1.5,
        b"bytes",
        {"a", "b"},
        pd.Series(["a", "b"]),
        pd.Series([1, 2]),
        object(),
        iter(["a"]),
        {"role": "user", "content": "Hi"},
        [{"role": "user", "content": "Hi"}],
        [[{"role": "user", "content": "Hi"}]],
        {"text": "Hi"},
        [None],
        ["Hi", None],
        [1, "a"],
        [True, False],
        [1.0, 2.0],
        np.array(["a"]),
        np.array([1.5]),
        torch.tensor([0.5]),
        torch.tensor([True]),
        [["a", "b"]],
        range,
    ],
)
def test_other_kinds_of_text_are_refused(text):
    with pytest.raises(TypeError):
        fr.trace(tiny(), Tokenizer(), text)


@pytest.mark.parametrize("tokenizer", ["gpt2", 5, Processor(), object()])
def test_what_is_no_tokenizer_is_refused(tokenizer):
    with pytest.raises(TypeError, match="tokenizer"):
        fr.trace(tiny(), tokenizer, "Hi")


def test_raw_tokenizers_are_refused():
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import WordLevel

    with pytest.raises(TypeError, match="must be one of transformers"):
        fr.trace(tiny(), Raw(WordLevel({"a": 0}, unk_token="a")), "a")


@pytest.mark.parametrize("text", ["\n", " ", "\t\n", "\u3000"])
def test_white_space_is_a_prompt(text):
    assert fr.trace(tiny(), Tokenizer(), text).tokens
    assert fr.trace(tiny(), lambda text: {"input_ids": IDS}, text).tokens == list(map(str, IDS))


def test_tokenizers_that_return_batches_or_tensors():
    expected = fr.trace(tiny(), None, IDS)
    for answer in (torch.tensor([IDS]), torch.tensor(IDS), [IDS], np.array([IDS])):
        same(expected, fr.trace(tiny(), lambda text, answer=answer: {"input_ids": answer}, "x"))
    with pytest.raises(TypeError, match="must return a mapping"):
        fr.trace(tiny(), lambda text: IDS, "x")


@pytest.fixture(scope="module")
def sentencepiece():
    """As SentencePiece's tokenizers are built: spaces are ▁, and every text begins with one."""
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "▁", "▁Mary", "Mary", "▁John", "▁gave", "▁to", "s", "▁▁", "John", "▁a", "▁Ann"]
    raw = Raw(models.Unigram([(w, -1.0 - len(words[i]) * 0.0 - i * 0.01) for i, w in enumerate(words)], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    raw.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>")


def test_leading_spaces_of_sentencepiece(sentencepiece):
    assert token_texts(sentencepiece, [3, 4, 9, 2, 8]) == [" Mary", "Mary", "  ", " ", "s"]
    trace = fr.trace(tiny(), sentencepiece, "Mary gave")
    assert trace.tokens == [" Mary", " gave"]


@pytest.mark.parametrize(("text", "token"), [(" Mary", 3), ("Mary", 4), (" John", 5), ("John", 10), ("s", 8)])
def test_answers_of_sentencepiece(sentencepiece, text, token):
    assert single_token(sentencepiece, text) == token
    by_text = fr.patching(tiny(), sentencepiece, IDS, IDS[::-1], answer=text, wrong=" gave", layers=[0])
    by_id = fr.patching(tiny(), sentencepiece, IDS, IDS[::-1], answer=token, wrong=6, layers=[0])
    assert by_text["change"].tolist() == by_id["change"].tolist()


@pytest.mark.parametrize("text", ["Ann", " Mary John", "", "gave"])
def test_answers_that_are_no_token(sentencepiece, text):
    with pytest.raises(ValueError, match="does it lack its leading space"):
        single_token(sentencepiece, text)


def test_answers_of_byte_level_tokenizers(demo):
    _, tokenizer = demo
    for text in (" Mary", "Mary", " the", "\n", "é", " "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            assert single_token(tokenizer, text) == ids[0]
            assert token_texts(tokenizer, ids) == [text]


def pieces(*words, **options):
    """A tokenizer in Python, as slow ones are: decoding knows no id above its own, and takes off a leading space."""
    from transformers import PreTrainedTokenizer

    class Pieces(PreTrainedTokenizer):
        def get_vocab(self):
            return {word: n for n, word in enumerate(words)}

        @property
        def vocab_size(self):
            return len(words)

        def _tokenize(self, text):
            return [text]

        def _convert_token_to_id(self, token):
            return self.get_vocab().get(token, 0)

        def _convert_id_to_token(self, index):
            return words[index]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens).replace("Ġ", " ").replace("▁", " ")

    return Pieces(unk_token=words[0], **options)


def test_spaces_that_decoding_cleans_up():
    tokenizer = pieces("<unk>", "Ġ.", "Ġn't", "▁,", "Ġthe", clean_up_tokenization_spaces=True)
    assert token_texts(tokenizer, range(1, 5)) == [" .", " n't", " ,", " the"]


def test_ids_that_the_tokenizer_does_not_have(sentencepiece):
    """Models have more rows than tokenizers have tokens; such a row may well be predicted."""
    tokenizer = pieces("<unk>", "▁a")
    assert token_texts(tokenizer, [1, 99]) == [" a", "<99>"]
    assert token_texts(sentencepiece, [99]) == ["<99>"]
    assert fr.trace(tiny(), tokenizer, [1, 99]).tokens == [" a", "<99>"]


def test_unknown_words_are_no_answer():
    tokenizer = pieces("<unk>", "Mary")
    assert single_token(tokenizer, "Mary") == 1
    assert single_token(tokenizer, "<unk>") == 0
    with pytest.raises(ValueError, match="'zebra' is unknown to the tokenizer"):
        single_token(tokenizer, "zebra")


def test_marks_of_the_text_itself_are_no_spaces(demo):
    from copy import deepcopy

    tokenizer = deepcopy(demo[1])
    tokenizer.add_tokens(["▁bar"])
    token = tokenizer.convert_tokens_to_ids("▁bar")
    assert token_texts(tokenizer, [token]) == ["▁bar"]
    assert single_token(tokenizer, "▁bar") == token


def test_messages_go_through_the_template(demo):
    model, tokenizer = demo
    messages = [{"role": "user", "content": "Say hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = fr.trace(model, tokenizer, messages, lazy=True)
    assert found.token_ids == wanted
    both = fr.trace(model, tokenizer, [messages, messages], lazy=True)
    assert [one.token_ids for one in both] == [wanted, wanted]
    for wrong, error in (
        ([{"role": "user", "content": [{"type": "image"}]}], TypeError),
        ([{"role": "user"}], TypeError),
        ({"role": "user", "content": "Hi"}, TypeError),
    ):
        with pytest.raises(error):
            fr.trace(model, tokenizer, wrong)
    with pytest.raises(TypeError, match="need a tokenizer"):
        fr.trace(model, None, messages)
