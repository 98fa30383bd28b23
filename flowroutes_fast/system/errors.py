"""Errors that callers may want to tell apart."""

from __future__ import annotations

NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)


class DamagedFile(ValueError):
    """A file of ours that cannot be what was written: cut short, changed, or not of the kind that its name promises."""


def is_memory(error: BaseException | None) -> bool:
    """Is too little memory behind an error? Libraries make others of it, which say so or came of one."""
    for _ in range(20):
        if error is None:
            return False
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
