"""The state of the user's process (autocast, default device and dtype, matmul precision) does not reach our computations."""

import contextlib
import threading

import pytest
import torch

from flowroutes_fast.ambient import matmul, neutral


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
            for made in (torch.empty(2), torch.zeros(2), torch.full((2,), 0.5), torch.arange(0.0, 2), torch.tensor([0.5, 1]), torch.eye(2)):
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
