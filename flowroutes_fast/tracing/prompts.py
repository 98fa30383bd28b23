"""What a user gives as text: prompts as lists of ids, checked before any long work; everything else is refused by
name.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowroutes_fast.capture.hooks import span_of
from flowroutes_fast.models.families import context_length, text_config, vocabulary_size

KINDS = "a string, token ids, a list of either, or what a tokenizer returned"
OURS = (  # what a trace decides itself, or cannot take over
    "attention_mask",
    "cache_position",
    "head_mask",
    "input_ids",
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
)
BY_TOKEN = ("mm_token_type_ids", "token_type_ids")  # what a model is told of every token


Message = tuple[
    str, int, int
]  # of a chat: a role, and the first of its tokens and the one after the last; the other tokens are the template's


@dataclass
class Prompts:
    """Prompts as ids; ``several``: whether a list was given; ``inputs``: what the model gets beside the ids of a single
    prompt (images); ``chats``: where the messages of each prompt are, nothing where it is no chat, or where this is not
    known."""

    ids: list[list[int]]
    several: bool
    inputs: dict[str, Tensor] = field(default_factory=dict)
    chats: list[list[Message]] = field(default_factory=list)


def read_prompts(model: Any, tokenizer: Any, text: Any, attention_mask: Any = None) -> Prompts:
    """See ``text`` of :func:`flowroutes_fast.trace`. ``TypeError`` for other kinds, ``ValueError`` for what cannot
    be traced.
    """
    check_tokenizer(tokenizer)
    inputs: dict[str, Any] = {}
    mask = None if attention_mask is None else _mask(attention_mask)
    if isinstance(text, Mapping):
        if "input_ids" not in text:
            raise _wrong_kind(text)
        inputs = {
            name: value
            for name, value in text.items()
            if name not in ("input_ids", "attention_mask") and value is not None
        }
        if (own := text.get("attention_mask")) is not None:
            own = _mask(own)
            if mask is not None and not torch.equal(own, mask):
                raise ValueError("the mapping holds another 'attention_mask' than the one given: give one of them")
            mask = own
        text = text["input_ids"]
    chats: list[list[Message]] = []
    if _is_chat(text):
        text, chat = of_chat(tokenizer, text)
        chats = [chat]
    elif isinstance(text, (list, tuple)) and text and all(map(_is_chat, text)):
        text, chats = (list(both) for both in zip(*(of_chat(tokenizer, one) for one in text), strict=True))
    if isinstance(text, (Tensor, np.ndarray)):
        text = _integers(text).tolist() if text.ndim in (1, 2) else _integers(text)
    spans: list[slice] | None = None
    if isinstance(text, (str, Tensor)) or _is_one(text):
        if mask is not None:
            text, spans = _one_without_padding(text, mask)
        found = Prompts([token_ids(model, tokenizer, text)], False)
    elif not isinstance(text, Sequence) or isinstance(text, (bytes, bytearray)):
        raise _wrong_kind(text)
    elif not len(text):
        raise ValueError("the list is empty: it gives no tokens, so there is nothing to trace")
    elif mask is None:
        found = Prompts([_named(i, token_ids, model, tokenizer, one) for i, one in enumerate(text)], True)
    else:
        spans = _spans(text, mask)
        rows = zip(text, spans, strict=True)
        found = Prompts([_named(i, token_ids, model, tokenizer, ids[span]) for i, (ids, span) in enumerate(rows)], True)
    found.chats = chats if chats and mask is None else [[] for _ in found.ids]
    width = len(found.ids[0]) if mask is None else mask.shape[-1]
    found.inputs = _inputs(model, inputs, found, spans or [slice(0, len(ids)) for ids in found.ids], width)
    return found


def refuse_inputs(prompts: Prompts) -> Prompts:
    """``ValueError`` where something is given beside the ids, for models that could not be given it."""
    if prompts.inputs:
        raise ValueError(f"{', '.join(map(repr, prompts.inputs))} cannot be used here: leave it out")
    return prompts


def digests(inputs: dict[str, Tensor]) -> dict[str, str]:
    """What stands for inputs in a trace, so that another image is known for another one."""
    found = {}
    for name, tensor in inputs.items():
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        found[name] = digest.hexdigest()[:16]
    return found


def check_tokens_alone(result: Any, what: str) -> None:
    """``ValueError`` for a trace or route of a prompt with images, where ``what`` runs the model again on its
    tokens.
    """
    if result.inputs:
        names = ", ".join(map(repr, result.inputs))
        raise ValueError(
            f"the model was also given {names}, which the {type(result).__name__.lower()} does not keep: {what}"
        )


def _is_one(text: Any) -> bool:
    """Is a sequence the ids of one prompt, and not a list of prompts?"""
    return (
        isinstance(text, Sequence)
        and not isinstance(text, (str, bytes, bytearray))
        and len(text) > 0
        and _is_number(text[0])
    )


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float, np.number, np.bool_))


def _mask(given: Any) -> Tensor:
    """An attention mask as booleans; ``ValueError`` for anything but ones (tokens) and zeros (padding)."""
    found = _as_tensor(given)
    if found is None:
        raise ValueError(
            f"an attention mask must be an array of ones (tokens) and zeros (padding), got {type(given).__name__}"
        )
    found = _in_memory("the attention mask", found)
    if other := [value for value in found.unique().tolist() if value not in (0, 1)]:
        raise ValueError(
            f"an attention mask holds 1 for tokens and 0 for padding, this one also holds {other[0]}: "
            "documents packed into one row are given one by one, and additive masks as ones and zeros"
        )
    return found.bool().cpu()


def _in_memory(what: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device, where it holds no numbers")
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def _integers(ids: Any) -> Tensor:
    found = _as_tensor(ids)
    found = None if found is None else _in_memory("the tensor of token ids", found)
    if found is None or (
        found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    ):
        raise TypeError(f"token ids must be integers, got an array of {ids.dtype}")
    return found.to(torch.int64)


def _wrong_kind(text: Any) -> TypeError:
    if _is_message(text):
        return TypeError(
            "a chat is given as a list of messages with 'role' and 'content', for which the tokenizer's template is "
            "applied; a single message "
            "goes into a list"
        )
    if isinstance(text, Mapping) and "input_ids" in text:
        return TypeError("a mapping of a tokenizer is given alone; here give the ids that it holds (its 'input_ids')")
    if isinstance(text, Mapping):
        return TypeError(
            f"a mapping must hold 'input_ids', as tokenizers return; it has {', '.join(map(repr, text)) or 'nothing'}"
        )
    return TypeError(f"text must be {KINDS}; got {type(text).__name__}")


def _is_message(text: Any) -> bool:
    return isinstance(text, Mapping) and "content" in text


def _is_chat(text: Any) -> bool:
    """A list of messages: mappings with a role and a text."""
    return (
        isinstance(text, (list, tuple))
        and len(text) > 0
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in text)
    )


def of_chat(tokenizer: Any, messages: Any) -> tuple[list[int], list[Message]]:
    """Messages as ids, by the tokenizer's template, up to where the model's answer begins; and where each message's
    tokens are.

    A system text that the template adds by itself counts as a message. Where messages are not found again in what the
    template made of them, or the tokenizer does not say which characters a token stands for, none is named.

    Raises:
        TypeError: no tokenizer, one without a template, or a message whose content is no text. ValueError: messages
            that the template refuses.
    """
    if tokenizer is None:
        raise TypeError("chat messages need a tokenizer with a chat template; pass token ids to trace without one")
    if not getattr(tokenizer, "chat_template", None):
        raise TypeError(
            "chat messages need a tokenizer with a chat template, which this one has not: give the prompt as a text"
        )
    for message in messages:
        if not isinstance(message["content"], str):
            raise TypeError(f"the content of a chat message must be a text, got {type(message['content']).__name__}")
    try:
        text = _rendered(tokenizer, messages)
    except Exception as error:  # templates raise errors of their own
        raise ValueError(
            f"the tokenizer's chat template refuses these messages: {(str(error).splitlines() or [''])[0]}"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template holds the special tokens
    ids = [int(i) for i in ids]
    return ids, _messages_of(tokenizer, messages, text, ids)


def _rendered(tokenizer: Any, messages: Any) -> str:
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    )


def _messages_of(tokenizer: Any, messages: Any, text: str, ids: list[int]) -> list[Message]:
    """Where the tokens of each message are; nothing where that cannot be told."""
    try:
        answer = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [(int(a), int(b)) for a, b in answer["offset_mapping"]]
        spans = _places(tokenizer, messages, text)
    except Exception:  # a tokenizer without offsets, a template that wants other messages
        return []
    if list(answer["input_ids"]) != ids:
        return []
    found = []
    for role, start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if max(a, start) < min(b, end)]
        if inside:
            found.append((role, inside[0], inside[-1] + 1))
    apart = all(one[2] <= other[1] for one, other in pairwise(found))
    return found if apart else []


MARK = "qvzmessage{}zvq"  # stands for a message's text while its place is looked for


def _places(tokenizer: Any, messages: Any, text: str) -> list[Message]:
    """Role, first character and the one after the last of each message in what a template made of them."""
    marks = [MARK.format(i) for i in range(len(messages))]
    pieces, rest = (
        [],
        _rendered(tokenizer, [dict(one) | {"content": mark} for one, mark in zip(messages, marks, strict=True)]),
    )
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            return []
        pieces.append(piece)
    places, at = [], len(pieces[0])
    for message, after in zip(messages, [*pieces[1:], rest], strict=True):
        texts = (message["content"], message["content"].strip())  # templates strip
        end = next((at + len(one) for one in texts if text.startswith(one + after, at)), -1)
        if end < 0:
            return []
        places.append((str(message["role"]), at, end))
        at = end + len(after)
    if not text.startswith(pieces[0]) or at != len(text):
        return []
    return [*_own_system(tokenizer, messages, pieces[0]), *places]


def _own_system(tokenizer: Any, messages: Any, before: str) -> list[Message]:
    """The system text that a template adds where none is given: what stands in the place of a given one, before the
    first message.
    """
    if messages[0]["role"] == "system":
        return []
    first, second = MARK.format("system"), MARK.format("first")
    with suppress(Exception):  # a template that takes no system message
        made = _rendered(tokenizer, [{"role": "system", "content": first}, dict(messages[0]) | {"content": second}])
        start, found, rest = made.partition(first)
        between, also, _ = rest.partition(second)
        if (
            found
            and also
            and between
            and before.startswith(start)
            and before.endswith(between)
            and len(before) > len(start) + len(between)
        ):
            return [("system", len(start), len(before) - len(between))]
    return []


def check_tokenizer(tokenizer: Any) -> None:
    """``TypeError`` for what is no tokenizer: a processor, a name, a raw ``tokenizers.Tokenizer``."""
    if tokenizer is None or (callable(tokenizer) and not _is_processor(tokenizer)):
        return
    if _is_processor(tokenizer):
        raise TypeError(
            f"the tokenizer is a processor ({type(tokenizer).__name__}): give its tokenizer (processor.tokenizer)"
        )
    raise TypeError(
        f"the tokenizer must be one of transformers, or a function from a text to {{'input_ids': [...]}}; got "
        f"{type(tokenizer).__name__}"
    )


def _is_processor(tokenizer: Any) -> bool:
    inner = getattr(tokenizer, "tokenizer", None)
    return inner is not None and (
        hasattr(tokenizer, "image_processor") or type(tokenizer).__name__.endswith("Processor")
    )


def _one_without_padding(text: Any, mask: Tensor) -> tuple[Any, list[slice]]:
    if isinstance(text, str):
        raise TypeError("an attention mask belongs to token ids, not to a text")
    row = mask[0] if mask.dim() == 2 and len(mask) == 1 else mask
    if row.shape != (len(text),):
        raise ValueError(f"the attention mask has shape {list(mask.shape)}, the ids have {[len(text)]}")
    return text[span_of(row)], [span_of(row)]


def _spans(text: Any, mask: Tensor) -> list[slice]:
    """Where the tokens of each row are."""
    if any(isinstance(ids, (str, Mapping)) or not hasattr(ids, "__len__") for ids in text):
        raise TypeError("an attention mask belongs to a batch of ids [batch, token], not to texts")
    lengths = {len(ids) for ids in text}
    rows = mask[None] if mask.dim() == 1 and len(text) == 1 else mask
    if len(lengths) > 1 or tuple(rows.shape) != (len(text), *lengths):
        raise ValueError(f"the attention mask has shape {list(mask.shape)}, the ids have {[len(text), *lengths]}")
    return [_named(i, span_of, row) for i, row in enumerate(rows)]


def _named(item: int, call: Callable[..., Any], *args: Any) -> Any:
    """What goes wrong in one prompt of a batch says which."""
    try:
        return call(*args)
    except (ValueError, TypeError) as error:
        raise type(error)(f"prompt {item}: {error}") from error


def token_ids(model: nn.Module, tokenizer: Any, text: Any) -> list[int]:
    """One prompt, a string or ids ``[token]``, as ids checked against the model's vocabulary and context length."""
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("a text needs a tokenizer; pass token ids to trace without one")
        if not text:
            raise ValueError("the text is empty: there is nothing to trace")
        check_tokenizer(tokenizer)
        ids = _of_tokenizer(tokenizer, text)
    else:
        ids = _as_ids(text)
    if not ids:
        raise ValueError("the text gives no tokens: there is nothing to trace")
    size = vocabulary_size(model)
    for position, token in enumerate(ids):
        if not 0 <= token < size:
            raise ValueError(
                f"token id {token} at position {position} is outside the model's vocabulary of {size}; "
                f"is this its tokenizer?"
            )
    limit = context_length(text_config(model))
    if limit is not None and len(ids) > limit:
        raise ValueError(f"the text has {len(ids)} tokens but the model's context holds {limit}: shorten it")
    return ids


def _of_tokenizer(tokenizer: Any, text: str) -> list[int]:
    answer = tokenizer(text)
    if not isinstance(answer, Mapping) or "input_ids" not in answer:
        raise TypeError(f"the tokenizer must return a mapping with 'input_ids'; got {type(answer).__name__}")
    ids = answer["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if len(ids) == 1 and isinstance(ids[0], (list, tuple)):  # a batch of one
        ids = list(ids[0])
    return _as_ids(ids)


def _as_ids(text: Any) -> list[int]:
    if isinstance(text, (Tensor, np.ndarray)):
        given = _integers(text)
        if given.dim() != 1:
            raise ValueError(f"token ids must have shape [token], got {tuple(given.shape)}")
        return [int(i) for i in given.tolist()]
    if not isinstance(text, Sequence) or isinstance(text, (str, bytes, bytearray)):
        raise _wrong_kind(text)
    for item in text:
        if isinstance(item, (bool, np.bool_)) or not isinstance(item, Integral):
            if _is_message(item):
                raise _wrong_kind(item)
            if isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
                raise ValueError("token ids must have shape [token], got lists in a list")
            raise TypeError(f"token ids must be integers, got {type(item).__name__}")
    return [int(i) for i in text]


def _inputs(model: Any, given: dict[str, Any], prompts: Prompts, spans: list[slice], width: int) -> dict[str, Tensor]:
    """What else a mapping holds, for the model; ``ValueError`` naming what would not be used. ``width``: of the
    ids, with padding.
    """
    forward = getattr(model, "forward", None)
    parameters = inspect.signature(forward).parameters.items() if given and forward is not None else ()
    accepted = {name for name, parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        tensor = _as_tensor(value)
        if name == "position_ids" and tensor is not None and _counts_up(tensor, spans, width):
            continue
        if name == "token_type_ids" and name not in accepted and tensor is not None and not tensor.any():
            continue  # nothing is said, and the model would not hear it
        if tensor is None or name in OURS or name not in accepted:
            raise ValueError(
                f"{name!r} is not used in a trace of this {type(model).__name__}: leave it out, so that nothing is "
                f"dropped in silence"
            )
        found[name] = tensor
    if found and len(prompts.ids) > 1:
        raise ValueError(
            f"{', '.join(map(repr, found))} can be given with one prompt at a time, not with {len(prompts.ids)}"
        )
    return {
        name: _by_token(name, tensor, spans[0], width) if name in BY_TOKEN else tensor for name, tensor in found.items()
    }


def _by_token(name: str, tensor: Tensor, span: slice, width: int) -> Tensor:
    """A kind per token ``[1, token]``, without padding."""
    if tensor.numel() != width or tensor.shape[-1] != width:
        raise ValueError(f"{name!r} has shape {list(tensor.shape)}, the ids have {[1, width]}")
    if tensor.is_floating_point():
        raise ValueError(f"{name!r} must hold integers, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.reshape(1, width)[:, span].to(torch.int64)


def _as_tensor(value: Any) -> Tensor | None:
    """An array of numbers as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    return torch.from_numpy(np.ascontiguousarray(array)) if array.dtype.kind in "iufb" else None


def _counts_up(positions: Tensor, spans: list[slice], width: int) -> bool:
    """Are these the positions that a trace gives the tokens of each row: 0, 1, 2 …, whatever padding stands before?"""
    if (
        positions.dim() not in (1, 2)
        or positions.shape[-1] != width
        or (positions.dim() == 2 and len(positions) not in (1, len(spans)))
    ):
        return False
    rows = positions.expand(len(spans), width)
    return all(
        torch.equal(row[span].cpu().long(), torch.arange(span.stop - span.start))
        for row, span in zip(rows, spans, strict=True)
    )
