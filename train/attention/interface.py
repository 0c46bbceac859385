"""One attention for packed documents, several kernels behind it.

Shapes: T packed tokens of the queries, U of the keys (U = T without context parallelism), N query heads, K key/value
heads (N % K == 0), H head dimension, S documents (segments).

A kernel is a pair of functions, forward and backward, over *varlen* input: document s owns query rows
`cu_seqlens_q[s]:cu_seqlens_q[s+1]` and key rows `cu_seqlens_k[s]:cu_seqlens_k[s+1]`, and nothing else is visible to it.
Attention is causal, aligned bottom-right (the last query sees the last key). `as_op` turns the pair into one
`torch.library.custom_op` with a fake and an autograd formula, so a compiled block has no graph break, and recompute
policies can name it. The log-sum-exp is an output without gradient: ring attention calls `backward` with the merged
one.

Attention *sinks* (GPT-OSS) are one learned logit a head that joins the denominator of every softmax and has no value.
No kernel needs to know of them: they scale the output by σ(lse − sink) and raise the log-sum-exp to that of keys and
sink together, from which a kernel's backward makes the right gradients of q, k and v (`join_sinks`, `sinks_gradient`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.packs import Packs, TokenPacks
from train.pieces import Pieces


@dataclass(frozen=True)
class Segments:
    """Where the documents of a packed row lie.

    `cu_seqlens` is int32[S+1] on the device of the tokens; it starts at 0, ends at T, and may repeat T at its end, so
    that its length can stay the same from step to step. `max_seqlen` bounds every document's length; it sizes the
    launch of GPU kernels and changes nothing in the result. A context-parallel rank holds only a part of the row: its
    segments are what it holds of each document (one run, or two chunks), some of them empty, and `part` tells the rest.
    `packs` tells real tokens from padding, and the decoder derives `token_packs` from it; no kernel reads either.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    part: "Part | None" = None
    packs: Packs | None = None
    token_packs: TokenPacks | None = None

    @property
    def document_lengths(self) -> Tensor:
        """int32[S]: for each segment the length of its whole document, without the padding of its slot where `packs`
        tells it."""
        if self.packs is not None:
            lengths = self.packs.seq_lens
        elif self.part is not None:
            lengths = self.part.row_cu_seqlens.diff()
        else:
            return self.cu_seqlens.diff()
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
    Where it is mixed, `pieces` says which rank holds what, and segment s is what this rank holds of document s.
    """

    row_cu_seqlens: Tensor
    row_max_seqlen: int
    first_keys: tuple[int, ...] = ()
    cu_seqlens_k: Tensor | None = None
    key_rows: Tensor | None = None
    pieces: Pieces | None = None


@dataclass(frozen=True)
class Backend:
    """A kernel as the rest of the trainer sees it, and what it can do.

    `op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window, softcap, sinks)` returns `out_TNH` and
    `lse_NT`, the sinks [N] (floating point, any type) included; it has gradients for q, k, v and sinks.
    `forward(q, k, v, …the same seven, causal=True)` is the kernel under it: without sinks, gradients and tracing, and
    able to leave the causal mask away (not together with a window), as ring attention needs it for keys that lie before
    all queries. `backward(grad_out, q, k, v, out, lse, …the same seven, causal=True)` returns the gradients of q, k, v.
    Both are None where a package has gradients of its own and hides its log-sum-exp; it then has a ring of its own.
    `missing(head_dim)` says why the package behind a kernel cannot be used here, None when it can.
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    forward: Callable[..., tuple[Tensor, Tensor]] | None
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    softcap: bool
    sinks: bool = True
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    missing: Callable[[int], str | None] = lambda head_dim: None

    def refusal(self, device: str, dtype: torch.dtype, head_dim: int, softcap: bool, sinks: bool) -> str | None:
        """Why this kernel cannot serve the model, or None when it can."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"it computes in {', '.join(str(d)[6:] for d in self.dtypes)}, not in {str(dtype)[6:]}"
        if softcap and not self.softcap:
            return "it has no softcap on the scores, which this model needs"
        if sinks and not self.sinks:
            return "it has no attention sinks, which this model needs"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"its heads have at most {self.max_head_dim} dimensions, this model's have {head_dim}"
        if head_dim % self.head_dim_multiple:
            return f"its heads have a multiple of {self.head_dim_multiple} dimensions, this model's have {head_dim}"
        return self.missing(head_dim)


def merge_keys(
    out_TNH: Tensor, lse_NT: Tensor, rows: Tensor | slice, out_more_RNH: Tensor, lse_more_NR: Tensor
) -> None:
    """Merge attention over more keys into that over others, for the R queries `rows`, in place."""
    merged = torch.logaddexp(lse_NT[:, rows], lse_more_NR)
    weight_before, weight_more = (torch.exp(lse - merged).t()[..., None] for lse in (lse_NT[:, rows], lse_more_NR))
    out_TNH[rows] = (out_TNH[rows] * weight_before + out_more_RNH * weight_more).to(out_TNH.dtype)
    lse_NT[:, rows] = merged


def join_sinks(out_TNH: Tensor, lse_NT: Tensor, sinks_N: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of attention without sinks → those with them. Rows without keys stay 0."""
    sinks_N1 = sinks_N.to(lse_NT.dtype)[:, None]
    weight_TN1 = torch.sigmoid(lse_NT - sinks_N1).t()[..., None]
    return (out_TNH * weight_TN1).to(out_TNH.dtype), torch.logaddexp(lse_NT, sinks_N1)


def sinks_gradient(grad_out_TNH: Tensor, out_TNH: Tensor, lse_NT: Tensor, sinks_N: Tensor) -> Tensor:
    """Gradient of the sinks, in their type, from the output and log-sum-exp with them.

    The weight of a sink is exp(sink − lse), and its value is 0: softmax's backward leaves −weight · (grad_out · out).
    """
    wide = lse_NT.dtype
    delta_NT = (grad_out_TNH.to(wide) * out_TNH.to(wide)).sum(-1).t()
    return -(torch.exp(sinks_N.to(wide)[:, None] - lse_NT) * delta_NT).sum(1).to(sinks_N.dtype)


def as_op(name: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `meshpack::<name>` (and its backward as `meshpack::<name>_backward`) and return the operator.

    `forward` and `backward` are those of the kernel, which need not know of sinks.
    """
    # Explicit schemas: both functions then share one meaning of the optional arguments, whatever their annotations.
    tensors = "Tensor q, Tensor k, Tensor v"
    layout = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k"
    options = "float scale, int? window, float? softcap"

    def with_sinks(q, k, v, *layout_and_options):
        *layout_and_options, sinks = layout_and_options
        out, lse = forward(q, k, v, *layout_and_options)
        return (out, lse) if sinks is None else join_sinks(out, lse, sinks)

    op = torch.library.custom_op(
        f"meshpack::{name}",
        with_sinks,
        mutates_args=(),
        schema=f"({tensors}, {layout}, {options}, Tensor? sinks) -> (Tensor, Tensor)",
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
        q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.sizes_and_options, sinks = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, sinks)

    def autograd(ctx, grad_out, grad_lse):
        *tensors, sinks = ctx.saved_tensors
        _, _, _, out, lse, _, _ = tensors
        grad_sinks = None if sinks is None else sinks_gradient(grad_out, out, lse, sinks)
        return *grad_op(grad_out, *tensors, *ctx.sizes_and_options), *[None] * 7, grad_sinks

    op.register_autograd(autograd, setup_context=setup_context)
    return op
