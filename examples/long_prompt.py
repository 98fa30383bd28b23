"""A prompt of several hundred tokens: what will it take, how is it known, and which sentence does the answer come
from?
"""

import flowroutes_fast as fr

NOTES = [
    f"Note {n}: the {thing} is kept in the {place}."
    for n, (thing, place) in enumerate(
        zip(
            ("ladder", "piano", "lamp", "kettle", "letter", "ticket", "violin", "map"),
            ("barn", "hall", "attic", "kitchen", "drawer", "coat", "cellar", "car"),
            strict=True,
        )
    )
]
text = "\n".join(NOTES * 3) + "\nQuestion: where is the violin kept? Answer: the violin is kept in the"

model, tokenizer = fr.load("demo")
estimate = fr.estimate(model, len(tokenizer(text)["input_ids"]))
print(f"{estimate.tokens} tokens: about {estimate.total / 1e9:.1f} GB and {estimate.seconds:.0f} s")

trace = fr.trace(model, tokenizer, text)
print("prediction:", trace.prediction[0])
print({name: trace.certificate[name] for name in ("pairs_bounded", "pairs_evaluated", "worst_error")})

table = trace.token_attribution(-1)
print(table.iloc[1:].nlargest(8, "importance").to_string(index=False))  # the first token takes much by itself
print(trace.route(rule="flow", keep=0.001))
