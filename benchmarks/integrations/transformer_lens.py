"""Head importances of one prompt: a TransformerLens cache and the full decomposition against one call of fr.trace; head
results likewise.

python benchmarks/integrations/transformer_lens.py --out benchmarks/results/integrations/transformer_lens.json

Results are kept by version of TransformerLens: run it in an environment of each.
"""

import argparse
import json
import logging
import os
from functools import partial
from importlib.metadata import version

import torch

import flowroutes_fast as fr
from flowroutes_fast.bench.harness import conditions, in_turns, medians, peak_of, without_folder

TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary, and then they walked home along the river in "
    "the rain. "
)
TRACES = {"tokens": (64, 128), "sides": ("transformer_lens", "certified", "exact", "cache")}
HEADS = {"tokens": (64, 256), "sides": ("cache.stack_head_results", "ours")}


def head_importances(model, tokens):
    _, cache = model.run_with_cache(tokens)
    heads = []
    for layer in range(model.cfg.n_layers):
        before, state = cache["resid_pre", layer][0], cache["resid_mid", layer][0]  # [token, d_model]
        weights = cache["pattern", layer][0]  # [head, query, key]
        value = cache["v", layer][0]  # [key, kv_head, d_head]
        value = value.repeat_interleave(len(weights) // value.shape[1], 1)
        value = torch.einsum("khe,hed->khd", value, model.blocks[layer].attn.W_O)
        parts = weights.permute(1, 2, 0)[..., None] * value  # [query, key, head, d_model]
        norm = state.abs().sum(-1)
        near = (norm[:, None, None] - (state[:, None, None] - parts).abs().sum(-1)).clamp_min(0)
        rest = (norm - (state - before).abs().sum(-1)).clamp_min(0)
        total = near.sum((1, 2)) + rest
        heads.append(near.sum(1) / total[:, None])
    return torch.stack(heads)  # [layer, query, head]


def prepared(tokens):
    """The demo model as a bridge, and ids."""
    from transformer_lens.model_bridge import TransformerBridge

    logging.getLogger().setLevel(logging.ERROR)
    model, tokenizer = fr.load("demo")
    ids = torch.tensor(tokenizer(TEXT * (tokens // 16), add_special_tokens=False)["input_ids"][:tokens])
    assert len(ids) == tokens
    return TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=model, tokenizer=tokenizer, device="cpu"
    ), ids


def needs(side, model, ids):
    """What a side is given before its time counts."""
    from flowroutes_fast.integrations.transformer_lens import hooks_for

    with torch.no_grad():
        if side == "cache":
            return model.run_with_cache(ids[None], names_filter=hooks_for(model))[1]
        if side in HEADS["sides"]:
            return model.run_with_cache(ids[None], names_filter=lambda name: name.endswith("hook_z"))[1]
    return model


@torch.no_grad()
def run(side, given, ids):
    from flowroutes_fast.integrations.transformer_lens import stack_head_results

    if side == "transformer_lens":
        return head_importances(given, ids)
    if side == "cache":
        return fr.trace(given, None, ids)
    if side in TRACES["sides"]:
        return fr.trace(given, None, ids, precision=side)
    if side == "ours":
        return stack_head_results(given)
    for name in [name for name in given.cache_dict if name.endswith("hook_result")]:
        del given.cache_dict[name]  # or it would be read instead of computed
    return given.stack_head_results()


def memory(side, tokens):
    """Peak bytes above the loaded and warmed up model (and the cache a side is given), in a process of its own."""
    prepare = (
        f"model, ids = b.prepared({tokens}); b.run({side!r}, b.needs({side!r}, model, ids[:8]), ids[:8])\n"
        f"given = b.needs({side!r}, model, ids)"
    )
    return peak_of(__file__, prepare, f"b.run({side!r}, given, ids)")


def measured(what, repeats, check):
    rows = []
    for tokens in what["tokens"]:
        model, ids = prepared(tokens)
        sides = what["sides"]
        given = {side: needs(side, model, ids) for side in sides}
        for side in sides:
            run(side, needs(side, model, ids[:8]), ids[:8])
        turns = in_turns({side: partial(run, side, given[side], ids) for side in sides}, repeats)
        found = turns.found
        row = {
            "tokens": tokens,
            "seconds": turns.medians(),
            "of these in the system (pages of large tensors)": medians(turns.system),
        } | check(tokens, found)
        row["ratio"] = {side: row["seconds"][sides[0]] / row["seconds"][side] for side in sides[1:]}
        found.clear()
        given.clear()
        row["peak bytes"] = {side: memory(side, tokens) for side in sides}
        rows.append(row)
        print(row, flush=True)
    return rows


def same_heads(tokens, found):
    theirs, certified = found["transformer_lens"], found["certified"]
    difference = float((found["exact"].heads - theirs).abs().max())
    outside = max(
        float(torch.maximum(t.heads_low - theirs, theirs - t.heads_high).max()) for t in (certified, found["cache"])
    )
    if not (difference < 1e-4 and outside < 1e-4):
        raise SystemExit(
            f"{tokens} tokens: the sides differ (exact by {difference:.1e}, certified intervals missed "
            f"by {outside:.1e})"
        )
    return {"largest difference of exact heads": difference, "farthest outside a certified interval": outside}


def same_results(tokens, found):
    theirs, ours = found["cache.stack_head_results"], found["ours"]
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if ours.shape != theirs.shape or not difference < 1e-5:
        raise SystemExit(f"{tokens} tokens: head results differ by {difference:.1e} relative")
    return {"largest relative difference": difference, "bytes of the result": ours.numel() * ours.element_size()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    what = {
        "what": "SmolLM2-135M as a TransformerBridge, float32, all layers",
        "repeats": options.repeats,
        "statistic": "median",
        "transformer_lens": version("transformer-lens"),
        "transformers": version("transformers"),
    }
    found = {
        "conditions": conditions("cpu", "cpu") | what,
        "head importances": measured(TRACES, options.repeats, same_heads),
        "stack_head_results": measured(HEADS, options.repeats, same_results),
    }
    if options.out:
        kept = {}
        if os.path.exists(options.out):
            with open(options.out, encoding="utf-8") as file:
                kept = json.load(file)
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(kept | {f"transformer_lens {version('transformer-lens')}": found}, file, indent=1)


if __name__ == "__main__":
    without_folder(__file__)  # where this file would be found as transformer_lens
    main()
