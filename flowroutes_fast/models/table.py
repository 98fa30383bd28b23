"""What every family's adapter says, as a table: for ``flowroutes models`` and for docs/models.md."""

from __future__ import annotations

from flowroutes_fast.models.families import FAMILIES, REFUSED, Family, family_of

COLUMNS = ("family", "block", "attention weights", "particulars", "FFN neurons")


def rows() -> list[tuple[str, str, str, str, str]]:
    """One row per family: name, block shape, how its attention weights are had, what is particular, whether its FFN
    splits into neurons.
    """
    return [_row(kind) for kind in sorted(FAMILIES)] + [
        (kind, "–", "–", f"refused: {why}", "–") for kind, why in sorted(REFUSED.items())
    ]


def _row(kind: str) -> tuple[str, str, str, str, str]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    config._attn_implementation = "eager"
    family = family_of(config)
    weights = "from the model's eager attention" if family.hooked else "recomputed from queries and keys"
    neurons = "dense layers only" if family.down and "experts" in family.note else "yes" if family.down else "no"
    shape = "parallel" if family.parallel(config) else "sequential"
    return kind, shape, weights, ", ".join(_particulars(family)) or "–", neurons


def _particulars(family: Family) -> list[str]:
    plain = Family("")
    found = [family.note] if family.note else []
    for name, says in (
        ("post_norm", "norm after attention"),
        ("ffn_norm", "norm after the FFN"),
        ("inner_norm", "norm before W_O"),
        ("gate", "output gate"),
    ):
        if getattr(family, name) and says not in found:
            found.append(says)
    if any(
        getattr(family, name) is not getattr(plain, name) for name in ("attention_scale", "ffn_scale", "state_scale")
    ):
        found += [] if any(word in family.note for word in ("multiplier", "scalar")) else ["multipliers"]
    if family.mixers:
        found.append(f"{' or '.join(family.mixers)} is one opaque part")
    return found


def markdown() -> str:
    """docs/models.md."""
    table = rows()
    lines = [
        "# Model families",
        "",
        "Written by `flowroutes models --markdown`. Every family is tested on tiny random models: the parts add up to "
        "the residual state at every",
        "node, exact importances equal a float64 evaluation, certified routes equal exact ones. Every pass through a "
        "checkpoint is checked,",
        "and refused if the parts do not add up. Where a wrapper holds the language model (images, PEFT), the inner "
        "family counts.",
        "",
        "Norms between a part and the residual stream are linearised: their divisor is the one of this forward pass. "
        "Mixers without attention",
        "weights (Mamba, linear attention, convolutions) are one part of their node, `mixer`, without source "
        "positions.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in table),
    ]
    return "\n".join(lines) + "\n"
