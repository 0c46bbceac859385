"""How each family runs on tensor-parallel ranks, as data: module-name pattern → style (`train.parallel.styles`).

`*` matches any run of characters. A pattern may match nothing: a pipeline stage has no embedding or no head.
"""

DENSE = {
    "embed_tokens": "vocab",
    "layers.*.attention_norm": "stream",
    "layers.*.attention": "gather",
    "layers.*.attention.q_proj": "column",
    "layers.*.attention.k_proj": "kv",
    "layers.*.attention.v_proj": "kv",
    "layers.*.attention.o_proj": "row",
    "layers.*.mlp_norm": "stream",
    "layers.*.mlp": "gather",
    "layers.*.mlp.gate_proj": "column",
    "layers.*.mlp.up_proj": "column",
    "layers.*.mlp.down_proj": "row",
    "norm": "stream",
    "lm_head": "vocab",
}
POST_NORMS = {"layers.*.attention_post_norm": "stream", "layers.*.mlp_post_norm": "stream"}
# Over the dimensions of each head: every rank has the whole weight and some heads.
HEAD_NORMS = {"layers.*.attention.q_norm": "whole", "layers.*.attention.k_norm": "whole"}
# Over all heads of a projection, which lie on different ranks.
PROJECTION_NORMS = {"layers.*.attention.q_norm": "features", "layers.*.attention.k_norm": "kv"}
# A router sees the tokens of its rank, the shared expert is an MLP like others; the experts themselves are placed by
# train.parallel.ep.
MIXTURE = {
    "layers.*.mlp.router": "routed",
    "layers.*.mlp.shared": "gather",
    "layers.*.mlp.shared.gate_proj": "column",
    "layers.*.mlp.shared.up_proj": "column",
    "layers.*.mlp.shared.down_proj": "row",
    "layers.*.mlp.shared_gate": "stream",
}
# Every rank computes the latents, and of them its heads.
LATENT = {
    "layers.*.attention.q_a_proj": "whole",
    "layers.*.attention.q_a_norm": "whole",
    "layers.*.attention.q_b_proj": "column",
    "layers.*.attention.kv_a_proj": "whole",
    "layers.*.attention.kv_a_norm": "whole",
    "layers.*.attention.kv_b_proj": "column",
}
_NO_PRE_NORMS = {pattern: style for pattern, style in DENSE.items() if not pattern.endswith("_norm")}

PLANS = {
    "llama": DENSE,
    "mistral": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE | HEAD_NORMS,
    "gemma2": DENSE | POST_NORMS,
    "gemma3_text": DENSE | POST_NORMS | HEAD_NORMS,
    "phi3": DENSE,
    "smollm3": DENSE,
    "olmo2": _NO_PRE_NORMS | POST_NORMS | PROJECTION_NORMS,
    "mixtral": DENSE | MIXTURE,
    "qwen2_moe": DENSE | MIXTURE,
    "qwen3_moe": DENSE | MIXTURE | HEAD_NORMS,
    "deepseek_v3": DENSE | MIXTURE | LATENT,
    "gpt_oss": DENSE | MIXTURE,
}
