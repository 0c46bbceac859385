"""Sum of the cross-entropy over target tokens straight from hidden states: logits exist one chunk at a time.

Head and loss together are one autograd function that computes its gradients in the forward pass, while a chunk's logits
are at hand: three matrix products a chunk, where recomputing the logits in the backward takes four. It keeps one
gradient of the hidden states and one of the weight until the backward, which for the last operation of a model comes at
once. Without gradients (evaluation) only the loss is computed.

Shapes: T tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

from formats.schema import IGNORE_INDEX

LOGIT_BYTES = 1 << 26  # of one chunk; larger was not faster on CPU, smaller re-reads the weight's gradient too often
MIN_CHUNK, MAX_CHUNK = 128, 8192


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    softcap: float | None = None,
    targets_only: bool | None = None,
    chunk: int | None = None,
) -> Tensor:
    """−Σ log softmax(hidden · weightᵀ)[label] over the tokens whose label is not `IGNORE_INDEX`: a scalar.

    The result is float32, float64 for float64 input; softmax and sums run in that type. `softcap` bounds the logits by
    `softcap·tanh(logit/softcap)`.

    `targets_only` drops the other tokens before the head, which saves their share of its cost. How many targets there
    are then sets the shapes: the default does it on CPU, and not on CUDA, where reading that number would stall the
    launch queue and break static shapes. `chunk` is the number of tokens per chunk; by default the logits of one
    take `LOGIT_BYTES`.
    """
    if targets_only is None:
        targets_only = hidden_TD.device.type == "cpu"
    if targets_only:
        rows = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
        hidden_TD, labels_T = hidden_TD[rows], labels_T[rows]
    if chunk is None:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        chunk = min(max(LOGIT_BYTES // (weight_VD.shape[0] * wide.itemsize), MIN_CHUNK), MAX_CHUNK)
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T.long(), softcap, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TD.device)
        grad_hidden = torch.zeros_like(hidden_TD) if want_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if want_weight else None
        buffer_CV = hidden_TD.new_empty((min(chunk, hidden_TD.shape[0]), weight_VD.shape[0]))  # every chunk's logits
        for start in range(0, hidden_TD.shape[0], chunk):
            hidden, labels = hidden_TD[start : start + chunk], labels_T[start : start + chunk]
            logits = torch.mm(hidden, weight_VD.t(), out=buffer_CV[: len(labels)]).to(wide)
            if softcap is not None:
                logits.div_(softcap).tanh_()
                slope = 1 - logits * logits if want_hidden or want_weight else None
                logits.mul_(softcap)
            is_target = (labels != IGNORE_INDEX)[:, None]
            index = labels.clamp(min=0)[:, None]
            target = logits.gather(1, index)
            # In place from here on: each pass over a chunk's logits costs as much as a tenth of a matrix product.
            highest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(highest).exp_()
            total = exponentials.sum(1, keepdim=True)
            loss += torch.where(is_target, total.log() + highest - target, 0).sum()
            if not (want_hidden or want_weight):
                continue
            grad_logits = exponentials.mul_(is_target / total)  # softmax, 0 where there is no target
            grad_logits.scatter_add_(1, index, -is_target.to(wide))
            if softcap is not None:
                grad_logits *= slope
            grad_logits = grad_logits.to(hidden.dtype)
            if want_hidden:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[start : start + chunk])
            if want_weight and wide == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden)
            elif want_weight:
                grad_weight += grad_logits.t() @ hidden
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        # In place: the weight's gradient is as large as the weight. A second backward over the same graph finds its
        # saved tensors modified and raises.
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors]
        return *grads, None, None, None
