"""Weights that stay on disk: a checkpoint is made on the spot, then traced in less memory than it takes."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flowroutes_fast as fr

_, tokenizer = fr.load("demo")
folder = Path(tempfile.mkdtemp()) / "checkpoint"
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
)
torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20MB")
tokenizer.save_pretrained(folder)
print(
    f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.0f} MB in {len(list(folder.glob('*.safetensors')))} files"
)

model, tokenizer = fr.open_streaming(folder, memory="90MB")  # the embedding alone is 50 MB
prompts = ["every layer is read once", "for all prompts of one call"]
streamed = fr.trace(model, tokenizer, prompts, resume=folder.parent / "run")  # killed? the same call goes on

resident = fr.trace(*fr.load(folder), prompts)
same = all(torch.equal(a.heads, b.heads) for a, b in zip(streamed, resident, strict=True))
print(streamed[0].route(threshold=0.04), "same as in memory, bit for bit:", same)
