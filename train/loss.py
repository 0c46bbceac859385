"""Sum of the cross-entropy over target tokens straight from hidden states: logits exist one chunk at a time.

Head and loss together are one autograd function that computes its gradients in the forward pass, while a chunk's logits
are at hand: three matrix products a chunk, where recomputing the logits in the backward takes four. It keeps one
gradient of the hidden states and one of the weight until the backward, which for the last operation of a model comes at
once. Without gradients (evaluation) only the loss is computed.

*Vocabulary-parallel*: ranks that each have some rows of the head compute some columns of every chunk's logits, and send
three numbers a token: the largest logit, the sum of the exponentials and the label's logit.

Shapes: T tokens, D hidden size, V vocabulary (of this rank), C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from formats.schema import IGNORE_INDEX
from train.parallel.collectives import sum_over_ranks

LOGIT_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Of one chunk. On CPU larger was not faster, smaller re-reads the weight's gradient too often. On a GPU each chunk
moves the weight twice and its float32 gradient once each way, 12 bytes a weight for 6 operations a token: an H200
(989 TFLOP/s, 4.8 TB/s) needs 400 tokens to hide that; with 152k words a chunk has 880."""

MIN_CHUNK, MAX_CHUNK = 128, 8192


@dataclass(frozen=True)
class VocabPart:
    """Which `rows` of the vocabulary's head this rank of `group` has; no rank has more than `most`."""

    group: dist.ProcessGroup
    rows: slice
    most: int


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    softcap: float | None = None,
    targets_only: bool | None = None,
    chunk: int | None = None,
    vocab: VocabPart | None = None,
) -> Tensor:
    """−Σ log softmax(hidden · weightᵀ)[label] over the tokens whose label is not `IGNORE_INDEX`: a scalar.

    The result is float32, float64 for float64 input; softmax and sums run in that type. `softcap` bounds the logits by
    `softcap·tanh(logit/softcap)`.

    `targets_only` drops the other tokens before the head, which saves their share of its cost. How many targets there
    are then sets the shapes: the default does it on CPU, and not on CUDA, where reading that number would stall the
    launch queue and break static shapes. `chunk` is the number of tokens per chunk; by default the logits of one
    take `LOGIT_BYTES` of the device.

    With `vocab` the ranks of a group share out the words: `weight_VD` is this rank's part of the head, hidden states
    and labels (ids of the whole vocabulary) are the same on all. The loss is whole and the same number on all ranks;
    the gradient of the hidden states is this rank's summand.
    """
    if targets_only is None:
        targets_only = hidden_TD.device.type == "cpu"
    if targets_only:
        rows = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
        hidden_TD, labels_T = hidden_TD[rows], labels_T[rows]
    if chunk is None:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        words = weight_VD.shape[0] if vocab is None else vocab.most  # the ranks must agree on the number of chunks
        chunk = min(max(LOGIT_BYTES[hidden_TD.device.type] // (words * wide.itemsize), MIN_CHUNK), MAX_CHUNK)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T.long(), softcap, chunk, vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        softcap: float | None,
        chunk: int,
        vocab: VocabPart | None,
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TD.device)
        grad_hidden = torch.zeros_like(hidden_TD) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if want_weight else None
        # Every chunk's logits, and what enters or leaves a matrix product in the type of the weights.
        wide_CV = weight_VD.new_empty((min(chunk, len(hidden_TD)), len(weight_VD)), dtype=wide)
        narrow_CV = wide_CV if wide == hidden_TD.dtype else torch.empty_like(wide_CV, dtype=hidden_TD.dtype)
        for start in range(0, hidden_TD.shape[0], chunk):
            hidden, labels = hidden_TD[start : start + chunk], labels_T[start : start + chunk]
            logits = _multiply(hidden, weight_VD.t(), narrow_CV[: len(labels)], wide_CV[: len(labels)])
            if softcap is not None:
                logits.div_(softcap).tanh_()
                slope = 1 - logits * logits if want_hidden or want_weight else None
                logits.mul_(softcap)
            is_target = (labels != IGNORE_INDEX)[:, None]
            index, is_here = _own_column(labels[:, None], vocab)
            target = logits.gather(1, index)
            # In place from here on: each pass over a chunk's logits costs as much as a tenth of a matrix product.
            highest = logits.amax(1, keepdim=True)
            if vocab is not None:
                highest = sum_over_ranks(highest, vocab.group, "max")
            exponentials = logits.sub_(highest).exp_()
            total = exponentials.sum(1, keepdim=True)
            if vocab is not None:
                both = torch.cat((total, torch.where(is_here, target, 0)), dim=1)
                total, target = sum_over_ranks(both, vocab.group).split(1, dim=1)
            loss += torch.where(is_target, total.log() + highest - target, 0).sum()
            if not (want_hidden or want_weight):
                continue
            grad_logits = exponentials.mul_(is_target / total)  # softmax, 0 where there is no target
            grad_logits.scatter_add_(1, index, -(is_target & is_here).to(wide))
            if softcap is not None:
                grad_logits *= slope
            if narrow_CV is not wide_CV:
                grad_logits = narrow_CV[: len(labels)].copy_(grad_logits)
            if want_hidden:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[start : start + chunk])
            if want_weight:
                _add_product(grad_weight, grad_logits.t(), hidden)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        # In place: the weight's gradient is as large as the weight. Not where the graph is kept: a pipeline schedule
        # that splits the backward comes twice, for the hidden states and later for the weight.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        scale = torch.mul if kept else torch.Tensor.mul_
        grads = [None if grad is None else scale(grad, grad_loss) for grad in ctx.saved_tensors]
        return *grads, None, None, None, None


def _multiply(left: Tensor, right: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """left · right in `wide`. cuBLAS leaves it there as it was summed; on CPU it is rounded to the factors' type first,
    in `narrow`."""
    if wide.dtype == left.dtype:
        return torch.mm(left, right, out=wide)
    if wide.device.type == "cuda":
        return torch.mm(left, right, out_dtype=wide.dtype, out=wide)
    return wide.copy_(torch.mm(left, right, out=narrow))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total` += left · right, on CUDA neither rounded nor written anywhere before it is added."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _own_column(labels_C1: Tensor, vocab: VocabPart | None) -> tuple[Tensor, Tensor]:
    """For each label a column of this rank's logits (some column where it has none), and whether it is the label's."""
    if vocab is None:
        return labels_C1.clamp(min=0), labels_C1 >= 0
    is_here = (labels_C1 >= vocab.rows.start) & (labels_C1 < vocab.rows.stop)
    return torch.where(is_here, labels_C1 - vocab.rows.start, 0), is_here
