"""FLOPs from lengths, against counting every pair and every weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.cost import Model, PackCost, causal_pairs

DENSE = {
    "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "vocab_size": 50,
}  # fmt: skip


@given(st.integers(0, 60), st.integers(0, 70))
def test_pairs_by_counting(s, window):
    by_hand = sum(1 for q in range(s) for k in range(q + 1) if window == 0 or q - k < window)
    assert causal_pairs(np.array([s]), window).tolist() == [by_hand]


def test_dense_by_hand():
    m = Model.from_config(DENSE)
    head_dim = 2
    weights = 8 * 4 * head_dim + 2 * 8 * 2 * head_dim + 4 * head_dim * 8 + 3 * 8 * 20
    assert m.linear == 2 * (3 * weights + 8 * 50)
    assert m.windows == (0, 0, 0)
    lengths = np.array([5, 1, 7])
    pairs = 5 * 6 // 2 + 1 + 7 * 8 // 2
    assert m.flops(lengths) == m.linear * 13 + 3 * pairs * (2 + 2) * 4 * head_dim
    assert m.flops(lengths, tokens=16) - m.flops(lengths) == 3 * m.linear


def test_head_dim_and_missing_kv_heads():
    m = Model.from_config(DENSE | {"head_dim": 16, "num_key_value_heads": None})
    assert m.pair == 4 * 4 * 16
    assert m.linear == 2 * (3 * (4 * 8 * 4 * 16 + 3 * 8 * 20) + 8 * 50)


def test_windows_count_as_windows():
    full = Model.from_config(DENSE | {"sliding_window": 4, "use_sliding_window": False})
    all_windowed = Model.from_config(DENSE | {"sliding_window": 4})
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = Model.from_config(DENSE | {"sliding_window": 4, "layer_types": kinds})
    assert (full.windows, all_windowed.windows, mixed.windows) == ((0, 0, 0), (4, 4, 4), (4, 0, 4))
    lengths = np.array([10])
    assert full.flops(lengths) - mixed.flops(lengths) == 2 * full.pair * (55 - (10 + 6 * 4))
    assert mixed.pack_cost() == PackCost(mixed.linear + 8 * mixed.pair, mixed.pair / 2)


def test_experts_count_as_visited():
    experts = DENSE | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
    m = Model.from_config(experts)
    attention = 2 * (2 * 8 * 8 + 2 * 8 * 4)
    assert m.linear == 3 * (attention + 2 * 6 * 8 * 5 + 2 * 8 * 8) + 2 * 8 * 50
    shared = Model.from_config(experts | {"n_shared_experts": 1})
    assert shared.linear - m.linear == 3 * 6 * 8 * 5
    first_dense = Model.from_config(experts | {"first_k_dense_replace": 1})
    assert first_dense.linear - m.linear == 6 * 8 * 20 - (2 * 6 * 8 * 5 + 2 * 8 * 8)


def test_pack_cost_follows_flops():
    m = Model.from_config(DENSE)
    cost = m.pack_cost()
    lengths = [np.array([500, 12]), np.array([256, 256]), np.array([1] * 512)]
    by_cost = cost.of(512, np.array([int((x**2).sum()) for x in lengths]))
    exact = np.array([m.flops(x) for x in lengths])
    np.testing.assert_allclose(by_cost, exact, rtol=0.05)
    assert by_cost.dtype == np.float64


def test_llama_8b():
    m = Model.from_config(
        DENSE | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "intermediate_size": 14336, "vocab_size": 128256}
    )  # fmt: skip
    # 8.03 B parameters less the 0.53 B of the input embedding, two FLOPs each.
    assert m.linear == pytest.approx(2 * (8.03e9 - 0.525e9), rel=1e-3)
    assert m.pack_cost().b == 262144


def test_nested_config_and_missing_field():
    assert Model.from_config({"text_config": DENSE}) == Model.from_config(DENSE)
    broken = {k: v for k, v in DENSE.items() if k != "intermediate_size"}
    with pytest.raises(ValueError, match="has no 'intermediate_size', which its size and cost follow from"):
        Model.from_config(broken)


def test_latent_attention_by_hand():
    """DeepSeek-V3 at toy size, every product written out."""
    config = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=100)
    config |= dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
    keys_values = 16 * (6 + 2) + 6 * 2 * (4 + 3)
    rest = 2 * 3 * 16 + 3 * 16 * 24 + 16 * 100
    for rank, queries in ((5, 16 * 5 + 5 * 2 * 6), (None, 16 * 2 * 6)):
        model = Model.from_config({**config, "q_lora_rank": rank})
        assert model.linear == 2 * (keys_values + queries + rest)
        assert model.pair == 2 * 2 * (4 + 2) + 2 * 2 * 3
