"""Weights from scratch: what they look like, and that nothing but seed and name decides on them."""

import math

import pytest
import torch

from train.model.config import LayerConfig, ModelConfig, Rope
from train.model.decoder import Decoder
from train.model.initialize import init_weights


def initialized(seed=0, layers=2, **changes):
    layer = LayerConfig(window=None, rope=Rope(10_000.0, 16))
    sizes = ("llama", 320, 64, 96, 4, 2, 16, (layer,) * layers, 128, 1e-5, 16**-0.5)
    model = Decoder(ModelConfig(*sizes, **{"tied_embeddings": False} | changes))
    init_weights(model, seed)
    return dict(model.named_parameters())


def test_widths_norms_and_biases():
    found = initialized(layers=8, initializer_range=0.05, norm_offset=1.0, qkv_bias=True)
    for name, parameter in found.items():
        if parameter.ndim == 1:
            assert not parameter.any(), f"{name}: a norm that adds 1 is neutral at 0, as a bias is"
            continue
        width = 0.05 / math.sqrt(16) if name.split(".")[-2] in ("o_proj", "down_proj") else 0.05
        assert parameter.std().item() == pytest.approx(width, rel=0.05), name
        assert abs(parameter.mean().item()) < 5 * width / math.sqrt(parameter.numel()), name
    assert torch.equal(initialized()["norm.weight"], torch.ones(64))


def test_values_follow_from_seed_and_name_alone():
    one, other, next_seed = initialized(), initialized(layers=3, tied_embeddings=True), initialized(seed=1)
    scaled = ("o_proj", "down_proj")  # by the number of layers
    for name in other.keys() & one.keys():
        if name.split(".")[-2] not in scaled:
            assert torch.equal(one[name], other[name]), name
    matrices = {name: parameter for name, parameter in one.items() if parameter.ndim == 2}
    assert not any(torch.equal(parameter, next_seed[name]) for name, parameter in matrices.items())
    queries = matrices["layers.0.attention.q_proj.weight"], matrices["layers.1.attention.q_proj.weight"]
    assert not torch.equal(*queries)
