"""The check of every pass: far above rounding in every family and type, far below what any change of a part does."""

import pytest
import torch
from families import VARIANTS, make
from test_process_state import IDS, LONG, tiny

import flowroutes_fast as fr
from flowroutes_fast.capture import conservation
from flowroutes_fast.capture.hooks import capture
from flowroutes_fast.models.families import FAMILIES
from flowroutes_fast.ops import native

EXPERTS = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "jamba",
    "minimax",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
# tiny experts are float32 on a CPU
NAMES = [name for name in (*sorted(FAMILIES), *sorted(VARIANTS)) if name.split(",")[0] not in EXPERTS]
# the largest seen is about two thirds of it
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture
def errors(monkeypatch):
    """Errors of the passes that follow, as (where, error)."""
    found = []

    def judge(self, layer=None):
        taken, self.open = self.open, []
        for sample in taken:
            found.extend(sample.errors)
            found.extend((where, float(conservation._miss(parts[None]))) for where, parts in sample.sums)
            if sample.weights is not None:
                found.append(("weights", float(sample.weights)))

    monkeypatch.setattr(conservation.Conservation, "judge", judge)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rounding_stays_far_below_the_tolerance(name, errors):
    model = make(name)
    for dtype in (
        (torch.float32, torch.bfloat16, torch.float16)
        if name in ("llama", "gemma2", "olmo2", "starcoder2")
        else (torch.bfloat16,)
    ):
        errors.clear()
        capture(model.to(dtype), torch.tensor([LONG[:48]]))
        assert max(error for _, error in errors) < ROUNDING[dtype] < conservation.TOLERANCE[dtype] / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers", [1.0, 1000.0])
def test_a_louder_attention_shows_beside_outliers(dtype, outliers):
    """One channel a thousand times the others hides nothing: sizes are those of each channel."""
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] += outliers
    model = model.to(dtype)
    fr.trace(model, None, LONG[:100])
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, out: (out[0] * 1.3, *out[1:]))
    with pytest.raises(ValueError, match="layer 1: the captured parts miss the state after attention"):
        fr.trace(model, None, LONG[:100])


@pytest.mark.parametrize("tokens", [1, 2, 11, 12, 13, 200])
@pytest.mark.parametrize("what", ["scaling", "window", "softcap", "query", "key", "value"])
def test_what_is_misread_shows(tokens, what):
    """A layer whose captured attention is not the one that was computed, at few and at many positions."""
    layers = []
    capture(tiny(), torch.tensor([LONG[:tokens]]), on_layer=layers.append)
    layer = layers[1]
    rows = conservation._spread(tokens, conservation.ROWS, torch.device("cpu"))
    assert float(conservation.weights_error(layer, rows)) < 1e-6
    if what == "window":
        layer.window = max(1, tokens // 3)
    elif what == "scaling":
        layer.scaling *= 1.7
    elif what == "softcap":
        layer.softcap = 0.05
    else:
        setattr(layer, what, getattr(layer, what) * 1.7)
    shows = tokens > 1 or what == "value"  # one token sees itself, however
    assert (float(conservation.weights_error(layer, rows)) > 1e-4) == shows


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("tokens", [1, 13, 48])
@pytest.mark.parametrize(
    "name", ["bitnet", "cohere", "falcon_h1", "gpt2", "gpt_neox", "llama", "minimax", "mistral", "olmo2", "qwen3_next"]
)
def test_the_native_kernel_says_the_same(name, tokens, isa):
    """Errors of parts that are off, by the kernel and by PyTorch; families with gates, biases, norms after,
    windows, parallel blocks.
    """
    layers, sample, taken = [], conservation.Conservation(1, None, None, thorough=False), 0
    capture(make(name), torch.tensor([LONG[:tokens]]), on_layer=layers.append)
    for layer in layers:
        places = sample._places(layer.resid_post)
        for off in (1.0, 1.01, float("nan")):
            layer.ffn_out = layer.ffn_out * off
            layer.mixed = None if layer.mixed is None else layer.mixed * off
            with native.instruction_set(isa):
                found = conservation._native_errors(layer, places)
            if found is None:
                continue
            taken += 1
            errors = [conservation.weights_error(layer, sample._rows_of_weights(layer))]
            errors += [conservation._miss(parts[None])[0] for _, parts in conservation._sums(layer, *places)]
            for (_, one), other in zip(found, errors, strict=False):
                torch.testing.assert_close(torch.tensor(one), other.float(), rtol=1e-4, atol=1e-6, equal_nan=True)
            assert len(errors) == 3 or found[2][1] == 0
    assert taken


@pytest.mark.parametrize("name", ["bitnet", "olmo2"])
def test_biases_behind_a_norm_by_the_native_kernel(name, monkeypatch):
    """Where the norm comes before the output projection its bias is not scaled with the row; where it comes after,
    it is.
    """
    bias = torch.linspace(-1, 1, 60)
    layers, sample, taken = [], conservation.Conservation(1, None, None, thorough=False), 0
    capture(make(name), torch.tensor([LONG[:13]]), on_layer=layers.append)
    monkeypatch.setattr(type(layers[0].block), "output_bias", property(lambda block: bias))
    for layer in layers:
        places = sample._places(layer.resid_post)
        if (found := conservation._native_errors(layer, places)) is not None:
            taken += 1
            wanted = [conservation._miss(parts[None])[0] for _, parts in conservation._sums(layer, *places)]
            torch.testing.assert_close(
                torch.tensor([error for _, error in found[1:]]), torch.stack(wanted).float(), rtol=1e-4, atol=1e-6
            )
            assert found[1][1] > 1e-3
    assert taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_pass_is_judged_at_its_end(dtype, monkeypatch):
    """Without a hook, once a model is known: a few positions are looked at, and all layers are judged together."""
    model, layers = tiny().to(dtype), []
    capture(model, torch.tensor([LONG[:40]]), on_layer=layers.append)
    kind = type(layers[0].block)
    w_o = kind.w_o
    monkeypatch.setattr(kind, "w_o", lambda block, heads: w_o(block, heads) * (1.5 if block.index == 2 else 1))
    with pytest.raises(ValueError, match="layer 2: the captured parts miss the state after attention"):
        capture(model, torch.tensor([LONG[:40]]))


@pytest.mark.parametrize("where", ["self_attn", ""])
def test_small_changes_are_refused(where):
    """A thousandth more than a part really was is far above what float32 rounds."""
    model = tiny()
    fr.trace(model, None, LONG[:40])

    def louder(module, args, out):
        return (out[0] * 1.001, *out[1:]) if isinstance(out, tuple) else out * 1.001

    handle = model.model.layers[1].get_submodule(where).register_forward_hook(louder)
    with pytest.raises(ValueError, match=r"layer 1: the captured parts miss"):
        fr.trace(model, None, LONG[:40])
    handle.remove()
    fr.trace(model, None, LONG[:40])


def test_all_layers_must_be_seen():
    model = tiny()
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(ValueError, match=r"layer 1"):
        fr.trace(model, None, IDS)


def test_nan_is_named():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    for precision in ("certified", "exact"):
        with pytest.raises(ValueError, match=r"layer 1.*NaN"):
            fr.trace(model, None, IDS, precision=precision)
    with pytest.raises(ValueError, match=r"layer 1.*NaN"):
        fr.patching(model, None, IDS, IDS[::-1], answer=5, wrong=6)


@pytest.mark.parametrize("size", [300.0, 1000.0, 3000.0])
def test_large_scores_are_rounded_and_a_changed_attention_is_told_all_the_same(size):
    """As in Qwen 2: keys and queries with large biases where rotations are slow, so that scores have few bits left."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=200,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model, ids = Qwen2ForCausalLM(config).eval(), [3 + i * 7 % 190 for i in range(256)]
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for bias in (attention.k_proj.bias, attention.q_proj.bias):
            bias.view(-1, 64)[:, [28, 29, 30, 31, 60, 61, 62, 63]] = size**0.5
    for _ in range(2):  # the first trace of a model is checked in another way
        fr.trace(model, None, ids, lazy=True)
    attention.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    with pytest.raises(ValueError, match="layer 0"):
        fr.trace(model, None, ids, lazy=True)
