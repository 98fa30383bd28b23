"""A trace says what the model computes, whatever state the process is in: settings, compiled code, other threads,
hooks, adapters.
"""

import functools
import threading
import time
import warnings

import pytest
import torch
from families import make

import flowroutes_fast as fr
from flowroutes_fast.experiments import ablation

IDS = [3, 14, 15, 92, 65, 35, 89, 79]
LONG = [3 + i % 90 for i in range(300)]


def tiny(kind="llama", **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    base = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(base | changes)), dtype=torch.float32).eval()


def same(a, b, within=0.0):
    for name in ("heads", "ffn", "attention_residual", "normaliser_low", "normaliser_high"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape
        assert x.dtype == y.dtype == torch.float32
        assert (x - y).nan_to_num().abs().max() <= within, name


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"precision": "exact"}, {"measure": "signed"}, {"neurons": True}, {"backend": "reference"}]
)
def test_default_dtype(dtype, options, default_dtype):
    model = tiny("gemma2", head_dim=12)
    ids = LONG if not options else LONG[:70]
    before = fr.trace(model, None, ids, **options)
    default_dtype(dtype)
    same(before, fr.trace(model, None, ids, **options))


def surroundings():
    yield "meta", lambda: torch.device("meta")
    yield "autocast", lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    yield "inference", torch.inference_mode
    yield "gradients", torch.enable_grad


@pytest.mark.parametrize(("name", "surrounding"), surroundings())
@pytest.mark.parametrize("traced_before", [True, False])
def test_surroundings(name, surrounding, traced_before):
    model = tiny()
    expected = fr.trace(tiny(), None, LONG)
    if traced_before:
        fr.trace(model, None, IDS)
    with surrounding():
        found = fr.trace(model, None, LONG)
        table = fr.patching(model, None, IDS, [9, *IDS[1:]], answer=5, wrong=6, layers=[1])
        kept = found.route(threshold=0.02).verify(model, random=1)
    same(expected, found)
    assert not found.heads.requires_grad
    assert not found.heads.is_inference()
    assert torch.isfinite(torch.tensor(table["change"].to_numpy())).all()
    assert 0 <= kept.probability <= 1


@pytest.mark.parametrize("batch", [False, True])
def test_settings_of_a_batch(batch, default_dtype):
    model = tiny()
    prompts = [LONG[:40], LONG[:9]] if batch else LONG[:40]
    before = fr.trace(model, None, prompts)
    default_dtype(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        after = fr.trace(model, None, prompts)
    for a, b in zip(before, after, strict=True) if batch else [(before, after)]:
        same(a, b)


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_block_forward(model):
    model.model.layers[1].forward = torch.compile(model.model.layers[1].forward, backend="eager")
    return model


def compiled_block_in_place(model):
    model.model.layers[1].compile(backend="eager")
    return model


def compiled_attention(model):
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn, backend="eager")
    return model


def compiled_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize(
    "how",
    [
        compiled_forward,
        compiled_in_place,
        compiled_block_forward,
        compiled_block_in_place,
        compiled_attention,
        compiled_block,
        lambda model: torch.compile(model, backend="eager"),
    ],
)
@pytest.mark.parametrize("ran_before", [True, False])
def test_compiled_models(how, ran_before):
    expected = fr.trace(tiny(), None, LONG[:40])
    model = how(tiny())
    if ran_before:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([LONG[:40]]), use_cache=False).logits
    same(expected, fr.trace(model, None, LONG[:40]))
    if ran_before:
        with torch.no_grad():
            assert torch.equal(logits, model(input_ids=torch.tensor([LONG[:40]]), use_cache=False).logits)


class Serving:
    """Another thread that runs the same model all the time."""

    def __init__(self, model, ids):
        self.model, self.ids, self.stopped, self.failed, self.runs = model, torch.tensor([ids]), False, [], 0

    def __enter__(self):
        with torch.no_grad():
            self.expected = self.model(input_ids=self.ids, use_cache=False).logits
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self):
        while not self.stopped:
            try:
                with torch.no_grad():
                    found = self.model(input_ids=self.ids, use_cache=False).logits
                if not torch.equal(found, self.expected):
                    self.failed.append(f"logits {float((found - self.expected).abs().max())}")
            except Exception as error:
                self.failed.append(repr(error))
            self.runs += 1

    def __exit__(self, *exc):
        deadline = time.monotonic() + 30
        while self.runs < 4 and not self.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        self.stopped = True
        self.thread.join()
        assert not self.failed, self.failed[:3]
        assert self.runs > 3


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", "bloom", "mistral"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_threads_go_on(kind, implementation):
    model = make(kind)
    model.set_attn_implementation(implementation)
    expected = fr.trace(model, None, IDS)
    with Serving(model, LONG[:50]):
        for _ in range(12):
            same(expected, fr.trace(model, None, IDS))


@pytest.mark.parametrize("what", ["patching", "verify", "resume", "compiled"])
def test_other_threads_go_on_beside(what, tmp_path):
    model = tiny(num_hidden_layers=4)
    if what == "compiled":
        model.compile(backend="eager")
        with torch.no_grad():
            model(input_ids=torch.tensor([LONG[:50]]), use_cache=False)
    route = fr.trace(model, None, IDS).route(threshold=0.02)

    def work(n):
        if what == "patching":
            return fr.patching(model, None, IDS, [9, *IDS[1:]], answer=5, wrong=6, layers=[1])["change"].tolist()
        if what == "verify":
            return route.verify(model, random=1).probability
        return fr.trace(model, None, IDS, resume=tmp_path / str(n) if what == "resume" else None).heads.tolist()

    expected = work(0)
    with Serving(model, LONG[:50]):
        for n in range(1, 6):
            assert work(n) == expected


def test_two_threads_trace_one_model():
    model = tiny()
    prompts = [LONG[:30], LONG[5:60]]
    expected = [fr.trace(model, None, ids) for ids in prompts]
    found = [[], []]

    def run(n):
        for _ in range(6):
            found[n].append(fr.trace(model, None, prompts[n]))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        assert len(found[n]) == 6
        for one in found[n]:
            same(expected[n], one)


def scaled(factor, rows=slice(None)):
    def hook(module, args, out):
        first = (out[0] if isinstance(out, tuple) else out).clone()
        first[:, rows] *= factor
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return hook


@pytest.mark.parametrize(
    ("where", "rows", "says"),
    [
        ("self_attn", slice(None), "forward hooks: on self_attn"),
        ("self_attn", 17, "forward hooks: on self_attn"),
        ("self_attn.o_proj", 5, "forward hooks: on self_attn.o_proj"),
        ("", 23, "forward hooks: on the block"),
        ("", slice(None), "forward hooks: on the block"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entry", ["trace", "batch", "resume", "patching", "positions"])
def test_hooks_that_change_a_state_are_refused(where, rows, says, dtype, entry, tmp_path):
    model = tiny().to(dtype)
    fr.trace(model, None, LONG[:40])
    model.model.layers[1].get_submodule(where).register_forward_hook(scaled(1.5, rows))
    with pytest.raises(ValueError, match=says):  # noqa: PT012
        if entry == "patching":
            fr.patching(model, None, LONG[:40], LONG[1:41], answer=5, wrong=6, layers=[1])
        elif entry == "batch":
            fr.trace(model, None, [LONG[:40], LONG[3:39]])
        else:
            fr.trace(
                model,
                None,
                LONG[:40],
                resume=tmp_path / "run" if entry == "resume" else None,
                positions=[-1] if entry == "positions" else None,
            )


def test_a_resumed_run_keeps_no_layer_that_does_not_add_up(tmp_path):
    model = tiny()
    handle = model.model.layers[1].self_attn.register_forward_hook(scaled(1.5))
    for _ in range(2):  # the first layer was kept, the second is refused again
        with pytest.raises(ValueError, match=r"layer 1.*forward hooks"):
            fr.trace(model, None, IDS, resume=tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").glob("layer-*")] == ["layer-000.safetensors"]
    handle.remove()
    with pytest.raises(ValueError, match=r"holds another run .*model\.layers\.1\.self_attn"):
        fr.trace(model, None, IDS, resume=tmp_path / "run")


def test_steering_between_layers_is_refused():
    model = tiny()
    fr.trace(model, None, IDS)
    for inplace in (False, True):
        steer = torch.randn(48)

        def before(module, args, kwargs, inplace=inplace, steer=steer):
            state = args[0] if args else kwargs["hidden_states"]
            state = state.add_(steer) if inplace else state + steer
            return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

        handle = model.model.layers[2].register_forward_pre_hook(before, with_kwargs=True)
        with pytest.raises(
            ValueError,
            match=r"layer 2: the state that enters it is not the one that left the layer "
            r"before.*forward hooks",
        ):
            fr.trace(model, None, IDS)
        handle.remove()
    fr.trace(model, None, IDS)


def test_hooks_that_the_parts_contain_are_counted():
    """What an FFN, a query, a key or a value really was is what the parts are made of."""
    model = tiny()
    expected = fr.trace(model, None, IDS)
    handles = [
        model.model.layers[1].mlp.register_forward_hook(scaled(0.5)),
        model.model.layers[0].self_attn.v_proj.register_forward_hook(scaled(1.5)),
        model.model.layers[0].self_attn.k_proj.register_forward_hook(scaled(2.0, 3)),
    ]
    changed = fr.trace(model, None, IDS)
    assert (changed.heads - expected.heads).abs().max() > 1e-3
    for handle in handles:
        handle.remove()
    model.model.layers[1].mlp.down_proj.weight.data *= 0.5
    model.model.layers[0].self_attn.v_proj.weight.data *= 1.5
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(scaled(2.0, 3))
    same(changed, fr.trace(model, None, IDS), 1e-6)


def test_hooks_that_look_are_welcome():
    model, seen = tiny(), []
    expected = fr.trace(model, None, IDS)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    same(expected, fr.trace(model, None, IDS))
    assert "LlamaAttention" in seen


def test_replaced_forward():
    model = tiny()
    fr.trace(model, None, IDS)
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def louder(*args, **kwargs):
        out, *rest = own(*args, **kwargs)
        return (out * 1.5, *rest)

    attention.forward = louder
    with pytest.raises(ValueError, match=r"replaced forward methods: self_attn"):
        fr.trace(model, None, IDS)
    attention.forward = own
    fr.trace(model, None, IDS)


def test_foreign_attention_functions():
    """One that does as the built-in ones is traced; one that knocks out a single edge is refused, at any position."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def knocked(module, query, key, value, mask, **options):
        out, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
        if cut:
            out = out.clone()
            out[:, 29] = 0
        return out, weights

    AttentionInterface.register("knocked", knocked)
    AttentionMaskInterface.register("knocked", sdpa_mask)
    model, cut = tiny(), False
    expected = fr.trace(model, None, LONG[:40])
    model.set_attn_implementation("knocked")
    same(expected, fr.trace(model, None, LONG[:40]))
    cut = True
    with pytest.raises(ValueError, match="attention weights that are recomputed are not those"):
        fr.trace(model, None, LONG[:40])


def test_the_check_costs_little(demo, monkeypatch):
    """Counted, not timed: it looks at a few rows and channels of a plain model."""
    from flowroutes_fast.capture import conservation
    from flowroutes_fast.ops import native

    model, tokenizer = demo
    fr.trace(model, tokenizer, "warm")
    taken, real = [], conservation.Conservation.__call__

    def count(self, layer, *more):
        self.thorough = False  # whatever other tests have left in the process
        real(self, layer, *more)
        taken.append((len(self.open[-1].errors), sum(parts.numel() for _, parts in self.open[-1].sums)))

    monkeypatch.setattr(conservation.Conservation, "__call__", count)
    fr.trace(model, tokenizer, "The quick brown fox jumps over the lazy dog. " * 20)
    if native.instruction_sets():
        assert taken == [(3, 0)] * 30  # one native call a layer
    taken.clear()
    monkeypatch.setattr(conservation, "_native_errors", lambda *_: None)
    fr.trace(model, tokenizer, "The quick brown fox jumps over the lazy dog. " * 20)
    assert len(taken) == 30
    assert all(0 < count <= 8 * conservation.ROWS * conservation.CHANNELS for _, count in taken)


def test_modes_come_back():
    model = tiny()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.eval()
    before = [module.training for module in model.modules()]
    fr.trace(model, None, IDS)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        fr.trace(model, None, [10_000])
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


def test_coarse_products_are_allowed_for():
    """Float32 products that the process rounds to bfloat16 change the model's pass; the check allows for them, our
    own do not take part.
    """
    model = tiny(hidden_size=64, intermediate_size=128)
    expected = fr.trace(model, None, LONG)
    before = torch.get_float32_matmul_precision()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.set_float32_matmul_precision("medium")
        assert (expected.heads - fr.trace(model, None, LONG).heads).abs().max() < 0.02
    finally:
        torch.set_float32_matmul_precision(before)


def test_ablated_runs_keep_threads_apart():
    model = tiny()
    run = ablation.clean(model, IDS)
    start = time.perf_counter()
    with Serving(model, LONG[:50]):
        while time.perf_counter() - start < 0.3:
            assert torch.equal(ablation.clean(model, IDS).logits, run.logits)


def on_row(own, row=5, factor=3.0):
    """A method that does as ``own`` but for one position."""

    @functools.wraps(own)
    def method(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        first = (out[0] if isinstance(out, tuple) else out).clone()
        first[:, row] *= factor
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return method


@pytest.mark.parametrize(
    ("kind", "method", "says"),
    [
        ("LlamaAttention", "forward", "replaced forward methods: LlamaAttention"),
        ("LlamaAttention", "__call__", "replaced forward methods: LlamaAttention.__call__"),
        ("LlamaDecoderLayer", "forward", "replaced forward methods: LlamaDecoderLayer"),
    ],
)
def test_replaced_methods_of_classes_act_on_single_positions(kind, method, says, monkeypatch):
    from transformers.models.llama import modeling_llama

    model = tiny()
    fr.trace(model, None, LONG[:40])
    kind = getattr(modeling_llama, kind)
    monkeypatch.setattr(kind, method, on_row(getattr(kind, method)), raising=False)
    with pytest.raises(ValueError, match=says):
        fr.trace(model, None, LONG[:40])


def one_pair_cut(function, layout):
    """An attention function that leaves out one head at one position."""

    def attention(*args, **kwargs):
        found = function(*args, **kwargs)
        out = (found[0] if isinstance(found, tuple) else found).clone()
        out[(slice(None), 5, 3) if layout == "token, head" else (slice(None), 3, 5)] = 0
        return (out, *found[1:]) if isinstance(found, tuple) else out

    return attention


@pytest.mark.parametrize("what", ["registered sdpa", "torch's sdpa", "eager"])
def test_attention_functions_under_a_known_name(what, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama import modeling_llama

    model = tiny()
    model.set_attn_implementation("eager" if what == "eager" else "sdpa")
    fr.trace(model, None, LONG[:40])
    if what == "registered sdpa":
        changed = one_pair_cut(ALL_ATTENTION_FUNCTIONS["sdpa"], "token, head")
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", changed)
    elif what == "eager":
        monkeypatch.setattr(
            modeling_llama,
            "eager_attention_forward",
            one_pair_cut(modeling_llama.eager_attention_forward, "token, head"),
        )
    else:
        own = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", one_pair_cut(own, "head, token"))
    with pytest.raises(ValueError, match=r"recomputed are not those.*replaced functions"):
        fr.trace(model, None, LONG[:40])


@pytest.mark.parametrize("kind", ["function", "dispatch"])
def test_modes_that_take_calls(kind):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class OfFunctions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            return cut(found) if func is torch.nn.functional.scaled_dot_product_attention else found

    class OfDispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            return (cut(found[0]), *found[1:]) if "scaled_dot_product" in str(func) else found

    def cut(out):
        if meddling:
            out = out.clone()
            out[:, 3, 5] = 0
        return out

    model, meddling = tiny(), False
    mode = OfFunctions if kind == "function" else OfDispatch
    expected = fr.trace(model, None, LONG[:40])
    with mode():
        same(expected, fr.trace(model, None, LONG[:40]))
    meddling = True
    with mode(), pytest.raises(ValueError, match="modes that take PyTorch's calls: Of"):
        fr.trace(model, None, LONG[:40])


def test_fake_tensors_are_refused_by_name():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = tiny()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="FakeTensorMode"):
        fr.trace(model, None, IDS)


def test_inside_torch_transforms_and_compiled_callers():
    model = tiny()
    expected = float(fr.trace(model, None, IDS).heads.sum())

    def total(x):
        return x * fr.trace(model, None, IDS).heads.sum()

    assert float(torch.func.grad(total)(torch.tensor(1.0))) == expected
    assert torch.vmap(total)(torch.ones(2)).tolist() == [expected] * 2
    assert float(torch.compile(total, backend="eager")(torch.tensor(1.0))) == pytest.approx(expected, rel=1e-6)


def test_an_attention_class_of_ones_own_keeps_the_eager_function():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Mine(LlamaAttention):
        pass

    model = tiny()
    model.set_attn_implementation("eager")
    expected = fr.trace(model, None, IDS)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Mine
    same(expected, fr.trace(model, None, IDS))


@pytest.mark.parametrize("where", ["model", "model.layers.1"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, lambda: torch.device("meta")])
def test_modes_inside_a_forward(where, mode):
    model = tiny()
    expected = fr.trace(model, None, LONG[:40])
    module = model.get_submodule(where)
    own = module.forward

    def forward(*args, **kwargs):
        with mode():
            return own(*args, **kwargs)

    module.forward = forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(expected, fr.trace(model, None, LONG[:40]))


@pytest.mark.parametrize("traced_before", [True, False])
def test_autocast_inside_a_forward(traced_before):
    """As accelerate prepares models: the model computes in bfloat16, our computations do not."""
    model = tiny()
    expected = fr.trace(model, None, LONG[:40])
    model = model if traced_before else tiny()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    found = fr.trace(model, None, LONG[:40])
    same(found, fr.trace(model, None, LONG[:40], precision="exact", backend="reference"), 2e-2)
    assert 0 < (found.heads - expected.heads).abs().max() < 0.05


def test_masks_that_a_hook_writes_to():
    """Attention knocked out in place from one layer on, or in a copy for one: what each layer was given counts."""

    def knock(copy):
        model = tiny()
        model.set_attn_implementation("eager")

        def before(module, args, kwargs):
            mask = kwargs["attention_mask"].clone() if copy else kwargs["attention_mask"]
            mask[:, :, 20, 3] = torch.finfo(mask.dtype).min
            return args, kwargs | {"attention_mask": mask}

        for layer in model.model.layers[1:] if copy else model.model.layers[1:2]:
            layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)
        return fr.trace(model, None, LONG[:40])

    same(knock(True), knock(False))


def test_traces_within_a_pass():
    """A hook that traces the model again, or another one that shares its blocks, disturbs neither trace."""
    model, other = tiny(), tiny()
    other.model.layers = model.model.layers
    expected, short = fr.trace(model, None, LONG[:40]), fr.trace(other, None, IDS)
    inner, waiting = [], [other, model]

    def hook(module, args, out):
        if waiting:
            inner.append(fr.trace(waiting.pop(), None, IDS))  # the first of them holds the second

    model.model.layers[1].mlp.register_forward_hook(hook)
    same(expected, fr.trace(model, None, LONG[:40]))
    assert len(inner) == 2
    for one in inner:
        same(short, one)


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("tokens", [8, 40])
def test_a_pass_within_a_pass_is_refused_by_name(where, tokens):
    model, busy = tiny(), []

    def hook(module, args, out):
        if not busy:
            busy.append(True)
            model(input_ids=torch.tensor([LONG[:tokens]]))
            busy.clear()

    model.get_submodule(where).register_forward_hook(hook)
    with pytest.raises(ValueError, match="runs the model again"):
        fr.trace(model, None, LONG[:40])


@pytest.mark.parametrize("what", ["block", "attention"])
def test_layers_that_are_one_module(what):
    model = tiny()
    if what == "block":
        model.model.layers[2] = model.model.layers[1]
    else:
        model.model.layers[2].self_attn = model.model.layers[1].self_attn
    with pytest.raises(ValueError, match="layers 1 and 2 share one Llama"):
        fr.trace(model, None, IDS)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_in_few_bits(kind, dtype):
    """Eager attention rounds scores to half precision: where they are large, its weights count and not better ones."""
    from flowroutes_fast.capture import conservation
    from flowroutes_fast.capture.hooks import capture

    model = make(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "c_attn.weight", "qkv_proj.weight")):
                parameter *= 12
    model = model.to(dtype)
    model.set_attn_implementation("eager")
    ids = LONG[:60]
    errors = []
    capture(model, torch.tensor([ids]), lambda layer: errors.append(float(conservation.weights_error(layer, None))))
    assert max(errors) <= conservation.TOLERANCE[dtype]
    single = fr.trace(model, None, ids)
    same(single, fr.trace(model, None, ids, precision="exact"), 2e-2)
    fr.trace(model, None, [ids, ids[:9]])
