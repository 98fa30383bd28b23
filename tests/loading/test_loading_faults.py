"""Models that are converted, and models that are read in place: whatever fails is said, and nothing half-written is
taken for a model.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_gguf
from families import make
from faults import Scenario, every_fault, one_sentence
from test_resume import bits

import flowroutes_fast as fr
from flowroutes_fast.loading.streaming import stream_of
from flowroutes_fast.system import files

IDS = [3, 14, 15, 92, 65]


class Opening(Scenario):
    """A checkpoint that is opened and traced; ``"load"`` or ``"stream"``, and what it is: a family in GGUF, a
    folder of pickled weights.
    """

    def __init__(self, argument):
        self.way, self.kind = argument.split()

    def prepare(self):
        self.saved = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        if self.kind == "folder":
            make("llama", num_hidden_layers=1).save_pretrained(self.saved, max_shard_size="60kB")
        else:
            tiny_gguf.write(self.saved / "tiny.gguf", self.kind)
        files.REMEMBERED, files.SETTLED = 1, 0  # digests are kept, as those of large files are
        with tempfile.TemporaryDirectory() as folder:
            self.start(Path(folder))
            self.expected = self.traced(Path(folder))
            self.made = self.cached(Path(folder))

    def start(self, folder):
        shutil.copytree(self.saved, folder / "model")
        (folder / "tmp").mkdir()
        self.here(folder)

    def here(self, folder):
        tempfile.tempdir = str(folder / "tmp")
        os.environ["FLOWROUTES_CACHE"] = str(folder / "cache")
        files._digests.clear()

    def traced(self, folder):
        path = folder / "model" if self.kind == "folder" else folder / "model" / "tiny.gguf"
        model, _ = fr.load(path) if self.way == "load" else fr.open_streaming(path)
        if self.way == "stream":
            stream_of(model).budget = stream_of(model).weights
        return bits(fr.trace(model, None, [IDS]))

    def cached(self, folder):
        """What the cache holds, digests of files aside."""
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted((folder / "cache" / "models").rglob("*"))
            if p.is_file()
        }

    def run(self, folder):
        assert self.traced(folder) == self.expected

    def check(self, folder, outcome):
        one_sentence(outcome, "OSError", "ValueError", "FileNotFoundError")
        self.here(folder)
        assert self.traced(folder) == self.expected
        gc.collect()
        assert not list((folder / "tmp").iterdir())
        assert self.cached(folder) == self.made
        assert not [p for p in folder.rglob("*") if p.name.endswith(".partial")]
        for file in self.saved.iterdir():
            assert (folder / "model" / file.name).read_bytes() == file.read_bytes()


def faults_of(argument, tmp_path, *faults, **options):
    pytest.importorskip("gguf")
    found = every_fault("test_loading_faults:Opening", tmp_path, faults, argument, **options)
    assert {"open", "write", "rename", "mkdir"} <= {o.operation.split()[0] for o in found}


@pytest.mark.parametrize("argument", ["load llama", "stream folder"])
def test_every_file_operation_that_writes(argument, tmp_path):
    faults_of(argument, tmp_path, "ENOSPC", "EIO of writes", "kill")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "argument", ["load llama", "load qwen3_moe", "stream llama", "stream qwen3_moe", "stream folder"]
)
def test_every_file_operation(argument, tmp_path):
    faults_of(argument, tmp_path, "ENOSPC", "EIO", "kill", timeout=1800)
