"""The adapters of flash-attn 2, 3, 4 and Transformer Engine, called through stand-ins with the published signatures
that compute what the packages document, and the look at a kernel before a run."""

from dataclasses import replace

import fake_kernels
import pytest
import torch
from reference import distance

from train.attention import cpu, flash
from train.attention.choose import BACKENDS, choose_backend
from train.attention.interface import Segments
from train.attention.probe import check_isolation

LENGTHS_Q, LENGTHS_K = [1, 13, 0, 50, 2], [1, 20, 7, 50, 9]  # of the third document this rank has keys alone
FEATURES = [(None, None), (2, None), (5, None), (None, 3.0), (7, 2.0)]


@pytest.fixture(params=[2, 3, 4])
def flash_version(request):
    with fake_kernels.installed(request.param):
        yield request.param


@pytest.fixture
def fakes():
    with fake_kernels.installed():
        yield


def inputs(lengths_q, lengths_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(lengths_q), 6), (sum(lengths_k), 2), (sum(lengths_k), 2))
    q, k, v = (torch.randn(*shape, 16, generator=generator, dtype=torch.float64) for shape in shapes)
    kv = torch.stack((k, v), 1)  # as context parallelism hands them on: views into one tensor
    return q.requires_grad_(), *(x.requires_grad_() for x in kv.unbind(1))


def layout(lengths_q, lengths_k):
    segments = Segments.of(lengths_q), Segments.of(lengths_k)
    return *(s.cu_seqlens for s in segments), *(s.max_seqlen for s in segments)


def compare(name, tensors, arguments, *, sinks=None, has_lse=True):
    """Output, log-sum-exp and gradients of a backend against those of the cpu backend (proven against a plain one)."""
    leaves = [*tensors] + [sinks] * (sinks is not None)
    got, wanted = (BACKENDS[backend].op(*tensors, *arguments, sinks) for backend in (name, "cpu"))
    assert distance(got[0], wanted[0]) <= 1e-12
    if has_lse:
        assert distance(got[1], wanted[1]) <= 1e-12
    else:
        assert got[1] is None
    upstream = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads, expected = (torch.autograd.grad(result[0], leaves, upstream) for result in (got, wanted))
    assert all(distance(a, b) <= 1e-12 for a, b in zip(grads, expected, strict=True))
    # An expanded gradient, on purpose: kernels misread it.
    ones, expected = (
        torch.autograd.grad(BACKENDS[backend].op(*tensors, *arguments, sinks)[0].sum(), leaves)
        for backend in (name, "cpu")
    )
    assert all(distance(a, b) <= 1e-12 for a, b in zip(ones, expected, strict=True))


@pytest.mark.parametrize(("window", "softcap"), FEATURES)
def test_flash_equals_cpu(flash_version, window, softcap):
    for lengths_q in (LENGTHS_K, LENGTHS_Q):  # as many keys as queries, and more
        compare("flash", inputs(lengths_q, LENGTHS_K), (*layout(lengths_q, LENGTHS_K), 0.3, window, softcap))


def test_flash_with_sinks(flash_version):
    sinks = torch.linspace(-2.0, 3.0, 6, dtype=torch.float64, requires_grad=True)
    tensors = inputs(LENGTHS_Q, LENGTHS_K)
    compare("flash", tensors, (*layout(LENGTHS_Q, LENGTHS_K), 0.3, 7, 2.0), sinks=sinks)


def test_flash_without_the_causal_mask_and_with_the_softmax_of_more_keys(flash_version):
    """What ring attention asks of a kernel."""
    q, k, v = (x.detach() for x in inputs(LENGTHS_Q, LENGTHS_K))
    arguments = *layout(LENGTHS_Q, LENGTHS_K), 0.3, None, 2.0
    got, wanted = (BACKENDS[name].forward(q, k, v, *arguments, causal=False) for name in ("flash", "cpu"))
    assert all(distance(a, b) <= 1e-12 for a, b in zip(got, wanted, strict=True))
    merged = wanted[0] * 0.5, (wanted[1] + 0.7).t().contiguous().t()  # a view, as an indexed one may be
    grad_out = torch.ones(1, dtype=torch.float64).expand_as(q)
    got, wanted = (
        BACKENDS[name].backward(grad_out, q, k, v, *merged, *arguments, causal=False) for name in ("flash", "cpu")
    )
    assert all(distance(a, b) <= 1e-12 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("window", [None, 2, 5])
def test_transformer_engine_equals_cpu(window, fakes):
    for lengths_q in (LENGTHS_K, LENGTHS_Q):
        tensors = inputs(lengths_q, LENGTHS_K)
        compare("te", tensors, (*layout(lengths_q, LENGTHS_K), 0.3, window, None), has_lse=False)


def gpu_with(monkeypatch, major, **installed):
    versions = {"flash_attn_2": "flash-attn", "flash_attn_3": "flash_attn_3", "flash_attn_4": "flash-attn-4"}
    found = {versions[name]: number for name, number in installed.items()}

    def version(name):
        if name not in found:
            raise flash.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(flash, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "this GPU")
    flash.chosen_version.cache_clear()


@pytest.mark.parametrize(
    ("major", "installed", "head_dim", "expected"),
    [
        (8, {"flash_attn_2": "2.8.4", "flash_attn_3": "3.0.0", "flash_attn_4": "4.0"}, 64, 2),
        (9, {"flash_attn_2": "2.8.4", "flash_attn_3": "3.0.0b1", "flash_attn_4": "4.0.0b27"}, 64, 3),
        (9, {"flash_attn_2": "2.8.4", "flash_attn_4": "4.0.0b24"}, 64, 4),
        (9, {"flash_attn_2": "2.8.4.post1", "flash_attn_4": "4.0.0b23.dev7+gabc"}, 64, 2),
        (9, {"flash_attn_4": "4.0.0b9"}, 64, None),
        (9, {"flash_attn_2": "2.8.4", "flash_attn_4": "4.0"}, 256, 2),
        (10, {"flash_attn_2": "2.8.4", "flash_attn_3": "3.0.0", "flash_attn_4": "4.0.0"}, 128, 4),
        (10, {"flash_attn_2": "2.8.4"}, 128, 2),
        (10, {"flash_attn_2": "2.6.3"}, 128, None),
        (7, {"flash_attn_2": "2.8.4"}, 64, None),
        (10, {"flash_attn_4": "4.0.1b2"}, 256, None),
    ],
)
def test_the_flash_attn_written_for_the_gpu_is_chosen(major, installed, head_dim, expected, monkeypatch):
    gpu_with(monkeypatch, major, **installed)
    assert flash.chosen_version(head_dim) == expected
    assert (flash.missing(head_dim) is None) == (expected is not None)
    flash.chosen_version.cache_clear()


def test_auto_takes_flash_where_torch_cannot_serve(monkeypatch):
    gpu_with(monkeypatch, 9, flash_attn_3="3.0.0")
    assert choose_backend("auto", "cuda", torch.bfloat16, 256, softcap=True).name == "flash"
    assert choose_backend("auto", "cuda", torch.bfloat16, 256).name == "torch"
    flash.chosen_version.cache_clear()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flash", {}, r"'flash' is refused: no flash-attn is installed \(pip install flash-attn\); use torch"),
        ("te", {}, "'te' is refused: transformer-engine is not installed"),
        ("te", {"softcap": True}, "'te' is refused: it has no softcap"),
        ("te", {"sinks": True}, "'te' is refused: it has no attention sinks"),
    ],
)
def test_what_is_not_installed_or_cannot_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(name, "cuda", torch.bfloat16, 64, **options)


def test_a_flash_attn_that_cannot_serve_is_named(monkeypatch):
    gpu_with(monkeypatch, 7, flash_attn_2="2.8.4")
    with pytest.raises(ValueError, match="flash-attn cannot serve heads of 64 dimensions on this GPU"):
        choose_backend("flash", "cuda", torch.bfloat16, 64)
    flash.chosen_version.cache_clear()


def test_a_flash_attn_that_is_too_old_is_named(monkeypatch):
    gpu_with(monkeypatch, 9, flash_attn_2="2.6.3", flash_attn_4="4.0.0b9")
    assert flash.missing(64) == "too old: flash-attn-4 and flash-attn (pip install --upgrade flash-attn-4 flash-attn)"
    flash.chosen_version.cache_clear()


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu", "flash", "te"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kernel_that_keeps_documents_apart_passes_the_look(name, dtype, fakes):
    softcap = None if name == "te" else 3.0
    check_isolation(BACKENDS[name], CPU, dtype, 16, windows=True, softcap=softcap)


class OneDocumentBackward(torch.autograd.Function):
    """Right forward, and gradients as if the row were one document."""

    @staticmethod
    def forward(ctx, q, k, v, layout_and_options):
        out, lse = cpu.forward(q, k, v, *layout_and_options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = layout_and_options
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        ends_q, ends_k, *rest = ctx.arguments
        return *cpu.backward(grad_out, *ctx.saved_tensors, ends_q[[0, -1]], ends_k[[0, -1]], *rest), None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_kernel_whose_gradients_leak_is_refused(dtype):
    def wrong(q, k, v, *layout_and_options):
        return OneDocumentBackward.apply(q, k, v, layout_and_options[:-1])

    with pytest.raises(ValueError, match=r"gives packed documents other gradients than one at a time \(off by \d+"):
        check_isolation(replace(BACKENDS["cpu"], op=wrong), CPU, dtype, 16, windows=False, softcap=None)


@pytest.mark.parametrize("mistake", ["one document", "top-left", "window off by one"])
def test_a_kernel_that_does_not_is_refused(mistake):
    right = BACKENDS["cpu"].op

    def wrong(q, k, v, ends_q, ends_k, max_q, max_k, scale, window, softcap, sinks):
        if mistake == "one document":
            ends_q, ends_k = ends_q[[0, -1]], ends_k[[0, -1]]
        if mistake == "top-left":
            kept = torch.cat([torch.arange(k0, k0 + n) for k0, n in zip(ends_k[:-1], ends_q.diff(), strict=True)])
            k, v, ends_k = k[kept], v[kept], ends_q
        if mistake == "window off by one" and window is not None:
            window += 1
        return right(q, k, v, ends_q, ends_k, max_q, max_k, scale, window, softcap, sinks)

    with pytest.raises(ValueError, match=r"gives packed documents other results than one at a time \(off by \d+"):
        check_isolation(replace(BACKENDS["cpu"], op=wrong), CPU, torch.bfloat16, 16, windows=True, softcap=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device")
@pytest.mark.parametrize("name", ["torch", "flash", "te"])
def test_kernels_of_this_machine_keep_documents_apart(name):
    if reason := BACKENDS[name].missing(64):
        pytest.skip(f"NOT TESTED: {reason}")
    check_isolation(BACKENDS[name], torch.device("cuda"), torch.bfloat16, 64, windows=True, softcap=None)
