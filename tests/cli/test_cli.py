"""The command line: help, JSON for pipes, exit codes, completion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowroutes_fast.cli import app, main, terminal

COMMANDS = ("trace", "view", "estimate", "corpus", "analyze", "bench", "models", "doctor")
PLAIN = {"NO_COLOR": "1", "COLUMNS": "160"}


@pytest.fixture
def run(demo, monkeypatch):
    """Commands in this process, with the demo model loaded once."""
    monkeypatch.setattr("flowroutes_fast.load", lambda name: demo)

    def go(*arguments, **options):
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, **options)
        assert result.exit_code == 0, result.output
        return result

    return go


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    text = re.sub(r"\x1b\[[0-9;]*m", "", CliRunner().invoke(app, [command, "--help"], env=PLAIN).output)
    shown = re.findall(rf"\$ .*flowroutes {command}.*", text)
    assert shown, text
    for option in {
        word
        for line in shown
        for word in re.findall(r"(?<=\s)--[a-z-]+", line.split(f"flowroutes {command}")[1].split("|")[0])
    }:
        assert text.count(option) >= 2, f"{option} is in an example and in no list of options"


def test_root_help_says_exit_codes_and_defaults_in_brackets_are_shown():
    assert "2 refused" in " ".join(CliRunner().invoke(app, ["--help"], env=PLAIN).output.split())
    assert "[default: -1]" in CliRunner().invoke(app, ["trace", "--help"], env=PLAIN).output


@pytest.mark.demo_model
def test_trace_as_json(run, tmp_path):
    import flowroutes_fast as fr

    result = run("trace", "The capital of France is", "--json", "--out", str(tmp_path))
    found = json.loads(result.stdout)
    assert found["prediction"][0]["token"] == " Paris"
    assert len(found["route"]["edges"]["layer"]) == len(fr.load_route(tmp_path / "route.json").edges) > 0
    assert [Path(p).name for p in found["files"]] == ["route.html", "route.json", "trace.safetensors"]


@pytest.mark.demo_model
def test_other_commands_as_json(run):
    estimated = json.loads(run("estimate", "demo", "--tokens", "64", "--json").stdout)
    assert estimated["total"] > estimated["weights"] > 5e8
    backends = json.loads(run("doctor", "--json").stdout)["backends"]
    assert backends["reference"] == {"available": True, "reason": None}
    families = json.loads(run("models", "--json").stdout)
    assert {"family": "llama"}.items() <= next(row for row in families if row["family"] == "llama").items()


@pytest.mark.demo_model
def test_corpus_as_json(run, tmp_path):
    found = json.loads(
        run("corpus", "-", "--out", str(tmp_path / "run"), "--json", input="A line of text.\nAnother one.\n").stdout
    )
    assert found["rows"] == 2
    assert found["finished"] is True


def test_json_has_no_nan(capsys):
    terminal.print_json({"a": float("nan"), "b": [Path("x"), (1, float("inf"))]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": ["x", [1, None]]}


def test_a_pipe_gets_json_alone_and_no_colours():
    """In a process of its own, as `flowroutes doctor --json | jq` runs it; and `models`, which prints a table."""
    code = "from flowroutes_fast.cli import main; main()"
    environment = {**os.environ, "TERM": "xterm-256color"}

    def piped(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=200
        )

    done = piped("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"versions", "backends"}
    done = piped("trace", "x", "--threshold", "7", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flowroutes: threshold must lie in [0, 1), got 7.0\n"


def test_tables_and_predictions_of_a_pipe_are_plain(run):
    output = run("models").stdout
    assert "\x1b" not in output
    assert "qwen3_next" in output
    assert "…" not in output


def test_unknown_options_exit_with_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flowroutes", "trace", "x", "--no-such-option"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "no-such-option" in capsys.readouterr().err


def test_a_failure_exits_with_1():
    """What is no fault of the input shows its traceback."""
    code = (
        "import sys; from flowroutes_fast import cli, ops; ops.backend_status = lambda: 1 / 0; sys.argv = "
        "['flowroutes', 'doctor']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_completion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub/models--org--name").mkdir(parents=True)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"")
    assert terminal.models("") == ["demo", "org/name", "checkpoint", "hub/", "model.gguf"]
    assert terminal.models("che") == ["checkpoint"]
    assert terminal.models("./mo") == ["./model.gguf"]
    assert terminal.models("nowhere/x") == []
    environment = {
        "_FLOWROUTES_COMPLETE": "complete_bash",
        "COMP_WORDS": "flowroutes trace x --measure s",
        "COMP_CWORD": "4",
    }
    assert CliRunner().invoke(app, [], prog_name="flowroutes", env=environment).output.split() == ["signed"]
    environment |= {"COMP_WORDS": "flowroutes trace x --pre", "COMP_CWORD": "3"}
    assert CliRunner().invoke(app, [], prog_name="flowroutes", env=environment).output.split() == ["--precision"]
