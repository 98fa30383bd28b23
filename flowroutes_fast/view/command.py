"""``flowroutes view``: trace files as a page, or behind a local server."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowroutes_fast.results.trace import load_trace
from flowroutes_fast.system.files import check_writable, write_text
from flowroutes_fast.view.page import trace_html

if TYPE_CHECKING:
    from flowroutes_fast.results.trace import Trace

Say = Callable[[str], None]


@dataclass
class Prompts:
    """The traces of one prompt or of two, each perhaps with both measures."""

    first: Trace | None = None
    other: Trace | None = None
    signed: Trace | None = None
    other_signed: Trace | None = None

    def add(self, found: Trace, path: Path) -> None:
        """Put a trace where it belongs: first, another prompt, or the other measure of one of them."""
        if self.first is None:
            self.first = found
        elif _same_prompt(found, self.first) and found.measure != self.first.measure and self.signed is None:
            self.signed = found
        elif self.other is None:
            self.other = found
        elif _same_prompt(found, self.other) and found.measure != self.other.measure and self.other_signed is None:
            self.other_signed = found
        else:
            raise ValueError(
                f"'{path}' is one trace too many: a page shows two prompts, each with one trace per measure"
            )

    def options(self) -> dict[str, Any]:
        return {"other": self.other, "signed": self.signed, "other_signed": self.other_signed}


def _same_prompt(a: Trace, b: Trace) -> bool:
    return a.token_ids == b.token_ids and a.tokens == b.tokens and a.model == b.model and a.inputs == b.inputs


def view(
    files: Sequence[Path],
    *,
    out: Path | None = None,
    open_page: bool = False,
    model: str | None = None,
    threshold: float = 0.04,
    position: int = -1,
    renormalize: bool = True,
    say: Say = print,
) -> Path:
    """Write the page of trace files; with a model its details and the other measure too."""
    if not files:
        raise ValueError(
            "give a trace file (trace.save and 'flowroutes trace --out' write one), or --serve to type "
            "prompts into the page"
        )
    _check(threshold)
    target = out or files[0].with_suffix(".html")
    prompts = _read(files)
    _check_position(prompts, position)
    check_writable(target.parent)
    options = {**prompts.options(), **(_with_model(prompts, model, position) if model else {})}
    page = write_text(
        target, trace_html(prompts.first, threshold=threshold, position=position, renormalize=renormalize, **options)
    )
    say(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if open_page and not webbrowser.open(page.resolve().as_uri()):
        say("no browser was found: open the file in one")
    return page


def serve(
    files: Sequence[Path],
    *,
    port: int,
    open_page: bool = False,
    model: str = "demo",
    threshold: float = 0.04,
    position: int = -1,
    renormalize: bool = True,
    max_tokens: int | None = None,
    memory: str | None = None,
    say: Say = print,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Serve the page on 127.0.0.1 until interrupted; prompts typed into it are traced by ``model``, and the states of
    the last few are kept (most ``memory``: see :class:`flowroutes_fast.view.server.Limits`). ``ready`` is called once
    it is loaded."""
    from flowroutes_fast.loading.load import load
    from flowroutes_fast.loading.streaming import parse_memory
    from flowroutes_fast.view import server

    _check(threshold)
    given = {"tokens": max_tokens, "memory": None if memory is None else parse_memory(memory)}
    limits = server.Limits(**{name: value for name, value in given.items() if value is not None})
    if limits.tokens < 1:
        raise ValueError(f"--max-tokens must be positive, got {max_tokens}")
    prompts = _read(files)
    _check_position(prompts, position)
    with server.listen(port) as listening:  # before the model is loaded: a port in use is said at once
        loaded, tokenizer = load(model)
        options = {**prompts.options(), "threshold": threshold, "position": position, "renormalize": renormalize}
        taken = listening.getsockname()[1]
        app = server.create_app(server.Tracer(loaded, tokenizer, limits), taken, prompts.first, **options)
        ready()
        address = f"http://{server.HOST}:{taken}/"
        say(f"{address}  ({model}; Ctrl+C stops the server)")
        if open_page:
            webbrowser.open(address)
        server.make_server(app).run(sockets=[listening])


def _check(threshold: float) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")


def _check_position(prompts: Prompts, position: int) -> None:
    if prompts.first is not None:
        prompts.first._positions(position)


def _read(files: Sequence[Path]) -> Prompts:
    prompts = Prompts()
    for path in files:
        prompts.add(load_trace(path), path)
    return prompts


def _with_model(prompts: Prompts, name: str, position: int) -> dict[str, Any]:
    """Logit lens and attention weights of the prompts, and their traces with the other measure where none was given."""
    from flowroutes_fast.loading.load import load
    from flowroutes_fast.tracing.options import DEFAULT_FLOOR
    from flowroutes_fast.tracing.trace import trace
    from flowroutes_fast.view.details import details

    model, tokenizer = load(name)

    def measured(one: Trace | None, given: Trace | None) -> Trace | None:
        if one is None or given is not None:
            return given
        measure = "proximity" if one.measure == "signed" else "signed"
        return trace(model, tokenizer, list(one.token_ids), measure=measure, floor=one.floor or DEFAULT_FLOOR)

    assert prompts.first is not None
    found: dict[str, Any] = {"details": details(model, tokenizer, prompts.first, position=position)}
    if prompts.other is not None:
        found["other_details"] = details(model, tokenizer, prompts.other)
    signed, other_signed = measured(prompts.first, prompts.signed), measured(prompts.other, prompts.other_signed)
    for mine, theirs in ((prompts.first, signed), (prompts.other, other_signed)):
        if mine is not None and theirs is not None and mine.model != theirs.model:
            raise ValueError(f"the trace is of {mine.model}, and --model {name} is {theirs.model}")
    return {**found, "signed": signed, "other_signed": other_signed}
