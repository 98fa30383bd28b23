"""Ctrl+C: one sentence and exit code 130 in every phase of a command, and no file that is not whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowroutes_fast.cli import interrupt

# Interrupts are not ignored, as they are where the tests themselves run in the background; a line says when our code
# starts.
START = (
    "import os, signal, sys; signal.signal(signal.SIGINT, {handler}); import flowroutes_fast.cli.interrupt; "
    "os.write(2, b'started\\n'); "
)
MAIN = "from flowroutes_fast.cli import main; main()"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}
SENTENCE = f"{interrupt.SENTENCE}\n"

# One process imports everything; a copy of it for each moment runs the command and is interrupted at that call of a
# function of ours.
DRIVER = r"""
import importlib, json, os, signal, sys, traceback
from pathlib import Path
sys.path.insert(0, {tests!r})
from flowroutes_fast import cli
from flowroutes_fast.cli import interrupt
from families import make
fr = cli._package()
model = make("llama")

class Tokenizer:
    is_fast = True
    def __call__(self, text, **_):
        return dict(input_ids=[3 + ord(c) % 90 for c in text], offset_mapping=[(i, i + 1) for i in range(len(text))])
    def decode(self, ids, **_):
        return " ".join(map(str, ids))

load = lambda name, **_: (model, Tokenizer())
fr.load = load
sys.modules["flowroutes_fast.loading.load"].load = load
calls = 0
fr.trace(model, Tokenizer(), "Hello").save("given.safetensors")
Path("lines.txt").write_text("One text.\\nAnother.\\n")

def watch(at, presses):
    def count(frame, event, argument):
        global calls
        file = frame.f_code.co_filename
        if event == "call" and "flowroutes_fast" in file and "interrupt.py" not in file:
            calls += 1
            if at <= calls < at + presses:
                signal.raise_signal(signal.SIGINT)
    sys.setprofile(count)

def child(at, presses, folder):
    folder.mkdir()
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(f"../{{folder.name}}-{{number}}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["flowroutes", *words]
    code = 99
    try:
        watch(at, presses)
        cli.main()
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    sys.setprofile(None)
    sys.stdout.flush()
    Path(f"../{{folder.name}}-calls").write_text(str(calls))
    os._exit(code)

def run(name, at, presses=1):
    if not (pid := os.fork()):
        child(at, presses, Path(name))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    files = sorted(str(p.relative_to(name)) for p in Path(name).rglob("*") if p.is_file())
    return dict(code=code, error=Path(f"{{name}}-2").read_text(), files=files)

found = []
for at, (words, moments) in enumerate(json.loads(sys.argv[1])):
    whole = run(f"{{at}}-whole", 10**9)
    last = int(Path(f"{{at}}-whole-calls").read_text())
    places = [3 + (last - 3) * i // moments for i in range(moments)]
    found.append([whole, *(run(f"{{at}}-{{i}}", place, 1 + 2 * (i % 2)) for i, place in enumerate(places))])
print(json.dumps(found))
"""


def start(code, *words, handler="signal.default_int_handler", **options):
    command = [sys.executable, "-c", START.format(handler=handler) + code, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stderr.readline() == "started\n"
    return process


@pytest.mark.parametrize("after", [0.03, 0.1, 0.2, 0.5, 1.0, 1.8])
def test_at_any_time_of_the_start(after):
    """From the first import of ours on, through those of torch and transformers."""
    process = start(MAIN, "trace", "Hello", "--model", "gpt-of-nobody", env=OFFLINE)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error, error
    assert process.returncode == 2 or (process.returncode, error) == (130, SENTENCE), error


def test_at_any_time_of_the_work(tmp_path):
    """Loading, tracing, extracting, writing; a second and a third Ctrl+C do not get in the way of cleaning up."""
    commands = [
        (["trace", "Hello", "--out", "out"], 12),
        (["view", "../given.safetensors", "--model", "x", "--no-open", "--out", "out/page.html"], 6),
        (["corpus", "../lines.txt", "--split", "line", "--out", "run"], 6),
    ]
    code = DRIVER.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", START.format(handler="signal.default_int_handler") + code, json.dumps(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    for whole, *interrupted in json.loads(done.stdout):
        assert (whole["code"], bool(whole["files"])) == (0, True), whole
        for one in interrupted:
            assert (one["code"], one["error"]) == (130, SENTENCE), one
            assert set(one["files"]) <= {*whole["files"], "run/.lock"}, one


def test_where_interrupts_are_ignored_they_stay_ignored():
    process = start(MAIN, "trace", "Hello", "--threshold", "7", handler="signal.SIG_IGN")
    for _ in range(4):
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (2, "flowroutes: threshold must lie in [0, 1), got 7.0\n")


def test_swallowed_and_translated_interrupts(monkeypatch, capfd):
    """What other libraries make of an interrupt does not matter."""
    monkeypatch.setattr("atexit.register", lambda function: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def swallowed():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return

    def translated():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("an error of C++") from None

    def lost():
        Dying()
        time.sleep(5)

    def run(how):
        with interrupt.watched():
            interrupt.tidily()
            how()

    try:
        for how in (swallowed, translated, lost):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with pytest.raises(SystemExit) as ended:
                run(how)
            assert ended.value.code == 130
            assert capfd.readouterr().err == SENTENCE
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupts_are_the_callers_again_after_a_command(monkeypatch):
    monkeypatch.setattr("atexit.register", lambda function: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(error):
        with interrupt.watched():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            raise error

    try:
        for error in (ValueError, SystemExit):
            with pytest.raises(error):
                run(error)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
