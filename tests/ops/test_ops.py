"""Kernels against an fp64 evaluation of the paper's formula, on random and on adversarial inputs."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowroutes_fast import ops
from flowroutes_fast.ops import backends, native, reference

# importances, absolute, on the rounded inputs
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
needs_native = pytest.mark.skipif(native.load()[0] is None, reason="native extension not built")


def naive(pattern, value, w_o, pre, mid):
    """Two norms per sub-edge, straight from equation 4, in fp64."""
    p, v, w, x, y = (t.double() for t in (pattern, value, w_o, pre, mid))
    group = p.shape[1] // v.shape[2]
    z = torch.einsum("bhqk,bkhd,hdm->bqkhm", p, v.repeat_interleave(group, 2), w)
    y_ = y[:, :, None, None]
    edge = (y_.abs().sum(-1) - (z - y_).abs().sum(-1)).clamp_min(0)
    residual = (y.abs().sum(-1) - (x - y).abs().sum(-1)).clamp_min(0)
    total = edge.sum((2, 3)) + residual
    # 0/0: a node that no part brings closer
    return (edge / total[:, :, None, None]).nan_to_num(), (residual / total).nan_to_num()


def case(seed, batch, tokens, heads, kv, d, width, outliers=False):
    torch.manual_seed(seed)
    q, k = torch.randn(batch, heads, tokens, d), torch.randn(batch, heads, tokens, d)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    pattern = (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
    value, w_o = torch.randn(batch, tokens, kv, d), torch.randn(heads, d, width) / d**0.5
    pre = torch.randn(batch, tokens, width)
    if outliers:
        pre[..., 0] = 1e4
    z = torch.einsum("bhqk,bkhd,hdm->bqm", pattern, value.repeat_interleave(heads // kv, 2), w_o)
    return pattern, value, w_o, pre, pre + z


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 5, 3, 1, 7, 123), (1, 33, 6, 2, 16, 48), (1, 50, 4, 4, 80, 33)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_importances_equal_fp64(backend, shape, dtype):
    inputs = [t.to(dtype) for t in case(0, *shape)]
    edge, residual = ops.attention_importances(*inputs, backend=backend)
    wanted, wanted_residual = naive(*inputs)
    assert edge.dtype == torch.float32
    np.testing.assert_allclose(edge, wanted, atol=TOLERANCE[dtype], rtol=0)
    np.testing.assert_allclose(residual, wanted_residual, atol=TOLERANCE[dtype], rtol=0)


def test_reference_in_fp64_is_the_formula():
    inputs = [t.double() for t in case(1, 1, 9, 3, 3, 5, 21)]
    edge, residual = ops.attention_importances(*inputs)
    wanted, wanted_residual = naive(*inputs)
    assert edge.dtype == torch.float64
    np.testing.assert_allclose(edge, wanted, atol=1e-13)
    np.testing.assert_allclose(residual, wanted_residual, atol=1e-13)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.integers(1, 40),
    width=st.integers(1, 70),
    outliers=st.booleans(),
)
def test_native_equals_fp64_on_any_shape(seed, tokens, kv, group, d, width, outliers):
    inputs = case(seed, 1, tokens, kv * group, kv, d, width, outliers)
    edge, residual = ops.attention_importances(*inputs, backend="cpu")
    wanted, wanted_residual = naive(*inputs)
    np.testing.assert_allclose(edge, wanted.nan_to_num(), atol=2e-5)
    np.testing.assert_allclose(residual, wanted_residual.nan_to_num(), atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize(
    "what", ["zeros", "negative zeros", "denormal", "equal", "no output", "short rows", "not contiguous"]
)
def test_edge_cases_of_a_pattern(what, backend):
    pattern, value, w_o, pre, mid = case(3, 1, 20, 4, 2, 8, 30)
    if what == "zeros":
        mid[..., ::3] = 0.0
    elif what == "negative zeros":
        mid[..., ::3] = -0.0
    elif what == "denormal":
        mid[..., ::2] = 1e-41
    elif what == "equal":
        mid = torch.ones_like(mid)
    elif what == "no output":
        w_o[1] = 0
    elif what == "short rows":
        pattern = pattern * 0.4
    else:
        pattern = pattern.transpose(-1, -2).contiguous().transpose(-1, -2)
        value, w_o = (
            value.transpose(1, 2).contiguous().transpose(1, 2),
            w_o.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        )
    edge, residual = ops.attention_importances(pattern, value, w_o, pre, mid, backend=backend)
    wanted, wanted_residual = naive(pattern, value, w_o, pre, mid)
    np.testing.assert_allclose(edge, wanted, atol=1e-5)
    np.testing.assert_allclose(residual, wanted_residual, atol=1e-5)


def layer_inputs(tokens=45, heads=4, kv=2, d=16, width=40):
    torch.manual_seed(5)
    q, k, v = torch.randn(heads, tokens, d), torch.randn(kv, tokens, d), torch.randn(kv, tokens, d)
    return q, k, v, torch.randn(heads, d, width), torch.randn(tokens, width) * 3, torch.rand(tokens)


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("variant", ["causal", "window", "softcap", "mask", "mask per head", "sinks"])
def test_attention_layer_recomputes_every_kind_of_attention(variant, isa):
    q, k, v, w, y, base = layer_inputs()
    mask = sinks = None
    if variant.startswith("mask"):
        mask = torch.zeros(45, 45).masked_fill_(torch.ones(45, 45).triu(1) > 0, -torch.inf)
        mask = torch.stack([mask + torch.randn(45, 45) for _ in range(4)]) if variant == "mask per head" else mask
    if variant == "sinks":
        sinks = torch.tensor([0.0, 1.0, 3.0, -2.0])
    options = (0.25, 2.0 if variant == "softcap" else 0.0, 7 if variant == "window" else 0)
    with native.instruction_set(isa):
        out = torch.ops.flowroutes.attention_layer(q, k, v, w, y, base, mask, sinks, *options, True, 0.01, "cpu")
    doubles = [t.double() for t in (q, k, v, w, y, base)]
    wanted = torch.ops.flowroutes.attention_layer(*doubles, mask, sinks, *options, True, 0.01, "reference")
    for found, expected in zip(out[:2], wanted[:2], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(out[2], wanted[2], rtol=1e-4)
    assert {tuple(e) for e in out[3].T.tolist()} ^ {tuple(e) for e in wanted[3].T.tolist()} == set()


@needs_native
def test_threads_do_not_change_the_answer():
    inputs = layer_inputs(tokens=100)
    one = torch.ops.flowroutes.attention_layer(*inputs, None, None, 0.25, 0.0, 0, True, -1.0, "cpu", 1)
    two = torch.ops.flowroutes.attention_layer(*inputs, None, None, 0.25, 0.0, 0, True, -1.0, "cpu", 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_opcheck(backend):
    q, k, v, w, y, base = layer_inputs(tokens=9)
    pattern = reference.attention_pattern(q, k, scaling=0.25)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flowroutes.part_proximity.default, (y, y * 0.5, backend), test_utils=tests)
    torch.library.opcheck(
        torch.ops.flowroutes.attention_proximity.default, (pattern, v, w, y, backend), test_utils=tests
    )
    arguments = (q, k, v, w, y, base, None, None, 0.25, 0.0, 0, True, -1.0, backend)
    torch.library.opcheck(torch.ops.flowroutes.attention_layer.default, arguments, test_utils=tests)


def test_other_norms_and_clip():
    inputs = case(4, 1, 6, 2, 2, 4, 12)
    edge, residual = ops.attention_importances(*inputs, distance_norm=2)
    np.testing.assert_allclose(edge.sum((2, 3)) + residual, 1, atol=1e-5)
    clipped, _ = ops.attention_importances(*inputs, clip=1e-3)
    assert (clipped > 0).all()  # masked pairs count too


def bad(**changes):
    names = ("pattern", "value", "w_o", "resid_pre", "resid_mid")
    return {**dict(zip(names, case(0, 1, 5, 4, 2, 8, 16), strict=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"w_o": torch.zeros(4, 8)}, ValueError, "3 dimensions"),
        ({"value": torch.zeros(1, 5, 3, 8)}, ValueError, "does not divide"),
        ({"resid_mid": torch.zeros(1, 5, 17)}, ValueError, "must be"),
        ({"resid_pre": torch.full((1, 5, 16), float("nan"))}, ValueError, "NaN"),
        ({"pattern": torch.zeros(1, 4, 5, 5, dtype=torch.int64)}, TypeError, "floating point"),
        ({"pattern": [1.0]}, TypeError, r"torch\.Tensor"),
        ({"backend": "cuda9"}, ValueError, "unknown backend 'cuda9'"),
        ({"clip": -1.0}, ValueError, "clip"),
    ],
)
def test_bad_input(changes, error, says):
    with pytest.raises(error, match=says):
        ops.attention_importances(**bad(**changes))


def test_missing_extension_is_explained(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler was found"))
    monkeypatch.setattr(ops, "_said", set())
    with pytest.warns(RuntimeWarning, match="no compiler was found"):
        ops.attention_importances(**bad())
    with pytest.raises(RuntimeError, match="no compiler was found"):
        ops.attention_importances(**bad(), backend="cpu")


def components(shape=(2, 5, 7, 33), dtype=torch.float32):
    torch.manual_seed(2)
    outputs = torch.randn(shape, dtype=dtype)
    return outputs, outputs.sum(-2) + 0.3


def naive_components(outputs, state):
    outputs, state = outputs.double(), state.double()
    return (state.abs().sum(-1, keepdim=True) - (outputs - state[..., None, :]).abs().sum(-1)).clamp_min(0)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7, 33), (3, 123, 4, 5), (4, 0, 9)])
def test_component_proximity(backend, shape):
    outputs, state = components(shape)
    found = ops.component_proximity(outputs, state, backend=backend)
    assert found.shape == outputs.shape[:-1]
    np.testing.assert_allclose(found, naive_components(outputs, state), rtol=1e-5, atol=1e-5)
    # slices, strides
    for part in (outputs[..., :1, :], outputs[..., ::2, :], outputs.transpose(-1, -2).contiguous().transpose(-1, -2)):
        np.testing.assert_allclose(
            ops.component_proximity(part, state, backend=backend), naive_components(part, state), rtol=1e-5, atol=1e-5
        )
    parts = (
        torch.stack([ops.part_proximity(part, state, backend=backend) for part in outputs.unbind(-2)], -1)
        if shape[-2]
        else found
    )
    np.testing.assert_allclose(found, parts, rtol=1e-6, atol=1e-6)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 5),
    count=st.integers(1, 6),
    kept=st.integers(0, 6),
    width=st.integers(1, 70),
    zeros=st.booleans(),
    isa=st.sampled_from(native.instruction_sets() or ["auto"]),
)
def test_parts_and_components_of_any_shape(seed, rows, count, kept, width, zeros, isa):
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(rows, width, generator=g)
    if zeros:
        state[:, ::3], state[:, 1::6] = 0.0, -0.0
    outputs = (state[:, None] / 3 + torch.randn(rows, count, width, generator=g))[:, :kept]
    wanted, unit = naive_components(outputs, state), 1e-6 * (state.abs().sum(-1) + 1e-30)
    with native.instruction_set(isa):
        found = ops.component_proximity(outputs, state, backend="cpu")
        alone = [ops.part_proximity(part, state, backend="cpu") for part in outputs.unbind(1)]
    assert ((found - wanted).abs() <= unit[:, None] * 3).all()
    assert all(torch.equal(part, found[:, n]) for n, part in enumerate(alone))


def test_component_proximity_does_not_cancel():
    state = torch.full((1, 64), 1e4)
    outputs = torch.full((1, 1, 64), 1e-3)
    np.testing.assert_allclose(ops.component_proximity(outputs, state), [[64e-3]], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"state": torch.zeros(2, 5, 32)}, ValueError, r"must be \[..., component, d_model\]"),
        ({"state": torch.zeros(5, 33)}, ValueError, r"must be \[..., component, d_model\]"),
        ({"state": torch.zeros(2, 5, 33, dtype=torch.float64)}, TypeError, "both be float64"),
        ({"outputs": torch.zeros(2, 5, 7, 33, dtype=torch.int32)}, TypeError, "floating point"),
        ({"outputs": [[1.0]]}, TypeError, "supports DLPack"),
        ({"backend": "tpu"}, ValueError, "unknown backend 'tpu'"),
    ],
)
def test_component_proximity_bad_input(change, error, says):
    outputs, state = components()
    with pytest.raises(error, match=says):
        ops.component_proximity(**{"outputs": outputs, "state": state, **change})


def foreign(tensor, kind):
    if kind == "jax":
        return pytest.importorskip("jax.numpy").asarray(tensor.numpy())
    array = tensor.numpy().copy()
    array.flags.writeable = kind == "numpy"
    return array


@pytest.mark.parametrize("kind", ["numpy", "read-only numpy", "jax"])
def test_arrays_of_other_libraries(kind):
    outputs, state = components()
    inputs = case(3, 1, 9, 4, 2, 8, 16)
    given = [foreign(t, kind) for t in inputs]
    for found, wanted in zip(ops.attention_importances(*given), ops.attention_importances(*inputs), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(
        ops.component_proximity(foreign(outputs, kind), foreign(state, kind)), ops.component_proximity(outputs, state)
    )
    assert torch.equal(
        ops.part_proximity(foreign(state, kind), foreign(state * 2, kind)), ops.part_proximity(state, state * 2)
    )


def test_an_array_shares_its_memory():
    array = np.ones((2, 3), np.float32)
    assert ops.as_tensor(array).data_ptr() == array.ctypes.data


def test_reversed_and_byte_swapped_arrays():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (array[::-1], array[:, ::-1], array.astype(">f4")):
        assert np.array_equal(ops.as_tensor(view).numpy(), view)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_part_proximity_of_half_precision_is_float32(backend, dtype):
    torch.manual_seed(0)
    whole = torch.randn(5, 300).to(dtype)
    part = (whole.float() + torch.randn(5, 300) / 3).to(dtype)
    found = ops.part_proximity(part, whole, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ops.part_proximity(part.double(), whole.double()).float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_states_without_d_model(shape):
    state = torch.ones(shape)
    with pytest.raises(ValueError, match=r"part must be \[..., d_model\], got shape"):
        ops.part_proximity(state, state)
    with pytest.raises(ValueError, match=r"state must be \[..., d_model\], got shape"):
        ops.component_proximity(torch.ones(2, 4), state)


@pytest.mark.parametrize("name", ["attention_importances", "part_proximity", "component_proximity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inside_torch_compile(name, dtype):
    outputs, state = components(dtype=dtype)
    given = {
        "attention_importances": [t.to(dtype) for t in case(3, 1, 9, 4, 2, 8, 16)],
        "part_proximity": [state, state * 2],
        "component_proximity": [outputs, state],
    }[name]
    call = getattr(ops, name)

    def doubled(*tensors):
        found = call(*(2 * t for t in tensors))
        return found[0] + 1 if isinstance(found, tuple) else found + 1

    torch.testing.assert_close(torch.compile(doubled, fullgraph=True, backend="aot_eager")(*given), doubled(*given))


def registered(name):
    q, k, v, w, y, base = layer_inputs(tokens=9)
    pattern = reference.attention_pattern(q, k, scaling=0.25)
    outputs, state = components((5, 7, 33))
    return {
        "part_proximity": {"part": y * 0.5, "whole": y},
        "component_proximity": {"outputs": outputs, "state": state},
        "attention_proximity": {"pattern": pattern, "value": v, "w_o": w, "whole": y},
        "attention_layer": {
            "query": q,
            "key": k,
            "value": v,
            "w_o": w,
            "whole": y,
            "base": base,
            "mask": None,
            "sinks": torch.zeros(4),
            "scaling": 0.25,
            "softcap": 0.0,
            "window": 0,
            "dense": True,
            "floor": 0.0,
        },
    }[name]


BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
NAMES = ("part_proximity", "component_proximity", "attention_proximity", "attention_layer")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_registered_op_refuses_what_does_not_fit(name, backend):
    """Each tensor in turn with another size in one dimension, another rank, empty, of integers, without numbers."""
    call, good = getattr(torch.ops.flowroutes, name), registered(name)
    call(**good, backend=backend)
    for key, tensor in good.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        wrong = [tensor.repeat_interleave(2, dim) for dim in range(tensor.dim()) if tensor.shape[dim] > 1]
        wrong += [tensor.narrow(dim, 0, n - 1) for dim, n in enumerate(tensor.shape) if n > 1]
        wrong += [tensor[None], tensor.flatten(), tensor.long(), tensor[..., :0], tensor.to_sparse()]
        for changed in wrong:
            if changed.layout == torch.strided and changed.is_floating_point() and changed.shape == tensor.shape:
                continue
            more_components = changed.is_floating_point() and changed.shape[::2] == tensor.shape[::2]
            if (
                (name, key) == ("component_proximity", "outputs")
                and more_components
                and changed.layout == torch.strided
            ):
                continue
            other_groups = (
                changed.shape[1:] == tensor.shape[1:]
                and changed.is_floating_point()
                and changed.layout == torch.strided
            )
            if (name, key) == ("attention_proximity", "value") and other_groups:
                continue
            if (name, key) == ("part_proximity", "part") and changed.shape == (1, tensor.shape[1]):
                continue
            with pytest.raises((ValueError, TypeError)):
                call(**{**good, key: changed}, backend=backend)
    for threads in (-1, -(2**31)):
        with pytest.raises(ValueError, match="threads"):
            call(**good, backend=backend, threads=threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_with_fewer_keys_than_queries_needs_a_mask(backend):
    good = registered("attention_layer")
    few = {**good, "key": good["key"][:, :5], "value": good["value"][:, :5]}
    with pytest.raises(ValueError, match="causal attention of 9 queries needs as many keys, got 5"):
        torch.ops.flowroutes.attention_layer(**few, backend=backend)
    torch.ops.flowroutes.attention_layer(**{**few, "mask": torch.zeros(9, 5)}, backend=backend)
    for change in ({"window": -1}, {"softcap": -1.0}, {"softcap": float("nan")}):
        with pytest.raises(ValueError, match="softcap and window"):
            torch.ops.flowroutes.attention_layer(**{**good, **change}, backend=backend)


def changed_states():
    """The states of a process in which PyTorch itself gives other numbers."""
    yield "autocast", lambda: torch.autocast("cpu", torch.bfloat16), None
    yield "meta", lambda: torch.device("meta"), None
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield f"default {dtype}", contextlib.nullcontext, lambda dtype=dtype: torch.set_default_dtype(dtype)
    yield "medium", contextlib.nullcontext, lambda: torch.set_float32_matmul_precision("medium")
    yield "deterministic", contextlib.nullcontext, lambda: torch.use_deterministic_algorithms(True)
    yield "inference", torch.inference_mode, None
    yield "grad", torch.enable_grad, None


@pytest.fixture
def _as_before():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)


def tensors(found):
    return [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, torch.Tensor)]


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize(("what", "inside", "before"), changed_states(), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_of_the_process_does_not_matter(what, inside, before, backend):
    inputs = case(6, 1, 24, 4, 2, 24, 40)
    outputs, state = components()
    arguments = {name: registered(name) for name in NAMES}

    def everything():
        yield from tensors(tuple(ops.attention_importances(*inputs, backend=backend)))
        yield from tensors(tuple(ops.attention_importances(*inputs, distance_norm=2)))
        yield ops.part_proximity(state, state * 2, backend=backend)
        yield ops.component_proximity(outputs, state, backend=backend)
        for name in NAMES:
            yield from tensors(getattr(torch.ops.flowroutes, name)(**arguments[name], backend=backend))

    wanted = [*everything()]
    for tensor in arguments["attention_layer"].values():
        if what == "grad" and isinstance(tensor, torch.Tensor):
            tensor.requires_grad_()
    if before:
        before()
    with inside():
        found = [*everything()]
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(name, dtype, backend):
    good = registered(name)
    half = {k: t.to(dtype) if isinstance(t, torch.Tensor) else t for k, t in good.items()}
    exact = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in half.items()}
    call = getattr(torch.ops.flowroutes, name)
    for found, wanted in zip(
        tensors(call(**half, backend=backend)), tensors(call(**exact, backend="reference")), strict=True
    ):
        if found.is_floating_point():
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_tensors_without_numbers_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in ("meta", "fake"):
        with FakeTensorMode() if name == "fake" else contextlib.nullcontext():
            whole = torch.zeros(3, 4, device="meta" if name == "meta" else "cpu")
            inputs = [torch.zeros(t.shape, device=whole.device) for t in case(0, 1, 5, 4, 2, 8, 16)]
        for call in (lambda: ops.part_proximity(whole, whole), lambda: ops.component_proximity(whole[:, None], whole)):  # noqa: B023
            with pytest.raises(ValueError, match=f"a {name} tensor"):
                call()
        with pytest.raises(ValueError, match=f"a {name} tensor"):
            ops.attention_importances(*inputs)


def test_a_backend_runs_what_was_asked_or_refuses(monkeypatch):
    monkeypatch.setitem(backends._MISSING, "triton", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    outputs, state = components()
    with pytest.raises(ValueError, match="'triton' takes tensors on a CUDA device, not on cpu"):
        ops.part_proximity(state, state, backend="triton")
    with pytest.raises(ValueError, match="'triton' takes tensors on a CUDA device, not on cpu"):
        ops.component_proximity(outputs, state, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="'triton' has no kernel for a stored pattern"):
        ops.attention_importances(*case(3, 1, 9, 4, 2, 8, 16), backend="triton")


def test_cuda_without_triton_is_not_available(monkeypatch):
    monkeypatch.setattr("flowroutes_fast.ops.cuda.missing", lambda: None)
    monkeypatch.setattr(ops, "_triton_missing", lambda: "triton cannot be imported")
    assert ops.backend_status()["cuda"] == "its bounds are Triton's: triton cannot be imported"


def test_numbers_that_are_none_and_short_storages_are_refused():
    g = torch.Generator().manual_seed(0)
    shapes = ((4, 7, 8), (2, 9, 8), (2, 9, 5), (4, 5, 33), (7, 33), (7,))
    layer = [torch.randn(shape, generator=g) for shape in shapes]

    def run(scaling=0.3, softcap=0.0, floor=0.0):
        return torch.ops.flowroutes.attention_layer(*layer, None, None, scaling, softcap, 0, True, floor, "cpu")

    run()
    for name, value, says in (
        ("floor", float("nan"), "floor"),
        ("scaling", float("nan"), "scale"),
        ("scaling", float("inf"), "scale"),
        ("softcap", float("inf"), "softcap"),
        ("softcap", float("nan"), "softcap"),
    ):
        with pytest.raises(ValueError, match=says):
            run(**{name: value})
    whole = torch.randn(6, 33, generator=g)
    for rest in (0, 64):
        part = torch.randn(6, 33, generator=g)
        _ = part.untyped_storage().resize_(rest)
        with pytest.raises((ValueError, TypeError), match=r"memory|storage"):
            ops.part_proximity(part, whole, backend="cpu")


def test_arrays_that_would_lose_something_are_refused():
    whole = torch.ones(2, 3)
    with pytest.raises(TypeError, match="masked"):
        ops.part_proximity(np.ma.masked_array(np.ones((2, 3), np.float32), mask=np.eye(2, 3)), whole)
    with pytest.raises(ValueError, match="dense"):
        ops.part_proximity(torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]), whole)
    with pytest.raises(ValueError, match="threads"):
        ops.part_proximity(whole, whole, threads=2**40)
