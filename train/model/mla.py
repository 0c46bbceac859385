"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) as it is trained: keys and values are expanded.

Shapes: T tokens, D hidden size, N heads, H head dimension of queries and keys, R its turned part, V that of values, L
rank of the latent.
"""

import torch
from torch import Tensor, nn

from train.attention.interface import Segments
from train.model.config import ModelConfig
from train.model.norm import Norm
from train.model.rope import apply_rope

LATENT_EPS = 1e-6  # of the norms of the latents, whatever config.json says of the others


class LatentAttention(nn.Module):
    """The parameters of a family with `ModelConfig.mla`; `core` is as in `decoder.Attention`."""

    def __init__(self, config: ModelConfig, core: nn.Module):
        super().__init__()
        mla, D, N, H = config.mla, config.hidden_size, config.num_heads, config.head_dim
        self.mla, self.head_dim = mla, H
        if mla.query_rank is None:
            self.q_proj = nn.Linear(D, N * H, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, mla.query_rank, bias=config.qkv_bias)
            self.q_a_norm = Norm(mla.query_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(mla.query_rank, N * H, bias=False)
        self.kv_a_proj = nn.Linear(D, mla.kv_rank + mla.rope_dim, bias=config.qkv_bias)
        self.kv_a_norm = Norm(mla.kv_rank, LATENT_EPS)
        self.kv_b_proj = nn.Linear(mla.kv_rank, N * (H - mla.rope_dim + mla.value_dim), bias=False)
        self.o_proj = nn.Linear(N * mla.value_dim, D, bias=config.output_bias)
        self.core = core

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments) -> Tensor:
        mla, still = self.mla, self.head_dim - self.mla.rope_dim
        q = self.q_proj(x_TD) if mla.query_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_TD)))
        q_still, q_turned = q.unflatten(1, (-1, self.head_dim)).split([still, mla.rope_dim], dim=-1)
        latent_TL, k_turned = self.kv_a_proj(x_TD).split([mla.kv_rank, mla.rope_dim], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_norm(latent_TL)).unflatten(1, (-1, still + mla.value_dim))
        k_still, v_TNV = expanded.split([still, mla.value_dim], dim=-1)
        q_turned, k_turned = self._turn(q_turned, rope), self._turn(k_turned[:, None], rope)
        q_TNH = torch.cat((q_still, q_turned), dim=-1)
        k_TNH = torch.cat((k_still, k_turned.expand(-1, k_still.shape[1], -1)), dim=-1)
        # One head dimension for all three: kernels and exchanges know no other, and zeros stay zeros.
        v_TNH = nn.functional.pad(v_TNV, (0, self.head_dim - mla.value_dim))
        out_TNH = self.core(q_TNH, k_TNH, v_TNH, segments)
        return self.o_proj(out_TNH[..., : mla.value_dim].flatten(1))

    def _turn(self, x_TNR: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        assert rope is not None
        if self.mla.interleaved:
            x_TNR = x_TNR.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return apply_rope(x_TNR, *rope)
