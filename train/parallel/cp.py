"""Context parallelism: a rank holds a part of every row (`train.cut`) and sees the keys before it on other ranks.

Only `block.attention.core` is replaced: all else in a decoder works on single tokens. Positions and labels were made on
the whole row before it was cut, and the loss is a sum over tokens, so the ranks' shares only add up. Four ways, three
of them with one exchange a layer and the same one back in backward:

gather  (default) every rank receives all keys and values of the row. Contiguous or zigzag.
needed  a rank receives only the keys that the document its part begins in has on earlier ranks, or as many as the
        window of the layer sees: nothing where a document begins with the part. Sizes are known on the host from
        `cu_seqlens`. Contiguous.
ulysses heads are exchanged for tokens (DeepSpeed-Ulysses, arXiv 2309.14509): a rank attends over the whole row with
        1/cp of the heads; key/value heads are repeated where there are fewer than ranks. Contiguous.
ring    keys come in steps, one rank's at a time (`train.parallel.ring`). Mixed. Transformer Engine has a ring of its
        own, which wants every document cut. Zigzag.

Shapes: T tokens of a rank, N query heads, K key/value heads, H head dimension, C ranks of the cp axis.
"""

import torch
from torch import Tensor, nn

from train.attention import te
from train.attention.interface import Segments
from train.config import Config
from train.mesh import Mesh
from train.model.config import ModelConfig
from train.parallel.exchange import AllGather, AllToAll, Exchange, part_of
from train.parallel.ring import RingAttention
from train.parallel.styles import RowLinear


def apply_cp(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Let every block of `model.layers` attend over the `cp` axis, in place, and return the model.

    Raises: ValueError when the heads of the model cannot be shared out as the method needs it.
    """
    method, size = config.layout.cp_method, mesh.cp_size
    attention = next(model.layers.children()).attention.core.backend
    if method == "ring" and attention == "te":
        check_no_window(model.config)
    exchange = {
        "gather": GatherAttention,
        "needed": NeededAttention,
        "ring": TransformerEngineRing if attention == "te" else RingAttention,
        "ulysses": UlyssesAttention,
    }[method]
    for block in model.layers.children():
        if method == "ulysses":
            check_heads(model.config, size, mesh.tp_size if isinstance(block.attention.o_proj, RowLinear) else 1)
        block.attention.core = exchange(block.attention.core, mesh.root.get_group("cp"), mesh.cp_rank, size)
    return model


def check_heads(config: ModelConfig, size: int, tp: int = 1) -> None:
    """Raise a ValueError when `--cp-method ulysses` cannot share out over `size` ranks the heads that one of the `tp`
    ranks among which they are shared out already holds."""
    heads, kv_heads = config.num_heads // tp, max(1, config.num_kv_heads // tp)
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            f"--cp-method ulysses cannot share out {heads} query and {kv_heads} key/value heads "
            + "of a tensor rank " * (tp > 1)
            + f"over --cp {size}; "
            "take another --cp-method, or a --cp that divides the query heads and divides the key/value "
            "heads or is a multiple of them"
        )


def check_no_window(config: ModelConfig) -> None:
    """Raise a ValueError when a layer has a window, which Transformer Engine's ring has not."""
    if any(layer.window is not None for layer in config.layers):
        raise ValueError(
            "--attention te has no sliding window over --cp-method ring, and this model has layers with one; take "
            "another --attention, or another --cp-method"
        )


class GatherAttention(Exchange):
    def forward(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, sinks_N: Tensor | None = None
    ) -> Tensor:
        part = part_of(segments)
        kv = AllGather.apply(torch.stack((k_TKH, v_TKH), dim=1), self.group)  # [C·T, 2, K, H]
        if part.key_rows is not None:
            kv, ends = kv.index_select(0, part.key_rows), part.cu_seqlens_k
        else:
            # A document that ends in this part or after it ends here for these queries: the last of them is aligned
            # with the last key. Documents before have keys and no queries. Lengths stay the same from row to row.
            stop = (self.rank + 1) * len(q_TNH)
            kv, ends = kv[:stop], part.row_cu_seqlens.clamp(max=stop)
        return self.core(q_TNH, *kv.unbind(1), segments, Segments(ends, part.row_max_seqlen), sinks_N)


class NeededAttention(Exchange):
    def forward(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, sinks_N: Tensor | None = None
    ) -> Tensor:
        part, tokens = part_of(segments), len(q_TNH)
        counts = needed_counts(part.first_keys, tokens, self.core.window)
        own, kv = self.rank, torch.stack((k_TKH, v_TKH), dim=1)  # [T, 2, K, H]
        if any(map(any, counts)):
            # What a later rank needs of this part is always its end.
            sent = torch.cat([kv[tokens - counts[own][r] :] for r in range(self.size)])
            received = AllToAll.apply(sent, counts[own], [counts[r][own] for r in range(self.size)], self.group)
            kv = torch.cat((received, kv))
        stop = (own + 1) * tokens
        first = stop - len(kv)
        ends = part.row_cu_seqlens.clamp(first, stop) - first
        return self.core(q_TNH, *kv.unbind(1), segments, Segments(ends, part.row_max_seqlen), sinks_N)


def needed_counts(first_keys: tuple[int, ...], tokens: int, window: int | None) -> list[list[int]]:
    """`counts[j][r]`: of how many tokens rank j sends keys and values to rank r when each holds `tokens` of the row and
    rank r's part begins in a document that begins at `first_keys[r]`."""
    size = len(first_keys)
    counts = [[0] * size for _ in range(size)]
    for r in range(1, size):
        begin = r * tokens
        first = first_keys[r] if window is None else max(first_keys[r], begin - window + 1)
        for j in range(r):
            counts[j][r] = max(0, (j + 1) * tokens - max(first, j * tokens))
    return counts


class UlyssesAttention(Exchange):
    def forward(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, sinks_N: Tensor | None = None
    ) -> Tensor:
        part, tokens = part_of(segments), len(q_TNH)
        if (copies := self.size // k_TKH.shape[1]) > 1:
            k_TKH, v_TKH = (x.repeat_interleave(copies, dim=1) for x in (k_TKH, v_TKH))
        # Each rank's share of the heads of all three in one exchange: [T, C, N/C + 2·K/C, H], then C before T.
        shares = [x.unflatten(1, (self.size, -1)) for x in (q_TNH, k_TKH, v_TKH)]
        heads = [x.shape[2] for x in shares]
        packed = torch.cat(shares, dim=2).transpose(0, 1).flatten(0, 1)
        q, k, v = self._swap(packed, tokens).split(heads, dim=1)  # each [C·T, its heads, H]
        sinks = None if sinks_N is None else sinks_N.unflatten(0, (self.size, -1))[self.rank]
        out = self.core(q, k, v, Segments(part.row_cu_seqlens, part.row_max_seqlen), sinks_N=sinks)
        # Back: rank c returns its heads of this rank's tokens.
        return self._swap(out, tokens).unflatten(0, (self.size, tokens)).transpose(0, 1).flatten(1, 2)

    def _swap(self, x: Tensor, tokens: int) -> Tensor:
        """[C·T, …] → [C·T, …]: run c of T rows goes to rank c."""
        return AllToAll.apply(x, [tokens] * self.size, [tokens] * self.size, self.group)


class TransformerEngineRing(Exchange):
    def forward(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, sinks_N: Tensor | None = None
    ) -> Tensor:
        part = part_of(segments)
        assert sinks_N is None  # the backend is refused for such a model
        row = part.row_cu_seqlens, part.row_max_seqlen
        return te.attend_over_ring(q_TNH, k_TKH, v_TKH, *row, self.core.scale, self.group)
