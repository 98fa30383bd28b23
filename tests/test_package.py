"""The package itself: a light import, and public names that no submodule of the same name takes."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import flowroutes_fast as fr

CODE = """
import sys
from pathlib import Path
import flowroutes_fast as fr
assert "torch" not in sys.modules
assert set(fr.__all__) <= set(dir(fr))
assert not hasattr(fr, "nothing_of_this_name")
import flowroutes_fast.{first}
from flowroutes_fast.tracing.trace import check_weights
from flowroutes_fast import trace, load, estimate, corpus, contrast, patching
for name in ("trace", "load", "estimate", "corpus", "contrast", "patching"):
    assert callable(getattr(fr, name)) and getattr(fr, name) is globals()[name], name
assert "trace" in fr.trace.__module__
"""


@pytest.mark.parametrize("first", ["trace", "corpus.run", "view.details"])
def test_importing_is_light_and_functions_stay_functions(first):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE.format(first=first)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_names(monkeypatch):
    for name in fr.__all__:
        assert getattr(fr, name) is not None
    assert importlib.import_module("flowroutes_fast.tracing.trace").trace is fr.trace
    assert pickle.loads(pickle.dumps(fr.trace)) is fr.trace
    with monkeypatch.context() as patch:
        patch.setattr("flowroutes_fast.load", lambda name: 3)
        assert fr.load("x") == 3
    assert fr.load is importlib.import_module("flowroutes_fast.loading.load").load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fr.nothing


def test_the_type_checkers_names_are_those_of_the_package():
    text = Path(fr.__file__).read_text(encoding="utf-8")
    block = text.split("if TYPE_CHECKING:")[1].split("__all__")[0]
    declared = {name.strip() for line in block.splitlines() if " import " in line for name in line.split(" import ")[1].split(",")}
    assert declared | {"__version__"} == set(fr.__all__)
