"""Which experts a token goes to, with which weights, and what keeps the experts equally busy.

Two ways of balancing. An auxiliary loss per pack p (Switch Transformer, arXiv 2101.03961, as transformers defines it):

    L_p = E · Σ_e f_pe · P_pe      f_pe: times that real tokens of p chose expert e, over the real tokens n_p of p
                                   P_pe: mean over these tokens of the probability of e

which is K (the experts a token) when all are equally busy. A step's loss is the mean over its N real tokens,
Σ_p n_p/N · L_p, of every layer, times the coefficient. And a bias on the scores that is moved after each step against
the load of the step (arXiv 2408.15664), without any gradient. The z-loss, the mean over the real tokens of
logsumexp(logits)², keeps the logits small (arXiv 2202.08906).

f has no gradient, so with the f of whole packs (summed over the ranks that share a pack) the loss is linear in what a
rank holds: every rank adds the gradient of its own tokens, and gradients are only ever summed. It joins the backward of
the weights (`_Attach`), already divided by N, which no layout and no accumulation changes; the loss of the step needs
no other term, and a pipeline stage adds that of its own layers. Tokens of padding choose no expert.

Shapes: T tokens, D hidden size, E experts, K experts a token, P packs.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.model.config import MoeConfig
from train.packs import TokenPacks


class Router(nn.Module):
    """`weight` [E, D], perhaps `bias` [E]; `correction_bias` [E] is a buffer, part of checkpoints.

    Set from outside: the coefficients of the losses, and `pack_groups`, over whose ranks the tokens of a pack lie.
    `loads` and `losses` (auxiliary, z) count what went through since they were last taken: once in the backward of
    each row, so that recomputed activations count once and an evaluation not at all.
    """

    def __init__(self, hidden_size: int, config: MoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        self.register_buffer("correction_bias", torch.empty(config.num_experts) if config.correction_bias else None)
        self.aux_coefficient = self.z_coefficient = 0.0
        self.pack_groups: tuple[dist.ProcessGroup, ...] = ()
        self.loads: Tensor | None = None
        self.losses: Tensor | None = None

    def forward(self, x_TD: Tensor, packs: TokenPacks) -> tuple[Tensor, Tensor]:
        """(experts int64[T, K], weights [T, K]), in at least float32; experts of padding are E, its weights 0."""
        E, K = self.config.num_experts, self.config.top_k
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_ED, bias_E = self.projection()
        bias_E = None if bias_E is None else bias_E.to(wide)
        logits_TE = nn.functional.linear(x_TD.to(wide), weight_ED.to(wide), bias_E)
        scores_TE = logits_TE.softmax(-1) if self.config.score == "softmax" else logits_TE.sigmoid()
        with torch.no_grad():
            chosen_TK = self._eligible(scores_TE).topk(K, sorted=False).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if self.config.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
        padding_T1 = ~packs.is_real[:, None]
        weights_TK = (weights_TK * self.config.scale).masked_fill(padding_T1, 0.0)
        chosen_TK = chosen_TK.masked_fill(padding_T1, E)
        if self.training and torch.is_grad_enabled():
            weights_TK = self._balance(weights_TK, chosen_TK, scores_TE, logits_TE, packs)
        return chosen_TK, weights_TK

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, whole."""
        return self.weight, self.bias

    def _eligible(self, scores_TE: Tensor) -> Tensor:
        """The scores by which experts are chosen."""
        if self.correction_bias is not None:
            scores_TE = scores_TE + self.correction_bias.to(scores_TE)
        if self.config.groups == 1:
            return scores_TE
        grouped = scores_TE.unflatten(1, (self.config.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.config.top_groups, dim=-1, sorted=False).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)

    def _balance(
        self, weights_TK: Tensor, chosen_TK: Tensor, scores_TE: Tensor, logits_TE: Tensor, packs: TokenPacks
    ) -> Tensor:
        """`weights_TK`, whose backward also counts the load and adds the gradient of the losses."""
        E = self.config.num_experts
        slots = packs.pack[:, None] * (E + 1) + chosen_TK
        counts = torch.zeros((packs.count + 1) * (E + 1), dtype=torch.int64, device=slots.device)
        counts = counts.scatter_add_(0, slots.flatten(), torch.ones_like(slots).flatten())
        counts_PE = counts.unflatten(0, (-1, E + 1))[:-1, :-1]
        loads_E = counts_PE.sum(0)
        step_tokens = packs.step_tokens.to(scores_TE.dtype).clamp(min=1)
        losses = scores_TE.new_zeros(2)
        if self.aux_coefficient > 0:
            counts_PE = counts_PE.contiguous()
            for group in self.pack_groups:
                dist.all_reduce(counts_PE, group=group)
            f_PE = counts_PE / packs.tokens.clamp(min=1)[:, None].to(scores_TE.dtype)
            f_TE = torch.cat((f_PE, torch.zeros_like(f_PE[:1])))[packs.pack]  # padding: 0
            if self.config.score == "sigmoid":
                scores_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + 1e-20)
            auxiliary = self.aux_coefficient * E / step_tokens * (f_TE * scores_TE).sum()
            losses = losses + torch.stack((auxiliary, torch.zeros_like(auxiliary)))
        if self.z_coefficient > 0:
            squares_T = logits_TE.logsumexp(1).square().masked_fill(~packs.is_real, 0.0)
            z = self.z_coefficient / step_tokens * squares_T.sum()
            losses = losses + torch.stack((torch.zeros_like(z), z))
        return _Attach.apply(weights_TK, losses, loads_E, self)

    def _count(self, loads_E: Tensor, losses: Tensor) -> None:
        self.loads = loads_E if self.loads is None else self.loads + loads_E
        self.losses = losses if self.losses is None else self.losses + losses

    def take(self) -> tuple[Tensor, Tensor]:
        """(int64[E] how many tokens of this rank chose each expert, float64[2] its part of both losses, coefficients
        included) since the last call."""
        E, device = self.config.num_experts, self.weight.device
        loads_E = torch.zeros(E, dtype=torch.int64, device=device) if self.loads is None else self.loads
        losses = torch.zeros(2, dtype=torch.float64, device=device) if self.losses is None else self.losses
        self.loads = self.losses = None
        return loads_E, losses


class _Attach(torch.autograd.Function):
    """Identity on the weights; in backward the losses get the gradient 1, and the router counts.

    The loss of the step is divided before its backward begins, and the losses here are divided by the same step, so
    neither has to know of the other.
    """

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, losses: Tensor, loads_E: Tensor, router: Router) -> Tensor:
        ctx.router = router
        ctx.save_for_backward(losses.detach(), loads_E)
        return weights_TK.clone()  # of a view FSDP warns that its hooks may be lost

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        losses, loads_E = ctx.saved_tensors
        ctx.router._count(loads_E, losses.double())
        return grad, torch.ones_like(losses), None, None
