"""Traces in forked and in several processes: the same figures, and nobody waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from families import make
import flowroutes_fast as fr

torch.set_num_threads(2)
model, ids = make("llama"), [3 + i % 90 for i in range(60)]
before = fr.trace(model, None, ids).heads

def child():
    torch.testing.assert_close(fr.trace(model, None, ids).heads, before, atol=1e-6, rtol=1e-4)
    fr.trace(model, None, [ids, ids])
    try:
        fr.trace(model, None, ids, threads=4)
    except ValueError as refused:
        assert "forked" in str(refused)
        return 0
    return 1

if not (pid := os.fork()):
    code = 2
    try:
        code = child()
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert torch.get_num_threads() == 2
fr.trace(model, None, ids, threads=2)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_trace_after_a_fork():
    """OpenMP's threads stay behind in a fork; the child would wait for them."""
    code = CODE.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
