"""Expert parallelism: the experts of a layer lie on the ranks of the `ep` axis, and tokens travel to them and back.

`ep` is an axis of a sibling mesh over the same ranks, `(pp, dp_replicate, ep_shard, ep)`: ep_shard × ep is dp_shard ×
cp × tp, and an `ep` group are neighbours. Every one of these ranks holds tokens of its own (tensor-parallel ranks take
a share of theirs each), so for an expert all of them are data ranks: a rank's experts get the tokens of the whole `ep`
group, and FSDP inside `ep_shard` sums their gradients over the groups. Matrices are never cut within: any tp goes with
any ep.

A layer exchanges three times: how many rows go where (read by the host, the one time in a layer that it waits), the
rows, and what the experts made of them. K·D values a token each way, (ep − 1)/ep of them over the wire.

Shapes: R rows sorted by expert, E experts, D hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from train.config import Config
from train.mesh import Mesh
from train.model.moe import Compute, MixtureOfExperts, Shared
from train.model.rows import Rows


def apply_ep(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Set up balancing in every mixture of experts of `model.layers` and, with `--ep`, distribute the experts, in
    place; returns the model.

    Raises: ValueError when the model has no experts to distribute, or not a multiple of ep.
    """
    moe, size, balancing = model.config.moe, config.layout.ep, config.router
    if moe is None:
        given = {"--ep": size > 1, "--router-aux-loss": balancing.router_aux_loss > 0}
        given |= {"--router-z-loss": balancing.router_z_loss > 0, "--router-bias-rate": balancing.router_bias_rate > 0}
        for flag in (flag for flag, is_given in given.items() if is_given):
            raise ValueError(
                f"{flag} is for mixtures of experts, and a {model.config.family} model has none: leave it out"
            )
        return model
    if balancing.router_bias_rate > 0 and not moe.correction_bias:
        raise ValueError(
            f"--router-bias-rate: a {model.config.family} model has no bias on the scores of its experts; "
            "take --router-aux-loss"
        )
    if moe.num_experts % size:
        raise ValueError(
            f"--ep {size} does not divide the {moe.num_experts} experts of a layer; take an --ep that does"
        )
    for block in model.layers.children():
        if not isinstance(block.mlp, MixtureOfExperts):
            continue
        router = block.mlp.router
        router.aux_coefficient, router.z_coefficient = balancing.router_aux_loss, balancing.router_z_loss
        spread = [axis for axis in ("cp", "tp") if mesh.root[axis].size() > 1]
        router.pack_groups = tuple(mesh.root.get_group(axis) for axis in spread)
        if size > 1:
            for name, parameter in list(block.mlp.experts.named_parameters()):
                placed = distribute_tensor(parameter.data, mesh.experts["ep"], [Shard(0)], src_data_rank=None)
                setattr(block.mlp.experts, name, nn.Parameter(placed))
            block.mlp.exchange = ExpertExchange(mesh.experts.get_group("ep"))
    return model


class ExpertExchange:
    """`train.model.moe.compute_here`, with the experts on the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size = group, group.size()

    def __call__(
        self, compute: Compute, x_TD: Tensor, weights_TK: Tensor, rows: Rows, shared: Shared
    ) -> tuple[Tensor, Tensor | None]:
        x_RD, counts_E = rows.gather(x_TD), rows.counts
        # From every rank, rank after rank, how many rows it sends to each of this rank's experts.
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        by_rank = torch.stack((counts_E, arriving_E)).unflatten(1, (self.size, -1)).sum(2)
        send, receive = by_rank.tolist()

        travel = Travel(send, receive, self.group)
        arrived = _Depart.apply(x_RD, travel, sum(receive))
        shared_TD = shared()  # while the rows are on their way
        arrived = _Arrive.apply(arrived, travel)
        computed = compute(arrived, None, _expert_major(arriving_E, self.size, len(arrived)))

        travel = Travel(receive, send, self.group)
        # As many rows as came in: those of padding were not sent, and mean nothing.
        back = _Depart.apply(computed, travel, len(x_RD))
        return rows.combine(_Arrive.apply(back, travel), weights_TK), shared_TD


def _expert_major(arriving_E: Tensor, size: int, rows: int) -> Rows:
    """Rows arrive by source and, of one source, by expert: each is a token with one expert here. `arriving_E`: of each
    source and expert, how many."""
    run = torch.repeat_interleave(arriving_E, output_size=rows)  # of which (source, expert) each row is
    order = (run % (len(arriving_E) // size)).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=run.device))
    return Rows(order, place[:, None], arriving_E.unflatten(0, (size, -1)).sum(0), padding=None)


class Travel:
    """An exchange of rows: `send[r]` go to rank r of `group`, `receive[r]` come from it; and the same way back, for
    their gradients. `departures` is how many rows there are before, those behind the sent ones included."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup):
        self.send, self.receive, self.group = send, receive, group
        self.departures = 0
        self.forth: dist.Work | None = None
        self.back: tuple[Tensor, dist.Work] | None = None


def _exchange(x: Tensor, send: list[int], receive: list[int], rows: int, group: Any) -> tuple[Tensor, dist.Work]:
    """[`rows`, D], of which the first will be what is received, and the handle to wait for."""
    out = x.new_empty(rows, x.shape[1])
    work = dist.all_to_all_single(
        out[: sum(receive)], x[: sum(send)].contiguous(), receive, send, group=group, async_op=True
    )
    return out, work


class _Depart(torch.autograd.Function):
    """Start an exchange of the first rows of `x`; the result has `rows` rows, those behind the received ones mean
    nothing. What is computed before `_Arrive` overlaps with it; in backward, what is computed between the two overlaps
    with the way back, which `_Arrive` starts and this ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, travel: Travel, rows: int) -> Tensor:
        ctx.travel, travel.departures = travel, len(x)
        out, travel.forth = _exchange(x, travel.send, travel.receive, rows, travel.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (out, work), ctx.travel.back = ctx.travel.back, None
        work.wait()
        return out, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, travel: Travel) -> Tensor:
        ctx.travel = travel
        travel.forth.wait()
        travel.forth = None  # it holds what was sent and received
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        travel = ctx.travel
        travel.back = _exchange(grad, travel.receive, travel.send, travel.departures, travel.group)
        return grad, None  # for its shape: the gradient itself is on its way
