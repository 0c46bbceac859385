"""What the host does while rows travel between expert ranks, and how often it waits for the device."""

import pytest
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


def spread(model_dir):
    """(a layer whose experts lie on all ranks, 40 tokens, of which every fifth is padding, their packs)."""
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
    return mixture, torch.randn(40, 48, requires_grad=True), packs


def reads(model_dir):
    """What the host read in a forward and in its backward."""
    mixture, x, packs = spread(model_dir)
    with HostReads() as forward:
        out = mixture(x, packs)
    with HostReads() as backward:
        out.sum().backward()
    assert x.grad[packs.is_real].any()
    return forward.seen, backward.seen


class Watched:
    """An exchange under way that notes in `events` when it is waited for."""

    def __init__(self, work, events):
        self.work, self.events = work, events

    def wait(self):
        self.events.append("waited")
        self.work.wait()


def order(model_dir):
    """What a layer does in turn, forward and backward, as far as exchanges, experts and the shared expert go."""
    mixture, x, packs = spread(model_dir)
    events, exchange = [], dist.all_to_all_single

    def watched(*args, async_op=False, **options):
        work = exchange(*args, async_op=async_op, **options)
        events.append("sent" if async_op else "counts")
        return Watched(work, events) if async_op else work

    parts = {"shared": (mixture.shared, mixture.shared.gate_proj.weight)}
    parts["experts"] = mixture.experts, mixture.experts.gate_proj
    for name, (module, weight) in parts.items():
        module.register_forward_hook(lambda *args, name=name: events.append(name))
        weight.register_hook(lambda grad, name=name: events.append(name))
    dist.all_to_all_single = watched
    out = mixture(x, packs)
    forward = events.copy()
    events.clear()
    out.sum().backward()
    dist.all_to_all_single = exchange
    return forward, events


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("host") / "model", "deepseek_v3", vocab_size=320)


def test_the_shared_expert_runs_while_rows_are_on_their_way(model):
    """Both ways: in backward while the gradients of the rows return."""
    forward = ["counts", "sent", "shared", "waited", "experts", "sent", "waited"]
    backward = ["sent", "waited", "experts", "sent", "shared", "waited"]
    assert run_ranks(order, 2, model) == [(forward, backward)] * 2


def test_the_host_waits_once_a_layer(model):
    """For how many rows go where, which the exchange must know; and never in backward."""
    assert run_ranks(reads, 2, model) == [(["tolist"], [])] * 2
