"""README, documentation pages and tutorials: every code block runs, every command exists, every link leads somewhere,
figures are those measured.

Python blocks of a page share one namespace and run in order in an empty folder. ``<!-- needs: captum -->`` before a
block runs it only where that module can be imported, ``<!-- not executed: reason -->`` never. Commands in ``bash``
blocks are run too, unless they say so; the names of commands and options are checked in any case.
"""

import importlib.util
import json
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from typer.main import get_command
from typer.testing import CliRunner

from flowroutes_fast.cli import app

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
CHEAP = ("trace", "doctor", "models", "estimate", "corpus", "analyze")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def remark_before(text: str, start: int) -> tuple[str, str]:
    """The HTML comment right above a block, as (kind, rest)."""
    found = re.search(r"<!-- (needs|not executed): (.*?) -->\s*\Z", text[:start])
    return (found[1], found[2]) if found else ("", "")


class Blocks(PythonCodeBlockParser):
    """The Python blocks that are to run here."""

    def __call__(self, document):
        for region in super().__call__(document):
            kind, rest = remark_before(document.text, region.start)
            missing = kind == "needs" and any(
                importlib.util.find_spec(name.strip()) is None for name in rest.split(",")
            )
            if not missing and kind != "not executed":
                yield region


@pytest.fixture
def place(demo, monkeypatch, tmp_path):
    """An empty working folder, the demo model loaded once, no windows."""
    import flowroutes_fast as fr

    load = fr.load
    monkeypatch.setattr(
        fr, "load", lambda name, **options: demo if name == "demo" and not options else load(name, **options)
    )
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.demo_model
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_page(path, place):
    text = path.read_text(encoding="utf-8")
    document = Document.parse(str(path), Blocks())
    for example in document.examples():
        example.evaluate()
    for block in BLOCK.finditer(text):
        run = remark_before(text, block.start())[0] != "not executed"
        for line in block[1].replace("\\\n", " ").splitlines():
            check_command(line, run)


def check_command(line: str, run: bool) -> None:
    """The command is one of ours, has the options it is given, and works (where it is cheap and not marked
    otherwise).
    """
    words = shlex.split(line.split(" | ")[0], comments=True)
    if not words:
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target for {line!r}"
    if words[0] != "flowroutes":
        return
    group = get_command(app)
    command = group.commands.get(words[1], group)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help"
    }
    unknown = [word for word in words[1:] if word.startswith("--") and word.split("=")[0] not in known]
    assert not unknown, f"{unknown} in {line!r}"
    if run and words[1] in CHEAP:
        done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output


@pytest.mark.demo_model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook(path, place):
    """All cells in this process, one after the other; what they show was stored by ``make notebooks``."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "not executed: run 'make notebooks'"
    assert path.stat().st_size < 1e6
    namespace = {"__name__": "__main__", "display": lambda *shown: None}
    for cell in cells:
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        exec(compile("".join(cell["source"]), f"{path.name}, cell {cell['execution_count']}", "exec"), namespace)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#|mailto:", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target}"


def result(name: str):
    return json.loads((RESULTS / name).read_text())


def test_figures_of_the_comparison_are_those_measured():
    """Every row of the README's comparison, from the result files; a new measurement without a new table fails here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("## Compared")[1].split("\n## ")[0].splitlines() if line.startswith("|")][2:]
    tool = next(r for r in result("integrations/llm_transparency_tool.json")["rows"] if r["tokens"] == 160)
    layer = next(
        r for r in result("amd-epyc-2-cores.json")["kernels"] if r["tokens"] == 256 and r["layer"].endswith("layer 8")
    )
    nnsight = result("integrations/nnsight.json")["rows"][-1]
    component = result("integrations/eap_ig.json")["rows"][0]
    captum = result("integrations/captum.json")["rows"][-1]["seconds"]
    inseq = result("integrations/inseq.json")["rows"][0]["seconds"]
    patching = result("patching-intel-xeon-1-cores.json")["ioi"]
    patched = [p["seconds_per_example"] for p in patching["patching"].values()]

    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.1f} ms"

    expected = [
        (
            f"{tool['tool']['graph_seconds']:.0f} s, {tool['tool']['graph_peak_mb']:.0f} MiB",
            f"{tool['patched']['graph_seconds']:.1f} s, {tool['patched']['graph_peak_mb']:.0f} MiB",
        ),
        (f"{layer['materialised']['seconds']:.1f} s", ms(layer["certified"]["seconds"])),
        (f"{layer['chunked']['seconds']:.2f} s", ms(layer["certified"]["seconds"])),
        (f"{layer['compiled']['seconds'] * 1e3:.0f} ms", ms(layer["certified"]["seconds"])),
        (
            f"{nnsight['seconds']['nnsight']:.0f} s, {nnsight['peak bytes']['nnsight'] / 1e6:.0f} MB",
            f"{nnsight['seconds']['certified']:.2f} s, {nnsight['peak bytes']['certified'] / 1e6:.0f} MB",
        ),
        (
            f"{component['seconds']['theirs']:.1f} s, {component['peak bytes']['theirs'] / 1e6:.0f} MB",
            f"{component['seconds']['ours']:.3f} s, {component['peak bytes']['ours'] / 1e6:.1f} MB",
        ),
        (f"{min(patched):.1f} to {max(patched):.1f} s", f"{patching['routes']['seconds_per_example']:.2f} s"),
        (f"{captum['feature ablation']:.0f} s", f"{captum['routes, certified']:.2f} s"),
        (f"{inseq['integrated gradients']:.0f} s", f"{inseq['routes, sub-edges']:.2f} s"),
    ]
    assert len(rows) == len(expected)
    for row, figures in zip(rows, expected, strict=True):
        for figure in figures:
            assert figure in row, f"{figure} is not in {row}"


def test_no_page_holds_a_path_of_the_machine_that_made_it():
    for path in (*PAGES, *NOTEBOOKS):
        text = path.read_text(encoding="utf-8")
        for word in (f"{Path.home()}/", str(ROOT), tempfile.gettempdir() + os.sep):
            assert word not in text, f"{word} in {path.name}"
