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
heavy = {"torch", "numpy", "pandas", "networkx", "triton", "transformers", "matplotlib", "flowroutes_fast._native"}
assert not (loaded := sys.modules.keys() & heavy), loaded
assert set(fr.__all__) <= set(dir(fr))
assert not hasattr(fr, "nothing_of_this_name")
_ = fr.trace, fr.load, fr.Trace, fr.Route, fr.ops
assert not (loaded := sys.modules.keys() & (heavy - {"torch", "numpy"})), loaded
import flowroutes_fast.{first}
from flowroutes_fast.tracing.trace import check_weights
from flowroutes_fast import trace, load, estimate, corpus, contrast, patching
for name in ("trace", "load", "estimate", "corpus", "contrast", "patching"):
    assert callable(getattr(fr, name)) and getattr(fr, name) is globals()[name], name
assert "trace" in fr.trace.__module__
"""


@pytest.mark.parametrize("first", ["tracing.trace", "corpora.run", "view.details"])
def test_importing_is_light_and_functions_stay_functions(first):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE.replace("{first}", first)],
        capture_output=True,
        text=True,
        timeout=100,
    )
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


OTHER_PATHS = """
import sys
from flowroutes_fast import ablation, faithfulness, reference, streaming, templates
import flowroutes_fast.certify
from flowroutes_fast.bounds import Attention
from flowroutes_fast.errors import DamagedFile
from flowroutes_fast.record import Trace
from flowroutes_fast.routes import Route
import flowroutes_fast as fr
assert (Trace, Route, DamagedFile) == (fr.Trace, fr.Route, fr.DamagedFile)
from flowroutes_fast.experiments import faithfulness as module
assert faithfulness is module is sys.modules["flowroutes_fast.faithfulness"] is fr.faithfulness
assert module.__name__ == module.__spec__.name == "flowroutes_fast.experiments.faithfulness"
from flowroutes_fast.ops import bounds, certified
assert Attention is bounds.Attention and fr.certify is certified
try:
    import flowroutes_fast.nothing
except ModuleNotFoundError as error:
    assert error.name == "flowroutes_fast.nothing"
"""


def test_modules_have_the_paths_that_were_documented():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER_PATHS], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    for old in fr._MODULES:
        assert importlib.import_module(old) is importlib.import_module(fr._MODULES[old])


def test_the_type_checkers_names_are_those_of_the_package():
    text = Path(fr.__file__).read_text(encoding="utf-8")
    block = text.split("if TYPE_CHECKING:")[1].split("__all__")[0]
    declared = {
        name.strip()
        for line in block.splitlines()
        if " import " in line
        for name in line.split(" import ")[1].split(",")
    }
    modules = {name for name in declared if " as " in name}  # not in __all__, so that * does not import them
    assert {f"flowroutes_fast.{name.split(' as ')[0]}" for name in modules} <= set(fr._MODULES)
    assert declared - modules | {"__version__"} == set(fr.__all__)
