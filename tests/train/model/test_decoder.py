"""The decoder against transformers: packed equals separate, in loss and every gradient; documents never mix."""

import pytest
import torch
from reference import KeepDouble, distance, gradient_distances, pack, random_documents, run_by_documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from train import hf
from train.attention.interface import Segments
from train.model.decoder import Decoder
from train.model.initialize import init_weights

LENGTHS = [5, 61, 1, 2, 128, 17, 33]
TEXTS = [
    "The sun rises in the east and sets in the west.",
    "<|im_start|>user\nName three primes.<|im_end|>\n<|im_start|>assistant\n2, 3 and 5.<|im_end|>\n",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters.",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 1234567890",
]


def load(folder, dtype):
    """(our model, transformers' model) of the folder, both in `dtype`."""
    with torch.device("meta"):
        ours = Decoder(hf.read_config(folder)).to(dtype)
    ours.to_empty(device="cpu")
    hf.load_weights(ours, folder)
    return ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype)


@pytest.fixture(params=["tied", "untied"])
def tiny_dir(request, tiny_llama_dir, tiny_llama_untied_dir):
    return tiny_llama_dir if request.param == "tied" else tiny_llama_untied_dir


def compare(folder, documents, dtype, bound):
    ours, theirs = load(folder, dtype)
    with KeepDouble() if dtype == torch.float64 else torch.enable_grad():
        total, gradients = run_by_documents(theirs, documents)
    del theirs
    ids, positions, labels, segments = pack(documents, align=4, tail=9)
    loss = ours(ids, positions, segments, labels)
    assert loss.dtype == dtype
    loss.backward()
    assert distance(loss, total) <= bound
    distances = gradient_distances(ours, gradients)
    assert len(distances) == len(list(ours.parameters()))
    worst = max(distances, key=distances.get)
    assert distances[worst] <= bound, worst


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_packed_equals_separate(tiny_dir, dtype, bound):
    compare(tiny_dir, random_documents(LENGTHS, 320), dtype, bound)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), pytest.param(torch.float64, 1e-8, marks=pytest.mark.slow)]
)
def test_packed_equals_separate_smollm2(smollm2_dir, dtype, bound):
    compare(smollm2_dir, smollm2_documents(smollm2_dir), dtype, bound)


def smollm2_documents(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        mask = torch.arange(len(ids)) >= len(ids) // 3
        mask[0] = False
        documents.append((ids, mask))
    return documents


def test_logits_equal_transformers_on_real_texts(smollm2_dir):
    ours, theirs = load(smollm2_dir, torch.float32)
    documents = smollm2_documents(smollm2_dir)
    ids, positions, _, segments = pack(documents)
    with torch.no_grad():
        packed = ours(ids, positions, segments).split([len(document) for document, _ in documents])
        for (document, _), logits in zip(documents, packed, strict=True):
            assert (logits - theirs(document[None]).logits[0]).abs().max() <= 2e-4


def test_no_token_reaches_another_document(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, torch.float32)
    documents = random_documents(LENGTHS, 320)
    starts = [sum(LENGTHS[:k]) for k in range(len(LENGTHS) + 1)]
    for k in (0, 1, 3, len(LENGTHS) - 1):
        own = slice(starts[k], starts[k + 1])
        ids, positions, labels, segments = pack(documents)
        labels_elsewhere = labels.clone()
        labels_elsewhere[own] = -100
        results = []
        for changed in (False, True):
            if changed:
                ids[own.start] = (ids[own.start] + 1) % 320
            model.zero_grad()
            logits = model(ids, positions, segments).detach()
            model(ids, positions, segments, labels_elsewhere).backward()
            results.append((logits, [p.grad.clone() for p in model.parameters()]))
        (before, gradients_before), (after, gradients_after) = results
        moved = (before != after).any(dim=1)
        assert moved[own].all()
        moved[own] = False
        assert not moved.any()
        assert all(torch.equal(a, b) for a, b in zip(gradients_before, gradients_after, strict=True))


def test_probe_sees_a_leak(tiny_llama_dir):
    """The probe itself works: two documents joined into one segment do mix."""
    model, _ = load(tiny_llama_dir, torch.float32)
    ids, positions, _, _ = pack(random_documents([20, 30], 320))
    joined = Segments.of([50])
    before = model(ids, positions, joined)
    ids[3] = (ids[3] + 1) % 320
    assert (before != model(ids, positions, joined))[20:].any()


def test_padding_of_cu_seqlens_and_int32_inputs_change_nothing(tiny_llama_dir):
    model, _ = load(tiny_llama_dir, torch.float32)
    ids, positions, labels, segments = pack(random_documents(LENGTHS, 320))
    padded = torch.cat([segments.cu_seqlens, segments.cu_seqlens[-1:].expand(3)])
    loss = model(ids, positions, segments, labels)
    assert torch.equal(loss, model(ids.int(), positions.int(), Segments(padded, 256), labels))


def test_row_without_targets_has_loss_zero_and_zero_gradients(tiny_llama_untied_dir):
    model, _ = load(tiny_llama_untied_dir, torch.float32)
    ids, positions, labels, segments = pack(random_documents([8, 3], 320))
    loss = model(ids, positions, segments, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bfloat16_stays_near_float32(tiny_llama_dir):
    documents = random_documents(LENGTHS, 320)
    ids, positions, labels, segments = pack(documents)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load(tiny_llama_dir, dtype)
        loss = model(ids, positions, segments, labels)
        loss.backward()
        losses.append(loss)
        assert loss.dtype == torch.float32
        assert all(p.grad.dtype == dtype for p in model.parameters())
    assert distance(losses[1], losses[0]) < 0.02


@pytest.mark.parametrize("backward", [False, True])
def test_block_compiles_without_graph_break(tiny_llama_dir, backward):
    model, _ = load(tiny_llama_dir, torch.float32)
    ids, positions, labels, segments = pack(random_documents(LENGTHS, 320))
    expected = model(ids, positions, segments, labels)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(backward):
        loss = model(ids, positions, segments, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    if backward:
        loss.backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert distance(parameter.grad, gradient) < 1e-5


def test_initial_weights_are_a_function_of_seed_and_name(tiny_llama_dir):
    config = hf.read_config(tiny_llama_dir)
    models = [Decoder(config) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        init_weights(model, seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.0.mlp.up_proj.weight"], other["layers.0.mlp.up_proj.weight"])
    assert not torch.equal(first["layers.0.mlp.up_proj.weight"], first["layers.1.mlp.up_proj.weight"])
    assert (first["norm.weight"] == 1).all()
    assert abs(first["embed_tokens.weight"].std().item() / config.initializer_range - 1) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device")
def test_cuda_bfloat16_stays_near_cpu_float32(tiny_llama_dir):
    ids, positions, labels, segments = pack(random_documents(LENGTHS, 320))
    reference, _ = load(tiny_llama_dir, torch.float32)
    expected = reference(ids, positions, segments, labels)
    expected.backward()
    model = Decoder(reference.config, "torch").to("cuda", torch.bfloat16)
    hf.load_weights(model, tiny_llama_dir)
    on_device = Segments(segments.cu_seqlens.cuda(), segments.max_seqlen)
    loss = model(ids.cuda(), positions.cuda(), on_device, labels.cuda())
    loss.backward()
    assert distance(loss.cpu(), expected) < 0.02
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert distance(parameter.grad.cpu(), gradients[name].grad) < 0.1, name
