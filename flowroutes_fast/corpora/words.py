"""Which tokens begin a word and which go on with one, from their places in the text; no tokenizer's marks are
needed.
"""

from __future__ import annotations

import numpy as np


def words(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """``[token]`` int32: number of the word that a token belongs to; -1 for what is no word (spaces, punctuation,
    special tokens).

    A word is a run of letters and digits, each digit run apart from letters. A token belongs to the word of its first
    letter or digit.
    """
    found = np.full(len(offsets), -1, np.int32)
    number = -1
    kind_before, end_before = "", -1
    starts: dict[int, int] = {}  # first character of a word -> its number
    word_of: list[int] = [-1] * len(text)
    for place, character in enumerate(text):
        kind = "letter" if character.isalpha() or _joins(character) else "digit" if character.isdigit() else ""
        if kind:
            if kind != kind_before or end_before != place:
                number += 1
                starts[place] = number
            word_of[place] = number
            end_before = place + 1
        kind_before = kind
    for token, (start, end) in enumerate(offsets):
        found[token] = next((word_of[place] for place in range(start, end) if word_of[place] >= 0), -1)
    return found


def _joins(character: str) -> bool:
    import unicodedata

    return unicodedata.category(character) in ("Mn", "Mc")  # marks that belong to the letter before


def later(word: np.ndarray) -> np.ndarray:
    """``[token]`` bool: does the token go on with the word of the token before it?"""
    found = np.zeros(len(word), bool)
    found[1:] = (word[1:] == word[:-1]) & (word[1:] >= 0)
    return found


def first_of_several(word: np.ndarray) -> np.ndarray:
    """``[token]`` bool: does the token begin a word that goes on in the next token?"""
    after = later(word)
    found = np.zeros(len(word), bool)
    found[:-1] = after[1:] & ~after[:-1]
    return found


def word_start(word: np.ndarray) -> np.ndarray:
    """``[token]``: position of the first token of the same word (itself where there is no earlier one)."""
    place = np.arange(len(word))
    return np.maximum.accumulate(np.where(later(word), 0, place))
