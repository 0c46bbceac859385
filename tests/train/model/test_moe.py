"""Routing, balancing and the sorted computation of experts, against transformers and against plain loops."""

from dataclasses import replace

import pytest
import torch
from reference import distance, pack, random_documents
from tiny_models import write_tiny_model
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from train import hf
from train.attention.interface import Segments
from train.balance import ExpertLoad, move_biases, routers, take_load
from train.model import experts as experts_module
from train.model.config import MoeConfig
from train.model.decoder import Decoder
from train.model.experts import Experts
from train.model.moe import MixtureOfExperts, compute_here
from train.model.router import Router
from train.model.rows import Rows
from train.packs import Packs, TokenPacks

SIZES = {"vocab_size": 320, "num_hidden_layers": 1}


def load(folder, dtype=torch.float64):
    with torch.device("meta"):
        model = Decoder(hf.read_config(folder)).to(dtype)
    model.to_empty(device="cpu")
    hf.load_weights(model, folder)
    return model


@pytest.fixture(scope="module")
def mixtral_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("moe") / "mixtral", "mixtral", **SIZES)


@pytest.fixture(scope="module")
def deepseek_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("moe") / "deepseek_v3", "deepseek_v3", **SIZES)


def one_pack(real):
    """Tokens of one pack; those where `real` is False are padding."""
    total = real.sum()[None]
    return TokenPacks(torch.where(real, 0, 1), total, total[0])


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


def take_load_alone(model, step_tokens):
    """`take_load` without a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.balance.dist.all_reduce", lambda tensor: None)
        return take_load(model, model.config, step_tokens)


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


def poisoned_kernel(x, weight, bias, ends):
    """What a kernel for all groups may do: garbage in the rows of nobody, forward and backward."""
    rows = _Poison.apply(x, ends)[: ends[-1]]
    expert = torch.searchsorted(ends, torch.arange(len(rows), dtype=ends.dtype), right=True)
    out = torch.einsum("rd,rfd->rf", rows, weight[expert])
    out = out if bias is None else out + bias[expert]
    return _Poison.apply(nn.functional.pad(out, (0, 0, 0, len(x) - len(rows))), ends)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ends):
        ctx.save_for_backward(ends)
        x = x.clone()
        x[ends[-1] :] = torch.nan
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.saved_tensors[0][-1] :] = torch.nan
        return grad, None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rows_of_no_expert_mean_nothing(family, tmp_path, monkeypatch):
    model = load(write_tiny_model(tmp_path / family, family, **SIZES))
    mixture = model.layers[0].mlp
    x = torch.randn(33, 48, dtype=torch.float64)
    real = torch.arange(33) % 5 != 0
    results = []
    monkeypatch.setattr(experts_module, "_with_kernel", poisoned_kernel)
    for kernel in (False, True):
        monkeypatch.setattr(experts_module, "has_kernel", lambda x, weight, kernel=kernel: kernel)
        mixture.zero_grad()
        inputs = x.clone().requires_grad_()
        out = mixture(inputs, one_pack(real))
        (out * torch.linspace(-1, 1, 48)).sum().backward()
        results.append((out, inputs.grad, [p.grad for p in mixture.parameters()]))
    (out, grad, grads), (other_out, other_grad, other_grads) = results
    assert not out[~real].any()
    assert not grad[~real].any()
    torch.testing.assert_close(other_out, out)
    torch.testing.assert_close(other_grad, grad)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b)


def some_experts(kind, dtype):
    """4 experts of 16 → 24, of every kind there is; the third projection of GPT-OSS is clamped for a good part."""
    options = {"silu": {}, "gelu_tanh": {}, "clamped": {"expert_bias": True, "swiglu_limit": 1.5, "swiglu_alpha": 1.7}}
    config = MoeConfig(num_experts=4, top_k=2, intermediate_size=24, **options[kind])
    experts = Experts(16, config, "silu" if kind == "clamped" else kind).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 3
    return experts


KINDS = ("silu", "gelu_tanh", "clamped")


def some_rows(third=(4, 4)):
    """Of 12 tokens with 2 choices among 4 experts; the third is padding, the second expert is chosen by none."""
    return Rows.sort(torch.tensor([(0, 2), (3, 2), third, (2, 0)] + [(3, 0), (2, 3)] * 4), 4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_for_all_groups_gives_what_one_expert_after_the_other_gives(kind, dtype, weighted, monkeypatch):
    experts, rows = some_experts(kind, dtype), some_rows()
    torch.manual_seed(1)
    x = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    weights = torch.rand(12, 2, dtype=dtype).masked_fill(rows.padding, 0.0).requires_grad_() if weighted else None
    direction = torch.randn(12, 16, dtype=dtype)
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(experts_module, "has_kernel", lambda x, weight, kernel=kernel: kernel)
        leaves = [x, *experts.parameters(), *([weights] if weighted else [])]
        out = experts(x, weights, rows)
        results.append((out, *torch.autograd.grad((out * direction).sum(), leaves)))
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(*results, strict=True):
        assert distance(a, b) < tolerance
        assert distance(b, a) < tolerance
    out, of_x, *of_experts = results[0]
    assert not out[2].any(), "padding"
    assert not of_x[2].any(), "padding"
    projections = of_experts[: len(list(experts.parameters()))]
    assert all(not gradient[1].any() for gradient in projections), "an expert without rows has gradient 0"


@pytest.mark.parametrize(("kind", "weighted"), [("silu", True), ("gelu_tanh", False), ("clamped", True)])
def test_the_operator_of_experts_is_a_good_one(kind, weighted):
    experts, rows = some_experts(kind, torch.float64), some_rows(third=(0, 3))
    weights = [getattr(experts, name) for name in experts_module.PROJECTIONS]
    biases = [getattr(experts, f"{name}_bias") for name in experts_module.PROJECTIONS]
    gating = experts.gating
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    weights_R = torch.rand(24, dtype=torch.float64, requires_grad=True) if weighted else None
    rest = (rows.token, rows.ends, gating.activation, gating.limit, gating.alpha)
    if kind == "clamped":
        gate, up = (x @ weight[0].T for weight in weights[:2])
        assert (gate > gating.limit).any()
        assert (up.abs() > gating.limit).any()
    inputs = (x, weights_R, *weights, *biases)
    torch.library.opcheck(experts_module.EXPERTS, (*inputs, *rest))
    assert torch.autograd.gradcheck(lambda *tensors: experts_module.EXPERTS(*tensors, *rest)[0], inputs, fast_mode=True)


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
