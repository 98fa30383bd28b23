"""``make notebooks``: run the tutorials from top to bottom and store what they show (``python docs/execute_notebooks.py [NAME ...]``)."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "tutorials"
NOISE = re.compile(r"Writing model shards|Loading weights|FutureWarning|UserWarning")


def execute(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as place:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": place}}).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.get("name") == "stderr" or NOISE.search(str(o.get("data", ""))))]
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            execute(path)
