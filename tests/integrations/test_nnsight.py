"""fr.trace on models of nnsight and nnterp gives what it gives on the transformers model inside, and leaves both as
they were.
"""

import copy
import importlib.util
import sys
import types
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from pandas.testing import assert_frame_equal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import flowroutes_fast as fr
from flowroutes_fast import integrations
from flowroutes_fast.integrations import nnsight as ours

ROOT = Path(__file__).parents[2]
WORDS = "When Mary and John went to the store, gave a drink".replace(",", " ,").split()
TEXT = "When Mary and John went to the store , John gave a drink to"
PARTS = (
    "heads",
    "heads_low",
    "heads_high",
    "ffn",
    "ffn_residual",
    "attention_residual",
    "attention_bias",
    "normaliser_low",
)
MODELS = {
    "llama": lambda v: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=v,
        )
    ),
    "gpt2": lambda v: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=v, n_positions=64)),
    "neox": lambda v: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=v)
    ),
}


@pytest.fixture
def tokenizer():
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def tiny(name="llama"):
    torch.manual_seed(0)
    return MODELS[name](len(WORDS) + 2).eval()


def same(a, b):
    """Two traces of one prompt, number by number."""
    assert a.tokens == b.tokens
    assert a.prediction == b.prediction
    for part in PARTS:
        torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=0, atol=0, equal_nan=True, msg=part)
    for (index, value), (index_b, value_b) in zip(a.sparse or [], b.sparse or [], strict=True):
        assert torch.equal(index, index_b)
        assert torch.equal(value, value_b)


def state_of(model):
    """What a trace may change and has to put back."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = {
        path: (
            {name: list(getattr(m, name)) for name in names},
            m.training,
            id(m.__dict__.get("forward")),
            sorted(m.__dict__),
        )
        for path, m in model.named_modules()
    }
    return modules, model.config._attn_implementation


# --- without the library: a double with the attributes of nnsight that are read ---


class Double:
    """nnsight's LanguageModel as far as it is used."""

    def __init__(self, module, tokenizer=None, real=None):
        self._module, self.tokenizer, self.real, self.path = module, tokenizer, real, "model"
        self.interleaver = types.SimpleNamespace(interleaving=False)
        self.dispatched, self.repo_id, self._edits = real is None, "tiny", []

    def dispatch(self):
        if isinstance(self.real, Exception):
            raise self.real
        self._module, self.dispatched = self.real, True


Double.__module__ = "nnsight.modeling.language"


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", types.ModuleType("nnsight"))
    monkeypatch.setattr(integrations, "version", lambda name: "0.8.1")


@pytest.mark.usefixtures("installed")
class TestDouble:
    def test_equals_the_inner_model(self, tokenizer):
        model = tiny()
        same(fr.trace(Double(model, tokenizer), None, TEXT), fr.trace(model, tokenizer, TEXT))

    def test_options_and_batches_pass_through(self, tokenizer):
        model = tiny()
        wrapped = Double(model, tokenizer)
        options = {"precision": "exact", "positions": [2, -1], "measure": "proximity", "bias": "value"}
        for a, b in zip(
            fr.trace(wrapped, None, [TEXT, "a drink to"], **options),
            fr.trace(model, tokenizer, [TEXT, "a drink to"], **options),
            strict=True,
        ):
            assert torch.equal(a.heads.nan_to_num(-1), b.heads.nan_to_num(-1))
        ids = [3, 4, 5]
        assert fr.trace(wrapped, None, ids).tokens == ["Mary", "and", "John"]  # its own tokenizer
        assert fr.trace(Double(model), None, ids).tokens == ["3", "4", "5"]

    def test_own_tokenizer_gives_way(self, tokenizer):
        other = copy.deepcopy(tokenizer)
        other.decode = lambda ids: "x"
        assert set(fr.trace(Double(tiny(), tokenizer), other, TEXT).tokens) == {"x"}

    def test_loads_first(self, tokenizer):
        with torch.device("meta"):
            empty = tiny()
        model = tiny()
        wrapped = Double(empty, tokenizer, real=model)
        same(fr.trace(wrapped, None, TEXT), fr.trace(model, tokenizer, TEXT))
        assert wrapped.dispatched

    def test_weights_that_cannot_be_loaded(self, tokenizer):
        with torch.device("meta"):
            empty = tiny()
        for error in (OSError("tiny is not a local folder.\nmore"), ValueError("")):
            wrapped = Double(empty, tokenizer, real=error)
            with pytest.raises(OSError, match=r"weights of tiny are not loaded and cannot be: .*remote=True") as raised:
                fr.trace(wrapped, None, TEXT)
            assert "\n" not in str(raised.value)
            assert raised.value.__cause__ is error

    def test_weights_that_do_not_fit(self, tokenizer, monkeypatch):
        with torch.device("meta"):
            empty = tiny()
        monkeypatch.setattr(ours, "available_memory", lambda: 1000)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(
            ValueError,
            match=r"weights of tiny are not loaded; they take .* GB and 0.0 GB of memory "
            r"are free",
        ):
            fr.trace(Double(empty, tokenizer, real=tiny()), None, TEXT)

    def test_refused(self, tokenizer):
        model = tiny()
        wrapped = Double(model, tokenizer)
        wrapped.interleaver.interleaving = True
        with pytest.raises(ValueError, match=r"inside a block of this model's trace\(\)"):
            fr.trace(wrapped, None, TEXT)
        wrapped = Double(model, tokenizer)
        wrapped._edits = [object()]
        with pytest.raises(ValueError, match="1 edits"):
            fr.trace(wrapped, None, TEXT)
        part = Double(model.model.layers[1])
        part.path = "model.model.layers.1"
        with pytest.raises(ValueError, match=r"'model.model.layers.1' of this nnsight model is a LlamaDecoderLayer"):
            fr.trace(part, tokenizer, TEXT)
        with pytest.raises(ValueError, match="empty"):
            fr.trace(Double(model, tokenizer), None, "")
        with pytest.raises(TypeError, match="a text needs a tokenizer"):
            fr.trace(Double(model), None, TEXT)

    def test_second_run_keeps_the_rules(self, tokenizer):
        model = tiny()
        wrapped = Double(model, tokenizer)
        trace = fr.trace(wrapped, None, TEXT)
        rows = {0: trace.heads[0, :, 0].argsort()[:2].numpy()}
        wrapped.interleaver.interleaving = True
        with pytest.raises(ValueError, match="inside a block"):
            trace.refine(rows)
        wrapped.interleaver.interleaving = False
        assert list(trace.refine(rows)) == [0]
        del wrapped  # the inner model lives on
        assert list(trace.refine(rows)) == [0]

    def test_rewritten_forwards_are_hidden(self, tokenizer):
        model = tiny()
        attention = model.model.layers[1].self_attn
        seen, plain = [], type(attention).forward
        attention.__source_accessor__ = "accessor"

        def forward(*args, **kwargs):
            seen.append(hasattr(attention, "__source_accessor__"))
            return plain(attention, *args, **kwargs)

        attention.forward = forward
        fr.trace(Double(model, tokenizer), None, TEXT)
        assert seen == [False]
        assert attention.__source_accessor__ == "accessor"


def test_missing_or_old(tokenizer, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(integrations, "version", missing)
    with pytest.raises(ImportError, match="nnsight is not installed: pip install"):
        fr.trace(Double(tiny(), tokenizer), None, TEXT)
    for found in ("0.6.3", "0.9.0"):
        monkeypatch.setattr(integrations, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=rf"nnsight {found} is not supported.*>=0.7,<0.9"):
            fr.trace(Double(tiny(), tokenizer), None, TEXT)


# --- with the library ---

needs_nnsight = pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="needs nnsight")


def language_model(*args, **kwargs):
    from nnsight import LanguageModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnsight 0.8 calls the name deprecated
        return LanguageModel(*args, **kwargs)


def saved(folder, tokenizer, model=None):
    (model or tiny()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@needs_nnsight
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_and_leaves_as_it_was(name, implementation, tokenizer):
    model = tiny(name)
    model.set_attn_implementation(implementation)
    expected = fr.trace(model, tokenizer, TEXT)
    wrapped = language_model(model, tokenizer=tokenizer)
    with wrapped.trace(TEXT):
        before = wrapped.output.logits.save()
    state = state_of(model)
    same(fr.trace(wrapped, None, TEXT), expected)
    assert state_of(model) == state
    assert wrapped._module is model
    assert not wrapped.interleaver.interleaving
    with wrapped.trace(TEXT):
        after = wrapped.output.logits.save()
    assert torch.equal(before, after)
    same(fr.trace(wrapped, None, TEXT), expected)


@needs_nnsight
@pytest.mark.parametrize("memory", [None, 1000], ids=["whole", "inputs"])
@pytest.mark.parametrize("name", MODELS)
def test_routes_on_demand(name, memory, tokenizer):
    """Rows that a route reaches, evaluated or run again through the model inside; refused within a block of its
    trace().
    """
    model = tiny(name)
    full = fr.trace(model, tokenizer, TEXT)
    wrapped = language_model(model, tokenizer=tokenizer)
    with wrapped.trace(TEXT):
        before = wrapped.output.logits.save()
    state = state_of(model)
    lazy = fr.trace(wrapped, None, TEXT, lazy=True, memory=memory)
    for position, threshold in ((-1, 0.05), (4, 0.02)):
        found, wanted = lazy.route(position, threshold).edges, full.route(position, threshold).edges
        assert_frame_equal(found, wanted, rtol=1e-4, atol=1e-6)
    assert 0 < lazy.certificate["rows"] < lazy.n_layers * len(lazy.tokens)
    assert_frame_equal(
        fr.route(wrapped, None, TEXT, threshold=0.05).edges, full.route(threshold=0.05).edges, rtol=1e-4, atol=1e-6
    )
    assert state_of(model) == state
    fresh = fr.trace(wrapped, None, TEXT, lazy=True, memory=memory)
    with pytest.raises(ValueError, match="inside a block"), wrapped.trace(TEXT):
        fresh.route(threshold=0.05)
    with wrapped.trace(TEXT):
        after = wrapped.output.logits.save()
    assert torch.equal(before, after)


@needs_nnsight
def test_after_reading_sources(tokenizer):
    """Reading ``.source`` rewrites a forward for good; attention still goes through our capture."""
    model = tiny()
    expected = fr.trace(model, tokenizer, TEXT)
    wrapped = language_model(model, tokenizer=tokenizer)
    with wrapped.trace(TEXT):
        source = wrapped.model.layers[1].self_attn.source
        call = getattr(source, "attention_interface_1", None) or source.attention_interface_0  # from 0.8 on, and before
        kept = call.output.save()
    assert kept[0].shape[1] == 14
    same(fr.trace(wrapped, None, TEXT), expected)


@needs_nnsight
def test_loaded_lazily(tokenizer, tmp_path):
    model = tiny()
    folder = saved(tmp_path, tokenizer, model)
    wrapped = language_model(folder, tokenizer=tokenizer, device_map="cpu")
    assert not wrapped.dispatched
    same(fr.trace(wrapped, None, TEXT), fr.trace(model, tokenizer, TEXT))
    assert wrapped.dispatched
    with wrapped.trace(TEXT):
        logits = wrapped.output.logits.save()
    assert torch.isfinite(logits).all()


@needs_nnsight
def test_no_weights_here(tokenizer, tmp_path):
    wrapped = language_model(saved(tmp_path, tokenizer), tokenizer=tokenizer, device_map="cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="not loaded and cannot be"):
        fr.trace(wrapped, None, TEXT)


@needs_nnsight
def test_inside_a_block(tokenizer):
    wrapped = language_model(tiny(), tokenizer=tokenizer)
    with pytest.raises(Exception, match="inside a block"), wrapped.trace(TEXT):  # nnsight before 0.8 raises its own
        fr.trace(wrapped, None, TEXT)
    with pytest.raises(Exception, match=r"inside a block|FakeTensorMode"), wrapped.scan(TEXT):
        fr.trace(wrapped, None, TEXT)
    same(fr.trace(wrapped, None, TEXT), fr.trace(tiny(), tokenizer, TEXT))


@needs_nnsight
def test_edits(tokenizer):
    wrapped = language_model(tiny(), tokenizer=tokenizer)
    with wrapped.edit(inplace=True):
        wrapped.model.layers[0].mlp.output[:] = 0
    with pytest.raises(ValueError, match="1 edits"):
        fr.trace(wrapped, None, TEXT)
    wrapped.clear_edits()
    same(fr.trace(wrapped, None, TEXT), fr.trace(tiny(), tokenizer, TEXT))


@needs_nnsight
def test_plain_wrapper_and_parts(tokenizer):
    from nnsight import NNsight

    model = tiny()
    wrapped = NNsight(model)
    same(fr.trace(wrapped, tokenizer, TEXT), fr.trace(model, tokenizer, TEXT))
    with pytest.raises(ValueError, match=r"layers.0' of this nnsight model is a LlamaDecoderLayer"):
        fr.trace(wrapped.model.layers[0], tokenizer, TEXT)
    with pytest.raises(ValueError, match="is a Linear, not a transformers"):
        fr.trace(NNsight(torch.nn.Linear(2, 2)), tokenizer, TEXT)


@needs_nnsight
def test_the_benchmarks_other_side(tokenizer):
    """What is timed against us computes the same heads, and the documentation shows that very code."""
    path = ROOT / "benchmarks" / "integrations" / "nnsight.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_nnsight", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    model = tiny()
    model.set_attn_implementation("eager")
    heads = benchmark.head_importances(language_model(model, tokenizer=tokenizer), TEXT)
    exact = fr.trace(model, tokenizer, TEXT, precision="exact")
    torch.testing.assert_close(heads, exact.heads, atol=1e-5, rtol=1e-4)


def test_the_documentation_shows_the_benchmarks_code():
    source = (ROOT / "benchmarks" / "integrations" / "nnsight.py").read_text(encoding="utf-8")
    code = source[source.index("def head_importances") : source.index("\n\n\n", source.index("def head_importances"))]
    assert code.strip() in (ROOT / "docs" / "integrations" / "nnsight.md").read_text(encoding="utf-8")


@pytest.fixture
def standardized():
    """nnterp 1.3 asks for nnsight >= 0.6 but imports modules that 0.8 no longer has."""
    try:
        from nnterp import StandardizedTransformer
    except ImportError as error:
        pytest.skip(f"needs nnterp and an nnsight that it works with: {error}")
    return StandardizedTransformer


@pytest.mark.parametrize(
    "options", [{}, {"enable_attention_probs": True}, {"remote": True}], ids=["plain", "eager", "remote"]
)
def test_nnterp(standardized, options, tokenizer, tmp_path):
    folder = saved(tmp_path, tokenizer)
    model = LlamaForCausalLM.from_pretrained(
        folder, attn_implementation="eager" if "enable_attention_probs" in options else "sdpa"
    ).eval()
    expected = fr.trace(model, tokenizer, TEXT)
    wrapped = standardized(folder, device_map="cpu", **options)
    same(fr.trace(wrapped, None, TEXT), expected)
    assert wrapped.attn_probs_available == ("enable_attention_probs" in options)
    with wrapped.trace(TEXT):  # its renamed modules and, where asked for, attention weights
        states = wrapped.layers_output[1].save()
        if "enable_attention_probs" in options:
            pattern = wrapped.attention_probabilities[2].save()
    assert states.shape == (1, 14, 32)
    if "enable_attention_probs" in options:
        assert pattern.shape == (1, 4, 14, 14)
    trace = fr.trace(wrapped, None, TEXT)  # reading attention weights rewrote a forward
    same(trace, expected)
    assert trace.route(threshold=0.02).edges.equals(expected.route(threshold=0.02).edges)


def test_nnterp_around_a_loaded_model(standardized, tokenizer):
    model = tiny("gpt2")
    expected = fr.trace(model, tokenizer, TEXT)
    same(fr.trace(standardized(model, tokenizer=tokenizer), None, TEXT), expected)
