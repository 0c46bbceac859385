"""Hugging Face folders: reading with checks, reading shards on several ranks, bit-equal round trip."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ranks import run_ranks
from train import hf, hf_write
from train.attention.interface import Segments
from train.model.decoder import Decoder
from train.model.initialize import init_weights
from train.model.sources import weight_sources

EMBEDDING = "model.embed_tokens.weight"


def load_plain(folder: Path) -> Decoder:
    with torch.device("meta"):
        model = Decoder(hf.read_config(folder))
    model.to_empty(device="cpu")
    hf.load_weights(model, folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read without the project's code."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.fixture(params=["tied", "untied"])
def tiny_dir(request, tiny_llama_dir, tiny_llama_untied_dir):
    return tiny_llama_dir if request.param == "tied" else tiny_llama_untied_dir


def edited(folder: Path, target: Path, **changes) -> Path:
    """A copy of `folder` with keys of config.json changed (None: removed)."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize("file_bytes", [hf_write.FILE_BYTES, 40_000])
def test_round_trip_is_bit_equal_and_transformers_opens_it(tiny_dir, tmp_path, file_bytes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "export"
    hf_write.save_weights(load_plain(tiny_dir), tiny_dir, out, file_bytes=file_bytes)
    assert equal(tensors(out), tensors(tiny_dir))
    assert (out / hf.INDEX).exists() == (file_bytes == 40_000)
    assert len(list(out.glob("*.safetensors"))) == 1 or file_bytes == 40_000
    theirs, original = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, tiny_dir))
    assert equal(theirs, original)
    text = "hello <|im_end|> world"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(tiny_dir)(text)
    assert (out / "generation_config.json").read_bytes() == (tiny_dir / "generation_config.json").read_bytes()
    # and our own reader, through the index when there is one
    ours, again = load_plain(tiny_dir).state_dict(), load_plain(out).state_dict()
    assert equal(ours, again)


def test_export_in_bfloat16_says_so(tiny_llama_dir, tmp_path):
    out = tmp_path / "export"
    hf_write.save_weights(load_plain(tiny_llama_dir), tiny_llama_dir, out, dtype=torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = {name: tensor.bfloat16() for name, tensor in tensors(tiny_llama_dir).items()}
    assert equal(tensors(out), rounded)
    assert load_plain(out).norm.weight.dtype == torch.float32  # the model's type wins on reading


@pytest.mark.parametrize("file_bytes", [5 << 30, 40_000])
def test_a_correction_bias_is_never_rounded(tmp_path, file_bytes):
    """It moves by steps that bfloat16 cannot hold beside scores near 1."""
    source, out = write_tiny_model(tmp_path / "source", "deepseek_v3", vocab_size=320), tmp_path / "export"
    model = load_plain(source)
    bias = model.layers[0].mlp.router.correction_bias
    bias.copy_(1 + torch.arange(len(bias)) * 0.001)
    hf_write.save_weights(model, source, out, dtype=torch.bfloat16, file_bytes=file_bytes)
    biases = {name for name in tensors(out) if name.endswith("e_score_correction_bias")}
    assert {name for name, tensor in tensors(out).items() if tensor.dtype == torch.float32} == biases != set()
    assert torch.equal(tensors(out)["model.layers.0.mlp.gate.e_score_correction_bias"], bias)
    assert torch.equal(load_plain(out).layers[0].mlp.router.correction_bias, bias)
    if (out / hf.INDEX).exists():
        size = json.loads((out / hf.INDEX).read_text())["metadata"]["total_size"]
        assert size == sum(tensor.nbytes for tensor in tensors(out).values())


def test_export_replaces_an_earlier_one_and_leaves_nothing_behind(tiny_llama_dir, tmp_path):
    out = tmp_path / "export"
    model = load_plain(tiny_llama_dir)
    hf_write.save_weights(model, tiny_llama_dir, out, file_bytes=40_000)
    hf_write.save_weights(model, tiny_llama_dir, out)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (out / hf.INDEX).exists()
    assert out.stat().st_mode & 0o777 == 0o755
    assert (out / hf.WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_failed_export_leaves_nothing(tiny_llama_dir, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(hf_write, "save_file", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        hf_write.save_weights(load_plain(tiny_llama_dir), tiny_llama_dir, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"type 'mamba' are not supported: use one of llama \(LlamaForCausalLM\)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is supported"),
        ({"hidden_act": "relu"}, "Activation 'relu' is not supported"),
        ({"attention_dropout": 0.1}, "set attention_dropout to 0"),
        ({"brand_new_gate": True}, r"holds brand_new_gate = True.*Keys that are read: .*rms_norm_eps"),
        ({"vocab_size": None}, "no 'vocab_size', which a llama model needs"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "spiral"}}, "Rope scaling 'spiral' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "twist": 3}}, "Unknown keys in the rope parameters of .*twist"),
    ],
)
def test_config_that_is_not_understood_is_refused(tiny_llama_dir, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        hf.read_config(edited(tiny_llama_dir, tmp_path / "edited", **changes))


def test_keys_before_and_after_transformers_5_read_the_same(tiny_llama_dir, tmp_path):
    old = edited(tiny_llama_dir, tmp_path / "old", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert hf.read_config(old) == hf.read_config(tiny_llama_dir)


def test_missing_folder_and_broken_files_are_one_sentence(tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match=r"config.json cannot be read .*: name a folder"):
        hf.read_config(tmp_path / "nowhere")
    broken = shutil.copytree(tiny_llama_dir, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        hf.read_config(broken)
    model = load_plain(tiny_llama_dir)
    (broken / hf.WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        hf.load_weights(model, broken)
    (broken / hf.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        hf.load_weights(model, broken)


def test_weights_that_do_not_fit_are_named(tiny_llama_dir, tmp_path):
    model = load_plain(tiny_llama_dir)
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "edited")
    good = load_file(tiny_llama_dir / hf.WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in (
        ({name: None}, f"no tensor '{name}'"),
        ({name: torch.zeros(3, 4)}, rf"{name} in .* has shape \[3, 4\], its config.json asks for \[112, 64\]"),
        ({"model.extra.weight": torch.zeros(2)}, "1 tensors without a place in a llama model, 'model.extra.weight'"),
        ({name: good[name].to(torch.float8_e4m3fn)}, f"{name} in .* is stored as F8_E4M3: convert it to F64 or F32"),
        ({name: good[name].to(torch.int8)}, f"{name} in .* is stored as I8: convert it to F64 or F32"),
        ({hf.HEAD: good[EMBEDDING] + 1}, f"{hf.HEAD} in .* is not {EMBEDDING}, though its config.json ties them"),
    ):
        save_file({n: t for n, t in (good | change).items() if t is not None}, folder / hf.WEIGHTS)
        with pytest.raises(ValueError, match=message):
            hf.load_weights(model, folder)
    # what old files repeat is no error
    repeated = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), hf.HEAD: good[EMBEDDING].clone()}
    save_file(good | repeated, folder / hf.WEIGHTS)
    hf.load_weights(model, folder)


def test_of_several_files_that_hold_a_tensor_the_index_says_which(tiny_llama_dir, tmp_path):
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "several")
    good = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    where = dict.fromkeys(good, "b.safetensors") | {EMBEDDING: "a.safetensors"}
    for name in ("a", "b", "c"):
        wrong = {tensor: value + 1 for tensor, value in good.items() if where[tensor] != f"{name}.safetensors"}
        save_file(good | wrong, folder / f"{name}.safetensors")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": where}))
    model = load_plain(folder)
    assert torch.equal(model.embed_tokens.weight, good[EMBEDDING])
    assert torch.equal(model.norm.weight, good["model.norm.weight"])


@pytest.mark.parametrize("content", [{"metadata": {}}, [1], {"weight_map": {}}, {"weight_map": {EMBEDDING: 3}}])
def test_an_index_that_is_none_is_refused(content, tiny_llama_dir, tmp_path):
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "indexed")
    model = load_plain(folder)
    (folder / hf.INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map that says which file holds which tensor"):
        hf.load_weights(model, folder)


def test_meta_parameters_are_refused(tiny_llama_dir):
    with torch.device("meta"):
        model = Decoder(hf.read_config(tiny_llama_dir))
    with pytest.raises(ValueError, match=r"call model\.to_empty"):
        hf.load_weights(model, tiny_llama_dir)


def shard(model: Decoder, layout: str) -> None:
    """FSDP, HSDP, or FSDP over tensor parallelism (one parameter sharded twice on the same dim)."""
    world = dist.get_world_size()
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    else:
        both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp_shard", "tp"))
        for block in model.layers:
            plan = {name: ColwiseParallel() for name in ("attention.q_proj", "mlp.gate_proj", "mlp.up_proj")}
            parallelize_module(block, both["tp"], plan | {"mlp.down_proj": RowwiseParallel()})
        mesh = both["dp_shard"]
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def load_and_export(folder: str, out: str, layout: str, how: str) -> None:
    """On every rank: build on meta, shard, load the own part, compare with the file, export, initialise."""
    with torch.device("meta"):
        model = Decoder(hf.read_config(Path(folder)))
    shard(model, layout)
    model.to_empty(device="cpu")
    hf.load_weights(model, Path(folder), how)
    stored, sources = tensors(Path(folder)), weight_sources(model.config)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), stored[sources[name].name]), name
    if layout == "fsdp":  # a forward alone leaves the root gathered in bfloat16; the export must not see that
        ids = torch.arange(12)
        with torch.no_grad():
            model(ids, ids, Segments.of([12]), ids)
    hf_write.save_weights(model, Path(folder), Path(out))

    init_weights(model, seed=3)
    alone = Decoder(model.config)
    init_weights(alone, seed=3)
    for name, parameter in alone.named_parameters():
        assert torch.equal(model.state_dict()[name].full_tensor(), parameter), name


@pytest.mark.parametrize(
    ("world", "layout", "kind", "how"),
    [
        (2, "fsdp", "tied", "direct"),
        (3, "fsdp", "untied", "broadcast"),
        (4, "hsdp", "tied", "broadcast"),
        (4, "tp", "untied", "direct"),
        (4, "tp", "tied", "broadcast"),
    ],
)
def test_every_rank_gets_its_own_part(request, tmp_path, world, layout, kind, how):
    folder = request.getfixturevalue("tiny_llama_dir" if kind == "tied" else "tiny_llama_untied_dir")
    run_ranks(load_and_export, world, str(folder), str(tmp_path / "export"), layout, how)
    assert equal(tensors(tmp_path / "export"), tensors(folder))


def load_both_ways(folders: list[str]) -> None:
    for folder in map(Path, folders):
        loaded = []
        for how in ("direct", "broadcast"):
            with torch.device("meta"):
                model = Decoder(hf.read_config(folder))
            shard(model, "fsdp")
            model.to_empty(device="cpu")
            hf.load_weights(model, folder, how)
            loaded.append(model.state_dict())
        for name, parameter in loaded[0].items():
            assert torch.equal(parameter.to_local(), loaded[1][name].to_local()), (folder.name, name)


def test_fused_interleaved_and_stacked_tensors_arrive_the_same_both_ways(tmp_path):
    import transformers

    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    folders = []
    for name in ("Phi3", "Mixtral", "GptOss"):
        config = getattr(transformers, f"{name}Config")(**sizes, num_local_experts=4)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        content = json.loads((tmp_path / name / "config.json").read_text())
        if name == "Phi3":
            del content["num_local_experts"]
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        folders.append(str(tmp_path / name))
    run_ranks(load_both_ways, 2, folders)


def load_broken(folder: str) -> str:
    model = load_plain(Path(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        os.remove(Path(folder) / hf.WEIGHTS)
    try:
        hf.load_weights(model, Path(folder), "broadcast")
    except ValueError as error:
        return str(error)


def test_what_rank_0_cannot_read_is_said_on_every_rank(tiny_llama_dir, tmp_path):
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    messages = run_ranks(load_broken, 2, str(folder))
    assert all("holds neither model.safetensors nor" in message for message in messages)


def copy_by_placement(folder: str) -> None:
    """Any placement, not only those of FSDP: rows, columns, replicated, both dims over two axes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = load_plain(Path(folder))
    for placements in ([Shard(1), Shard(1)], [Shard(0), Shard(1)], [Replicate(), Shard(1)], [Shard(0), Shard(0)]):
        linear = model.layers[0].mlp.down_proj
        expected = load_file(Path(folder) / hf.WEIGHTS)["model.layers.0.mlp.down_proj.weight"]
        empty = distribute_tensor(torch.zeros(expected.shape), mesh, placements)
        linear.weight = torch.nn.Parameter(empty)
        hf.load_weights(model, Path(folder))
        assert torch.equal(linear.weight.full_tensor(), expected), placements


def test_general_placements(tiny_llama_dir):
    run_ranks(copy_by_placement, 4, str(tiny_llama_dir))
