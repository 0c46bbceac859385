"""Train on packed shards: `torchrun --nproc-per-node N train/main.py --shards DIR --model DIR --out DIR`.

`python train/main.py …` runs one rank. Read from top to bottom: config → ranks → mesh → data → model on meta →
parallelize → load → optimizer → resume → loop → export.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first on the path, where `train/data.py` would be found as `data`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from formats.dataset import PackedDataset
from train import hf, hf_write
from train.attention.choose import choose_backend
from train.attention.probe import check_isolation
from train.balance import move_biases, take_load
from train.cautions import cautions
from train.checkpoint import (
    Checkpointer,
    DataState,
    Position,
    changes,
    check_data_state,
    check_model,
    describe,
    read_mark,
)
from train.config import Config
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.ending import StopSignal, fail, resume_command
from train.flags import parse
from train.flops import StepFlops, peak_flops
from train.lay import choose_lay
from train.mesh import Mesh, build_mesh, pick_device, set_threads, start_process_group
from train.metrics import Metrics, memory_bytes
from train.mix import open_training
from train.model.decoder import Decoder
from train.model.initialize import init_weights
from train.model.probe import check_experts
from train.optim import build_optimizer, learning_rate
from train.outdir import RunFolder
from train.parallel.apply import parallelize
from train.parallel.pipeline import Pipeline
from train.precision import compute_dtype
from train.profiling import SKIPPED, StepProfiler
from train.step import NotFiniteError, evaluate, sum_over, train_step
from train.trackers import check_packages, open_trackers


def train(config: Config) -> None:
    """Run the training that `config` describes on this rank, from an open process group to the exported model."""
    device = pick_device(config.layout.device)
    set_threads(config.layout.threads)
    model_folder, out = Path(config.model.model), Path(config.run.out)
    model_config = hf.read_config(model_folder)
    mesh = build_mesh(config.layout, device, experts=model_config.moe is not None)

    # Data first: what is wrong with it shows before a weight is read.
    hf.check_weights(model_folder, from_scratch=config.model.init)
    training = open_training(
        config.data.shards,
        model_config.vocab_size,
        seed=config.run.seed,
        batch_packs=config.data.batch_packs,
        micro_packs=config.data.micro_packs,
    )
    dataset, schedule = training.dataset, training.schedule
    eval_datasets = {folder: open_shards(folder, model_config.vocab_size) for folder in config.data.eval_shards}
    if config.data.verify == "full":
        for opened in (dataset, *eval_datasets.values()):
            # The ranks of a machine share the reading.
            opened.check_files(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    manifest = dataset.manifest
    steps = schedule.steps(config.run.epochs)
    steps = min(config.run.steps, steps) if config.run.steps else steps
    cut = choose_cut(
        config.layout.cp_method, mesh.cp_size, mesh.cp_rank, manifest, config.layout.sequence, config.model.attention
    )
    data_state = DataState(training.fingerprints, training.weights, config.run.seed, config.data.batch_packs)

    first = dist.get_rank() == 0
    if first:
        check_packages(config)

    # Where this run begins: at 0, or at a checkpoint that fits.
    run_folder = RunFolder(config)
    checkpoint = run_folder.find_start()
    position = Position(0, 0, data_state)
    recipe = dataclasses.asdict(config.optim) | {"steps": steps}
    recipe |= {name: value for name, value in dataclasses.asdict(config.router).items() if name != "router_log_every"}
    changed = ""
    if checkpoint is not None:
        mark = read_mark(checkpoint)
        position = mark.position
        check_model(checkpoint, mark.model, model_config, model_folder)
        check_data_state(checkpoint, position.data, data_state)
        if position.step > steps:
            raise ValueError(
                f"{checkpoint}: stands at step {position.step}, behind the {steps} that --steps and --epochs ask for; "
                "give more, or write its weights with train/export.py"
            )
        changed = changes(mark.recipe, recipe)

    # The model: built without memory, parallelized, and only then given memory and values, so that no rank ever
    # holds more than its part.
    dtype = compute_dtype(config.model, device.type)
    attention = choose_backend(
        config.model.attention,
        device.type,
        dtype,
        model_config.head_dim,
        softcap=model_config.attention_softcap is not None,
        sinks=model_config.attention_sinks,
    )
    check_isolation(
        attention,
        device,
        dtype,
        model_config.head_dim,
        windows=any(layer.window is not None for layer in model_config.layers),
        softcap=model_config.attention_softcap,
    )
    check_experts(model_config, device, dtype)
    with torch.device("meta"):
        model = Decoder(model_config, attention.name)
    model = parallelize(model, mesh, config)
    model.to_empty(device="cpu" if config.layout.cpu_offload else device)
    if checkpoint is None and config.model.init:
        init_weights(model, config.run.seed)
    elif checkpoint is None:
        hf.load_weights(model, model_folder, config.model.load)
    optimizer = build_optimizer(model, config.optim)
    checkpointer = Checkpointer(
        out,
        model,
        optimizer,
        config.run.keep,
        recipe=recipe,
        described=describe(model_config),
        background=config.run.async_save,
    )
    if checkpoint is not None:
        checkpointer.load(checkpoint)

    flops, peak = StepFlops(Path(config.model.model)), peak_flops(config.run.peak_tflops, device, dtype)
    run_folder.claim()
    metrics = Metrics(out, steps, position.step, open_trackers(config, position.step) if first else [], enabled=first)
    metrics.say(
        f"{dist.get_world_size()} ranks on {device.type}: {mesh}; "
        f"{parameter_count(model, mesh):,} parameters in {str(dtype)[6:]}; "
        f"attention {attention.name}"
        + f" with {config.layout.cp_method} over cp, {cut.kind}"
        * (mesh.cp_size > 1)
        + f"; {len(dataset):,} packs of {manifest.capacity:,}, "
        f"{steps:,} steps of {config.data.batch_packs} packs"
        + (f"; resumed at step {position.step} from {checkpoint}" if checkpoint else "")
    )
    if changed:
        metrics.say(f"changed since that checkpoint, and in force from here on: {changed}")
    if isinstance(model, Pipeline):
        metrics.say(model.summary())
    for caution in cautions(config, model_config, training, eval_datasets):
        metrics.say(f"note: {caution}")
    if training.summary:
        metrics.say(f"mixture: {training.summary}")
    if relaying := choose_lay(dataset, cut).summary(manifest.capacity, mesh.cp_size):
        metrics.say(relaying)

    def evaluation(step: int) -> None:
        for folder, eval_dataset in eval_datasets.items():
            metrics.evaluation(step, folder, *evaluate_packs(config, model, mesh, eval_dataset, device, metrics))

    stop = StopSignal()
    loader = PackedLoader(
        dataset,
        schedule,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device=device,
        cut=cut,
        consumed=position.consumed,
        verify=config.data.verify != "off",
        windows=flops.windows,
        vocab_size=model_config.vocab_size,
    )
    profiler = StepProfiler(out, config.run.profile, device)
    if config.run.profile and steps - position.step <= SKIPPED:
        metrics.say(f"--profile traces nothing: it begins after {SKIPPED} steps, and {steps - position.step} are left")
    # A run that was told to stop has left its evaluation to the one that goes on.
    evaluated = torch.tensor(float(metrics.evaluated))
    dist.all_reduce(evaluated, dist.ReduceOp.MAX)
    if evaluates_at(position.step, config) and not evaluated:
        evaluation(position.step)

    for step in range(position.step + 1, steps + 1):
        began = time.perf_counter()
        facts = loader.next_step()
        lr = learning_rate(step, steps, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        targets, defer_sync = facts.target_tokens, config.layout.defer_sync
        try:
            result = train_step(model, optimizer, loader, targets, mesh, config.optim, defer_sync=defer_sync)
        except NotFiniteError:
            checkpointer.wait()  # the one on its way is what to go on from
            raise
        load = take_load(model, model_config, facts.tokens)
        if load is not None and config.router.router_bias_rate > 0 and result.applied:
            move_biases(model, load, config.router.router_bias_rate)
        position = Position(step, facts.consumed, data_state, position.skipped + (not result.applied))
        # The longest stall and the largest memory of any rank; a signal that reached one stops all after the same step.
        worst = torch.tensor([loader.stall_seconds, memory_bytes(device), stop.received], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        windowed = torch.tensor(list(loader.pairs.values()), dtype=torch.float64)
        windowed = sum_over(windowed, mesh.dp).tolist() if flops.windows else []
        seconds = time.perf_counter() - began
        done = flops.of(facts, dict(zip(flops.windows, windowed, strict=True))) / seconds / dist.get_world_size()
        metrics.step(
            {
                "step": step,
                "epoch": facts.epoch,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "skipped_steps": position.skipped,
                "lr": lr,
                "tokens": facts.tokens,
                "target_tokens": facts.target_tokens,
                "padding_fraction": facts.padding_fraction,
                "step_seconds": seconds,
                "data_stall_seconds": worst[0].item(),
                "tokens_per_second": facts.tokens / seconds,
                "tokens_per_second_per_device": facts.tokens / seconds / dist.get_world_size(),
                "flops_per_second_per_device": done,
                "mfu": done / peak if peak else None,
                "memory_bytes": int(worst[1].item()),
            }
            | (load.record(step, config.router) if load is not None else {})
        )
        profiler.step()
        checkpointer.poll()
        told_to_stop = bool(worst[2].item()) and step < steps
        if step == steps or (evaluates_at(step, config) and not told_to_stop):
            evaluation(step)
        is_due = config.run.save_every > 0 and step % config.run.save_every == 0
        if told_to_stop or is_due or (step == steps and config.run.save_last):
            saved = checkpointer.save(position)
            metrics.say(f"step {step}  checkpoint {saved}" + ", in the background" * config.run.async_save)
        if told_to_stop:
            metrics.say(f"stopped by a signal after step {step} of {steps}; go on with:\n  {resume_command()}")
            break
    loader.close()
    profiler.close()
    checkpointer.wait()
    if position.skipped:
        metrics.say(f"{position.skipped} of {position.step} steps were skipped: loss or gradient was not finite")
    if position.step == steps and config.run.export:
        hf_write.save_weights(model, model_folder, out / "hf")
        metrics.say(f"exported {out / 'hf'}")
    metrics.close()


def evaluates_at(step: int, config: Config) -> bool:
    """Whether the run is evaluated after so many steps, be it the last one or not."""
    return step == 0 or (config.run.eval_every > 0 and step % config.run.eval_every == 0)


def parameter_count(model: Decoder | Pipeline, mesh: Mesh) -> int:
    """Parameters of the whole model, those of every pipeline stage added up."""
    count = torch.tensor(sum(p.numel() for p in model.parameters()))
    return int(sum_over(count, mesh.pp))


def evaluate_packs(
    config: Config,
    model: Decoder | Pipeline,
    mesh: Mesh,
    dataset: PackedDataset,
    device: torch.device,
    metrics: Metrics,
) -> tuple[float, int]:
    """Mean loss of the first `--eval-packs` packs, and over how many target tokens."""
    packs = min(config.run.eval_packs or len(dataset), len(dataset))
    # As many rows at a time as a pipeline has stages to keep busy.
    batch = mesh.dp_size * config.data.micro_packs * mesh.pp_size
    schedule = Schedule(packs, "input", 0, 0, batch, config.data.micro_packs)
    cut = choose_cut(
        config.layout.cp_method,
        mesh.cp_size,
        mesh.cp_rank,
        dataset.manifest,
        config.layout.sequence,
        config.model.attention,
    )
    loader = PackedLoader(
        dataset,
        schedule,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        device=device,
        cut=cut,
        vocab_size=model.config.vocab_size,
    )
    try:
        return evaluate(model, loader, schedule.steps(1), mesh, metrics.evaluating)
    finally:
        loader.close()


def main(argv: list[str]) -> int:
    """Exit code of the run. What is wrong is said once, by the first rank that meets it: its peers fail after it, with
    errors of a torn connection that would only hide the reason."""
    try:
        config = parse(argv)
        store = start_process_group(pick_device(config.layout.device))
    except ValueError as error:
        return fail(error) if os.environ.get("RANK", "0") == "0" else 1
    try:
        train(config)
    except Exception as error:
        try:
            first = store.add("failed", 1) == 1
        except RuntimeError:  # the store went down with the rank that failed first
            first = False
        if first:
            return fail(error)
        time.sleep(1)  # torchrun ends the others as soon as one has left: let the first one speak
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
