"""What the commands share: examples in their help, completion, JSON for pipes, colours and progress on terminals alone."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200  # columns of a table that no terminal shows
EXIT_CODES = "Exit codes: 0 done · 1 failed · 2 refused (bad usage or input; one sentence on standard error says why) · 130 interrupted."
JSON_HELP = "Print one JSON document to standard output; everything else goes to standard error."


def examples(*lines: str) -> str:
    """The end of a command's help: one example per line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"$ {line}".replace("[", r"\[") for line in lines)])


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completion of an option with few values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """Completion of a model: the demo, folders with a config.json and .gguf files here, models of the local hub cache."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    cached = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    names = ["demo", *(p.name.removeprefix("models--").replace("--", "/") for p in sorted(cached.glob("models--*")))]
    folder, _, start = incomplete.rpartition("/")
    prefix = incomplete[: len(incomplete) - len(start)]
    place = Path(folder or ("/" if prefix else "."))
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path.suffix == ".gguf" or (path.is_dir() and not path.name.startswith(".")):
            names.append(f"{prefix}{path.name}" if path.suffix == ".gguf" or (path / "config.json").is_file() else f"{prefix}{path.name}/")
    return [name for name in names if name.startswith(incomplete)]


def backends(incomplete: str) -> list[str]:
    return one_of("auto", "cpu", "triton", "cuda", "reference")(incomplete)


def print_json(document: Any) -> None:
    """One document, paths as text and dataclasses as objects; NaN and infinity, which JSON has not, as null."""
    typer.echo(json.dumps(_plain(document), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None, allow_nan=False))


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
    """Colours where a terminal shows them (and NO_COLOR is not set); tables of a pipe are not cut to 80 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


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
    with shown.status(text):
        yield
