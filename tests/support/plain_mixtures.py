"""Mixtures of experts without any parallelism: loading, packs for them, their load."""

import pytest
import torch

from train import hf
from train.balance import take_load
from train.model.decoder import Decoder
from train.packs import TokenPacks

SIZES = {"vocab_size": 320, "num_hidden_layers": 1}


def load(folder, dtype=torch.float64):
    with torch.device("meta"):
        model = Decoder(hf.read_config(folder)).to(dtype)
    model.to_empty(device="cpu")
    hf.load_weights(model, folder)
    return model


def one_pack(real):
    """Tokens of one pack; those where `real` is False are padding."""
    total = real.sum()[None]
    return TokenPacks(torch.where(real, 0, 1), total, total[0])


def take_load_alone(model, step_tokens):
    """`take_load` without a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.balance.dist.all_reduce", lambda tensor: None)
        return take_load(model, model.config, step_tokens)
