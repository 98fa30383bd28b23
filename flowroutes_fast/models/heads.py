"""What a model predicts with its last states: next tokens, or something else that no page and no ablation can be about."""

from __future__ import annotations

import re
from typing import Any

_OTHER = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")


def check_predicts_tokens(model: Any, *, needed: bool = True) -> None:
    """``ValueError`` naming the class of a model that predicts no next token; ``needed=False`` lets one without any head pass."""
    name = type(model).__name__
    if _OTHER.search(name):
        raise ValueError(f"{name} does not predict next tokens: open the checkpoint with AutoModelForCausalLM")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if needed and head is None:
        raise ValueError(f"{name} has no unembedding, so it predicts no token: open the checkpoint with AutoModelForCausalLM")
