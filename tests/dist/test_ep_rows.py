"""What travels between expert ranks: rows of real tokens, each once for each choice and each way, and nothing else; and
how often a layer makes the host wait, in a whole step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from host_reads import HostReads
from mixture_steps import BALANCED, built
from tiny_models import write_tiny_model

from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.balance import mixtures
from train.config import Config, Data, Layout, Model
from train.mesh import build_mesh
from train.model import experts
from train.step import accumulate_gradients

LAYERS, HIDDEN, EXPERTS, TOP_K = 2, 48, 8, 2


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, and 5 packs of which most is padding: within the slots and after them."""
    folder = tmp_path_factory.mktemp("rows")
    model = write_tiny_model(folder / "model", "deepseek_v3", vocab_size=320, num_experts_per_tok=TOP_K)
    rows = random_packs(np.random.default_rng(4), 5, 200, 4, 320, max_docs=3)
    return model, make_shards(folder / "shards", rows, capacity=200, align=4, cp=2)


def traffic(model_dir, shards, config, routing):
    """What this rank put into and got from every exchange of a step, in order, and what its routers chose.

    `routing`: "own" sends all tokens of a rank to experts on it, "one" those of all ranks to the first rank's, None
    leaves the choice to the routers.
    """
    experts.has_kernel = lambda x, weight: True  # as on a GPU; torch's kernel runs here, too
    mesh = build_mesh(config.layout, torch.device("cpu"))
    model, loader = built(model_dir, shards, config, mesh, torch.float32)
    exchanges, chosen, waits = [], [], []

    def recorded(out, x, receive=None, send=None, group=None, async_op=False):
        size, rank = group.size(), group.rank()
        if send is not None:
            assert (sum(send), sum(receive)) == (len(x), len(out))
            exchanges.append({"send": list(send), "receive": list(receive), "rank": rank, "bytes": x.nbytes})
        else:
            assert len(x) == EXPERTS, "how many rows go to each expert"
            exchanges.append({"counts": x.unflatten(0, (size, -1)).sum(1)})
        return exchange(out, x, receive, send, group=group, async_op=async_op)

    exchange, dist.all_to_all_single = dist.all_to_all_single, recorded
    per_rank = EXPERTS // config.layout.ep

    def route(router, args, out):
        chosen_TK, weights_TK = out
        is_real = args[1].is_real
        if routing is not None:
            first = per_rank * (mesh.experts.get_local_rank("ep") if routing == "own" else 0)
            near = first + torch.arange(TOP_K) % per_rank
            chosen_TK = torch.where(is_real[:, None], near, EXPERTS)
        chosen.append(chosen_TK[is_real])
        return chosen_TK, weights_TK

    def watched(mixture):
        forward = mixture.forward

        def run(*args):
            with HostReads() as reads:
                waits.append(reads.seen)  # before: a recomputation ends where nothing more is needed
                return forward(*args)

        mixture.forward = run

    for mixture in mixtures(model).values():
        mixture.router.register_forward_hook(route)
        watched(mixture)
    facts = loader.next_step()
    accumulate_gradients(model, loader.rows(), loader.row_count, facts.target_tokens)
    loader.close()
    dist.all_to_all_single = exchange
    sent = [torch.bincount(pairs.flatten() // per_rank, minlength=config.layout.ep).tolist() for pairs in chosen]
    return exchanges, sent, waits


def all_traffic(cases):
    return [traffic(*case) for case in cases]


def case(ep, recompute, routing=None, **layout):
    config = Config(data=Data(batch_packs=6), model=Model(recompute=recompute), layout=Layout(ep=ep, **layout))
    return replace(config, router=BALANCED), routing


CASES = {
    2: [case(2, "none"), case(2, "selective", "own"), case(2, "full"), case(2, "none", "one")],
    4: [case(4, "none"), case(4, "selective"), case(4, "full", "own"), case(4, "full", tp=2), case(2, "none", "one")],
}
# What a layer exchanges: counts, rows and what experts made of them; in backward the gradients of both.
FORWARD, BACKWARD = ["counts", "there", "back"], ["gradients there", "gradients back"]


@pytest.mark.parametrize("world", CASES)
def test_every_choice_of_a_real_token_travels_once_each_way_and_no_padding(world, places):
    dataset = PackedDataset(places[1])
    real = sum(int(dataset[i].seq_lens.sum()) for i in range(len(dataset)))
    assert real < 0.7 * 6 * 200, "the rest is padding, one pack of 6 nothing else"
    cases = [(*places, *of) for of in CASES[world]]
    for (config, routing), *ranks in zip(CASES[world], *run_ranks(all_traffic, world, cases), strict=True):
        where = f"{config.layout} {config.model.recompute} {routing}"
        again = config.model.recompute == "full"  # with `selective` no row travels twice
        rows = -(-6 * config.layout.tp // world)  # of a rank
        layer_backward = (FORWARD if again else []) + BACKWARD
        kinds = rows * (LAYERS * FORWARD + LAYERS * layer_backward)
        total = dict.fromkeys((*FORWARD[1:], *BACKWARD), 0)
        for exchanges, chosen, waits in ranks:
            assert len(exchanges) == len(kinds), where
            assert waits == [["tolist"]] * (LAYERS * rows * (1 + again)), f"the host waits once a layer: {where}"
            forwards, under_way = iter(chosen), []
            for kind, entry in zip(kinds, exchanges, strict=True):
                if kind == "counts":
                    sent = next(forwards)
                    assert entry["counts"].tolist() == sent, where
                    continue
                mine = entry["rank"]
                total[kind] += sum(entry["send"])
                assert entry["bytes"] == sum(entry["send"]) * HIDDEN * 4, where
                if routing == "own":
                    assert sum(entry["send"]) == entry["send"][mine] == entry["receive"][mine], where
                if kind == "there":
                    assert entry["send"] == sent, f"what the router chose: {where}"
                    there = entry
                if kind == "back":
                    assert (entry["send"], entry["receive"]) == (there["receive"], there["send"]), where
                    under_way.append(there)
                if kind == "gradients there":
                    there = under_way.pop()
                    assert (entry["send"], entry["receive"]) == (there["send"], there["receive"]), where
                if kind == "gradients back":
                    assert (entry["send"], entry["receive"]) == (there["receive"], there["send"]), where
        times = {kind: 1 + (again and kind in FORWARD) for kind in total}
        assert total == {kind: LAYERS * times[kind] * real * TOP_K for kind in total}, where
