"""Text from models, files and other libraries as a terminal may show it: no character of it acts on the terminal."""

from __future__ import annotations

import re
import unicodedata

WHITESPACE = {" ": "·", "\n": "↵", "\t": "⇥"}
JOINERS = "\u200c\u200d"
_HIDDEN = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")  # control and format characters, lone surrogates, spaces and line ends


def code_of(character: str) -> str:
    """``\\x1b``, ``\\u202e``, ``\\U000e0001``."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


def hidden(character: str) -> bool:
    """Does a terminal show nothing for this character, act on it, or reorder what is around it?"""
    return unicodedata.category(character) in _HIDDEN


def printable(text: object) -> str:
    """``str(text)`` in one line, with everything visible but plain spaces: ``"\\x1b[31m"`` → ``"\\\\x1b[31m"``,
    line ends ``"↵"``.
    """
    shown = str(text)
    return shown if shown.isprintable() else "".join(map(_shown, shown))


def _shown(character: str) -> str:
    if character == " " or character in JOINERS or not hidden(character):
        return character
    return WHITESPACE.get(character) or code_of(character)


def json_text(text: str) -> str:
    """A JSON document with the characters that a terminal would act on as JSON's own escapes; it says the same."""
    return re.sub(r"[^\x00-\x7e]", lambda found: _json_escape(found[0]) if hidden(found[0]) else found[0], text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
