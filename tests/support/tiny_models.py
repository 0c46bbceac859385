"""Tiny random models of every dense family, in the Hugging Face layout."""

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

EAGER = ("gemma2",)
"""Families of which transformers' SDPA leaves the softcap out."""


def write_tiny_model(folder: Path, family: str, **options) -> Path:
    """A random model of `family` (`options` over `SIZES`) whose every gradient matters; returns `folder`."""
    import transformers

    config, differences = DENSE[family]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = getattr(transformers, config)(**(SIZES | differences | options))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.15)
    model.save_pretrained(folder)
    return folder
