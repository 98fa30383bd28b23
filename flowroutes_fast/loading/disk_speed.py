"""What streaming a checkpoint reads, and how fast this machine's disk gives it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flowroutes_fast.loading.checkpoints import tensor_places
from flowroutes_fast.loading.load import DEMO, demo_file

SAMPLE = 2**28  # bytes that are read to measure


@dataclass(frozen=True)
class Reading:
    """Bytes that one traced batch reads; bytes per second of the disk they lie on, None if they are not here."""

    bytes: int
    bandwidth: float | None

    @property
    def seconds(self) -> float | None:
        """The floor: no run that reads all weights can be shorter."""
        return None if self.bandwidth is None else self.bytes / self.bandwidth


def reading(name: Any, model: nn.Module) -> Reading:
    """Of a local folder or GGUF file, measured; else the weights as the config's dtype would have them."""
    files: list[Path] = []
    if isinstance(name, (str, os.PathLike)):
        text = os.fspath(name)
        if text == DEMO or text.endswith(".gguf"):
            files = [demo_file() if text == DEMO else Path(text)]
            total = files[0].stat().st_size
        elif Path(text).is_dir():
            places = tensor_places(Path(text)).values()
            files, total = sorted({p.file for p in places}), sum(p.count for p in places)
    if files:
        return Reading(total, bandwidth(max(files, key=lambda f: f.stat().st_size)))
    stored = getattr(model.config, "dtype", None)  # type: ignore[union-attr]
    element = getattr(stored, "itemsize", 2)
    return Reading(sum(p.numel() * element for p in {id(p): p for p in model.parameters()}.values()), None)


def bandwidth(file: Path) -> float:
    """Bytes per second of reading a file that the system has not at hand (where it can be asked to forget it)."""
    buffer = memoryview(bytearray(2**23))
    with file.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, SAMPLE, os.POSIX_FADV_DONTNEED)
        start, count = time.perf_counter(), 0
        while count < SAMPLE and (got := stream.readinto(buffer)):
            count += got
    return count / max(time.perf_counter() - start, 1e-9)
