"""Which package may import which: only those below it, without circles. The contracts are in pyproject.toml; ``make
lint`` runs them too.
"""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowroutes_fast
from flowroutes_fast.results.elsewhere import HOMES, from_above
from flowroutes_fast.tracing.adapters import FOREIGN

ROOT = Path(__file__).parents[2]
PACKAGE = Path(flowroutes_fast.__file__).parent
LINT = (
    "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports('pyproject.toml', no_cache=True))"
)


def lint(folder):
    """Exit status and words of import-linter on a tree."""
    done = subprocess.run([sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path):
    """The package's Python files, kernels where they are when installed, and its contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    others = shutil.ignore_patterns("__pycache__", "*.so", "*.j2", "*.js", "*.css")
    shutil.copytree(
        PACKAGE, tmp_path / "flowroutes_fast", ignore=lambda *found: others(*found) | ({"kernels"} & set(found[1]))
    )
    shutil.copytree(ROOT / "kernels", tmp_path / "flowroutes_fast/kernels", ignore=others)
    return tmp_path


def test_imports_go_down(tree):
    status, words = lint(tree)
    assert status == 0, words
    assert "Contracts: 3 kept, 0 broken." in words


@pytest.mark.parametrize(
    ("file", "planted", "broken"),
    [
        ("ops/native.py", "from flowroutes_fast.tracing.trace import trace\n", "Packages import downwards BROKEN"),
        (
            "models/tokens.py",
            "def f():\n    from flowroutes_fast.view import text\n",
            "Packages import downwards BROKEN",
        ),
        (
            "kernels/common.py",
            "def f():\n    from flowroutes_fast.ops import bounds\n",
            "Packages import downwards BROKEN",
        ),
        ("results/edges.py", "def f():\n    from flowroutes_fast.results.route import Route\n", "files BROKEN"),
        ("system/files.py", "def f():\n    import flowroutes_fast as fr\n", "for those who use it BROKEN"),
        ("results/flow.py", "def f():\n    from flowroutes_fast import trace\n", "for those who use it BROKEN"),
        ("newcomer/__init__.py", "", "newcomer"),
        (
            "ops/native.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from "
            "flowroutes_fast.results.trace import Trace\n",
            "",
        ),
    ],
)
def test_an_arrow_upwards_fails(tree, file, planted, broken):
    path = tree / "flowroutes_fast" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as source:
        source.write("\n\n" + planted)
    status, words = lint(tree)
    assert (status != 0) == bool(broken), words
    assert broken in words


def test_few_loose_files():
    """Everything else is in a package."""
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "version.py"}


@pytest.mark.parametrize("name", HOMES)
def test_names_from_above(name):
    function = from_above(name)
    assert callable(function)
    assert function.__module__ == f"flowroutes_fast.{HOMES[name]}"


def calls_from_above():
    for path in sorted((PACKAGE / "results").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "from_above":
                yield node.args[0].value, None
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Call)
                and getattr(node.func.func, "id", "") == "from_above"
            ):
                yield node.func.args[0].value, node


def test_names_from_above_are_called_as_they_are_defined():
    used = set()
    for name, call in calls_from_above():
        used.add(name)
        if call is not None:
            given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(from_above(name)).bind_partial(*call.args, **given)
    assert used == set(HOMES)


def test_verify_has_the_parameters_of_what_it_calls():
    method, function = (
        [*inspect.signature(f).parameters.values()][1:] for f in (flowroutes_fast.Route.verify, from_above("verify"))
    )
    assert [(p.name, p.kind, p.default) for p in method] == [(p.name, p.kind, p.default) for p in function]


@pytest.mark.parametrize("adapter", sorted(set(FOREIGN.values())))
def test_adapters_trace(adapter):
    assert callable(importlib.import_module(f"flowroutes_fast.integrations.{adapter}").trace)
