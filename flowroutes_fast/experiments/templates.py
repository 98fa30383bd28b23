"""Prompts of two known tasks with their contrastive variants: indirect objects (IOI) and greater-than.

Every list is the same for the same arguments on every machine. With ``tokenizer=`` all prompts of a list, and every
variant of a prompt, have the same number of tokens and differ only where the template's slots are; what does not fit is
dropped, so that fewer words are used.

Sources: IOI, Wang et al. 2023 (arXiv 2211.00593); greater-than, Hanna et al. 2023 (arXiv 2305.00586).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flowroutes_fast.models.tokens import single_token

NAMES = (
    "Mary",
    "John",
    "Tom",
    "Sarah",
    "Kate",
    "James",
    "Anna",
    "David",
    "Emma",
    "Michael",
    "Laura",
    "Robert",
    "Alice",
    "Paul",
    "Lisa",
    "Peter",
    "Susan",
    "Mark",
    "Rachel",
    "Daniel",
    "Jane",
    "Adam",
    "Julia",
    "Simon",
    "Helen",
    "Kevin",
    "Lucy",
    "Brian",
    "Emily",
    "Jack",
    "Amy",
    "Steven",
)
PLACES = (
    "store",
    "school",
    "park",
    "garden",
    "house",
    "station",
    "office",
    "restaurant",
    "hospital",
    "market",
    "library",
    "church",
)
OBJECTS = (
    "drink",
    "book",
    "ring",
    "ball",
    "gift",
    "letter",
    "basketball",
    "computer",
    "necklace",
    "bone",
    "snack",
    "kiss",
)
NOUNS = (
    "war",
    "trip",
    "journey",
    "siege",
    "voyage",
    "reign",
    "drought",
    "festival",
    "expedition",
    "plague",
    "conflict",
    "campaign",
    "dispute",
    "contract",
    "empire",
    "project",
    "pilgrimage",
    "rebellion",
    "famine",
    "revolution",
    "study",
    "tour",
    "marriage",
    "partnership",
)
CENTURIES = tuple(range(11, 18))
IOI_ORDERS = ("ABBA", "BABA")


@dataclass(frozen=True)
class Example:
    """A prompt, what continues it rightly and wrongly, and other prompts of the same shape by the name of the contrast.

    Attributes:
        prompt: the text; ``answers`` and ``wrong``: next tokens with their leading space, if they have one.
        contrasts: name -> prompt. The task is absent or turned round there; ``answers`` and ``wrong`` stay those of
            ``prompt``.
        template: the task, and its variant of word order.
    """

    prompt: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    contrasts: dict[str, str] = field(default_factory=dict)
    template: str = ""

    @property
    def answer(self) -> str:
        return self.answers[0]


def ioi(n: int, seed: int = 0, tokenizer: Any = None) -> list[Example]:
    """Indirect objects: "When Mary and John went to the store, John gave a drink to" -> " Mary", wrong: " John".

    Half of the prompts name the indirect object first (``"ioi ABBA"``), half the giver (``"ioi BABA"``). Contrasts:

    - ``"third"``: somebody else gives: three different names, and the prompt no longer says to whom.
    - ``"swapped"``: the indirect object gives, so that the wrong answer is right.
    - ``"unrelated"``: three different names, none of which is in the prompt.

    Args:
        n: how many examples, all different.
        seed: of the choice of names, places and objects.
        tokenizer: drop words that are not one token (see the module); None: keep all.

    Raises:
        ValueError: n below 1, more examples than there are, or too few words left by the tokenizer.
    """
    names, places, objects = (_one_token(words, tokenizer) for words in (NAMES, PLACES, OBJECTS))
    if len(names) < 6 or not places or not objects:
        raise ValueError(
            f"this tokenizer leaves {len(names)} names, {len(places)} places, {len(objects)} objects of "
            f"one token: too few"
        )
    limit = len(IOI_ORDERS) * len(names) * (len(names) - 1) * len(places) * len(objects)

    def draw(random_: random.Random, i: int) -> Example:
        order = IOI_ORDERS[i % 2]
        to, giver, third, *unrelated = random_.sample(names, 6)
        place, thing = random_.choice(places), random_.choice(objects)

        def text(first: str, second: str, gives: str) -> str:
            pair = (first, second) if order == "ABBA" else (second, first)
            return f"When {pair[0]} and {pair[1]} went to the {place}, {gives} gave a {thing} to"

        contrasts = {"third": text(to, giver, third), "swapped": text(to, giver, to), "unrelated": text(*unrelated)}
        return Example(text(to, giver, giver), (f" {to}",), (f" {giver}",), contrasts, f"ioi {order}")

    return _examples(n, seed, limit, tokenizer, draw)


def greater_than(n: int, seed: int = 0, tokenizer: Any = None) -> list[Example]:
    """Greater-than: "The war lasted from the year 1732 to the year 17" -> a number above 32.

    ``answers`` are all two-digit numbers above YY, ``wrong`` the others. A tokenizer of single digits decides on the
    tens alone: there, ``answers`` are the digits above YY's tens, ``wrong`` those below, and the tens itself, which may
    go either way, is left out. Contrasts put another start year there: ``"01"`` and ``"00"``, with which every (nearly
    every) number is right.

    Args, Raises: as :func:`ioi`. YY lies in 20 ... 79, XX in 11 ... 17, so that both sets have members on every
    tokenizer.
    """
    nouns = _one_token(NOUNS, tokenizer)
    if not nouns:
        raise ValueError("this tokenizer leaves no noun of one token")

    def text(noun: str, century: int, year: str) -> str:
        return f"The {noun} lasted from the year {century}{year} to the year {century}"

    digits = tokenizer is not None and not _follows(
        tokenizer, text(nouns[0], 17, "32"), [f"{y:02d}" for y in range(2, 99)]
    )
    if digits and not _follows(tokenizer, text(nouns[0], 17, "32"), [str(d) for d in range(10)]):
        raise ValueError(
            "this tokenizer splits years neither into pairs of digits nor into single digits: greater-than has no "
            "single answer token"
        )

    def draw(random_: random.Random, i: int) -> Example:
        noun, century, year = random_.choice(nouns), random_.choice(CENTURIES), random_.randrange(20, 80)
        tens = year // 10
        above = [str(d) for d in range(tens + 1, 10)] if digits else [f"{y:02d}" for y in range(year + 1, 100)]
        below = [str(d) for d in range(tens)] if digits else [f"{y:02d}" for y in range(year + 1)]
        contrasts = {other: text(noun, century, other) for other in ("01", "00")}
        return Example(text(noun, century, f"{year:02d}"), tuple(above), tuple(below), contrasts, "greater-than")

    return _examples(n, seed, len(nouns) * len(CENTURIES) * 60, tokenizer, draw)


def _examples(
    n: int, seed: int, limit: int, tokenizer: Any, draw: Callable[[random.Random, int], Example]
) -> list[Example]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if n > limit // 2:
        raise ValueError(f"n is {n}, but this template has {limit} different prompts, of which at most half are drawn")
    found: dict[str, Example] = {}
    length = None
    for example in _draws(seed, draw, 20 * n + 1000):
        if tokenizer is not None:
            lengths = {len(_ids(tokenizer, text)) for text in (example.prompt, *example.contrasts.values())}
            length = min(lengths) if length is None else length
            if lengths != {length} or not _follows(tokenizer, example.prompt, [*example.answers, *example.wrong]):
                continue
        found.setdefault(example.prompt, example)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"only {len(found)} of {n} examples align under this tokenizer")


def _draws(seed: int, draw: Callable[[random.Random, int], Example], most: int) -> Iterator[Example]:
    random_ = random.Random(seed)
    return (draw(random_, i) for i in range(most))


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, **options)["input_ids"])


def _one_token(words: tuple[str, ...], tokenizer: Any) -> list[str]:
    if tokenizer is None:
        return list(words)
    return [word for word in words if _is_one(tokenizer, f" {word}")]


def _is_one(tokenizer: Any, text: str) -> bool:
    try:
        single_token(tokenizer, text)
    except ValueError:
        return False
    return True


def _follows(tokenizer: Any, prompt: str, continuations: list[str]) -> bool:
    """Does each continuation add exactly one token to the prompt, without changing the prompt's own?"""
    before = _ids(tokenizer, prompt, add_special_tokens=False)
    after = [_ids(tokenizer, prompt + text, add_special_tokens=False) for text in continuations]
    return all(len(ids) == len(before) + 1 and ids[: len(before)] == before for ids in after)
