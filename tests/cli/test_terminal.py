"""What a terminal is given: no character of a model's name, a path or an error acts on it; hints name options of
the command.
"""

import io
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
from families import make
from rich.console import Console
from typer.testing import CliRunner

import flowroutes_fast as fr
from flowroutes_fast import cli
from flowroutes_fast.cli import terminal
from flowroutes_fast.system.escape import json_text, printable

HOSTILE = "a\x1b[31m\x1b]8;;http://x\x07[bold]red[/bold]\x9b2J\u202eb\nc\x08d:smile:\u2028\x7f\udcff"
SHOWN = "a\\x1b[31m\\x1b]8;;http://x\\x07[bold]red[/bold]\\x9b2J\\u202eb↵c\\x08d:smile:\\u2028\\x7f\\udcff"
ACTING = "\x1b\x07\x9b\u202e\x08\u2028\x7f\udcff"


def harmless(text):
    return not set(text) & set(ACTING)


def test_printable():
    assert printable(HOSTILE) == SHOWN
    assert printable("plain text, naïve, 日本語, 👩‍👩‍👧 हिन्दी") == "plain text, naïve, 日本語, 👩‍👩‍👧 हिन्दी"
    assert printable(3.5) == "3.5"


def test_json_says_the_same():
    text = json_text(json.dumps({HOSTILE: "\U000e0001é"}, ensure_ascii=False))
    assert harmless(text)
    assert json.loads(text) == {HOSTILE: "\U000e0001é"}


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["flowroutes", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


@pytest.fixture
def hostile_model(monkeypatch):
    class Tokenizer:
        """A token per letter."""

        is_fast = True

        def __call__(self, text, **_):
            return {
                "input_ids": [3 + ord(c) % 90 for c in text],
                "offset_mapping": [(i, i + 1) for i in range(len(text))],
            }

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    model = make("llama")
    model.config._name_or_path = HOSTILE.replace("\udcff", "")
    monkeypatch.setattr("flowroutes_fast.load", lambda name: (model, Tokenizer()))
    return model


def test_a_models_name_in_the_commands(hostile_model, monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "trace", "Hello", "--model", "x", "--out", tmp_path / "out[bold]\x1b[31m")
    assert code == 0
    assert harmless(out)
    assert "a\\x1b[31m" in out
    assert "[bold]\\x1b[31m/route.html" in out
    lines = tmp_path / "lines.txt"
    lines.write_text("One text.\nAnother one.\n")
    code, out, error = run(
        monkeypatch, capsys, "corpus", lines, "--model", "x", "--out", tmp_path / "run", "--split", "line"
    )
    assert (code, harmless(out)) == (0, True), error
    code, out, _ = run(monkeypatch, capsys, "trace", "Hello", "--model", "x", "--json")
    assert (code, harmless(out)) == (0, True)
    assert json.loads(out)["model"] == hostile_model.config._name_or_path


def test_a_models_name_in_python(hostile_model):
    trace = fr.trace(hostile_model, None, [3, 4, 5])
    assert harmless(repr(trace) + repr(trace.route()) + trace.route().to_text())


@pytest.mark.parametrize(
    "words", [("trace", "x", "--model"), ("view", "--model"), ("estimate",), ("analyze", "--out", "o")]
)
def test_names_and_paths_in_errors(monkeypatch, capsys, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    more = ("--tokens", "3") if words[0] == "estimate" else ("x.safetensors",) if words[0] == "view" else ()
    code, out, error = run(monkeypatch, capsys, *words, f"./{HOSTILE}", *more)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert harmless(error)


def test_a_family_that_is_not_known(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    for words in (("estimate", tmp_path, "--tokens", "3"), ("trace", "x", "--model", tmp_path)):
        code, _, error = run(monkeypatch, capsys, *words)
        assert code == 2
        assert harmless(error), error


def test_spinners_and_tables_take_text_as_it_is(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=200, markup=False, emoji=False)
    monkeypatch.setattr(terminal, "console", lambda **_: shown)
    with terminal.busy(f"loading {HOSTILE}"):
        pass
    assert "[bold]red[/bold]" in shown.file.getvalue()
    assert "\x9b" not in shown.file.getvalue()


def test_logs_and_warnings_of_other_libraries(capsys):
    with terminal.readable_messages():
        record = logging.getLogger("of a library").makeRecord(
            "x", logging.WARNING, "f", 1, "model %s\nis new", (HOSTILE,), None
        )
        # it ends a line
        assert warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "f", 1).isprintable() is False
        assert harmless(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "f", 1))
    assert harmless(logging.getLogRecordFactory()("x", 30, "f", 1, "m", (), None).getMessage())
    assert record.getMessage().count("\n") == 2


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("trace again with floor=0.0005", "trace again with --floor 0.0005"),
        ("trace again with thresholds=[0.02], or", "trace again with --threshold 0.02, or"),
        ("trace again with precision='exact', dense=True", "trace again with --precision exact"),
        (
            "ways out: fewer tokens, precision='certified', dense=False, neurons=False, positions=[...]",
            "ways out: fewer tokens, --precision certified",
        ),
        ("rule='flow' has no renormalize=False: flow", "--rule flow has no --no-renormalize: flow"),
        ("rule='flow' needs keep= (the share)", "--rule flow needs --keep (the share)"),
        ("no folder at 'a/rule=x'", "no folder at 'a/rule=x'"),
        ("seed=3 is what it is", "seed=3 is what it is"),
    ],
)
def test_hints_are_options(said, wanted):
    options = [flag for p in cli._commands()["trace"].params for flag in (*p.opts, *p.secondary_opts)]
    assert terminal.in_options(said, options) == wanted
    assert terminal.in_options("again with floor=0.1", [], options) == "again with flowroutes trace --floor 0.1"


def test_low_thresholds_and_floors(hostile_model, monkeypatch, capsys, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("One text.\n")
    for words in (("trace", "Hello"), ("corpus", lines, "--out", tmp_path / "run")):
        assert run(monkeypatch, capsys, *words, "--threshold", "0.0004")[0] == 0
        code, _, error = run(monkeypatch, capsys, *words, "--threshold", "0.01", "--floor", "0.02")
        assert (code, "--threshold 0.01 is below --floor 0.02" in error) == (2, True)
        code, _, error = run(monkeypatch, capsys, *words, "--threshold", "0")
        assert (code, "--precision exact" in error) == (2, True)
    assert run(monkeypatch, capsys, "trace", "Hello", "--threshold", "0", "--precision", "exact")[0] == 0
    assert (
        run(monkeypatch, capsys, "trace", "Hello", "--floor", "0.0001", "--rule", "flow", "--threshold", "0.00001")[0]
        == 0
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 2),
        (MemoryError(), 2),
        (OSError(), 2),
        (ImportError(), 2),
        (FileNotFoundError(2, "no such file", "x"), 2),
        (KeyError("x"), 1),
        (RuntimeError("backend 'cuda' is missing"), 2),
        (RuntimeError("?"), 1),
        (AssertionError(), 1),
        (RecursionError(), 1),
    ],
)
def test_every_error_is_one_sentence(error, code, monkeypatch, capsys):
    def fails(name):
        raise error

    monkeypatch.setattr("flowroutes_fast.load", fails)
    found, out, said = run(monkeypatch, capsys, "trace", "Hello")
    assert (found, out, said.count("\n")) == (code, "", 1), said
    assert str(error) in said
    assert type(error).__name__ in said or str(error)
    assert "Traceback" not in said
    monkeypatch.setenv(terminal.DEBUG, "1")
    found, _, said = run(monkeypatch, capsys, "trace", "Hello")
    assert (found, "Traceback" in said) == (code, True)


def test_a_line_break_is_a_prompt(hostile_model, monkeypatch, capsys):
    code, _, error = run(monkeypatch, capsys, "trace", "")
    assert (code, "empty" in error) == (2, True)
    given = []
    monkeypatch.setattr("flowroutes_fast.trace", lambda model, tokenizer, text, **options: given.append(text))
    run(monkeypatch, capsys, "trace", "\n")
    assert given == ["\n"]


SHELL = "import sys; from flowroutes_fast.cli import main; main()"


@pytest.mark.parametrize("redirect", ["| true", ">&-", "2>&-", ">&- 2>&-"])
def test_a_reader_that_is_gone(redirect, tmp_path):
    """Quiet: no traceback, and nothing that the interpreter says at its end."""
    command = f"exec {sys.executable} -W ignore -c '{SHELL}' --help {redirect}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command.removeprefix('exec ') if '|' in redirect else command}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_a_full_disk_and_a_narrow_encoding():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -W ignore -c '{SHELL}' --version > /dev/full"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        2,
        "flowroutes: cannot write to standard output: No space left on device\n",
    )
    code = (
        "from flowroutes_fast.cli.terminal import open_streams, print_json, say; open_streams(); say('é 日'); "
        "print_json({'日': 1})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    assert done.stdout == b'\xe9 \\u65e5\n{"\\u65e5": 1}\n', done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize(("megabytes", "command"), [(100, "models"), (600, "trace Hello"), (1100, "doctor")])
def test_a_small_address_space(megabytes, command):
    """One sentence, where importing PyTorch or transformers ends in tracebacks or a signal."""
    line = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -c '{SHELL}' {command}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("flowroutes: the address space is limited to "), done.stderr


def test_errors_that_come_of_too_little_memory(monkeypatch, capsys):
    def fails(error, cause=None):
        def load(name):
            raise error from cause

        monkeypatch.setattr("flowroutes_fast.load", load)
        return run(monkeypatch, capsys, "trace", "Hello")

    for error in (SystemError("no exception set"), ImportError("x.so: failed to map segment from shared object")):
        code, _, said = fails(error, MemoryError())
        assert (code, said) == (2, f"flowroutes: out of memory: {error}\n")
    monkeypatch.setattr(cli, "_commands", lambda: (_ for _ in ()).throw(MemoryError()))
    code, _, said = fails(ValueError("it is wrong"))
    assert (code, said) == (2, "flowroutes: it is wrong\n")


def test_options_that_do_not_exist_are_refused():
    assert CliRunner().invoke(cli.app, ["trace", "x", "--dense"]).exit_code == 2


def test_a_models_name_in_pages(hostile_model, tmp_path):
    hostile_model.config._name_or_path = f"</title><script>alert(1)</script>{HOSTILE}".replace("\udcff", "")
    trace = fr.trace(hostile_model, None, [3, 4, 5])
    for page in (trace.to_html(tmp_path / "trace.html"), trace.route().to_html(tmp_path / "route.html")):
        text = page.read_text(encoding="utf-8")
        assert harmless(text)
        assert "<script>alert" not in text
