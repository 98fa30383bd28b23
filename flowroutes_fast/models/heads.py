"""What a model predicts with its last states: next tokens, or something else that no page and no ablation can be
about.
"""

from __future__ import annotations

import re
from typing import Any

_CLASSES = re.compile(r"For(Sequence|Token)Classification$")
_OTHER = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")


def check_predicts_tokens(model: Any, *, needed: bool = True) -> None:
    """``ValueError`` naming the class of a model that predicts no next token; ``needed=False`` lets one without any
    head pass.
    """
    name = type(model).__name__
    if _OTHER.search(name):
        raise ValueError(f"{name} does not predict next tokens: open the checkpoint with AutoModelForCausalLM")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if needed and head is None:
        raise ValueError(
            f"{name} has no unembedding, so it predicts no token: open the checkpoint with AutoModelForCausalLM"
        )


def predicts(model: Any) -> str:
    """What a model's logits are about: ``"tokens"``, ``"classes"`` of a classifier, or ``"numbers"`` (of a
    regression, or of no head known here).
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and not _OTHER.search(type(model).__name__):
        return "tokens"
    labels = getattr(model.config, "num_labels", 0)
    regression = labels == 1 or getattr(model.config, "problem_type", None) == "regression"
    return "classes" if _CLASSES.search(type(model).__name__) and not regression else "numbers"
