"""What the adapters tell people to install exists."""

import re
from importlib.metadata import metadata
from pathlib import Path

import pytest

import flowroutes_fast

PACKAGE = Path(flowroutes_fast.__file__).parent
ROOT = PACKAGE.parent
NAMED = re.compile(r"flowroutes[-_]fast\[([\w,-]+)\]")
FILES = [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
REQUIRED = re.compile(r'require\("[\w.]+", "([\w-]+)"')


@pytest.mark.parametrize("pattern", [NAMED, REQUIRED], ids=["pip install", "require"])
def test_every_extra_that_is_named_exists(pattern):
    known = set(metadata("flowroutes_fast").get_all("Provides-Extra") or ())
    named = {
        extra
        for file in FILES
        for found in pattern.findall(file.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert named
    # EAP-IG is on no index, and its own sentence says so
    assert named <= known | ({"eap"} if pattern is REQUIRED else set())
