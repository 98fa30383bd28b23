"""Prompts of a batch evaluated side by side: the same answers, the first error, and nothing of torch's settings
changed.
"""

import multiprocessing
import threading
import time

import pytest
import torch
from conftest import tiny

import flowroutes_fast as fr
from flowroutes_fast.tracing import workers

PROMPTS = [list(range(1, 30)), [5, 4, 3], list(range(40, 60)), [7, 7]]


@pytest.mark.parametrize("precision", ["certified", "exact"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_a_batch_side_by_side_is_each_prompt_alone(kind, precision):
    model = tiny(kind)
    together = fr.trace(model, None, PROMPTS, precision=precision, threads=2)
    for one, ids in zip(together, PROMPTS, strict=True):
        alone = fr.trace(model, None, ids, precision=precision, threads=1)
        for name in ("heads", "ffn", "attention_residual", "attention_bias"):
            torch.testing.assert_close(getattr(one, name), getattr(alone, name), atol=2e-6, rtol=1e-4)
        assert len(one.route(-1, 0.04).edges) == len(alone.route(-1, 0.04).edges)


def test_side_by_side_indeed():
    meeting = threading.Barrier(2)  # two items that wait for each other
    names = workers.run_all(lambda number: (meeting.wait(10), threading.current_thread().name)[1], [(0,), (1,)], 2)
    assert len(set(names)) == 2
    assert (
        workers.run_all(lambda number: threading.current_thread().name, [(0,), (1,)], 1)
        == [threading.current_thread().name] * 2
    )


def test_results_in_order_without_gradients_and_torch_left_alone():
    before = torch.get_num_threads()

    def call(number, pause):
        time.sleep(pause)
        return number, torch.is_grad_enabled(), torch.get_num_threads()

    found = workers.run_all(call, [(n, 0.02 * (3 - n)) for n in range(4)], 3)
    assert found == [(n, False, 1) for n in range(4)]
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [before]


def test_the_error_of_an_item_is_raised():
    with pytest.raises(ZeroDivisionError):
        workers.run_all(lambda n: 1 / n, [(1,), (0,), (2,)], 2)
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0: .* NaN"):
        fr.trace(model, None, [[1, 2, 3], [4, 77, 6]], threads=2)
    assert fr.trace(model, None, [[1, 2, 3], [4, 5, 6]], threads=2)[1].heads.isfinite().all()


def _in_child(queue):
    queue.put(workers.run_all(lambda n: n + 1, [(1,), (2,)], 2))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_process_has_workers_of_its_own():
    workers.run_all(lambda n: n, [(1,), (2,)], 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == [2, 3]
    child.join()
