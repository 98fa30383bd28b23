"""Every example runs as it is (here in one process, with the demo model loaded once)."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.demo_model
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, demo, monkeypatch, tmp_path, capsys):
    import flowroutes_fast as fr

    load = fr.load
    monkeypatch.setattr(fr, "load", lambda name: demo if name == "demo" else load(name))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_there_are_examples():
    assert len(EXAMPLES) >= 7
