"""The page's server over real connections, and ``flowroutes view``."""

from __future__ import annotations

import base64
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
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from chromium import BINARY, Chromium
from families import make

import flowroutes_fast as fr
from flowroutes_fast.cli.interrupt import SENTENCE

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from flowroutes_fast.view import command, server
from flowroutes_fast.view.details import details

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
        sent |= {"Content-Length": str(len(content))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
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
        return answer.status, json.loads(text) if answer.getheader("content-type", "").startswith(
            "application/json"
        ) else text


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
    assert found["sets"][0]["lazy"]
    status, found = served.ask({"text": SAID, "other": SAID + " delta"})
    assert status == 200
    assert [one["prompt"] for one in found["sets"]] == ["A", "A", "B", "B"]
    assert found["start"]["second"] == len(SAID) + 5


def rows_of(packed, layers, tokens):
    """What an answer holds, unpacked; and its rows as (layer, position)."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    found = {name: np.frombuffer(raw, kind, size, at) for name, (kind, at, size) in packed["blocks"].items()}
    return found, {divmod(int(row), tokens) for row in found["rows"]}


def click(found, **changes):
    """The question that the page asks about its first set."""
    one = found["sets"][0]
    return {
        "text": SAID,
        "number": one["number"],
        "have": one["have"],
        "roots": [5],
        "threshold": 0.02,
        "renormalize": True,
        **changes,
    }


def passes(tracer):
    """Counts how often the last block of the model runs."""
    ran = []
    tracer.model.model.layers[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


def test_clicks_are_answered_from_kept_states():
    tracer = server.Tracer(make("llama"), Tokenizer())
    ran = passes(tracer)
    found = tracer(server.Question(text=SAID, threshold=0.1))
    assert len(ran) == 1
    tokens, reached = len(SAID), set()
    one = found["sets"][0]
    _, rows = rows_of({**one, "data": found["data"][0]}, 3, tokens)
    model = make("llama")
    lazy = fr.trace(model, Tokenizer(), SAID, lazy=True, thresholds=(0.1, 0.01, 0.03, 0.04))
    lazy.route(-1, 0.1)
    for layer in range(3):
        reached |= {(layer, int(q)) for q in lazy.evaluated(layer)}
    assert rows == reached  # nothing that the first route does not reach
    assert 0 < len(rows) < 3 * tokens
    assert rows_of({**found["sets"][1], "data": found["data"][1]}, 3, tokens)[1] == set()
    ran.clear()
    answer = tracer.walk(server.Click(**click(found)))
    assert not answer["again"]
    more = rows_of(answer, 3, tokens)[1]
    assert more
    assert max(q for _, q in more) <= 5
    assert sum(answer["have"]) == len(rows) + len(more)
    nothing = tracer.walk(server.Click(**click(found, have=answer["have"])))
    assert rows_of(nothing, 3, tokens)[1] == set()
    tracer.walk(server.Click(**click(found, measure="signed", have=[0, 0, 0])))
    assert not ran


@pytest.mark.parametrize("measure", ["proximity", "signed"])
@pytest.mark.parametrize("memory", [2**31, 100_000])
def test_both_measures_come_from_one_pass(measure, memory):
    tracer = server.Tracer(make("llama"), Tokenizer(), server.Limits(memory=memory))
    found = tracer(server.Question(text=SAID))
    (kept,) = tracer.kept.values()
    full = fr.trace(tracer.model, Tokenizer(), SAID, measure=measure)
    for roots, threshold, renormalize in (([15], 0.04, True), ([7], 0.02, False), ([3], 0.003, True)):
        tracer.walk(
            server.Click(**click(found, roots=roots, threshold=threshold, renormalize=renormalize, measure=measure))
        )
        mine, theirs = (one.route(roots, threshold, renormalize).edges for one in (kept.traces[measure], full))
        assert mine.iloc[:, :5].equals(theirs.iloc[:, :5])
        np.testing.assert_allclose(mine["importance"], theirs["importance"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("memory", [2**31, 100_000])
def test_states_are_looked_at_without_a_pass(family, memory):
    tracer = server.Tracer(make(family), Tokenizer(), server.Limits(memory=memory))
    tracer(server.Question(text=SAID))
    about = details(tracer.model, Tokenizer(), fr.trace(tracer.model, Tokenizer(), SAID))
    n, layers = len(SAID), len(tracer.model.model.layers) if family != "gpt_neox" else len(tracer.model.gpt_neox.layers)
    states = [divmod(int(state), n) for state in about.state if state % n in (0, 9)]
    for begin in range(0, len(states), 16):
        found = tracer.look(server.Look(text=SAID, states=states[begin : begin + 16], rows=[(layers - 1, 9)]))
        assert [tuple(one[:2]) for one in found["lens"]] == states[begin : begin + 16]
        for height, position, guesses in found["lens"]:
            at = about.state.tolist().index(height * n + position)
            assert [p for _, p in guesses] == pytest.approx(about.lens_probability[at], abs=1e-4)
            assert [text for text, _ in guesses] == [about.texts[i] for i in about.lens_token[at]]
    row = about.row.tolist().index((layers - 1) * n + 9)
    for head, kept in enumerate(found["attention"][0][2]):
        assert [w for _, w in kept] == pytest.approx([w for w in about.weight[row, head] if w > 0], abs=1e-4)
        assert kept[0][0] == about.key[row, head, 0]
    assert tracer.passes == 1
    with pytest.raises(server.Refused, match="out of range"):
        tracer.look(server.Look(text=SAID, states=[(99, 0)]))


@pytest.mark.parametrize("limits", [{"prompts": 2}, {"memory": 90_000}])
def test_the_oldest_states_are_let_go_and_traced_again(limits):
    tracer = server.Tracer(make("llama"), Tokenizer(), server.Limits(**limits))
    found = tracer(server.Question(text=SAID))
    first = next(iter(tracer.kept.values())).traces["proximity"]
    for text in ("b" * 30, "c" * 30, "d" * 30):
        tracer(server.Question(text=text))
        assert sum(one.nbytes for one in tracer.kept.values()) <= tracer.limits.memory
    assert len(tracer.kept) <= 2
    with pytest.raises(ValueError, match="released"):
        first.evaluate()
    answer = tracer.walk(server.Click(**click(found)))
    assert answer["again"]
    assert answer["note"] == server.AGAIN
    assert answer["number"] == 5
    assert rows_of(answer, 3, len(SAID))[1]
    assert not tracer.walk(server.Click(**click(found, number=5, have=answer["have"])))["again"]
    tracer(server.Question(text="e" * 30, other="f" * 30))  # two that are compared are both kept
    assert len(tracer.kept) == 2


def test_a_lower_floor_is_another_pass_a_higher_threshold_none():
    tracer = server.Tracer(make("llama"), Tokenizer())
    for threshold, passed in ((0.04, 1), (0.2, 1), (0.0005, 2), (0.04, 2)):
        tracer(server.Question(text=SAID, threshold=threshold))
        assert tracer.passes == passed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"roots": [16]}, "position 16 is out of range"),
        ({"roots": []}, "at least 1 item"),
        ({"roots": [-1]}, "greater than or equal to 0"),
        ({"have": [0]}, "have must count the rows of 3 layers, got 1"),
        ({"measure": "mass"}, "measure"),
        ({"threshold": 1}, "less than 1"),
        ({"text": "a" * 41}, "at most 40"),
        ({"chat": True}, "chat template"),
    ],
)
def test_bad_clicks_get_one_sentence(served, changes, sentence):
    found = served.ask({"text": SAID})[1]
    status, answer = served.ask(click(found, **changes), path="/route")
    assert status in (400, 413)
    assert sentence in answer["error"]
    assert "\n" not in answer["error"]
    assert served.ask(click(found), path="/route")[0] == 200
    assert served.ask(click(found), path="/route", X_Flowroutes="guessed")[0] == 403
    assert served.ask({"text": SAID}, path="/state", Host="evil.example")[0] == 403


def test_a_model_that_changed_is_said(served):
    found = served.ask({"text": SAID})[1]
    with torch.no_grad():
        served.tracer.model.model.layers[0].mlp.up_proj.weight.mul_(1.001)
    status, answer = served.ask(click(found, have=[0, 0, 0], roots=[4], threshold=0.002), path="/route")
    assert status == 400
    assert "the model has changed since it was traced" in answer["error"]
    served.tracer.kept.clear()


@pytest.mark.parametrize(
    ("headers", "status", "sentence"),
    [
        ({"Host": "evil.example"}, 403, "own address"),
        ({"Host": "127.0.0.1:1"}, 403, "own address"),
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
    assert served.ask(b"", "GET", "/", Host=None)[0] == 400
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
    guard = server.Guard(None, port=80, key="k", limits=server.Limits(per_minute=3, clicks=1), clock=lambda: now[0])
    headers = [
        ("host", "localhost"),
        ("x-flowroutes", "k"),
        ("content-type", "application/json"),
        ("content-length", "9"),
    ]
    for _ in range(3):
        guard.check("POST", headers)
    with pytest.raises(server.Refused, match="more than 3 requests"):
        guard.check("POST", headers)
    guard.check("GET", headers)
    guard.check("POST", headers, "/route")  # clicks have a limit of their own
    with pytest.raises(server.Refused, match="more than 1 requests"):
        guard.check("POST", headers, "/state")
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
        browser.run(
            f"document.getElementById('text').value = {json.dumps(text)}, document.getElementById('{button}').click()"
        )
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


@pytest.mark.skipif(BINARY is None, reason="no chromium was found")
def test_clicks_in_the_page():
    """Roots, thresholds, measures and two prompts in a browser, against full traces; then states that are gone, and
    a server that is.
    """
    model, browser = Served(tokens=60, prompts=2), Chromium()
    ran, text = passes(model.tracer), SAID + " delta"
    full = {measure: fr.trace(make("llama"), Tokenizer(), text, measure=measure) for measure in ("proximity", "signed")}
    notice, count = "document.getElementById('notice').textContent", "document.getElementById('count').textContent"
    refine = "!flowroutes.state.asking && !flowroutes.state.walking && !flowroutes.state.looking"

    def do(script):
        browser.run(script)
        browser.wait(refine, 60)
        return browser.run(count)

    def ask(text):
        do(f"document.getElementById('text').value = {json.dumps(text)}, document.getElementById('run').click()")

    def counted(route):
        return f"{len(route.edges):,} sub-edge"

    try:
        browser.open(f"http://127.0.0.1:{model.port}/", ready="Boolean(window.flowroutes)")
        ask(text)
        browser.run("ran = flowroutes.state.sets[0].have.reduce((a, b) => a + b)")
        assert browser.run("ran") < 3 * len(text)
        do(f"document.querySelector('#prompt [data-position=\"{7}\"]').click()")
        ran.clear()  # (the lens was fitted on the first tokens)
        for measure in ("proximity", "signed"):
            do(f"flowroutes.set({{measure: '{measure}'}})")
            for root, threshold, renormalize in (
                (7, 0.04, True),
                (21, 0.015, True),
                (12, 0.003, False),
                (3, 0.3, True),
            ):
                said = do(
                    f"flowroutes.set({{root: {root}, threshold: {threshold}, renormalize: {json.dumps(renormalize)}}})"
                )
                assert said.startswith(counted(full[measure].route(root, threshold, renormalize))), (measure, root)
                assert not browser.run(notice)
        said = do(
            "flowroutes.set({root: 20, second: 9, compare: 'position', threshold: 0.01, measure: 'proximity', "
            "renormalize: true})"
        )
        parts = [counted(full["proximity"].route(root, 0.01)) for root in (20, 9)]
        assert said.startswith(f"A: {parts[0]}")
        assert f"B: {parts[1]}" in said
        do("flowroutes.set({compare: '', root: 20})")
        do("flowroutes.choose({type: 'node', node: [...flowroutes.scene.nodes.values()].find((n) => n.root)})")
        assert browser.run("document.querySelectorAll('#panel table').length") == 2  # what enters, and the lens
        assert not ran
        for other in ("bb", "cc"):  # the states of the first prompt are let go
            model.tracer(server.Question(text=other))
        do("flowroutes.set({root: 2, threshold: 0.002})")
        assert "traced again" in browser.run(notice)
        assert browser.run(count).startswith(counted(full["proximity"].route(2, 0.002)))
        do("flowroutes.set({root: 4})")
        assert not browser.run(notice)
        model.close()
        before = browser.run(count)
        do("flowroutes.set({root: 21, threshold: 0.0011})")
        assert "This route is not known: the server does not answer" in browser.run(notice)
        assert browser.run("[flowroutes.state.root, flowroutes.state.threshold]") == [4, 0.002]
        assert browser.run(count) == before
        assert not browser.of("dialog") + browser.of("exception")
    finally:
        browser.close()
        model.close()


@pytest.mark.skipif(BINARY is None, reason="no chromium was found")
def test_open_decisions_are_settled_by_the_server(monkeypatch):
    for module in ("importances", "rows"):  # intervals also where evaluating everything is cheaper
        monkeypatch.setattr(f"flowroutes_fast.tracing.{module}.FEW_KEYS", 0)
    text = SAID + " delta"
    model, browser = Served(), Chromium()
    trace = fr.trace(model.tracer.model, Tokenizer(), text)
    opened = [t for t in (0.0022, 0.0034, 0.0051, 0.0073, 0.0093, 0.0122) if refined(trace, t) is None]
    assert len(opened) > 2
    try:
        browser.open(f"http://127.0.0.1:{model.port}/", ready="Boolean(window.flowroutes)")
        browser.run("flowroutes.set({renormalize: false})")
        browser.run(
            f"document.getElementById('text').value = {json.dumps(text)}, document.getElementById('run').click()"
        )
        browser.wait("Boolean(flowroutes.scene) && !flowroutes.state.asking", 60)
        for threshold in opened:
            browser.run(f"flowroutes.set({{threshold: {threshold}, renormalize: false}})")
            browser.wait("!flowroutes.state.walking", 60)
            assert browser.run("document.getElementById('notice').hidden")
            edges = len(trace.route(-1, threshold, False).edges)
            assert browser.run("document.getElementById('count').textContent").startswith(f"{edges:,} sub-edge")
        assert model.tracer.passes == 1
    finally:
        browser.close()
        model.close()


def refined(trace, threshold):
    """A route that the trace alone decides, or None."""
    try:
        return replace(trace, refine=None).route(-1, threshold, False)
    except ValueError:
        return None


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
        (["view", "--serve", "--memory", "much"], "memory"),
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


SERVING = """
import importlib, os, signal, sys, time
signal.signal(signal.SIGINT, getattr(signal, sys.argv.pop(1)))
here = sys.argv.pop(1)
sys.path[:0] = [here, os.path.dirname(here)]
from test_server import Tokenizer, make
importlib.import_module("flowroutes_fast.loading.load").load = lambda name: (make("llama"), Tokenizer())
if sys.argv.pop(1) == "slow":
    from flowroutes_fast.view import server
    server.trace = lambda *given, **more: (os.write(2, b"tracing\\n"), time.sleep(60))
from flowroutes_fast.cli import main
main()
"""


def from_the_command_line(file, handler="default_int_handler", speed=""):
    """A process that serves, its port, and a connection that stays open; its page."""
    words = [
        sys.executable,
        "-c",
        SERVING,
        handler,
        os.path.dirname(__file__),
        speed,
        "view",
        str(file),
        "--serve",
        "--no-open",
        "--port",
    ]
    process = subprocess.Popen([*words, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())[1])
    idle = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    idle.request("GET", "/")
    return process, port, idle, idle.getresponse().read().decode()


def interrupted(process):
    """What a server says when it is interrupted, and after how many seconds it has ended."""
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    return process.returncode, error, time.monotonic() - start


def test_serving_from_the_command_line(files):
    """A whole run: the port is said, the page answers, a second server on the port is refused, Ctrl+C ends the
    first beside an open connection.
    """
    process, port, idle, text = from_the_command_line(files / "a-proximity.safetensors", "SIG_IGN")
    try:
        assert json.loads(re.search(r'id="about-data">(.*?)</script>', text, re.S)[1])["prompt"] == SAID
        with pytest.raises(OSError, match=f"port {port} is in use: choose another with --port"):
            command.serve([], port=port)
    finally:
        code, error, seconds = interrupted(process)
    assert (code, error) == (130, f"{SENTENCE}\n")
    assert seconds < 2
    assert idle.sock is not None


def test_an_interrupt_does_not_wait_for_an_answer(files):
    process, port, _, text = from_the_command_line(files / "a-proximity.safetensors", speed="slow")
    try:
        key = re.search(r'data-key="(.*?)"', text)[1]
        asking = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asking.request(
            "POST", "/trace", json.dumps({"text": SAID}), {"Content-Type": "application/json", "X-Flowroutes": key}
        )
        assert process.stderr.readline() == "tracing\n"
    finally:
        code, error, seconds = interrupted(process)
    assert (code, error) == (130, f"{SENTENCE}\n")
    assert seconds < 2
    with pytest.raises((OSError, http.client.HTTPException)):
        asking.getresponse()
