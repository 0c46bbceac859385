"""Tiny random models of every family, in the Hugging Face layout."""

from pathlib import Path

import torch

SIZES = {  # the vocabulary and the intermediate size are multiples of nothing
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 81,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 11}
DENSE = {
    "llama": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3Config", {"sliding_window": 50}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2Config", {}),
}
"""Family → its configuration class in transformers, and what differs from its defaults."""

MIXTURES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 0,
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 9, "swiglu_limit": 1.0},
    ),
}
"""The same of families with experts."""

EAGER = ("gemma2",)
"""Families of which transformers' SDPA leaves the softcap out."""


def write_tiny_model(folder: Path, family: str, **options) -> Path:
    """A random model of `family` (`options` over `SIZES`) whose every gradient matters; returns `folder`."""
    import transformers

    config, differences = (DENSE | MIXTURES)[family]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = getattr(transformers, config)(**(SIZES | differences | options))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.05)
    model.save_pretrained(folder)
    return folder
