"""A corpus run whose every file operation fails, or is the last one of its process: nothing is lost, nothing
counted twice.
"""

import json
import pickle
import tempfile
from pathlib import Path

import pytest
from faults import Scenario, every_fault, one_sentence
from test_corpus import TEXTS, Tokenizer, make

from flowroutes_fast.corpora.run import run, settings_of, trace_items

pytest.importorskip("pyarrow")
OPTIONS = {
    "threshold": 0.04,
    "precision": "certified",
    "floor": 1e-3,
    "max_tokens": None,
    "overflow": "truncate",
    "window": 4,
    "batch_tokens": 100,
    "positions": True,
    "edges": False,
    "shard": (0, 1),
    "routes_only": False,
}


def content(folder):
    """All files of a run byte for byte; of its state what does not tell the time."""
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
    state = json.loads(found.pop("run.json"))
    del state["progress"]["seconds"], state["checksum"]
    return found | {"run.json": state}


class Run(Scenario):
    """A run of one window, its rows at hand; ``begun``: of two, one of them written, and what a killed process
    leaves lies about.
    """

    def __init__(self, begun=""):
        self.begun = bool(begun)

    def prepare(self):
        model = make("llama")
        self.settings, self.rows = settings_of(model, Tokenizer(), **OPTIONS), {}
        self.texts = TEXTS[: 6 if self.begun else 4]

        def traced(windows, bar):
            for window in windows:
                if window.number not in self.rows:
                    self.rows[window.number] = pickle.dumps(trace_items(model, window.items, self.settings))
                yield window, pickle.loads(self.rows[window.number])

        self.traced = traced
        with tempfile.TemporaryDirectory() as folder:
            self.corpus(folder)
            self.whole = content(Path(folder))

    def corpus(self, folder, traced=None):
        return run(
            self.settings,
            Tokenizer(),
            self.texts,
            folder,
            traced or self.traced,
            field="text",
            split="file",
            progress=False,
        )

    def start(self, folder):
        if not self.begun:
            return

        def one(windows, bar):
            for window, rows in self.traced(windows, bar):
                if window.number:
                    raise KeyboardInterrupt
                yield window, rows

        with pytest.raises(KeyboardInterrupt):
            self.corpus(folder / "run", one)
        for name in (
            ".positions-000001.parquet.abcd_123.partial/positions-000001.parquet",
            "edges-000001.parquet",
            "statistics.safetensors.2",
        ):
            (folder / "run" / name).parent.mkdir(exist_ok=True)
            (folder / "run" / name).write_bytes(b"half")

    def run(self, folder):
        self.corpus(folder / "run")

    def check(self, folder, outcome):
        one_sentence(outcome, "OSError", "DamagedFile")
        assert self.corpus(folder / "run").finished
        assert content(folder / "run") == self.whole


@pytest.mark.parametrize(("begun", "full"), [("", "ENOSPC"), ("begun", "EIO for good")])
def test_every_file_operation(tmp_path, begun, full):
    found = every_fault("test_corpus_faults:Run", tmp_path, [full, "EIO", "kill"], argument=begun)
    assert any("run.json" in one.operation and one.error for one in found)
    assert any("unlink" in one.operation and "statistics.safetensors.1" in one.operation for one in found) == bool(
        begun
    )
