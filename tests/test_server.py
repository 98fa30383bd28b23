"""The page's server over real connections, and ``flowroutes view``."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from chromium import BINARY, Chromium
from families import make

import flowroutes_fast as fr

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from flowroutes_fast.view import command, server

SAID = "alpha beta gamma"


class Tokenizer:
    """A token per letter."""

    is_fast = True

    def __call__(self, text, **_):
        return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids, **_):
        return "".join(chr((i - 3) + (90 if i - 3 < 32 else 0)) for i in ids)


class Served:
    """A server in a thread of this process."""

    def __init__(self, shown=None, **limits):
        self.tracer = server.Tracer(make("llama"), Tokenizer(), server.Limits(**limits))
        self.socket = server.listen(0)
        self.port = self.socket.getsockname()[1]
        self.app = server.create_app(self.tracer, self.port, shown)
        self.server = server.make_server(self.app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()

    def ask(self, body, method="POST", path="/trace", **headers):
        """Status and JSON (or text) of an answer; headers given replace those of the page, None leaves one out."""
        sent = {
            "Host": f"127.0.0.1:{self.port}",
            "Origin": f"http://127.0.0.1:{self.port}",
            "Content-Type": "application/json",
            "X-Flowroutes": self.app.key,
        }
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent |= {"Content-Length": str(len(content))} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(content if method == "POST" else None)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        self.headers = dict(answer.getheaders())
        return answer.status, json.loads(text) if answer.getheader("content-type", "").startswith("application/json") else text


@pytest.fixture(scope="module")
def served():
    found = Served(per_minute=10_000, tokens=40)
    yield found
    found.close()


def test_a_prompt_is_traced(served):
    status, found = served.ask({"text": SAID, "threshold": 0.03})
    assert status == 200
    assert [(one["prompt"], one["measure"]) for one in found["sets"]] == [("A", "proximity"), ("A", "signed")]
    assert found["sets"][0]["thresholds"] == [0.01, 0.03, 0.04]
    assert len(found["data"]) == 2
    assert found["sets"][0]["details"]["texts"]
    status, found = served.ask({"text": SAID, "other": SAID + " delta"})
    assert status == 200
    assert [one["prompt"] for one in found["sets"]] == ["A", "A", "B", "B"]
    assert found["start"]["second"] == len(SAID) + 5


@pytest.mark.parametrize(
    ("headers", "status", "sentence"),
    [
        ({"Host": "evil.example"}, 403, "own address"),
        ({"Host": "127.0.0.1:1"}, 403, "own address"),
        ({"Host": None}, 400, None),
        ({"Origin": "http://evil.example"}, 403, "own page"),
        ({"Origin": "null"}, 403, "own page"),
        ({"X_Flowroutes": "guessed"}, 403, "reload"),
        ({"X_Flowroutes": None}, 403, "reload"),
        ({"Content_Type": "text/plain"}, 415, "JSON"),
        ({"Content_Type": None}, 415, "JSON"),
        ({"Content_Length": "999999999"}, 413, "at most 262144"),
        ({"Content_Length": None, "Transfer_Encoding": "chunked"}, 411, "length"),
    ],
)
def test_requests_of_others_are_turned_away(served, headers, status, sentence):
    found = served.ask({"text": SAID}, **headers)
    assert found[0] == status
    if sentence:
        assert sentence in found[1]["error"]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "JSON"),
        ([1], 400, "dictionary"),
        ({}, 400, "text: Field required"),
        ({"text": ""}, 400, "text"),
        ({"text": 7}, 400, "text"),
        ({"text": "a" * 20_001}, 400, "20000"),
        ({"text": "a" * 41}, 413, "41 tokens and this server traces at most 40"),
        ({"text": SAID, "other": "b" * 50}, 413, "50 tokens"),
        ({"text": "a" * 70}, 400, "context holds 64"),
        ({"text": SAID, "threshold": 1.5}, 400, "threshold"),
        (b'{"text": "\\ud800"}', 400, "unicode string"),
    ],
)
def test_bad_requests_get_one_sentence(served, body, status, sentence):
    found = served.ask(body)
    assert found[0] == status
    assert sentence in found[1]["error"]
    assert "\n" not in found[1]["error"]


def test_other_addresses_and_methods(served):
    assert served.ask(b"", "GET", "/elsewhere")[0] == 404
    assert served.ask(b"", "GET", "/docs")[0] == 404
    assert served.ask(b"", "GET", "/trace")[0] == 405
    assert served.ask(b"", "GET", "/", Host="evil.example")[0] == 403
    status, page = served.ask(b"", "GET", "/")
    assert status == 200
    assert served.app.key in page
    assert served.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert served.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in served.headers
    with pytest.raises(OSError, match="in use"):
        server.listen(served.port)


def test_it_listens_on_this_machine_alone(served):
    assert served.socket.getsockname()[0] == "127.0.0.1"
    others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        if not address.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((address, served.port), timeout=2).close()


def test_one_prompt_at_a_time(served):
    with served.tracer.busy:
        status, found = served.ask({"text": SAID})
    assert status == 429
    assert "another prompt" in found["error"]
    assert served.ask({"text": SAID})[0] == 200


def test_what_only_we_can_mend_is_said_too(served, monkeypatch):
    def fails(question):
        raise RuntimeError("secret")

    monkeypatch.setattr(served.tracer, "_answer", fails)
    status, found = served.ask({"text": SAID})
    assert status == 500
    assert found["error"] == "tracing failed (RuntimeError); the server's terminal says more"
    assert not served.tracer.busy.locked()


def test_rate():
    now = [0.0]
    guard = server.Guard(None, port=80, key="k", limits=server.Limits(per_minute=3), clock=lambda: now[0])
    headers = [("host", "localhost"), ("x-flowroutes", "k"), ("content-type", "application/json"), ("content-length", "9")]
    for _ in range(3):
        guard.check("POST", headers)
    with pytest.raises(server.Refused, match="more than 3 requests"):
        guard.check("POST", headers)
    guard.check("GET", headers)
    now[0] = 60.5
    guard.check("POST", headers)


def test_the_prompt_of_a_trace_file(served):
    tracer = served.tracer
    trace = fr.trace(tracer.model, tracer.tokenizer, SAID)
    assert tracer.prompt_of(trace) == SAID
    trace.token_ids[0] = 0
    assert tracer.prompt_of(trace) is None
    assert tracer.prompt_of(None) is None


@pytest.mark.skipif(BINARY is None, reason="no chromium was found")
def test_prompts_typed_into_the_page():
    model, browser = Served(per_minute=4, tokens=60), Chromium()
    notice, count = "document.getElementById('notice').textContent", "document.getElementById('count').textContent"

    def ask(text, button="run"):
        browser.run(f"document.getElementById('text').value = {json.dumps(text)}, document.getElementById('{button}').click()")
        browser.wait("!flowroutes.state.asking", 60)

    try:
        browser.open(f"http://127.0.0.1:{model.port}/", ready="Boolean(window.flowroutes)")
        assert browser.run("document.activeElement.id") == "text"
        assert browser.run("document.getElementById('run-other').disabled")
        for letter in "<img src=x onerror=alert(1)>":
            browser.key(letter)
        browser.key("Enter", modifiers=2)
        browser.wait("Boolean(flowroutes.scene)", 60)
        assert browser.run("document.querySelectorAll('#prompt button').length") == 28
        trace = fr.trace(model.tracer.model, model.tracer.tokenizer, "<img src=x onerror=alert(1)>")
        assert browser.run(count).startswith(f"{len(trace.route(-1, 0.04).edges)} sub-edge")
        ask("<img src=y>", "run-other")
        assert browser.run(count).startswith("A: ")
        assert browser.run("flowroutes.state.compare") == "prompt"
        ask("a" * 62)
        assert "Not traced: the prompt has 62 tokens" in browser.run(notice)
        assert browser.run(count).startswith("A: ")
        ask(SAID)
        assert browser.run(count).endswith("edges")
        ask(SAID)
        assert "more than 4 requests in a minute" in browser.run(notice)
        model.close()
        ask(SAID)
        assert "does not answer" in browser.run(notice)
        assert not browser.of("dialog") + browser.of("exception")
        assert all(url.startswith(f"http://127.0.0.1:{model.port}/") for url in browser.of("request"))
    finally:
        browser.close()
        model.close()


@pytest.fixture
def files(tmp_path):
    model = make("llama")
    texts = {"a": SAID, "b": SAID + " delta"}
    for name, text in texts.items():
        for measure in ("proximity", "signed"):
            fr.trace(model, Tokenizer(), text, measure=measure).save(tmp_path / f"{name}-{measure}.safetensors")
    return tmp_path


def test_view_writes_a_page(files, monkeypatch):
    said = []
    options = {"say": said.append}
    page = command.view([files / "a-proximity.safetensors"], **options)
    assert page == files / "a-proximity.html"
    assert "MB" in said[0]
    sets = lambda path: json.loads(re.search(r'id="about-data">(.*?)</script>', path.read_text(), re.S)[1])["sets"]  # noqa: E731
    assert [(one["prompt"], one["measure"]) for one in sets(page)] == [("A", "proximity")]
    four = [files / f"{name}.safetensors" for name in ("a-proximity", "b-signed", "a-signed", "b-proximity")]
    page = command.view(four, out=files / "page.html", threshold=0.1, position=3, **options)
    assert sorted((one["prompt"], one["measure"]) for one in sets(page)) == [
        ("A", "proximity"),
        ("A", "signed"),
        ("B", "proximity"),
        ("B", "signed"),
    ]
    with pytest.raises(ValueError, match="one trace too many"):
        command.view([*four, four[0]], out=files / "page.html")
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", lambda address: opened.append(address) or True)
    command.view(four[:1], open_page=True, **options)
    assert opened == [(files / "a-proximity.html").as_uri()]


def test_view_with_a_model(files, monkeypatch):
    loading = importlib.import_module("flowroutes_fast.loading.load")
    monkeypatch.setattr(loading, "load", lambda name: (make("llama"), Tokenizer()))
    page = command.view([files / "a-proximity.safetensors"], model="any")
    sets = json.loads(re.search(r'id="about-data">(.*?)</script>', page.read_text(), re.S)[1])["sets"]
    assert [one["measure"] for one in sets] == ["proximity", "signed"]
    assert sets[0]["details"]["texts"]
    monkeypatch.setattr(loading, "load", lambda name: (make("recurrent_gemma"), Tokenizer()))
    with pytest.raises(ValueError, match="another model"):
        command.view([files / "a-proximity.safetensors"], model="any")


def test_bad_files_and_options_get_one_sentence(files):
    good = files / "a-proximity.safetensors"
    (files / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    (files / "route.json").write_text("{}")
    (files / "text.safetensors").write_text("{}")
    header = good.read_bytes().replace(b'"version":"3"', b'"version":"9"')
    (files / "newer.safetensors").write_bytes(header)
    for words, sentence in (
        (["view", files / "cut.safetensors"], "damaged trace file"),
        (["view", files / "route.json"], "is no trace: give the trace.safetensors"),
        (["view", files / "text.safetensors"], "damaged trace file, or none"),
        (["view", files / "newer.safetensors"], "of version 9; this release reads version 3"),
        (["view", files / "none.safetensors"], "no trace file at"),
        (["view"], "give a trace file"),
        (["view", good, "--position", "77"], "position 77 is out of range"),
        (["view", good, "--threshold", "2"], "threshold must lie in"),
        (["view", good, "--serve", "--out", "x.html"], "exclude one another"),
        (["view", "--serve", "--port", "70000"], "a port lies between"),
        (["view", "--serve", "--max-tokens", "0"], "must be positive"),
    ):
        found = runner(words)
        assert sentence in found, words
        assert found.count("\n") == 0


def runner(words):
    """What the command raises; :func:`main` prints it as one sentence."""
    from typer.testing import CliRunner

    from flowroutes_fast.cli import app

    error = CliRunner().invoke(app, list(map(str, words))).exception
    assert isinstance(error, (ValueError, OSError, IndexError))
    return str(error)


def test_serving_from_the_command_line(files):
    """A whole run: the port is said, the page answers, a second server on the port is refused, Ctrl+C ends the first."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import importlib; l = importlib.import_module('flowroutes_fast.loading.load'); from test_server import Tokenizer, make; l.load = lambda n: (make('llama'), Tokenizer()); from flowroutes_fast.cli import main; main()"
    words = [sys.executable, "-c", code, "view", str(files / "a-proximity.safetensors"), "--serve", "--no-open", "--port"]
    process = subprocess.Popen([*words, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", address)[1])
        end = time.monotonic() + 30
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/")
                text = connection.getresponse().read().decode()
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)
        assert json.loads(re.search(r'id="about-data">(.*?)</script>', text, re.S)[1])["prompt"] == SAID
        with pytest.raises(OSError, match=f"port {port} is in use: choose another with --port"):
            command.serve([], port=port)
    finally:
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert "stopped" in out
