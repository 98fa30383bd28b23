"""Chats: whose message a token is, in traces, routes and their files, and in every page."""

from __future__ import annotations

import re
import string
from dataclasses import replace

import pytest
from chromium import BINARY, Chromium
from families import make
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import flowroutes_fast as fr
from flowroutes_fast.tracing.prompts import of_chat

TEMPLATE = (
    "{% if messages[0].role != 'system' %}#sys|kind;{% endif %}{% for m in messages %}#{{ m.role[:3] }}|{{ "
    "m.content | trim }};{% endfor %}#ass|"
)
CHAT = [
    {"role": "user", "content": " ab "},
    {"role": "assistant", "content": "u"},
    {"role": "user", "content": ";#use|x"},
]
TEXT = "#sys|kind;#use|ab;#ass|u;#use|;#use|x;#ass|"


def letters(template=TEMPLATE):
    """A tokenizer with a token per letter, and a chat template."""
    vocabulary = {letter: 3 + i for i, letter in enumerate(string.printable[:95])} | {"?": 2}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?")
    made.chat_template = template
    return made


def said(tokenizer, messages):
    ids, chat = of_chat(tokenizer, messages)
    return [(role, "".join(tokenizer.convert_ids_to_tokens(ids[first:stop]))) for role, first, stop in chat]


def test_messages_are_found_among_the_tokens():
    tokenizer = letters()
    ids, chat = of_chat(tokenizer, CHAT)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == TEXT
    assert chat == [("system", 5, 9), ("user", 15, 17), ("assistant", 23, 24), ("user", 30, 37)]
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "use"}]
    assert said(tokenizer, system) == [("system", "s"), ("user", "use")]
    assert said(tokenizer, [{"role": "user", "content": ""}]) == [("system", "kind")]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", [("user", "ab")]),
        (
            "{% for m in messages %}{{ raise_exception('no') if m.role == 'system' }}<{{ m.content }}>{% endfor %}",
            [("user", "ab")],
        ),
        ("{% for m in messages %}<{{ m.content | upper }}>{% endfor %}", []),  # another text than was given
        ("<{{ messages | length }}>", []),
        ("{% for m in messages %}<{{ m.content }}|{{ m.content }}>{% endfor %}", []),
    ],
)
def test_what_is_not_found_is_not_named(template, expected):
    assert said(letters(template), [{"role": "user", "content": "ab"}]) == expected


def test_a_tokenizer_without_offsets_names_nothing():
    class Slow:
        chat_template = "x"

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

        def __call__(self, text, add_special_tokens=True, **more):
            if more:
                raise NotImplementedError
            return {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    assert of_chat(Slow(), CHAT) == ([3 + ord(letter) % 90 for letter in " ab "], [])


def test_traces_and_routes_say_whose_a_token_is(tmp_path):
    model, tokenizer = make("llama"), letters()
    chat = of_chat(tokenizer, CHAT)[1]
    full, lazy = fr.trace(model, tokenizer, CHAT), fr.trace(model, tokenizer, CHAT, lazy=True)
    both = fr.trace(model, tokenizer, [CHAT, CHAT[:1]])
    assert full.chat == lazy.chat == lazy.complete().chat == full.route().chat == both[0].chat == chat
    assert both[1].chat == chat[:2]
    assert fr.trace(model, tokenizer, TEXT).chat == []
    assert fr.load_trace(full.save(tmp_path / "t.safetensors")).chat == chat
    assert fr.load_route(full.route().save(tmp_path / "r.json")).chat == chat
    for wrong in ([("user", 5, 5)], [("user", 0, 99)], [("user", 4, 9), ("user", 8, 10)], [("user", -1, 3)]):
        with pytest.raises(fr.DamagedFile, match="chat"):
            fr.load_trace(replace(full, chat=wrong).save(tmp_path / "w.safetensors"))
        with pytest.raises(fr.DamagedFile, match="chat"):
            fr.load_route(replace(full.route(), chat=wrong).save(tmp_path / "w.json"))


def test_generated_tokens_are_the_assistants():
    tokenizer = letters()
    running = fr.generate(make("llama"), tokenizer, CHAT[:1], 3, do_sample=False)
    assert len(list(running)) == 3
    count = len(running.trace.tokens)
    assert running.trace.chat == [("system", 5, 9), ("user", 15, 17), ("assistant", 23, count)]
    assert count in (25, 26)


@pytest.fixture(scope="module")
def browser():
    if BINARY is None:
        pytest.skip("no chromium was found")
    found = Chromium()
    yield found
    assert not [event for event in found.events if event[0] in ("dialog", "exception", "log")]
    found.close()


@pytest.fixture(scope="module")
def trace():
    return fr.trace(make("llama"), letters(), CHAT)


def touched_by(route):
    return set(route.edges["source"]) | set(route.edges["target"])


def columns(browser):
    return browser.run("flowroutes.scene.shown")


SHOWN = (
    "[...document.querySelectorAll('#prompt [data-position]')].filter((b) => !b.hidden).map((b) => +b.dataset.position)"
)


def test_the_page_folds_the_template(browser, trace, tmp_path):
    browser.open(trace.to_html(tmp_path / "page.html", threshold=0.15))
    messages = {i for _, first, stop in trace.chat for i in range(first, stop)}
    touched = touched_by(trace.route(threshold=0.15))
    template = set(range(len(trace.tokens))) - messages
    assert touched & template  # stays
    assert template - touched  # goes
    assert set(columns(browser)) == set(browser.run(SHOWN)) == messages | touched
    labels = browser.run("[...document.querySelectorAll('#prompt .role')].map((b) => b.textContent)")
    assert labels == ["system", "user", "assistant", "user"]
    assert browser.run("document.querySelectorAll('#prompt .gap:not([hidden])').length") > 0
    picture = browser.run("flowroutes.pictureSvg()")
    assert re.findall(r'font-weight="700"[^>]*>(system|user|assistant)<', picture)
    browser.run(
        "flowroutes.choose({type: 'node', node: [...flowroutes.scene.nodes.values()].find((n) => n.column === "
        "36 || n.root)})"
    )
    assert "message" in browser.run("document.getElementById('panel').textContent")
    browser.key("t")
    assert columns(browser) == browser.run(SHOWN) == list(range(len(trace.tokens)))
    assert not browser.run("document.getElementById('fold').checked")
    assert browser.run("document.querySelectorAll('#prompt .gap:not([hidden])').length") == 0
    browser.run("document.getElementById('fold').click()")
    assert set(columns(browser)) == messages | touched
    browser.run("flowroutes.set({root: 10, threshold: 0.5})")  # a root in the template stays where it can be seen
    assert 10 in columns(browser)


def test_the_page_of_a_route_folds_the_template(browser, trace, tmp_path):
    messages = {i for _, first, stop in trace.chat for i in range(first, stop)}
    whole = trace.route(threshold=0.005, renormalize=False)
    some = whole.edges["source"].isin(messages | {40}) & whole.edges["target"].isin(messages | {42})
    route = replace(whole, edges=whole.edges[some].reset_index(drop=True))
    browser.open(route.to_html(tmp_path / "route.html"), ready="Boolean(document.getElementById('graph'))")
    hidden = {
        i
        for i, one in enumerate(browser.run("[...document.querySelectorAll('.prompt > span')].map((s) => s.hidden)"))
        if one
    }
    assert hidden == set(range(len(trace.tokens))) - messages - touched_by(route)
    gone = browser.run("[...document.querySelectorAll('#graph > .place')].map((g) => g.style.display === 'none')")
    assert {i for i, one in enumerate(gone) if one} == hidden
    ends = """[...document.querySelectorAll('#edges > .edge')].map((e, i) => {
        const b = e.querySelector('.line').getBoundingClientRect(), edge = data.edges[i], at = (n) => {
            const node = document.querySelectorAll('#nodes > .node')[n];
            const c = node.querySelector('circle').getBoundingClientRect();
            return c.left + c.width / 2;
        };
        return [b.left, b.right, at(edge.from), at(edge.to), edge.source === edge.target]; })"""
    places = (
        "[...document.querySelectorAll('#nodes > .node circle:first-of-type')].map((c) => "
        "c.getBoundingClientRect().left)"
    )
    found, folded = browser.run(ends), browser.run(places)
    crossing = [one for one in found if not one[4]]
    assert crossing
    for left, right, start, end, _ in crossing:  # curves still join their nodes
        assert (left, right) == pytest.approx((start, end), abs=4)
    width = browser.run("Number(graph.getAttribute('width'))")
    browser.run("document.getElementById('fold').click()")
    assert browser.run("Number(graph.getAttribute('width'))") > width
    assert browser.run(places) != folded
    assert not browser.run("[...document.querySelectorAll('.prompt > span')].some((s) => s.hidden)")
    for left, right, start, end, same in browser.run(ends):
        assert same or (left, right) == pytest.approx((start, end), abs=4)


def test_without_a_chat_nothing_is_shown(browser, tmp_path):
    plain = fr.trace(make("llama"), letters(), "#use|ab;")
    browser.open(plain.to_html(tmp_path / "page.html"))
    assert browser.run("document.getElementById('fold-tool').hidden")
    assert browser.run("document.querySelectorAll('#prompt .role, #prompt .gap').length") == 0
    page = plain.route().to_html(tmp_path / "route.html")
    assert 'id="folding"' not in page.read_text()
    browser.open(page, ready="Boolean(document.getElementById('graph'))")
    assert browser.run("document.querySelectorAll('.role, .gap, .message').length") == 0


def test_a_hostile_role_is_only_shown(browser, trace, tmp_path):
    evil = "<img src=x onerror=alert(1)>\x1b"
    odd = replace(trace, chat=[(evil, *trace.chat[0][1:]), *trace.chat[1:]])
    for page, ready in (
        (odd.to_html(tmp_path / "p.html"), "Boolean(window.flowroutes && flowroutes.scene)"),
        (odd.route().to_html(tmp_path / "r.html"), "Boolean(document.getElementById('graph'))"),
    ):
        browser.open(page, ready=ready)
        assert browser.run("document.querySelectorAll('img').length") == 0
        assert evil[:-1] in browser.run("document.querySelector('.prompt').textContent")
    assert "\x1b" not in odd._repr_html_() + odd.route()._repr_html_()
