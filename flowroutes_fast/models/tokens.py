"""Tokens as texts, and texts as tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SPACE = "▁"  # U+2581, which SentencePiece writes for a space


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it stands in a text, with its leading spaces, which decoding a SentencePiece token alone drops;
    without a tokenizer its id.

    An id that the tokenizer does not know (models have more rows than it has tokens) is ``<id>``.
    """
    token = int(token)
    if getattr(tokenizer, "decode", None) is None:  # none, or a function from texts to ids
        return str(token)
    try:
        text, piece = _decoded(tokenizer, token), _piece(tokenizer, token)
    except (IndexError, KeyError, OverflowError):  # what tokenizers say of ids that they do not have
        return f"<{token}>"
    if not text and piece is None:
        return f"<{token}>"
    piece = piece or ""
    spaces = 0 if text.startswith(SPACE) else len(piece) - len(piece.lstrip(SPACE))
    return " " * spaces + text.lstrip(" ") if spaces else text


def _decoded(tokenizer: Any, token: int) -> str:
    """One token decoded, without the cleaning that takes the space off " ." and " n't"."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return str(tokenizer.decode([token]))
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def token_texts(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    return [token_text(tokenizer, token) for token in tokens]


def single_token(tokenizer: Any, text: str, name: str = "answer") -> int:
    """The one token that ``text`` is, leading space included: ``" Mary"`` is SentencePiece's ``▁Mary``, ``"Mary"`` is
    not.

    ``ValueError`` naming the pieces if there is none.
    """
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []
    if len(ids) == 1 and token_text(tokenizer, ids[0]) == text:
        return ids[0]
    for piece in (text.replace(" ", SPACE), text):  # tokenizers that put a space before every text
        found = _id_of(tokenizer, piece)
        if found is not None and token_text(tokenizer, found) == text:
            return found
    pieces = token_texts(tokenizer, ids)
    unknown = ids[:1] == [getattr(tokenizer, "unk_token_id", None)]
    if unknown and len(ids) == 1:
        raise ValueError(f"{name} {text!r} is unknown to the tokenizer, which gives {pieces[0]!r} for it")
    # a tokenizer that changes texts (lower case)
    if len(ids) == 1 and not pieces[0].startswith(" ") and not _spaced(tokenizer, ids[0]):
        return ids[0]
    what = f"{len(ids)} tokens {pieces}, not one" if len(ids) != 1 else f"the token {pieces[0]!r}"
    raise ValueError(f"{name} {text!r} is {what}; does it lack its leading space?")


def _piece(tokenizer: Any, token: int) -> str | None:
    """The token's name in the vocabulary; "" where the tokenizer does not tell, None where it has no such token."""
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    piece = convert(token) if callable(convert) else ""
    return piece if isinstance(piece, str) else None


def _spaced(tokenizer: Any, token: int) -> bool:
    return (_piece(tokenizer, token) or "").startswith(SPACE)


def _id_of(tokenizer: Any, piece: str) -> int | None:
    convert = getattr(tokenizer, "convert_tokens_to_ids", None)
    found = convert(piece) if callable(convert) and piece else None
    return found if isinstance(found, int) and found >= 0 and _piece(tokenizer, found) == piece else None
