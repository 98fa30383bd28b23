"""The state of the user's process (autocast, default device and dtype, matmul precision) does not reach our
computations.
"""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch

from flowroutes_fast.ops import native
from flowroutes_fast.ops.certified import certified
from flowroutes_fast.ops.neurons import neuron_importances
from flowroutes_fast.ops.selftest import _layer
from flowroutes_fast.system.ambient import matmul, neutral


@pytest.fixture(autouse=True)
def _as_before():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")


def state():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.empty(1).device,
        torch.ones(1).dtype,
    )


def test_inside_all_is_as_in_a_fresh_process_and_outside_as_before():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    with torch.autocast("cpu", torch.bfloat16):
        before = state()
        with contextlib.suppress(KeyError), neutral():
            for made in (
                torch.empty(2),
                torch.zeros(2),
                torch.full((2,), 0.5),
                torch.arange(0.0, 2),
                torch.tensor([0.5, 1]),
                torch.eye(2),
            ):
                assert (made.dtype, made.device.type) == (torch.float32, "cpu")
            assert torch.arange(3).dtype == torch.tensor([1]).dtype == torch.int64
            assert torch.zeros(2, dtype=torch.bfloat16).dtype == torch.bfloat16
            assert torch.zeros(2, device="meta").device.type == "meta"
            with neutral():
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            raise KeyError
        assert state() == before


def test_other_threads_see_nothing_of_it():
    torch.set_default_dtype(torch.float64)
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        with torch.autocast("cpu", torch.bfloat16):
            inside.wait(10)
            seen.append((torch.ones(1).dtype, torch.is_autocast_enabled("cpu")))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with neutral():
        inside.set()
        assert done.wait(10)
    thread.join()
    assert seen == [(torch.float64, True)]


def test_products_are_float32_whatever_the_process_allows():
    torch.manual_seed(0)
    a, b = torch.randn(70, 300), torch.randn(300, 90)
    exact = a.double() @ b.double()
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        torch.testing.assert_close(matmul(a, b).double(), exact, atol=1e-4, rtol=0)
        assert matmul(a, b).dtype == torch.float32


@pytest.mark.parametrize("way", ["reference", "cpu", "cpu, in passes"])
def test_certificates_and_neurons_are_the_same_in_every_state(way):
    if way != "reference" and native.load()[0] is None:
        pytest.skip("native extension not built")
    backend, fused = way.split(",")[0], "," not in way
    layer, others = _layer((4, 2, 20, 30, 16, 16, 64), gate=True), torch.ones(1, 20)
    activation, w_down = torch.randn(20, 50).relu(), torch.randn(50, 64)

    def everything():
        a = replace(layer)  # nothing cached
        for measure in ("proximity", "signed"):
            found = certified(a, others, floor=1e-3, measure=measure, backend=backend, fused=fused)
            yield from (found.low, found.high, found.head_low, found.head_high, found.index, found.value)
        found = neuron_importances(activation, w_down, layer.whole, others[0], backend=backend)
        yield from (found.index, found.importance, found.low)

    wanted = [*everything()]
    for change in ("autocast", "meta", torch.bfloat16, torch.float64):
        with contextlib.ExitStack() as stack:
            if change == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            elif change == "meta":
                stack.enter_context(torch.device("meta"))
            else:
                torch.set_default_dtype(change)
            found = [*everything()]
        torch.set_default_dtype(torch.float32)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), change
