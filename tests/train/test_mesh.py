"""Sizes of the mesh, and who is where in it."""

import os

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from train.config import Layout
from train.mesh import AXES, axis_sizes, build_mesh, set_threads
from train.step import sum_over


@pytest.mark.parametrize(
    ("layout", "world", "sizes"),
    [
        (Layout(), 1, (1, 1, 1, 1, 1)),
        (Layout(), 6, (1, 1, 6, 1, 1)),
        (Layout(dp_replicate=2), 8, (1, 2, 4, 1, 1)),
        (Layout(dp_replicate=2, dp_shard=1), 2, (1, 2, 1, 1, 1)),
        (Layout(pp=2, dp_replicate=2, cp=2, tp=2), 32, (2, 2, 2, 2, 2)),
    ],
)
def test_the_size_left_out_is_inferred(layout, world, sizes):
    assert axis_sizes(layout, world) == sizes


@pytest.mark.parametrize(
    ("layout", "world", "message"),
    [
        (
            Layout(dp_replicate=2),
            3,
            "3 ranks cannot be divided by pp 1 × dp_replicate 2 × cp 1 × tp 1 = 2; start a multiple",
        ),
        (Layout(dp_shard=4), 2, "times dp_shard 4 makes 4 ranks, but 2 run; start 4 ranks or leave --dp-shard out"),
        (Layout(dp_shard=1), 2, "makes 1 ranks, but 2 run"),
    ],
)
def test_impossible_sizes_are_explained(layout, world, message):
    with pytest.raises(ValueError, match=r".") as error:
        axis_sizes(layout, world)
    assert message in str(error.value)


def where_am_i(layout):
    mesh = build_mesh(layout, torch.device("cpu"))
    assert mesh.root.mesh_dim_names == AXES
    views = {name: getattr(mesh, name).mesh.tolist() for name in ("dp", "dp_cp", "fsdp")}
    mine = torch.tensor([float(2 ** dist.get_rank())])
    return mesh.dp_rank, mesh.dp_size, views, int(sum_over(mine, mesh.dp_cp, mesh.pp))


def bits(ranks):
    return sum(1 << rank for rank in ranks)


def test_views_of_a_hybrid_mesh():
    seen = run_ranks(where_am_i, 4, Layout(dp_replicate=2))
    assert [s[:2] for s in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for _, _, views, summed in seen:
        assert views == {"dp": [0, 1, 2, 3], "dp_cp": [0, 1, 2, 3], "fsdp": [[0, 1], [2, 3]]}
        assert summed == bits(range(4))


def test_views_of_a_mesh_with_context_and_tensor_ranks():
    seen = run_ranks(where_am_i, 8, Layout(cp=2, tp=2))
    assert [s[:2] for s in seen] == [(0, 2)] * 4 + [(1, 2)] * 4, "cp and tp ranks share their packs"
    for rank, (_, _, views, summed) in enumerate(seen):
        assert views["dp"] == [rank % 4, rank % 4 + 4]
        assert views["dp_cp"] == views["fsdp"] == [rank % 2 + 2 * i for i in range(4)], "FSDP goes over dp_shard × cp"
        assert summed == bits(views["dp_cp"]), "tensor ranks have the same loss, it is not added"


def test_views_of_a_hybrid_mesh_with_context_ranks():
    seen = run_ranks(where_am_i, 8, Layout(dp_replicate=2, cp=2))
    assert [s[0] for s in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    for rank, (_, _, views, summed) in enumerate(seen):
        assert views["dp"] == [rank % 2 + 2 * i for i in range(4)]
        assert views["dp_cp"] == list(range(8))
        assert views["fsdp"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert summed == bits(range(8))


def test_views_of_a_pipeline_over_context_ranks():
    """Without data ranks all train the same packs; the loss is summed over the parts and the stages."""
    seen = run_ranks(where_am_i, 4, Layout(pp=2, cp=2))
    for rank, (dp_rank, dp_size, views, summed) in enumerate(seen):
        assert (dp_rank, dp_size, views["dp"]) == (0, 1, [rank])
        assert views["dp_cp"] == views["fsdp"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert summed == bits(range(4))


@pytest.mark.parametrize(("asked", "ranks", "threads"), [(0, None, 7), (0, "2", 3), (0, "9", 1), (5, "2", 5)])
def test_the_ranks_of_a_machine_share_its_cores(asked, ranks, threads, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    set_threads(asked)
    assert given == [threads]


def among_experts(layouts):
    """Of each layout (the ranks of this one's ep group, those of its ep_shard group)."""
    meshes = [build_mesh(layout, torch.device("cpu")).experts for layout in layouts]
    return [[mesh[axis].mesh.tolist() for axis in ("ep", "ep_shard")] for mesh in meshes]


def test_ranks_of_an_ep_group_are_neighbours_whatever_axes_they_regroup():
    layouts = [Layout(ep=2), Layout(ep=2, tp=4), Layout(ep=4, cp=2, tp=2), Layout(ep=2, dp_replicate=2), Layout(tp=2)]
    layouts.append(Layout(ep=2, pp=2))
    for rank, found in enumerate(run_ranks(among_experts, 8, layouts)):
        pair, four = [rank // 2 * 2, rank // 2 * 2 + 1], [rank // 4 * 4 + i for i in range(4)]
        every_other, of_half = list(range(rank % 2, 8, 2)), [four[rank % 2], four[rank % 2 + 2]]
        assert found[:2] == [[pair, every_other]] * 2
        assert found[2] == [four, [rank % 4, rank % 4 + 4]]
        assert found[3] == [pair, of_half], "each replica has all experts"
        assert found[4] == [[rank], list(range(8))]
        assert found[5] == [pair, of_half], "each stage has its own"
