"""One path per operation: the same stem from Python to the kernels, the tests and the benchmark, as CONTRIBUTING says.

``python tests/house/test_operations.py`` writes the table there again.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch

from flowroutes_fast.bench.layers import SHAPES, Shape, random_case
from flowroutes_fast.bench.operations import OPERATIONS, error

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- operations: begin -->\n", "<!-- operations: end -->\n"
PLACES = {  # column: where the files of an operation lie
    "Python": "flowroutes_fast/ops/{}.py",
    "CPU": "csrc/{}_cpu.cpp",
    "CUDA": "csrc/{}_cuda.h",
    "Triton": "kernels/{}.py",
    "tests": "tests/ops/test_{}.py",
}
# what has no kernel of its own there, and what serves instead
ELSEWHERE = {
    ("attention", "CPU"): "`rows.h`, `dense`",
    ("attention", "CUDA"): "`dense`",
    ("bound", "CUDA"): "Triton",
    ("components", "CUDA"): "`parts`",
    ("components", "Triton"): "`parts`",
    ("certified", "CUDA"): "`bound`, `pairs`",
    ("certified", "Triton"): "`bound`, `pairs`, `gradient.py`, `decide.py`",
    ("rank1", "CUDA"): "PyTorch",
    ("rank1", "Triton"): "PyTorch",
}


def table() -> str:
    """The table of operations, from the files that are there."""
    lines = ["| operation | " + " | ".join(PLACES) + " |\n", "|---" * (1 + len(PLACES)) + "|\n"]
    for name in OPERATIONS:
        cells = []
        for column, place in PLACES.items():
            path = place.format(name)
            there = (ROOT / path).is_file()
            assert there != ((name, column) in ELSEWHERE), f"{path}: {'there' if there else 'missing'}"
            cells.append(f"`{path.removeprefix('flowroutes_fast/')}`" if there else ELSEWHERE[name, column])
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def test_the_table_of_operations_is_that_of_the_files():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table()


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_benchmark_entry_runs_its_operation_and_knows_its_error(name, monkeypatch):
    monkeypatch.setitem(SHAPES, "small", Shape(4, 2, 16, 48))
    case = random_case("small", 40, "cpu", torch.float32)
    assert error(name, case, "cpu") < 1e-5
    call = OPERATIONS[name](case, "cpu")
    assert call is not None
    assert f"ops/{name}.py" in inspect.getsourcefile(_module(name)).replace("\\", "/")


def _module(name: str):
    import importlib

    return importlib.import_module(f"flowroutes_fast.ops.{name}")


def test_bindings_carry_the_stems():
    source = (ROOT / "csrc/bindings.cpp").read_text(encoding="utf-8")
    bound = set(re.findall(r'm\.def\(\s*"(\w+)",\s*\[\]\(const py::dict', source))
    assert bound == (set(OPERATIONS) - {"attention"}) | {"few_rows", "conservation"}
    cuda = set(re.findall(r'm\.def\("cuda_(\w+)", \[\]', (ROOT / "csrc/bindings_cuda.h").read_text(encoding="utf-8")))
    assert cuda == {"pairs", "dense", "parts"}


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
