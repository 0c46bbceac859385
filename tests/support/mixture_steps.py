"""Steps of a mixture of experts on any mesh, to be held against those of one process: loss, gradients, biases, load."""

import torch
import torch.distributed as dist
from reference import distance
from torch.distributed.tensor import DTensor

from train import hf
from train.balance import move_biases, routers, take_load
from train.config import Router
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize
from train.step import accumulate_gradients, sum_loss

BALANCED = Router(router_aux_loss=0.3, router_z_loss=0.02)


def built(model_dir, shards, config, mesh, dtype):
    """(the model of this rank, the loader of its packs)."""
    device, layout = torch.device("cpu"), config.layout
    dataset = open_shards(shards, 320)
    with torch.device("meta"):
        model = Decoder(hf.read_config(model_dir)).to(dtype)
    model = parallelize(model, mesh, config)
    model.to_empty(device=device)
    hf.load_weights(model, model_dir)
    schedule = Schedule(len(dataset), "shuffle", 0, 1, config.data.batch_packs, config.data.micro_packs)
    cut = choose_cut(layout.cp_method, mesh.cp_size, mesh.cp_rank, dataset.manifest, layout.sequence)
    dp = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    return model, PackedLoader(dataset, schedule, device=device, cut=cut, **dp)


def step(model_dir, shards, config, dtype):
    """(loss, gradients by name and, where a rate is given, the biases after the step, load) of one step over all packs;
    of the parameters that this rank has, and equal on all that have them."""
    mesh = build_mesh(config.layout, torch.device("cpu"))
    model, loader = built(model_dir, shards, config, mesh, dtype)
    facts = loader.next_step()
    share = accumulate_gradients(model, loader.rows(), loader.row_count, facts.target_tokens)
    loss = sum_loss(share, mesh)
    loader.close()
    values = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        values[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    load = take_load(model, model.config, facts.tokens)
    if config.router.router_bias_rate > 0:
        move_biases(model, load, config.router.router_bias_rate)
        values |= {f"bias of layer {layer}": router.correction_bias for layer, router in routers(model).items()}
    return loss, values, load


def compare_steps(cases):
    """[(loss, worst distance, of what, load)] of `step` on every case, against its file of values."""
    results = []
    for *case, wanted in cases:
        loss, values, load = step(*case)
        reference = torch.load(wanted)
        held = [None] * dist.get_world_size()
        dist.all_gather_object(held, list(values))
        assert set().union(*held) == set(reference), "together the ranks hold the whole model"
        errors = {name: distance(value, reference[name]) for name, value in values.items()}
        worst = max(errors, key=errors.get)
        results.append((loss, errors[worst], worst, load))
    return results


def write_steps(cases):
    """Run `step` on one rank; writes its values and returns (loss, load)."""
    results = []
    for *case, path in cases:
        loss, values, load = step(*case)
        torch.save(values, path)
        results.append((loss, load))
    return results
