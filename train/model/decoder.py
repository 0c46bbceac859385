"""The decoder: one definition for every family, free of parallel code.

Shapes: T packed tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head dimension, V
vocabulary. Head counts are read off the tensors (`-1`), so that a tensor-parallel rank runs the same lines on its
share.

What parallelism may replace from outside: `block.attention.core` (context parallelism), modules with parameters by
`train.parallel.styles` (tensor parallelism), `model.layers` entries (pipeline stages, compiled blocks).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from train.attention.choose import BACKENDS, varlen_attention
from train.attention.interface import Segments
from train.loss import linear_cross_entropy
from train.model.config import LayerConfig, ModelConfig
from train.model.held import held
from train.model.mla import LatentAttention
from train.model.mlp import Mlp
from train.model.moe import MixtureOfExperts
from train.model.norm import Norm
from train.model.rope import apply_rope, rope_tables
from train.packs import token_packs


class AttentionCore(nn.Module):
    """Attention between heads that are already projected and turned: the part that sees several tokens at once."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, backend: str):
        super().__init__()
        self.backend = backend
        self.scale, self.softcap, self.window = config.attention_scale, config.attention_softcap, layer.window

    def forward(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        segments: Segments,
        keys: Segments | None = None,
        sinks_N: Tensor | None = None,
    ) -> Tensor:
        """`keys` are the segments of `k_TKH` and `v_TKH` where they are not those of the queries; `sinks_N` is a
        learned logit a head: a parameter of `Attention`, passed by keyword, so that replacing the core moves none."""
        options = {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": sinks_N}
        return varlen_attention(q_TNH, k_TKH, v_TKH, segments, keys, backend=self.backend, **options)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, core: AttentionCore):
        super().__init__()
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim = H
        self.q_proj = nn.Linear(D, N * H, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.o_proj = nn.Linear(N * H, D, bias=config.output_bias)
        self.norm_heads = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            q_size, k_size = (H, H) if self.norm_heads else (N * H, K * H)
            self.q_norm = Norm(q_size, config.norm_eps, config.norm_offset)
            self.k_norm = Norm(k_size, config.norm_eps, config.norm_offset)
        self.sinks = nn.Parameter(torch.empty(N)) if config.attention_sinks else None
        self.core = core

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments) -> Tensor:
        q_TNH = self._heads(self.q_proj(x_TD), self.q_norm)
        k_TKH = self._heads(self.k_proj(x_TD), self.k_norm)
        v_TKH = self._heads(self.v_proj(x_TD), None)
        if rope is not None:
            q_TNH, k_TKH = apply_rope(q_TNH, *rope), apply_rope(k_TKH, *rope)
        return self.o_proj(self.core(q_TNH, k_TKH, v_TKH, segments, sinks_N=held(self.sinks)).flatten(1))

    def _heads(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None and not self.norm_heads:
            x = norm(x)
        x = x.unflatten(1, (-1, self.head_dim))
        return norm(x) if norm is not None and self.norm_heads else x


class Block(nn.Module):
    """One layer: the unit of FSDP, recompute, compile and of pipeline stages."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, backend: str):
        super().__init__()

        def norm(wanted: bool) -> Norm | None:
            return Norm(config.hidden_size, config.norm_eps, config.norm_offset) if wanted else None

        self.attention_norm = norm(config.pre_norm)
        kind = Attention if config.mla is None else LatentAttention
        self.attention = kind(config, AttentionCore(config, layer, backend))
        self.attention_post_norm = norm(config.post_norm)
        self.mlp_norm = norm(config.pre_norm)
        self.mlp = (
            MixtureOfExperts(config)
            if layer.experts
            else Mlp(config.hidden_size, config.intermediate_size, config.activation, bias=config.mlp_bias)
        )
        self.mlp_post_norm = norm(config.post_norm)
        self.rope = layer.rope

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments) -> Tensor:
        """`rope` is (cosine, sine) of this layer's kind for the row's positions, or None."""
        x_TD, normed_TD = self.attend(x_TD, rope, segments)
        has_experts = isinstance(self.mlp, MixtureOfExperts)
        out_TD = self.mlp(normed_TD, segments.token_packs) if has_experts else self.mlp(normed_TD)
        return x_TD + _optional(self.mlp_post_norm, out_TD)

    def attend(self, x_TD: Tensor, rope: tuple[Tensor, Tensor] | None, segments: Segments) -> tuple[Tensor, Tensor]:
        """Everything before the MLP: (the residual stream after attention, the same normed for the MLP)."""
        attended = self.attention(_optional(self.attention_norm, x_TD), rope, segments)
        x_TD = x_TD + _optional(self.attention_post_norm, attended)
        return x_TD, _optional(self.mlp_norm, x_TD)


def _optional(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Head(nn.Module):
    """Final projection and loss. With tied embeddings it has no parameter and is handed the embedding's weight.

    One parameter instead of two names for one keeps the tie through `to_empty`, checkpoints and norms. It asks of FSDP
    that embedding and head share a group (the root's), so that the weight is whole when the head runs.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = (
            None if config.tied_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )
        self.softcap = config.logit_softcap

    def forward(self, x_TD: Tensor, labels_T: Tensor | None, tied_weight_VD: Tensor | None = None) -> Tensor:
        weight_VD = self.weight if tied_weight_VD is None else tied_weight_VD
        if labels_T is not None:
            return linear_cross_entropy(x_TD, weight_VD, labels_T, softcap=self.softcap)
        return self.logits(x_TD, weight_VD, self.softcap)

    @staticmethod
    def logits(x_TD: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
        logits_TV = nn.functional.linear(x_TD, weight_VD)
        return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)


class Decoder(nn.Module):
    """A causal language model over one packed row.

    Parameters mean nothing until they are filled: do it with `train.hf.load_weights` or
    `train.model.initialize.init_weights`. Building under `torch.device("meta")` needs nothing else: the only buffers,
    the correction biases of routers, are filled with the parameters.

    A pipeline stage (`train.parallel.pp`) is a decoder that lacks modules: without `embed_tokens` it is given the
    hidden states of the stage before in place of ids, without `lm_head` it returns its own.
    """

    def __init__(self, config: ModelConfig, attention_backend: str = "cpu"):
        super().__init__()
        assert attention_backend in BACKENDS
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=_unfilled_embedding(config))
        self.layers = nn.ModuleList(Block(config, layer, attention_backend) for layer in config.layers)
        self.norm = Norm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.lm_head = Head(config)

    def forward(
        self, input_ids_T: Tensor, position_ids_T: Tensor, segments: Segments, labels_T: Tensor | None = None
    ) -> Tensor:
        """Logits [T, V] without labels; with labels the *sum* of the cross-entropy over targets, a scalar.

        `input_ids_T`, `position_ids_T` (restarting in every segment) and `labels_T` are int32 or int64, labels already
        shifted: `labels_T[t]` is the token to predict from token t, −100 where there is none. The loss is float32,
        float64 in a float64 model.
        """
        if self.config.moe is not None:
            segments = replace(segments, token_packs=token_packs(segments, position_ids_T))
        x_TD = input_ids_T if self.embed_tokens is None else self._embed(input_ids_T)
        blocks = list(self.layers.children())
        ropes = {block.rope for block in blocks if block.rope is not None}
        tables = {rope: rope_tables(rope, position_ids_T, segments, x_TD.dtype) for rope in ropes}
        for block in blocks:
            x_TD = block(x_TD, tables.get(block.rope), segments)
        if self.lm_head is None:
            return x_TD
        tied_weight_VD = self.embed_tokens.weight if self.lm_head.weight is None else None
        return self.lm_head(self.norm(x_TD), labels_T, tied_weight_VD)

    def _embed(self, input_ids_T: Tensor) -> Tensor:
        x_TD = self.embed_tokens(input_ids_T)
        if self.config.embedding_scale is not None:
            # Rounded to the model's type, as trained; no tensor: copying one to a GPU would wait for it.
            x_TD = x_TD * torch.tensor(self.config.embedding_scale, dtype=x_TD.dtype, device="cpu").item()
        return x_TD


def _unfilled_embedding(config: ModelConfig) -> Tensor:
    return torch.empty(config.vocab_size, config.hidden_size)  # nn.Embedding would draw random numbers for nothing
