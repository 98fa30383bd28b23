"""Tiny models as GGUF files with a tokenizer of their own: a llama, and a mixture of experts whose tensors are
merged.
"""

from pathlib import Path

import numpy as np
from families import make

ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
SIZES = {"attention_bias": False, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 768,
}  # transformers reads no other width


def write(path: Path, kind: str = "llama") -> Path:
    """A GGUF file of one layer: ``"llama"`` or ``"qwen3_moe"``."""
    import gguf

    model = make(kind, num_hidden_layers=1, **SIZES, **(EXPERTS if kind == "qwen3_moe" else {}))
    writer = gguf.GGUFWriter(path, kind.replace("_", ""))
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(101)
    if kind == "qwen3_moe":
        writer.add_key_length(16)
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(256 + i) for i in range(100)), "ĀĀ"])
    writer.add_token_merges(["Ā Ā"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        for theirs, numbers in _stored(name, weight.numpy().astype(np.float32)).items():
            writer.add_tensor(f"{theirs}.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """A parameter under its names in GGUF."""
    ours = name.removesuffix(".weight").removeprefix("model.layers.0.")
    if ours == "mlp.experts.gate_up_proj":
        gate, up = np.split(weight, 2, axis=1)
        return {"blk.0.ffn_gate_exps": np.ascontiguousarray(gate), "blk.0.ffn_up_exps": np.ascontiguousarray(up)}
    if ours == "mlp.experts.down_proj":
        return {"blk.0.ffn_down_exps": weight}
    return {ENDS.get(ours) or f"blk.0.{PARTS[ours]}": weight}
