"""Options are named, given a default and checked in one place, and reach whoever evaluates."""

import inspect
from dataclasses import dataclass, fields
from typing import get_type_hints

import pytest
import torch
import typer
from families import make

import flowroutes_fast as fr
from flowroutes_fast import cli
from flowroutes_fast.tracing import options, trace
from flowroutes_fast.tracing.typed import TraceOptions

IDS = [3, 9, 4, 7, 5, 8, 6]


@pytest.fixture
def dummy(monkeypatch):
    """The options with one more field: the only place that is changed. What of it reaches an evaluation."""

    @dataclass(frozen=True)
    class More(options.Options):
        dummy: int = 0

    monkeypatch.setattr(options, "Options", More)
    seen, right = [], trace.importances

    def importances(layer, chosen, *rest):
        seen.append(chosen.dummy)
        return right(layer, chosen, *rest)

    for home in ("trace", "on_demand"):
        monkeypatch.setattr(f"flowroutes_fast.tracing.{home}.importances", importances)
    monkeypatch.setattr("flowroutes_fast.tracing.on_demand.prepared", lambda *_: None)
    return seen


def test_a_new_option_reaches_every_evaluation(dummy, tmp_path):
    model = make("llama")
    fr.trace(model, None, IDS, dummy=1)
    fr.trace(model, None, IDS, lazy=True, dummy=2).evaluate(0, [3])
    fr.route(model, None, IDS, dummy=3)
    list(fr.generate(model, None, IDS, 2, dummy=4))
    assert set(dummy) == {1, 2, 3, 4}
    fr.estimate(model, 8, dummy=5)
    fr.trace(model, None, IDS, resume=tmp_path / "run", dummy=6)
    fr.trace(model, None, IDS, resume=tmp_path / "run", dummy=6)
    with pytest.raises(ValueError, match=r"other options|another run|options"):
        fr.trace(model, None, IDS, resume=tmp_path / "run", dummy=7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dumy': did you mean 'dummy'"):
        fr.trace(model, None, IDS, dumy=1)


def test_type_checkers_and_help_see_the_options():
    assert get_type_hints(options.EvaluationOptions).keys() == {f.name for f in fields(fr.Options)}
    assert get_type_hints(TraceOptions).keys() == inspect.signature(fr.trace).parameters.keys() - {
        "model",
        "tokenizer",
        "text",
        "lazy",
    }
    shown = inspect.signature(fr.trace).parameters
    assert {name: shown[name].default for name in options.names()} == options.defaults()
    assert all(f"        {name}: " in fr.Options.__doc__ for name in options.names())


@pytest.mark.parametrize("function", [fr.trace, fr.estimate])
@pytest.mark.parametrize(
    ("wrong", "near"), [("treshold", "thresholds"), ("precison", "precision"), ("memry", "memory"), ("zzz", None)]
)
def test_a_misspelled_option_is_named_with_the_nearest(function, wrong, near):
    if function is fr.estimate and near == "thresholds":
        near = None
    what = (make("llama"), 8) if function is fr.estimate else (make("llama"), None, IDS)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'") as told:
        function(*what, **{wrong: 1})
    assert (f"did you mean {near!r}" in str(told.value)) if near else ("did you mean" not in str(told.value))


def test_the_command_line_has_the_same_names_and_defaults():
    found, expected = {}, options.defaults()
    for command in typer.main.get_command(cli.app).commands.values():
        for parameter in command.params:
            if parameter.name in expected and command.name in ("trace", "estimate"):
                found.setdefault(parameter.name, set()).add(parameter.default)
    assert {"precision", "measure", "backend", "floor"} <= found.keys()
    for name, given in found.items():
        assert given <= {expected[name], None}, name


def test_an_option_that_makes_no_sense_is_refused_everywhere():
    model = make("llama")
    for change in ({"precision": "nearly"}, {"measure": "x"}, {"bias": "no"}, {"floor": 1.0}, {"tolerance": -1}):
        told = set()
        for call in (lambda c: fr.trace(model, None, IDS, **c), lambda c: fr.trace(model, None, IDS, lazy=True, **c)):
            with pytest.raises(ValueError) as error:
                call(change)
            told.add(str(error.value))
        assert len(told) == 1
    assert fr.Options().on(torch.device("cpu")).backend in ("cpu", "reference")
