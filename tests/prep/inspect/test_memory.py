"""The memory estimate of `prep plan` against the parameters of the trainer's models and tracked training steps."""

import pytest
from estimated_models import DENSE, MIXTURE

from prep.inspect.memory import RECOMPUTE, Layout, memory, parameters

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402

from train.attention.interface import Segments  # noqa: E402
from train.config import Optim, build  # noqa: E402
from train.model import experts  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402
from train.model.families import model_config  # noqa: E402
from train.optim import build_optimizer  # noqa: E402
from train.parallel.recompute import apply_recompute  # noqa: E402

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"head_dim": 20}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 8, "head_dim": 12, "mlp_only_layers": [1]}),
    "deepseek_v3": ("DeepseekV3Config", {**EXPERTS, **LATENT, "n_routed_experts": 8, "first_k_dense_replace": 1}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 12}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_trainers_model(family):
    name, options = FAMILIES[family]
    if family == "deepseek_v3":
        options = {**options, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
    config = getattr(transformers, name)(**{**SIZES, **options}).to_dict()
    with torch.device("meta"):
        model = Decoder(model_config(config))
    assert parameters(config) == sum(p.numel() for p in model.parameters())


def tracked(config: dict, tokens: int, recompute: str, rows: int) -> int:
    """Bytes of all tensors at the highest point of the second training step of `rows` rows."""
    torch.manual_seed(0)
    model = Decoder(model_config(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if recompute != "none":
        apply_recompute(model, None, build({"recompute": recompute}))
    optimizer = build_optimizer(model, Optim())
    ids, positions = torch.randint(0, config["vocab_size"], (tokens,)), torch.arange(tokens)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            for _ in range(rows):
                tracker.reset_mod_stats()  # it would refuse to see a module twice; the peak stays
                model(ids, positions, Segments.of([tokens]), ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(
    ("config", "recompute", "rows", "kernel"),
    [
        (DENSE, "none", 1, False),
        (DENSE, "selective", 2, False),
        (DENSE, "full", 1, False),
        (MIXTURE, "none", 1, False),
        (MIXTURE, "selective", 2, False),
        (MIXTURE, "full", 1, False),
        (MIXTURE, "none", 2, True),
        (MIXTURE, "selective", 1, True),
        (MIXTURE, "full", 2, True),
    ],
)
def test_the_estimate_is_what_a_tracked_step_takes(config, recompute, rows, kernel, monkeypatch):
    monkeypatch.setattr(experts, "has_kernel", lambda x, weight: kernel)
    layout = Layout(1024, rows=rows, bytes=4, recompute=recompute, gpu=kernel)
    estimate = memory(config, layout)["total"]
    assert estimate == pytest.approx(tracked(config, 1024, recompute, rows), rel=0.1)


def test_axes_divide_what_they_should():
    dense = {**DENSE, "num_hidden_layers": 8}
    sparse = {**dense, "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 2}
    sparse["moe_intermediate_size"] = 64
    for config in (dense, sparse):
        one = memory(config, Layout(4096))
        for axes in ({"dp_shard": 4}, {"cp": 4}, {"tp": 4}, {"dp_shard": 2, "tp": 2}):
            many = memory(config, Layout(4096, **axes))
            assert many["optimizer"] == pytest.approx(one["optimizer"] / 4, rel=0.15), axes
        replicas = memory(config, Layout(4096, dp_replicate=4))
        assert replicas == one
        assert memory(config, Layout(4096, cp=4))["activations"] == one["activations"] // 4
    spread = {ep: memory(sparse, Layout(4096, dp_shard=4, ep=ep)) for ep in (1, 4)}
    assert spread[1]["optimizer"] == spread[4]["optimizer"]
    experts = 16 * 3 * 128 * 64  # of a layer; two layers are gathered, in bfloat16, three quarters of them elsewhere
    assert spread[1]["gathered"] - spread[4]["gathered"] == 2 * 2 * experts * 3 // 4
    selective = [memory(sparse, Layout(4096, dp_shard=4, ep=ep, recompute="selective"))["activations"] for ep in (1, 4)]
    assert selective[1] - selective[0] == 8 * 4096 * 2 * 2 * 2 * 128, "8 layers, what 2 rows a token bring and take"
    # Tensor ranks are data ranks of the experts: ep may span them, and no matrix of an expert is cut.
    cut, whole = (memory(sparse, Layout(4096, tp=4, ep=ep)) for ep in (4, 1))
    assert cut["optimizer"] == whole["optimizer"]
    # Twice 4 tensor ranks, what each of them holds whole is divided by none.
    halves = memory(sparse, Layout(4096, tp=2, dp_shard=2, ep=4))
    assert 0 < cut["optimizer"] - halves["optimizer"] < 0.02 * cut["optimizer"]
    # The last of stages of 5 and 3 layers, which has the head.
    pipelines = [memory(sparse, Layout(4096, pp=2, dp_shard=2, tp=2, ep=ep))["gathered"] for ep in (1, 4)]
    assert pipelines[0] - pipelines[1] == 2 * 3 * experts * 3 // 4
    kept = {recompute: memory(dense, Layout(4096, recompute=recompute)) for recompute in RECOMPUTE}
    none, selective, full = (kept[recompute]["activations"] for recompute in RECOMPUTE)
    assert none > 1.5 * selective > 3 * full
