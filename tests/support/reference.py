"""The independent side of every proof: transformers, one document at a time, and how far a result may lie from it.

A document is (ids, mask): int64[n] token ids and bool[n], which tokens are targets (the first never is).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from train.attention.interface import Segments
from train.model.sources import weight_sources

Document = tuple[Tensor, Tensor]


class KeepDouble(TorchFunctionMode):
    """Lets transformers run in float64: its norms, rotary tables and softmax cast to float32 whatever the model is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if func in (torch.Tensor.to, nn.functional.softmax) and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def random_documents(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Document]:
    """Random ids; about two thirds of the tokens are targets, in runs as in chats."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for n in lengths:
        ids = torch.randint(vocab_size, (n,), generator=generator)
        mask = (torch.arange(n) // 3 + int(torch.randint(3, (1,), generator=generator))) % 3 != 0
        mask[0] = False
        documents.append((ids, mask))
    return documents


def pack(documents: Sequence[Document], align: int = 1, tail: int = 0) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """(input_ids, position_ids, labels, segments) of one packed row: slots padded to `align`, then `tail` tokens of
    padding in a segment of its own. Written without the project's own layout functions."""
    ids, positions, labels, lengths = [], [], [], []
    for document, mask in documents:
        slot = -(-len(document) // align) * align
        padding = slot - len(document)
        ids.append(nn.functional.pad(document, (0, padding)))
        positions.append(torch.arange(slot))
        shifted = torch.full((slot,), -100)
        shifted[: len(document) - 1] = torch.where(mask[1:], document[1:], -100)
        labels.append(shifted)
        lengths.append(slot)
    if tail:
        ids.append(torch.zeros(tail, dtype=torch.int64))
        positions.append(torch.arange(tail))
        labels.append(torch.full((tail,), -100))
        lengths.append(tail)
    return torch.cat(ids), torch.cat(positions), torch.cat(labels), Segments.of(lengths)


def run_by_documents(model: nn.Module, documents: Sequence[Document]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the cross-entropy over all targets and its gradients by transformers' names, each document alone.

    The embedding's `padding_idx` is taken away: with `pad_token_id` in config.json transformers drops the gradient of
    that token wherever it is read, also where it is no padding (SmolLM2 pads with its end-of-turn token).
    The cross-entropy runs in float64 on the model's logits: torch's float32 `log_softmax` over 49,152 columns on CPU is
    off by 1e-5 in the sum, which puts SmolLM2's gradients 5e-4 from the true ones (ours: 3e-5).
    """
    model.get_input_embeddings().padding_idx = None
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for ids, mask in documents:
        if not mask.any():
            continue
        logits = model(ids[None], use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1][mask[1:]].double(), ids[1:][mask[1:]], reduction="sum")
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, gradients


def distance(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in float64; infinite where that is no number, so that no maximum passes it."""
    value, reference = value.detach().double(), reference.detach().double()
    found = float((value - reference).norm() / reference.norm())
    return math.inf if math.isnan(found) else found


def gradient_distances(model: nn.Module, reference: dict[str, Tensor]) -> dict[str, float]:
    """Distance of every parameter's gradient of our `model` from transformers' (by its names, fused ones cut)."""
    sources = weight_sources(model.config, stacked=True)  # transformers' modules hold experts so
    distances = {}
    for name, parameter in model.named_parameters():
        source = sources[name]
        distances[name] = distance(parameter.grad, source.of(reference[source.name]))
    return distances
