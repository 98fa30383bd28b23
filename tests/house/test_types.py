"""What type checkers are told that the public functions return."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]
CODE = """
import flowroutes_fast as fr
from torch import nn

def use(model: nn.Module, ids: list[int], flag: bool, anything: object) -> None:
    reveal_type(fr.trace(model, None, "text"))
    reveal_type(fr.trace(model, None, ids, positions=[-1], threads=2))
    reveal_type(fr.trace(model, None, [{"role": "user", "content": "text"}]))
    reveal_type(fr.trace(model, None, ["a", "b"]))
    reveal_type(fr.trace(model, None, [ids, ids], lazy=False))
    reveal_type(fr.trace(model, None, "text", lazy=True, memory="1GiB"))
    reveal_type(fr.trace(model, None, ["a", "b"], lazy=True))
    reveal_type(fr.trace(model, None, "text", lazy=flag))
    reveal_type(fr.trace(model, None, anything))
    reveal_type(fr.route(model, None, "text", threshold=0.02))
    reveal_type(fr.route(model, None, ["a", "b"], position=3))
    fr.trace(model, None, "text", tresholds=(0.1,))
    fr.trace(model, None, "text", floor="low")
    fr.route(model, None, "text", lazy=True)
"""
ONE, LAZY, ROUTE = "Trace", "LazyTrace", "Route"
RETURNED = [ONE, ONE, ONE, f"list[{ONE}]", f"list[{ONE}]", LAZY, f"list[{LAZY}]", "Any", "Any", ROUTE, f"list[{ROUTE}]"]
REFUSED = {
    'trace(model, None, "text", tresholds=(0.1,))',
    'trace(model, None, "text", floor="low")',
    'route(model, None, "text", lazy=True)',
}


def test_one_text_gives_one_result_and_several_a_list(tmp_path):
    (tmp_path / "use.py").write_text(CODE)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            "pyproject.toml",
            "--no-error-summary",
            str(tmp_path / "use.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not done.stderr
    lines = done.stdout.splitlines()
    revealed = [line.split('"')[1] for line in lines if "Revealed type" in line]
    short = [name.replace("builtins.", "") for name in revealed]
    for path in ("flowroutes_fast.results.trace.", "flowroutes_fast.results.lazy.", "flowroutes_fast.results.route."):
        short = [name.replace(path, "") for name in short]
    assert short == RETURNED
    errors = [line for line in lines if " error: " in line]
    assert {CODE.splitlines()[int(line.split(":")[1]) - 1].split("fr.")[1] for line in errors} == REFUSED
