"""Whole runs of one rank with every switch that has a side of its own on a GPU: the same runs on CPU and, where there
is one, on CUDA, in bfloat16, against one on CPU in float32."""

import pytest
from devices import DEVICES
from tiny_models import write_tiny_model
from whole_runs import arguments, cli, read_metrics, steps_of

import train.data
from ranks import run_ranks
from train.checkpoint import step_folder

SWITCHES = {
    "nothing": [],
    "recomputed": ["--recompute", "full"],
    "recomputed but what is costly": ["--recompute", "selective"],
    "compiled": ["--compile"],
    "compiled and recomputed": ["--compile", "--recompute", "selective"],
    "in host memory": ["--cpu-offload"],
    "kept, gathered ahead, reduced after each row": ["--no-reshard", "--prefetch", "2", "--no-defer-sync"],
    "summed in bfloat16": ["--reduce-dtype", "bfloat16"],
    "two packs a row": ["--micro-packs", "2"],
    "checkpoints in turn": ["--no-async-save"],
}
MIXTURES = {
    "mixture": ("qwen2_moe", ["--router-aux-loss", "0.01"]),
    "latent attention, biases moved, in host memory": ("deepseek_v3", ["--router-bias-rate", "0.001", "--cpu-offload"]),
}
CLOSE = {"loss": 1e-2, "eval_loss": 1e-2, "grad_norm": 5e-2}  # bfloat16 has 8 bits; seen on CPU: a quarter of these

pytestmark = pytest.mark.timeout(900)  # on a GPU kernels are generated


def run_all(runs, buffers_are_reused=True):
    """Each command line in turn, in one process, with few buffers for rows or with more than there are rows."""
    if buffers_are_reused:
        train.data.RUN_ROWS = 1
    return [cli(argv) for argv in runs]


@pytest.fixture(scope="module")
def models(tiny_llama_dir, tmp_path_factory):
    """Name of a mixture (else "llama") → folder; heads of a size that GPU kernels take."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: write_tiny_model(folder / family, family, hidden_size=64) for name, (family, _) in MIXTURES.items()}
    return {"llama": tiny_llama_dir} | made


@pytest.fixture(scope="module")
def ran(data, models, tmp_path_factory):
    """`ran(device, dtype)` → (folder of the runs, {name: (exit code, what was said)}) of all switches, made once."""
    made = {}

    def run(device, dtype):
        if (device, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{device}-{dtype}")
            # The generated kernels of a CPU are another matter, and need its compiler.
            backend = ["--compile-backend", "inductor" if device == "cuda" else "aot_eager"]
            options = {"device": device, "dtype": dtype, "eval_shards": data / "eval"}
            runs = {
                name: [*arguments(data, models["llama"], folder / name, **options), *flags]
                + ("--compile" in flags) * backend
                for name, flags in (SWITCHES if dtype != "float32" else {"nothing": []}).items()
            }
            for name, (_, flags) in MIXTURES.items():
                runs[name] = [*arguments(data, models[name], folder / name, **options), *flags]
            (said,) = run_ranks(run_all, 1, list(runs.values()), dtype != "float32", process_group=False, timeout=800)
            made[device, dtype] = folder, dict(zip(runs, said, strict=True))
        return made[device, dtype]

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*SWITCHES, *MIXTURES])
def test_every_switch_trains_the_same(name, device, ran):
    wanted = ran("cpu", "float32")[0] / (name if name in MIXTURES else "nothing")
    folder, said = ran(device, "bfloat16")
    assert said[name][0] == 0, said[name][1]
    assert f"1 ranks on {device}" in said[name][1]
    assert f"in bfloat16; attention {'torch' if device == 'cuda' else 'cpu'}" in said[name][1]
    steps = read_metrics(folder / name)
    assert [line["step"] for line in steps] == [0, 1, 2, 3, 4, 5, 6, 6], "evaluated before and after"
    for got, want in zip(steps, read_metrics(wanted), strict=True):
        for key in CLOSE.keys() & want.keys():
            assert got[key] == pytest.approx(want[key], rel=CLOSE[key]), (key, got, want)
    assert (folder / name / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("begun_on", ["the same", "cpu"])
def test_a_run_goes_on_from_a_checkpoint_of_any_device(begun_on, device, ran, data, models, tmp_path):
    folder, _ = ran(device if begun_on == "the same" else "cpu", "bfloat16")
    checkpoint = step_folder(folder / "in host memory", 3)
    out = tmp_path / "out"
    argv = arguments(data, models["llama"], out, device=device, dtype="bfloat16", resume=checkpoint)
    (((code, said),),) = run_ranks(run_all, 1, [argv], process_group=False)
    assert code == 0, said
    steps = steps_of(out)
    assert [line["step"] for line in steps] == [4, 5, 6]
    for got, want in zip(steps, steps_of(folder / "nothing")[3:], strict=True):
        for key in CLOSE.keys() & want.keys():
            assert got[key] == pytest.approx(want[key], rel=CLOSE[key]), (key, got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_by_default_a_gpu_computes_in_bfloat16_and_a_cpu_in_float32(device, data, models, tmp_path):
    options = {"device": "cpu" if device == "cpu" else "auto", "steps": 1}
    argv = arguments(data, models["llama"], tmp_path / "out", **options)
    (((code, said),),) = run_ranks(run_all, 1, [argv], process_group=False)
    assert code == 0, said
    assert ("in float32; attention cpu" if device == "cpu" else "in bfloat16; attention torch") in said
