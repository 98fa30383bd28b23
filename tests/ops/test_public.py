"""What the public operations share: registration, arrays of other libraries, compilation, process state, refusals."""

import contextlib

import numpy as np
import pytest
import torch
from state_cases import BACKENDS, bad, case, components, layer_inputs, needs_native, registered

from flowroutes_fast import ops
from flowroutes_fast.ops import backends, native, reference


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


def test_missing_extension_is_explained(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: (None, "no compiler was found"))
    monkeypatch.setattr(backends, "_said", set())
    with pytest.warns(RuntimeWarning, match="no compiler was found"):
        ops.attention_importances(**bad())
    with pytest.raises(RuntimeError, match="no compiler was found"):
        ops.attention_importances(**bad(), backend="cpu")


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
    monkeypatch.setattr(backends, "triton_missing", lambda: "triton cannot be imported")
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
