"""Component-to-component scores at EAP-IG's shapes: the broadcast that it makes against component_importances, on equal
activations.

    python benchmarks/integrations/eap_ig.py --out benchmarks/results/integrations/eap_ig.json --checkout FOLDER

With a checkout of EAP-IG (and TransformerLens 3 installed) its own function is timed as well, forward pass included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

import torch

from flowroutes_fast.integrations.eap_ig import component_importances

MODELS = {"GPT-2 small": (12, 12, 768), "GPT-2 medium": (24, 16, 1024)}


def broadcast(outputs, state, lengths, heads):
    """One hook of the broadcast: every head's input against every output at once."""
    inputs = state[:, :, None].expand(-1, -1, heads, -1)[:, :, None]
    norm = torch.linalg.vector_norm
    near = (norm(inputs, ord=1, dim=-1) - norm(outputs[:, :, :, None] - inputs, ord=1, dim=-1)).clamp_min(0)
    share = near / near.sum(2, keepdim=True)
    real = (torch.arange(state.shape[1]) < lengths[:, None])[..., None, None]
    return ((share * real).sum(1) / lengths.view(-1, 1, 1)).sum(0)


def cases(layers, heads, width, texts, tokens):
    """Activations of a residual stream to which every component adds something, and the targets of one pass."""
    torch.manual_seed(0)
    n = 1 + layers * (heads + 1)
    outputs = torch.randn(texts, tokens, n, width) / n**0.5
    targets = []
    for layer in range(layers):
        first = 1 + layer * (heads + 1)
        # sources before, heads that read, inputs per head (query, key, value)
        targets += [(first, heads, 3), (first + heads, 1, 1)]
    return outputs, [*targets, (n, 1, 1)]


def run(side, outputs, targets, lengths):
    found = []
    for before, heads, times in targets:
        state = outputs[:, :, :before].sum(2)
        if side == "ours":
            found.append(component_importances(outputs[:, :, :before], state, lengths)[:, None].expand(-1, heads))
        else:
            for _ in range(times):
                last = broadcast(outputs[:, :, :before], state, lengths, heads)
            found.append(last)
    return found


def peak(reset=False):
    """Largest resident bytes of this process since the last reset (Linux)."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def memory(side, shape):
    """Peak bytes above what the activations need, in a process of its own."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); import torch, eap_ig as b\n"
        f"outputs, targets = b.cases(*{shape!r}); lengths = torch.full(({shape[3]},), {shape[4]})\n"
        "b.run('ours', outputs[:, :1], targets[:1], lengths * 0 + 1)\n"
        "before = b.peak(reset=True)\n"
        f"b.run({side!r}, outputs, targets, lengths); print(b.peak() - before)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def whole(checkout, repeats):
    """EAP-IG's own function against :func:`flowroutes_fast.integrations.eap_ig.scores`, on a random GPT-2 small,
    forward pass included.
    """
    sys.path.insert(0, f"{checkout}/src")
    import transformer_lens
    from eap import attribute
    from eap.graph import Graph

    from flowroutes_fast.integrations import eap_ig

    layers, heads, width = MODELS["GPT-2 small"]
    torch.manual_seed(0)
    config = {
        "n_ctx": 64,
        "d_mlp": 4 * width,
        "d_vocab": 1000,
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "device": "cpu",
    }
    model = transformer_lens.HookedTransformer(
        transformer_lens.HookedTransformerConfig(
            n_layers=layers, d_model=width, d_head=width // heads, n_heads=heads, **config
        )
    )
    for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
        switch(True)  # its own function needs them
    graph, tokens = Graph.from_model(model), torch.randint(0, 1000, (1, 20))
    attribute.tokenize_plus = lambda *_, **__: (tokens, torch.ones_like(tokens), torch.tensor([20]), 20)
    zeros = torch.zeros  # it asks for a CUDA device by name
    attribute.torch.zeros = lambda *size, **options: zeros(*size, **options | {"device": "cpu"})
    sides = {
        "theirs": lambda: attribute.get_scores_information_flow_routes(model, graph, [(["x"], None, None)], quiet=True),
        "ours": lambda: eap_ig.scores(model, graph, [(tokens, torch.tensor([20]))], quiet=True),
        "forward pass": lambda: model(tokens),
    }
    seconds, found = {name: [] for name in sides}, {}
    try:
        for _ in range(repeats + 1):
            for name, call in sides.items():
                start = time.perf_counter()
                with torch.no_grad():
                    found[name] = call()
                seconds[name].append(time.perf_counter() - start)
    finally:
        attribute.torch.zeros = zeros
    medians = {name: statistics.median(kept[1:]) for name, kept in seconds.items()}
    worst = float((found["theirs"] - found["ours"]).abs().max())
    return {
        "model": "GPT-2 small",
        "texts": 1,
        "tokens": 20,
        "transformer_lens": version("transformer_lens"),
        "seconds": medians,
        "ratio": medians["theirs"] / medians["ours"],
        "largest difference": worst,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkout", help="of EAP-IG, to time its own function")
    options = parser.parse_args()
    rows = []
    for name, (layers, heads, width) in MODELS.items():
        for texts, tokens in ((1, 20), (4, 20)):
            if texts > 1 and layers > 12:
                continue
            shape = (layers, heads, width, texts, tokens)
            outputs, targets = cases(*shape)
            lengths = torch.full((texts,), tokens)
            times = {"ours": [], "theirs": []}
            for _ in range(options.repeats):
                for side, kept in times.items():
                    start = time.perf_counter()
                    found = run(side, outputs, targets, lengths)
                    kept.append(time.perf_counter() - start)
                    if side == "ours":
                        mine = found
            worst = max(float((a - b).abs().max()) for a, b in zip(mine, found, strict=True))
            states = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                for before, *_rest in targets:
                    outputs[:, :, :before].sum(2)
                states.append(time.perf_counter() - start)
            shared = statistics.median(states)  # making the states is not part of either
            seconds = {side: statistics.median(kept) - shared for side, kept in times.items()}
            rows.append(
                {
                    "model": name,
                    "texts": texts,
                    "tokens": tokens,
                    "seconds": seconds,
                    "ratio": seconds["theirs"] / seconds["ours"],
                    "largest difference": worst,
                    "peak bytes": {side: memory(side, shape) for side in times},
                }
            )
            print(rows[-1])
    from flowroutes_fast.bench.run import conditions

    what = {
        "what": "component-to-component scores of one batch, all layers",
        "repeats": options.repeats,
        "statistic": "median",
    }
    found = {"conditions": conditions("cpu", "cpu") | what, "rows": rows}
    if options.checkout:
        found["whole function"] = whole(options.checkout, options.repeats)
        print(found["whole function"])
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
