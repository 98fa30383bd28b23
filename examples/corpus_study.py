"""Which heads belong to code and which to sums? Functions of Python's own library against generated arithmetic."""

import inspect
import random
import tempfile
import textwrap
from pathlib import Path

import flowroutes_fast as fr
from flowroutes_fast.analysis import domain_means

rng = random.Random(0)
code = [inspect.getsource(f) for _, f in inspect.getmembers(textwrap, inspect.isfunction)]
sums = [
    f"{a} + {b} = {a + b}\n{b} + {a} = {a + b}"
    for a, b in ((rng.randrange(10, 99), rng.randrange(10, 99)) for _ in range(8))
]

model, tokenizer = fr.load("demo")
run = fr.corpus(model, tokenizer, {"code": code, "sums": sums}, Path(tempfile.mkdtemp()) / "run", max_tokens=64)
print(run)

means = domain_means(run).pivot(index="component", columns="domain", values="mean")
means["difference"] = means["code"] - means["sums"]
print("more important in code:\n", means.nlargest(4, "difference").round(4))
print("more important in sums:\n", means.nsmallest(4, "difference").round(4))
