"""Scores of prompt tokens for a given continuation: captum's methods for language models beside the token attribution
of routes.

They measure different things (a change or a derivative of the continuation's log-probability there, the make-up of the
states that predict it here); what is compared is the price of a table [output token, input token].

python benchmarks/integrations/captum.py --out benchmarks/results/integrations/captum.json
"""

import argparse
import json

from flowroutes_fast.bench.harness import conditions, in_turns, peak_of, without_folder, write_report

TEXT = (
    "When Mary and John went to the store, John gave a drink to Mary. She thanked him and they walked home along the "
    "river, where the boats "
    "of the fishermen lay in the evening sun and two dogs ran after a ball that nobody had thrown. "
)
TARGET = " Mary because she was thirsty"
SIDES = (
    "routes, exact",
    "routes, certified",
    "feature ablation",
    "feature ablation, token by token",
    "Shapley value sampling",
    "integrated gradients",
)
SHAPLEY_SAMPLES, STEPS = 5, 20
LONGEST = {
    "feature ablation, token by token": 14,
    "Shapley value sampling": 14,
    "integrated gradients": 14,
}  # prompt tokens; left out beyond, to keep the run short


def prompt_of(tokenizer, tokens):
    return tokenizer.decode(tokenizer(TEXT * (1 + tokens // 40))["input_ids"][:tokens])


def call(side, model, tokenizer, prompt):
    """A function that computes the table once."""
    if side.startswith("routes"):
        from flowroutes_fast.integrations.captum import attribute

        precision = side.split(", ")[1]
        return lambda: attribute(model, tokenizer, prompt, TARGET, precision=precision)
    from captum.attr import (
        FeatureAblation,
        LayerIntegratedGradients,
        LLMAttribution,
        LLMGradientAttribution,
        ShapleyValueSampling,
        TextTokenInput,
    )

    given = TextTokenInput(prompt, tokenizer)
    if side == "integrated gradients":
        method = LLMGradientAttribution(LayerIntegratedGradients(model, model.get_input_embeddings()), tokenizer)
        return lambda: method.attribute(given, target=TARGET, n_steps=STEPS)
    if side.startswith("feature ablation"):
        method = LLMAttribution(FeatureAblation(model), tokenizer)
        # captum's default is True
        return lambda: method.attribute(given, target=TARGET, forward_in_tokens=side.endswith("token by token"))
    method = LLMAttribution(ShapleyValueSampling(model), tokenizer)
    return lambda: method.attribute(given, target=TARGET, n_samples=SHAPLEY_SAMPLES, forward_in_tokens=False)


def memory(side, tokens):
    """Peak bytes of one call above the loaded, once used model, in a process of its own."""
    prepare = (
        "import torch, flowroutes_fast as fr, captum.attr; model, tokenizer = fr.load('demo')\n"
        f"b.call({side!r}, model, tokenizer, 'Mary')\n"
        "with torch.no_grad(): model(**tokenizer('Mary', return_tensors='pt'))\n"
        f"run = b.call({side!r}, model, tokenizer, b.prompt_of(tokenizer, {tokens}))"
    )
    return peak_of(__file__, prepare, "run()")


def main():
    without_folder(__file__)  # this folder's captum.py is not captum
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[14, 64])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    import captum

    import flowroutes_fast as fr

    model, tokenizer = fr.load("demo")
    rows = []
    for tokens in options.tokens:
        prompt = prompt_of(tokenizer, tokens)
        sides = [side for side in SIDES if tokens <= LONGEST.get(side, 10**9)]
        calls = {side: call(side, model, tokenizer, prompt) for side in sides}
        calls["routes, exact"](), calls["routes, certified"]()  # they are short: warm up
        turns = in_turns(calls, options.repeats)
        shapes = {tuple(found.token_attr.shape) for found in turns.found.values()}
        assert len(shapes) == 1, shapes
        rows.append(
            {
                "prompt tokens": tokens,
                "output tokens": shapes.pop()[0],
                "seconds": turns.medians(),
                "peak bytes": {side: memory(side, tokens) for side in sides},
            }
        )
        print(json.dumps(rows[-1], indent=1), flush=True)
    what = {
        "model": "SmolLM2-135M, fp32",
        "captum": captum.__version__,
        "Shapley samples": SHAPLEY_SAMPLES,
        "integration steps": STEPS,
        "repeats": options.repeats,
    }
    write_report(options.out, conditions("cpu", "cpu") | what, rows=rows)


if __name__ == "__main__":
    main()
