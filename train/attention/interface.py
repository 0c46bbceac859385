"""One attention for packed documents, several kernels behind it.

Shapes: T packed tokens of the queries, U of the keys (U = T without context parallelism), N query heads, K key/value
heads (N % K == 0), H head dimension, S documents (segments).

A kernel is a pair of functions, forward and backward, over *varlen* input: document s owns query rows
`cu_seqlens_q[s]:cu_seqlens_q[s+1]` and key rows `cu_seqlens_k[s]:cu_seqlens_k[s+1]`, and nothing else is visible to it.
Attention is causal, aligned bottom-right (the last query sees the last key). `as_op` turns the pair into one
`torch.library.custom_op` with a fake and an autograd formula, so a compiled block has no graph break, and recompute
policies can name it. The log-sum-exp is an output without gradient: ring attention calls `backward` with the merged
one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where the documents of a packed row lie.

    `cu_seqlens` is int32[S+1] on the device of the tokens; it starts at 0, ends at T, and may repeat T at its end, so
    that its length can stay the same from step to step. `max_seqlen` bounds every document's length; it sizes the
    launch of GPU kernels and changes nothing in the result. A context-parallel rank holds only a part of the row: its
    segments are what it holds of each document (one run, or two chunks), some of them empty, and `part` tells the rest.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    part: "Part | None" = None

    @property
    def document_lengths(self) -> Tensor:
        """int32[S]: for each segment the length of its whole document (of its slot, where that is padded)."""
        if self.part is None:
            return self.cu_seqlens.diff()
        lengths = self.part.row_cu_seqlens.diff()
        return lengths.repeat_interleave((len(self.cu_seqlens) - 1) // len(lengths))

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Segments":
        """Segments of consecutive documents of these lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(ends.to(device), max(lengths))


@dataclass(frozen=True)
class Part:
    """What a context-parallel rank must know of the row that its segments are a part of (see `train.cut`).

    `row_cu_seqlens` int32[S+1] and `row_max_seqlen` are those of the whole row. `first_keys[r]` says where on the row
    the document begins that rank r's contiguous part begins in. Where the cut is zigzag, the keys of segment s are
    `key_rows[cu_seqlens_k[s]:cu_seqlens_k[s+1]]`, int32 row numbers among the tokens of all ranks, rank after rank.
    """

    row_cu_seqlens: Tensor
    row_max_seqlen: int
    first_keys: tuple[int, ...] = ()
    cu_seqlens_k: Tensor | None = None
    key_rows: Tensor | None = None


@dataclass(frozen=True)
class Backend:
    """A kernel as the rest of the trainer sees it, and what it can do.

    `op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window, softcap)` returns `out_TNH` and
    `lse_NT`; `backward(grad_out, q, k, v, out, lse, …the same seven)` returns the gradients of q, k and v.
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    softcap: bool
    max_head_dim: int | None = None
    head_dim_multiple: int = 1

    def refusal(self, device: str, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why this kernel cannot serve the model, or None when it can."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"it computes in {', '.join(str(d)[6:] for d in self.dtypes)}, not in {str(dtype)[6:]}"
        if softcap and not self.softcap:
            return "it has no softcap on the scores, which this model needs"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"its heads have at most {self.max_head_dim} dimensions, this model's have {head_dim}"
        if head_dim % self.head_dim_multiple:
            return f"its heads have a multiple of {self.head_dim_multiple} dimensions, this model's have {head_dim}"
        return None


def as_op(name: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `meshpack::<name>` (and its backward as `meshpack::<name>_backward`) and return the operator."""
    # Explicit schemas: both functions then share one meaning of the optional arguments, whatever their annotations.
    tensors = "Tensor q, Tensor k, Tensor v"
    layout = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k"
    options = "float scale, int? window, float? softcap"
    op = torch.library.custom_op(
        f"meshpack::{name}", forward, mutates_args=(), schema=f"({tensors}, {layout}, {options}) -> (Tensor, Tensor)"
    )
    grad_op = torch.library.custom_op(
        f"meshpack::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad_out, {tensors}, Tensor out, Tensor lse, {layout}, {options}) -> (Tensor, Tensor, Tensor)",
    )

    @op.register_fake
    def _(q, k, v, *layout_and_options):
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
            (q.shape[1], q.shape[0]), dtype=lse_dtype
        )

    @grad_op.register_fake
    def _(grad_out, q, k, v, out, lse, *layout_and_options):
        return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))

    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.sizes_and_options = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)

    def autograd(ctx, grad_out, grad_lse):
        return *grad_op(grad_out, *ctx.saved_tensors, *ctx.sizes_and_options), *[None] * 7

    op.register_autograd(autograd, setup_context=setup_context)
    return op
