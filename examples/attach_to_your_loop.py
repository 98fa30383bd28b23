"""Leave it on: generate as usual, then one more forward pass explains every generated token, and a line per token
is logged.
"""

import json
from pathlib import Path

import flowroutes_fast as fr

model, tokenizer = fr.load("demo")
log = Path("out/routes.jsonl")
log.parent.mkdir(exist_ok=True)


def generate(prompt: str) -> str:
    """Your loop; all that is added is a trace and a line in a file."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    start = inputs["input_ids"].shape[1]
    trace = fr.trace(model, tokenizer, ids[:-1], thresholds=(0.04,))  # the last token explains nothing yet
    with log.open("a") as lines:
        for position in range(start - 1, len(trace.tokens)):
            edges = trace.route(position, 0.04).edges
            heads = edges[(edges["kind"] == "attention") & (edges["source"] != edges["target"])].nlargest(
                3, "importance"
            )
            token = tokenizer.decode(ids[position + 1])
            strongest = [f"L{e.layer}H{e.head} from {trace.tokens[e.source]}" for e in heads.itertuples()]
            lines.write(json.dumps({"token": token, "sub-edges": len(edges), "strongest": strongest}) + "\n")
    return tokenizer.decode(ids[start:])


print(generate("The capital of France is"))
print(log.read_text())
