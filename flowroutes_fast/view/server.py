"""A local server for the instrument: its page has a box for prompts, which this process traces.

It listens on 127.0.0.1 and answers its own page alone: the ``Host`` must be this address (no rebinding of names), an ``Origin`` must be this
server, and every request for a trace carries a key that only the page knows. Requests are limited in size and number, and one prompt is traced
at a time.
"""

from __future__ import annotations

import errno
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowroutes_fast.tracing.prompts import token_ids
from flowroutes_fast.tracing.trace import DEFAULT_FLOOR, DEFAULT_THRESHOLDS, model_name, trace
from flowroutes_fast.view import page
from flowroutes_fast.view.details import details

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
    from flowroutes_fast.results.trace import Trace

HOST = "127.0.0.1"
MAX_CHARACTERS = 20_000  # of a prompt
DETAIL_STATES = 1_000  # with a logit lens: above it those of the route, so that an answer does not wait for the others
HEADERS = {
    "Cache-Control": "no-store", "Content-Security-Policy": "frame-ancestors 'none'", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
}  # fmt: skip


@dataclass
class Limits:
    """Of a request: ``body`` bytes, ``tokens`` of a prompt; ``per_minute`` requests for a trace."""

    body: int = 256 * 1024
    tokens: int = 2048
    per_minute: int = 30


class Question(BaseModel):
    """What the page asks for: the trace of a prompt, or of two that are compared."""

    text: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    other: str | None = Field(None, min_length=1, max_length=MAX_CHARACTERS)
    threshold: float = Field(0.04, ge=0, lt=1)


class Refused(Exception):
    """A request that is answered with one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass
class Tracer:
    """Traces the prompts of one model, one at a time."""

    model: Any
    tokenizer: Any
    limits: Limits = field(default_factory=Limits)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, question: Question) -> dict[str, Any]:
        if not self.busy.acquire(blocking=False):
            raise Refused(429, "another prompt is being traced; try again when it is done")
        try:
            return self._answer(question)
        except (ValueError, TypeError, IndexError, OSError, MemoryError) as error:
            raise Refused(400, str(error) or type(error).__name__) from error
        finally:
            self.busy.release()

    def _answer(self, question: Question) -> dict[str, Any]:
        found: list[Any] = []
        floor = min(DEFAULT_FLOOR, question.threshold) or DEFAULT_FLOOR
        for ids in [self._ids(text) for text in (question.text, question.other) if text is not None]:
            one = trace(self.model, self.tokenizer, ids, thresholds=(question.threshold, *DEFAULT_THRESHOLDS), floor=floor)
            found += [one, trace(self.model, self.tokenizer, ids, measure="signed", floor=floor), self._details(one)]
        first, signed, about, other, other_signed, other_about = found if len(found) == 6 else [*found, None, None, None]
        return page.payload(
            first, other, signed=signed, other_signed=other_signed, details=about, other_details=other_about, threshold=question.threshold
        )

    def _ids(self, text: str) -> list[int]:
        ids = token_ids(self.model, self.tokenizer, text)
        if len(ids) > self.limits.tokens:
            raise Refused(413, f"the prompt has {len(ids)} tokens and this server traces at most {self.limits.tokens} (--max-tokens)")
        return ids

    def _details(self, found: Trace) -> Any:
        try:
            return details(self.model, self.tokenizer, found, max_states=DETAIL_STATES)
        except ValueError:  # weights on disk: the page goes without
            return None

    def prompt_of(self, shown: Trace | None) -> str | None:
        """The text of a trace, if this model's tokenizer gives the trace's tokens for it: what the page compares a new prompt with."""
        if shown is None or not shown.token_ids or self.tokenizer is None:
            return None
        text = self.tokenizer.decode(shown.token_ids, skip_special_tokens=True)
        return text if text.strip() and list(self.tokenizer(text)["input_ids"]) == list(shown.token_ids) else None


class Guard:
    """ASGI middleware that turns away what is not from our page, too large or too frequent, before any of it is read."""

    def __init__(self, app: Any, *, port: int, key: str, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.key, self.limits, self.clock = app, key, limits, clock
        self.hosts = {f"{HOST}:{port}", f"localhost:{port}"} | ({HOST, "localhost"} if port == 80 else set())
        self.times: deque[float] = deque()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no websockets
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        try:
            self.check(scope["method"], headers)
        except Refused as refused:
            more = {"Retry-After": "60"} if refused.status == 429 else {}
            answer = JSONResponse({"error": refused.sentence}, refused.status, {**HEADERS, **more, "Connection": "close"})
            return await answer(scope, receive, send)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.lower().encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        return await self.app(scope, receive, with_headers)

    def check(self, method: str, headers: list[tuple[str, str]]) -> None:
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
        now = self.clock()
        while self.times and self.times[0] <= now - 60:
            self.times.popleft()
        if len(self.times) >= self.limits.per_minute:
            raise Refused(429, f"more than {self.limits.per_minute} requests in a minute; wait a little")
        self.times.append(now)


def create_app(tracer: Tracer, port: int, shown: Trace | None = None, **options: Any) -> Any:
    """The server as an ASGI application; ``options`` are those of :func:`flowroutes_fast.view.page.trace_html`."""
    key = secrets.token_urlsafe(24)
    settings = {
        "url": "/trace",
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

    @app.post("/trace")
    def answer(question: Question) -> JSONResponse:
        return JSONResponse(tracer(question))

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
    """A socket on 127.0.0.1; port 0 takes a free one. ``OSError`` with a sentence if the port is taken or not ours to take."""
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


def make_server(app: Any) -> uvicorn.Server:
    """A uvicorn server; run it with ``.run(sockets=[listen(port)])``."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, limit_concurrency=16, timeout_keep_alive=5, timeout_graceful_shutdown=2, ws="none",
        server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)
