"""Which heads are active for indirect objects, and which of them only there (against prompts in which nobody can be
meant)?
"""

import flowroutes_fast as fr

model, tokenizer = fr.load("demo")
prompts = fr.templates.ioi(6, tokenizer=tokenizer)
task = fr.trace(model, tokenizer, [p.prompt for p in prompts])
other = fr.trace(model, tokenizer, [p.contrasts["third"] for p in prompts])
print(prompts[0].prompt, "->", task[0].prediction[0])

print("\nactive in most routes, task or not:")
print(fr.head_frequencies(task).nlargest(5, ["frequency", "importance"]).to_string(index=False))
print("\nmore active in the task than in its contrast, with 95 % intervals:")
print(fr.contrast(task, other, paired=True).head(5).to_string(index=False))
