"""A mixture of experts as a whole: where tokens go, against a plain loop, and that padding goes nowhere."""

from dataclasses import replace

import pytest
import torch
from plain_mixtures import load, one_pack, take_load_alone
from reference import distance, pack, random_documents
from torch import nn

from train import hf
from train.balance import routers
from train.model.config import MoeConfig
from train.model.experts import Experts
from train.model.moe import MixtureOfExperts, compute_here
from train.model.router import Router
from train.packs import Packs


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_padding_moves_nothing(family, mixtral_dir, deepseek_dir):
    """Neither how many pad slots there are nor what stands in them changes a gradient, a loss or the load."""
    model = load(mixtral_dir if family == "mixtral" else deepseek_dir)
    documents = random_documents([13, 30, 7], 320)
    mixture, results, dispatched = model.layers[0].mlp, [], []

    def exchange(experts, x_TD, weights_TK, rows, shared):
        dispatched.append(rows.counts.sum().item())
        return compute_here(experts, x_TD, weights_TK, rows, shared)

    mixture.exchange = exchange
    for align, tail, pad_id in ((1, 0, 0), (4, 0, 0), (16, 40, 0), (16, 40, 7)):
        ids, positions, labels, segments = pack(documents, align=align, tail=tail)
        real = torch.tensor([13, 30, 7] + [0] * (tail > 0), dtype=torch.int32)
        slot = torch.repeat_interleave(torch.arange(len(real)), segments.cu_seqlens.diff().long())
        ids[positions >= real[slot]] = pad_id
        segments = replace(segments, packs=Packs(real, 1, len(ids), torch.tensor([50])))
        model.zero_grad()
        for router in routers(model).values():
            router.aux_coefficient, router.z_coefficient = 0.5, 0.1
        loss = model(ids, positions, segments, labels) / 20
        loss.backward()
        counted = take_load_alone(model, 50)
        results.append((loss, {n: p.grad.clone() for n, p in model.named_parameters()}, counted))
    assert dispatched == [50 * mixture.router.config.top_k] * 4, "no expert computes padding"
    first_loss, first, first_counted = results[0]
    for loss, gradients, counted in results[1:]:
        assert distance(loss, first_loss) < 1e-12
        assert max(distance(gradients[name], first[name]) for name in first) < 1e-11
        assert torch.equal(counted.tokens, first_counted.tokens)
        assert counted.dropped == 0
        assert counted.aux_loss == pytest.approx(first_counted.aux_loss, rel=1e-12)


def test_every_token_visits_the_experts_of_a_plain_loop(deepseek_dir):
    """Groups, bias, renormalisation and scale, written out token by token."""
    config = hf.read_config(deepseek_dir).moe
    mixture = load(deepseek_dir).layers[0].mlp
    x = torch.randn(25, 48, dtype=torch.float64)
    out = mixture(x, one_pack(torch.ones(25, dtype=torch.bool)))
    router, experts = mixture.router, mixture.experts
    for t in range(25):
        scores = torch.sigmoid(router.weight @ x[t])
        choice = scores + router.correction_bias
        groups = choice.view(config.groups, -1)
        best = sorted(range(config.groups), key=lambda g: -groups[g].topk(2).values.sum())[: config.top_groups]
        size = config.num_experts // config.groups
        allowed = [e for e in range(config.num_experts) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: config.top_k]
        total = sum(scores[e] for e in chosen)
        expected = mixture.shared(x[t])
        for e in chosen:
            inner = nn.functional.silu(experts.gate_proj[e] @ x[t]) * (experts.up_proj[e] @ x[t])
            expected = expected + config.scale * scores[e] / total * (experts.down_proj[e] @ inner)
        torch.testing.assert_close(out[t], expected)


def test_the_router_chooses_in_float32_whatever_the_model_computes_in():
    """Scores that bfloat16 cannot tell apart."""
    router = Router(2, MoeConfig(num_experts=2, top_k=1, intermediate_size=1))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 2.0**-12]]))
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    chosen, weights = router(x, one_pack(torch.ones(1, dtype=torch.bool)))
    assert chosen.item() == 1
    assert weights.dtype == torch.float32


def test_a_mixture_without_real_tokens_gives_zeros(mixtral_dir):
    mixture: MixtureOfExperts = load(mixtral_dir).layers[0].mlp
    assert isinstance(mixture.experts, Experts)
    x = torch.randn(9, 48, dtype=torch.float64, requires_grad=True)
    mixture.router.aux_coefficient = mixture.router.z_coefficient = 1.0
    out = mixture(x, one_pack(torch.zeros(9, dtype=torch.bool)))
    out.sum().backward()
    assert not out.any()
    assert all(p.grad is not None and not p.grad.any() for p in (x, *mixture.parameters()))
