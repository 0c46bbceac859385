"""The losses that balance experts and the bias that does, against transformers and by hand; how the load is counted."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plain_mixtures import load, take_load_alone
from reference import distance, pack, random_documents
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from train.attention.interface import Segments
from train.balance import ExpertLoad, move_biases, routers
from train.config import Config
from train.config import Router as RouterFlags
from train.model.moe import compute_here
from train.packs import Packs
from train.parallel.ep import apply_ep


def backward_with(model, row, coefficients):
    """All gradients of the loss 0 · cross-entropy + the auxiliary losses."""
    ids, positions, labels, segments = row
    for router in routers(model).values():
        router.aux_coefficient, router.z_coefficient = coefficients
    (model(ids, positions, segments, labels) * 0.0).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_the_auxiliary_loss_is_that_of_transformers(mixtral_dir):
    """One pack in a step: the load-balancing loss over all its tokens; its gradient is autograd's."""
    model = load(mixtral_dir)
    row = pack(random_documents([40, 23, 9], 320))
    gradients = backward_with(model, row, (0.7, 0.0))
    load_ = take_load_alone(model, 72)

    logits = []
    router = model.layers[0].mlp.router
    router.aux_coefficient = 0.0
    hook = router.register_forward_hook(lambda module, args, _: logits.append(args[0] @ module.weight.T))
    model.zero_grad()
    model(*row[:2], row[3])
    hook.remove()
    loss = 0.7 * load_balancing_loss_func(tuple(logits), num_experts=4, top_k=2)
    assert load_.aux_loss == pytest.approx(loss.item(), rel=1e-6)  # transformers rounds through float32
    loss.backward()
    assert distance(gradients["layers.0.mlp.router.weight"], router.weight.grad) < 1e-5
    assert distance(gradients["embed_tokens.weight"], model.embed_tokens.weight.grad) < 1e-5


def test_of_sigmoid_scores_it_takes_their_shares(deepseek_dir):
    """As in DeepSeek-V3's balance loss a token's scores count as parts of their sum; experts are chosen by bias and
    group."""
    model = load(deepseek_dir)
    row = pack(random_documents([40, 23, 9], 320))
    gradients = backward_with(model, row, (0.7, 0.0))
    counted = take_load_alone(model, 72)

    router, losses = model.layers[0].mlp.router, []
    for each in routers(model).values():
        each.aux_coefficient = 0.0

    def by_hand(module, args, out):
        scores = torch.sigmoid(args[0] @ module.weight.T)
        chosen = nn.functional.one_hot(out[0], 8).sum(1).double()
        losses.append(0.7 * 8 * (chosen.mean(0) * (scores / scores.sum(1, keepdim=True)).mean(0)).sum())

    hooks = [each.register_forward_hook(by_hand) for each in routers(model).values()]
    model.zero_grad()
    model(*row[:2], row[3])
    for hook in hooks:
        hook.remove()
    assert counted.aux_loss == pytest.approx(sum(losses).item())
    sum(losses).backward()
    assert distance(gradients["layers.0.mlp.router.weight"], router.weight.grad) < 1e-9


def test_each_flag_sets_its_coefficient_in_every_router(deepseek_dir):
    model = load(deepseek_dir)
    one = SimpleNamespace(size=lambda: 1)
    given = Config(router=RouterFlags(router_aux_loss=0.25, router_z_loss=0.5))
    apply_ep(model, SimpleNamespace(root={"cp": one, "tp": one}), given)
    found = [(router.aux_coefficient, router.z_coefficient) for router in routers(model).values()]
    assert found == [(0.25, 0.5)] * len(model.config.layers)


def test_the_z_loss_is_the_mean_square_of_the_log_sum_exp(mixtral_dir):
    model = load(mixtral_dir)
    row = pack(random_documents([31, 8], 320))
    gradients = backward_with(model, row, (0.0, 0.3))
    counted = take_load_alone(model, 39)
    router = model.layers[0].mlp.router
    losses = []
    hook = router.register_forward_hook(
        lambda module, args, _: losses.append((args[0] @ module.weight.T).logsumexp(1).square().mean() * 0.3)
    )
    model.zero_grad()
    router.z_coefficient = 0.0
    model(*row[:2], row[3])
    hook.remove()
    losses[0].backward()
    assert counted.z_loss == pytest.approx(losses[0].item())
    assert distance(gradients["layers.0.mlp.router.weight"], router.weight.grad) < 1e-9


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_packs_and_rows_may_be_split_in_any_way(family, mixtral_dir, deepseek_dir):
    """The losses of a step are those of its packs weighted by their real tokens, in one row or in several."""
    model = load(mixtral_dir if family == "mixtral" else deepseek_dir)
    packs = [random_documents(lengths, 320, seed) for seed, lengths in enumerate(([40, 23], [9, 30, 2], [64]))]
    tokens = 40 + 23 + 9 + 30 + 2 + 64
    capacity = 72
    gradients, counted = [], []
    for rows in ([packs], [packs[:1], packs[1:]], [[p] for p in packs]):
        model.zero_grad()
        for router in routers(model).values():
            router.aux_coefficient, router.z_coefficient = 0.5, 0.1
        for row in rows:
            ids, positions, labels, segments = join([pack_of(documents, capacity) for documents in row])
            segments = replace(segments, packs=packs_of(row, segments, capacity, tokens))
            (model(ids, positions, segments, labels) / 100).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        counted.append(take_load_alone(model, tokens))
    for other, load_ in zip(gradients[1:], counted[1:], strict=True):
        assert max(distance(other[name], gradients[0][name]) for name in other) < 1e-9
        assert torch.equal(load_.tokens, counted[0].tokens)
        assert load_.aux_loss == pytest.approx(counted[0].aux_loss)
        assert load_.dropped == 0


def pack_of(documents, capacity):
    length = sum(-(-len(d) // 4) * 4 for d, _ in documents)
    return pack(documents, align=4, tail=capacity - length)


def join(packs):
    ids, positions, labels = (torch.cat([p[k] for p in packs]) for k in range(3))
    return ids, positions, labels, Segments.of([n for p in packs for n in p[3].cu_seqlens.diff().tolist()])


def packs_of(row, segments, capacity, step_tokens):
    real = []
    for documents in row:
        lengths = [len(d) for d, _ in documents]
        real += lengths + [0] * (sum(-(-n // 4) * 4 for n in lengths) < capacity)
    assert len(real) == len(segments.cu_seqlens) - 1
    return Packs(torch.tensor(real, dtype=torch.int32), len(row), capacity, torch.tensor([step_tokens]))


def test_recomputed_rows_count_once_and_evaluations_not(deepseek_dir):
    model = load(deepseek_dir)
    ids, positions, labels, segments = pack(random_documents([20, 11], 320))
    for block in model.layers:
        block.forward = _recomputed(block.forward)
    with torch.no_grad():
        model(ids, positions, segments, labels)
    model(ids, positions, segments, labels).backward()
    assert take_load_alone(model, 31).tokens.sum() == 31 * 3
    assert take_load_alone(model, 0).tokens.sum() == 0


def test_choices_that_no_expert_computes_are_counted(deepseek_dir):
    """A dispatch with a capacity of 3 rows an expert in the first layer, in training and recomputed."""
    model = load(deepseek_dir)
    mixture, excess = model.layers[0].mlp, []

    def exchange(compute, x_TD, weights_TK, rows, shared):
        kept = rows.counts.clamp(max=3)
        excess.append((rows.counts - kept).sum().item())
        return compute_here(compute, x_TD, weights_TK, replace(rows, counts=kept), shared)

    mixture.exchange = exchange
    ids, positions, labels, segments = pack(random_documents([20, 11], 320))
    for recompute in (False, True):
        excess.clear()
        if recompute:
            model.layers[0].forward = _recomputed(model.layers[0].forward)
        model(ids, positions, segments, labels).backward()
        assert excess == [excess[0]] * (1 + recompute)
        assert take_load_alone(model, 31).dropped == excess[0] > 0
        assert take_load_alone(model, 0).dropped == 0, "taken once"


def _recomputed(forward):
    return lambda *args: torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)


def test_the_bias_moves_against_the_load(deepseek_dir):
    model = load(deepseek_dir)
    row = pack(random_documents([40, 31], 320))
    router = model.layers[0].mlp.router
    before = router.correction_bias.clone()
    model(*row[:2], row[3], row[2]).backward()
    counted = take_load_alone(model, 71)
    move_biases(model, counted, 0.02)
    tokens = counted.tokens[0]
    expected = before + 0.02 * torch.where(tokens < tokens.mean(), 1.0, torch.where(tokens > tokens.mean(), -1.0, 0.0))
    assert (tokens != tokens.mean()).any()
    torch.testing.assert_close(router.correction_bias, expected)
    # and it evens the load out
    spread = [counted.max_over_mean]
    for _ in range(60):
        model(*row[:2], row[3], row[2]).backward()
        counted = take_load_alone(model, 71)
        move_biases(model, counted, 0.01)
        spread.append(counted.max_over_mean)
    assert min(spread[-10:]) < 0.75 * spread[0] + 0.25


def test_the_worst_layer_tells_how_uneven_the_load_is():
    tokens = torch.tensor([[4.0, 4.0], [2.0, 6.0]], dtype=torch.float64)
    assert ExpertLoad((0, 1), tokens, 0.0, 0.0, 0).max_over_mean == 1.5
    assert ExpertLoad((0, 1), tokens.flip(0), 0.0, 0.0, 0).max_over_mean == 1.5


def test_the_load_of_every_expert_is_listed_in_every_so_many_th_step():
    load = ExpertLoad((1, 3), torch.tensor([[6.0, 2.0], [4.0, 4.0]], dtype=torch.float64), 0.5, 0.25, 0)
    for every, listed in ((3, [3, 6]), (1, [1, 2, 3, 4, 5, 6]), (0, [])):
        flags = RouterFlags(router_log_every=every)
        assert [step for step in range(1, 7) if "expert_tokens" in load.record(step, flags)] == listed
    record = load.record(1, RouterFlags(router_log_every=1, router_aux_loss=0.1))
    assert record == {
        "expert_max_over_mean": 1.5,
        "dropped_tokens": 0,
        "router_aux_loss": 0.5,
        "expert_tokens": {"1": [6, 2], "3": [4, 4]},
    }
