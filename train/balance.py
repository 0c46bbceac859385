"""How busy the experts of a step were, and the bias that evens it out."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from train.config import Router as RouterConfig
from train.model.config import ModelConfig
from train.model.moe import MixtureOfExperts
from train.model.router import Router


@dataclass(frozen=True)
class ExpertLoad:
    """Of one step over all ranks, equal on all of them: `tokens` float64[layers with experts, E], how many chose each
    expert; the sums of both losses over these layers, coefficients included; `dropped`, how many rows fewer the experts
    computed, counted where they did, than real tokens have choices."""

    layers: tuple[int, ...]
    tokens: torch.Tensor
    aux_loss: float
    z_loss: float
    dropped: int

    @property
    def max_over_mean(self) -> float:
        """The load of the busiest expert over the mean, in the layer where that is worst."""
        return (self.tokens.amax(1) / self.tokens.mean(1).clamp(min=1e-9)).max().item()

    def record(self, step: int, config: RouterConfig) -> dict[str, Any]:
        """What the metrics of `step` hold of it."""
        record = {"expert_max_over_mean": self.max_over_mean, "dropped_tokens": self.dropped}
        if config.router_aux_loss > 0:
            record["router_aux_loss"] = self.aux_loss
        if config.router_z_loss > 0:
            record["router_z_loss"] = self.z_loss
        if config.router_log_every and step % config.router_log_every == 0:
            rows = self.tokens.long().tolist()
            record["expert_tokens"] = {str(layer): row for layer, row in zip(self.layers, rows, strict=True)}
        return record


def mixtures(model: nn.Module) -> dict[int, MixtureOfExperts]:
    """The mixtures of the layers that this rank holds, by the number of the layer."""
    return {
        int(name): block.mlp for name, block in model.layers.named_children() if isinstance(block.mlp, MixtureOfExperts)
    }


def routers(model: nn.Module) -> dict[int, Router]:
    """Their routers."""
    return {layer: mixture.router for layer, mixture in mixtures(model).items()}


def take_load(model: nn.Module, config: ModelConfig, step_tokens: int) -> ExpertLoad | None:
    """What routers and experts counted since the last call, summed over all ranks: once a step, collective. None for a
    model without experts.

    Every rank has routed tokens of its own (tensor-parallel ranks share theirs out), and a pipeline's ranks have other
    layers: so the sum over the world counts each token of a layer once. Its choices are computed on any ranks, each
    once, too.
    """
    layers = tuple(i for i, layer in enumerate(config.layers) if layer.experts)
    if not layers:
        return None
    mine = mixtures(model)
    device = next(model.parameters()).device
    counted = torch.zeros(len(layers), config.moe.num_experts + 3, dtype=torch.float64, device=device)
    for row, layer in enumerate(layers):
        if layer in mine:
            loads, losses = mine[layer].router.take()
            values = (loads, losses, mine[layer].take_computed()[None])
            counted[row] = torch.cat([value.to(counted) for value in values])
    dist.all_reduce(counted)
    counted = counted.cpu()
    tokens, (aux_loss, z_loss, computed) = counted[:, :-3], counted[:, -3:].sum(0).tolist()
    chosen = len(layers) * config.moe.top_k * step_tokens
    return ExpertLoad(layers, tokens, aux_loss, z_loss, chosen - int(computed))


@torch.no_grad()
def move_biases(model: nn.Module, load: ExpertLoad, rate: float) -> None:
    """Raise the bias of every expert that had less than the mean load of its layer by `rate`, lower the others'.

    Wang et al. 2024 (arXiv 2408.15664). The same on all ranks, since the load is.
    """
    for layer, router in routers(model).items():
        tokens = load.tokens[load.layers.index(layer)]
        router.correction_bias += (rate * torch.sign(tokens.mean() - tokens)).to(router.correction_bias)
