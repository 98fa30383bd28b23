"""The benchmark refuses wrong kernels, and writes what it measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flowroutes_fast.bench import rivals, run
from flowroutes_fast.bench.layers import SHAPES, Shape, random_case
from flowroutes_fast.cli import app
from flowroutes_fast.ops import certified as certify

ROOT = Path(__file__).parents[2]


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
    arguments = [
        "bench",
        "--tokens",
        "16,32",
        "--shapes",
        "small",
        "--what",
        "kernels",
        "--quick",
        "--out",
        str(tmp_path),
    ]
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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_gpu_acceptance_script_runs(tmp_path):
    """Every step that needs no GPU's own tools, on tiny shapes: a lent GPU must not be spent on a misspelt name."""
    for what, steps in (("right", "layers,traces"), ("fast", "timing,model")):
        command = [
            sys.executable,
            str(ROOT / "benchmarks/gpu_acceptance.py"),
            what,
            "--dry",
            "--steps",
            steps,
            "--out",
            str(tmp_path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found.keys() == {"layers", "traces", "timing", "model"}
    for name, report in found.items():
        assert not report.get("failed"), (name, report)
    assert found["layers"]["tiny, random, bfloat16, triton"]["missing"] == 0
    assert found["timing"]["tiny, 40"]["counts"]["evaluated"] > 0
