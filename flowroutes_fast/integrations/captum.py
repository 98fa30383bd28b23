"""Routes as a result of captum: what each prompt token supplies to each output token, in the object that its plots
take.

The token attribution of a whole route (see :mod:`flowroutes_fast.results.flow`) is not what captum's own methods
measure: those change or differentiate the input and watch a probability; here one forward pass is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowroutes_fast.integrations import require
from flowroutes_fast.results.edges import same_token_parts

if TYPE_CHECKING:
    from torch import nn

    from flowroutes_fast.results.trace import Trace

AT_LEAST, BELOW = "0.9", "1"
GREEDY = {"max_new_tokens": 25, "do_sample": False, "temperature": None, "top_p": None}


def attribution_result(
    trace: Trace, outputs: int | slice | Sequence[int] | None = None, *, include_outputs: bool = False
) -> Any:
    """What the tokens of a traced text supply to its output tokens, as ``captum.attr.LLMAttributionResult``.

    An output token at position t is explained by the last state of position t - 1, which predicts it: its row is what
    arrives at the embeddings of a mass 1 that starts there (:meth:`Trace.token_attribution`).

    Args:
        trace: of prompt and output together.
        outputs: position of the first output token (all from there on are outputs), or their positions, or a slice. The
            position after the last is the model's own prediction, which a slice without an end includes; negative
            numbers count from the last token. None: that prediction alone.
        include_outputs: also list the output tokens among the input tokens, so that every row sums to 1. Without it the
            columns are the tokens before the first output, and what earlier outputs supplied is left out.

    Returns:
        The result: ``token_attr`` ``[output token, input token]``, shares; ``seq_attr`` ``[input token]``, their mean
        over the output tokens (the token attribution of the whole output, each of its tokens counted equally; captum's
        own is the change of the sequence's log-probability). ``output_probs`` is set where only the prediction is
        explained.

    Raises:
        ValueError: no output, an output at position 0 (nothing precedes it), a position that was not traced.
            IndexError: out of range.
        ImportError: captum is missing or of another version.
    """
    captum = _captum()
    positions = _outputs(trace, outputs)
    last = positions[-1] == len(trace.tokens)
    if last and not trace.prediction:
        raise ValueError("this trace has no prediction: give the positions of output tokens inside the text")
    texts = [*trace.tokens, *([trace.prediction[0][0]] if last else [])]
    scores = token_matrix(trace, [p - 1 for p in positions])
    scores = scores[:, : positions[-1] if include_outputs else positions[0]]
    attributed = torch.from_numpy(scores).float()
    return captum.LLMAttributionResult(
        input_tokens=texts[: attributed.shape[1]],
        output_tokens=[texts[p] for p in positions],
        token_attr=attributed,
        seq_attr=attributed.mean(0),
        output_probs=torch.tensor([trace.prediction[0][1]]) if last and len(positions) == 1 else None,
    )


def attribute(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    target: str | Sequence[int] | None = None,
    *,
    gen_args: dict[str, Any] | None = None,
    include_outputs: bool = False,
    **options: Any,
) -> Any:
    """:func:`attribution_result` of a prompt and what follows it, from one traced forward pass.

    Args:
        target: the output, as text (encoded on its own, without special tokens) or ids; None: the model writes it.
        gen_args: of ``model.generate``; greedily 25 tokens at most by default.
        options: of :func:`flowroutes_fast.trace`; ``precision="exact"`` unless given (or ``measure="signed"``), so that
            no mass is left unresolved.

    Raises:
        ValueError: a prompt or target without tokens, and what :func:`flowroutes_fast.trace` raises. TypeError:
            ``gen_args`` beside a target, a prompt that is not one text.
    """
    from flowroutes_fast.tracing.prompts import token_ids
    from flowroutes_fast.tracing.trace import trace

    _captum()
    if target is not None and gen_args is not None:
        raise TypeError("gen_args are for a target that the model writes; leave out one of target and gen_args")
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got {type(prompt).__name__}; of several, attribute one at a time")
    if isinstance(target, torch.Tensor) and target.dim() != 1:
        raise ValueError(f"the target's ids must be one row, got shape {tuple(target.shape)}")
    ids = token_ids(model, tokenizer, prompt)
    if target is None:
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        given = torch.tensor([ids], device=device)
        with torch.no_grad():
            whole = model.generate(
                given, attention_mask=torch.ones_like(given), **(GREEDY if gen_args is None else gen_args)
            )  # type: ignore[operator]
        following = [int(i) for i in getattr(whole, "sequences", whole)[0, len(ids) :]]
    elif isinstance(target, str):
        following = [int(i) for i in tokenizer(target, add_special_tokens=False)["input_ids"]]
    else:
        following = [int(i) for i in target]
    if not following:
        raise ValueError("the target has no tokens: there is nothing to explain")
    options.setdefault("precision", "certified" if options.get("measure") == "signed" else "exact")
    found = trace(model, tokenizer, ids + following, **options)
    return attribution_result(found, slice(len(ids), len(ids) + len(following)), include_outputs=include_outputs)


def token_matrix(trace: Trace, positions: Sequence[int]) -> np.ndarray:
    """:meth:`Trace.token_attribution` of each position alone, ``[position, token]``; every row sums to 1.

    One matrix product per layer: all positions together cost little more than one. ``ValueError`` for positions that
    were not traced.
    """
    tokens = len(trace.tokens)
    mass = np.zeros((len(positions), tokens))
    mass[np.arange(len(positions)), list(positions)] = 1
    for layer in reversed(range(trace.n_layers)):
        active = np.flatnonzero(mass.any(0))  # an FFN and its residual connection leave the mass at its position
        trace.reach(layer, active)
        moves = np.zeros((len(active), tokens))
        if trace.dense is not None:
            moves += trace.dense[layer][:, torch.from_numpy(active)].abs().sum(0).numpy()
        else:
            query, key, head, value = trace.sub_edges(layer, active)
            value = np.abs(np.where((head < 0) & (trace.measure != "signed"), value / 2, value).astype(np.float64))
            cell = np.searchsorted(active, query) * tokens + key
            moves += np.bincount(cell, weights=value, minlength=moves.size).reshape(moves.shape)
        rows = np.arange(len(active))
        for part in same_token_parts(trace, layer, active):
            moves[rows, active] += np.abs(part.importance)
        total = moves.sum(1)
        moves[rows[total == 0], active[total == 0]] = 1  # nothing enters: the mass goes down its own residual stream
        moves /= np.where(total > 0, total, 1)[:, None]
        mass = mass[:, active] @ moves
    return mass


def _captum() -> Any:
    return require("captum.attr", "captum", package="captum", at_least=AT_LEAST, below=BELOW)


def _outputs(trace: Trace, outputs: int | slice | Sequence[int] | None) -> list[int]:
    """Positions of the output tokens, in order; ``len(trace.tokens)`` is the prediction after the last token."""
    end = len(trace.tokens)
    if outputs is None:
        return [end]
    if isinstance(outputs, slice):
        start, stop = (
            max(0, bound + end) if bound is not None and bound < 0 else bound for bound in (outputs.start, outputs.stop)
        )
        chosen = sorted(range(end + 1)[slice(start, stop, outputs.step)])
    elif isinstance(outputs, int | np.integer):
        if not -end <= outputs < end:
            raise IndexError(f"position {outputs} is out of range: the text has {end} tokens")
        chosen = list(range(outputs % end, end))
    else:
        for p in outputs:
            if not -end <= p <= end:
                raise IndexError(f"position {p} is out of range: the text has {end} tokens")
        chosen = sorted({int(p) if p >= 0 else end + int(p) for p in outputs})
    if not chosen:
        raise ValueError(f"outputs={outputs} holds no position: there is nothing to explain")
    if chosen[0] == 0:
        raise ValueError("the token at position 0 has no state before it that predicts it: outputs begin at position 1")
    return chosen
