"""What `prep plan` says that a layer keeps for its backward, against what the trainer's layer saves."""

import pytest

from prep.inspect.layers import layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from train.attention.interface import Segments  # noqa: E402
from train.model import experts  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402
from train.model.families import model_config  # noqa: E402

TOKENS = 256
SIZES = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 96}
LATENT = {"q_lora_rank": 40, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32}
GROUPS = {"n_routed_experts": 16, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 40}),
    "gemma2": ("Gemma2Config", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 80}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 16, "head_dim": 40}),
    "deepseek_v3": ("DeepseekV3Config", {**EXPERTS, **LATENT, **GROUPS}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 32}),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


def saved(config):
    """Bytes a token that the second layer saves for its backward, in float32: storages, each once."""
    torch.manual_seed(0)
    model = Decoder(model_config(config))
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor.detach(), std=0.02)
    block, calls = list(model.layers.children())[1], []
    block.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    ids = torch.randint(0, 199, (TOKENS,))
    with torch.no_grad():
        model(ids, torch.arange(TOKENS), Segments.of([TOKENS]), ids)
    hidden, tables, segments = calls[0]
    if model.config.moe is not None:
        block.mlp.router.aux_coefficient = 0.01
    others = (*model.parameters(), *model.buffers(), *tables, *vars(segments).values())
    others = {t.untyped_storage().data_ptr() for t in others if isinstance(t, torch.Tensor)}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = block(hidden.detach().requires_grad_(), tables, segments)
    assert result.requires_grad
    return sum(storage.nbytes() for storage in found.values()) / TOKENS


@pytest.mark.parametrize(
    ("family", "kernel"), [*((family, False) for family in FAMILIES), *((family, True) for family in MIXTURES)]
)
def test_a_layer_keeps_what_is_counted(family, kernel, monkeypatch):
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **options}).to_dict()
    monkeypatch.setattr(experts, "has_kernel", lambda x, weight: kernel)
    layer = layers(config, kernel=kernel)[1]
    assert 4 * layer.kept + layer.bytes == pytest.approx(saved(config), rel=0.03)
