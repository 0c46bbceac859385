"""A whole run against a plain loop over transformers and torch.optim.AdamW: what all layouts agree on is right, too."""

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_model
from whole_runs import arguments, run, steps_of

from make_shards import make_shards, random_packs
from ranks import run_ranks

RATES = [5e-4, 1e-3, 5.5e-4, 1e-4]
"""Two steps of warm-up to 0.001, then half and all of the cosine's way down to a tenth of it."""


def plain_run(folder, packs_of_steps):
    """The model of `folder` after those steps, document by document, and (loss, norm of the gradient) of each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vectors = [p for name, p in model.named_parameters() if name.endswith(("bias", "norm.weight", "layernorm.weight"))]
    matrices = [p for name, p in model.named_parameters() if name.endswith(("proj.weight", "embed_tokens.weight"))]
    assert len(vectors) + len(matrices) == len(list(model.parameters()))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATES[0], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    lines = []
    for step, packs in enumerate(packs_of_steps):
        targets, loss = sum(int(mask.sum()) for _, mask, *_ in packs), 0.0
        for ids, mask, seq_lens, slots, *_ in packs:
            for start, length in zip(np.cumsum(slots) - slots, seq_lens, strict=True):
                document = torch.from_numpy(ids[start : start + length].astype(np.int64))
                trained = torch.from_numpy(mask[start : start + length].astype(bool))[1:]
                logits = model(document[None], use_cache=False).logits[0, :-1]
                cross_entropy = torch.nn.functional.cross_entropy
                part = cross_entropy(logits[trained], document[1:][trained], reduction="sum") / targets
                part.backward()
                loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
        optimizer.zero_grad()
        lines.append((loss, norm))
    return model, lines


def test_a_run_is_that_of_a_plain_loop(tmp_path):
    """A short step at the end of an epoch, warm-up, decay of matrices alone, clipping, biases, tied weights."""
    from transformers import AutoModelForCausalLM

    folder, out = write_tiny_model(tmp_path / "model", "llama"), tmp_path / "out"
    before = {name: p.clone() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert any(name.endswith("bias") for name in before)
    packs = random_packs(np.random.default_rng(0), 7, 160, 4, 320)
    make_shards(tmp_path / "data" / "train", packs, capacity=160, align=4, order="input")
    flags = {"steps": 4, "batch_packs": 3, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    run_ranks(run, 1, arguments(tmp_path / "data", folder, out, **flags))
    expected, lines = plain_run(folder, [packs[:3], packs[3:6], packs[6:], packs[:3]])
    assert min(norm for _, norm in lines) > 0.5, "all steps are clipped"
    for line, rate, (loss, norm) in zip(steps_of(out), RATES, lines, strict=True):
        assert line["lr"] == pytest.approx(rate)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    trained = dict(AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32).named_parameters())
    assert trained.keys() == before.keys()
    for name, parameter in expected.named_parameters():
        moved = (parameter - before[name]).norm()
        error = (trained[name] - parameter).norm()
        assert error < 1e-5 * parameter.norm(), name
        assert error < 2e-3 * moved, name
