"""One training step, packed and in any layout, beside transformers that sees the same documents one at a time."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from reference import KeepDouble, gradient_distances, run_by_documents
from torch.distributed.tensor import DTensor

from train import hf
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.model.sources import weight_sources
from train.parallel.apply import parallelize
from train.step import accumulate_gradients, sum_loss

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Largest distance of a loss or gradient of a tiny model, by the type it is computed in."""


def by_documents(model_dir, dataset, dtype, attention="sdpa"):
    """Mean loss and gradients (by Hugging Face name) over all targets of all packs, one forward a document."""
    from transformers import AutoModelForCausalLM

    documents = []
    for i in range(len(dataset)):
        pack, start = dataset[i], 0
        for real, slot in zip(pack.seq_lens.tolist(), pack.seq_lens_padded.tolist(), strict=True):
            ids, mask = (x[start : start + real] for x in (pack.input_ids, pack.loss_mask))
            documents.append((torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)))
            start += slot
    targets = sum(int(mask.sum()) for _, mask in documents)
    # Loaded in float32: tables of rotary frequencies are to be computed so.
    options = {"attn_implementation": attention}
    if hf.read_config(model_dir).moe is not None:
        options["experts_implementation"] = "eager"  # the only one that runs in float64
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **options)
    model.to(dtype)
    with KeepDouble() if dtype == torch.float64 else nullcontext():
        total, gradients = run_by_documents(model, documents)
    return total.item() / targets, {name: gradient / targets for name, gradient in gradients.items()}


def packed_step(model_dir, shards, config, dtype, wanted_path):
    """This rank's part of one step over all packs; returns (loss, worst distance of any gradient, its name)."""
    device = torch.device("cpu")
    mesh = build_mesh(config.layout, device)
    model_config = hf.read_config(model_dir)
    dataset = open_shards(shards, model_config.vocab_size)
    with torch.device("meta"):
        model = Decoder(model_config).to(dtype)
    model = parallelize(model, mesh, config)
    model.to_empty(device=device)
    hf.load_weights(model, model_dir)

    schedule = Schedule(len(dataset), "shuffle", 0, 1, config.data.batch_packs, config.data.micro_packs)
    cut = choose_cut(config.layout.cp_method, mesh.cp_size, mesh.cp_rank, dataset.manifest, config.layout.sequence)
    loader = PackedLoader(dataset, schedule, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, device=device, cut=cut)
    facts = loader.next_step()
    assert facts.packs == len(dataset)
    rows, count = loader.rows(), loader.row_count
    share = accumulate_gradients(model, rows, count, facts.target_tokens, defer_sync=config.layout.defer_sync)
    loss = sum_loss(share, mesh)
    loader.close()
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, list(model.state_dict()))
    assert set().union(*held) == set(weight_sources(model_config)), "together the ranks hold the whole model"
    for parameter in model.parameters():
        assert parameter.grad.dtype == dtype
        if isinstance(parameter.grad, DTensor):
            parameter.grad = parameter.grad.full_tensor()
    errors = gradient_distances(model, torch.load(wanted_path))
    worst = max(errors, key=errors.get)
    return loss, errors[worst], worst


def packed_steps(cases):
    """Several cases in the same processes: starting them takes longer than a case."""
    return [packed_step(*case) for case in cases]
