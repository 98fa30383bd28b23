"""Threads that evaluate the prompts of a batch side by side: what Python does for one prompt overlaps with
another's kernels.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class _Process:
    """Of this process: was anything traced in it, and was it forked from one where something was?"""

    used = False
    forked = False


def check_threads(threads: int) -> None:
    """Called by every trace. ``ValueError`` for several threads in a forked child: OpenMP would wait for threads
    that exist in the parent alone.
    """
    _Process.used = True
    if threads > 1 and _Process.forked:
        raise ValueError(
            f"threads={threads} in a process that was forked after a trace: it has one thread; start processes with "
            f"'spawn' or 'forkserver'"
        )


def run_all(call: Callable[..., Result], items: Iterable[tuple[Any, ...]], threads: int) -> list[Result]:
    """``[call(*item) for item in items]`` by ``threads`` threads, without gradients; the first exception of an item
    is raised.
    """

    def one(item: tuple[Any, ...]) -> Result:
        with torch.no_grad():
            return call(*item)

    if threads < 2:
        return [one(item) for item in items]
    return list(_pool(threads).map(one, items))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Workers whose own torch operations run on one thread each; they are kept, and wait without work between
    batches.
    """
    before, started = torch.get_num_threads(), Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first call takes the number that others have set
        torch.set_num_threads(1)  # of this thread, and what threads started later begin with: put back below
        started.wait()

    pool = ThreadPoolExecutor(threads, "flowroutes", initializer=begin)
    for _ in range(threads):
        pool.submit(int)  # none of them is idle before the barrier: each call starts one
    started.wait()
    torch.set_num_threads(before)
    return pool


def _in_child() -> None:
    """Threads do not come along in a fork: no pool, and one thread where OpenMP would wait for those of the parent
    for ever.
    """
    _pool.cache_clear()
    if _Process.used:
        _Process.forked = True
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
