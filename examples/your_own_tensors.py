"""No transformers model: importances of one attention layer of your own, from tensors (or NumPy and JAX arrays)."""

import numpy as np

from flowroutes_fast import ops

rng = np.random.default_rng(0)
tokens, heads, d_head, d_model = 12, 4, 16, 64
x = rng.normal(size=(1, tokens, d_model)).astype(np.float32)
w_v, w_o = (rng.normal(size=(heads, *shape)).astype(np.float32) / 8 for shape in ((d_model, d_head), (d_head, d_model)))
scores = rng.normal(size=(1, heads, tokens, tokens)).astype(np.float32)
scores[..., np.triu_indices(tokens, 1)[0], np.triu_indices(tokens, 1)[1]] = -np.inf
pattern = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
value = np.einsum("bkm,hmd->bkhd", x, w_v)
after = x + np.einsum("bhqk,bkhd,hdm->bqm", pattern, value, w_o)

# [batch, query, key, head], [batch, query]
importances, residual = ops.attention_importances(pattern, value, w_o, x, after)
print(importances.shape, "each row sums to one with the residual:", float((importances.sum((2, 3)) + residual)[0, -1]))
query, key, head = np.unravel_index(int(importances[0].argmax()), importances[0].shape)
print(f"strongest sub-edge: head {head}, token {key} -> {query}, {float(importances[0, query, key, head]):.3f}")
