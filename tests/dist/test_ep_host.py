"""How often a mixture of experts makes the host wait for the device."""

import torch
import torch.distributed as dist
from host_reads import HostReads
from tiny_models import write_tiny_model
from torch import nn

from ranks import run_ranks
from train import hf
from train.model import experts
from train.model.moe import MixtureOfExperts
from train.packs import TokenPacks
from train.parallel.ep import ExpertExchange


def reads(model_dir):
    """What the host read in a forward and in its backward, of a layer whose experts lie on all ranks."""
    experts.has_kernel = lambda x, weight: True  # as on a GPU; torch's kernel runs here, too
    torch.manual_seed(0)
    mixture = MixtureOfExperts(hf.read_config(model_dir))
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.1)
    mixture.router.correction_bias.zero_()
    for name, parameter in list(mixture.experts.named_parameters()):
        setattr(mixture.experts, name, nn.Parameter(parameter.chunk(dist.get_world_size())[dist.get_rank()].clone()))
    mixture.exchange = ExpertExchange(dist.group.WORLD)
    mixture.router.aux_coefficient = mixture.router.z_coefficient = 0.1
    real = torch.arange(40) % 5 != 0
    packs = TokenPacks(torch.where(real, 0, 1), real.sum()[None], real.sum())
    x = torch.randn(40, 48, requires_grad=True)
    with HostReads() as forward:
        out = mixture(x, packs)
    with HostReads() as backward:
        out.sum().backward()
    assert x.grad[real].any()
    return forward.seen, backward.seen


def test_the_host_waits_once_a_layer(tmp_path):
    """For how many rows go where, which the exchange must know; and never in backward."""
    model = write_tiny_model(tmp_path / "model", "deepseek_v3", vocab_size=320)
    assert run_ranks(reads, 2, model) == [(["tolist"], [])] * 2
