"""The chunked head and loss against the plain one in float64."""

import pytest
import torch
from devices import DEVICES
from reference import distance
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from train.loss import linear_cross_entropy


def inputs(tokens=70, hidden=24, vocab=331, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.4] = -100
    labels[3] = 0  # an id like any other
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), labels


def plain(h, w, labels, softcap=None):
    """Loss and gradients in float64 with all logits at once."""
    h, w = (x.detach().double().requires_grad_() for x in (h, w))
    logits = h @ w.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return loss, *torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("targets_only", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 70, None])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_equals_the_plain_loss(dtype, bound, chunk, targets_only, softcap):
    h, w, labels = inputs(dtype=dtype)
    loss = linear_cross_entropy(h, w, labels, softcap=softcap, targets_only=targets_only, chunk=chunk)
    assert loss.dtype == dtype
    assert loss.shape == ()
    grads = torch.autograd.grad(loss, (h, w))
    for value, reference in zip((loss, *grads), plain(h, w, labels, softcap), strict=True):
        assert distance(value, reference) <= bound
        assert value.dtype == dtype


def test_large_vocabulary_and_logits():
    """Where torch's float32 log-softmax on CPU is off by 1e-5: 49,152 columns, logits up to about 20."""
    h, w, labels = inputs(tokens=40, hidden=64, vocab=49152)
    with torch.no_grad():
        h *= 0.5
    loss = linear_cross_entropy(h, w, labels)
    grads = torch.autograd.grad(loss, (h, w))
    for value, reference in zip((loss, *grads), plain(h, w, labels), strict=True):
        assert distance(value, reference) <= 1e-6


def test_gradient_scales_with_the_upstream_gradient():
    h, w, labels = inputs(dtype=torch.float64)
    scaled = torch.autograd.grad(linear_cross_entropy(h, w, labels) / 7, (h, w))
    for value, reference in zip(scaled, plain(h, w, labels)[1:], strict=True):
        assert distance(value, reference / 7) <= 1e-14


def test_a_graph_can_be_kept_for_a_second_backward_but_not_used_a_third_time():
    h, w, labels = inputs(dtype=torch.float64)
    loss = linear_cross_entropy(h, w, labels) / 7
    for _ in range(2):  # as a pipeline does that takes the gradients of inputs first
        kept = torch.autograd.grad(loss, (h, w), retain_graph=True)
    last = torch.autograd.grad(loss, (h, w), retain_graph=False)
    for *values, reference in zip(kept, last, plain(h, w, labels)[1:], strict=True):
        for value in values:
            assert distance(value, reference / 7) <= 1e-14
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients_are_computed(frozen):
    tensors = inputs(dtype=torch.float64)
    h, w, labels = tensors
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(h, w, labels, chunk=16).backward()
    assert tensors[frozen].grad is None
    assert distance(tensors[1 - frozen].grad, plain(h, w, labels)[2 - frozen]) <= 1e-14


def test_no_target_gives_zero_with_a_graph():
    h, w, labels = inputs()
    for targets_only in (True, False):
        loss = linear_cross_entropy(h, w, torch.full_like(labels, -100), targets_only=targets_only)
        assert loss == 0
        grads = torch.autograd.grad(loss, (h, w))
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_sums_in_float32(device, softcap):
    h, w, labels = inputs(tokens=300, dtype=torch.bfloat16)
    reference = plain(h, w, labels, softcap)
    h, w, labels = (x.detach().to(device).requires_grad_(x.requires_grad) for x in (h, w, labels))
    loss = linear_cross_entropy(h, w, labels, chunk=16, softcap=softcap)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (h, w))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
    loss, *grads = (x.cpu() for x in (loss, *grads))
    # The sum is never rounded to bfloat16; the logits are on CPU only.
    assert distance(loss, reference[0]) <= (1e-3 if device == "cpu" else 1e-6)
    assert all(distance(a, b) <= 1e-2 for a, b in zip(grads, reference[1:], strict=True))


class Alive(TorchDispatchMode):
    """`peak`: bytes of all memory that operators made and that lived at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: item for key, item in self.storages.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize(("dtype", "buffers"), [(torch.float32, 1), (torch.bfloat16, 1.5)])
def test_logits_live_one_chunk_at_a_time(dtype, buffers):
    """Beside gradients and some numbers a token there is one chunk's logits in float32, and once more in bfloat16."""
    tokens, hidden, vocab, chunk = 1024, 8, 1000, 32
    h, w, labels = inputs(tokens, hidden, vocab, dtype)
    with Alive() as alive:
        linear_cross_entropy(h, w, labels, chunk=chunk, targets_only=False).backward()
    gradients = h.nbytes + 2 * w.nbytes + 4 * w.numel()  # the weight's in float32, in its own type, and of one chunk
    logits = chunk * vocab * 4
    assert buffers * logits < alive.peak <= buffers * logits + gradients + tokens * 32 < 2 * logits + gradients
