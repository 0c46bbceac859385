"""Sizes of the mesh, and who is where in it."""

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from train.config import Layout
from train.mesh import AXES, axis_sizes, build_mesh


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
    return mesh.dp_rank, mesh.dp_size, mesh.fsdp.mesh.tolist(), dist.get_rank()


def test_views_of_a_hybrid_mesh():
    seen = run_ranks(where_am_i, 4, Layout(dp_replicate=2))
    assert [s[:2] for s in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert all(s[2] == [[0, 1], [2, 3]] for s in seen)


def test_views_of_a_mesh_with_context_and_tensor_ranks():
    seen = run_ranks(where_am_i, 8, Layout(cp=2, tp=2))
    assert [s[:2] for s in seen] == [(0, 2)] * 4 + [(1, 2)] * 4, "cp and tp ranks share their packs"
    assert [s[2] for s in seen[:2]] == [[0, 2, 4, 6], [1, 3, 5, 7]], "FSDP goes over dp_shard × cp"


def test_views_of_a_hybrid_mesh_with_context_ranks():
    seen = run_ranks(where_am_i, 8, Layout(dp_replicate=2, cp=2))
    assert [s[0] for s in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(s[2] == [[0, 1, 2, 3], [4, 5, 6, 7]] for s in seen)
