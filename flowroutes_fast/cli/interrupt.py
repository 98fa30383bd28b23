"""Ctrl+C on the command line: one sentence and exit code 130 whenever it comes, also while modules are being imported.

Up to :func:`tidily` there is nothing to clean up, and an interrupt ends the process at once: raised in the middle of an
import it could be swallowed, or be reported as an error of the module. From there on it is a ``KeyboardInterrupt`` like
any other, on which files that are not whole are removed.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 130
SENTENCE = "flowroutes: interrupted; nothing half-written is left"
PATIENCE = 3.0  # seconds in which cleaning up is not interrupted again
AGAIN = 0.02  # seconds after which an interrupt that was lost is raised again


class _State:
    """Of this process's command line."""

    tidy = False  # is there anything to clean up?
    raised: float | None = None  # when the last interrupt was raised
    before: object = None  # the handler that was there


def leave_at_once() -> None:
    """From here on an interrupt ends the process; nothing changes where interrupts are ignored, or where somebody
    else takes them.
    """
    _State.tidy, _State.raised = False, None
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        _State.before = signal.signal(signal.SIGINT, _on_interrupt)


def tidily() -> None:
    """From here on an interrupt is raised, and files are removed on its way up."""
    _State.tidy = True


def serving() -> None:
    """From here on an interrupt ends the process at once, whatever its threads are at and also where interrupts are
    ignored: a server has nothing to clean up."""
    _State.tidy = False
    signal.signal(signal.SIGINT, _on_interrupt)


def as_before() -> None:
    """Interrupts are the caller's again."""
    if _State.before is not None:
        signal.signal(signal.SIGINT, _State.before)  # type: ignore[arg-type]
        _State.before = None


@contextmanager
def watched() -> Iterator[None]:
    """A command's run: whatever an interrupt turned into on its way up, it ends with the sentence and exit code 130."""
    leave_at_once()
    hook = sys.unraisablehook
    sys.unraisablehook = lambda lost: _raise_again() if lost.exc_type is KeyboardInterrupt else hook(lost)
    try:
        yield
        interrupted = _State.raised is not None
    except BaseException as error:
        interrupted = _State.raised is not None or isinstance(error, KeyboardInterrupt)
        if not interrupted:
            raise
    finally:
        atexit.register(_ignore)  # the last that is registered runs first: the interpreter's own end is not interrupted
        (_ignore if _State.raised is not None else as_before)()
        sys.unraisablehook = hook
    if interrupted:
        say()
        sys.exit(EXIT_CODE)


def say() -> None:
    """The sentence, past any buffer: standard error may be closed, or in use by what was interrupted."""
    with suppress(OSError):
        os.write(2, f"{SENTENCE}\n".encode())


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if not _State.tidy:
        say()
        os._exit(EXIT_CODE)
    now = time.monotonic()
    if _State.raised is None or now - _State.raised > PATIENCE:
        _State.raised = now
        raise KeyboardInterrupt


def _raise_again() -> None:
    """An interrupt that came within a destructor or a callback ends there: raise it once more, a little later."""
    _State.raised = None
    again = threading.Timer(AGAIN, _interrupt_main)
    again.daemon = True
    again.start()


def _ignore() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt_main() -> None:
    if hasattr(signal, "pthread_kill"):  # it also ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]
    else:
        _thread.interrupt_main()
