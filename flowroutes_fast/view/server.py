"""A local server for the instrument: its page has a box for prompts, which this process traces.

A prompt costs one forward pass, whose states are kept; routes of other roots and at other thresholds, the other
measure, the logit lens and attention weights come from them. The states of the last few prompts are kept, and let go
when they take too much memory.

It listens on 127.0.0.1 and answers its own page alone: the ``Host`` must be this address (no rebinding of names), an
``Origin`` must be this server, and every request for a trace carries a key that only the page knows. Requests are
limited in size and number, and one prompt is traced at a time.
"""

from __future__ import annotations

import errno
import secrets
import signal
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flowroutes_fast.tracing.options import DEFAULT_FLOOR, DEFAULT_THRESHOLDS
from flowroutes_fast.tracing.prompts import read_prompts
from flowroutes_fast.tracing.trace import by_measure, model_name, trace
from flowroutes_fast.view import packing, page
from flowroutes_fast.view.details import Glance

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from pydantic import BaseModel, Field
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError("the page's server needs FastAPI and uvicorn: pip install 'flowroutes_fast[view]'") from error

if TYPE_CHECKING:
    from flowroutes_fast.results.lazy import LazyTrace
    from flowroutes_fast.results.trace import Trace

HOST = "127.0.0.1"
TRACE, ROUTE, STATE = "/trace", "/route", "/state"
MAX_CHARACTERS = 20_000  # of a prompt
PATIENCE = 20.0  # seconds that a click waits for a prompt that is being traced
BUSY = "another prompt is being traced; try again when it is done"
AGAIN = "The states of this prompt had been let go: it was traced again."
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass
class Limits:
    """Of a request: ``body`` bytes, ``tokens`` of a prompt. ``per_minute`` requests for a trace, ``clicks`` a minute
    for what follows them. States of at most ``prompts`` prompts and ``memory`` bytes are kept."""

    body: int = 256 * 1024
    tokens: int = 2048
    per_minute: int = 30
    clicks: int = 1200
    prompts: int = 8
    memory: int = 2 * 2**30


Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
Threshold = Annotated[float, Field(ge=0, lt=1)]
Place = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Question(BaseModel):
    """What the page asks for: the trace of a prompt, or of two that are compared, and the route of each one's last
    position.
    """

    text: Text
    other: Text | None = None
    chat: bool = False  # the text is a user's message
    other_chat: bool = False
    threshold: Threshold = 0.04
    renormalize: bool = True
    measure: Literal["proximity", "signed"] = "proximity"


class Click(BaseModel):
    """The page asks for the rows of routes that it has not; ``number`` and ``have`` say which it has."""

    text: Text
    chat: bool = False
    number: int
    have: list[Annotated[int, Field(ge=0)]]
    measure: Literal["proximity", "signed"] = "proximity"
    roots: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=2)
    threshold: Threshold
    renormalize: bool


class Look(BaseModel):
    """The page asks what is known of states (height, position) and rows (layer, query)."""

    text: Text
    chat: bool = False
    threshold: Threshold = 0.04
    states: list[Place] = Field([], max_length=16)
    rows: list[Place] = Field([], max_length=4)


class Refused(Exception):
    """A request that is answered with one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(eq=False)
class Kept:
    """A prompt whose states are kept: its lazy traces by measure, which share them."""

    number: int
    traces: dict[str, LazyTrace]

    @property
    def nbytes(self) -> int:
        return int(self.traces["proximity"].source.nbytes)


@dataclass
class Tracer:
    """Traces the prompts of one model, one at a time, and keeps the states of the last few."""

    model: Any
    tokenizer: Any
    limits: Limits = field(default_factory=Limits)
    busy: threading.Lock = field(default_factory=threading.Lock)  # while a prompt that was asked for is traced
    turn: threading.Lock = field(default_factory=threading.Lock)  # while anything is computed
    kept: OrderedDict[tuple[Any, ...], Kept] = field(default_factory=OrderedDict)  # that used last is last
    passes: int = 0  # forward passes so far

    def __post_init__(self) -> None:
        self.glance = Glance(self.model, self.tokenizer)

    def __call__(self, question: Question) -> dict[str, Any]:
        if not self.busy.acquire(blocking=False):
            raise Refused(429, BUSY)
        try:
            return self._in_turn(self._answer, question)
        finally:
            self.busy.release()

    def walk(self, click: Click) -> dict[str, Any]:
        """The rows of routes that the page has not; a prompt whose states were let go is traced again."""
        return self._in_turn(self._walk, click)

    def look(self, look: Look) -> dict[str, Any]:
        """Logit lens and attention weights, see :class:`Glance`."""
        return self._in_turn(self._look, look)

    def _in_turn(self, answer: Callable[[Any], dict[str, Any]], asked: Any) -> dict[str, Any]:
        if not self.turn.acquire(timeout=PATIENCE):
            raise Refused(429, BUSY)
        try:
            return answer(asked)
        except (ValueError, TypeError, IndexError, OSError, MemoryError) as error:
            raise Refused(400, str(error) or type(error).__name__) from error
        finally:
            self.turn.release()

    def _answer(self, question: Question) -> dict[str, Any]:
        asked = [
            (question.text, question.chat),
            *([(question.other, question.other_chat)] if question.other is not None else []),
        ]
        prompts = [self._prompt(*one) for one in asked]
        found: list[Kept] = []
        for prompt in prompts:
            found.append(self._states(prompt, question.threshold, found))
            found[-1].traces[question.measure].route(-1, question.threshold, question.renormalize)
        return page.kept_payload([(one.number, one.traces) for one in found], question.threshold, question.renormalize)

    def _walk(self, click: Click) -> dict[str, Any]:
        kept = self._states(self._prompt(click.text, click.chat), click.threshold, [])
        found, again = kept.traces[click.measure], kept.number != click.number
        have = [0] * found.n_layers if again else click.have
        if len(have) != found.n_layers:
            raise ValueError(f"have must count the rows of {found.n_layers} layers, got {len(have)}")
        for root in click.roots:
            found.route(root, click.threshold, click.renormalize)
        return packing.pack_rows(found, kept.number, have) | {"again": again, "note": AGAIN if again else ""}

    def _look(self, look: Look) -> dict[str, Any]:
        before, kept = self.passes, self._states(self._prompt(look.text, look.chat), look.threshold, [])
        return self.glance(kept.traces["proximity"], look.states, look.rows) | {
            "note": AGAIN if self.passes > before else ""
        }

    def _prompt(self, text: str, chat: bool) -> tuple[Any, tuple[Any, ...]]:
        """What is traced, and the ids by which it is known."""
        prompt: Any = [{"role": "user", "content": text}] if chat else text
        (ids,) = read_prompts(self.model, self.tokenizer, prompt).ids
        if len(ids) > self.limits.tokens:
            raise Refused(
                413,
                f"the prompt has {len(ids)} tokens and this server traces at most {self.limits.tokens} (--max-tokens)",
            )
        return prompt, (chat, *ids)

    def _states(self, prompt: tuple[Any, tuple[Any, ...]], threshold: float, beside: list[Kept]) -> Kept:
        """A prompt with its states: kept ones, if routes at this threshold can be had from them, or those of a pass.

        States beyond the limits are let go, those used longest ago first, but not those of ``beside``.
        """
        given, key = prompt
        kept = self.kept.get(key)
        if kept is not None and kept.traces["proximity"].floor <= threshold:
            self.kept.move_to_end(key)
            return kept
        if kept is not None:
            self._let_go(key)
        floor, wanted = min(DEFAULT_FLOOR, threshold) or DEFAULT_FLOOR, (threshold, *DEFAULT_THRESHOLDS)
        self.passes += 1
        first = trace(
            self.model, self.tokenizer, given, thresholds=wanted, floor=floor, lazy=True, memory=self.limits.memory // 2
        )
        kept = Kept(self.passes, {"proximity": first, "signed": by_measure(first, "signed")})
        for other in [one for one in self.kept if self.kept[one] not in beside]:
            total = sum(one.nbytes for one in self.kept.values()) + kept.nbytes
            if len(self.kept) < self.limits.prompts and total <= self.limits.memory:
                break
            self._let_go(other)
        self.kept[key] = kept
        return kept

    def _let_go(self, key: tuple[Any, ...]) -> None:
        self.kept.pop(key).traces["proximity"].release()

    def prompt_of(self, shown: Trace | None) -> str | None:
        """The text of a trace, if this model's tokenizer gives the trace's tokens for it: what the page compares a
        new prompt with.
        """
        if shown is None or not shown.token_ids or self.tokenizer is None:
            return None
        text = self.tokenizer.decode(shown.token_ids, skip_special_tokens=True)
        return text if text.strip() and list(self.tokenizer(text)["input_ids"]) == list(shown.token_ids) else None


class Guard:
    """ASGI middleware that turns away what is not from our page, too large or too frequent, before any of it is
    read.
    """

    def __init__(
        self, app: Any, *, port: int, key: str, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.app, self.key, self.limits, self.clock = app, key, limits, clock
        self.hosts = {f"{HOST}:{port}", f"localhost:{port}"} | ({HOST, "localhost"} if port == 80 else set())
        self.times: dict[str, deque[float]] = {"traces": deque(), "clicks": deque()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no websockets
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        try:
            self.check(scope["method"], headers, scope["path"])
        except Refused as refused:
            more = {"Retry-After": "60"} if refused.status == 429 else {}
            answer = JSONResponse(
                {"error": refused.sentence}, refused.status, {**HEADERS, **more, "Connection": "close"}
            )
            return await answer(scope, receive, send)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in HEADERS.items()),
                ]
            await send(message)

        return await self.app(scope, receive, with_headers)

    def check(self, method: str, headers: list[tuple[str, str]], path: str = TRACE) -> None:
        """Raise :class:`Refused` with what is wrong about a request."""
        given = dict(headers)
        if given.get("host", "").lower() not in self.hosts or sum(name == "host" for name, _ in headers) != 1:
            raise Refused(403, "this server answers at its own address alone")
        if "origin" in given and given["origin"].lower() not in {f"http://{host}" for host in self.hosts}:
            raise Refused(403, "this server answers its own page alone")
        if method in ("GET", "HEAD"):
            return
        if not secrets.compare_digest(given.get("x-flowroutes", "").encode(), self.key.encode()):
            raise Refused(403, "this page is of an earlier run of the server: reload it")
        if given.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "a request must be JSON (Content-Type: application/json)")
        length = given.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in given:
            raise Refused(411, "a request must say its length (Content-Length)")
        if int(length) > self.limits.body:
            raise Refused(413, f"the request has {int(length)} bytes and this server reads at most {self.limits.body}")
        kind, most = ("traces", self.limits.per_minute) if path == TRACE else ("clicks", self.limits.clicks)
        now, times = self.clock(), self.times[kind]
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= most:
            raise Refused(429, f"more than {most} requests in a minute; wait a little")
        times.append(now)


def create_app(tracer: Tracer, port: int, shown: Trace | None = None, **options: Any) -> Any:
    """The server as an ASGI application; ``options`` are those of :func:`flowroutes_fast.view.page.trace_html`."""
    key = secrets.token_urlsafe(24)
    settings = {
        "url": TRACE,
        "chat": bool(getattr(tracer.tokenizer, "chat_template", None)),
        "key": key,
        "max_characters": MAX_CHARACTERS,
        "prompt": tracer.prompt_of(shown),
        "model": model_name(tracer.model),
    }
    html = page.trace_html(shown, server=settings, **options)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(html)

    @app.post(TRACE)
    def answer(question: Question) -> JSONResponse:
        return JSONResponse(tracer(question))

    @app.post(ROUTE)
    def walk(click: Click) -> JSONResponse:
        return JSONResponse(tracer.walk(click))

    @app.post(STATE)
    def look(look: Look) -> JSONResponse:
        return JSONResponse(tracer.look(look))

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": error.sentence}, error.status)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse({"error": f"{where or 'the request'}: {first['msg']}"}, 400)

    @app.exception_handler(HTTPException)
    def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"tracing failed ({type(error).__name__}); the server's terminal says more"}, 500)

    return Guard(app, port=port, key=key, limits=tracer.limits)


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0 takes a free one. ``OSError`` with a sentence if the port is taken or not ours
    to take.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"a port lies between 0 and 65535, got {port}")
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen(16)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use: choose another with --port, or 0 for any that is free") from None
        raise OSError(f"cannot listen on port {port}: {error.strerror or error}") from error
    return found


class Server(uvicorn.Server):
    """An interrupt is whose it was: uvicorn would wait for the requests that are being answered."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGINT)
        with super().capture_signals():
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, before)
            yield


def make_server(app: Any) -> Server:
    """A uvicorn server; run it with ``.run(sockets=[listen(port)])``."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=16,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        ws="none",
        server_header=False,
    )
    return Server(config)
