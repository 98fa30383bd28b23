"""Writing files so that none is ever half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK = ".lock"


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call ``write`` with a temporary name in the same folder, then rename; an interruption leaves nothing behind.

    Raises ``OSError`` with the file's name when it cannot be written, for a full disk say.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise OSError(f"cannot write into folder '{target.parent}': {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write '{target}': {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def claim(folder: Path) -> Any:
    """Make a run's folder and lock it for this process; ``.release()`` gives it back. ``ValueError`` if another process has it."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is working in '{folder}'") from None
    except OSError as error:
        raise OSError(f"cannot work in folder '{folder}': {error.strerror or error}") from error
    return lock


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` now rather than after long work if files cannot be made in ``folder`` (it is created)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into folder '{folder}': {error.strerror or error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
