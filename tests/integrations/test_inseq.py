"""The method that inseq finds gives the importances of the trace, in inseq's layout, for every way of calling it."""

import importlib
import importlib.metadata
import sys

import numpy as np
import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import flowroutes_fast as fr

WORDS = ["When", "Mary", "and", "John", "went", "to", "the", "store", ",", "gave", "a", "drink"]
PROMPT = "When Mary and John went to the store ,"
GIVEN = PROMPT + " John gave a drink"
NAME = "flowroutes_fast.integrations.inseq"


def tiny(parallel=False):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 15,
    }
    shape |= {"bos_token_id": 14, "eos_token_id": 14, "pad_token_id": 13}
    if parallel:
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, use_parallel_residual=True)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).eval()


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>", "<pad>", "<end>"])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", bos_token="<end>"
    )


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "inseq is not installed"),
        ("0.6.0", "inseq 0.6.0 is not supported"),
        ("0.8.0", "inseq 0.8.0 is not supported"),
    ],
)
def test_missing_or_unsupported(monkeypatch, version, says):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("flowroutes_fast.integrations.version", found)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=rf"^{says}.*pip install 'flowroutes-fast\[inseq\]'"):
        importlib.import_module(NAME)


class TestWithInseq:
    @pytest.fixture(autouse=True)
    def _inseq(self):
        self.inseq = pytest.importorskip("inseq")
        self.adapter = importlib.import_module(NAME)

    def load(self, model=None):
        return self.inseq.load_model(model or tiny(), "information_flow_routes", tokenizer=words())

    def attribute(self, model, *texts, **options):
        return model.attribute(*texts, show_progress=False, **options)

    def test_registered_once(self):
        assert "information_flow_routes" in self.inseq.list_feature_attribution_methods()
        assert self.adapter.register() is self.adapter.register()

    @pytest.mark.parametrize("parallel", [False, True])
    @pytest.mark.parametrize("precision", ["exact", "certified"])
    def test_sub_edges(self, parallel, precision):
        """The token at position t gets the row of position t - 1; inseq's own tokens are those of the trace."""
        model = tiny(parallel)
        (found,) = self.attribute(self.load(model), PROMPT, GIVEN, precision=precision).sequence_attributions
        scores = found.target_attributions
        assert scores.shape == (13, 4, 3, 4)  # source, target, layer, head
        assert [t.token for t in found.target] == GIVEN.split()
        exact = fr.trace(model, None, words()(GIVEN)["input_ids"], precision="exact", dense=True)
        for layer in range(3):
            for i, position in enumerate(range(9, 13)):
                row = exact.attention(layer)[position - 1]
                assert scores[position:, i].isnan().all()
                got = scores[:position, i, layer]
                if precision == "exact":
                    torch.testing.assert_close(got, row[:position], atol=1e-5, rtol=0)
                else:
                    assert (got[row[:position] > 2e-3] > 0).all()
                    torch.testing.assert_close(got[got > 0], row[:position][got > 0], atol=1e-5, rtol=1e-2)

    @pytest.mark.parametrize("measure", ["proximity", "signed"])
    def test_tokens(self, measure):
        model = tiny()
        options = {} if measure == "proximity" else {"measure": "signed"}
        (found,) = self.attribute(self.load(model), PROMPT, GIVEN, score="tokens", **options).sequence_attributions
        assert found.target_attributions.shape == (13, 4)
        trace = fr.trace(model, None, words()(GIVEN)["input_ids"], **(options or {"precision": "exact"}))
        for i, position in enumerate(range(9, 13)):
            wanted = trace.token_attribution(position - 1).importance[:position]
            np.testing.assert_allclose(found.target_attributions[:position, i], wanted, atol=1e-5)
        torch.testing.assert_close(found.target_attributions.nansum(0), torch.ones(4))

    @pytest.mark.parametrize("score", ["sub-edges", "tokens"])
    def test_padded_batch(self, score):
        """Prompts of different lengths, padded by inseq on the left, get what each gets alone."""
        prompts = [PROMPT, "Mary went to the"]
        model = self.load()
        given = {
            "generation_args": {
                "max_new_tokens": 3,
                "min_new_tokens": 3,
                "do_sample": False,
                "suppress_tokens": [12, 13, 14],
            },
            "score": score,
        }
        together = self.attribute(model, prompts, **given).sequence_attributions
        for i, prompt in enumerate(prompts):
            (alone,) = self.attribute(model, prompt, **given).sequence_attributions
            scores = together[i].target_attributions[:, -alone.target_attributions.shape[1] :]
            torch.testing.assert_close(scores, alone.target_attributions, atol=1e-5, rtol=0, equal_nan=True)
            assert [t.token for t in together[i].target] == [t.token for t in alone.target]

    def test_span(self):
        (whole,) = self.attribute(self.load(), PROMPT, GIVEN).sequence_attributions
        (span,) = self.attribute(self.load(), PROMPT, GIVEN, attr_pos_start=10, attr_pos_end=12).sequence_attributions
        torch.testing.assert_close(span.target_attributions[:11], whole.target_attributions[:11, 1:3], equal_nan=True)

    def test_padding_is_left_out(self):
        """The tensors themselves: all queries when the first is asked for, only the later ones otherwise."""
        model, ids = tiny(), torch.tensor([[13, 13, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        for first in (0, 2, 3):
            scores = self.adapter.sub_edges(model, ids, mask, first)
            shares = self.adapter.tokens(model, ids, mask, first)
            assert scores.shape == (2, 6, 6, 3, 4)
            for item, row in enumerate(ids):
                start = 2 * (item == 0)
                trace = fr.trace(model, None, row[start:].tolist(), precision="exact", dense=True)
                assert (scores[item, :start] == 0).all()
                assert (shares[item, :start] == 0).all()
                for query in range(max(first, start), 6):
                    for layer in range(3):
                        torch.testing.assert_close(
                            scores[item, start:, query, layer], trace.attention(layer)[query - start], atol=1e-5, rtol=0
                        )
                    torch.testing.assert_close(float(shares[item, :, query].sum()), 1.0, atol=1e-5, rtol=0)

    def test_attention_implementation_is_left_alone(self):
        model = tiny()
        model.set_attn_implementation("sdpa")
        self.attribute(self.load(model), PROMPT, GIVEN)
        assert model.config._attn_implementation == "sdpa"

    def test_aggregators_and_pages(self):
        out = self.attribute(self.load(), PROMPT, GIVEN)
        (found,) = out.sequence_attributions
        assert found.aggregate().target_attributions.shape == (13, 4)
        assert found.aggregate(["max", "max"]).target_attributions.shape == (13, 4)
        heads = found.aggregate("slices", target_spans=(2, 6), do_post_aggregation_checks=False)
        assert heads.target_attributions.shape[1:] == (4, 3, 4)
        for made in (out, self.attribute(self.load(), PROMPT, GIVEN, score="tokens")):
            page = made.show(display=False, return_html=True)
            assert "Saliency Heatmap" in page
            assert "Mary" in page
            assert made.sequence_attributions[0].get_scores_dicts()["target_attributions"]
        assert "treescope" in found.show(do_aggregation=False, display=False, return_html=True)
        assert "treescope" in found.show_tokens(display=False, return_html=True)

    def test_saved_and_loaded(self, tmp_path):
        out = self.attribute(self.load(), PROMPT, GIVEN)
        out.save(tmp_path / "out.json")
        back = self.inseq.FeatureAttributionOutput.load(tmp_path / "out.json")
        torch.testing.assert_close(
            back.sequence_attributions[0].target_attributions,
            out.sequence_attributions[0].target_attributions,
            equal_nan=True,
        )

    def test_other_methods_still_work(self):
        model = self.load(tiny())
        assert self.attribute(model, PROMPT, GIVEN, method="saliency").info["attribution_method"] == "saliency"
        assert self.attribute(model, PROMPT, GIVEN).info["attribution_method"] == "information_flow_routes"

    def test_encoder_decoder(self):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=15, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ).eval()
        model.config.decoder_start_token_id = model.config.bos_token_id = 13
        with pytest.raises(
            ValueError, match="is for decoder-only models; T5ForConditionalGeneration is an encoder-decoder"
        ):
            self.load(model)

    def test_unknown_family(self):
        model = tiny()
        model.config.model_type = "unheard_of"
        with pytest.raises(ValueError, match="unheard_of"):
            self.load(model)

    def test_bad_options(self):
        model = self.load()
        with pytest.raises(ValueError, match=r"unknown score 'heads': choose one of 'sub-edges', 'tokens'"):
            self.attribute(model, PROMPT, GIVEN, score="heads")
        with pytest.raises(ValueError, match="has no option 'keep'"):
            self.attribute(model, PROMPT, GIVEN, attribution_args={"keep": 1})
        with pytest.raises(ValueError, match="unknown precision"):
            self.attribute(model, PROMPT, GIVEN, precision="some")
