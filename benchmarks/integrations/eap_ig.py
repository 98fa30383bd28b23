"""Component-to-component scores at EAP-IG's shapes: the broadcast that it makes against component_importances, on equal
activations.

    python benchmarks/integrations/eap_ig.py --out benchmarks/results/integrations/eap_ig.json --checkout FOLDER

With a checkout of EAP-IG (and TransformerLens 3 installed) its own function is timed as well, forward pass included.
"""

import argparse
import sys
from functools import partial
from importlib.metadata import version

import torch

from flowroutes_fast.bench.harness import conditions, in_turns, peak_of, write_report
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


def memory(side, shape):
    """Peak bytes above what the activations need, in a process of its own."""
    prepare = (
        f"import torch; outputs, targets = b.cases(*{shape!r}); lengths = torch.full(({shape[3]},), {shape[4]})\n"
        "b.run('ours', outputs[:, :1], targets[:1], lengths * 0 + 1)"
    )
    return peak_of(__file__, prepare, f"b.run({side!r}, outputs, targets, lengths)")


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
    try:
        with torch.no_grad():
            turns = in_turns(sides, repeats, warm=1)
    finally:
        attribute.torch.zeros = zeros
    medians = turns.medians()
    worst = float((turns.found["theirs"] - turns.found["ours"]).abs().max())
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
            sides = ("ours", "theirs")
            turns = in_turns({s: partial(run, s, outputs, targets, lengths) for s in sides}, options.repeats)
            pairs = zip(turns.found["ours"], turns.found["theirs"], strict=True)
            worst = max(float((a - b).abs().max()) for a, b in pairs)
            # making the states is not part of either
            states = in_turns({"states": lambda: [outputs[:, :, :n].sum(2) for n, *_ in targets]}, options.repeats)  # noqa: B023
            shared = states.medians()["states"]
            seconds = {side: taken - shared for side, taken in turns.medians().items()}
            rows.append(
                {
                    "model": name,
                    "texts": texts,
                    "tokens": tokens,
                    "seconds": seconds,
                    "ratio": seconds["theirs"] / seconds["ours"],
                    "largest difference": worst,
                    "peak bytes": {side: memory(side, shape) for side in sides},
                }
            )
            print(rows[-1])
    what = {
        "what": "component-to-component scores of one batch, all layers",
        "repeats": options.repeats,
        "statistic": "median",
    }
    more = {"whole function": whole(options.checkout, options.repeats)} if options.checkout else {}
    print(more)
    write_report(options.out, conditions("cpu", "cpu") | what, rows=rows, **more)


if __name__ == "__main__":
    main()
