"""What captum's result holds is the token attribution of the trace, and its plots draw it."""

import importlib.metadata

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flowroutes_fast as fr
from flowroutes_fast.integrations import captum as adapter

WORDS = ["When", "Mary", "and", "John", "went", "to", "the", "store", ",", "gave", "a", "drink"]
PROMPT = "When Mary and John went to the store ,"


def tiny(parallel=False):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 20,
    }
    if parallel:
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, use_parallel_residual=True)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).eval()


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>", "<pad>"])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>", bos_token="<pad>"
    )


IDS = [3, 4, 5, 6, 7, 8, 9, 1]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "exact"},
        {"precision": "exact", "dense": False},
        {"measure": "signed"},
        {"floor": 0.05, "thresholds": ()},
    ],
)
def test_matrix_is_the_token_attribution_of_every_position(parallel, options):
    trace = fr.trace(tiny(parallel), None, IDS, **options)
    found = adapter.token_matrix(trace, [7, 2, 0])
    wanted = np.stack([trace.token_attribution(p).importance for p in (7, 2, 0)])
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)


def test_outputs():
    trace = fr.trace(tiny(), None, IDS)
    assert adapter._outputs(trace, None) == [8]
    assert adapter._outputs(trace, 6) == adapter._outputs(trace, -2) == adapter._outputs(trace, slice(6, 8)) == [6, 7]
    assert adapter._outputs(trace, slice(7, None)) == adapter._outputs(trace, slice(-1, None)) == [7, 8]
    assert adapter._outputs(trace, slice(-2, -1)) == [6]
    assert adapter._outputs(trace, slice(7, 5, -1)) == adapter._outputs(trace, np.int64(6)) == [6, 7]
    assert adapter._outputs(trace, [8, -1, 3]) == [3, 7, 8]
    for outputs in (8, -9, [9]):
        with pytest.raises(IndexError, match="the text has 8 tokens"):
            adapter._outputs(trace, outputs)
    with pytest.raises(ValueError, match="holds no position"):
        adapter._outputs(trace, slice(3, 3))
    for outputs in (0, [0, 2]):
        with pytest.raises(ValueError, match="outputs begin at position 1"):
            adapter._outputs(trace, outputs)


def test_positions_that_were_not_traced():
    trace = fr.trace(tiny(), None, IDS, positions=[7])
    with pytest.raises(ValueError, match="was not traced"):
        adapter.token_matrix(trace, [7])


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "captum is not installed"),
        ("0.8.0", "captum 0.8.0 is not supported"),
        ("1.0", "captum 1.0 is not supported"),
    ],
)
def test_missing_or_unsupported(monkeypatch, version, says):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("flowroutes_fast.integrations.version", found)
    trace = fr.trace(tiny(), None, IDS)
    for call in (lambda: adapter.attribution_result(trace), lambda: adapter.attribute(None, None, PROMPT)):
        with pytest.raises(ImportError, match=rf"^{says}.*pip install 'flowroutes-fast\[captum\]'"):
            call()


class TestWithCaptum:
    @pytest.fixture(autouse=True)
    def _captum(self):
        pytest.importorskip("captum", minversion="0.9")
        pytest.importorskip("matplotlib").use("Agg")

    def test_result(self):
        from captum.attr import LLMAttributionResult

        trace = fr.trace(tiny(), None, IDS, precision="exact")
        result = adapter.attribution_result(trace, 6)
        assert type(result) is LLMAttributionResult
        assert (result.input_tokens, result.output_tokens) == (trace.tokens[:6], trace.tokens[6:])
        for row, position in zip(result.token_attr, (5, 6), strict=True):
            np.testing.assert_allclose(row, trace.token_attribution(position).importance[:6], atol=1e-6)
        np.testing.assert_allclose(result.seq_attr, trace.token_attribution([5, 6]).importance[:6], atol=1e-6)
        assert result.output_probs is None
        whole = adapter.attribution_result(trace, 6, include_outputs=True)
        assert whole.input_tokens == trace.tokens[:7]
        np.testing.assert_allclose(whole.token_attr.sum(1), 1, atol=1e-6)
        assert whole.token_attr[0, 6] == 0  # its own token is not read

    def test_prediction(self):
        trace = fr.trace(tiny(), words(), PROMPT)
        result = adapter.attribution_result(trace)
        assert result.output_tokens == [trace.prediction[0][0]]
        assert result.output_probs.tolist() == pytest.approx([trace.prediction[0][1]])
        assert result.input_tokens == trace.tokens
        assert float(result.seq_attr.sum()) == pytest.approx(1, abs=1e-6)
        trace.prediction = []
        with pytest.raises(ValueError, match="no prediction"):
            adapter.attribution_result(trace)

    def test_plots(self):
        import matplotlib.pyplot as plt

        result = adapter.attribution_result(fr.trace(tiny(), words(), PROMPT), 6)
        figure, axes = result.plot_token_attr()
        assert [label.get_text() for label in axes.get_yticklabels()] == result.output_tokens
        assert [label.get_text() for label in axes.get_xticklabels()] == result.input_tokens
        assert axes.images[0].get_array().shape == (3, 6)
        figure, axes = result.plot_seq_attr()
        assert [bar.get_height() for bar in axes.patches[:6]] == pytest.approx(result.seq_attr.tolist())
        # captum's own sentence: it draws pictures that were masked
        with pytest.raises(ValueError, match="ImageMaskInput"):
            result.plot_image_heatmap()
        assert set(result.seq_attr_dict) == set(result.input_tokens)
        plt.close("all")
        assert figure is not None

    def test_attribute(self):
        model, tokenizer = tiny(), words()
        given = adapter.attribute(model, tokenizer, PROMPT, " gave a drink")
        assert given.output_tokens == ["gave", "a", "drink"]
        ids = tokenizer(PROMPT + " gave a drink")["input_ids"]
        wanted = adapter.attribution_result(fr.trace(model, tokenizer, ids, precision="exact"), len(ids) - 3)
        torch.testing.assert_close(given.token_attr, wanted.token_attr)
        torch.testing.assert_close(adapter.attribute(model, tokenizer, PROMPT, ids[-3:]).token_attr, wanted.token_attr)
        assert adapter.attribute(model, tokenizer, PROMPT, " gave", measure="signed").token_attr.shape == (1, 9)
        written = adapter.attribute(
            model, tokenizer, PROMPT, gen_args={"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        )
        assert len(written.output_tokens) == 3
        assert written.token_attr.shape == (3, 9)
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
        assert adapter.attribute(model, tokenizer, PROMPT, gen_args=options).output_tokens == written.output_tokens

    def test_bad_input(self):
        model, tokenizer = tiny(), words()
        with pytest.raises(ValueError, match="gives no tokens"):
            adapter.attribute(model, tokenizer, " ", "a")
        with pytest.raises(ValueError, match="target has no tokens"):
            adapter.attribute(model, tokenizer, PROMPT, "")
        with pytest.raises(TypeError, match="leave out one of target and gen_args"):
            adapter.attribute(model, tokenizer, PROMPT, "a", gen_args={})
        with pytest.raises(TypeError, match="prompt must be one text, got list"):
            adapter.attribute(model, tokenizer, [PROMPT, PROMPT], "a")
        with pytest.raises(ValueError, match=r"must be one row, got shape \(1, 2\)"):
            adapter.attribute(model, tokenizer, PROMPT, torch.tensor([[5, 6]]))
        with pytest.raises(ValueError, match="outside the model's vocabulary"):
            adapter.attribute(model, tokenizer, PROMPT, [1000])


@pytest.mark.demo_model
def test_names_that_the_prompt_offers(demo):
    """In the indirect object prompt, the name that follows gets more from itself than from the other name."""
    pytest.importorskip("captum", minversion="0.9")
    result = adapter.attribute(*demo, "When Mary and John went to the store, John gave a drink to", " Mary")
    shares = dict(zip(result.input_tokens, result.token_attr[0].tolist(), strict=True))
    assert shares[" Mary"] > shares[" John"]
