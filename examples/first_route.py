"""Explain one prediction: the route as text, as a page, and its strongest edges."""

import flowroutes_fast as fr

model, tokenizer = fr.load("demo")
trace = fr.trace(model, tokenizer, "When Mary and John went to the store, John gave a drink to")
print(f"prediction: {trace.prediction[0]}")

route = trace.route(position=-1, threshold=0.04)
print(route.to_text())

moved = route.edges[(route.edges["kind"] == "attention") & (route.edges["source"] != route.edges["target"])]
for edge in moved.nlargest(5, "importance").itertuples():
    print(
        f"L{edge.layer}H{edge.head}: {trace.tokens[edge.source]!r} -> {trace.tokens[edge.target]!r}  "
        f"{edge.importance:.3f}"
    )
print("wrote", route.to_html("out/first_route.html"))
