"""Importance of every head for every state after attention: an nnsight trace with eager weights against one call of
fr.trace.

python benchmarks/integrations/nnsight.py --out benchmarks/results/integrations/nnsight.json
"""

import argparse
import warnings
from functools import partial
from importlib.metadata import version

import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions, in_turns, medians, peak_of, without_folder, write_report

TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary, and then they walked home along the river in "
    "the rain. "
)
TOKENS = (64, 128)
SIDES = ("nnsight", "certified", "exact")


def head_importances(model, text):
    heads = []
    with torch.no_grad(), model.trace(text):
        for layer in model.model.layers:
            attention = layer.self_attn
            before = layer.input[0]  # [token, d_model]
            value = attention.v_proj.output[0]  # [token, kv_head * d_head]
            weights = attention.output[1][0]  # [head, query, key]; only eager attention gives them
            state = layer.post_attention_layernorm.input[0]
            value = value.unflatten(-1, (-1, attention.head_dim))
            value = value.repeat_interleave(len(weights) // value.shape[1], 1)  # [key, head, d_head]
            out = attention.o_proj.weight.unflatten(1, (len(weights), -1))  # [d_model, head, d_head]
            value = torch.einsum("khe,dhe->khd", value, out)
            parts = weights.permute(1, 2, 0)[..., None] * value  # [query, key, head, d_model]
            norm = state.abs().sum(-1)
            near = (norm[:, None, None] - (state[:, None, None] - parts).abs().sum(-1)).clamp_min(0)
            rest = (norm - (state - before).abs().sum(-1)).clamp_min(0)
            total = near.sum((1, 2)) + rest
            heads.append(near.sum(1) / total[:, None])
        heads = torch.stack(heads).save()  # [layer, query, head]
    return heads


def prepared(side, tokens):
    """The demo model as this side needs it, and ids."""
    from nnsight import LanguageModel

    model, tokenizer = fr.load("demo")
    ids = torch.tensor(tokenizer(TEXT * (tokens // 16), add_special_tokens=False)["input_ids"][:tokens])
    assert len(ids) == tokens
    if side == "nnsight":
        model.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nnsight 0.8 prefers another name
        return LanguageModel(model, tokenizer=tokenizer), ids


def run(side, model, ids):
    return head_importances(model, ids[None]) if side == "nnsight" else fr.trace(model, None, ids, precision=side)


def memory(side, tokens):
    """Peak bytes above the loaded and warmed up model, in a process of its own."""
    prepare = f"model, ids = b.prepared({side!r}, {tokens}); b.run({side!r}, model, ids[:8])"
    return peak_of(__file__, prepare, f"b.run({side!r}, model, ids)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for tokens in TOKENS:
        ready = {side: prepared(side, tokens) for side in SIDES}
        for side in SIDES:
            run(side, ready[side][0], ready[side][1][:8])
        turns = in_turns({side: partial(run, side, *ready[side]) for side in SIDES}, options.repeats)
        found = turns.found
        theirs, certified = found["nnsight"], found["certified"]
        difference = float((found["exact"].heads - theirs).abs().max())
        outside = float(torch.maximum(certified.heads_low - theirs, theirs - certified.heads_high).max())
        if not (difference < 1e-4 and outside < 1e-4):
            raise SystemExit(
                f"{tokens} tokens: the sides differ (exact by {difference:.1e}, certified intervals "
                f"missed by {outside:.1e})"
            )
        row = {
            "tokens": tokens,
            "seconds": turns.medians(),
            "of these in the system (pages of large tensors)": medians(turns.system),
            "peak bytes": {side: memory(side, tokens) for side in SIDES},
            "largest difference of exact heads": difference,
            "farthest outside a certified interval": outside,
        }
        row["ratio"] = {side: row["seconds"]["nnsight"] / row["seconds"][side] for side in SIDES[1:]}
        rows.append(row)
        print(row)
    what = {
        "what": "head importances of one prompt, SmolLM2-135M, float32, all layers",
        "repeats": options.repeats,
        "statistic": "median",
        "nnsight": version("nnsight"),
        "transformers": version("transformers"),
    }
    write_report(options.out, conditions("cpu", "cpu") | what, rows=rows)


if __name__ == "__main__":
    without_folder(__file__)  # where this file would be found as nnsight
    main()
