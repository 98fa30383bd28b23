"""Set-up: compiler options that make figures wrong are refused, a source distribution holds what building and testing
take, and files of tests are where they are looked for.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"FLOWROUTES_CUDA": "0"} | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "given",
    [
        {"CFLAGS": "-O2 -ffast-math"},
        {"CXXFLAGS": "-Ofast"},
        {"LDFLAGS": "-ffast-math"},
        {"CXX": "g++ -fno-signed-zeros"},
    ],
)
def test_options_that_change_figures_are_refused(given, tmp_path):
    said = setup("build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp", **given)
    assert "the native extension was not built" in said
    assert f"{next(iter(given))} holds -" in said
    assert not [*tmp_path.rglob("*.so")]


def test_without_a_compiler_the_package_installs(tmp_path):
    said = setup(
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "temp",
        CC="/no/such/cc",
        CXX="/no/such/c++",
    )
    assert "the native extension was not built" in said
    assert "'reference' backend" in said


@pytest.mark.parametrize(
    "option", ["-ffast-math", "-funsafe-math-optimizations", "-ffinite-math-only", "-fno-signed-zeros"]
)
def test_kernels_do_not_compile_with_them(option):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA headers or g++ not found")
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        option,
        "-DFLOWROUTES_ISA=baseline",
        ROOT / "csrc/kernels_cpu.cpp",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert "flowroutes_fast needs IEEE arithmetic" in done.stderr


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The files of a source distribution of this tree, as paths from its root."""
    place = tmp_path_factory.mktemp("sdist")
    setup("-q", "egg_info", "-e", place, "sdist", "-d", place)
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        return {file.name.split("/", 1)[1] for file in archive if file.isfile()}


def test_a_source_distribution_holds_sources_and_tests(held):
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


NAMING = ("Makefile", "CONTRIBUTING.md", "benchmarks/*.py", "docs/**/*.md", "tests/**/*.py", ".ci/run")


@pytest.mark.parametrize("pattern", NAMING)
def test_files_of_tests_that_are_named_are_there(pattern):
    """Where a file of tests moves, what runs it or sends a reader to it goes with it."""
    texts = {path: path.read_text(encoding="utf-8") for path in ROOT.glob(pattern)}
    assert texts
    named = [(str(path), name) for path, text in texts.items() for name in re.findall(r"\btests/[\w/-]+\.\w+", text)]
    assert [found for found in named if not (ROOT / found[1]).exists()] == []


LEFT_OUT = {".gitignore"}  # of a source distribution, on purpose
GENERATED = {"PKG-INFO", "setup.cfg"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_source_distribution_holds_what_git_knows_and_nothing_ignored(held):
    def listed(*options):
        done = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
        return {name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()}

    assert listed() - held == LEFT_OUT
    assert held - listed("--cached", "--others", "--exclude-standard") == GENERATED


COMPILER = """#!{python}
import sys
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
open(sys.argv[sys.argv.index("-o") + 1], "w").close()
"""
ON_MACHINE = (
    "import platform, runpy, sys; platform.machine = lambda: {machine!r}; sys.argv = {argv!r}; "
    "runpy.run_path('setup.py')"
)


@pytest.mark.parametrize(("machine", "sets"), [("aarch64", {"baseline"}), ("x86_64", {"baseline", "avx2", "avx512"})])
def test_instruction_sets_are_those_of_the_machine(machine, sets, tmp_path):
    """A compiler that only writes down what it is asked: no option of another processor, no kernels that are asked
    for and not built.
    """
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    compiler.chmod(0o755)
    argv = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    environment = os.environ | {"FLOWROUTES_CUDA": "0", "CFLAGS": "", "CXXFLAGS": ""}
    environment |= dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(compiler))
    command = [sys.executable, "-c", ON_MACHINE.format(machine=machine, argv=argv)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [*(tmp_path / "lib").rglob("*.so")], done.stderr
    asked = log.read_text().split()
    assert {option.partition("=")[2] for option in asked if option.startswith("-DFLOWROUTES_ISA=")} == sets
    assert {f"-DFLOWROUTES_{name.upper()}" for name in sets} == {
        o for o in asked if o.startswith("-DFLOWROUTES_") and "=" not in o
    }
    assert any(option.startswith("-mavx") for option in asked) == (machine == "x86_64")
