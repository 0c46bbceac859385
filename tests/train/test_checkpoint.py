"""Checkpoints: bit-equal on any mesh, whole or not there, and the data state that a position belongs to."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from ranks import run_ranks
from train.checkpoint import (
    MARK,
    VERSION,
    Checkpointer,
    DataState,
    Mark,
    Position,
    check_data_state,
    check_model,
    describe,
    read_mark,
    step_folder,
    whole_checkpoints,
)
from train.config import Config, Layout, Optim
from train.mesh import build_mesh
from train.model.config import LayerConfig, ModelConfig, MoeConfig, Rope
from train.model.decoder import Decoder
from train.optim import build_optimizer
from train.parallel.apply import parallelize

STATE = DataState(("f",), (1.0,), 3, 8)


def tiny(hidden=16):
    layer = LayerConfig(window=None, rope=Rope(10_000.0, 8))
    return ModelConfig("llama", 37, hidden, 24, 2, 1, 8, (layer, layer), 64, 1e-5, 8**-0.5, tied_embeddings=True)


def build(layout, seed, hidden=16):
    """A parallelized tiny decoder and its optimizer, with values and moments that depend on `seed` alone."""
    with torch.device("meta"):
        model = Decoder(tiny(hidden))
    model = parallelize(model, build_mesh(layout, torch.device("cpu")), Config(layout=layout))
    model.to_empty(device="cpu")
    optimizer = build_optimizer(model, Optim())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for p in model.parameters():
            for target in ("data", "grad"):
                whole = torch.randn(p.shape, generator=generator)
                if target == "grad":
                    p.grad = torch.zeros_like(p)
                target_tensor = p.data if target == "data" else p.grad
                if not isinstance(p, DTensor):  # a world of one
                    target_tensor.copy_(whole)
                    continue
                distributed = DTensor.from_local(
                    whole.clone(), p.device_mesh, [torch.distributed.tensor.Replicate()] * p.device_mesh.ndim
                ).redistribute(p.device_mesh, p.placements)
                target_tensor.to_local().copy_(distributed.to_local())
        optimizer.step()
    return model, optimizer


def everything(model, optimizer):
    """All values and moments as full tensors on every rank, by name."""
    found = {}  # clones: on one rank the full tensor is the parameter itself
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        found |= {f"{name}.{k}": (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in state.items()}
    return found


def save(out, layout):
    model, optimizer = build(layout, seed=1)
    Checkpointer(out, model, optimizer, keep=0).save(Position(7, 56, STATE))
    return everything(model, optimizer)


def load(out, layout):
    model, optimizer = build(layout, seed=2)
    before = everything(model, optimizer)
    Checkpointer(out, model, optimizer, keep=0).load(whole_checkpoints(out)[-1])
    return before, everything(model, optimizer)


@pytest.fixture(scope="module")
def saved_on_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint")
    return out, run_ranks(save, 2, out, Layout())[0]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, Layout()), (3, Layout()), (4, Layout(dp_replicate=2)), (2, Layout(dp_replicate=2))]
)
def test_model_and_optimizer_are_bit_equal_on_another_mesh(saved_on_two, world, layout):
    out, expected = saved_on_two
    for before, after in run_ranks(load, world, out, layout):
        assert after.keys() == expected.keys()
        assert not torch.equal(before["embed_tokens.weight"], expected["embed_tokens.weight"])
        for name, value in expected.items():
            assert torch.equal(after[name], value), name


def test_the_position_is_kept(saved_on_two):
    folder = whole_checkpoints(saved_on_two[0])[-1]
    assert folder == step_folder(saved_on_two[0], 7)
    assert read_mark(folder) == Mark(Position(7, 56, STATE), {}, {})


def load_with_other_options(out):
    model, optimizer = build(Layout(), seed=2)
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"], group["foreach"] = (0.5, 0.6), 0.3, None
    Checkpointer(out, model, optimizer, keep=0).load(whole_checkpoints(out)[-1])
    return [(group["betas"], group["weight_decay"], group["foreach"]) for group in optimizer.param_groups]


def test_the_options_of_the_optimizer_are_those_of_the_run_that_goes_on(saved_on_two):
    for groups in run_ranks(load_with_other_options, 2, saved_on_two[0]):
        assert groups == 2 * [((0.5, 0.6), 0.3, None)]


def save_before_a_step(out):
    with torch.device("meta"):
        model = Decoder(tiny())
    model = parallelize(model, build_mesh(Layout(), torch.device("cpu")), Config())
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    optimizer = build_optimizer(model, Optim())
    Checkpointer(out, model, optimizer, keep=0).save(Position(2, 2, STATE, skipped=2))
    steps = [state["step"].item() for state in optimizer.state.values()]
    model, optimizer = build(Layout(), seed=2)
    Checkpointer(out, model, optimizer, keep=0).load(whole_checkpoints(out)[-1])
    return steps + [state["step"].item() for state in optimizer.state.values()]


def test_a_checkpoint_of_a_run_that_skipped_every_step_counts_none(tmp_path):
    for steps in run_ranks(save_before_a_step, 2, tmp_path):
        assert set(steps) == {0.0}
    assert read_mark(step_folder(tmp_path, 2)).position.skipped == 2


def fail_in_the_write(out, background, kill):
    """Rank 1 cannot write its part, or is killed while it does; what rank 0 finds whole afterwards."""
    model, optimizer = build(Layout(), seed=1)
    checkpointer = Checkpointer(out, model, optimizer, keep=0, background=background)
    write = FileSystemWriter.write_data

    def failing(*args, **options):
        if dist.get_rank() == 1 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(*args, **options)

    FileSystemWriter.write_data = failing
    try:
        checkpointer.save(Position(2, 2, STATE))
        checkpointer.wait()
    except BaseException as error:  # torch's CheckpointException is no Exception
        return type(error).__name__, whole_checkpoints(out)


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_that_cannot_be_written_is_never_marked(background, tmp_path):
    for error, whole in run_ranks(fail_in_the_write, 2, tmp_path, background, False):
        assert error in ("CheckpointException", "ValueError")
        assert whole == []


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_whose_writer_is_killed_is_never_marked(background, tmp_path):
    with pytest.raises(AssertionError, match="rank 1: died with exit code -9"):
        run_ranks(fail_in_the_write, 2, tmp_path, background, True)
    assert step_folder(tmp_path, 2).is_dir()
    assert whole_checkpoints(tmp_path) == []


def write_slowly(out):
    """What is whole while the background write waits, and after it; whether it holds what was when it began."""
    model, optimizer = build(Layout(), seed=1)
    saved = everything(model, optimizer)
    checkpointer = Checkpointer(out, model, optimizer, keep=0, background=True)
    write, go_on = FileSystemWriter.write_data, threading.Event()

    def waiting(*args, **options):
        assert go_on.wait(60)
        return write(*args, **options)

    FileSystemWriter.write_data = waiting
    checkpointer.save(Position(2, 2, STATE))
    checkpointer.poll()
    before = whole_checkpoints(out)
    for p in model.parameters():  # as the next steps do
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moved = everything(model, optimizer)
    dist.barrier()
    go_on.set()
    checkpointer.wait()
    after = whole_checkpoints(out)
    checkpointer.load(after[-1])
    loaded = everything(model, optimizer)
    assert not any(torch.equal(moved[name], value) for name, value in saved.items())
    return before, after, all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_a_checkpoint_in_the_background_holds_its_step_and_is_marked_when_it_is_written(tmp_path):
    for before, after, same in run_ranks(write_slowly, 2, tmp_path):
        assert (before, after, same) == ([], [step_folder(tmp_path, 2)], True)


def save_three(out, keep):
    model, optimizer = build(Layout(), seed=1)
    checkpointer = Checkpointer(out, model, optimizer, keep)
    for step in (2, 4, 6):
        checkpointer.save(Position(step, step, STATE))


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 4, 6]), (1, [6]), (2, [4, 6])])
def test_only_the_newest_are_kept(tmp_path, keep, left):
    run_ranks(save_three, 1, tmp_path, keep)
    assert whole_checkpoints(tmp_path) == [step_folder(tmp_path, step) for step in left]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-{step:08d}" for step in left]


def save_three_where_files_stay(out):
    """Nothing is removed but one file of tensors: as a kill leaves it, or NFS while somebody reads."""

    def rmtree(folder, ignore_errors=False):
        if folder.exists():
            next(folder.glob("*.distcp")).unlink()
            if not ignore_errors:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    shutil.rmtree = rmtree
    save_three(out, 1)


def test_an_old_checkpoint_loses_its_mark_before_its_tensors_and_never_costs_the_new_one(tmp_path):
    run_ranks(save_three_where_files_stay, 1, tmp_path)
    assert whole_checkpoints(tmp_path) == [step_folder(tmp_path, 6)]
    assert len(list(step_folder(tmp_path, 6).glob("*.distcp"))) == 1
    assert step_folder(tmp_path, 2).exists()


def test_a_checkpoint_without_its_mark_is_not_there_and_is_overwritten(saved_on_two, tmp_path):
    shutil.copytree(saved_on_two[0] / "checkpoints", tmp_path / "checkpoints")
    (step_folder(tmp_path, 7) / MARK).unlink()
    (step_folder(tmp_path, 7) / "__9_9.distcp").write_bytes(b"half")
    assert whole_checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="no complete checkpoint"):
        read_mark(step_folder(tmp_path, 7))
    run_ranks(save, 1, tmp_path, Layout())
    assert whole_checkpoints(tmp_path) == [step_folder(tmp_path, 7)]
    assert not (step_folder(tmp_path, 7) / "__9_9.distcp").exists()


def load_wider(out):
    model, optimizer = build(Layout(), seed=1, hidden=32)
    try:
        Checkpointer(out, model, optimizer, keep=0).load(whole_checkpoints(out)[-1])
    except ValueError as error:
        return str(error)


def test_the_checkpoint_of_another_model_is_refused_by_name(saved_on_two):
    (message,) = run_ranks(load_wider, 1, saved_on_two[0])
    assert "embed_tokens.weight is (37, 16) there and (37, 32) in this model; check --model" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprints": ("g",)}, "fingerprints was ('f',) and is now ('g',)"),
        ({"weights": (0.5,)}, "weights was"),
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"batch_packs": 6}, "batch_packs was 8 and is now 6"),
    ],
)
def test_a_resume_under_another_data_state_says_what_differs(change, says):
    with pytest.raises(ValueError, match="cannot resume") as error:
        check_data_state(Path("c"), STATE, dataclasses.replace(STATE, **change))
    assert says in str(error.value)
    check_data_state(Path("c"), STATE, dataclasses.replace(STATE))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 4}, "whose num_heads is 4 and was 2; give --model the folder"),
        ({"layers": tiny().layers[:1]}, "whose layers are 1 and were 2"),
        ({"layers": (tiny().layers[0], LayerConfig(8, None))}, "whose layers.1.window is 8 and was None"),
        ({"moe": MoeConfig(4, 2, 8)}, "whose moe is {'num_experts': 4"),
        ({"max_positions": 99, "initializer_range": 0.5}, None),
    ],
)
def test_the_checkpoint_of_a_model_that_means_something_else_is_refused(change, says):
    """Names and shapes of tensors would all be there."""
    saved, now = json.loads(json.dumps(describe(tiny()))), dataclasses.replace(tiny(), **change)
    if says is None:
        return check_model(Path("c"), saved, now, Path("m"))
    with pytest.raises(ValueError, match="c: is the checkpoint of another model than m") as error:
        check_model(Path("c"), saved, now, Path("m"))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *((text, "not the mark") for text in (b"{", b"{}", b"[]", {"step": "1"}, {"consumed": -3})),
        ({"version": 99}, "checkpoint version 99"),
    ],
)
def test_a_mark_that_cannot_be_read_is_refused(content, says, tmp_path):
    if isinstance(content, dict):
        mark = {"version": VERSION, **dataclasses.asdict(Position(1, 1, STATE)), "recipe": {}, "model": {}}
        (tmp_path / MARK).write_text(json.dumps(mark))
        assert read_mark(tmp_path).position == Position(1, 1, STATE)
        content = json.dumps(mark | content).encode()
    (tmp_path / MARK).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_mark(tmp_path)
