"""Which pack each token of a row belongs to, and which tokens are real: facts of the layout, never of a token id.

A router's balancing loss is nonlinear in the tokens, so it is computed per pack: a pack is the same whatever the number
of ranks, of packs in a row and of rows in a step.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from train.attention.interface import Segments


@dataclass(frozen=True)
class Packs:
    """The packs of a whole row, also where a rank holds a part of it.

    `seq_lens` int32[S]: how many tokens of each of the row's segments are real, the first ones; 0 in padding. Pack k of
    `count` begins at token k · `tokens` of the row. `step_tokens` int64[1] are the real tokens of the step over all
    ranks.
    """

    seq_lens: Tensor
    count: int
    tokens: int
    step_tokens: Tensor


@dataclass(frozen=True)
class TokenPacks:
    """For every token that a rank holds its pack, int64[T], `count` for padding; `tokens` int64[count] are the real
    tokens of each whole pack, `step_tokens` (a scalar tensor) those of the step."""

    pack: Tensor
    tokens: Tensor
    step_tokens: Tensor

    @property
    def count(self) -> int:
        return len(self.tokens)

    def of(self, tokens: slice) -> "TokenPacks":
        """Those of some of the tokens."""
        return replace(self, pack=self.pack[tokens])

    @property
    def is_real(self) -> Tensor:
        return self.pack < self.count


def token_packs(segments: "Segments", position_ids_T: Tensor) -> TokenPacks:
    """The pack of every token. Where the segments do not tell (`packs` None), all tokens are real and make one pack,
    which is the whole step."""
    packs, device = segments.packs, position_ids_T.device
    if packs is None:
        total = torch.tensor([len(position_ids_T)], device=device)
        return TokenPacks(torch.zeros_like(position_ids_T, dtype=torch.int64), total, total[0])
    row_ends = segments.cu_seqlens if segments.part is None else segments.part.row_cu_seqlens
    pack_S = (row_ends[:-1] // packs.tokens).clamp(max=packs.count - 1).long()
    # A rank's part has one segment for each of the row, or two (zigzag).
    pieces = (len(segments.cu_seqlens) - 1) // len(packs.seq_lens)
    tokens = torch.arange(len(position_ids_T), dtype=torch.int32, device=device)
    segment_T = (torch.searchsorted(segments.cu_seqlens, tokens, right=True) - 1) // pieces
    is_real = position_ids_T < packs.seq_lens[segment_T]
    tokens_P = torch.zeros(packs.count, dtype=torch.int64, device=device)
    tokens_P.index_add_(0, pack_S, packs.seq_lens.long())
    return TokenPacks(torch.where(is_real, pack_S[segment_T], packs.count), tokens_P, packs.step_tokens[0])
