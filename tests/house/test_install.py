"""Installed for real: a source distribution and a wheel, each in an empty environment, traced with; and what the
wheel holds and links to.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from conftest import tiny

pytest.importorskip("build")
ROOT = Path(__file__).parents[2]
PROMPT = "1 2 3 4 5 6 7"
SLOWER = '#!/bin/sh\nexec {} "$@" -O0\n'  # not optimised: it is built once, for seven tokens


def run(*command, **environment):
    """Its output, once it has ended well. Nothing of this checkout and nothing from the network."""
    unset = ("PYTHONPATH", "FLOWROUTES_CUDA")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    offline = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "FLOWROUTES_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd="/", env=kept | offline | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel) as `python -m build` makes them, from an unpacked source distribution: no git,
    nothing built before.
    """
    place = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", place, "sdist", "-d", place], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    compiler = place / "c++"
    compiler.write_text(SLOWER.format(os.environ.get("CXX", "gcc")))  # a driver of C, as libraries put into CXX
    compiler.chmod(0o755)
    source = next(path for path in place.iterdir() if path.is_dir() and (path / "setup.py").exists())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", source, CXX=str(compiler))
    return next((place / "dist").glob("*.tar.gz")), next((place / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tiny("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(101)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


def installed(folder, package, **environment):
    """The scripts of a new environment with this package alone; what it needs comes from the packages of this
    interpreter.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (purelib / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed")
    run(*pip, "--no-build-isolation", package, **environment)
    where = run(python, "-c", "import flowroutes_fast; print(flowroutes_fast.__file__)")
    assert Path(where.strip()).is_relative_to(folder)
    return folder / "bin"


def edges(out):
    """The route's importances by (layer, kind, source, target, head)."""
    *place, importance = json.loads((out / "route.json").read_text())["edges"].values()
    return dict(zip(zip(*place, strict=True), importance, strict=True))


def test_a_wheel_and_a_source_distribution_trace(built, model, tmp_path):
    """The wheel with its native kernels; the source distribution, which the wheel was built from, where there is no
    compiler.
    """
    source, wheel = built
    missing = {"CC": "/no/such/cc", "CXX": "/no/such/c++"}
    routes = []
    for name, package, environment, backend in (("wheel", wheel, {}, "cpu"), ("sdist", source, missing, "reference")):
        scripts = installed(tmp_path / name, package, **environment)
        out = tmp_path / name / "out"
        said = run(scripts / "flowroutes", "trace", PROMPT, "--model", model, "--threshold", "0.02", "--out", out)
        assert f"backend {backend}" in said, said
        assert {path.name for path in out.iterdir()} == {"route.html", "route.json", "trace.safetensors"}
        routes.append(edges(out))
    assert len(routes[0]) > 10
    assert routes[0] == pytest.approx(routes[1], abs=1e-4)


def test_what_a_wheel_holds(built):
    source, wheel = built
    folders = {"flowroutes_fast/": "flowroutes_fast/", "kernels/": "flowroutes_fast/kernels/"}
    with tarfile.open(source) as archive:
        names = [file.name.split("/", 1)[1] for file in archive if file.isfile()]
    wanted = {
        to + name.removeprefix(start) for name in names for start, to in folders.items() if name.startswith(start)
    }
    held = set(zipfile.ZipFile(wheel).namelist())
    native = {name for name in held if name.endswith(".so")}
    assert {name.split(".")[0] for name in native} == {"flowroutes_fast/_native"}
    assert {name for name in held - native if ".dist-info/" not in name} == wanted
    assert {
        "flowroutes_fast/kernels/pairs.py",
        "flowroutes_fast/view/route.html.j2",
        "flowroutes_fast/py.typed",
    } <= wanted


@pytest.mark.skipif(sys.platform != "linux", reason="wheels of Linux are audited")
def test_a_wheel_links_to_what_every_linux_has_and_to_no_torch(built):
    """So it serves every torch of its Python, and `auditwheel repair`, which adds libgomp, makes a manylinux wheel
    of it.
    """
    pytest.importorskip("auditwheel")
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(built[1]) as archive:
        extension = ELFFile(BytesIO(archive.read(next(name for name in archive.namelist() if name.endswith(".so")))))
    linked = {tag.needed for tag in extension.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    usual = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libgomp.so.1"}
    assert {name for name in linked if not name.startswith("ld-linux")} <= usual
    said = run(sys.executable, "-m", "auditwheel", "show", built[1])
    assert re.search(rf'constrains the platform tag to\s+"manylinux_2_\d+_{platform.machine()}"', said), said
