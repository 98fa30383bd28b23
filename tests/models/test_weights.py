"""The weight and bias that a module really has, whatever stores it; in which numbers a block computes; why parts
may not add up.
"""

import copy
import functools
import importlib.util

import numpy as np
import pytest
import torch
from families import make
from torch import nn

import flowroutes_fast as fr
from flowroutes_fast.models.causes import causes
from flowroutes_fast.models.families import blocks_of
from flowroutes_fast.models.precision import coarsest_dtype, tolerance
from flowroutes_fast.models.weights import check_adapters, effective_bias, effective_weight

IDS = [3, 14, 15, 92, 65, 35, 89, 79]
SHAPE = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


def needs(*packages):
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def llama(**options):
    return make("llama", **SHAPE, attention_bias=True, num_hidden_layers=2, **options)


def linear(n_in=64, n_out=96, bias=True):
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias=bias).eval()


def check(module, weight, bias=None, atol=1e-5):
    torch.testing.assert_close(effective_weight(module, 0), weight.detach().float(), atol=atol, rtol=1e-4)
    found = effective_bias(module)
    if bias is None:
        assert found is None
    else:
        torch.testing.assert_close(found, bias.detach().float(), atol=atol, rtol=1e-4)


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Stored(nn.Module):
    """Integers and scales, no ``weight``, no ``bias``."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("stored", (linear.weight.detach() / scales).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.stored * self.scales).T


class Rounds(Stored):
    """Inputs are rounded to 8 bits too."""

    kind = torch.int8

    def forward(self, x):
        if self.kind == torch.int8:
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            return super().forward((x / scale).round() * scale)
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
        return super().forward((x / scale).to(self.kind).to(x.dtype) * scale)


class Bends(nn.Linear):
    """A linear layer with something beside it that is not linear."""

    how = staticmethod(torch.tanh)

    def forward(self, x):
        return super().forward(x) + 0.05 * self.how(super().forward(x))


def test_stored_formats():
    base = linear(bias=False)
    stored = Stored(base)
    check(stored, stored.stored * stored.scales)
    rounding = Rounds(base)
    check(rounding, stored.stored * stored.scales)
    half = Half(64, 96).bfloat16()
    check(half, half.weight, half.bias)
    half = linear().bfloat16()
    check(half, half.weight, half.bias)
    check(linear().double(), linear().weight, linear().bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_bias_does_not_round_the_weights_away(dtype):
    module = Half(64, 96)
    nn.init.normal_(module.weight, 0, 0.02)
    nn.init.normal_(module.bias, 0, 20)
    module.to(dtype)
    found = effective_weight(module, 0)
    assert float((found - module.weight.detach().float()).norm() / module.weight.detach().float().norm()) < 1e-3


def test_parametrised_and_pruned_weights():
    from torch.nn.utils import parametrizations, prune

    module = parametrizations.weight_norm(linear())
    check(module, module.weight, module.bias)
    module = linear()
    prune.random_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module.weight_orig.mul_(3)  # what a hook makes the weight of, at the next call
    before = module.weight
    check(module, module.weight_orig * module.weight_mask, module.bias)
    assert module.weight is before
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(linear())
    with torch.no_grad():
        module.weight_g.mul_(2)
    check(module, 2 * linear().weight, module.bias)


def test_methods_put_on_a_module():
    module = linear()
    module.forward = lambda x: 2 * nn.functional.linear(x, module.weight, module.bias)
    check(module, 2 * module.weight, 2 * module.bias)
    module = linear()
    module.forward = torch.compile(module.forward, backend="eager")
    check(module, module.weight, module.bias)
    check(torch.compile(linear(), backend="eager"), linear().weight, linear().bias)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.inner, self.dropout = 64, linear(), nn.Dropout(0.5)

    def forward(self, x):
        return 3 * self.inner(self.dropout(x))


def test_reading_disturbs_nothing():
    module, fired = Wrapped().train(), []
    for part in (module, module.inner):
        part.register_forward_hook(lambda *args: fired.append(args))
        part.register_forward_pre_hook(lambda *args: fired.append(args))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: fired.append(args))
    attributes, state = set(module.__dict__), torch.get_rng_state()
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(module, 3 * module.inner.weight, 3 * module.inner.bias)
            assert torch.is_autocast_enabled("cpu")
    finally:
        everywhere.remove()
    assert not fired
    assert module.training
    assert module.inner.training
    assert set(module.__dict__) == attributes
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            check(module, 3 * module.inner.weight, 3 * module.inner.bias)
    finally:
        torch.set_default_dtype(torch.float32)


def test_chunks_of_the_identity(monkeypatch):
    monkeypatch.setattr("flowroutes_fast.models.weights.NUMBERS_AT_ONCE", 96 * 7)
    stored = Stored(linear(bias=False))
    check(stored, stored.stored * stored.scales)


@pytest.mark.parametrize("how", [torch.tanh, torch.relu, torch.abs, lambda x: x * x.norm()])
def test_modules_that_are_not_linear_are_refused(how):
    module = Bends(64, 96)
    module.how = how
    with pytest.raises(ValueError, match=r"layer 3: a Bends is not linear"):
        effective_weight(module, 3)
    model = llama()
    model.model.layers[1].self_attn.o_proj = Bends(64, 64)
    with pytest.raises(ValueError, match=r"layer 1: a Bends is not linear"):
        fr.trace(model, None, IDS)


def test_modules_that_cannot_be_asked_are_refused():
    class Silent(nn.Module):
        def forward(self, x):
            raise RuntimeError("no kernel for this device")

    silent = Silent()
    with pytest.raises(ValueError, match=r"a Silent cannot be asked .*in_features"):
        effective_weight(silent, 0)
    silent.in_features = 64
    with pytest.raises(ValueError, match=r"a Silent cannot be asked .*no kernel for this device"):
        effective_weight(silent, 0)
    with pytest.raises(ValueError, match="on meta cannot be read"):
        effective_weight(nn.Linear(4, 4, device="meta"), 0)


@needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits(kind, nested):
    import bitsandbytes as bnb

    base = linear(128, 64)
    module = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type=kind, compress_statistics=nested)
    module.load_state_dict(base.state_dict())
    try:
        module = module.to("cpu").eval()
        expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot quantise here: {str(error).splitlines()[0][:80]}")
    for _ in ("before", "after"):  # the first forward pass may pack the weight
        found = effective_weight(module, 0)
        assert float((found - expected).norm() / expected.norm()) < 5e-3
        torch.testing.assert_close(effective_bias(module), base.bias.detach(), atol=2e-3, rtol=1e-2)
        with torch.no_grad():
            x = torch.randn(5, 128)
            assert float((module(x) - (x @ found.T + base.bias)).norm() / module(x).norm()) < 1e-2


@needs("bitsandbytes")
def test_llm_int8():
    import bitsandbytes as bnb

    base = linear(128, 64)
    module = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0)
    module.load_state_dict(base.state_dict())
    try:
        module = module.to("cpu").eval()
        module(torch.randn(2, 128))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot quantise here: {str(error).splitlines()[0][:80]}")
    found = effective_weight(module, 0)
    assert float((found - base.weight).norm() / base.weight.norm()) < 1e-2


METHODS = {
    "lora": ("LoraConfig", {}),
    "rank-stabilised": ("LoraConfig", {"use_rslora": True, "lora_alpha": 16}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "lora with a bias": ("LoraConfig", {"lora_bias": True}),
    "trained biases": ("LoraConfig", {"bias": "all"}),
    "dropout": ("LoraConfig", {"lora_dropout": 0.5}),
    "saved": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["o_proj", "v_proj"]}),
    "parameters": ("LoraConfig", {"target_modules": [], "target_parameters": ["o_proj.weight"]}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "vera": ("VeraConfig", {}),
    "oft": ("OFTConfig", {}),
    "boft": ("BOFTConfig", {}),
    "bone": ("MissConfig", {}),
    "hra": ("HRAConfig", {}),
}


def adapted(kind, **options):
    import peft

    torch.manual_seed(1)
    if not hasattr(peft, kind):
        pytest.skip(f"this peft has no {kind}")
    model = peft.get_peft_model(
        llama(), getattr(peft, kind)(**({"target_modules": ["o_proj", "v_proj"]} | options))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@needs("peft")
@pytest.mark.parametrize("method", METHODS)
def test_adapters_give_what_they_merge_to(method):
    kind, options = METHODS[method]
    try:
        model = adapted(kind, **options)
    except TypeError as error:
        pytest.skip(f"this peft has no such option: {error}")
    block = blocks_of(model.get_base_model())[1]
    if method == "saved":
        merged = [
            module
            for ending in ("1.self_attn.o_proj", "1.self_attn.v_proj")
            for name, module in model.named_modules()
            if name.endswith(f"{ending}.modules_to_save.default")
        ]
    else:
        merged = [
            blocks_of(copy.deepcopy(model).merge_and_unload())[1].output,
            blocks_of(copy.deepcopy(model).merge_and_unload())[1].values,
        ]
    for mine, other in zip((block.output, block.values), merged, strict=True):
        check(mine, other.weight, other.bias, atol=2e-5)


@needs("peft")
def test_several_disabled_and_merged_adapters():
    from peft import LoraConfig

    model = adapted("LoraConfig")
    model.add_adapter("other", LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    base = copy.deepcopy(blocks_of(model.get_base_model())[0].output.base_layer)
    model.base_model.set_adapter(["default", "other"])
    output = blocks_of(model.get_base_model())[0].output
    both = base.weight + output.get_delta_weight("default") + output.get_delta_weight("other")
    check(output, both, base.bias)
    with model.disable_adapter():
        check(output, base.weight, base.bias)
    model.merge_adapter()
    check(output, both, base.bias)


@needs("peft")
def test_a_trace_with_a_lora_bias_is_that_of_the_merged_model():
    model = adapted("LoraConfig", lora_bias=True)
    found, merged = fr.trace(model, None, IDS), fr.trace(copy.deepcopy(model).merge_and_unload(), None, IDS)
    np.testing.assert_allclose(found.heads, merged.heads, atol=2e-5)
    np.testing.assert_allclose(found.attention_bias, merged.attention_bias, atol=2e-5)


@needs("peft")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_lora_on_the_fused_transposed_layers_of_gpt2(options):
    import peft

    config = peft.LoraConfig(
        target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False, **options
    )
    model = peft.get_peft_model(make("gpt2"), config).eval()
    found = fr.trace(model, None, IDS, neurons=True)
    merged = fr.trace(copy.deepcopy(model).merge_and_unload(), None, IDS, neurons=True)
    np.testing.assert_allclose(found.heads, merged.heads, atol=2e-5)
    np.testing.assert_allclose(found.attention_bias, merged.attention_bias, atol=2e-5)
    assert found.neurons(1)["neuron"].tolist() == merged.neurons(1)["neuron"].tolist()


@needs("peft")
def test_adapters_that_cannot_be_counted_are_refused_by_name():
    model = adapted("LoraConfig", alora_invocation_tokens=[92, 65], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="activated LoRA"):
        check_adapters(model.get_base_model())
    with pytest.raises(ValueError, match="activated LoRA"):
        fr.trace(model, None, IDS)
    with model.disable_adapter():
        check_adapters(model.get_base_model())
        fr.trace(model, None, IDS)
    with pytest.raises(ValueError, match="lily adapter on a Linear is not linear"):
        fr.trace(adapted("LilyConfig"), None, IDS)


@needs("peft", "accelerate")
def test_an_adapter_on_offloaded_weights(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "model")
    models = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        ),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    ]
    outputs = []
    for model in models:
        torch.manual_seed(0)
        adapter = get_peft_model(model.eval(), LoraConfig(target_modules=["o_proj"]))
        outputs.append(blocks_of(adapter.get_base_model())[0].output)
        if len(outputs) == 1:
            # PEFT leaves the adapter of an offloaded layer without any
            with pytest.raises(ValueError, match="has no weights"):
                effective_weight(outputs[0], 0)
        for part in (outputs[-1].lora_A["default"], outputs[-1].lora_B["default"]):
            nn.init.normal_(part.to_empty(device="cpu").weight)
    torch.testing.assert_close(effective_weight(outputs[0], 0), effective_weight(outputs[1], 0))
    torch.testing.assert_close(effective_bias(outputs[0]), effective_bias(outputs[1]))


def test_a_block_computes_in_its_coarsest_type():
    model = llama()
    block = blocks_of(model)[0]
    assert coarsest_dtype(block, torch.float32) == torch.float32
    assert tolerance(block, torch.float32) == 1e-5
    assert coarsest_dtype(block, torch.bfloat16) == torch.bfloat16
    block.output.__class__ = Half
    block.output.bfloat16()
    assert coarsest_dtype(block, torch.float32) == torch.bfloat16
    for kind, expected in ((Stored, torch.float32), (Rounds, torch.int8)):
        model = llama()
        model.model.layers[0].self_attn.o_proj = kind(model.model.layers[0].self_attn.o_proj)
        assert coarsest_dtype(blocks_of(model)[0], torch.float32) == expected
    model.model.layers[0].self_attn.o_proj.kind = torch.float8_e4m3fn
    assert coarsest_dtype(blocks_of(model)[0], torch.float32) == torch.float8_e4m3fn
    model.model.layers[0].self_attn.o_proj = Bends(64, 64)  # what is not linear is no excuse
    assert coarsest_dtype(blocks_of(model)[0], torch.float32) == torch.float32


def test_float32_products_that_are_not_float32():
    block = blocks_of(llama())[0]
    torch.set_float32_matmul_precision("medium")
    try:
        assert coarsest_dtype(block, torch.float32) == torch.bfloat16
        assert any("set_float32_matmul_precision" in cause for cause in causes(nn.Module(), block))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert coarsest_dtype(block, torch.float32) == torch.float32


def test_causes_are_named():
    model = llama()
    block = blocks_of(model)[1]
    assert causes(model, block) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert causes(model, block) == ["autocast to bfloat16 is active"]
    handle = block.attention.register_forward_hook(lambda module, args, out: out)
    assert causes(model, block) == ["forward hooks: on self_attn"]
    handle.remove()
    block.module.mlp.forward = functools.partial(lambda x: x)
    assert causes(model, block) == ["replaced forward methods: mlp (on the module)"]
    del block.module.mlp.forward
    model.model.layers[1].self_attn.o_proj = Stored(block.output)
    assert causes(model, blocks_of(model)[1]) == ["quantised layers: Stored at self_attn.o_proj"]
    mask = torch.zeros(8, 8)
    assert any("looks ahead" in cause for cause in causes(model, block, mask))
    hidden = mask.masked_fill(torch.ones(8, 8).triu(1).bool(), torch.finfo(torch.float32).min)
    assert not any("looks ahead" in cause for cause in causes(model, block, hidden))


@needs("peft")
def test_adapters_are_a_cause():
    model = adapted("LoraConfig").get_base_model()
    (cause,) = causes(model, blocks_of(model)[0])
    assert cause.startswith("adapters: the lora adapter on a Linear at self_attn.v_proj")


def test_a_replaced_class_is_a_cause(monkeypatch):
    model = llama()
    attention = type(model.model.layers[0].self_attn)
    original = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    assert causes(model, blocks_of(model)[0]) == ["replaced forward methods: LlamaAttention (by test_weights)"]


def test_whole_modules_that_adapters_train():
    """modules_to_save keeps copies beside the originals; the copy is what runs."""
    from peft import LoraConfig, get_peft_model
    from test_process_state import IDS, tiny

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=["self_attn"])).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(2)
    merged = fr.trace(copy.deepcopy(model).merge_and_unload(), None, IDS)
    assert (fr.trace(model, None, IDS).heads - merged.heads).abs().max() < 1e-5
    with model.disable_adapter():
        assert (fr.trace(model, None, IDS).heads - fr.trace(tiny(), None, IDS).heads).abs().max() < 1e-5


def test_adapters_with_attention_of_their_own_are_named():
    from peft import AdaptionPromptConfig, get_peft_model
    from test_process_state import IDS, tiny

    model = get_peft_model(tiny(), AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="an adapter has put its AdaptedAttention there"):
        fr.trace(model, None, IDS)
