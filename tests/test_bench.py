"""The benchmark refuses wrong kernels, and writes what it measured."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flowroutes_fast.bench import rivals, run
from flowroutes_fast.bench.layers import SHAPES, Shape, random_case
from flowroutes_fast.cli import app
from flowroutes_fast.ops import certified as certify


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", Shape(4, 2, 16, 48))
    return random_case("small", 40, "cpu", torch.float32)


def test_rivals_agree(small):
    a = small.attention
    wanted = rivals.materialised(a)
    for name in ("chunked", "chunked by head"):
        torch.testing.assert_close(rivals.RIVALS[name](a), wanted, rtol=1e-3, atol=1e-3)


def test_gate_passes_and_refuses(small, monkeypatch):
    assert run.gate(small, "cpu") < 1e-5
    right = certify._fused

    def wrong(*args):
        found = right(*args)
        found.low *= 1.01
        found.high *= 1.01
        return found

    monkeypatch.setattr(certify, "_fused", wrong)
    with pytest.raises(run.GateError, match="no speed is reported"):
        run.gate(small, "cpu")


def test_command(small, tmp_path):
    arguments = ["bench", "--tokens", "16,32", "--shapes", "small", "--what", "kernels", "--quick", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {row["tokens"] for row in report["kernels"]} == {16, 32}
    assert all(row["certified"]["seconds"] > 0 and row["gate"] < 1e-5 for row in report["kernels"])
    assert report["conditions"]["threads"] == torch.get_num_threads()
    assert list(tmp_path.glob("*-kernels.png"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--shapes", "gpt-9", "unknown shape"), ("--what", "fun", "unknown part"), ("--tokens", "x", "whole numbers")],
)
def test_unknown_names(option, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["bench", option, value, "--out", str(tmp_path)], catch_exceptions=False)
