"""Varlen attention against a plain one in float64: every kernel, isolation, choice and refusal."""

import pytest
import torch
from devices import DEVICES
from fake_kernels import dense, dense_gradients
from reference import distance

from train.attention.choose import BACKENDS, choose_backend, varlen_attention
from train.attention.interface import Segments

LENGTHS = [1, 13, 1100, 2, 40]
FEATURES = [(None, None), (5, None), (600, None), (None, 3.0), (7, 2.0)]


def heads(lengths, query_heads=6, kv_heads=2, head_dim=16, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(lengths), count, head_dim, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for count in (query_heads, kv_heads, kv_heads)
    ]


def plain(q, k, v, lengths_q, lengths_k, scale, window, softcap, sinks=None):
    """Document by document with a full matrix of scores; bottom-right causal. Returns out and lse."""
    outs, lses, group = [], [], q.shape[1] // k.shape[1]
    documents = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for q_doc, k_doc, v_doc in documents:
        k_doc, v_doc = k_doc.repeat_interleave(group, 1), v_doc.repeat_interleave(group, 1)
        scores = torch.einsum("tnh,unh->ntu", q_doc, k_doc) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows, columns = scores.shape[1:]
        distance_back = torch.arange(rows)[:, None] + (columns - rows) - torch.arange(columns)
        hidden = (distance_back < 0) | (distance_back >= (window or columns + 1))
        scores = scores.masked_fill(hidden.to(scores.device), -torch.inf)
        if sinks is not None:  # a key of its own for every head, with value 0
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, rows, 1)), dim=2)
        outs.append(torch.einsum("ntu,unh->tnh", scores.softmax(-1)[:, :, :columns], v_doc))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize(("window", "softcap"), FEATURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_cpu_equals_plain(window, softcap, dtype, bound):
    inputs = heads(LENGTHS, dtype=dtype)
    segments = Segments.of(LENGTHS)
    out = varlen_attention(*inputs, segments, backend="cpu", scale=0.3, window=window, softcap=softcap)
    reference_inputs = [x.detach().double().requires_grad_() for x in inputs]
    reference, _ = plain(*reference_inputs, LENGTHS, LENGTHS, 0.3, window, softcap, None)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert distance(out, reference) <= bound
    grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
    expected = torch.autograd.grad(reference, reference_inputs, upstream)
    assert all(distance(a, b) <= bound for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(("window", "softcap"), FEATURES)
def test_cpu_with_more_keys_than_queries(window, softcap):
    """The last queries of each document against all its keys, as one rank of context parallelism has them."""
    lengths_q, lengths_k = [3, 1, 520, 4], [10, 1, 530, 4]
    q, _, _ = heads(lengths_q)
    _, k, v = heads(lengths_k, seed=1)
    ends_q, ends_k = Segments.of(lengths_q).cu_seqlens, Segments.of(lengths_k).cu_seqlens
    out, lse = BACKENDS["cpu"].op(q, k, v, ends_q, ends_k, 520, 530, 0.3, window, softcap, None)
    reference, reference_lse = plain(q, k, v, lengths_q, lengths_k, 0.3, window, softcap, None)
    assert distance(out, reference) <= 1e-13
    assert distance(lse, reference_lse) <= 1e-13
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    expected = torch.autograd.grad(reference, (q, k, v), upstream)
    assert all(distance(a, b) <= 1e-13 for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(("window", "softcap"), FEATURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_sinks_join_every_softmax(window, softcap, dtype, bound):
    """Sinks in another type than the heads, as a model that computes in bfloat16 may keep them."""
    inputs = [*heads(LENGTHS, dtype=dtype), torch.linspace(-2.0, 3.0, 6, dtype=torch.float64).requires_grad_()]
    *qkv, sinks = inputs
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    out = varlen_attention(*qkv, Segments.of(LENGTHS), backend="cpu", sinks=sinks, **options)
    reference_inputs = [x.detach().double().requires_grad_() for x in inputs]
    *reference_qkv, reference_sinks = reference_inputs
    reference, _ = plain(*reference_qkv, LENGTHS, LENGTHS, **options, sinks=reference_sinks)
    assert distance(out, reference) <= bound
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
    expected = torch.autograd.grad(reference, reference_inputs, upstream)
    assert all(distance(a, b) <= bound for a, b in zip(grads, expected, strict=True))


def test_sinks_leave_rows_without_documents_and_keys_at_zero():
    q, k, v = heads([3, 4])
    sinks = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    out, lse = BACKENDS["cpu"].op(q, k, v, ends, ends, 3, 3, 0.3, None, None, sinks)
    assert not out[3:].any()
    assert (lse[:, 3:] == 0).all()
    (grad,) = torch.autograd.grad(out.square().sum(), sinks, retain_graph=True)
    (of_document,) = torch.autograd.grad(out[:3].square().sum(), sinks)
    assert torch.equal(grad, of_document)
    assert grad.isfinite().all()


def test_cpu_query_without_visible_key_is_zero():
    """More queries than keys: the first see nothing; their row is 0, their log-sum-exp −inf, no gradient is nan."""
    q, _, _ = heads([5])
    _, k, v = heads([3], seed=1)
    ends_q, ends_k = Segments.of([5]).cu_seqlens, Segments.of([3]).cu_seqlens
    out, lse = BACKENDS["cpu"].op(q, k, v, ends_q, ends_k, 5, 3, 0.3, None, None, None)
    assert not out[:2].any()
    assert (lse[:, :2] == -torch.inf).all()
    assert distance(out[2:], plain(q[2:], k, v, [3], [3], 0.3, None, None)[0]) <= 1e-13
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:2].any()


@pytest.mark.parametrize(("window", "softcap"), FEATURES)
def test_no_token_reaches_another_document(window, softcap):
    q, k, v = heads(LENGTHS)
    own = slice(1 + 13, 1 + 13 + 1100)
    segments = Segments.of(LENGTHS)
    options = {"backend": "cpu", "scale": 0.3, "window": window, "softcap": softcap}
    before = varlen_attention(q, k, v, segments, **options)
    outside = torch.ones(sum(LENGTHS), 1, 1)
    outside[own] = 0
    grads = torch.autograd.grad((before * outside).square().sum(), (q, k, v))
    assert not any(grad[own].any() for grad in grads)
    with torch.no_grad():
        for x in (q, k, v):
            x[own.start + 500] += 1
        after = varlen_attention(q, k, v, segments, **options)
    moved = (before != after).flatten(1).any(1)
    assert moved[own][500:505].all()
    moved[own] = False
    assert not moved.any()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, 2.0)])
def test_operator_is_well_formed(window, softcap):
    """Schema, fake tensors, autograd registration and tracing, by torch's own checks."""
    q, k, v = heads([3, 9], dtype=torch.float32)
    ends = torch.tensor([0, 3, 12, 12], dtype=torch.int32)
    layout = ends, ends, 9, 9
    sinks = torch.zeros(6, requires_grad=True)
    for extra in (None, sinks):
        torch.library.opcheck(torch.ops.meshpack.attention_cpu, (q, k, v, *layout, 0.3, window, softcap, extra))


def test_auto_takes_what_can_serve():
    assert choose_backend("auto", "cpu", torch.float64, 64).name == "cpu"
    assert choose_backend("auto", "cuda", torch.bfloat16, 64).name == "torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sdpa", "cpu", torch.float32, 64), "cannot keep packed documents apart: use cpu"),
        (("magic", "cpu", torch.float32, 64), "Unknown attention backend 'magic': choose auto, torch, flash, te, cpu"),
        (("torch", "cpu", torch.bfloat16, 64), "runs on cuda, not on cpu; use cpu"),
        (
            ("torch", "cuda", torch.float32, 64),
            r"'torch' is refused: it computes in bfloat16, float16, not in float32; use --dtype bfloat16\.",
        ),
        (("cpu", "cuda", torch.bfloat16, 64), "runs on cpu, not on cuda; use torch"),
        (("torch", "cuda", torch.bfloat16, 512), "at most 256 dimensions, this model's have 512"),
        (("torch", "cuda", torch.bfloat16, 20), "a multiple of 8 dimensions, this model's have 20"),
        (
            ("auto", "cuda", torch.float32, 64),
            r"No attention backend can serve this model on cuda \(torch: .*\); use --dtype bfloat16\.",
        ),
        (("auto", "cuda", torch.bfloat16, 512), r"No attention backend can serve this model on cuda \(.*\)\.$"),
    ],
)
def test_refusals_say_why_and_what_instead(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(*arguments)


def test_softcap_is_refused_where_the_kernel_has_none():
    with pytest.raises(ValueError, match="no softcap"):
        choose_backend("torch", "cuda", torch.bfloat16, 64, softcap=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
def test_ring_attention_gets_what_it_asks_of_a_kernel(device, causal):
    """Log-sum-exp out of the forward, one of more keys into the backward, also without the causal mask, and with keys
    of which this rank has no query."""
    backend, dtype = ("cpu", torch.float64) if device == "cpu" else ("torch", torch.bfloat16)
    lengths_q, lengths_k = [1, 13, 0, 200, 2], [1, 20, 7, 200, 9]
    q = heads(lengths_q, head_dim=64, dtype=dtype)[0].detach()
    k, v = (x.detach() for x in heads(lengths_k, head_dim=64, dtype=dtype, seed=1)[1:])
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    def layout(on):
        segments = Segments.of(lengths_q, on), Segments.of(lengths_k, on)
        return *(s.cu_seqlens for s in segments), *(s.max_seqlen for s in segments), 0.125, None, None

    wanted = dense(*(x.double() for x in (q, k, v)), *layout("cpu")[:2], 0.125, causal, -1, -1, None)[:2]
    got = BACKENDS[backend].forward(*(x.to(device) for x in (q, k, v)), *layout(device), causal=causal)
    bound = 1e-12 if dtype == torch.float64 else 2e-2
    assert all(distance(a.cpu(), b) <= bound for a, b in zip(got, wanted, strict=True))
    merged = wanted[0] * 0.5, (wanted[1] + 0.7).t().contiguous().t()  # a view, as an indexed one may be
    inputs = *(x.double() for x in (q, k, v)), merged[0].to(dtype).double(), merged[1]
    wanted = dense_gradients(
        grad_out.double(), *inputs[:4], inputs[4].contiguous(), *layout("cpu")[:2], 0.125, causal, -1, -1, None
    )
    lse = merged[1].to(torch.float64 if dtype == torch.float64 else torch.float32)
    given = (x.to(device) for x in (grad_out, q, k, v, merged[0].to(dtype), lse))
    got = BACKENDS[backend].backward(*given, *layout(device), causal=causal)
    assert all(distance(a.cpu(), b) <= bound for a, b in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device")
@pytest.mark.parametrize("window", [None, 5, 600])
def test_torch_varlen_equals_plain(window):
    inputs = heads(LENGTHS, head_dim=64, dtype=torch.bfloat16, device="cuda")
    segments = Segments.of(LENGTHS, "cuda")
    out = varlen_attention(*inputs, segments, backend="torch", scale=0.125, window=window)
    reference_inputs = [x.detach().double().requires_grad_() for x in inputs]
    reference, _ = plain(*reference_inputs, LENGTHS, LENGTHS, 0.125, window, None)
    assert distance(out, reference) <= 1e-2
    grads = torch.autograd.grad(out.sum(), inputs)  # an expanded gradient, on purpose
    expected = torch.autograd.grad(reference.sum(), reference_inputs)
    assert all(distance(a, b) <= 2e-2 for a, b in zip(grads, expected, strict=True))
