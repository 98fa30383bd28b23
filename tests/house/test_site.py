"""The documentation site builds without a warning and needs no network. Skipped where the extra ``docs`` is not
installed.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = ("mkdocs", "material", "mkdocstrings_handlers", "mkdocs_jupyter", "latex2mathml")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDS), reason="the extra 'docs' is not installed"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there(site):
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]:
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        if "benchmarks" in page.parts:
            continue
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="?(https?://[^" '
            r'>]+)|<link[^>]*rel="?stylesheet[^>]*href="?(https?://[^" >]+)',
            text,
        )
        assert not fetched, (page.name, fetched)
        assert "unpkg.com" not in text, page.name


def test_formulas_are_mathml_and_roles_are_code(site):
    text = (site / "maths.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50
    assert "arithmatex" not in text
    for page in (site / "reference").glob("*.html"):
        assert not re.search(r":(func|class|mod|meth):", page.read_text(encoding="utf-8")), page.name


def test_the_reference_documents_every_public_name(site):
    import flowroutes_fast as fr

    text = " ".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    for name in set(fr.__all__) - {"__version__", "open_corpus"}:
        assert re.search(rf'id="flowroutes_fast\.[\w.]*\b{name}"', text), name


def test_result_files_that_pages_quote_are_part_of_it(site):
    assert (site / "benchmarks/results/amd-epyc-2-cores.json").is_file()
    assert 'href="benchmarks/results/' in (site / "limits.html").read_text(encoding="utf-8").replace(
        'href="./', 'href="'
    )
