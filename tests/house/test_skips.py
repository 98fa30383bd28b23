"""A skip that is not expected on this machine fails the run, with pytest-xdist too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1]
ONE = """
import pytest
def test_a():
    pytest.skip("no chromium was found")
@pytest.mark.skipif(True, reason="nvcc not found")
def test_b(): pass
@pytest.mark.xfail(reason="known")
def test_c(): assert False
def test_d():
    pytest.importorskip("no_such_module")
def test_e():
    pytest.skip({gpu!r})
"""
WHOLE = 'import pytest\npytest.importorskip("no_such_module")\ndef test_f(): pass\n'


@pytest.mark.parametrize(
    ("options", "strict", "summary"),
    [(("-n", "1"), "1", "2 failed, 1 skipped, 1 xfailed, 2 errors"), (("-p", "no:xdist"), "0", "5 skipped, 1 xfailed")],
    ids=["strict, xdist", "not strict"],
)
def test_unexpected_skips_fail(options, strict, summary, tmp_path):
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nexec(open({str(HERE / 'conftest.py')!r}).read())\n"
    )
    (tmp_path / "test_one.py").write_text(ONE.format(gpu="there is a GPU" if torch.cuda.is_available() else "no GPU"))
    (tmp_path / "test_whole.py").write_text(WHOLE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        tmp_path,
        *options,
        "--continue-on-collection-errors",
        tmp_path,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"CI": "true", "FLOWROUTES_STRICT_SKIPS": strict}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert summary in run.stdout, run.stdout
    assert run.returncode == (strict == "1")
