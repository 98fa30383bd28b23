"""Scores of source tokens for generated tokens in inseq: its own methods beside information_flow_routes, on the same
text.

They measure different things; what is compared is the price of a call of model.attribute with the generated text given.

python benchmarks/integrations/inseq.py --out benchmarks/results/integrations/inseq.json
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
SIDES = {  # method, attention implementation, options
    "routes, sub-edges": ("information_flow_routes", "sdpa", {}),
    "routes, sub-edges, certified": ("information_flow_routes", "sdpa", {"precision": "certified"}),
    "routes, tokens": ("information_flow_routes", "sdpa", {"score": "tokens"}),
    "attention weights": ("attention", "eager", {}),
    "saliency": ("saliency", "sdpa", {}),
    "integrated gradients": ("integrated_gradients", "sdpa", {"n_steps": 20}),
}
LONGEST = {"saliency": 128, "integrated gradients": 14}  # source tokens; left out beyond, to keep the run short


def prompt_of(tokenizer, tokens):
    return tokenizer.decode(tokenizer(TEXT * (1 + tokens // 40))["input_ids"][:tokens])


def call(side, model, tokenizer, prompt):
    """A function that attributes once."""
    import inseq

    from flowroutes_fast.integrations.inseq import register

    register()
    method, attention, options = SIDES[side]
    wrapped = inseq.load_model(model, method, tokenizer=tokenizer)

    def run():
        model.set_attn_implementation(attention)
        return wrapped.attribute(prompt, prompt + TARGET, show_progress=False, **options)

    return run


def memory(side, tokens):
    """Peak bytes of one call above the loaded, once used model, in a process of its own."""
    prepare = (
        "import flowroutes_fast as fr; model, tokenizer = fr.load('demo')\n"
        f"b.call({side!r}, model, tokenizer, 'Mary gave')()\n"
        f"run = b.call({side!r}, model, tokenizer, b.prompt_of(tokenizer, {tokens}))"
    )
    return peak_of(__file__, prepare, "run()")


def main():
    without_folder(__file__)  # this folder's inseq.py and captum.py are not the libraries
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[14, 128, 512])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from importlib.metadata import version

    import flowroutes_fast as fr

    model, tokenizer = fr.load("demo")
    rows = []
    for tokens in options.tokens:
        prompt = prompt_of(tokenizer, tokens)
        sides = [side for side in SIDES if tokens <= LONGEST.get(side, 10**9)]
        calls = {side: call(side, model, tokenizer, prompt) for side in sides}
        turns = in_turns(calls, options.repeats, warm=1)
        found = turns.found[sides[-1]].sequence_attributions[0]
        rows.append(
            {
                "source tokens": tokens,
                "generated tokens": found.attr_pos_end - found.attr_pos_start,
                "seconds": turns.medians(),
                "peak bytes": {side: memory(side, tokens) for side in sides},
            }
        )
        print(json.dumps(rows[-1], indent=1), flush=True)
    what = {
        "model": "SmolLM2-135M, fp32",
        "inseq": version("inseq"),
        "captum": version("captum"),
        "integration steps": 20,
        "repeats": options.repeats,
    }
    write_report(options.out, conditions("cpu", "cpu") | what, rows=rows)


if __name__ == "__main__":
    main()
