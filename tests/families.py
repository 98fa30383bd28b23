"""Tiny random models of every family: odd sizes, biases that are not zero, two or more layers."""

import torch

GROUPED = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": True,
}
ALONE = {k: v for k, v in GROUPED.items() if k not in ("num_key_value_heads", "head_dim")}
EXPERTS = {
    "intermediate_size": 76,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "decoder_sparse_step": 1,
}
LATENT = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 30,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ALIKE = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "olmo",
    "nemotron",
    "seed_oss",
    "apertus",
    "helium",
    "ernie4_5",
    "hunyuan_v1_dense",
    "glm",
    "glm4",
    "phi3",
    "starcoder2",
    "smollm3",
    "bitnet",
    "granite",
    "olmo2",
    "exaone4",
    "cohere",
    "stablelm",
]

OPTIONS = dict.fromkeys(ALIKE, GROUPED) | {
    "afmoe": GROUPED
    | EXPERTS
    | {"num_dense_layers": 1, "sliding_window": 5, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "bamba": {k: v for k, v in GROUPED.items() if k != "head_dim"} | MAMBA | {"attn_layer_indices": [1]},
    "bitnet": GROUPED | {"attention_bias": False, "head_dim": 10},
    "helium": GROUPED | {"head_dim": 10},
    "bloom": {"hidden_size": 60, "n_layer": 3, "n_head": 6, "vocab_size": 101},
    "codegen": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 64, "rotary_dim": 8},
    "cohere2": GROUPED | SLIDING,
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "exaone4": GROUPED | SLIDING,
    "falcon": ALONE
    | {"new_decoder_architecture": False, "multi_query": True, "bias": True, "parallel_attn": True, "alibi": False},
    "falcon_h1": GROUPED | MAMBA | {"mamba_d_ssm": 120, "attn_out_multiplier": 0.7, "ssm_out_multiplier": 1.3},
    "gemma2": GROUPED | SLIDING | {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0},
    "gemma3_text": GROUPED | SLIDING | {"query_pre_attn_scalar": 12},
    "gemma4_text": GROUPED
    | SLIDING
    | {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 101,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
    },
    "gpt2": {"n_embd": 60, "n_layer": 3, "n_head": 5, "vocab_size": 101, "n_positions": 64},
    "gpt_bigcode": {"n_embd": 60, "n_layer": 3, "n_head": 5, "vocab_size": 101, "n_positions": 64, "multi_query": True},
    "gpt_neo": ALONE
    | {
        "num_layers": 3,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 5,
    },
    "gpt_neox": ALONE | {"use_parallel_residual": True},
    "gpt_oss": GROUPED | EXPERTS | SLIDING,
    "gptj": {"n_embd": 60, "n_layer": 3, "n_head": 5, "vocab_size": 101, "n_positions": 64, "rotary_dim": 4},
    "granite": GROUPED | {"residual_multiplier": 0.4, "attention_multiplier": 0.2},
    "granitemoe": GROUPED | EXPERTS | {"residual_multiplier": 0.4},
    "granitemoehybrid": {k: v for k, v in GROUPED.items() if k != "head_dim"}
    | EXPERTS
    | MAMBA
    | {"residual_multiplier": 0.4, "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 30},
    "jamba": {k: v for k, v in GROUPED.items() if k != "head_dim"}
    | EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
    "llama4_text": GROUPED
    | EXPERTS
    | {"intermediate_size_mlp": 50, "attention_chunk_size": 6, "interleave_moe_layer_step": 2},
    "minicpm3": LATENT | {"scale_depth": 1.4},
    "minimax": GROUPED
    | EXPERTS
    | {
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "block_size": 8,
        "full_attn_alpha_factor": 0.8,
        "full_attn_beta_factor": 1.1,
        "linear_attn_alpha_factor": 0.9,
        "linear_attn_beta_factor": 1.2,
        "mlp_alpha_factor": 0.7,
        "mlp_beta_factor": 1.3,
    },
    "mistral": GROUPED | {"sliding_window": 5},
    "mixtral": GROUPED | EXPERTS,
    "mpt": {"d_model": 60, "n_layers": 3, "n_heads": 5, "vocab_size": 101, "max_seq_len": 64, "expansion_ratio": 2},
    "olmo3": GROUPED | SLIDING,
    "opt": ALONE | {"ffn_dim": 77, "do_layer_norm_before": True, "word_embed_proj_dim": 60},
    "phi": ALONE | {"hidden_size": 96},
    "qwen2_moe": GROUPED | EXPERTS | {"shared_expert_intermediate_size": 30, "qkv_bias": True},
    "qwen3_moe": GROUPED | EXPERTS,
    "qwen3_next": GROUPED
    | EXPERTS
    | {
        "attention_bias": False,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 10,
        "shared_expert_intermediate_size": 30,
    },
    "stablelm": GROUPED | {"hidden_size": 96, "head_dim": 16, "use_qkv_bias": True},
    "recurrent_gemma": GROUPED
    | {"lru_width": 60, "attention_window_size": 6, "block_types": ["recurrent", "attention"], "num_hidden_layers": 4},
}
VARIANTS = {  # another block shape of the same family
    "falcon, sequential": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "alibi": True, "attn_implementation": "eager"},
    ),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "bloom, residual after the norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "gemma4_text, shared values": ("gemma4_text", {"num_kv_shared_layers": 1}),
    "mpt, clipped": ("mpt", {"attn_config": {"clip_qkv": 0.5}}),
}


def make(name, **more):
    """A random float32 model of a family (a key of OPTIONS or VARIANTS)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, extra = VARIANTS.get(name, (name, {}))
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(OPTIONS[kind] | extra | more))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 2 and "conv" not in label:
                parameter.mul_(3)
            elif parameter.dim() == 1 and "norm" in label:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 3:  # experts are left uninitialised by some families
                parameter.normal_(0, 0.1)
        for label, buffer in model.named_buffers():
            if label.endswith("layer_scalar"):
                buffer.fill_(0.8)
    return model
