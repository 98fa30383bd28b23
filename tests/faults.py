"""Fault injection: the k-th file operation of a run fails or kills the process, for k = 1, 2, 3 … until a run is not
hit any more.

A library preloaded before libc (``faults.c``) counts the operations below one folder, whoever calls them: Python, Rust
(safetensors), C++ (Arrow). A test names a :class:`Scenario` in an importable module and calls :func:`every_fault`::

    class Writing(Scenario):
        def prepare(self):                     # once: imports, models, what is expected
            ...
        def run(self, folder):                 # in a process of its own, hit by the fault
            ...
        def check(self, folder, outcome):      # undisturbed, in the same process or, if that was killed, in another: is
        nothing lost?
            ...

    def test_writing(tmp_path):
        every_fault("test_writing:Writing", tmp_path)   # in memory where the system has a folder there

All processes of one call are forked from one that has prepared the scenario, so that each costs milliseconds: keep it
free of threads (torch runs with one). Only operations on absolute paths below ``folder`` count; what the scenario must
not lose goes there too.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

READS, WRITES, GROWS = 1, 2, 4
KILL = -1
FAULTS = {  # name -> errno or KILL, which operations count, do all later ones fail too
    "ENOSPC": (errno.ENOSPC, GROWS, True),  # nothing can be written from there on, what is there can be removed
    "EIO": (errno.EIO, READS | WRITES, False),
    "EIO of writes": (errno.EIO, WRITES, False),  # where a run reads so often that a loop over all would take minutes
    "EIO for good": (errno.EIO, WRITES, True),
    "kill": (KILL, WRITES, False),  # reads change nothing that a kill could interrupt
}
COMPILER = shutil.which("gcc") or shutil.which("cc")
LIMIT = 2000  # operations of one run


@dataclass
class Outcome:
    """What a hit run came to. ``operation``: what was hit, ``"rename /…/run.json"``; ``error``: its exception's
    type, None if it returned or was killed.
    """

    fault: str
    number: int
    operation: str = ""
    error: str | None = None
    message: str = ""
    trace: str = ""
    killed: bool = False
    problem: str = ""  # what check() said


class Scenario:
    """What is run under faults; see the module."""

    def prepare(self) -> None: ...

    def start(self, folder: Path) -> None:
        """Fill the empty folder before each run."""

    def run(self, folder: Path) -> None: ...

    def check(self, folder: Path, outcome: Outcome) -> None: ...


def one_sentence(outcome: Outcome, *types: str) -> None:
    """A fault is reported by one of these exceptions with one sentence that names a file of the folder, not by its
    bare words.
    """
    if outcome.error is not None:
        assert outcome.error in types, f"{outcome.error}: {outcome.message}\n{outcome.trace}"
        assert outcome.message.strip(), f"an empty {outcome.error}\n{outcome.trace}"
        assert "\n" not in outcome.message, outcome.message
        assert "'" in outcome.message, f"no file is named: {outcome.message}\n{outcome.trace}"


@functools.cache
def library() -> Path:
    """The compiled shim; skips where there is none to be had."""
    if sys.platform != "linux":
        pytest.skip("fault injection is Linux's")
    if COMPILER is None:
        pytest.skip("no C compiler")
    source = Path(__file__).with_name("faults.c")
    target = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    done = subprocess.run(
        [COMPILER, "-O1", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def every_fault(
    scenario: str, folder: Path, faults: Any = tuple(FAULTS), argument: str = "", timeout: float = 240
) -> list[Outcome]:
    """Run ``"module:Class"`` once per fault and file operation below ``folder``; fails with what
    :meth:`Scenario.check` said. Returns all outcomes.
    """
    if os.access("/dev/shm", os.W_OK):  # fsync costs nothing there
        folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm"))
    environment = os.environ | {
        "LD_PRELOAD": str(library()),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, scenario, str(folder), ",".join(faults), str(library()), argument]
    try:
        done = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        try:
            stdout, stderr = done.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, SIGKILL)  # and all that it forked
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outcomes = [Outcome(**json.loads(line[9:])) for line in stdout.splitlines() if line.startswith("@outcome ")]
    problems = [o for o in outcomes if o.problem]
    shown = "\n\n".join(f"{o.fault} at operation {o.number}, {o.operation}:\n{o.problem}" for o in problems[:5])
    assert not problems, f"{len(problems)} of {len(outcomes)} faults\n{shown}"
    assert done.returncode == 0, stdout[-3000:] + stderr[-5000:]
    assert {o.fault for o in outcomes} == {*faults}, (
        "no operation was hit: does the run work below the folder, by absolute paths?"
    )
    return outcomes


def _in_a_child(work: Any) -> tuple[Any, int]:
    """What ``work()`` returns (JSON), and the signal that killed its process, 0 for none."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            with open(writer, "w") as out:
                json.dump(work(), out)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with open(reader) as read:
        text = read.read()
    _, status = os.waitpid(child, 0)
    return (json.loads(text) if text else None), (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


def _serve(name: str, folder: Path, faults: list[str], shim: ctypes.CDLL, argument: str) -> None:
    try:
        import torch

        torch.set_num_threads(1)
    except ImportError:
        pass
    module, _, kind = name.partition(":")
    scenario: Scenario = getattr(importlib.import_module(module), kind)(*([argument] if argument else []))
    scenario.prepare()
    shim.faults_hit.restype = ctypes.c_char_p
    gc.collect()
    gc.freeze()  # pages that are not touched are not copied
    children = {}
    for fault in faults:  # side by side
        if not (child := os.fork()):
            _loop(scenario, fault, folder, shim)
        children[child] = fault
    statuses = {children[child]: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    for fault in faults:
        print(_outcomes(folder, fault).read_text(), end="", flush=True)
    if any(statuses.values()):
        raise SystemExit(f"{name}: {statuses}")


def _outcomes(folder: Path, fault: str) -> Path:
    return folder / f"{fault.replace(' ', '-')}.outcomes"


def _loop(scenario: Scenario, fault: str, folder: Path, shim: ctypes.CDLL) -> None:
    """One fault at every operation, and the end of this process."""
    try:
        with _outcomes(folder, fault).open("w") as out:
            for number in range(1, LIMIT):
                here = folder / f"{fault.replace(' ', '-')}-{number}"
                here.mkdir(parents=True)
                outcome = _hit(scenario, here, Outcome(fault, number), shim)
                shutil.rmtree(here, ignore_errors=True)
                if not outcome.operation:
                    assert not outcome.error, f"a run without a fault failed: {outcome}"
                    os._exit(0)
                print("@outcome " + json.dumps(asdict(outcome)), file=out, flush=True)
        raise AssertionError(f"more than {LIMIT} file operations")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _hit(scenario: Scenario, folder: Path, outcome: Outcome, shim: ctypes.CDLL) -> Outcome:
    what, kinds, lasts = FAULTS[outcome.fault]
    note = folder.with_name(folder.name + ".operation")

    def work() -> dict[str, Any]:
        scenario.start(folder)
        shim.faults_arm(
            os.fsencode(os.path.realpath(folder)), outcome.number, what, kinds, int(lasts), os.fsencode(note)
        )
        error, message, trace = None, "", ""
        try:
            scenario.run(folder)
        except BaseException as raised:
            error, message, trace = type(raised).__name__, str(raised), traceback.format_exc()
        shim.faults_disarm()
        outcome.error, outcome.message, outcome.trace, outcome.operation = (
            error,
            message,
            trace,
            shim.faults_hit().decode(),
        )
        if outcome.operation:
            outcome.problem = _checked(scenario, folder, outcome)
        return asdict(outcome)

    found, signal = _in_a_child(work)
    if signal:
        outcome.killed, outcome.operation = True, note.read_text()
        assert signal == SIGKILL, f"the run was killed by signal {signal}: {outcome}"
        assert what == KILL, f"the run was killed: {outcome}"
        problem, signal = _in_a_child(lambda: _checked(scenario, folder, outcome))
        outcome.problem = f"check() was killed by signal {signal}" if signal else problem
    else:
        assert found is not None, f"the run of {outcome} ended without a word"
        outcome = Outcome(**found)
    note.unlink(missing_ok=True)
    return outcome


def _checked(scenario: Scenario, folder: Path, outcome: Outcome) -> str:
    try:
        scenario.check(folder, outcome)
    except BaseException:
        return traceback.format_exc() + (
            f"\nafter {outcome.error}: {outcome.message}\n{outcome.trace}" if outcome.error else ""
        )
    return ""


if __name__ == "__main__":
    sys.modules["faults"] = sys.modules["__main__"]
    where = Path(sys.argv[2])
    _serve(sys.argv[1], where, sys.argv[3].split(","), ctypes.CDLL(sys.argv[4]), sys.argv[5])
