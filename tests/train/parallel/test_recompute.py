"""What recompute keeps and what it does again: bytes that a forward leaves behind, operators of the backward. (That
gradients stay the same: tests/dist/test_parity.py.)"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from train.attention.interface import Segments
from train.config import Config, Model
from train.model.config import LayerConfig, ModelConfig, MoeConfig, Rope
from train.model.decoder import Decoder
from train.model.initialize import init_weights
from train.parallel.recompute import apply_recompute

LAYERS = 3


class Operators(TorchDispatchMode):
    """Counts operators by name while it is on."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def measured():
    return measure(None)


@pytest.fixture(scope="module")
def measured_mixture():
    return measure(MoeConfig(4, 2, 96, shared_size=128))


def measure(moe):
    """By `--recompute`: (bytes alive after a forward because of it, operators of its backward)."""
    layer = LayerConfig(window=None, rope=Rope(10_000.0, 32), experts=moe is not None)
    sizes = ("llama", 320, 128, 256, 4, 2, 32, (layer,) * LAYERS, 1024, 1e-5, 32**-0.5)
    ids, segments = torch.arange(512) % 320, Segments.of([200, 300, 12])
    found = {}
    for recompute in ("none", "selective", "full"):
        model = Decoder(ModelConfig(*sizes, tied_embeddings=True, moe=moe))
        init_weights(model, seed=0)
        if recompute != "none":
            apply_recompute(model, None, Config(model=Model(recompute=recompute)))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss = model(ids, ids % 200, segments, ids)
        with Operators() as operators:
            loss.backward()
        found[recompute] = sum(event.self_cpu_memory_usage for event in profile.events()), operators.seen
    return found


def test_selective_keeps_less_and_full_keeps_a_row_a_block(measured):
    none, selective, full = (measured[name][0] for name in ("none", "selective", "full"))
    assert selective < 0.7 * none
    assert full < 0.3 * selective


def test_selective_repeats_neither_attention_nor_matrix_products(measured):
    none, selective, full = (measured[name][1] for name in ("none", "selective", "full"))
    attention, product, activation = "meshpack::attention_cpu", "aten::mm", "aten::silu"
    assert (none[attention], selective[attention], full[attention]) == (0, 0, LAYERS)
    assert none[product] == selective[product]
    assert full[product] == none[product] + 6 * LAYERS, "the last of a block's seven is not needed for its gradients"
    assert (none[activation], selective[activation], full[activation]) == (0, LAYERS, LAYERS)


def test_of_a_mixture_selective_repeats_what_is_cheap_of_attention_and_of_the_shared_expert(measured_mixture):
    (none, _), (selective, _), (full, _) = measured_mixture.values()
    assert selective < 0.9 * none
    assert full < 0.3 * selective
    none, selective, full = (operators for _, operators in measured_mixture.values())
    for costly in ("meshpack::attention_cpu", "meshpack::experts"):
        assert (none[costly], selective[costly], full[costly]) == (0, 0, LAYERS), costly
    assert none["aten::mm"] == selective["aten::mm"]
    assert (none["aten::silu"], selective["aten::silu"]) == (0, LAYERS), "of the shared experts"
