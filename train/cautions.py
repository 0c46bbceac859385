"""What is not wrong but seldom meant: said at the start of a run, which then goes on."""

from collections.abc import Mapping

from formats.dataset import PackedDataset
from train.config import Config
from train.mix import Training
from train.model.config import ModelConfig


def cautions(
    config: Config, model: ModelConfig, training: Training, eval_datasets: Mapping[str, PackedDataset]
) -> list[str]:
    """A sentence for each; `eval_datasets` by their folders."""
    found = []
    run, steps = config.run, training.schedule.steps(config.run.epochs)
    if run.steps > steps:
        found.append(f"--steps {run.steps} is more than --epochs {run.epochs} makes: {steps} are trained")
    steps = min(run.steps or steps, steps)
    if config.optim.warmup_steps >= steps:
        found.append(
            f"--warmup-steps {config.optim.warmup_steps} is all of the {steps} steps: the learning rate only rises"
        )
    longest = max(int(dataset.index.max_seqlen.max()) for dataset in (training.dataset, *eval_datasets.values()))
    if longest > model.max_positions:
        found.append(
            f"documents of up to {longest:,} tokens, and the model was made for {model.max_positions:,} "
            "(max_position_embeddings of its config.json): if it is to learn longer ones, raise that and stretch the "
            "rotary embedding there; else pack with a shorter --seq-len"
        )
    found += [
        f"{folder} is trained, too: its loss does not tell what the model makes of other documents"
        for folder, dataset in eval_datasets.items()
        if dataset.manifest.fingerprint in training.fingerprints
    ]
    of_training = training.dataset.manifest.tokenizer_hash
    found += [
        f"{folder} was made with another tokenizer than what is trained: its loss says little"
        for folder, dataset in eval_datasets.items()
        if dataset.manifest.tokenizer_hash != of_training
    ]
    return found
