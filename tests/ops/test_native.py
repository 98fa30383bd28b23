"""The native extension: every operation on every instruction set, what its calls refuse, and memory that runs out."""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
import torch
from native_build import build

from flowroutes_fast import ops
from flowroutes_fast.ops import native
from flowroutes_fast.ops.selftest import OPERATIONS, _layer, self_test

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="native extension not built")
LAYER = (4, 2, 5, 9, 7, 6, 33)


@pytest.fixture(scope="module")
def tested():
    return self_test()


@pytest.mark.parametrize(
    "isa", ["baseline", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_on_every_instruction_set(operation, isa, tested):
    if isa not in native.instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    assert tested[f"{operation}, {isa}"] is None


def test_no_operation_is_left_out(monkeypatch):
    """Of the extension's; test_conservation.py compares the one that the self-test does not, on all instruction
    sets.
    """
    module, called = native.extension(), set()

    class Noting:
        def __getattr__(self, name):
            called.add(name)
            return getattr(module, name)

    monkeypatch.setattr(native, "extension", Noting)
    monkeypatch.setattr(native, "instruction_sets", lambda: ["baseline"])
    self_test()
    operations = {name for name in dir(module) if "arguments: dict" in (getattr(module, name).__doc__ or "")}
    assert len(operations) > 7
    assert {name for name in operations - called if not name.startswith("cuda")} == {"conservation"}


def test_every_operation_at_every_width(monkeypatch, tmp_path):
    """Widths of vectors that this processor does not have (all with FLOWROUTES_ALL_WIDTHS=1), as the compiler takes
    them apart.
    """
    has = [] if os.environ.get("FLOWROUTES_ALL_WIDTHS") == "1" else native.instruction_sets()
    widths = [lanes for isa, lanes in (("baseline", 4), ("avx2", 8), ("avx512", 16)) if isa not in has]
    if widths and shutil.which("g++") is None:
        pytest.skip("the CUDA headers or g++ not found")
    for lanes in widths:
        target = tmp_path / str(lanes) / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        target.parent.mkdir()
        build(Path(__file__).parents[2] / "csrc", target, tmp_path, f"-DFLOWROUTES_LANES={lanes}")
        spec = importlib.util.spec_from_file_location("_native", target)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(native, "extension", lambda module=module: module)
        monkeypatch.setattr(native, "instruction_sets", lambda: ["baseline"])
        assert set(self_test().values()) == {None}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_as_many_as_asked():
    """OpenMP keeps the threads that a caller had: in a new thread each operation leaves one less than it was asked
    for.
    """
    code = """
    import os
    import threading
    import time
    import torch
    from flowroutes_fast import ops
    from flowroutes_fast.ops.bound import bound
    from flowroutes_fast.ops.pairs import pairs
    from flowroutes_fast.ops.certified import certified
    from flowroutes_fast.ops.neurons import neuron_importances
    from flowroutes_fast.ops.selftest import _layer

    a = _layer((4, 2, 100, 100, 8, 8, 33))
    base, activation, down = torch.ones(100), torch.ones(100, 7), torch.ones(7, 33)
    call = torch.ops.flowroutes.attention_layer
    calls = (
        lambda n: ops.part_proximity(a.whole, a.whole, backend="cpu", threads=n),
        lambda n: ops.component_proximity(a.whole[:, None], a.whole, backend="cpu", threads=n),
        lambda n: neuron_importances(activation, down, a.whole, base, backend="cpu", threads=n),
        lambda n: call(a.query, a.key, a.value, a.w_o, a.whole, base, None, None, a.scaling, 0.0, 0, False, 0.0,
                       "cpu", n),
        lambda n: certified(a, base[None], floor=1e-3, threads=n),
        lambda n: bound(a, "cpu", threads=n),
        lambda n: pairs(a, None, torch.zeros(3, 50, dtype=torch.int32), "cpu", threads=n),
    )
    number = lambda: len(os.listdir("/proc/self/task"))
    alone = number()

    def left(one, n):
        # PyTorch's own work leaves none; on some processors its products ask the thread they are on
        torch.set_num_threads(1)
        one(n)
        print(number() - alone - 1, end=" ")

    for one in calls:
        for n in (1, 2, 1):
            thread = threading.Thread(target=left, args=(one, n))
            thread.start()
            thread.join()
            while number() > alone:
                time.sleep(0.001)
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_DYNAMIC": "false"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0", "1", "0"] * 7


def test_an_instruction_set_that_is_not_there_is_refused():
    whole = torch.ones(1, 4)
    with native.instruction_set("neon9"), pytest.raises(ValueError, match="'neon9' is not available"):
        ops.part_proximity(whole, whole, backend="cpu")


class Broken:
    """The extension with one operation whose result is off."""

    def __init__(self, operation):
        self.operation, self.module = operation, native.extension()

    def __getattr__(self, name):
        function = getattr(self.module, name)
        return functools.partial(self.wrong, function) if name == self.operation else function

    def wrong(self, function, arguments, isa):
        found = function(arguments, isa)
        name = next(name for name in ("proximities", "out", "value", "low", "upper", "normaliser") if name in arguments)
        import ctypes

        ctypes.c_float.from_address(arguments[name]).value *= 1.01
        ctypes.c_float.from_address(arguments[name]).value += 0.01
        return found


@pytest.mark.parametrize(
    ("name", "tests"),
    {
        "dense": "dense",
        "certified": "certified",
        "bound": "bound",
        "pairs": "pairs",
        "rank1": "rank1",
        "parts": "parts",
        "components": "components",
    }.items(),
)
def test_a_broken_kernel_is_told(name, tests, monkeypatch):
    module = Broken(name)
    monkeypatch.setattr(native, "extension", lambda: module)
    monkeypatch.setattr(native, "instruction_sets", lambda: ["baseline"])
    monkeypatch.setattr("flowroutes_fast.ops.selftest.SHAPES", ((3, 1, 5, 9, 7, 5, 33),))
    found = self_test()
    assert {key.split(",")[0] for key, wrong in found.items() if wrong} == {tests}
    assert "differs from float64 by" in found[f"{tests}, baseline"]


def test_the_extension_refuses_unknown_missing_and_null_fields():
    layer = _layer(LAYER)

    def arguments():
        from flowroutes_fast.ops.attention import native_arguments

        made = native_arguments(layer)
        for name in ("upper", "flow"):
            made.make(name, layer.n_query, layer.n_head)
        return made

    arguments().call("bound")
    for change, says in (
        ({"uper": 1}, "unknown entry"),
        ({"upper": 0}, "must not be null"),
        ({"v": 0}, "must not be null"),
        ({"group": 3}, "must divide"),
        ({"group": 0}, "must divide"),
        ({"keys": 0}, "must be positive"),
        ({"offset": -1}, "a key for every query"),
    ):
        changed = arguments()
        changed |= change
        with pytest.raises(ValueError, match=says):
            changed.call("bound")
    for name in ("upper", "flow", "v", "g", "w_row", "queries", "q"):
        changed = arguments()
        del changed[name]
        with pytest.raises(ValueError, match=f"'{name}' (is missing|, 'k' and)|'pattern' or 'q'"):
            changed.call("bound")


@pytest.mark.parametrize(
    ("tensor", "error", "says"),
    [
        (torch.zeros(3, 4, dtype=torch.bfloat16), TypeError, r"x must be torch\.float32, got torch\.bfloat16"),
        (torch.zeros(3, 4, device="meta"), ValueError, "on the CPU, got a torch.strided tensor on meta"),
        (torch.zeros(4, 3), ValueError, r"must have shape \[3, 4\], got \[4, 3\]"),
        (torch.zeros(4, 3).T, ValueError, "must be contiguous"),
        (torch.zeros(3, 4).to_sparse(), ValueError, "dense tensor"),
        (torch.zeros(3, 4, dtype=torch.complex64).conj().imag, ValueError, "contiguous"),
    ],
)
def test_an_address_is_taken_of_what_the_kernel_expects_alone(tensor, error, says):
    with pytest.raises(error, match=says):
        native.address("x", tensor, (3, 4))


def test_a_fake_tensor_has_no_address():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="take real tensors"):
        native.address("x", fake, (3, 4))


def test_lazily_negated_tensors_are_read_right():
    outputs = torch.randn(5, 6, dtype=torch.complex64).conj().imag
    assert outputs.is_neg()
    whole = torch.randn(5, 6)
    assert torch.equal(
        ops.part_proximity(outputs, whole, backend="cpu"), ops.part_proximity(outputs.clone(), whole, backend="cpu")
    )
    layer = _layer((3, 3, 6, 6, 6, 6, 6))
    value = torch.randn(3, 6, 6, dtype=torch.complex64).conj().imag
    call = torch.ops.flowroutes.attention_proximity
    pattern = torch.rand(3, 6, 6)
    assert torch.equal(
        call(pattern, value, layer.w_o, layer.whole, "cpu"), call(pattern, value.clone(), layer.w_o, layer.whole, "cpu")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_that_runs_out_is_a_memory_error():
    code = """
    import resource
    import torch
    from flowroutes_fast import ops
    from flowroutes_fast.ops.bound import Bounds, bound
    from flowroutes_fast.ops.pairs import pairs
    from flowroutes_fast.ops.certified import certified
    from flowroutes_fast.ops.neurons import neuron_importances
    from flowroutes_fast.ops.selftest import _layer

    a = _layer((8, 2, 100, 1000, 16, 16, 256))
    others = torch.ones(1, 100)
    index = torch.zeros(3, 2_000_000, dtype=torch.int32)
    call = torch.ops.flowroutes.attention_layer
    whole, neurons, down = torch.randn(3000, 256), torch.randn(3000, 500), torch.ones(500, 256)
    rest = whole[:, 0].abs()
    def attention(): call(a.query, a.key, a.value, a.w_o, a.whole, others[0], None, None, a.scaling, 0.0, 0, False,
                          0.0, "cpu", 2)
    def certify(): certified(a, others, floor=1e-3, threads=2)
    def bounds(): bound(a, "cpu", threads=2)
    def listed(): pairs(a, None, index, "cpu", threads=2)
    def rank1(): neuron_importances(neurons, down, whole, rest, backend="cpu", threads=2)
    def parts(): ops.part_proximity(whole, whole, backend="cpu", threads=2)
    calls = (attention, certify, bounds, listed, rank1, parts)
    short = _layer((4, 2, 30, 40, 8, 8, 33))
    certified(short, others[:, :30], floor=1e-3, threads=2)  # the threads are there
    ops.part_proximity(whole, whole, threads=2)
    torch.ones(300, 300) @ torch.ones(300, 300)
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    failed = set()
    for room in range(0, 24 * 2**20, 4 * 2**20):
        resource.setrlimit(resource.RLIMIT_AS, (pages + room, -1))
        for one in calls:
            try:
                one()
            except MemoryError:
                failed.add(one.__name__)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    for one in calls:
        one()
    print("failed", *sorted(failed))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"attention", "certify", "bounds", "listed"} <= set(done.stdout.split())


def test_doctor_says_what_the_self_test_found(monkeypatch):
    from typer.testing import CliRunner

    from flowroutes_fast.cli import app

    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 0, found.output
    assert "self-test  ok: every native operation agrees with float64" in found.output
    monkeypatch.setattr(
        "flowroutes_fast.ops.selftest.self_test",
        lambda: {"pairs, avx2": "differs from float64 by 1.0e+00", "parts, avx2": None},
    )
    found = CliRunner().invoke(app, ["doctor"])
    assert found.exit_code == 1
    assert "self-test  pairs, avx2: differs from float64" in found.output
    assert '"pairs, avx2"' in CliRunner().invoke(app, ["doctor", "--json"]).output
