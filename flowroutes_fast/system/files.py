"""Writing files so that none is ever half-written, and knowing files by their content."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK = ".lock"
PREFIX = 24  # characters of a file's name in that of its temporary folder, up to four bytes each
_PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}\.partial")
ATTEMPTS = 3  # to make a folder that no other process takes
WAIT = 0.05  # seconds between two looks at a lock
PIECE = 2**25  # bytes that a thread hashes at a time
SETTLED = 2.0  # seconds after which a later change of a file shows in its times
REMEMBERED = 2**26  # bytes from which a file's digest is kept on disk
_digests: dict[str, str] = {}


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object], *, durable: bool = True) -> Path:
    """Call ``write`` with a name in a folder of its own beside the target, then rename; an interruption leaves nothing
    under ``path``.

    A link stays one: what it points to is written. A file that is there keeps its mode, a new one has what the umask
    leaves. ``durable``: its bytes are on the disk before it has its name, and the name before this returns. What a
    killed process leaves goes at the next :func:`claim` of the folder. Raises ``OSError`` with the file's name when it
    cannot be written (a full disk), or is a device.
    """
    given = Path(path)
    target, before = _place(given)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:PREFIX]}.", suffix=".partial"))
    except OSError as error:
        raise OSError(f"cannot write into folder '{target.parent}': {said(error)}") from error
    try:
        temporary = folder / target.name
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # with the mode that the umask leaves
        mode = stat.S_IMODE(os.fstat(handle).st_mode) if before is None else before
        os.close(handle)
        write(temporary)
        temporary.chmod(mode)  # a library may have renamed a file of its own over it
        if durable:
            flush(temporary)
        temporary.replace(target)
        if durable:
            flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write '{given}': {said(error)}") from error
    finally:
        remove(folder)
    return given


def _place(given: Path) -> tuple[Path, int | None]:
    """The file behind a path, links followed, and its mode if there is one. ``OSError`` for what no file can
    replace.
    """
    try:
        target = Path(os.path.realpath(given)) if given.is_symlink() else given
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target, None
    except OSError as error:
        if isinstance(error, NotADirectoryError):  # said of the folder
            return given, None
        raise OSError(f"cannot write '{given}': {said(error)}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"cannot write '{given}': it is a pipe or a device, not a file")
    return target, stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def remove(folder: Path) -> None:
    """A folder and all in it, as far as it can be removed."""
    with suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)


def said(error: BaseException) -> str:
    """What an exception says, in one line, without a number in front."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text if isinstance(text, str) and text else type(error).__name__


def flush(path: Path) -> None:
    """A file's bytes, or a folder's names, are on the disk when this returns (where the system can say so of
    folders).
    """
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without
            raise
    finally:
        os.close(handle)


class Lock:
    """A folder's lock file, held by one process at a time; ``acquire()`` says whether it was free."""

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, -1

    def acquire(self) -> bool:
        import fcntl

        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._named(handle):
                    self.handle = handle
                    return True
            except BlockingIOError:
                return False
            finally:
                if self.handle != handle:
                    os.close(handle)

    def _named(self, handle: int) -> bool:
        """Has the file still its name? One that was removed meanwhile locks nothing."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        handle, self.handle = self.handle, -1
        if handle >= 0:
            with suppress(OSError):
                os.close(handle)


def claim(folder: Path) -> Any:
    """Make a run's folder and lock it for this process; ``.release()`` gives it back. ``ValueError`` if another process
    has it.

    What killed processes left half-written in it is removed.
    """
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder / LOCK)
        if lock is None:
            raise ValueError(f"another process is working in '{folder}'")
        for left in folder.iterdir():
            if _PARTIAL.fullmatch(left.name):
                remove(left)
        return lock
    except OSError as error:
        if lock is not None:
            lock.release()
        raise OSError(f"cannot work in folder '{folder}': {said(error)}") from error


def _locked(path: Path) -> Any:
    """The lock, held; None if another process has it."""
    if os.name == "posix":
        mine = Lock(path)
        return mine if mine.acquire() else None
    from filelock import FileLock, Timeout  # an open file keeps its name there

    theirs = FileLock(path)
    try:
        theirs.acquire(timeout=0)
    except Timeout:
        return None
    return theirs


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """While it lasts no other process is inside with this lock file; waits its turn."""
    while (lock := _locked(path)) is None:
        time.sleep(WAIT)
    try:
        yield
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` now rather than after long work if files cannot be made in ``folder`` (it is created)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into folder '{folder}': {said(error)}") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def temporary_folder(prefix: str, where: Path | None = None) -> tuple[Path, Callable[[], None]]:
    """A folder of this process below ``where`` (None: the system's temporary one), and what removes it. Those that
    killed processes left go now. ``OSError`` names the folder above."""
    above = Path(tempfile.gettempdir()) if where is None else where
    sweep(prefix, above)
    for _ in range(ATTEMPTS - 1):
        with suppress(ValueError):  # another process took it for one that was left
            return _claimed_folder(prefix, above)
    return _claimed_folder(prefix, above)


def _claimed_folder(prefix: str, above: Path) -> tuple[Path, Callable[[], None]]:
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=above))
        lock = claim(folder)
    except BaseException as error:
        if folder is not None:
            remove(folder)
        if isinstance(error, OSError):
            raise OSError(f"cannot work in the folder '{above}': {said(error.__cause__ or error)}") from error
        raise
    return folder, partial(_give_back, folder, lock)


def _give_back(folder: Path, lock: Lock) -> None:
    _emptied(folder)
    lock.release()


def sweep(prefix: str, where: Path) -> None:
    """Remove what killed processes left of their :func:`temporary_folder`, as far as it can be removed."""
    with suppress(OSError):
        for left in where.glob(f"{prefix}*"):
            with suppress(OSError):
                if not (left / LOCK).exists():
                    left.rmdir()  # if it is empty
                elif (theirs := _locked(left / LOCK)) is not None:
                    _emptied(left)
                    theirs.release()


def _emptied(folder: Path) -> None:
    """Remove a claimed folder, its lock last: what cannot be removed now still says whose it is."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                remove(path)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        remove(folder)


def state_of(file: Path) -> tuple[int, int, int, int, int]:
    """(device, inode, size, mtime, ctime): as long as they stay, so does the content."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def digest_of(file: Path, remembered: Path | None = None) -> str:
    """SHA-256 over the digests of a file's pieces. Every byte is read once (about 1 GB per second and core), and again
    after any change.

    A file whose device, inode, size and times are as they were has the digest that it had: in this process and, with a
    folder ``remembered``, for large files, in others. ``OSError`` names the file.
    """
    try:
        before = state_of(file)
        key = hashlib.sha256(repr(before).encode()).hexdigest()
        kept = remembered / key if remembered is not None and before[2] >= REMEMBERED else None
        if (found := _digests.get(key) or _remembered(kept)) is None:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                pieces = list(pool.map(lambda start: _piece(file, start), range(0, before[2], PIECE)))
            found = hashlib.sha256(b"".join(pieces)).hexdigest()
            if state_of(file) != before:
                raise OSError("it changes while it is read")
            if time.time_ns() - max(before[3:]) < SETTLED * 1e9:
                return found  # changed just now: another change need not show in its times
            if kept is not None:
                with suppress(OSError):
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_text(_sealed(kept, found), encoding="ascii")
        _digests[key] = found
        return found
    except OSError as error:
        raise OSError(f"'{file}' cannot be read: {said(error)}") from error


def _piece(file: Path, start: int) -> bytes:
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        found, left = hashlib.sha256(), PIECE
        while left and (read := stream.read(min(left, 2**20))):
            found.update(read)
            left -= len(read)
    return found.digest()


def _remembered(kept: Path | None) -> str | None:
    if kept is None:
        return None
    try:
        text = kept.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text[:64] if text == _sealed(kept, text[:64]) else None


def _sealed(kept: Path, digest: str) -> str:
    """A digest with one of itself and the file it is of: half of it, or another's, is none."""
    return f"{digest} {hashlib.sha256(f'{kept.name} {digest}'.encode()).hexdigest()}"
