"""Set-up: compiler options that make figures wrong are refused, and a source distribution holds what building and testing take."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"FLOWROUTES_CUDA": "0"} | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "given", [{"CFLAGS": "-O2 -ffast-math"}, {"CXXFLAGS": "-Ofast"}, {"LDFLAGS": "-ffast-math"}, {"CXX": "g++ -fno-signed-zeros"}]
)
def test_options_that_change_figures_are_refused(given, tmp_path):
    said = setup("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp", **given)
    assert "the native extension was not built" in said
    assert f"{next(iter(given))} holds -" in said
    assert not [*tmp_path.rglob("*.so")]


def test_without_a_compiler_the_package_installs(tmp_path):
    said = setup("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp", CC="/no/such/cc", CXX="/no/such/c++")
    assert "the native extension was not built" in said
    assert "'reference' backend" in said


@pytest.mark.parametrize("option", ["-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-fno-signed-zeros"])
def test_kernels_do_not_compile_with_them(option):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA headers or g++ not found")
    command = [compiler, "-std=c++17", "-fsyntax-only", option, "-DFLOWROUTES_ISA=baseline", ROOT / "csrc/proximity_cpu.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "flowroutes_fast needs IEEE arithmetic" in done.stderr


def test_a_source_distribution_holds_sources_and_tests(tmp_path):
    setup("-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("csrc", "kernels", "tests", "docs", "examples", "flowroutes_fast")
    wanted = {
        str(p.relative_to(ROOT))
        for folder in folders
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
        and "__pycache__" not in p.parts
        and p.suffix not in (".so", ".pyc")
        and (ROOT / "flowroutes_fast/kernels") not in p.parents
    }
    assert wanted - held == set()
    assert {"Makefile", "constraints.txt", "pyproject.toml", "setup.py", "mkdocs.yml", "README.md"} <= held
