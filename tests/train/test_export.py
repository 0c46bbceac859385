"""Exports of a checkpoint by one process: the same files as the run's own, in any size and type, or one sentence."""

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train.main
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.checkpoint import MARK, whole_checkpoints
from train.export import export, main
from train.flags import parse
from train.hf import INDEX
from train.outdir import RUN_NAME

ODD = "0.0", "inf", "nan"
ROOT = Path(__file__).parents[2]


def run(argv, folder):
    os.chdir(folder)
    train.main.train(parse(argv))


@pytest.fixture(scope="module")
def finished(tiny_llama_dir, tmp_path_factory):
    """A run of two steps on three ranks, of a model named from where it was started; only to be read."""
    folder = tmp_path_factory.mktemp("export")
    rows = random_packs(np.random.default_rng(0), 6, 160, 4, 320)
    shards = make_shards(folder / "shards", rows, capacity=160, align=4)
    flags = {"shards": shards, "model": tiny_llama_dir.name, "out": folder / "out", "batch-packs": 3, "steps": 2}
    flags |= {"save-every": 1, "lr": 1e-2, "device": "cpu", "threads": 1}
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    run_ranks(run, 3, argv, tiny_llama_dir.parent)
    return folder / "out"


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_command_writes_what_the_run_has_exported(finished, tmp_path):
    command = [sys.executable, "train/export.py", str(finished), "--out", str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    written, wanted = (
        {f.name: f.read_bytes() for f in folder.iterdir()} for folder in (tmp_path / "hf", finished / "hf")
    )
    assert written == wanted


def test_the_command_does_not_load_what_only_training_needs():
    check = "import sys, train.export; sys.exit('numba' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", check], env=environment).returncode == 0


def test_an_earlier_checkpoint_in_small_files_and_another_type(finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, last = whole_checkpoints(finished)
    assert export(first, tmp_path / "hf", dtype=torch.bfloat16, file_gb=50_000 / 1e9) == first
    files = list((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 50_000 for file in files)
    early, late = tensors(tmp_path / "hf"), tensors(finished / "hf")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in early.values())
    assert early.keys() == late.keys()
    assert not torch.equal(early["model.norm.weight"], late["model.norm.weight"].bfloat16())
    shutil.rmtree(tmp_path / "hf")
    export(last, tmp_path / "hf", dtype=torch.bfloat16)
    late = {name: tensor.bfloat16() for name, tensor in late.items()}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in late.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template


def test_what_is_wrong_is_said_in_one_sentence(finished, tiny_llama_untied_dir, tmp_path, capsys):
    half = tmp_path / "step-00000001"
    half.mkdir()
    (half / ".metadata").write_bytes(b"")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    lost = tmp_path / "checkpoints" / "step-00000002"
    lost.mkdir(parents=True)
    (lost / MARK).write_bytes((whole_checkpoints(finished)[-1] / MARK).read_bytes())
    moved = shutil.copytree(lost, tmp_path / "moved" / "checkpoints" / "step-00000002").parents[1]
    (moved / RUN_NAME).write_text(json.dumps({"folder": str(tmp_path), "flags": {"model": "gone"}}))
    out = str(tmp_path / "hf")
    for argv, says in (
        ([str(half), "--out", out], "no complete checkpoint"),
        ([str(tmp_path / "nowhere"), "--out", out], "no complete checkpoint"),
        ([str(lost), "--out", out], "does not tell which model was trained"),
        ([str(moved), "--out", out], f"{tmp_path / 'gone'}, the model of that run, is not there any more; name its"),
        ([str(finished), "--out", str(tmp_path / "thesis")], "thesis already holds something; name another folder"),
        ([str(finished), "--out", str(finished / "hf")], "hf already holds something"),
        ([str(finished / RUN_NAME), "--out", out], "no complete checkpoint"),
        ([str(finished), "--out", str(finished / RUN_NAME / "hf")], f"{RUN_NAME}: File exists"),
        *(
            ([str(finished), "--out", out, "--file-gb", n], f"--file-gb must be a number greater than 0, not {n}")
            for n in ODD
        ),
        (
            [str(finished), "--out", out, "--model", str(tiny_llama_untied_dir)],
            f"another model than {tiny_llama_untied_dir}, whose tied_embeddings is False and was True; give --model",
        ),
    ):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert says in said
        assert len(said.splitlines()) == 1
    assert not Path(out).exists()


def on_a_full_disk(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(argv), said.getvalue()


def test_an_export_on_a_full_disk_leaves_nothing(finished, tmp_path):
    argv = [str(finished), "--out", str(tmp_path / "hf")]
    ((code, said),) = run_ranks(on_a_full_disk, 1, argv, process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert f"{tmp_path / 'hf'} cannot be written: " in said
    assert not list(tmp_path.iterdir())
