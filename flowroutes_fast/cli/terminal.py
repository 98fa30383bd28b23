"""What the commands share: examples in their help, completion, JSON for pipes, colours and progress on terminals
alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flowroutes_fast.system.errors import is_memory
from flowroutes_fast.system.escape import json_text, printable

if TYPE_CHECKING:
    from rich.console import Console

ROOM = 1_700_000_000  # bytes of address space, measured with PyTorch for CPUs
DEFAULT_FLOOR = 1e-3  # as in trace()
PIPE_WIDTH = 200  # columns of a table that no terminal shows
EXIT_CODES = (
    "Exit codes: 0 done · 1 failed · 2 refused (bad usage or input; one sentence on standard error says why) "
    "· 130 interrupted."
)
FLOOR_HELP = "Smallest importance that is stored. \\[default: 0.001, or a lower --threshold]"
DEBUG = "FLOWROUTES_DEBUG"  # set in the environment, errors come with their traceback
JSON_HELP = "Print one JSON document to standard output; everything else goes to standard error."


def examples(*lines: str) -> str:
    """The end of a command's help: one example per line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"$ {line}".replace("[", r"\[") for line in lines)])


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completion of an option with few values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Completion of a model: the demo, folders with a config.json and .gguf files here, models of the local hub
    cache.
    """
    home = Path(os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")))
    cached = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    names = ["demo", *(p.name.removeprefix("models--").replace("--", "/") for p in sorted(cached.glob("models--*")))]
    folder, _, start = incomplete.rpartition("/")
    prefix = incomplete[: len(incomplete) - len(start)]
    place = Path(folder or ("/" if prefix else "."))
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.suffix == ".gguf" or (path.is_dir() and not path.name.startswith(".")):
            names.append(
                f"{prefix}{path.name}"
                if path.suffix == ".gguf" or (path / "config.json").is_file()
                else f"{prefix}{path.name}/"
            )
    return [name for name in names if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    return one_of("auto", "cpu", "triton", "cuda", "reference")(incomplete)


def say(text: object, *, err: bool = False) -> None:
    """One line, in which nothing acts on the terminal."""
    typer.echo(printable(text), err=err)


def sentence(error: BaseException) -> str:
    """What is wrong; the error's name where it says nothing."""
    if is_memory(error):
        said = " ".join(str(error).split()) or type(error).__name__
        return said if isinstance(error, MemoryError) and str(error) else f"out of memory: {said}"
    if isinstance(error, OSError) and error.errno and error.filename is None:  # files are named where they are written
        return f"cannot write to standard output: {error.strerror}"
    return str(error).strip() or type(error).__name__


def check_room() -> None:
    """``MemoryError`` where the address space is too small (ulimit -v) for PyTorch and transformers: some of their
    parts would crash.
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        return
    if limit != resource.RLIM_INFINITY and limit < ROOM:
        raise MemoryError(
            f"the address space is limited to {limit / 1e9:.2f} GB (ulimit -v), and PyTorch, transformers and a small "
            f"model take {ROOM / 1e9:.1f} GB"
        )


def print_json(document: Any) -> None:
    """One document, paths as text and dataclasses as objects; NaN and infinity, which JSON has not, as null."""
    pretty, plain = 2 if sys.stdout.isatty() else None, not (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json_text(json.dumps(_plain(document), ensure_ascii=plain, indent=pretty, allow_nan=False)))


def floor_of(floor: float | None, threshold: float | None, precision: str) -> float:
    """The floor of a trace: as given, or 0.001, or the threshold where that is lower. ``ValueError`` if there is no
    route above it.
    """
    if floor is not None and not 0 <= floor < 1:
        raise ValueError(f"floor must lie in [0, 1), got {floor}")
    if floor is not None and threshold is not None and threshold < floor:
        raise ValueError(
            f"--threshold {threshold} is below --floor {floor}: what a route needs is not stored; give a floor up to "
            f"{threshold}"
        )
    found = min(DEFAULT_FLOOR, DEFAULT_FLOOR if threshold is None else threshold) if floor is None else floor
    if found == 0 and precision == "certified":
        option = "--threshold" if floor is None else "--floor"
        raise ValueError(
            f"{option} 0 asks for all sub-edges, which --precision exact evaluates; with 'certified' it must be above 0"
        )
    return found


def in_options(message: str, options: Collection[str], elsewhere: Collection[str] = ()) -> str:
    """A message of the library with its ways out as options: ``floor=0.001`` → ``--floor 0.001``, those that no option
    has left out.

    ``options`` are those of the command that runs, ``elsewhere`` those of ``flowroutes trace``, which are said with its
    name.
    """

    def one(found: re.Match[str]) -> str:
        said = _option(found["name"], found["value"] or "", options, elsewhere)
        return (found["comma"] or "") + said if said else "" if found["comma"] else found[0]

    value = r"'[^']*'|\[[^\]]*\]|[\w.+-]*\w"
    return re.sub(rf"(?P<comma>, )?(?<!['/\w])(?P<name>[a-z_]+)=(?P<value>{value})?", one, message)


def _option(name: str, value: str, options: Collection[str], elsewhere: Collection[str]) -> str:
    """``name=value`` as an option; "" if there is none."""
    if name == "thresholds":  # tracing decides several, a command one
        name, value = "threshold", value.strip("[]").split(",")[0]
    flag = f"--{'no-' if value == 'False' else ''}{name.replace('_', '-')}"
    if value.startswith("[") or flag not in {*options, *elsewhere}:
        return ""
    shown = "" if value in ("True", "False") else value.strip("'")
    return f"{'' if flag in options else 'flowroutes trace '}{flag} {shown}".rstrip()


@contextmanager
def readable_messages() -> Iterator[None]:
    """Warnings and log messages of other libraries, which quote what they read, with nothing in them that acts on
    the terminal.
    """

    def lines(text: object) -> str:
        return "\n".join(map(printable, str(text).split("\n")))

    record, warning = logging.getLogRecordFactory(), warnings.formatwarning

    def readable(*args: Any, **options: Any) -> logging.LogRecord:
        made = record(*args, **options)
        made.msg, made.args = lines(made.getMessage()), ()
        return made

    logging.setLogRecordFactory(readable)
    warnings.formatwarning = lambda message, category, *place: warning(lines(message), category, *place)  # type: ignore
    try:
        yield
    finally:
        logging.setLogRecordFactory(record)
        warnings.formatwarning = warning


def open_streams() -> None:
    """Standard output and error that can be written to: nowhere if they are closed, any character in any encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for the rest of the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write_out() -> int:
    """Write what standard output still holds; the exit code: 0, 1 where nobody reads any more (``| head``), or 2 and a
    sentence where it cannot be written (a full disk).
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up_output()
        if isinstance(error, BrokenPipeError):
            return 1
        say(f"flowroutes: {sentence(error)}", err=True)
        return 2
    return 0


def give_up_output() -> None:
    """What standard output still holds and cannot write is dropped: the interpreter would try again at its end, say so
    and change the exit code.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AttributeError, ValueError):  # there is none, or it is closed
        pass


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def console(*, stderr: bool = False) -> Console:
    """Colours where a terminal shows them (and NO_COLOR is not set); tables of a pipe are not cut to 80 columns.

    Text is taken as it is: square brackets are no markup.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else PIPE_WIDTH
    )


def progress_wanted() -> bool:
    """Are progress bars seen by anybody?"""
    return sys.stderr.isatty()


@contextmanager
def busy(text: str) -> Iterator[None]:
    """A spinner on standard error while something without a bar goes on; nothing where no terminal shows it."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield
        return
    from rich.text import Text

    with shown.status(Text(printable(text))):
        yield
